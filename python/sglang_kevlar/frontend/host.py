"""What the failover actor needs of its surroundings."""

from __future__ import annotations

from typing import Any, TypeAlias

from sglang.srt.managers.io_struct import AbortReq, BatchEmbeddingOutput, BatchStrOutput, BatchTokenIDOutput

from sglang_kevlar.frontend.channels import GroupChannel

BatchOutput: TypeAlias = BatchStrOutput | BatchTokenIDOutput | BatchEmbeddingOutput


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

    async def prepare_group(self, channel: GroupChannel) -> str | None:
        """Bring a group that just became ready to the state of the others. A reason why it must not serve, or None."""
        raise NotImplementedError

    def content(self) -> str:
        """A name for the weights that all groups serve; another one after every change of them."""
        raise NotImplementedError

    def group_lost(self, group: int, epoch: int) -> None:
        """Nobody needs to wait for this epoch any more."""
        raise NotImplementedError
