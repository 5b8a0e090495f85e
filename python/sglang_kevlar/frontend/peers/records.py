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
from sglang_kevlar.control.records import Contradiction, Source
from sglang_kevlar.control.replication import Replication
from sglang_kevlar.frontend.peers.links import PeerLinks
from sglang_kevlar.protocol import cluster
from sglang_kevlar.protocol.records import Dropped, Ended, HttpRequest, Opened, PeerMessage, Record, Taken, Yielded

logger = logging.getLogger(__name__)

#: seconds for which a frontend that was there is expected to come back, before "nobody has it" is said without it
PATIENCE = 10.0


class PeerRecords:
    """``links``, ``take_up`` (begins runs of a lost frontend) and ``abandon`` (ends a run, by principal and id, which a
    peer has) are set before anything else."""

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
        self._outboxes: dict[str, list[PeerMessage]] = {}
        self._taken: dict[str, int] = {}
        self._flush: asyncio.Handle | None = None
        #: in the order of their positions
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    # -- this frontend's

    def begin(self, rid: str, identity: Identity, lineage: Lineage | None, request: HttpRequest) -> RunRecord:
        run = self.directory.started(rid, identity, lineage)
        principal, key = identity
        before = list(run.lineage.before)
        self._publish(Opened(rid=rid, principal=principal, key=key, before=before, request=request))
        return RunRecord(self, run)

    def status(self) -> list[dict[str, Any]]:
        """``frontends`` of /kevlar/status."""
        current = set(self._replication.current)
        return [
            {"name": name, "state": "current" if name in current else "joining", "url": self.urls[name]}
            for name in self.directory.peers
        ]

    def _publish(self, record: Record) -> int:
        position = self._replication.publish(record)
        for name in self._outboxes:
            self._put(name, record)
        for name in self._replication.too_slow():
            self.links.reject(name, "it does not keep up with what this frontend records")
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
        for message in self._replication.joined(name):
            self._put(name, message)
        self._wake()
        self.take_up(taken)

    def left(self, name: str) -> None:
        source = self.directory.peer(name)
        del self._outboxes[name], self._taken[name], self.urls[name]
        self._replication.left(name)
        self._wake()
        taken = self.directory.lost(name, time.monotonic())
        asyncio.get_running_loop().call_later(self._retention, self._expire, source)
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
        if any(not isinstance(message, Taken) for message in messages):
            self.directory.peer(name).make_room(self._memory)
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

    def _expire(self, source: Source) -> None:
        self.directory.expire(source)


class RunRecord:
    """Of one run of this frontend."""

    def __init__(self, records: PeerRecords, run: Run) -> None:
        self._records = records
        self.run = run
        self.lineage = run.lineage
        self._yields = 0
        self._ended = False

    async def output(self, messages: list[bytes], offset: int) -> None:
        """Returns when the peers have it."""
        record = Yielded(rid=self.run.rid, number=self._yields, offset=offset, messages=messages)
        self._yields += 1
        await self._records._safe(self._records._publish(record))

    def read(self) -> None:
        self.run.read = True

    def end(self, failure: tuple[int, str, str, int | None] | None) -> None:
        """Its endpoint is through."""
        if not self._ended:
            self._ended = True
            self._records._publish(Ended(rid=self.run.rid, failure=failure))

    def drop(self, why: str) -> None:
        """It cannot be taken up any more."""
        self._ended = True
        self._records.directory.dropped(self.run.rid)
        self._records._publish(Dropped(rid=self.run.rid, why=why[:1000]))
