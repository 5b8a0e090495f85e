"""Who waits when there is no room: redirected requests first, then new ones, both bounded in number and time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sglang_kevlar.protocol.launch import KevlarArgs


@dataclass(frozen=True)
class Held:
    rid: str
    deadline: float
    since: float


class HoldQueue:
    """Requests that are on no group. First in, first out within each class."""

    def __init__(self, args: KevlarArgs) -> None:
        self._args = args
        self._redirected: OrderedDict[str, Held] = OrderedDict()
        self._new: OrderedDict[str, Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._redirected) + len(self._new)

    def __contains__(self, rid: str) -> bool:
        return rid in self._redirected or rid in self._new

    def hold(self, rid: str, now: float, redirected: bool) -> bool:
        """False when the queue is full. A redirected request was already accepted: it always finds a place.

        (There are never more of those than requests in flight, so the queue stays bounded.)
        """
        assert rid not in self, f"request {rid} is already held"
        if not redirected and len(self) >= self._args.hold_queue:
            return False
        queue = self._redirected if redirected else self._new
        queue[rid] = Held(rid, deadline=now + self._args.hold_timeout, since=now)
        return True

    def first(self, served: Callable[[str], bool] = lambda rid: True) -> Held | None:
        """The next of those that are ``served``: for whose weights there is a group."""
        for queue in (self._redirected, self._new):
            for held in queue.values():
                if served(held.rid):
                    return held
        return None

    def remove(self, rid: str) -> Held | None:
        return self._redirected.pop(rid, None) or self._new.pop(rid, None)

    def expired(self, now: float) -> list[Held]:
        """Removes and returns those whose time is over."""
        over = [held for queue in (self._redirected, self._new) for held in queue.values() if held.deadline <= now]
        for held in over:
            self.remove(held.rid)
        return over


def must_wait(router_has_room: bool, degraded: bool, waiting: int) -> bool:
    """Whether a new request has to wait although a group serves.

    Nobody goes before those who wait. With all groups up they wait for moments only, while many are given out; the
    groups' own queues do the rest, as they do upstream. After a loss of capacity, new requests must not push out the
    KV of those that were redirected: they wait until there is room.
    """
    return waiting > 0 or (degraded and not router_has_room)
