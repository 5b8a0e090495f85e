"""A simulated pair, or three, of frontends that keep each other's requests, and clients that come back to any of them.

Every output is random, so whoever makes tokens of a request anew makes other ones: a client that is continued behind
anything but what it has is noticed. `simulate` raises AssertionError for that, and for a client that never gets to an
end.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from dataclasses import dataclass, field

from faults import Faults

from sglang_kevlar.control.directory import Directory, Here, Refused, TakeUp, There, Unsure
from sglang_kevlar.control.lineage import EventId, Lineage, Point
from sglang_kevlar.control.replication import Replication
from sglang_kevlar.protocol.records import Alone, Complete, Dropped, Ended, HttpRequest, Opened, Record, Taken, Yielded

STEPS = 1200
#: steps after the last fault in which every client must come to its end
QUIET = 600
NAMES = ("a", "b", "c")
CLIENTS = 6
#: steps of silence after which a session is over
LEASE = 12
#: steps for which a frontend that was there is expected to come back
PATIENCE = 120
REQUEST = HttpRequest(method="POST", path="/generate", query=b"", headers=[], body=b"{}")
#: kinds of faults after which a client may be told that it cannot be continued
HARSH = ("partition", "pause")


@dataclass
class SimRun:
    rid: str
    identity: tuple[str, str]
    lineage: Lineage
    wanted: int
    tokens: list[int] = field(default_factory=list)
    #: tokens that clients may see
    shown: int = 0
    yields: int = 0
    #: published, and not yet safe: position, and tokens with it; -1 tokens: the end
    pending: deque[tuple[int, int]] = field(default_factory=deque)
    #: from this position on nothing is recorded of it
    alone: int | None = None
    ended: bool = False
    #: steps since its end
    over: int = 0


class Link:
    """One session of two frontends (incarnations), with what is on its way to each of them."""

    def __init__(self, ends: tuple[SimFrontend, SimFrontend]) -> None:
        self.ends = ends
        one, other = ends
        self.to: dict[str, deque[Record | Complete | Taken]] = {
            other.name: deque(one.replication.joined(other.name)),
            one.name: deque(other.replication.joined(one.name)),
        }
        self.taken = dict.fromkeys(self.to, 0)
        self.ended = dict.fromkeys(self.to, False)
        self.silent = 0

    def answer_to(self, name: str) -> Taken:
        return Taken(count=next(count for end, count in self.taken.items() if end != name))

    def other(self, end: SimFrontend) -> SimFrontend:
        return self.ends[end is self.ends[0]]


class SimFrontend:
    def __init__(self, world: World, name: str, incarnation: int) -> None:
        self.world, self.name = world, name
        self.tag = f"{name}{incarnation}"
        self.alive = True
        self.paused = 0
        expected = [other for other in NAMES[: world.size] if other != name]
        self.directory = Directory(name, self.tag, expected, world.faults.step, PATIENCE)
        self.replication = world.replication()
        self.runs: dict[str, SimRun] = {}

    @property
    def runs_now(self) -> bool:
        return self.alive and not self.paused

    # -- what the frontend does; the decisions are the directory's

    def ask(self, client: SimClient, asked: frozenset[str] = frozenset(), alone: bool = False) -> SimRun | str | None:
        """The run to read from, None to try again, or why not."""
        now = self.world.faults.step
        found = self.directory.find(
            client.identity, None, client.identity[0], client.last, now, alone, client.last is not None
        )
        if isinstance(found, Here):
            return self.runs[found.rid]
        if isinstance(found, TakeUp):
            return self.take_up(found)
        if isinstance(found, Unsure):
            return None
        if isinstance(found, There):
            answer = self.forward(client, found.name, asked)
            return self.ask(client, asked, alone=True) if isinstance(answer, str) else answer
        if isinstance(found, Refused) or client.last is not None:
            why = found.why if isinstance(found, Refused) else "unknown"
            # One may have more of it, or may just have taken it up, or may not know yet that it should.
            for name in () if asked or alone else self.directory.peers:
                if not isinstance(answer := self.forward(client, name, asked), str):
                    return answer
            return why
        if asked:
            return "unknown"
        return self.open(SimRun(f"r{next(self.world.rids)}", client.identity, Lineage(self.tag), client.wanted))

    def forward(self, client: SimClient, name: str, asked: frozenset[str]) -> SimRun | str | None:
        peer = self.world.frontends[name]
        if name in asked or not peer.runs_now or not self.world.reaches(self.name, name):
            return None
        return peer.ask(client, asked | {self.name})

    def open(self, run: SimRun) -> SimRun:
        self.runs[run.rid] = run
        self.directory.started(run.rid, run.identity, run.lineage)
        principal, key = run.identity
        before = list(run.lineage.before)
        self.publish(Opened(rid=run.rid, principal=principal, key=key, before=before, request=REQUEST))
        return run

    def take_up(self, found: TakeUp) -> SimRun:
        record = found.record
        identity = (record.opened.principal, record.opened.key)
        run = SimRun(record.opened.rid, identity, found.lineage, self.world.wanted[identity])
        self.directory.taken_up((identity[0], run.rid))
        self.open(run)
        for each in record.yields:
            self.make(run, list(each.messages[0]))
        assert len(run.tokens) == record.offset
        if record.ended is not None:
            run.pending.append((self.publish(Ended(rid=run.rid, principal=identity[0])), -1))
        return run

    def make(self, run: SimRun, tokens: list[int]) -> None:
        run.tokens += tokens
        if run.alone is not None:
            run.pending.append((run.alone, len(run.tokens)))
            return
        record = Yielded(
            rid=run.rid,
            principal=run.identity[0],
            number=run.yields,
            offset=len(run.tokens),
            messages=[bytes(tokens)],
        )
        run.yields += 1
        run.pending.append((self.publish(record), len(run.tokens)))

    def publish(self, record: Record) -> int:
        position = self.replication.publish(record)
        for link in self.world.links:
            if self in link.ends and not link.ended[self.name]:
                link.to[link.other(self).name].append(record)
        return position

    def abandon(self, rid: str, why: str) -> None:
        run = self.runs[rid]
        self.directory.dropped(self.directory._runs[run.identity[0], rid])
        del self.runs[rid]
        self.publish(Dropped(rid=rid, principal=run.identity[0], why=why))

    def step(self) -> None:
        random = self.world.faults.random
        for run in list(self.runs.values()):
            if run.pending:
                position, shown = run.pending[0]
                if self.is_safe(position):
                    run.pending.popleft()
                    run.ended = shown < 0
                    run.shown = run.shown if run.ended else shown
            elif run.ended:
                run.over += 1
                if run.over > 400:
                    self.abandon(run.rid, "its time is over")
            elif len(run.tokens) >= run.wanted:
                run.pending.append((self.publish(Ended(rid=run.rid, principal=run.identity[0])), -1))
            elif random.random() < 0.5:
                if run.alone is None and not self.world.gentle and self.world.faults.strike("alone", 0.005):
                    run.alone = self.publish(Alone(rid=run.rid, principal=run.identity[0], why="it is a batch"))
                self.make(run, [random.randrange(256) for _ in range(random.randint(1, 3))])

    def has_of(self, client: SimClient) -> bool:
        """Whether it could go on with a client's request: what the world knows, not what it knows itself."""
        run = next((run for run in self.runs.values() if run.identity == client.identity), None)
        if run is not None:
            return run.tokens[: len(client.tokens)] == client.tokens
        for _, record in self.directory.records():
            if record.lost is None and (record.opened.principal, record.opened.key) == client.identity:
                have = [token for each in record.yields for token in each.messages[0]]
                if have[: len(client.tokens)] == client.tokens:
                    return True
        return False

    def is_safe(self, position: int) -> bool:
        return self.replication.safe > position

    def go_on(self, taken: list[TakeUp]) -> None:
        for each in taken:
            self.world.faults.counts["taken up"] += 1
            self.take_up(each)


class SimClient:
    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.identity = ("p", f"key{number}")
        self.wanted = world.faults.random.randint(3, 60)
        world.wanted[self.identity] = self.wanted
        self.tokens: list[int] = []
        self.last: EventId | None = None
        self.at: SimFrontend | None = None
        self.run: SimRun | None = None
        self.end: str | None = None

    def step(self) -> None:
        random = self.world.faults.random
        if self.at is None:
            place = self.world.frontends[random.choice(NAMES[: self.world.size])]
            if place.runs_now and random.random() < 0.5:
                found = place.ask(self)
                if isinstance(found, str):
                    self.end = found
                elif found is not None:
                    owner = next(f for f in self.world.frontends.values() if found in f.runs.values())
                    self.at, self.run = owner, found
            return
        assert self.run is not None
        gone = not self.at.alive or self.at.runs.get(self.run.rid) is not self.run
        if gone or self.world.faults.strike("reconnect", 0.03) or (self.at.paused and random.random() < 0.2):
            self.at = None
        elif self.at.runs_now:
            self.read(random.randint(0, 4))

    def read(self, count: int) -> None:
        run, frontend = self.run, self.at
        assert run is not None and frontend is not None
        have = len(self.tokens)
        assert run.tokens[:have] == self.tokens, f"{run.rid}: continued behind something else"
        new = run.tokens[have : min(run.shown, have + count)]
        if new:
            frontend.directory._runs[run.identity[0], run.rid].read = True
            self.tokens += new
            self.last = EventId(run.rid, Point(len(self.tokens), 0), run.lineage.tag_at(len(self.tokens)))
        if run.ended and len(self.tokens) == len(run.tokens):
            assert len(self.tokens) >= self.wanted
            self.end = "done"


class World:
    def __init__(self, seed: int, only: frozenset[str] | None = None, variant: type[SimFrontend] = SimFrontend) -> None:
        self.faults = Faults(seed, only)
        self.size = 2 + seed % 2
        #: half of the runs know only kills, each while all others have everything: then nobody may be refused
        self.gentle = seed % 4 < 2
        self.variant = variant
        self.replication = Replication
        self.rids = itertools.count()
        self.numbers = itertools.count()
        self.incarnations: Counter[str] = Counter()
        self.wanted: dict[tuple[str, str], int] = {}
        self.links: list[Link] = []
        self.cut: set[frozenset[str]] = set()
        #: steps in which the last partition or pause is still felt
        self.trouble = 0
        self.frontends: dict[str, SimFrontend] = {}
        for name in NAMES[: self.size]:
            self.start(name)
        self.clients = [SimClient(self, next(self.numbers)) for _ in range(CLIENTS)]
        self.ends: Counter[str] = Counter()

    def start(self, name: str) -> None:
        self.incarnations[name] += 1
        self.frontends[name] = self.variant(self, name, self.incarnations[name])

    @property
    def troubled(self) -> bool:
        if self.cut or any(frontend.paused for frontend in self.frontends.values()):
            self.trouble = LEASE + PATIENCE
        return self.trouble > 0

    def reaches(self, a: str, b: str) -> bool:
        return frozenset((a, b)) not in self.cut

    def step(self) -> None:
        self.faults.next_step()
        self.strike()
        self.trouble -= self.troubled
        for frontend in self.frontends.values():
            if frontend.paused:
                frontend.paused -= 1
            elif frontend.alive:
                frontend.step()
        self.connect()
        for link in list(self.links):
            self.move(link)
        for client in list(self.clients):
            client.step()
            if client.end is not None:
                self.ends[client.end if client.end == "done" else "refused"] += 1
                refused = client.end != "done"
                assert not (refused and self.gentle), f"{client.identity}: {client.end}"
                keepers = [f.tag for f in self.frontends.values() if refused and f.alive and f.has_of(client)]
                # Out of reach for longer than a client is put off.
                assert not keepers or self.troubled, f"{client.identity}: {client.end}, but {keepers} could go on"
                self.clients.remove(client)
                if not self.faults.over:
                    self.clients.append(SimClient(self, next(self.numbers)))
        for frontend in self.frontends.values():
            if frontend.alive:
                frontend.directory.check()
                frontend.replication.check()

    def strike(self) -> None:
        random = self.faults.random
        for name, frontend in list(self.frontends.items()):
            others = [other for other in self.frontends.values() if other is not frontend]
            if not frontend.alive:
                if random.random() < 0.1 or self.faults.over:
                    self.start(name)
                continue
            whole = all(other.alive for other in others) and all(
                other.name in each.replication.current
                for each in self.frontends.values()
                for other in self.frontends.values()
                if each is not other
            )
            if (whole or not self.gentle) and self.faults.strike("kill", 0.01):
                frontend.alive = False
            elif not self.gentle and not frontend.paused and self.faults.strike("pause", 0.003):
                frontend.paused = random.choice((3, 30, 80))
        if self.gentle:
            return
        if self.cut and (self.faults.over or random.random() < 0.05):
            self.cut.pop()
        elif self.faults.strike("partition", 0.004):
            self.cut.add(frozenset(random.sample(sorted(self.frontends), 2)))
        if self.links and self.faults.strike("connection", 0.004):
            random.choice(self.links).silent = LEASE

    def connect(self) -> None:
        for ends in itertools.combinations(self.frontends.values(), 2):
            one, other = ends
            if not (one.runs_now and other.runs_now and self.reaches(one.name, other.name)):
                continue
            if self.faults.random.random() < 0.5 or any(link.ends == ends for link in self.links):
                continue
            for end, peer in ((one, other), (other, one)):
                end.go_on(end.directory.joined(peer.name, peer.tag, self.faults.step))
            self.links.append(Link(ends))

    def move(self, link: Link) -> None:
        one, other = link.ends
        up = one.runs_now and other.runs_now and self.reaches(one.name, other.name)
        link.silent = 0 if up and link.silent < LEASE else link.silent + 1
        if link.silent >= LEASE or not (one.alive and other.alive):
            self.end(link)
        elif up:
            for end in link.ends:
                self.take(link, end)

    def take(self, link: Link, end: SimFrontend) -> None:
        peer, arriving, answers = link.other(end), link.to[end.name], 0
        for _ in range(self.faults.random.randint(0, 12)):
            if not arriving:
                break
            message = arriving.popleft()
            if isinstance(message, Taken):
                end.replication.acknowledged(peer.name, message.count)
                continue
            abandoned = end.directory.apply(peer.name, message)
            link.taken[end.name] += 1
            answers += 1
            if abandoned is not None:
                self.faults.counts["abandoned"] += 1
                end.abandon(abandoned.rid, "a peer has it")
        if answers:
            self.answer(link, peer.name)

    def answer(self, link: Link, name: str) -> None:
        link.to[name].append(link.answer_to(name))

    def end(self, link: Link) -> None:
        """Each side in its own time, when it runs."""
        for end in link.ends:
            peer = link.other(end)
            if link.ended[end.name] or not end.runs_now or self.faults.random.random() < 0.5:
                continue
            link.ended[end.name] = True
            newer = any(
                end in each.ends and each.other(end).name == peer.name for each in self.links if each is not link
            )
            if not newer:
                end.replication.left(peer.name)
                end.go_on(end.directory.lost(peer.name, self.faults.step))
        if all(link.ended[end.name] or not end.alive for end in link.ends):
            self.links.remove(link)


def simulate(
    seed: int,
    only: frozenset[str] | None = None,
    steps: int = STEPS,
    variant: type[SimFrontend] = SimFrontend,
) -> World:
    world = World(seed, only, variant)
    try:
        for _ in range(steps):
            world.step()
        world.faults.over = True
        for _ in range(QUIET):
            world.step()
        assert not world.clients, f"clients without an end: {[c.identity for c in world.clients]}"
    except Exception as error:
        error.world = world  # type: ignore[attr-defined]
        raise
    return world
