"""Weights of a group that starts again, from one that has what was changed at run time.

After an update that only live processes received nobody else has them. A transfer counts only if no change was under
way when it was asked for, and none came since: then what the group has is what all others agreed on.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_kevlar.frontend.channels import Channel
from sglang_kevlar.frontend.fan_out import GroupEpoch
from sglang_kevlar.frontend.replay import RunTimeChanges
from sglang_kevlar.observability.metrics import NoMetrics, TransferOutcome
from sglang_kevlar.worker.weights.messages import (
    FetchWeightsReq,
    FetchWeightsReqOutput,
    ServeWeightsReq,
    ServeWeightsReqOutput,
)

if TYPE_CHECKING:
    from sglang_kevlar.frontend.failover import Failover

logger = logging.getLogger(__name__)

#: seconds until it is tried again when weights were just being changed
RETRY = 0.2
#: seconds that a group may take to answer, besides what it was given for the work
ANSWER_GRACE = 40.0


class WeightTransfers:
    """One at a time: two would only share the memory bandwidth of the same group."""

    def __init__(
        self,
        failover: Failover,
        changes: RunTimeChanges,
        changing: Callable[[], bool],
        timeout: float,
        metrics: NoMetrics,
    ) -> None:
        """``changing``: whether a change of the weights is sent and not yet answered. ``timeout``: seconds for all
        tries of one group."""
        self._failover = failover
        self._changes = changes
        self._changing = changing
        self._timeout = timeout
        self._metrics = metrics
        self._one_at_a_time = asyncio.Lock()
        self._asked: dict[GroupEpoch, tuple[str, asyncio.Future[Any]]] = {}

    def answer(self, member: GroupEpoch, reply: Any) -> bool:
        """Whether ``reply`` belongs here."""
        if not isinstance(reply, ServeWeightsReqOutput | FetchWeightsReqOutput):
            return False
        ticket, future = self._asked.get(member, ("", None))
        if future is not None and ticket == reply.ticket and not future.done():
            future.set_result(reply)
        return True

    def group_lost(self, member: GroupEpoch) -> None:
        _, future = self._asked.get(member, ("", None))
        if future is not None and not future.done():
            future.set_exception(ConnectionError("it was lost"))

    async def bring(self, channel: Channel) -> tuple[str, str | None]:
        """The weights of a group that serves, into this one. The name of what it has then, or a reason why not.

        No name and no reason: they are to be had from disk by now, and must be, for it may have some of the others.
        """
        async with self._one_at_a_time:
            deadline = time.monotonic() + self._timeout
            failed: set[GroupEpoch] = set()
            why = "no worker group that has them serves"
            while not channel.closed and time.monotonic() < deadline:
                if self._changes.not_replayable is None:
                    return "", None
                content = self._changes.content
                donor = self._donor(channel, failed)
                if donor is None:
                    break
                if self._changing():
                    why = "the weights are being changed"
                    await asyncio.sleep(RETRY)
                    continue
                # Nothing is waited for before it is sent: a change that comes later reaches the donor later.
                began = time.monotonic()
                busy, reason, size = await self._transfer(donor, channel, deadline)
                changed = content != self._changes.content
                outcome: TransferOutcome = "changed" if changed or busy else "done" if reason is None else "failed"
                self._metrics.weight_transfer(outcome, size, time.monotonic() - began)
                if changed:
                    failed.clear()
                    why = "the weights are being changed"
                elif reason is None:
                    return content, None
                else:
                    if (said := f"worker group {donor.group}: {reason}") != why:
                        logger.warning(
                            "worker group %d (epoch %d) did not get the weights of %s",
                            channel.group,
                            channel.epoch,
                            said,
                        )
                    why = said
                    if busy:
                        await asyncio.sleep(RETRY)
                    else:
                        failed.add((donor.group, donor.epoch))
            return "", f"{self._changes.not_replayable} ({why})"

    def _donor(self, channel: Channel, failed: set[GroupEpoch]) -> Channel | None:
        fit = [
            other
            for other in self._failover.channels.values()
            if other.up_to_date and not other.given_up and not other.closed and other.group != channel.group
            if (other.group, other.epoch) not in failed and other.place.version == channel.place.version
        ]
        # On the same host, and there one that has less to do.
        return min(
            fit,
            key=lambda o: (o.suspect, o.place.local != channel.place.local, not o.place.standby, o.group),
            default=None,
        )

    async def _transfer(self, donor: Channel, channel: Channel, deadline: float) -> tuple[bool, str | None, int]:
        """Whether to try the same again, why it failed, and the bytes that were taken if it did not."""
        ticket, began = uuid.uuid4().hex, time.monotonic()
        logger.info(
            "worker group %d (epoch %d): takes over the weights of worker group %d",
            channel.group,
            channel.epoch,
            donor.group,
        )
        network = not (donor.place.local and channel.place.local)
        offer = await self._ask(donor, ServeWeightsReq(ticket=ticket, network=network), 0.0)
        if isinstance(offer, str) or not offer.success:
            return (False, offer, 0) if isinstance(offer, str) else (offer.busy, offer.message, 0)
        left = max(0.0, deadline - time.monotonic())
        done = await self._ask(channel, FetchWeightsReq(ticket=ticket, endpoints=offer.endpoints, timeout=left), left)
        if isinstance(done, str) or not done.success:
            return (False, done, 0) if isinstance(done, str) else (done.busy, done.message, 0)
        logger.info(
            "worker group %d (epoch %d): has the weights of worker group %d, %.1f MB in %.2f s",
            channel.group,
            channel.epoch,
            donor.group,
            done.bytes / 1e6,
            time.monotonic() - began,
        )
        return False, None, done.bytes

    async def _ask(self, channel: Channel, request: Any, timeout: float) -> Any:
        """The answer, or why there is none."""
        if (reason := channel.refusal(request)) is not None:
            return reason
        member = channel.group, channel.epoch
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[member] = request.ticket, future
        try:
            if not self._failover.send(channel, request):
                return f"worker group {channel.group} was lost"
            async with asyncio.timeout(timeout + ANSWER_GRACE):
                return await future
        except TimeoutError:
            return f"worker group {channel.group} did not answer"
        except ConnectionError:
            return f"worker group {channel.group} was lost"
        finally:
            del self._asked[member]
