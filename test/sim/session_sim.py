"""Frontends and groups on other hosts: the real ends of their sessions, over connections and a clock that fail.

What is judged, at each end: nothing of a session comes after its end; what is delivered is a prefix of what was sent,
in order; one live session for a name at a frontend; each end of a session has a cause; and whoever holds a session
that the other side does not have any more learns of it in two leases of time in which it ran. When nothing fails any
more, every group is joined to every frontend, and all that was sent arrives.
"""

from __future__ import annotations

from collections import defaultdict

from faults import Faults
from session_network import Connection, Network

from sglang_kevlar.control import group_end
from sglang_kevlar.control.frontend_end import RETRY, Sessions
from sglang_kevlar.control.group_end import GroupEnd
from sglang_kevlar.control.session import (
    TICK,
    Admitted,
    Dial,
    Effect,
    Ended,
    HangUp,
    Joined,
    KillArrived,
    NotJoined,
    OutputsArrived,
    RequestsArrived,
    Send,
    StateChanged,
)
from sglang_kevlar.protocol.cluster import (
    Configuration,
    GroupState,
    Identity,
    Outputs,
    Requests,
    decode,
    from_group,
    to_group,
)

FRONTENDS, GROUPS = 2, 3
STEPS = 400
LEASE = 1.5
#: seconds in which it runs, until an end has learned that the other has no such session any more
LEARN = 2 * LEASE + 1.0
#: seconds after which everything is joined once nothing fails
QUIET = LEARN + group_end.CONNECT_TIME + group_end.JOIN_TIME + group_end.BACKOFF_CAP + RETRY + 5.0
SAME = Configuration(
    version="1", upstream="1", model="m", model_digest="d", tp=1, pp=1, dtype="float32", kv_cache_dtype="auto",
    page_size=1, context_length=100,
)  # fmt: skip


class Account:
    """All that one end made of one session."""

    def __init__(self, session: str, connection: Connection) -> None:
        self.session = session
        self.connection = connection
        self.live = True
        #: what this end sent, with the epoch it was for, and how far the other end is with it
        self.sent: list[tuple[bytes, int]] = []
        self.taken = 0
        #: seconds in which this end ran: since it last heard anything, and since the other end lives no more
        self.silent = self.alone = 0.0


class Process:
    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = 0
        self.accounts: dict[str, Account] = {}

    @property
    def runs(self) -> bool:
        return self.alive and not self.paused


class Frontend(Process):
    def __init__(self, number: int, incarnation: int) -> None:
        super().__init__(f"frontend{number}")
        self.number = number
        self.sessions = Sessions(f"{self.name}-{incarnation}", SAME, LEASE)
        self.connections: dict[bytes, Connection] = {}
        self.names: dict[str, str] = {}
        self.down_for = 0


class Gateway(Process):
    def __init__(self, name: str, incarnation: int, now: float, lives: int | None = None) -> None:
        super().__init__(name)
        self.state = GroupState(epoch=1, phase="ready")
        #: steps; a namesake goes away again
        self.lives = lives
        self.down_for = 0
        host = "elsewhere" if lives is not None else f"host-{name}"
        self.identity = Identity(name=name, host=host, instance=f"i{incarnation}")
        self.ends = [GroupEnd(self.identity, SAME, self.state, now, number) for number in range(FRONTENDS)]
        self.connections: list[Connection | None] = [None] * FRONTENDS


class SessionWorld:
    def __init__(self, seed: int, only: frozenset[str] | None = None) -> None:
        self.faults = Faults(seed, only)
        self.now = 1000.0
        self.incarnations = self.count = 0
        self.trace: list[str] = []
        self.joins: defaultdict[str, int] = defaultdict(int)
        self.ends: defaultdict[str, int] = defaultdict(int)
        self.delivered = 0
        self.network = Network(self.faults)
        self.frontends = [Frontend(number, self.born()) for number in range(FRONTENDS)]
        self.gateways = [Gateway(f"group{number}", self.born(), self.now) for number in range(GROUPS)]

    def born(self) -> int:
        self.incarnations += 1
        return self.incarnations

    def say(self, what: str) -> None:
        self.trace.append(f"{self.faults.step:5d} {self.now:9.2f} {what}")

    # -- effects

    def of_frontend(self, frontend: Frontend, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                connection = frontend.connections.get(effect.to)
                if isinstance(effect.message, Requests):
                    sent = (effect.message.payload, effect.message.epoch)
                    frontend.accounts[effect.message.session].sent.append(sent)
                if connection is not None:
                    connection.send_down(effect.message, self.now)
            elif isinstance(effect, HangUp):
                if (connection := frontend.connections.get(effect.to)) is not None:
                    connection.hang_up_down(self.now)
            elif isinstance(effect, Joined):
                self.say(f"{frontend.name}: joined {effect.identity.name} {effect.session}")
                self.joins["frontend"] += 1
                assert effect.identity.name not in frontend.names, f"two sessions of {effect.identity.name}"
                assert effect.session not in frontend.accounts, f"session {effect.session} joined twice"
                frontend.names[effect.identity.name] = effect.session
                end = frontend.sessions.session(effect.session)
                assert end is not None
                frontend.accounts[effect.session] = Account(effect.session, frontend.connections[end.sender])
            elif isinstance(effect, Ended):
                self.on_ended(frontend, effect)
                frontend.names = {name: each for name, each in frontend.names.items() if each != effect.session}
            elif isinstance(effect, OutputsArrived):
                gateway = self.sender_of(effect.session)
                self.take(self.current(frontend, effect), gateway, effect.payload, None)
            elif isinstance(effect, StateChanged):
                self.current(frontend, effect)

    def of_gateway(self, gateway: Gateway, number: int, effects: list[Effect]) -> None:
        for effect in effects:
            connection = gateway.connections[number]
            if isinstance(effect, Send):
                if isinstance(effect.message, Outputs):
                    sent = (effect.message.payload, effect.message.epoch)
                    gateway.accounts[effect.message.session].sent.append(sent)
                if connection is not None:
                    connection.send_up(effect.message, self.now)
            elif isinstance(effect, HangUp):
                if connection is not None:
                    connection.close_up(self.now)
                gateway.connections[number] = None
            elif isinstance(effect, Dial):
                gateway.connections[number] = self.network.dial(gateway.name, number, self.now)
            elif isinstance(effect, Admitted):
                assert connection is not None
                self.joins["group"] += 1
                gateway.accounts[effect.session] = Account(effect.session, connection)
            elif isinstance(effect, NotJoined):
                assert effect.retry_s is not None, effect.reason
                self.say(f"{gateway.identity.instance} {gateway.name}: not joined, {effect.reason}")
            elif isinstance(effect, Ended):
                self.on_ended(gateway, effect)
            elif isinstance(effect, RequestsArrived):
                account = self.current(gateway, effect)
                assert effect.epoch == gateway.state.epoch, f"requests for epoch {effect.epoch} of another"
                self.take(account, self.frontends[number], effect.payload, gateway.state.epoch)
            elif isinstance(effect, KillArrived):
                self.current(gateway, effect)
                assert effect.epoch == gateway.state.epoch, f"a kill of epoch {effect.epoch} of another"
                self.change(gateway)

    def current(
        self, process: Process, event: OutputsArrived | StateChanged | RequestsArrived | KillArrived
    ) -> Account:
        account = process.accounts.get(event.session)
        assert account is not None and account.live, f"{type(event).__name__} of {event.session} after its end"
        return account

    def take(self, mine: Account, other: Process | None, payload: bytes, epoch: int | None) -> None:
        """Delivered: is it the next of what the other end sent? Requests of former epochs are left out."""
        assert payload.split()[0].decode() == mine.session, "of another session"
        theirs = other.accounts.get(mine.session) if other is not None else None
        if theirs is None:
            return  # its process is gone, and its account with it
        self.delivered += 1
        while epoch is not None and theirs.taken < len(theirs.sent) and theirs.sent[theirs.taken][0] != payload:
            assert theirs.sent[theirs.taken][1] != epoch, "delivered is not a prefix of what was sent"
            theirs.taken += 1
        assert theirs.taken < len(theirs.sent), "delivered is not a prefix of what was sent"
        assert theirs.sent[theirs.taken][0] == payload, "delivered is not a prefix of what was sent"
        assert epoch in (None, theirs.sent[theirs.taken][1]), "requests of a former epoch are delivered"
        theirs.taken += 1

    def sender_of(self, session: str) -> Gateway | None:
        """The gateway process that made this session, if it is there yet."""
        return next((each for each in self.gateways if session.startswith(each.identity.instance + "-")), None)

    def on_ended(self, process: Process, event: Ended) -> None:
        account = process.accounts[event.session]
        assert account.live, f"session {event.session} ended twice"
        self.say(f"{process.name}: {event.session} ended, {event.kind}: {event.reason}")
        account.live = False
        self.ends[event.kind] += 1
        connection = account.connection
        assert event.since <= self.now
        if event.kind == "silent":
            # The first look after a pause may count for a little more than we do here.
            assert account.silent > LEASE - 8 * TICK, f"silent for {account.silent:.2f} s of watched time only"
            assert connection.hindered, "a session ended by silence where nothing was held up"
        elif event.kind == "protocol":
            assert connection.harmed, f"nothing was wrong: {event.reason}"
        elif event.kind == "closed":
            assert connection.closed, "the connection was not closed"
        elif event.kind in ("over", "replaced"):
            assert connection.ended, "the other side has not ended it"
        else:
            assert event.kind == "left", event
        connection.ended = True

    # -- what happens

    def change(self, gateway: Gateway) -> None:
        """The group's next state: it dies, or is ready again under the next epoch."""
        before = gateway.state
        if before.phase == "ready":
            gateway.state = GroupState(epoch=before.epoch, phase="down", cause="sim")
        else:
            gateway.state = GroupState(epoch=before.epoch + 1, phase="ready")
        for number, end in enumerate(gateway.ends):
            self.of_gateway(gateway, number, end.change_state(gateway.state, self.now))

    def step(self) -> None:
        self.faults.next_step()
        passed = TICK
        if self.faults.strike("clock jumps", 0.01):
            passed = self.faults.random.choice([0.0, 0.4, 20.0])
            self.network.hinder_all()
        self.now += passed
        self.strike()
        self.network.move(self.now)
        for frontend in self.frontends:
            if frontend.runs:
                self.run_frontend(frontend)
        for gateway in self.gateways:
            if gateway.runs:
                self.run_gateway(gateway)
        self.judge(passed)

    def run_frontend(self, frontend: Frontend) -> None:
        for connection in self.network.accepted(frontend.number):
            frontend.connections[connection.sender] = connection
        for sender, connection in list(frontend.connections.items()):
            for data in connection.arrived_up(self.now):
                if data is None:
                    self.of_frontend(frontend, frontend.sessions.on_closed(sender, "closed", self.now))
                    frontend.connections.pop(sender, None)
                    break
                message = decode(from_group, data)
                if (account := frontend.accounts.get(message.session)) is not None:
                    account.silent = 0.0
                self.of_frontend(frontend, frontend.sessions.on_message(sender, message, self.now))
        self.of_frontend(frontend, frontend.sessions.tick(self.now))
        for end in frontend.sessions:
            if self.faults.event("request", 0.3):
                self.count += 1
                payload = f"{end.session} {self.count}".encode()
                effects = frontend.sessions.requests(end.session, end.state.epoch, payload, self.now)
                self.of_frontend(frontend, effects)
            if not end.over and self.faults.event("kill", 0.005):
                self.of_frontend(frontend, frontend.sessions.kill(end.session, end.state.epoch, "sim", self.now))
            assert len(frontend.sessions) <= GROUPS

    def run_gateway(self, gateway: Gateway) -> None:
        if self.faults.event("state", 0.1 if gateway.state.phase == "down" else 0.01):
            self.change(gateway)
        for number, end in enumerate(gateway.ends):
            if (connection := gateway.connections[number]) is not None:
                self.read(gateway, number, end, connection)
            self.of_gateway(gateway, number, end.tick(self.now))
            if gateway.state.phase == "ready" and self.faults.event("output", 0.3):
                self.count += 1
                payload = f"{end.session} {self.count}".encode()
                self.of_gateway(gateway, number, end.outputs(gateway.state.epoch, payload, self.now))

    def read(self, gateway: Gateway, number: int, end: GroupEnd, connection: Connection) -> None:
        if connection.news(self.now):
            self.of_gateway(gateway, number, end.on_connected(self.now))
        for data in connection.arrived_down(self.now):
            if gateway.connections[number] is not connection:
                return
            if data is None:
                self.of_gateway(gateway, number, end.on_closed("closed", self.now))
                return
            message = decode(to_group, data)
            if (account := gateway.accounts.get(message.session)) is not None:
                account.silent = 0.0
            self.of_gateway(gateway, number, end.on_message(message, self.now))

    def strike(self) -> None:
        faults = self.faults
        for process in [*self.frontends, *self.gateways]:
            if process.paused:
                process.paused -= 1
            elif process.alive and faults.strike("pause", 0.004):
                process.paused = faults.random.choice([4, 20, 70, 200])
                self.network.hinder(process.name)
            if faults.over:
                process.paused = 0
        for frontend in list(self.frontends):
            if frontend.alive and faults.strike("frontend dies", 0.002):
                self.network.die(frontend.name, self.now)
                frontend.alive, frontend.down_for = False, faults.random.randrange(1, 60)
                self.say(f"{frontend.name} dies")
            elif not frontend.alive:
                frontend.down_for -= 1
                if frontend.down_for <= 0 or faults.over:
                    self.frontends[frontend.number] = Frontend(frontend.number, self.born())
        for index, gateway in enumerate(list(self.gateways)):
            self.fate(index, gateway)
        if len(self.gateways) == GROUPS and faults.strike("namesake", 0.004):
            self.gateways.append(Gateway("group0", self.born(), self.now, lives=faults.random.randrange(20, 200)))
        self.network.strike(self.now, [each.name for each in self.gateways[:GROUPS]])

    def fate(self, index: int, gateway: Gateway) -> None:
        faults = self.faults
        if gateway.lives is not None:
            gateway.lives -= 1
            if gateway.lives <= 0 or faults.over:
                self.kill(gateway)
                self.gateways.remove(gateway)
        elif gateway.alive and faults.strike("gateway dies", 0.002):
            self.kill(gateway)
            gateway.down_for = faults.random.randrange(1, 60)
        elif gateway.runs and faults.strike("gateway leaves", 0.001):
            self.say(f"{gateway.identity.instance} {gateway.name} leaves")
            for number, end in enumerate(gateway.ends):
                self.of_gateway(gateway, number, end.leave("sim", self.now))
            gateway.alive, gateway.down_for = False, faults.random.randrange(1, 60)
        elif not gateway.alive:
            gateway.down_for -= 1
            if gateway.down_for <= 0 or faults.over:
                self.gateways[index] = Gateway(gateway.name, self.born(), self.now)

    def kill(self, gateway: Gateway) -> None:
        self.say(f"{gateway.identity.instance} {gateway.name} dies")
        gateway.alive = False
        for connection in gateway.connections:
            if connection is not None:
                connection.die_up(self.now)

    # -- what is judged

    def judge(self, passed: float) -> None:
        for process in [*self.frontends, *self.gateways]:
            if not process.runs:
                continue
            for account in process.accounts.values():
                if not account.live:
                    continue
                # As much as one look may count.
                account.silent += min(passed, 0.1)
                account.alone = 0.0 if self.is_held_there(process, account.session) else account.alone + TICK
                assert account.alone < LEARN, f"{process.name} does not learn of the end of {account.session}"

    def is_held_there(self, process: Process, session: str) -> bool:
        others: list[Process] = [*self.gateways] if isinstance(process, Frontend) else [*self.frontends]
        return any(
            other.alive and (account := other.accounts.get(session)) is not None and account.live for other in others
        )

    def whole(self) -> bool:
        """Every group is joined to every frontend, by the same session at both ends, and nothing is missing."""
        for frontend in self.frontends:
            for gateway in self.gateways:
                end = gateway.ends[frontend.number]
                mine = frontend.accounts.get(frontend.names.get(gateway.name, ""))
                if end.phase != "joined" or mine is None or mine.session != end.session:
                    return False
                theirs = gateway.accounts[end.session]
                rest = [epoch for _, epoch in mine.sent[mine.taken :]]
                if theirs.taken < len(theirs.sent) or gateway.state.epoch in rest:
                    return False
                if frontend.sessions.session(end.session).state != gateway.state:
                    return False
        return True

    def quiet(self) -> None:
        self.faults.over = True
        end = self.now + QUIET
        while self.now < end:
            self.step()
            if self.whole():
                return
        raise AssertionError("not whole: a group is not joined, or something that was sent never arrived")


def simulate(seed: int, only: frozenset[str] | None = None, steps: int = STEPS) -> SessionWorld:
    """Raises AssertionError, with the world in the error's ``world``."""
    world = SessionWorld(seed, only)
    try:
        for _ in range(steps):
            world.step()
        world.quiet()
    except BaseException as error:
        error.add_note(f"seed {seed}, step {world.faults.step}")
        error.world = world  # type: ignore[attr-defined]
        raise
    return world
