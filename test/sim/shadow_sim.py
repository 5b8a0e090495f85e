"""The shadow between the ranks of three groups: the real `shadow.rank.RankShadow` of each, with its sender, store,
exporter, lookups and promoter, stepped by hand over a network, windows and a clock that fail (`test_shadow_sim`).

What is judged: KV in a store or a cache is that of the tokens it is found under, in every bit, whatever has happened.
And when nothing fails any more, a shadow becomes whole within a bound, and a source believes of no key that it is held
where it is not.
"""

from __future__ import annotations

import zlib
from array import array
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from faults import Faults
from shadow_network import Clock, Ends, Network, SourceSocket, StoreSocket, Windows, over_tcp
from shadow_pool import BLOCK, LAYOUT, as_block
from shadow_rank import LONGEST, ROWS, Request, SimRank

from frontend_fakes import plan, tokenized
from sglang_kevlar.control.shadow_keys import KeyChain, root_key
from sglang_kevlar.control.shadow_partners import Place
from sglang_kevlar.frontend.shadows import ShadowPlans
from sglang_kevlar.protocol.launch import KevlarArgs
from sglang_kevlar.shadow import export, lookup, promote, sender, server, store
from sglang_kevlar.shadow import rank as rank_module
from sglang_kevlar.transport import choose

GROUPS = 3
STEPS = 300
#: virtual seconds after which a shadow is whole once nothing fails: a silent session, and a pause for a refused one
QUIET = 3 * (sender.SILENCE + sender.RETRY)
#: steps between two looks at all that is stored
LOOK = 8


class Stepped(sender.ShadowSender):
    def start(self) -> None:
        """No thread: the world calls `_step`."""


class SteppedServer(server.ShadowServer):
    def start(self) -> None:
        """The same."""


class ShadowWorld:
    def __init__(self, seed: int, only: frozenset[str] | None = None) -> None:
        self.faults = Faults(seed, only)
        self.clock = Clock()
        self.network = Network(self.faults, self.clock)
        self.windows = Windows(self.network)
        #: groups on another host than the rest
        self.far: set[int] = self.faults.random.choice([set(), {2}, {0, 2}])
        # In blocks: from a store that loses something all the time to one with room for everything. One that keeps the
        # shadows of two groups has room for a request of each, or it would never be whole.
        self.capacity = self.faults.random.choice([24, 40] if self.far else [6, 16, 40])
        memory = self.capacity * LAYOUT.block_bytes / 2**30
        self.plan = plan(
            KevlarArgs(
                worker_groups=GROUPS,
                shadow_memory=memory,
                shadow_min_context=BLOCK,
                advertise="this host" if self.far else None,
            )
        )
        self.plans = ShadowPlans(self.plan, self)  # type: ignore[arg-type]
        self.draining: set[int] = set()
        self.weights = 0
        self.updating = 0
        self.epochs = [0] * GROUPS
        self.ranks: dict[int, SimRank] = {}
        self.down: dict[int, int] = dict.fromkeys(range(GROUPS), 1)
        #: bytes of every block that was ever computed, by key
        self.truth: dict[bytes, bytes] = {}
        #: the group that starts or whose threads run just now
        self.stepped = 0
        self.requests = self.promotions = 0
        self.trace: list[str] = []

    # -- surroundings of the ranks

    def channel(self, group: int, epoch: int, name: str) -> str:
        return f"{group} {epoch}"

    def shadow_counters(self, group: int, epoch: int, rank: int) -> str:
        return ""

    def listen(self, endpoint: str) -> Any:
        return StoreSocket(self.network, self.stepped, endpoint)

    def dial(self, endpoint: str) -> Any:
        return SourceSocket(self.network, self.stepped, endpoint)

    def ends(self, key: Any) -> Ends:
        group = self.stepped
        return Ends(self.listen, self.dial, self.channel(group, self.epochs[group], ""))

    def transport(self, name: str, host: str) -> Any:
        return self.windows if name == Windows.name else choose(name, host)

    def place(self, group: int) -> Place:
        endpoint = over_tcp(self.channel(group, self.epochs[group], ""))
        far = group in self.far
        return Place(str(group), "far" if far else "", not far, endpoints=(endpoint,) if self.far else ())

    def learn(self, weights: int, req: Request) -> None:
        """KV of one weight version alone has been computed."""
        chain = req.__dict__.setdefault("learned", KeyChain(root_key(str(weights), *req.origin), BLOCK))
        done, blocks = len(chain.keys), len(req.truth) // BLOCK
        chain.grow(req.tokens[done * BLOCK : blocks * BLOCK])
        for i in range(done, blocks):
            self.truth[chain.keys[i]] = as_block(req.truth[i * BLOCK : (i + 1) * BLOCK])

    def next_token(self, req: Request) -> int:
        """Few different ones, so that sequences share beginnings."""
        return zlib.crc32(repr((len(req.output_ids), req.origin_input_ids[-1])).encode()) % 2

    # -- what happens

    def say(self, what: str) -> None:
        self.trace.append(f"{self.faults.step:5d} {self.clock.now:9.2f} {what}")

    def start_group(self, group: int) -> None:
        del self.down[group]
        self.epochs[group] += 1
        self.stepped = group
        self.ranks[group] = SimRank(self, group, self.epochs[group])
        self.say(f"group {group} starts, epoch {self.epochs[group]}")
        self.tell()

    def crash(self, group: int) -> None:
        dead = self.ranks.pop(group)
        heir = self.plans.targets.get(group)
        dead.end()
        place = self.channel(group, dead.epoch, "")
        del self.network.stores[place]
        self.network.stores.pop(over_tcp(place), None)
        self.down[group] = self.faults.random.randrange(1, 30)
        self.say(f"group {group} dies")
        self.tell()
        for req in dead.running:
            if heir in self.ranks and len(req.tokens) < LONGEST:
                self.submit(self.ranks[heir], req.tokens, req.origin, req.max_new - len(req.output_ids))

    def tell(self) -> None:
        """Who shadows to whom, as the frontend says it."""
        weights = "" if self.updating else str(self.weights)
        channels: Any = [
            SimpleNamespace(
                group=group, epoch=rank.epoch, place=self.place(group), weights=weights, tells_plans=lambda: True
            )
            for group, rank in self.ranks.items()
        ]
        for channel, news in self.plans.news(channels, self.draining):
            self.ranks[channel.group].inbox.append(news)

    def submit(self, rank: SimRank, prompt: array[int], origin: Any, max_new: int) -> None:
        self.requests += 1
        message = tokenized(f"r{self.requests}", prompt, max_new, extra_key=origin[0], cache_salt=origin[1])
        rank.inbox.append(message)

    def new_request(self, rank: SimRank) -> None:
        draw = self.faults.random
        prompt = array("q", [draw.randrange(2)] * draw.randrange(2, 24) + [draw.randrange(2)])
        origin = draw.choice([(None, None), (None, None), ("adapter", None), (None, "tenant")])
        self.submit(rank, prompt, origin, draw.randrange(1, LONGEST - len(prompt)))

    def begin_update(self) -> None:
        self.updating = self.faults.random.randrange(1, 6)
        self.tell()
        self.weights += 1
        for rank in self.ranks.values():
            rank.inbox.append(("weights", self.weights))
            if self.faults.event("request behind an update", 0.7):
                self.new_request(rank)

    def misfortunes(self) -> None:
        strike, draw = self.faults.strike, self.faults.random
        if strike("clock jumps", 0.01):
            self.clock.now += draw.choice([1.0, 11.0, 70.0, 700.0])
        for group, rank in list(self.ranks.items()):
            if strike("crash", 0.006):
                self.crash(group)
                continue
            if strike("hang", 0.01):
                rank.hung = draw.randrange(1, 40)
            if strike("sender is slow", 0.06):
                rank.sender_hung = draw.randrange(1, 8)
            if strike("store is slow", 0.06):
                rank.store_hung = draw.randrange(1, 8)
            if len(rank.store) and strike("memory damaged", 0.04):
                index = rank.store._index
                slot = index.get(draw.choice(list(index._blocks))).slot
                rank.store._memory[slot][draw.randrange(LAYOUT.block_bytes)] ^= 1 << draw.randrange(8)
            if rank.tree.nodes and strike("cache evicted", 0.05):
                rank.tree.evict(rank.pool.capacity_tokens // 2)
            if rank.running and strike("request vanishes", 0.03):
                rank.abort(draw.choice(rank.running))
            if strike("flush", 0.004):
                rank.inbox.append(("flush", 0))
        if strike("one-way partition", 0.01):
            self.network.cut.add((draw.randrange(GROUPS), draw.randrange(GROUPS)))
        elif self.network.cut and self.faults.chance(0.05):
            self.network.cut.clear()
        if strike("drain", 0.006):
            self.draining ^= {draw.randrange(GROUPS)}
            self.tell()
        if not self.updating and strike("weight update", 0.004):
            self.begin_update()

    def step(self) -> None:
        faults = self.faults
        faults.next_step()
        self.clock.now += 0.05
        if not faults.over:
            self.misfortunes()
        if self.updating:
            self.updating -= 1
            if not self.updating:
                self.tell()
        for group in list(self.down):
            self.down[group] -= 1
            if self.down[group] <= 0:
                self.start_group(group)
        self.network.deliver()
        order = list(self.ranks.values())
        faults.random.shuffle(order)
        for rank in order:
            if rank.hung:
                rank.hung -= 1
                continue
            if faults.event("request", 0.15):
                self.new_request(rank)
            rank.step()
            self.threads(rank)
        self.check()

    def threads(self, rank: SimRank) -> None:
        self.stepped = rank.group
        if rank.sender_hung:
            rank.sender_hung -= 1
        elif rank.sender_wakes_at <= self.clock.now and not rank.sender._guarded(rank.sender._step):
            rank.sender_wakes_at = self.clock.now + 1.0
        self.network.deliver()
        if rank.store_hung:
            rank.store_hung -= 1
        else:
            rank.shadow._server._step()

    # -- what must hold

    def check(self) -> None:
        for rank in self.ranks.values():
            link, outgoing = rank.sender.link, rank.sender
            assert 0 <= outgoing._staged <= outgoing.window_bytes, "more is copied than there is room for"
            assert len(outgoing._queue) <= outgoing.window_bytes // LAYOUT.block_bytes + 200
            if link is not None:
                assert link.ring.used <= outgoing.window_bytes
                assert 0 <= link.in_flight_tokens * LAYOUT.token_bytes <= outgoing.window_bytes
            assert len(rank.shadow._server._sessions) < GROUPS, "sessions of what is gone"
            assert len(rank.store) <= self.capacity
        if self.faults.step % LOOK == 0:
            self.look()

    def look(self) -> None:
        """Everything that a lookup could find."""
        for rank in self.ranks.values():
            rank.store.check()
            for key, block in rank.store._index._blocks.items():
                data = rank.store._memory[block.slot].tobytes()
                if zlib.crc32(data) == block.crc:  # otherwise it is not found
                    assert self.truth.get(key) == data, f"group {rank.group} holds other KV than that of the tokens"

    def quiet(self) -> None:
        """Nothing fails any more: shadows become whole, and nobody believes what is not so."""
        self.faults.over = True
        self.network.cut.clear()
        self.draining.clear()
        for rank in self.ranks.values():
            rank.hung = rank.sender_hung = rank.store_hung = 0
            for req in list(rank.running):
                rank.abort(req)
        self.tell()
        end = self.clock.now + QUIET
        fresh: dict[int, Request] = {}
        while True:
            self.step()
            self.clock.now += 0.2
            for group, rank in self.ranks.items():
                settled = not self.updating and rank.shadow.exporter.content == str(self.weights)
                if group not in fresh and settled and not rank.inbox:
                    fresh[group] = self.fresh(rank)
            why = self.unfinished(fresh)
            if why is None:
                break
            assert self.clock.now < end, f"the shadow does not become whole: {why}"

    def fresh(self, rank: SimRank) -> Request:
        """A request that goes on running, as one that began when nothing failed any more."""
        length = LONGEST if self.capacity >= ROWS * LONGEST // BLOCK else BLOCK
        tokens = array("q", [100 + rank.group] * length)
        rank.inbox.append(tokenized(f"quiet{rank.group}", tokens, 10**6))
        return Request("", tokens, 0, None, None, self.weights)

    def unfinished(self, fresh: dict[int, Request]) -> str | None:
        if len(fresh) < GROUPS or self.down or self.updating:
            return "a group is down"
        for group, rank in self.ranks.items():
            target = self.ranks[self.plans.targets[group]]
            link = rank.sender.link
            if link is None or rank.sender._queue or link.in_flight_tokens or not self.network.quiet:
                return f"group {group} is not done"
            believed = [key for key in link.known if key not in target.store]
            if believed:
                return f"group {group} believes {len(believed)} blocks to be held that are not"
            chain = KeyChain(root_key(str(self.weights), None, None), BLOCK)
            chain.grow(fresh[group].origin_input_ids)
            if any(key not in target.store for key in chain.keys):
                return f"group {group}: a running request is not held"
        return None


def simulate(seed: int, only: frozenset[str] | None = None, steps: int = STEPS) -> ShadowWorld:
    """Raises AssertionError, with the world in the error's ``world``."""
    with ExitStack() as stack:
        world = ShadowWorld(seed, only)
        for module in (sender, server, store, rank_module, lookup, export):
            stack.enter_context(patch.object(module, "time", world.clock))
        replacements = [
            (rank_module, "Network", world.ends),
            (rank_module, "listen", world.listen),
            (sender, "WINDOW_BYTES", 0),
            (export, "DECODE_INTERVAL", 1),
            (promote, "evict_from_tree_cache", lambda tree, tokens: tree.evict(tokens)),
            (rank_module, "ShadowSender", Stepped),
            (rank_module, "ShadowServer", SteppedServer),
            (rank_module, "choose", world.transport),
        ]
        for module, name, value in replacements:
            stack.enter_context(patch.object(module, name, value))
        try:
            for _ in range(steps):
                world.step()
            world.quiet()
        except BaseException as error:
            error.add_note(f"seed {seed}, step {world.faults.step}")
            error.world = world  # type: ignore[attr-defined]
            raise
        finally:
            for each in world.ranks.values():
                each.end()
    return world
