"""Where a kept request is answered that does not run here: what `KeptMiddleware` and the endpoints ask peers for."""

from __future__ import annotations

from typing import Protocol

from starlette.types import Receive, Scope, Send

from sglang_kevlar.frontend.kept.run import Run
from sglang_kevlar.frontend.outcome import Failure


class Elsewhere(Protocol):
    """The other frontends, as seen from where requests come in."""

    def may_go_on(self, run: Run, last_id: str) -> bool:
        """Whether what a client has, with this last event, is the beginning of what ``run`` has made."""

    async def answer(
        self,
        identity: tuple[str, str] | None,
        rid: str | None,
        principal: str,
        last_id: str | None,
        begun: bool,
        scope: Scope,
        body: bytes,
        receive: Receive,
        send: Send,
    ) -> Run | Failure | bool:
        """For a request that has no run here which could go on behind ``last_id``, by its identity or its id.
        ``begun``: somebody must have it.

        A run that is here now; why it cannot be answered; True when a peer has answered it, or the client has left;
        False when nobody has it.
        """
