"""Which requests outlive their connection, for how long, and what goes when memory is short.

A kept request is found by its principal (who may see it) with its idempotency key or its id. While it runs it is kept
as long as a client is attached, and for the retention time after the last one left; once it has ended, for that time
after the end, or after a client last read of it. Then it is *gone*: known for a while, so that whoever comes for it is
told why.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from sglang_kevlar.control.event_log import EventLog, Position

#: how many are kept at most, and how many that are gone are remembered
MOST_REQUESTS = 4096
#: memory that a request is taken to need beside its body and its events
REQUEST_OVERHEAD = 8192
#: seconds that a request without a client is left while the server shuts down: its client may be on its way back
DRAIN_RETENTION = 5.0

NO_ROOM = "the responses that are kept take all of --stream-memory"


@dataclass(slots=True, eq=False)
class Kept:
    principal: str
    key: str
    rid: str
    #: of the request itself: a key belongs to one request
    digest: bytes
    #: when a client last left or read, or it ended
    touched: float
    log: EventLog = field(default_factory=EventLog)
    clients: int = 0
    #: bytes of its body, until its endpoint has it
    body: int = 0
    ended: bool = False
    #: why no further client can take it up, although it goes on for those that it has
    closed: str | None = None
    #: why it is not kept any more
    gone: str | None = None


@dataclass(slots=True, frozen=True)
class Gone:
    rid: str
    reason: str


class NoRoom(Exception):
    """The message says which bound was met."""


class RidTaken(Exception):
    """Another kept request of this principal has this id."""


class KeptRequests:
    def __init__(self, retention: float, memory: int, most: int = MOST_REQUESTS) -> None:
        """``retention`` in seconds, ``memory`` in bytes."""
        self.retention = retention
        self.memory = memory
        self.used = 0
        self._most = most
        # In the order in which they came; by (principal, key) and by (principal, id).
        self._by_key: dict[tuple[str, str], Kept] = {}
        self._by_rid: dict[tuple[str, str], Kept] = {}
        #: those that ended, in the order of their end
        self._ended: dict[Kept, None] = {}
        self._gone_keys: OrderedDict[tuple[str, str], Gone] = OrderedDict()
        self._gone_rids: OrderedDict[tuple[str, str], Gone] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def ended(self) -> int:
        return len(self._ended)

    def find(self, principal: str, key: str) -> Kept | Gone | None:
        name = (principal, key)
        return self._by_key.get(name) or self._gone_keys.get(name)

    def find_rid(self, principal: str, rid: str) -> Kept | Gone | None:
        name = (principal, rid)
        return self._by_rid.get(name) or self._gone_rids.get(name)

    def add(self, principal: str, key: str, rid: str, digest: bytes, body: int, now: float) -> Kept:
        """A new one, unknown by ``find``. Raises NoRoom, RidTaken."""
        if (principal, rid) in self._by_rid:
            raise RidTaken
        if len(self) >= self._most and not self._drop_ended(f"{self._most} newer requests are kept"):
            raise NoRoom(f"{self._most} requests with an Idempotency-Key are running")
        if not self._make_room(REQUEST_OVERHEAD + body):
            raise NoRoom(NO_ROOM)
        kept = Kept(principal, key, rid, digest, touched=now, body=body)
        self.used += REQUEST_OVERHEAD + body
        self._by_key[principal, key] = self._by_rid[principal, rid] = kept
        # It may have been known as gone by this id, under another key.
        self._gone_rids.pop((principal, rid), None)
        return kept

    def reserve(self, size: int) -> bool:
        """Room for a body that is being read, until `release`; if need be in place of requests that have ended."""
        if not self._make_room(size):
            return False
        self.used += size
        return True

    def release(self, size: int) -> None:
        self.used -= size

    def body_taken(self, kept: Kept) -> None:
        """Its endpoint has the body."""
        if kept.gone is None:
            self.used -= kept.body
        kept.body = 0

    def append(self, kept: Kept, event: bytes, position: Position) -> None:
        """Without room for the event it is appended all the same, and the request is closed to further clients.

        The caller then waits for those that it has before it appends another.
        """
        grown = kept.log.append(event, position)
        if kept.gone is not None:
            return
        if kept.closed is None and not self._make_room(grown):
            kept.closed = NO_ROOM
        self.used += grown

    def discard(self, kept: Kept, index: int) -> None:
        """Lets go of the events before ``index``."""
        shrunk = kept.log.discard(index)
        if kept.gone is None:
            self.used -= shrunk

    def attach(self, kept: Kept) -> None:
        kept.clients += 1

    def detach(self, kept: Kept, now: float) -> None:
        kept.clients -= 1
        kept.touched = now

    def end(self, kept: Kept, now: float) -> None:
        """Its response is complete."""
        kept.log.complete = kept.ended = True
        kept.touched = now
        if kept.gone is None:
            self._ended[kept] = None

    def forget(self, kept: Kept, reason: str) -> None:
        """As if it had never been: its key may be used again. Clients that are attached read on."""
        if kept.gone is not None:
            return
        kept.gone = reason
        del self._by_key[kept.principal, kept.key], self._by_rid[kept.principal, kept.rid]
        self._ended.pop(kept, None)
        self.used -= REQUEST_OVERHEAD + kept.body + kept.log.size

    def drop(self, kept: Kept, reason: str) -> None:
        """Its events go at once, also for clients that are attached."""
        if kept.gone is not None:
            return
        self.forget(kept, reason)
        kept.log.discard(kept.log.end)
        gone = Gone(kept.rid, reason)
        for names, name in ((self._gone_keys, kept.key), (self._gone_rids, kept.rid)):
            names[kept.principal, name] = gone
            while len(names) > self._most:
                names.popitem(last=False)

    def expires(self, kept: Kept) -> float | None:
        """When it is dropped if nothing happens; None while it runs for a client."""
        return None if kept.clients and not kept.ended else kept.touched + self.retention

    def expire(self, now: float) -> list[Kept]:
        """Drops those whose time is over, and returns them: what still runs is to be aborted."""
        over = []
        for kept in list(self._by_key.values()):
            due = self.expires(kept)
            if (due is not None and now >= due) or (kept.closed is not None and not kept.clients):
                over.append(kept)
        for kept in over:
            self.drop(kept, kept.closed or f"it was kept for {self.retention:g} s (--stream-retention)")
        return over

    def drain(self) -> None:
        """The server shuts down: nobody waits long for a client that may not come back."""
        self.retention = min(self.retention, DRAIN_RETENTION)

    def _make_room(self, size: int) -> bool:
        while self.used + size > self.memory:
            if not self._drop_ended("its events made room for newer ones (--stream-memory)"):
                return False
        return True

    def _drop_ended(self, reason: str) -> bool:
        """The oldest that ended and is not being read."""
        for kept in self._ended:
            if not kept.clients:
                self.drop(kept, reason)
                return True
        return False
