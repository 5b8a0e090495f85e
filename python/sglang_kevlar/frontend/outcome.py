"""What the tokenizer manager tells the HTTP layer about a request, past upstream's endpoint code in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sglang_kevlar.frontend.kept.progress import Progress

#: why a request is refused or ended; also the `kind` label of sglang_kevlar_refused_requests_total
FailureKind = Literal[
    "invalid", "no_group", "queue_full", "redirect_limit", "poison", "not_continuable", "weights", "shutdown"
]

SCOPE_KEY = "kevlar"

#: in the ASGI messages of a kept request's stream: `Progress.offset` when the endpoint sent it
OFFSET_KEY = "kevlar.offset"


@dataclass(frozen=True, slots=True)
class Failure:
    """How a request ends. The message goes to the client: it names the request and the reason, never its content."""

    status: int
    message: str
    kind: FailureKind
    #: seconds, for the Retry-After header; None when trying again is of no use
    retry_after: int | None = None


@dataclass(slots=True)
class RequestOutcome:
    """One per HTTP request, shared by all its sub-requests (batch, n > 1).

    The manager sets ``first_token`` immediately before it hands the first output of any sub-request to the
    endpoint, and calls ``fail`` before it raises (or ends the sub-request). The middleware does the rest.
    """

    failure: Failure | None = None
    first_token: bool = False
    #: something has gone out to the client: the status code can no longer change (set by the middleware)
    delivered: bool = False
    #: its sub-requests in flight, in order (kept by the actor): found without a look at all others
    rids: dict[str, None] = field(default_factory=dict)
    #: of a request that outlives its connection (`frontend.kept`); None for all others
    kept: Progress | None = None

    def fail(self, failure: Failure) -> bool:
        """The first failure wins. True when this was it: the caller then aborts the other sub-requests."""
        if self.failure is not None:
            return False
        self.failure = failure
        return True


def outcome_of(request: Any) -> RequestOutcome | None:
    """The outcome of a starlette request; None for requests without HTTP (Engine, warm-up) and for WebSockets."""
    return None if request is None else request.scope.get(SCOPE_KEY)
