"""Simulated worker groups: they make the tokens of a known oracle, and do what real ones do when they fail."""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from failover_weights import Roll, Rolled

from frontend_fakes import (
    AbortReq,
    BatchStrOutput,
    FakeChannel,
    str_batch,
)
from sglang_kevlar.control.membership import (
    GroupSuspect,
    GroupTrusted,
)
from sglang_kevlar.frontend.in_flight import Call
from sglang_kevlar.frontend.outcome import RequestOutcome
from sglang_kevlar.protocol.group import GroupReport, ProcessRef
from sglang_kevlar.worker.resume import ResumedGenerateReqInput, ShadowPlanReq, StartedReqOutput

if TYPE_CHECKING:
    from failover_world import Sim

CAPACITY = 300
BASE = 1 << 20
MAKER = 1 << 12


def oracle(rid: str, k: int) -> int:
    """Token ``k`` of the answer to ``rid``."""
    return zlib.crc32(f"{rid}/{k}".encode()) % BASE


def text_of(tokens: list[int]) -> str:
    return "".join([f"{token % BASE:x}," for token in tokens])


@dataclass
class Client:
    rid: str
    max_new: int
    continuable: bool
    poison: bool
    answer: list[int]  # the oracle's, whole
    #: when it was last given a token, or a group
    moved_at: float
    outcome: RequestOutcome | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: str | None = None
    aborted: bool = False
    #: it and the rest of its batch
    call: Call | None = None
    #: updates of the weights that stopped for nobody, when it began
    updates: int = 0
    weights: set[int] = field(default_factory=set)


@dataclass
class Run:
    """A request on a simulated group."""

    wire: str
    client: Client
    position: int
    text_sent: int = 0  # characters, from the first token on


class SimGroup:
    def __init__(self, sim: Sim, group: int) -> None:
        self.sim, self.id = sim, group
        self.epoch = 0
        self.phase = "down"
        self.clear()
        self.wait = 1

    def clear(self) -> None:
        self.runs: dict[str, Run] = {}
        self.input: deque[tuple[Any, str]] = deque()
        self.output: deque[tuple[float, Any]] = deque()
        self.weights = 0
        self.hung = 0  # steps; 0: it is not
        #: steps for which nothing reaches it, and nothing of it arrives: a partition of one way each
        self.deaf = self.mute = 0
        #: steps in which it makes no token
        self.slow = 0
        self.channel: FakeChannel | None = None
        self.suspect = False
        self.plan: ShadowPlanReq | None = None

    @property
    def maker(self) -> int:
        return self.id * 1024 + self.epoch

    def report(self, phase: str) -> None:
        members = [] if phase == "down" else [ProcessRef("rank0", 2, self.epoch)]
        report = GroupReport(
            group=self.id, epoch=self.epoch, phase=phase, supervisor=ProcessRef("supervisor", 1, 1), members=members,
            init_info={"max_total_num_tokens": CAPACITY}, cause="sim",
        )  # fmt: skip
        self.sim.dispatch(self.sim.membership.on_report(report, self.sim.loop.now))

    def step(self) -> None:
        chance, strike = self.sim.faults.chance, self.sim.faults.strike
        if self.phase != "ready":
            self.wait -= 1
            if self.wait <= 0 and self.phase == "down":
                self.clear()
                self.epoch += 1
                self.phase, self.wait = "starting", self.sim.random.randrange(1, 8)
                self.report("starting")
            elif self.phase == "starting" and strike("crash while starting", 0.02):
                self.sim.die(self)
            elif self.wait <= 0:
                self.phase = "ready"
                self.report("ready")
            return
        if self.hung:
            self.hung -= 1
            if not self.hung and self.sim.faults.event("hang found", 0.7):
                self.sim.lose(self, "hang")
        else:
            if self.deaf:
                self.deaf -= 1
            else:
                self.read()
            if self.phase == "ready":
                self.generate()
        self.slow = max(0, self.slow - 1)
        if self.mute:
            self.mute -= 1
        else:
            self.arrive()
        change = self.suspect != bool(self.hung) and chance(0.5)
        if self.phase == "ready" and (change or strike("false suspicion", 0.01)):
            self.suspect = not self.suspect
            event = GroupSuspect(self.id, self.epoch, "sim") if self.suspect else GroupTrusted(self.id, self.epoch)
            self.sim.dispatch([event])

    def read(self) -> None:
        while self.input and self.phase == "ready":
            message, weights = self.input.popleft()
            self.sim.count += 1
            if isinstance(message, AbortReq):
                for run in [r for r in self.runs.values() if message.abort_all or r.wire.startswith(message.rid)]:
                    del self.runs[run.wire]
                    self.send(AbortReq(rid=run.wire))
            elif isinstance(message, tuple):
                self.weights = message[1]
            elif isinstance(message, Roll):
                assert not self.runs, f"group {self.id} gets other weights while it runs {list(self.runs)}"
                loads = not self.sim.faults.strike("weights cannot be loaded", 0.1)
                self.weights = message.weights if loads else self.weights
                self.send(Rolled(loads))
            elif isinstance(message, ShadowPlanReq):
                assert message.content in ("", str(self.weights)), f"group {self.id} is told of other weights"
                assert message.target is None or message.target.name != str(self.id)
                self.plan = message
            else:
                self.take(message, weights)

    def take(self, message: Any, weights: str) -> None:
        assert str(self.weights) == weights, f"group {self.id} serves {self.weights}, a request expects {weights}"
        client = self.sim.client_of(message.rid)
        run = Run(message.rid, client, 0)
        if isinstance(message, ResumedGenerateReqInput):
            assert message.resume is not None
            made_under = {token // BASE // MAKER for token in message.resume.output_ids}
            assert made_under == {self.weights}, f"{message.rid} continues across weights"
            assert client.continuable
            run.position = len(message.resume.output_ids)
        self.send(StartedReqOutput(rid=message.rid, recomputed_tokens=run.position))
        if client.poison or (run.position and self.sim.faults.strike("crash while resuming", 0.03)):
            self.sim.die(self)
        else:
            self.runs[run.wire] = run

    def generate(self) -> None:
        rows = []
        for run in list(self.runs.values()):
            if self.slow or self.sim.faults.chance(0.3):
                continue
            first = run.position
            run.position = min(run.client.max_new, first + self.sim.random.randrange(1, 4))
            done = run.position == run.client.max_new
            # A detokenizer starts at the first token it ever saw of a request, and keeps back what is incomplete.
            text = text_of(run.client.answer[: run.position])
            until = len(text) if done else len(text) - self.sim.random.randrange(3)
            chunk = text[run.text_sent : until]
            run.text_sent = max(run.text_sent, until)
            made = (self.weights * MAKER + self.maker) * BASE
            tokens = [made + token for token in run.client.answer[first : run.position]]
            reason: dict[str, Any] | None = {"type": "length"} if done else None
            if reason is None and self.sim.faults.strike("internal error", 0.001):
                reason = {"type": "abort", "status_code": 500, "message": "internal"}
            if reason is not None:
                del self.runs[run.wire]
            rows.append((run.wire, tokens, chunk, reason))
        if rows:
            self.send(str_batch(*rows))

    def send(self, message: Any) -> None:
        late = 0.0
        if self.sim.faults.strike("output delayed", 0.4):
            late = self.sim.random.choice([0.01, 0.2, 0.2, 1.0])
        self.output.append((self.sim.loop.now + late, message))

    def arrive(self) -> None:
        while self.channel is not None and self.output and self.output[0][0] <= self.sim.loop.now:
            message = self.output.popleft()[1]
            self.sim.count += 1
            if isinstance(message, BatchStrOutput) and self.sim.faults.chance(0.05):
                self.sim.stray.append((list(message.rids), message))
            self.channel.put(message)

    def end_epoch(self) -> None:
        """The processes are dead; of what they had sent, some has arrived."""
        arrived = self.sim.random.randrange(len(self.output) + 1)
        self.sim.faults.counts["output lost at a death"] += len(self.output) - arrived
        for _ in range(arrived):
            if self.channel is not None:
                self.channel.put(self.output.popleft()[1])
        self.clear()
        self.phase, self.wait = "down", self.sim.random.randrange(1, 12)
