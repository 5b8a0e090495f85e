"""Control requests to the worker groups, and what they changed, kept the same in all groups that serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import HTTPException
from sglang.srt.managers.io_struct import (
    ContinueGenerationReqInput,
    FlushCacheReqInput,
    PauseGenerationReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightFromDiskReqOutput,
)

from sglang_kevlar.frontend.channels import Channel
from sglang_kevlar.frontend.fan_out import GroupCommunicator, GroupEpoch, reason_of
from sglang_kevlar.frontend.replay import RunTimeChanges, changes_weights
from sglang_kevlar.frontend.update_groups import UpdateGroups
from sglang_kevlar.frontend.weight_transfers import WeightTransfers
from sglang_kevlar.frontend.wire_check import Unsendable, check_message
from sglang_kevlar.observability.metrics import NoMetrics

if TYPE_CHECKING:
    from sglang_kevlar.frontend.failover import Failover

logger = logging.getLogger(__name__)

#: messages a scheduler acts on without answering
_UNANSWERED = (PauseGenerationReqInput, ContinueGenerationReqInput)
#: how upstream says that a failed update may have left some of the weights changed
_SPOILED = ("Rolling back", "partially updated")
NO_ANSWER = "no answer"
ROLLING = "a weight update goes from group to group; see `weights` in /kevlar/status"
#: seconds for what was moved away from a group to be gone from it
IDLE_TIMEOUT = 30.0


def spoiled(why: str) -> bool:
    """Whether an update that failed so may have left weights that are neither the old ones nor the new."""
    return any(said in why for said in _SPOILED)


class Rolling(Protocol):
    """What is to be known here of `frontend.rolling_weights`."""

    @property
    def old(self) -> str:
        """Name of the weights that the update replaces."""

    def starts_with_old(self) -> bool:
        """Whether a group that starts is to get the old weights."""


class ControlRequests:
    def __init__(
        self,
        failover: Failover,
        kill: Callable[[int, int, str], None],
        changes: RunTimeChanges,
        tp_size: int,
        timeout: float,
        metrics: NoMetrics,
    ) -> None:
        self._failover = failover
        self._kill = kill
        self._changes = changes
        self._timeout = timeout
        self._update_groups = UpdateGroups(tp_size)
        self._transfers = WeightTransfers(failover, changes, self.weights_change, timeout, metrics)
        #: by the type of the answer
        self._communicators: dict[type, GroupCommunicator] = {}
        #: the answer to what is being replayed
        self._replaying: dict[GroupEpoch, asyncio.Future[Any]] = {}
        #: what was replayed to groups that live
        self._replayed: dict[GroupEpoch, list[Any]] = {}
        #: an update that no group was there for, and why the first one that started since did not take it
        self._awaited: tuple[Any, asyncio.Future[str | None]] | None = None
        #: the update that goes from group to group, while one does
        self.rolling: Rolling | None = None

    def communicator(self, name: str, answer: type) -> GroupCommunicator:
        made = GroupCommunicator(
            name, self._failover.first_group, self.broadcast, self._disagree, self._nobody_did, self._timeout
        )
        self._communicators[answer] = made
        return made

    def broadcast(self, request: Any) -> set[GroupEpoch]:
        """Send to every group that serves; what changes them is remembered for those that start later.

        Raises HTTPException 400 for what must not be sent.
        """
        channels = {(c.group, c.epoch): c for c in self._failover.channels.values() if c.up_to_date}
        self.check(request, channels.values())
        if self.rolling is not None and self._changes.is_change(request):
            raise HTTPException(409, f"{type(request).__name__}: {ROLLING}")
        messages = self._update_groups.messages(request, channels.keys())
        self._changes.record(request)
        weights = changes_weights(request)
        if weights:
            # In every group's own order: nothing is shadowed or promoted between the old weights and the new.
            self._failover.set_weights(channels.values(), "")
        sent = {member for member, channel in channels.items() if self._failover.send(channel, messages[member])}
        if weights:
            self._serve_weights()
        return sent

    def answer(self, member: GroupEpoch, reply: Any) -> bool:
        """Whether ``reply`` belongs here."""
        if self._transfers.answer(member, reply):
            return True
        replay = self._replaying.get(member)
        communicator = self._communicators.get(type(reply))
        if replay is not None:
            if not replay.done():
                replay.set_result(reply)
        elif communicator is not None:
            communicator.on_answer(member, reply)
        return replay is not None or communicator is not None

    def group_lost(self, member: GroupEpoch) -> None:
        for communicator in self._communicators.values():
            communicator.on_group_lost(member)
        self._transfers.group_lost(member)
        self._replayed.pop(member, None)
        replay = self._replaying.get(member)
        if replay is not None and not replay.done():
            replay.set_exception(ConnectionError("the group was lost"))

    async def update_weights_from_disk(self, request: UpdateWeightFromDiskReqInput) -> list[Any]:
        """As by the communicator; but when nobody serves because weights could not be replayed, these take their
        place, and the first group that starts says whether they can be loaded."""
        await self._failover.first_group()
        if self._changes.not_replayable is None or any(c.up_to_date for c in self._failover.channels.values()):
            return list(await self._communicators[UpdateWeightFromDiskReqOutput](request))
        if self._awaited is not None:
            raise HTTPException(409, "update_weights_from_disk: another one waits for a worker group")
        self.check(request, ())
        self._changes.record(request)
        self._serve_weights()
        self._awaited = (request, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(self._timeout):
                reason = await self._awaited[1]
        except TimeoutError:
            reason = f"no worker group took it within {self._timeout:g} s"
        finally:
            self._awaited = None
        if reason is not None:
            self._retract(request, "update_weights_from_disk")
        message = reason or "Succeeded to update model weights in the first worker group that started since."
        return [UpdateWeightFromDiskReqOutput(success=reason is None, message=message, num_paused_requests=0)]

    # ---- groups that start ---------------------------------------------------------------------------------------

    async def prepare(self, channel: Channel) -> str | None:
        """Replay changes to a group that starts, one by one, also those that come meanwhile. See Host."""
        if self._changes.is_doubtful(channel.place.name):
            return "its weights were being changed when the frontend was lost, and are not known"
        # Of a group on another host the frontend before this one had another count.
        if not channel.remote and self._changes.has_all(channel.group, channel.epoch):
            channel.weights = self._changes.content
            return None  # it served the frontend before this one
        return await self._bring_up_to_date(channel, [])

    async def take_new_weights(self, channel: Channel) -> str | None:
        """Of a `control.rolling` update, to a group that is empty and not up to date; as `prepare`.

        The group has answered all that it was asked for: see `GroupCommunicator.awaits`.
        """
        wanted = self._changes.replay()
        had = [change for change in self._changes.replay(old=True) if any(change is other for other in wanted)]
        return await self._bring_up_to_date(channel, had, new=True)

    def awaits(self, member: GroupEpoch) -> bool:
        """Whether this group has been asked for something that it has not answered."""
        return any(communicator.awaits(member) for communicator in self._communicators.values())

    async def _bring_up_to_date(self, channel: Channel, applied: list[Any], new: bool = False) -> str | None:
        """``applied``: what it has. ``new``: of a rolling update, those weights, whatever else there is."""
        rolling, old = self.rolling, self._starts_with_old() and not new
        #: names the weights that came from another group
        fetched: str | None = None
        while not channel.closed:
            if self.rolling is not rolling:
                rolling, old = self.rolling, self._starts_with_old()
            if self._changes.not_replayable is not None and fetched != self._changes.content:
                fetched, reason = await self._transfers.bring(channel)
                if reason is not None:
                    return reason
                applied = [change for change in applied if not changes_weights(change)]
                continue
            if fetched not in (None, self._changes.content) and self._changes.weights is None:
                return "the change whose weights it took over was taken back meanwhile"
            wanted = self._changes.replay(old)
            if any(all(change is not other for other in wanted) for change in applied):
                return "a change that had been replayed to it was taken back or replaced meanwhile"
            missing = [change for change in wanted if all(change is not other for other in applied)]
            if not missing:
                channel.weights = rolling.old if old and rolling is not None else self._changes.content
                if rolling is not None and not old:
                    self._changes.proven()
                if not channel.remote and not old:
                    self._changes.set_up_to_date(channel.group, channel.epoch)
                self._replayed[channel.group, channel.epoch] = applied
                return None
            reason = await self._idle(channel) if changes_weights(missing[0]) else None
            if reason is None:
                if rolling is not None and missing[0] is self._changes.weights:
                    self._changes.sent_to(channel.place.name)
                reason = await self._replay(channel, missing[0])
            if self._awaited is not None and self._awaited[0] is missing[0] and not self._awaited[1].done():
                self._awaited[1].set_result(reason)
            if reason is not None:
                return reason
            applied.append(missing[0])
        return None

    async def _replay(self, channel: Channel, change: Any) -> str | None:
        name = type(change).__name__.removesuffix("ReqInput")
        if (reason := channel.refusal(change)) is not None:
            return f"{name} cannot be replayed to it: {reason}"
        logger.info("worker group %d (epoch %d): replaying %s", channel.group, channel.epoch, name)
        if isinstance(change, _UNANSWERED):
            self._failover.send(channel, change)
            return None
        reason = await self._ask(channel, change)
        return None if reason is None else f"{name} could not be replayed to it: {reason}"

    async def _idle(self, channel: Channel) -> str | None:
        """Wait until what was moved or aborted is gone: upstream ends a scheduler that cannot flush after an update."""
        reason = await self._ask(channel, FlushCacheReqInput(timeout_s=IDLE_TIMEOUT))
        return None if reason is None else f"it does not get idle: {reason}"

    async def _ask(self, channel: Channel, request: Any) -> str | None:
        """Of a group that is not up to date, so that nobody else asks it. Why it did not do it, or None."""
        member = (channel.group, channel.epoch)
        self._replaying[member] = asyncio.get_running_loop().create_future()
        try:
            self._failover.send(channel, request)
            async with asyncio.timeout(self._timeout):
                answer = await self._replaying[member]
        except (TimeoutError, ConnectionError):
            return NO_ANSWER
        finally:
            del self._replaying[member]
        return None if getattr(answer, "success", True) else reason_of(answer)

    def _starts_with_old(self) -> bool:
        """Whether a group that starts now is to get the weights that an update under way replaces."""
        return self.rolling is not None and self.rolling.starts_with_old()

    # ---- groups that differ --------------------------------------------------------------------------------------

    def _disagree(self, request: Any, name: str, failed: dict[GroupEpoch, str]) -> bool:
        """These groups did not do what others did, or may have: they start again and are brought up to date.

        Only where it makes them different: a profile that one group could not start is no reason to kill it.
        """
        if not self._changes.is_change(request):
            return False
        for (group, epoch), why in failed.items():
            self._kill(group, epoch, f"{name} failed there: {why}")
        return True

    def _nobody_did(self, request: Any, name: str, failed: dict[GroupEpoch, str]) -> None:
        """No group is known to have done it: those that start later must not either, and whoever may have, or is
        left between the old weights and the new, starts again."""
        if not self._changes.is_change(request):
            return
        self._retract(request, name)
        for (group, epoch), why in failed.items():
            if why.startswith(NO_ANSWER) or (changes_weights(request) and spoiled(why)):
                self._kill(group, epoch, f"{name} failed there: {why}")

    def _retract(self, request: Any, name: str) -> None:
        self._changes.retract(request)
        if changes_weights(request):
            self._serve_weights()
        for (group, epoch), replayed in list(self._replayed.items()):
            if any(change is request for change in replayed):
                self._kill(group, epoch, f"{name} was replayed to it and then failed in the others")

    def take_back(self, request: Any) -> None:
        """A `control.rolling` update that failed: no group that is up to date has its weights."""
        self._retract(request, "the weight update")
        for channel in self._failover.channels.values():
            if channel.up_to_date and not channel.remote:
                self._changes.set_up_to_date(channel.group, channel.epoch)

    def changes_under_way(self) -> bool:
        """Whether it is open which groups took a change of any kind."""
        sent = [communicator.under_way for communicator in self._communicators.values()]
        return self._awaited is not None or any(self._changes.is_change(one) for one in sent if one is not None)

    def weights_change(self) -> bool:
        """Whether it is open which groups took a change of the weights."""
        return self.rolling is not None or any(
            communicator.under_way is not None and changes_weights(communicator.under_way)
            for communicator in self._communicators.values()
        )

    def _serve_weights(self) -> None:
        """All groups that are up to date have the weights as they are now, by name."""
        self._failover.journal.weights = self._changes.content
        up_to_date = [channel for channel in self._failover.channels.values() if channel.up_to_date]
        self._failover.set_weights(up_to_date, self._changes.content)

    @staticmethod
    def check(request: Any, channels: Iterable[Channel]) -> None:
        """Whether it can be sent to these. Raises HTTPException 400."""
        try:
            check_message(request)
        except Unsendable as error:
            raise HTTPException(400, f"{type(request).__name__}: {error}") from error
        for channel in channels:
            if (reason := channel.refusal(request)) is not None:
                raise HTTPException(400, f"{type(request).__name__}: {reason}")
