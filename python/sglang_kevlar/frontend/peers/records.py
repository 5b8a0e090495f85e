"""Records of kept requests here and at the peers: what is published is safe when they have it, what they leave is taken
up.

The decisions are those of `control.directory` and `control.replication`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from sglang_kevlar.control.directory import Directory, Identity, Run, TakeUp
from sglang_kevlar.control.lineage import Lineage
from sglang_kevlar.control.records import Contradiction
from sglang_kevlar.control.replication import MAX_RECORDS, Replication
from sglang_kevlar.frontend.peers.links import PeerLinks
from sglang_kevlar.protocol import cluster
from sglang_kevlar.protocol.records import (
    MAX_RECORD,
    Alone,
    Dropped,
    Ended,
    HttpRequest,
    Name,
    Opened,
    PeerMessage,
    Record,
    Taken,
    Yielded,
    size_of,
    why_not_recorded,
    without_content,
)

logger = logging.getLogger(__name__)

#: seconds for which a frontend that was there is expected to come back, before "nobody has it" is said without it
PATIENCE = 10.0


class PeerRecords:
    """``links``, ``take_up`` (begins runs of a lost frontend) and ``abandon`` (ends the run of this principal and id,
    for a peer has it) are set before anything else."""

    links: PeerLinks
    take_up: Callable[[list[TakeUp]], None]
    abandon: Callable[[str, str, str], None]

    def __init__(
        self,
        name: str,
        tag: str,
        expected: Iterable[str],
        memory: int,
        retention: float,
    ) -> None:
        self.directory = Directory(name, tag, expected, time.monotonic(), PATIENCE)
        self._replication = Replication()
        self._memory = memory
        self._retention = retention
        #: where the others serve HTTP, by name
        self.urls: dict[str, str] = {}
        #: of each peer, resolved when it leaves
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._records: dict[Name, RunRecord] = {}
        self._outboxes: dict[str, list[PeerMessage]] = {}
        self._taken: dict[str, int] = {}
        self._flush: asyncio.Handle | None = None
        #: in the order of their positions
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._closed = False

    def close(self) -> None:
        """This frontend ends: that its sessions do makes no lost frontends of the others."""
        self._closed = True

    def leaving(self, name: str) -> asyncio.Future[None]:
        """Done when this peer's session has ended. Raises KeyError when it has none."""
        return self._leaving[name]

    # -- this frontend's

    def begin(self, rid: str, identity: Identity, lineage: Lineage | None, request: HttpRequest) -> RunRecord:
        for stale in self.directory.in_the_way(rid, identity):
            self._records[stale.name].drop("its key, or its id, is used again")
        run = self.directory.started(rid, identity, lineage)
        principal, key = identity
        before = list(run.lineage.before)
        opened = Opened(rid=rid, principal=principal, key=key, before=before, request=request)
        why_not = why_not_recorded(request, size_of(opened))
        record = self._records[run.name] = RunRecord(self, run)
        self._publish(opened if why_not is None else without_content(opened))
        if why_not is not None:
            record.go_alone(why_not)
        return record

    def forget(self, record: RunRecord) -> None:
        """It was dropped."""
        del self._records[record.run.name]
        self.directory.dropped(record.run)

    def status(self) -> list[dict[str, Any]]:
        """``frontends`` of /kevlar/status."""
        current = set(self._replication.current)
        return [
            {"name": name, "state": "current" if name in current else "joining", "url": self.urls[name]}
            for name in self.directory.peers
        ]

    def _publish(self, record: Record) -> int:
        """Its position, for `_safe`."""
        position = self._replication.publish(record)
        for name in self._outboxes:
            self._put(name, record)
        for name in self._replication.too_slow():
            self.links.reject(name, "it does not keep up with what this frontend records")
        if (largest := self._replication.largest(min(self._memory, MAX_RECORDS))) is not None:
            self._records[largest].go_alone("there was not enough memory for its output (--stream-memory)")
        return position

    async def _safe(self, position: int) -> None:
        if self._replication.safe > position:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((position, waiter))
        await waiter

    def _wake(self) -> None:
        while self._waiting and self._waiting[0][0] < self._replication.safe:
            _, waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)

    # -- sessions (links.LinkHandler)

    def joined(self, peer: cluster.Identity) -> None:
        name = peer.name
        taken = self.directory.joined(name, peer.instance, time.monotonic())
        self.urls[name] = peer.url
        self._taken[name] = 0
        self._outboxes[name] = []
        self._leaving[name] = asyncio.get_running_loop().create_future()
        for message in self._replication.joined(name):
            self._put(name, message)
        self._wake()
        self.take_up(taken)

    def left(self, name: str) -> None:
        del self._outboxes[name], self._taken[name], self.urls[name]
        self._leaving.pop(name).set_result(None)
        self._replication.left(name)
        self._wake()
        now = time.monotonic()
        taken = self.directory.lost(name, now)
        if self._closed:
            return
        # By the moment of the loss, not by the clock again: uvloop counts in whole milliseconds, and calls too early.
        asyncio.get_running_loop().call_later(self._retention, self.directory.expire, now)
        if taken:
            logger.warning("frontend %s is lost: going on with %d requests of its clients", name, len(taken))
        self.take_up(taken)

    def arrived(self, name: str, messages: list[PeerMessage]) -> None:
        for message in messages:
            try:
                if isinstance(message, Taken):
                    self._replication.acknowledged(name, message.count)
                    continue
                abandoned = self.directory.apply(name, message)
            except (Contradiction, ValueError) as problem:
                self.links.reject(name, str(problem))
                return
            self._taken[name] += 1
            if abandoned is not None:
                self.abandon(abandoned.identity[0], abandoned.rid, f"frontend {name} has it, too")
                if name not in self._taken:
                    return  # it could not take even that
        if any(not isinstance(message, Taken) for message in messages):
            self.directory.make_room(self._memory)
            self._put(name, Taken(count=self._taken[name]))
        self._wake()

    def _put(self, name: str, message: PeerMessage) -> None:
        self._outboxes[name].append(message)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._flush = None
        for name in list(self._outboxes):
            if messages := self._outboxes.get(name):
                self._outboxes[name] = []
                self.links.send(name, messages)


class RunRecord:
    """Of one run of this frontend."""

    def __init__(self, records: PeerRecords, run: Run) -> None:
        self._records = records
        self.run = run
        self.lineage = run.lineage
        self._yields = 0
        self._ended = False
        self._dropped = False
        #: position of the record that says so
        self._alone: int | None = None

    def read(self) -> None:
        """A client is given something of it: it is abandoned for no other any more."""
        self.run.read = True

    async def output(self, messages: list[bytes], offset: int) -> None:
        """Returns when the peers have it."""
        if self._dropped:
            return
        principal, rid = self.run.name
        record = Yielded(rid=rid, principal=principal, number=self._yields, offset=offset, messages=messages)
        if self._alone is None and size_of(record) > MAX_RECORD:
            self.go_alone(f"one of its outputs is larger than {MAX_RECORD >> 20} MiB")
        if self._alone is None:
            self._yields += 1
            await self._records._safe(self._records._publish(record))
        else:
            await self._records._safe(self._alone)

    async def alone(self, why: str) -> None:
        """No other frontend can go on with it from here on. Returns when the peers know."""
        self.go_alone(why)
        if self._alone is not None:
            await self._records._safe(self._alone)

    def go_alone(self, why: str) -> None:
        if self._alone is None and not self._dropped:
            principal, rid = self.run.name
            self._alone = self._records._publish(Alone(rid=rid, principal=principal, why=why[:1000]))

    def end(self, failure: tuple[int, str, str, int | None] | None) -> None:
        """Its endpoint is through."""
        if not (self._ended or self._dropped):
            self._ended = True
            principal, rid = self.run.name
            self._records._publish(Ended(rid=rid, principal=principal, failure=failure))

    def drop(self, why: str) -> None:
        """Nobody can come back for it."""
        if not self._dropped:
            self._dropped = True
            self._records.forget(self)
            principal, rid = self.run.name
            self._records._publish(Dropped(rid=rid, principal=principal, why=why[:1000]))
