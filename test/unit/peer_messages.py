"""Records of requests for tests, with what does not matter filled in."""

from __future__ import annotations

from typing import Any

from sglang_kevlar.protocol.records import Alone, Dropped, Ended, HttpRequest, Opened, Yielded

P = "principal"


def http(body: bytes = b"{}", path: str = "/generate", **changes: Any) -> HttpRequest:
    fields: dict[str, Any] = {"method": "POST", "path": path, "query": b"", "headers": [], "body": body}
    return HttpRequest(**(fields | changes))


def opened(rid: str, key: str | None = None, principal: str = P, before: Any = (), body: bytes = b"{}") -> Opened:
    return Opened(rid=rid, principal=principal, key=key or f"key-{rid}", before=list(before), request=http(body))


def yielded(rid: str, number: int, offset: int, message: bytes = b"m", principal: str = P) -> Yielded:
    return Yielded(rid=rid, principal=principal, number=number, offset=offset, messages=[message])


def ended(rid: str, failure: Any = None, principal: str = P) -> Ended:
    return Ended(rid=rid, principal=principal, failure=failure)


def alone(rid: str, why: str = "it is a batch", principal: str = P) -> Alone:
    return Alone(rid=rid, principal=principal, why=why)


def dropped(rid: str, principal: str = P) -> Dropped:
    return Dropped(rid=rid, principal=principal, why="nobody came")
