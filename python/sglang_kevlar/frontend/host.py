"""What the failover actor needs of its surroundings."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from sglang.srt.managers.io_struct import AbortReq, BatchEmbeddingOutput, BatchStrOutput, BatchTokenIDOutput

from sglang_kevlar.control.membership import GroupReady
from sglang_kevlar.frontend.channels import Channel
from sglang_kevlar.observability.events import Redirect

BatchOutput: TypeAlias = BatchStrOutput | BatchTokenIDOutput | BatchEmbeddingOutput


class Groups(Protocol):
    """The groups that there are: `frontend.groups.WorkerGroups`, and fakes in tests."""

    @property
    def active(self) -> int:
        """How many should serve: with fewer, capacity is lost and new requests may have to wait."""

    def is_standby(self, group: int) -> bool: ...

    def is_draining(self, group: int) -> bool: ...

    def open(self, ready: GroupReady, capacity: int) -> Channel:
        """The channel of an incarnation. ``capacity``: KV tokens that it can hold."""

    def kill(self, group: int, epoch: int, cause: str) -> None:
        """Give an incarnation up; ignored if it is not the current one."""

    def on_internal_error(self, group: int, epoch: int) -> None:
        """It answered a request with an internal error (never for a client's own 4xx)."""


class Host:
    """Implemented by the tokenizer manager, and by fakes in tests."""

    async def deliver(self, batch: BatchOutput) -> None:
        """Hand a batch to the clients' side. Request ids are the clients'."""
        raise NotImplementedError

    def finish_aborted(self, abort: AbortReq) -> None:
        """End a request on the clients' side as aborted."""
        raise NotImplementedError

    def delivered_text(self, rid: str) -> str:
        """All text that a request's client has so far."""
        raise NotImplementedError

    def control_reply(self, group: int, epoch: int, reply: Any) -> None:
        """A group answered a control request."""
        raise NotImplementedError

    async def prepare_group(self, channel: Channel) -> str | None:
        """Bring a group that just became ready to the state of the others, and note its weights in the channel.

        A reason why it must not serve, or None.
        """
        raise NotImplementedError

    def redirect_through(self, rid: str, redirect: Redirect) -> None:
        """A request that was moved has its next token."""
        raise NotImplementedError

    def group_lost(self, group: int, epoch: int) -> None:
        """Nobody needs to wait for this epoch any more."""
        raise NotImplementedError
