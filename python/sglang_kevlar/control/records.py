"""Records of other frontends' requests: kept while those live, and gone on with when one of them is lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sglang_kevlar.protocol.records import (
    Alone,
    Complete,
    Dropped,
    Ended,
    Name,
    Opened,
    Record,
    Yielded,
    name_of,
    size_of,
    without_content,
)


class Contradiction(Exception):
    """A peer's records do not follow from each other: its session must end."""


@dataclass
class KeptRecord:
    """One request of another frontend."""

    opened: Opened
    yields: list[Yielded] = field(default_factory=list)
    ended: Ended | None = None
    #: why it cannot be taken up, as half a sentence; its memory was needed, say
    lost: str | None = None
    bytes: int = 0

    def give_up(self, why: str) -> int:
        """Of it only the name is kept. Returns the bytes that this makes free."""
        before = self.bytes
        self.lost = why
        self.yields.clear()
        self.opened = without_content(self.opened)
        self.bytes = size_of(self.opened)
        return before - self.bytes

    @property
    def offset(self) -> int:
        """Output tokens it has."""
        return self.yields[-1].offset if self.yields else 0


class Source:
    """A frontend as its peers know it: one incarnation, and the records of its session of now."""

    def __init__(self, name: str, incarnation: str) -> None:
        self.name = name
        self.incarnation = incarnation
        self.records: dict[Name, KeptRecord] = {}
        #: by principal and key
        self.by_key: dict[tuple[str, str], Name] = {}
        self.bytes = 0
        #: what it had when the session began has been said
        self.complete = False
        #: of a lost one: since when, and who else had its records then, by name, and in which incarnation
        self.lost_at = 0.0
        self.witnesses: dict[str, str] = {}

    def begin(self) -> None:
        """A session begins: what it knows is said anew."""
        self.records.clear()
        self.by_key.clear()
        self.bytes = 0
        self.complete = False

    def apply(self, record: Record | Complete) -> None:
        """Raises Contradiction."""
        if isinstance(record, Complete):
            self.complete = True
            return
        rid, name = record.rid, name_of(record)
        if isinstance(record, Opened):
            identity = (record.principal, record.key)
            if name in self.records or identity in self.by_key:
                raise Contradiction(f"request {rid} is opened twice")
            self.records[name] = KeptRecord(record, bytes=size_of(record))
            self.by_key[identity] = name
            self.bytes += size_of(record)
            return
        kept = self.records.get(name)
        if kept is None:
            raise Contradiction(f"request {rid} was not opened")
        if isinstance(record, Dropped):
            self.drop(name)
            return
        if isinstance(record, Alone):
            self.give_up(kept, record.why)
            return
        if kept.ended is not None:
            raise Contradiction(f"request {rid} has ended")
        if isinstance(record, Ended):
            kept.ended = record
            return
        if kept.lost is None and record.number != len(kept.yields):
            raise Contradiction(f"output {record.number} of request {rid} came where {len(kept.yields)} was due")
        if record.offset < kept.offset:
            raise Contradiction(f"request {rid} goes back from {kept.offset} tokens to {record.offset}")
        if kept.lost is None:
            kept.yields.append(record)
            kept.bytes += size_of(record)
            self.bytes += size_of(record)

    def drop(self, name: Name) -> None:
        kept = self.records.pop(name)
        self.bytes -= kept.bytes
        del self.by_key[kept.opened.principal, kept.opened.key]

    def give_up(self, kept: KeptRecord, why: str) -> None:
        self.bytes -= kept.give_up(why)

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        assert self.bytes == sum(kept.bytes for kept in self.records.values())
        assert len(self.by_key) == len(self.records)
        for name, kept in self.records.items():
            assert self.by_key[kept.opened.principal, kept.opened.key] == name == name_of(kept.opened)
            assert not (kept.lost and kept.yields)
            assert [each.number for each in kept.yields] == list(range(len(kept.yields)))


def heir(lost: str, alive: Iterable[str]) -> str | None:
    """Which of the frontends ``alive`` goes on with the requests of ``lost``: the next one by name, around the ring."""
    others = sorted(name for name in alive if name != lost)
    return next((name for name in others if name > lost), others[0] if others else None)


def make_room(sources: Iterable[Source], limit: int) -> None:
    """Let all of them take no more than ``limit`` bytes: the largest requests are given up, and cannot be taken up
    here."""
    sources = list(sources)
    while sum(source.bytes for source in sources) > limit:
        candidates = [(kept, source) for source in sources for kept in source.records.values() if kept.lost is None]
        if not candidates:
            return
        kept, source = max(candidates, key=lambda each: each[0].bytes)
        source.give_up(kept, "there was not enough memory for its output (--stream-memory)")
