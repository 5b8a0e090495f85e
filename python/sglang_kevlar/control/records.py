"""Records of other frontends' requests: kept while those live, and gone on with when one of them is lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sglang_kevlar.protocol.records import Complete, Dropped, Ended, Opened, Record, Yielded, size_of


class Contradiction(Exception):
    """A peer's records do not follow from each other: its session must end."""


@dataclass
class KeptRecord:
    """One request of another frontend."""

    opened: Opened
    yields: list[Yielded] = field(default_factory=list)
    ended: Ended | None = None
    #: why it cannot be taken up; its memory was needed, say
    lost: str | None = None
    bytes: int = 0

    @property
    def offset(self) -> int:
        """Output tokens it has."""
        return self.yields[-1].offset if self.yields else 0


class Source:
    """A frontend as its peers know it: one incarnation, and the records of its session of now."""

    def __init__(self, name: str, incarnation: str) -> None:
        self.name = name
        self.incarnation = incarnation
        self.records: dict[str, KeptRecord] = {}
        self.by_key: dict[tuple[str, str], str] = {}
        self.bytes = 0
        #: what it had when the session began has been said
        self.complete = False
        #: of a lost one: who else had its records then, by name, and in which incarnation
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
        rid = record.rid
        if isinstance(record, Opened):
            identity = (record.principal, record.key)
            if rid in self.records or identity in self.by_key:
                raise Contradiction(f"request {rid} is opened twice")
            self.records[rid] = KeptRecord(record, bytes=size_of(record))
            self.by_key[identity] = rid
            self.bytes += size_of(record)
            return
        kept = self.records.get(rid)
        if kept is None:
            raise Contradiction(f"request {rid} was not opened")
        if isinstance(record, Dropped):
            self.drop(rid)
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

    def drop(self, rid: str) -> None:
        kept = self.records.pop(rid)
        self.bytes -= kept.bytes
        del self.by_key[kept.opened.principal, kept.opened.key]

    def make_room(self, limit: int) -> None:
        """Forget what was output of as many requests as it takes, the largest first: they cannot be taken up here."""
        while self.bytes > limit:
            kept = max(self.records.values(), key=lambda each: each.bytes)
            if kept.lost is not None:
                return
            kept.lost = "there was not enough memory for its output (--stream-memory)"
            self.bytes -= kept.bytes
            kept.bytes = 0
            kept.yields.clear()

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        assert self.bytes == sum(kept.bytes for kept in self.records.values())
        assert len(self.by_key) == len(self.records)
        for rid, kept in self.records.items():
            assert self.by_key[kept.opened.principal, kept.opened.key] == rid
            assert [each.number for each in kept.yields] == list(range(len(kept.yields)))


def heir(lost: str, alive: Iterable[str]) -> str | None:
    """Which of the frontends ``alive`` goes on with the requests of ``lost``: the next one by name, around the ring."""
    others = sorted(name for name in alive if name != lost)
    return next((name for name in others if name > lost), others[0] if others else None)
