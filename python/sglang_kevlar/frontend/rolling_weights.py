"""Other weights from disk, one group after the other, while the rest serve: `control.rolling` with real groups."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

from sglang_kevlar.control.journal import Entry
from sglang_kevlar.control.rolling import Done, Refuse, RollingUpdate, Switch, Take, Wait
from sglang_kevlar.frontend.channels import Channel
from sglang_kevlar.frontend.control_requests import NO_ANSWER, ROLLING, ControlRequests, spoiled
from sglang_kevlar.frontend.groups import WorkerGroups
from sglang_kevlar.frontend.replay import RunTimeChanges
from sglang_kevlar.frontend.requests import NOT_SERVED

if TYPE_CHECKING:
    from sglang_kevlar.frontend.failover import Failover

logger = logging.getLogger(__name__)

#: seconds for which requests may end on the weights that they began with, unless the operator says otherwise
DEFAULT_DEADLINE = 600.0
#: seconds between two looks at what a group still runs
POLL = 0.05
#: seconds between two tries to move what could not be moved
RETRY = 1.0
#: seconds in which what is refused has ended
REFUSED = 30.0


class _Failed(Exception):
    """The update is taken back: no group serves the new weights."""


class RollingWeights:
    """At most one update at a time. All of it is to be called on the event loop's thread."""

    def __init__(
        self,
        failover: Failover,
        groups: WorkerGroups,
        control: ControlRequests,
        changes: RunTimeChanges,
        timeout: float,
        switched: Callable[[UpdateWeightFromDiskReqInput], None],
    ) -> None:
        """``timeout``: seconds for which it may be waited for a group. ``switched``: requests begin with the new
        weights now."""
        self._failover = failover
        self._groups = groups
        self._control = control
        self._changes = changes
        self._timeout = timeout
        self._switched = switched
        #: of the update under way, or the last one
        self._course: RollingUpdate | None = None
        self._request: Any = None
        self._versions: dict[str, str] = {}
        self._deadline = DEFAULT_DEADLINE
        self._began = self._ended = 0.0
        self._doing = ""
        #: groups that were lost while they loaded weights that none had loaded yet
        self._lost = 0
        self._failure: str | None = None

    @property
    def old(self) -> str:
        """Name of the weights that the update replaces."""
        assert self._course is not None
        return self._course.old

    def starts_with_old(self) -> bool:
        assert self._course is not None
        return self._course.starts_with(self._serving(), self._old_requests()) == self._course.old

    def version_of(self, weights: str) -> str | None:
        """The operator's name of the weights of a request, while there are two."""
        return self._versions.get(weights) if self.under_way else None

    @property
    def under_way(self) -> bool:
        return self._control.rolling is not None

    def refuse_if_under_way(self) -> None:
        """Raises HTTPException 409."""
        if self.under_way:
            raise HTTPException(409, ROLLING)

    def start(self, request: UpdateWeightFromDiskReqInput, version: str, deadline: float) -> None:
        """Returns at once; `status` says how it goes. ``version``: the operator's name of the weights until now.
        ``deadline``: seconds for which requests may end on them.

        Raises HTTPException 400 for what could not be done at all, 409 for what cannot be done now.
        """
        self.refuse_if_under_way()
        channels = [self._failover.channels[group] for group in self._serving()]
        if self._control.changes_under_way():
            raise HTTPException(409, "another change of weights or adapters is under way")
        if self._changes.paused:
            raise HTTPException(409, "generation is paused: requests would not end")
        if draining := [group for group in self._groups.ids() if self._groups.is_draining(group)]:
            raise HTTPException(409, f"worker group {draining[0]} is drained: undrain it first")
        if len(channels) < 2:
            serve = f"{len(channels)} worker {'group serves' if len(channels) == 1 else 'groups serve'}"
            raise HTTPException(409, f"{serve}, and one at a time has to be taken out: use /update_weights_from_disk")
        self._control.check(request, channels)
        old, replayable = self._changes.content, self._changes.not_replayable is None
        self._changes.begin_rolling(request)
        new = self._changes.content
        self._course = RollingUpdate(old, new, replayable)
        self._request, self._deadline, self._failure = request, deadline, None
        self._versions = {old: version, new: request.weight_version or version}
        self._began, self._doing, self._lost = time.monotonic(), "", 0
        self._control.rolling = self
        logger.info("weights of %s, group by group: begins", request.model_path)
        self._failover.spawn(self._run(self._course))

    def status(self) -> dict[str, Any] | None:
        """Of /kevlar/status; None when there was no update since this frontend began."""
        course = self._course
        if course is None:
            return None
        serving = self._serving()
        state = "running" if self.under_way else "done" if self._failure is None else "failed"
        return {
            "state": state,
            "error": self._failure,
            "model_path": self._request.model_path,
            "weight_version": self._versions[course.new],
            "switched": course.switched,
            "doing": self._doing,
            "groups_done": sorted(group for group, weights in serving.items() if weights == course.new),
            "groups_left": sorted(group for group, weights in serving.items() if weights == course.old),
            "requests_left": self._old_requests(),
            "seconds": round((time.monotonic() if self.under_way else self._ended) - self._began, 3),
        }

    # ---- the course ----------------------------------------------------------------------------------------------

    async def _run(self, course: RollingUpdate) -> None:
        try:
            await self._go_through(course)
        except _Failed as failure:
            self._failure = str(failure)
            logger.error("weights of %s, group by group: taken back: %s", self._request.model_path, failure)
            self._control.take_back(self._request)
        finally:
            self._end()
        if self._failure is None:
            logger.info("weights of %s, group by group: done after %.1f s", self._request.model_path, self._seconds())

    async def _go_through(self, course: RollingUpdate) -> None:
        progress = time.monotonic()
        while not isinstance(step := course.next(self._serving(), self._old_requests()), Done):
            if isinstance(step, Take):
                if await self._take(course, self._failover.channels[step.group], step.last):
                    progress = time.monotonic()
                elif time.monotonic() - progress > self._timeout and not self._proven(course):
                    raise _Failed(f"no worker group can be emptied for {self._timeout:g} s")
                await asyncio.sleep(POLL)
            elif isinstance(step, Switch):
                self._switch(course)
                progress = time.monotonic()
            elif isinstance(step, Refuse):
                await self._refuse_all()
            elif isinstance(step, Wait):
                self._doing = step.why
                waited = time.monotonic() - progress
                if course.switched and waited > self._deadline:
                    await self._refuse_all()
                elif not course.switched and waited > self._timeout:
                    # At once: a moment later a group with the new weights may serve.
                    raise _Failed(f"{step.why} for {self._timeout:g} s")
                await asyncio.sleep(POLL)

    def _proven(self, course: RollingUpdate) -> bool:
        """Also by a group that started meanwhile."""
        course.proven |= course.new in self._serving().values()
        return course.proven

    def _serving(self) -> dict[int, str]:
        """See `RollingUpdate.next`: those that have the least to do come first."""
        fit = [c for c in self._failover.channels.values() if c.up_to_date and not c.given_up]
        load = {
            c.group: (not self._groups.is_standby(c.group), len(self._failover.journal.running_on(c.group, c.epoch)))
            for c in fit
        }
        return {c.group: c.weights for c in sorted(fit, key=lambda c: (load[c.group], c.group))}

    def _old_requests(self) -> int:
        """Requests under way with the old weights, and calls of which more may come."""
        old = self.old
        requests = [request for request in self._failover.requests.values() if request.entry.weights == old]
        calls = {call for call in self._failover.calls if call.weights == old and not call.refused}
        return len(requests) + len(calls - {request.call for request in requests})

    def _switch(self, course: RollingUpdate) -> None:
        course.switched = True
        journal = self._failover.journal
        journal.weights, journal.other_weights = course.new, course.old
        self._failover.begin_with(course.new)
        logger.info("weights of %s, group by group: requests begin with them from now on", self._request.model_path)
        self._switched(self._request)
        self._failover.route()

    def _end(self) -> None:
        self._ended, self._doing = time.monotonic(), ""
        for channel in self._failover.channels.values():
            channel.taken = False
        self._failover.journal.other_weights = None
        self._changes.end_rolling()
        self._control.rolling = None
        self._failover.route()

    def _seconds(self) -> float:
        return self._ended - self._began

    # ---- a group -------------------------------------------------------------------------------------------------

    async def _take(self, course: RollingUpdate, channel: Channel, last: bool) -> bool:
        """Empty it, and give it the new weights. False: it was lost meanwhile, or is needed where it is."""
        self._doing = f"worker group {channel.group}: its requests end" + ("" if last else " or move")
        # The last one with the old weights goes on taking requests that need them: the rest of a batch, say.
        channel.taken = not last
        self._failover.route()
        if not await self._emptied(course, channel, last):
            channel.taken = False
            self._failover.route()
            return False
        self._doing = f"worker group {channel.group}: loads the weights"
        channel.up_to_date = channel.taken = False
        self._failover.set_weights([channel], "")
        self._failover.route()
        reason = await self._control.take_new_weights(channel)
        if channel.closed or channel.given_up:
            self._lost += 1
            # Once may be chance.
            if self._lost > 1 and not self._proven(course):
                raise _Failed(f"{self._lost} worker groups were lost while they loaded them")
            return False
        course.proven |= reason is None
        if reason is None:
            pass
        elif self._proven(course) or spoiled(reason) or NO_ANSWER in reason:
            # It starts anew, and is brought up to date like any group that starts.
            self._groups.kill(channel.group, channel.epoch, f"the weight update failed there: {reason}")
        if reason is not None and not course.proven:
            self._failover.set_weights([channel], course.old)
        if reason is None or not course.proven:
            channel.up_to_date = not channel.given_up
        self._failover.route()
        if reason is not None and not course.proven:
            raise _Failed(f"worker group {channel.group}: {reason}")
        return reason is None

    async def _emptied(self, course: RollingUpdate, channel: Channel, last: bool) -> bool:
        """False: it was lost, or is the only one left that serves the old weights."""
        member = channel.group, channel.epoch
        deadline = time.monotonic() + self._deadline
        tried = 0.0
        while not (channel.closed or channel.given_up):
            if not last and not self._failover.router.having(course.old):
                return False
            left = self._failover.journal.running_on(*member)
            if not left and not (last and self._old_requests()) and not self._control.awaits(member):
                return True
            if not last and time.monotonic() - tried > RETRY:
                await self._failover.move_away(channel.group, "emptied for a weight update")
                tried = time.monotonic()
                continue
            if time.monotonic() > deadline + REFUSED:
                stuck = "it does not get empty for a weight update"
                if not self._proven(course):
                    raise _Failed(f"worker group {channel.group}: {stuck}")
                self._groups.kill(*member, stuck)
                return False
            if time.monotonic() > deadline:
                await self._refuse(None if last else member)
            await asyncio.sleep(POLL)
        return False

    # ---- requests that cannot end on their weights ---------------------------------------------------------------

    async def _refuse_all(self) -> None:
        """What began with the old weights, also what comes meanwhile: the rest of a batch."""
        until = time.monotonic() + REFUSED
        while self._old_requests() and time.monotonic() < until:
            await self._refuse(None)
            await asyncio.sleep(POLL)

    async def _refuse(self, member: tuple[int, int] | None) -> None:
        """``member``: those on this group only."""
        old = self.old
        if member is None:
            for call in self._failover.calls:
                call.refused |= call.weights == old

        def cannot_end(entry: Entry) -> bool:
            here = None if entry.attempt is None else (entry.attempt.group, entry.attempt.epoch)
            return entry.weights == old and member in (None, here)

        why = NOT_SERVED if member is None else "it cannot be moved, and its worker group gets other weights"
        await self._failover.refuse_running(cannot_end, why)
