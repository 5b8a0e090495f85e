"""Where a kept request is, of all that this frontend knows: here, at a peer, or with a peer that was lost.

Nobody is asked before it answers. Two frontends may therefore go on with the same request of a third at once; that
costs work, and no exactness: what a client has says from whom it has it, and is continued only by a frontend that has
the same (`control.lineage`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from sglang_kevlar.control.lineage import EventId, Lineage
from sglang_kevlar.control.records import KeptRecord, Source, heir, make_room
from sglang_kevlar.protocol.records import Complete, Name, Opened, Record, name_of

#: (principal, key)
Identity: TypeAlias = tuple[str, str]


@dataclass(eq=False)
class Run:
    """A kept request of this frontend."""

    rid: str
    identity: Identity
    lineage: Lineage
    #: a client has been given events of it, or may have been
    read: bool = False

    @property
    def name(self) -> Name:
        return self.identity[0], self.rid


@dataclass(frozen=True)
class Here:
    rid: str


@dataclass(frozen=True)
class There:
    """At the peer of this name, which answers for it."""

    name: str


@dataclass(frozen=True)
class TakeUp:
    """With a frontend that was lost: this one is to go on with it."""

    record: KeptRecord
    lineage: Lineage


@dataclass(frozen=True)
class Nowhere:
    """No frontend has it."""


@dataclass(frozen=True)
class Unsure:
    """None that we have heard of has it, and of the ones named here we should have heard: try again."""

    missing: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """It is known, and cannot be continued exactly. ``why`` is for the client."""

    why: str


Where: TypeAlias = Here | There | TakeUp | Nowhere | Unsure | Refused


class Directory:
    """``tag``: names this incarnation of this frontend in the ids of its events. ``expected``: the other frontends that
    there should be; one that has not been heard of for ``patience`` seconds is counted on no more."""

    def __init__(self, name: str, tag: str, expected: Iterable[str], now: float, patience: float) -> None:
        self.name = name
        self.tag = tag
        self._patience = patience
        #: frontends that should be there and are not, or have not said yet what they have; and since when
        self._missing = dict.fromkeys(expected, now)
        #: frontends that have said what they had since this one started
        self._heard: set[str] = set()
        self._runs: dict[Name, Run] = {}
        self._by_identity: dict[Identity, Run] = {}
        #: peers with a session, by name
        self._peers: dict[str, Source] = {}
        #: incarnations that were lost, by tag; with what may still be asked for
        self._lost: dict[str, Source] = {}

    # -- this frontend's

    def started(self, rid: str, identity: Identity, lineage: Lineage | None = None) -> Run:
        assert not self.in_the_way(rid, identity), f"request {rid} runs here already"
        run = Run(rid, identity, lineage or Lineage(self.tag))
        self._runs[run.name] = self._by_identity[identity] = run
        assert run.lineage.tag == self.tag
        return run

    def in_the_way(self, rid: str, identity: Identity) -> list[Run]:
        """Runs that are to be dropped before this one is started: their key, or their id, is used again."""
        found = (self._runs.get((identity[0], rid)), self._by_identity.get(identity))
        return [run for run in dict.fromkeys(found) if run is not None]

    def dropped(self, run: Run) -> None:
        del self._runs[run.name], self._by_identity[run.identity]

    # -- peers

    def joined(self, name: str, tag: str, now: float) -> list[TakeUp]:
        """A session of a peer begins, in place of one before. Returns what this frontend is to go on with now, of an
        incarnation that was lost."""
        assert name != self.name and tag != self.tag
        taken: list[TakeUp] = []
        known = self._peers.get(name)
        if known is not None and known.incarnation != tag:
            taken = self.lost(name, now)
        elif known is not None:
            self._lost[tag] = self._peers.pop(name)
        source = self._lost.pop(tag, None) or Source(name, tag)
        source.begin()
        self._peers[name] = source
        self._missing.setdefault(name, now)
        return taken

    def lost(self, name: str, now: float) -> list[TakeUp]:
        """Its session ended. Returns what this frontend is to go on with now, without being asked."""
        source = self._peers.pop(name)
        source.lost_at = self._missing[name] = now
        self._lost[source.incarnation] = source
        source.witnesses = {self.name: self.tag, **{peer: other.incarnation for peer, other in self._peers.items()}}
        if self._heir(source) != self.name:
            return []
        return [
            TakeUp(record, self._lineage(record, source))
            for record in source.records.values()
            if record.ended is None and record.lost is None and self._elsewhere(record) is None
        ]

    def apply(self, name: str, record: Record | Complete) -> Run | None:
        """What a peer says of its requests. Returns a run of ours that is to be abandoned for one of its. Raises
        `control.records.Contradiction`."""
        self._peers[name].apply(record)
        if isinstance(record, Complete):
            self._missing.pop(name, None)
            self._heard.add(name)
        if not isinstance(record, Opened):
            return None
        ours = self._runs.get(name_of(record)) or self._by_identity.get((record.principal, record.key))
        if ours is None or ours.read:
            return None
        if ours.rid == record.rid:
            # Its own frontend has come back, or another one went on with it, too.
            mine, theirs = len(ours.lineage.before), len(record.before)
            return ours if (theirs, name) < (mine, self.name) else None
        return ours if name < self.name else None

    # -- where

    def find(
        self,
        identity: Identity | None,
        rid: str | None,
        principal: str,
        behind: EventId | None,
        now: float,
        alone: bool = False,
        begun: bool = True,
    ) -> Where:
        """By its identity or its id, for ``principal``. ``behind``: the last event that the client has. ``alone``: the
        peers were asked, and none of them can go on with it. ``begun``: the client has had an answer; if it had not,
        nothing is lost by beginning anew what only a lost frontend knew of."""
        run = self._runs.get((principal, rid or "")) if identity is None else self._by_identity.get(identity)
        found: Where | None = None
        if run is not None:
            if behind is None or run.lineage.shares(behind.tag, behind.point):
                return Here(run.rid)
            if (peer := self._with_tag(behind.tag)) is not None:
                return There(peer)
            found = Refused(
                f"request {run.rid}: what you have of it came from a frontend that is gone, and this one went on with "
                f"it before that was sent"
            )
        elif not alone and (peer := self._peer_with(identity, rid, principal, behind)) is not None:
            return There(peer)
        else:
            found = self._with_a_lost_one(identity, rid, principal, behind, alone)
        if found is None or (isinstance(found, Refused) and behind is not None):
            # One that could say more may only be out of our reach.
            missing = [
                peer
                for peer, since in self._missing.items()
                if (begun or peer not in self._heard) and (peer in self._peers or now - since < self._patience)
            ]
            return Unsure(tuple(sorted(missing))) if missing else found or Nowhere()
        return found

    def _with_a_lost_one(
        self, identity: Identity | None, rid: str | None, principal: str, behind: EventId | None, alone: bool
    ) -> TakeUp | There | Refused | None:
        """Several may have had it, one after the other: the one that got furthest, of those that the client may come
        from."""
        best: TakeUp | Refused | None = None
        of: Source | None = None
        for source in self._lost.values():
            record = _of(source, identity, rid, principal)
            if record is None:
                continue
            if isinstance(best, TakeUp) and best.record.offset >= record.offset:
                continue
            name, lineage = record.opened.rid, self._lineage(record, source)
            if record.lost is not None:
                best = best or Refused(f"request {name}: its frontend was lost, and {record.lost}")
            elif behind is not None and not lineage.shares(behind.tag, behind.point):
                best = best or Refused(
                    f"request {name}: its frontend was lost, and had sent more of it ({behind.point.offset} tokens) "
                    f"than is known here ({record.offset})"
                )
            elif self.in_the_way(name, (principal, record.opened.key)):
                best = Refused(f"request {name}: its frontend was lost, and this one has its key, or its id, in use")
            else:
                best, of = TakeUp(record, lineage), source
        if of is not None and isinstance(best, TakeUp) and not alone and (name := self._heir(of)) != self.name:
            return There(name)
        return best

    def records(self) -> Iterator[tuple[Source, KeptRecord]]:
        for source in (*self._peers.values(), *self._lost.values()):
            for record in source.records.values():
                yield source, record

    def may_be_taken_up(self, found: TakeUp) -> bool:
        """Whether it is still as it was when that was said: its frontend may have come back since."""
        name = name_of(found.record.opened)
        return any(source.records.get(name) is found.record for source in self._lost.values()) and not (
            self._elsewhere(found.record)
        )

    def taken_up(self, name: Name) -> None:
        """What lost frontends had of it is ours now."""
        for source in list(self._lost.values()):
            if name in source.records:
                source.drop(name)
            if not source.records:
                del self._lost[source.incarnation]

    def expire(self, until: float) -> None:
        """What was lost with frontends until then is asked for no more."""
        for source in list(self._lost.values()):
            if source.lost_at <= until:
                del self._lost[source.incarnation]

    def make_room(self, limit: int) -> None:
        """What is kept of other frontends' requests takes no more than ``limit`` bytes."""
        make_room((*self._peers.values(), *self._lost.values()), limit)

    def peer(self, name: str) -> Source:
        return self._peers[name]

    @property
    def peers(self) -> list[str]:
        return sorted(self._peers)

    def _lineage(self, record: KeptRecord, source: Source) -> Lineage:
        before = tuple((tag, base) for tag, base in record.opened.before)
        return Lineage(source.incarnation, before).taken_up(self.tag, record.offset)

    def _heir(self, source: Source) -> str:
        """Who is to go on with what a lost frontend had: of those that had its records, and are still there."""
        here = {self.name: self.tag, **{peer: other.incarnation for peer, other in self._peers.items()}}
        found = heir(source.name, [name for name, tag in source.witnesses.items() if here.get(name) == tag])
        assert found is not None
        return found

    def _elsewhere(self, record: KeptRecord) -> str | None:
        opened = record.opened
        if self.in_the_way(opened.rid, (opened.principal, opened.key)):
            return self.name
        return self._peer_with(None, opened.rid, opened.principal, None)

    def _peer_with(
        self, identity: Identity | None, rid: str | None, principal: str, behind: EventId | None
    ) -> str | None:
        for name, source in self._peers.items():
            record = _of(source, identity, rid, principal)
            if record is None:
                continue
            lineage = Lineage(source.incarnation, tuple((tag, base) for tag, base in record.opened.before))
            if behind is None or lineage.shares(behind.tag, behind.point):
                return name
        return None

    def _with_tag(self, tag: str) -> str | None:
        return next((name for name, source in self._peers.items() if source.incarnation == tag), None)

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        assert len(self._runs) == len(self._by_identity)
        for identity, run in self._by_identity.items():
            assert self._runs[run.name] is run and run.identity == identity
        tags = [source.incarnation for source in (*self._peers.values(), *self._lost.values())]
        assert len(tags) == len(set(tags)) and self.tag not in tags
        for source in (*self._peers.values(), *self._lost.values()):
            source.check()


def _of(source: Source, identity: Identity | None, rid: str | None, principal: str) -> KeptRecord | None:
    name = (principal, rid or "") if identity is None else source.by_key.get(identity)
    return None if name is None else source.records.get(name)
