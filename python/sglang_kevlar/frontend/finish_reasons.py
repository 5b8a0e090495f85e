"""What a scheduler says when it ends a request: the request's fault, the group's, or only too little room?"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from sglang_kevlar.control.journal import Entry

#: how upstream's errors 500 begin that say no more than that the KV pool is full: the group is as healthy as before,
#: and one that takes its place has no more room
_CAPACITY = (
    "Out of memory even after retracting all other requests",
    "Beam search group aborted: KV cache pool is full",
    "Retraction host KV pool exhausted",
)

Reason = dict[str, Any] | None


def is_internal_error(reason: Reason) -> bool:
    """Whether it counts against the group's error budget."""
    return (
        _aborted(reason, HTTPStatus.INTERNAL_SERVER_ERROR)
        and reason is not None
        and not str(reason.get("message", "")).startswith(_CAPACITY)
    )


def is_refused_resume(entry: Entry, reason: Reason) -> bool:
    """Whether the scheduler that was to continue this request said that it cannot (`worker.scheduler`)."""
    return bool(entry.redirects and entry.delivered) and _aborted(reason, HTTPStatus.SERVICE_UNAVAILABLE)


def _aborted(reason: Reason, status: HTTPStatus) -> bool:
    return bool(reason and reason.get("type") == "abort" and reason.get("status_code") == status)
