"""Control requests to the worker groups, and what they changed, kept the same in all groups that serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from sglang.srt.managers.io_struct import (
    ContinueGenerationReqInput,
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
        self._transfers = WeightTransfers(failover, changes, self._weights_change, timeout, metrics)
        #: by the type of the answer
        self._communicators: dict[type, GroupCommunicator] = {}
        #: the answer to what is being replayed
        self._replaying: dict[GroupEpoch, asyncio.Future[Any]] = {}
        #: what was replayed to groups that live
        self._replayed: dict[GroupEpoch, list[Any]] = {}
        #: an update that no group was there for, and why the first one that started since did not take it
        self._awaited: tuple[Any, asyncio.Future[str | None]] | None = None

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
        self._check(request)
        channels = {(c.group, c.epoch): c for c in self._failover.channels.values() if c.up_to_date}
        for channel in channels.values():
            if (reason := channel.refusal(request)) is not None:
                raise HTTPException(400, f"{type(request).__name__}: {reason}")
        messages = self._update_groups.messages(request, channels.keys())
        self._changes.record(request)
        weights = bool(channels) and changes_weights(request)
        if weights:
            self._forget_kv()
            # In every group's own order: nothing is shadowed or promoted between the old weights and the new.
            self._failover.plan_shadows(content="")
        sent = {member for member, channel in channels.items() if self._failover.send(channel, messages[member])}
        if weights:
            self._failover.plan_shadows()
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
        self._check(request)
        self._changes.record(request)
        self._forget_kv()
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
        # Of a group on another host the frontend before this one had another count.
        if not channel.remote and self._changes.has_all(channel.group, channel.epoch):
            return None  # it served the frontend before this one
        applied: list[Any] = []
        #: names the weights that came from another group
        fetched: str | None = None
        while not channel.closed:
            if self._changes.not_replayable is not None and fetched != self._changes.content:
                fetched, reason = await self._transfers.bring(channel)
                if reason is not None:
                    return reason
                applied = [change for change in applied if not changes_weights(change)]
                continue
            if fetched not in (None, self._changes.content) and self._changes.weights is None:
                return "the change whose weights it took over was taken back meanwhile"
            wanted = self._changes.replay()
            if any(all(change is not other for other in wanted) for change in applied):
                return "a change that had been replayed to it was taken back or replaced meanwhile"
            missing = [change for change in wanted if all(change is not other for other in applied)]
            if not missing:
                if not channel.remote:
                    self._changes.set_up_to_date(channel.group, channel.epoch)
                self._replayed[channel.group, channel.epoch] = applied
                return None
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
        member = (channel.group, channel.epoch)
        self._replaying[member] = asyncio.get_running_loop().create_future()
        try:
            self._failover.send(channel, change)
            async with asyncio.timeout(self._timeout):
                answer = await self._replaying[member]
        except (TimeoutError, ConnectionError):
            return f"{name} could not be replayed to it: no answer"
        finally:
            del self._replaying[member]
        if not getattr(answer, "success", True):
            return f"{name} could not be replayed to it: {reason_of(answer)}"
        return None

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
            if why.startswith("no answer") or (changes_weights(request) and any(said in why for said in _SPOILED)):
                self._kill(group, epoch, f"{name} failed there: {why}")

    def _retract(self, request: Any, name: str) -> None:
        self._changes.retract(request)
        for (group, epoch), replayed in list(self._replayed.items()):
            if any(change is request for change in replayed):
                self._kill(group, epoch, f"{name} was replayed to it and then failed in the others")

    def _weights_change(self) -> bool:
        """Whether it is open which groups took a change of the weights."""
        return any(
            communicator.under_way is not None and changes_weights(communicator.under_way)
            for communicator in self._communicators.values()
        )

    def _forget_kv(self) -> None:
        self._failover.journal.weights += 1
        self._failover.router.forget_prefixes()

    @staticmethod
    def _check(request: Any) -> None:
        try:
            check_message(request)
        except Unsendable as error:
            raise HTTPException(400, f"{type(request).__name__}: {error}") from error
