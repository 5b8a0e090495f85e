"""What the server says of itself, ten times a second, as events of the timeline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp
import msgspec

INTERVAL = 0.1
#: seconds for one answer
TIMEOUT = 10.0


class Pids(msgspec.Struct):
    supervisor: int | None = None
    ranks: list[int] = []
    detokenizer: int | None = None


class _Store(msgspec.Struct):
    rejected_frames: int = 0
    wrong_blocks: int = 0


class _Shadow(msgspec.Struct):
    to: int | str | None = None
    resyncs: int = 0
    store: _Store = msgspec.field(default_factory=_Store)


class Group(msgspec.Struct):
    id: int
    state: str
    epoch: int
    pids: Pids
    running: int = 0
    queued: int = 0
    cause: str = ""
    shadow: _Shadow | None = None
    name: str = ""
    #: "local": on the server's host
    link: str = "local"

    @property
    def serves(self) -> bool:
        """Also while something about it is suspicious."""
        return self.state in ("ready", "suspect")


class Failover(msgspec.Struct):
    """Of the status; its counts grow until all its requests have gone on."""

    at: str
    group: int
    cause: str
    detect_ms: float
    redirected: int
    recomputed_tokens: int
    restored_tokens: int


class Status(msgspec.Struct):
    uptime_s: float
    groups: list[Group]
    failovers: list[Failover]

    def ready(self) -> list[int]:
        return [group.id for group in self.groups if group.state == "ready"]

    def all_ready(self) -> bool:
        return len(self.ready()) == len(self.groups)


class Unreachable(Exception):
    """The server does not answer, or not as one of ours; the message says which."""


class Watch:
    """``status`` is the newest. ``record`` is told of every change."""

    def __init__(self, http: aiohttp.ClientSession, url: str, record: Callable[..., None]) -> None:
        self._http = http
        self._url = url
        self._record = record
        self._decoder = msgspec.json.Decoder(Status)
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self.status = Status(uptime_s=0.0, groups=[], failovers=[])
        #: whether the last question was answered
        self.reachable = False
        #: monotonic seconds; None while some group is not
        self.all_ready_since: float | None = None
        #: those since `start`, by time and group
        self.failovers: dict[tuple[str, int], Failover] = {}
        self._earlier: set[tuple[str, int]] = set()
        #: frontends that came after the first
        self.new_frontends = 0
        #: seconds from the loss of a group until it was ready again
        self.returns: list[float] = []
        self._lost_at: dict[int, float] = {}
        self._counters: dict[tuple[int, int], tuple[int, int, int]] = {}
        #: of all groups together: shadow sessions begun anew, frames that stores rejected, blocks found wrong by audits
        self.resyncs = self.rejected_frames = self.wrong_blocks = 0

    async def start(self) -> None:
        """Raises Unreachable."""
        await self._look()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def wait(self, condition: Callable[[Status], bool], timeout: float) -> bool:
        """Until ``condition`` of a status that was asked for after this call. False: not within ``timeout``."""

        async def met() -> None:
            async with self._changed:
                await self._changed.wait()
                while not (self.reachable and condition(self.status)):
                    await self._changed.wait()

        try:
            await asyncio.wait_for(met(), timeout)
        except TimeoutError:
            return False
        return True

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
            except Unreachable as error:
                if self.reachable:
                    self.reachable = False
                    self._record("unreachable", reason=str(error))
            async with self._changed:
                self._changed.notify_all()
            await asyncio.sleep(INTERVAL)

    async def _look(self) -> None:
        try:
            async with self._http.get(
                f"{self._url}/kevlar/status", timeout=aiohttp.ClientTimeout(total=TIMEOUT)
            ) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(f"{self._url} does not answer: {error or type(error).__name__}") from None
        if response.status != 200:
            raise Unreachable(f"{self._url}/kevlar/status: status {response.status}")
        try:
            status = self._decoder.decode(content)
        except msgspec.MsgspecError as error:
            raise Unreachable(f"{self._url}/kevlar/status is not that of SGLang-Kevlar: {error}") from None
        if not self.reachable and self.status.groups:
            self._record("reachable")
        if status.uptime_s < self.status.uptime_s:
            self.new_frontends += 1
            self._record("new frontend")
        self._compare(self.status, status)
        self.status, self.reachable = status, True
        if not status.all_ready():
            self.all_ready_since = None
        elif self.all_ready_since is None:
            self.all_ready_since = time.monotonic()

    def _compare(self, before: Status, now: Status) -> None:
        known = {group.id: group for group in before.groups}
        if not known:
            self._earlier = {(failover.at, failover.group) for failover in now.failovers}
        for group in now.groups:
            old = known.get(group.id)
            if old is None or (old.state, old.epoch) != (group.state, group.epoch):
                self._record("group", group=group.id, state=group.state, epoch=group.epoch, cause=group.cause)
                self._time_return(group, old)
            if group.shadow is not None:
                self._count(group, group.shadow)
        for failover in now.failovers:
            key = (failover.at, failover.group)
            if key not in self._earlier:
                if key not in self.failovers:
                    self._record("failover", group=failover.group, cause=failover.cause, detect_ms=failover.detect_ms)
                self.failovers[key] = failover

    def _time_return(self, group: Group, old: Group | None) -> None:
        if group.serves and group.id in self._lost_at:
            self.returns.append(time.monotonic() - self._lost_at.pop(group.id))
        elif old is not None and old.serves and not group.serves:
            self._lost_at.setdefault(group.id, time.monotonic())

    def _count(self, group: Group, shadow: _Shadow) -> None:
        key = (group.id, group.epoch)
        counts = (shadow.resyncs, shadow.store.rejected_frames, shadow.store.wrong_blocks)
        resyncs, rejected, wrong = (
            max(0, new - old) for new, old in zip(counts, self._counters.get(key, (0, 0, 0)), strict=True)
        )
        first = not self.status.groups
        self._counters = {known: value for known, value in self._counters.items() if known[0] != group.id}
        self._counters[key] = counts
        if first or not (resyncs or rejected or wrong):
            return
        self.resyncs += resyncs
        self.rejected_frames += rejected
        self.wrong_blocks += wrong
        self._record("shadow", group=group.id, resyncs=resyncs, rejected_frames=rejected, wrong_blocks=wrong)
