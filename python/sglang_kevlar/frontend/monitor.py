"""Watches the worker groups for the frontend: reports, exits, stopped and hung processes; kills what is fenced.

All of it runs on the event loop that called ``start``, and every decision is ``control.membership``'s. Events
reach the frontend one at a time and in order, also those that a handler causes itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from sglang_kevlar.control.detection import (
    CALM_INTERVAL,
    OBSERVE_INTERVAL,
    SAMPLE_AFTER,
    SAMPLE_INTERVAL,
    SUPERVISOR,
    CpuTime,
    Observation,
    deadline,
)
from sglang_kevlar.control.membership import Event, GroupKill, Membership
from sglang_kevlar.frontend.process_watch import ProcessWatch
from sglang_kevlar.protocol.group import GroupReport, KillGroup, LossKind, ProcessRef
from sglang_kevlar.protocol.heartbeat import Heartbeat
from sglang_kevlar.protocol.launch import KevlarArgs, Paths

logger = logging.getLogger(__name__)

MAX_REPORT_BYTES = 1 << 20
MAX_MEMBERS = 1024
#: seconds a running supervisor has to kill an epoch, with its own bookkeeping, before the frontend does it
SUPERVISOR_KILL_TIME = 0.5
#: seconds after the end of one of its threads at which a process is looked at: it may be ending, too
THREAD_END_CHECKS = (0.0, 0.001, 0.003, 0.01)
_MEMBER = re.compile(r"rank\d{1,4}|detokenizer")


class _Watched:
    """Processes and last report of a group's current epoch."""

    def __init__(self) -> None:
        self.epoch = -1
        self.sender: bytes | None = None
        self.report: GroupReport | None = None
        self.processes: dict[ProcessRef, ProcessWatch] = {}
        #: the last epoch a kill was asked for, and the frontend's own kill of it while that waits
        self.kill_requested = -1
        self.kill_timer: asyncio.TimerHandle | None = None

    def supervisor(self) -> ProcessWatch | None:
        return next((w for ref, w in self.processes.items() if ref.name == SUPERVISOR), None)


class GroupMonitor:
    """``start`` and everything after it is to be called on the event loop's thread."""

    def __init__(self, paths: Paths, args: KevlarArgs, on_event: Callable[[Event], None]) -> None:
        self.membership = Membership(args)
        self._paths = paths
        self._args = args
        self._on_event = on_event
        self._decoder = msgspec.msgpack.Decoder(GroupReport)
        self._watched = [_Watched() for _ in self.membership.groups]
        self._pending: deque[Event] = deque()
        self._dispatching = False
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._logged: dict[str, float] = {}

    def start(self) -> None:
        """Bind the control socket and begin. A socket file left by a frontend that died is replaced."""
        self._loop = asyncio.get_running_loop()
        self._unlink_socket()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 100)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_REPORT_BYTES)
        # A restarted supervisor may come with the routing id of its predecessor.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(self._paths.control)
        self._tasks = [self._loop.create_task(self._receive()), self._loop.create_task(self._observe())]

    def close(self) -> None:
        """Stop watching. Groups live on, for the next frontend; only an epoch already fenced is killed."""
        if not self._tasks:
            return  # never started
        for task in self._tasks:
            task.cancel()
        for group, watched in enumerate(self._watched):
            if watched.kill_timer is not None:
                self._kill_members(group, watched.epoch)
            for watch in watched.processes.values():
                self._unwatch(watch)
            watched.processes.clear()
        self._socket.close()
        self._context.term()
        self._unlink_socket()

    def _unlink_socket(self) -> None:
        try:
            os.unlink(self._paths.control.removeprefix("ipc://"))
        except FileNotFoundError:
            pass

    def kill(self, group: int, epoch: int, cause: str, planned: bool = False) -> None:
        """Fence an epoch and have it killed and started again; ignored if it is not the current one.

        ``planned``: an operator's restart, without back-off. Raises ValueError for an unknown group.
        """
        kind: LossKind = "operator" if planned else "unfit"
        now = time.monotonic()
        self._dispatch(self.membership.declare_lost(group, epoch, cause, now, kind=kind, planned=planned))

    def on_internal_error(self, group: int, epoch: int) -> None:
        """Count an answer that was the group's own fault (not a client's 4xx) against its error budget."""
        self._dispatch(self.membership.on_internal_error(group, epoch, time.monotonic()))

    def snapshot(self) -> list[dict[str, Any]]:
        """Per group what /kevlar/status says of processes and membership."""
        now = time.monotonic()
        groups: list[dict[str, Any]] = []
        for g, watched in zip(self.membership.groups, self._watched, strict=True):
            alive = {ref.name: ref.pid for ref in watched.processes}
            ranks = sorted((n for n in alive if n.startswith("rank")), key=lambda n: int(n[4:]))
            groups.append(
                {
                    "id": g.id,
                    "role": g.role,
                    "state": g.state,
                    "epoch": g.epoch,
                    "pids": {
                        "supervisor": alive.get(SUPERVISOR),
                        "ranks": [alive[name] for name in ranks],
                        "detokenizer": alive.get("detokenizer"),
                    },
                    "cause": g.cause or "; ".join(g.watch.suspicions),
                    "retry_in": round(g.retry_in(now), 3),
                }
            )
        return groups

    # Reports

    async def _receive(self) -> None:
        while True:
            try:
                frames = await self._socket.recv_multipart()
                self._on_frames(frames)
            except zmq.ContextTerminated:
                return
            except Exception:
                self._log_rarely("receive", "receiving group reports", exc_info=True)
            # A message that is already there does not suspend: let the others of this loop run.
            await asyncio.sleep(0)

    def _on_frames(self, frames: list[bytes]) -> None:
        sender = frames[0]
        try:
            if len(frames) != 2:
                raise ValueError(f"{len(frames)} frames")
            report = self._decoder.decode(frames[1])
            self._validate(report)
        except (ValueError, msgspec.DecodeError) as e:
            group = next((str(i) for i, w in enumerate(self._watched) if w.sender == sender), "unknown")
            self._log_rarely(f"report {group}", "dropped a bad report of group %s (sender %r): %s", group, sender, e)
            return
        if report.epoch < self.membership.group(report.group).epoch:
            self._log_rarely(
                f"stale {report.group}", "ignored a report of group %d for old epoch %d", report.group, report.epoch
            )
            return
        self._watched[report.group].sender = sender
        gone = self._watch(report)
        self._dispatch(self.membership.on_report(report, time.monotonic(), gone))

    def _validate(self, report: GroupReport) -> None:
        self.membership.group(report.group)
        names = [m.name for m in report.members]
        if len(names) > MAX_MEMBERS or len(set(names)) != len(names):
            raise ValueError("too many or doubled members")
        if report.supervisor.name != SUPERVISOR or not all(_MEMBER.fullmatch(n) for n in names):
            raise ValueError(f"unknown process names in {[report.supervisor.name, *names]}")
        if report.epoch < 0 or any(m.pid <= 0 for m in (report.supervisor, *report.members)):
            raise ValueError("negative epoch or pid")

    def _watch(self, report: GroupReport) -> frozenset[str]:
        """Make the watched processes those of the report. Returns the names of those that are dead."""
        watched = self._watched[report.group]
        if report.epoch != watched.epoch:
            # One epoch at a time: whatever is left of the last one must not live.
            self._kill_members(report.group, watched.epoch)
            watched.epoch = report.epoch
        watched.report = report
        wanted = [report.supervisor, *report.members]
        for ref in [ref for ref in watched.processes if ref not in wanted]:
            self._unwatch(watched.processes.pop(ref))
        gone = set()
        for ref in wanted:
            if ref not in watched.processes:
                page = self._paths.heartbeat(report.group, report.epoch, ref.name) if ref.name != SUPERVISOR else None
                try:
                    watch = ProcessWatch(ref, page)
                except ProcessLookupError:
                    gone.add(ref.name)
                    continue
                except (
                    OSError
                ) as e:  # out of descriptors, for instance: no evidence of anything; the next report retries
                    self._log_rarely(f"watch {report.group}", "cannot watch %s of group %d: %s", ref, report.group, e)
                    continue
                watched.processes[ref] = watch
                self._loop.add_reader(watch.pidfd, self._on_exit, report.group, ref)
        return frozenset(gone)

    # Processes

    def _on_exit(self, group: int, ref: ProcessRef) -> None:
        watched = self._watched[group]
        watch = watched.processes.pop(ref, None)
        if watch is None:
            return
        self._unwatch(watch)
        self._dispatch(self.membership.on_process_exit(group, watched.epoch, ref.name, time.monotonic()))

    def _watch_threads(self, group: int, ref: ProcessRef, watch: ProcessWatch) -> None:
        for pidfd in watch.watch_threads():
            self._loop.add_reader(pidfd, self._on_thread_end, group, ref, watch, pidfd)

    def _on_thread_end(self, group: int, ref: ProcessRef, watch: ProcessWatch, pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        watch.forget_thread(pidfd)
        for delay in THREAD_END_CHECKS:
            self._loop.call_later(delay, self._check_dead, group, ref, watch)

    def _check_dead(self, group: int, ref: ProcessRef, watch: ProcessWatch) -> None:
        if self._watched[group].processes.get(ref) is watch and watch.state() == "X":
            self._on_exit(group, ref)

    def _unwatch(self, watch: ProcessWatch) -> None:
        for pidfd in (watch.pidfd, *watch.thread_pidfds):
            self._loop.remove_reader(pidfd)
        watch.close()

    async def _observe(self) -> None:
        while True:
            serving = [g for g in self.membership.groups if g.stage == "ready"]
            if not serving:
                self._ready.clear()
                await self._ready.wait()
            for g in serving:
                try:
                    self._observe_group(g.id)
                except Exception:
                    self._log_rarely(f"observe {g.id}", "observing group %d epoch %d", g.id, g.epoch, exc_info=True)
            calm = not any(g.watch.suspicions for g in serving)
            await asyncio.sleep(CALM_INTERVAL if calm else OBSERVE_INTERVAL)

    def _observe_group(self, group: int) -> None:
        now = time.monotonic()
        watched = self._watched[group]
        beats: dict[str, Heartbeat] = {}
        stopped = []
        cpu: dict[str, CpuTime] = {}
        for ref, watch in list(watched.processes.items()):
            beat, _ = watch.heartbeat()
            # Also of one that has just said something: it may have been its last word.
            state = watch.state()
            if not watch.thread_pidfds:
                self._watch_threads(group, ref, watch)
            if state == "X":
                self._on_exit(group, ref)
                return
            if state == "T":
                stopped.append(ref.name)
            if beat is None:
                continue
            beats[ref.name] = beat
            limit = deadline(beat, self._args)
            age = now - beat.since_ns / 1e9
            if limit is not None and age > min(SAMPLE_AFTER, limit / 4) and now - watch.sampled_at >= SAMPLE_INTERVAL:
                cpu[ref.name] = watch.cpu_time()
                watch.sampled_at = now
        obs = Observation(beats, frozenset(stopped), cpu)
        self._dispatch(self.membership.on_observation(group, watched.epoch, obs, now))

    # Events

    def _dispatch(self, events: list[Event]) -> None:
        if not events:
            return
        self._pending.extend(events)
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self._pending:
                event = self._pending.popleft()
                try:
                    self._on_event(event)
                except Exception:
                    logger.exception("handling %s of group %d epoch %d", type(event).__name__, event.group, event.epoch)
                if isinstance(event, GroupKill):
                    self._request_kill(event)
        finally:
            self._dispatching = False
        if any(g.stage == "ready" for g in self.membership.groups):
            self._ready.set()

    def _request_kill(self, event: GroupKill) -> None:
        watched = self._watched[event.group]
        first = event.epoch > watched.kill_requested
        watched.kill_requested = max(event.epoch, watched.kill_requested)
        # The supervisor of a process that died sees that too, and knows better what it died of.
        if watched.sender is not None and not (first and event.kind == "exit"):
            message = KillGroup(group=event.group, epoch=event.epoch, cause=event.cause, planned=event.planned)
            frames = [watched.sender, msgspec.msgpack.encode(message)]
            future = asyncio.ensure_future(self._socket.send_multipart(frames, flags=zmq.NOBLOCK))
            future.add_done_callback(lambda f: f.exception())  # gone or full: the kill below does not need it
        if event.epoch != watched.epoch or watched.kill_timer is not None:
            return
        supervisor = watched.supervisor()
        able = supervisor is not None and supervisor.state() not in "TX"
        delay = SUPERVISOR_KILL_TIME if able else 0.0
        watched.kill_timer = self._loop.call_later(delay, self._kill_members, event.group, event.epoch)

    def _kill_members(self, group: int, epoch: int) -> None:
        watched = self._watched[group]
        if watched.kill_timer is not None:
            watched.kill_timer.cancel()
            watched.kill_timer = None
        if watched.epoch != epoch:
            return
        for ref, watch in watched.processes.items():
            if ref.name != SUPERVISOR:
                try:
                    watch.kill()
                except OSError as e:
                    logger.error("cannot kill %s of group %d epoch %d: %s", ref, group, epoch, e)

    def _log_rarely(self, key: str, message: str, *args: object, exc_info: bool = False) -> None:
        """At most one line per key and second, so that a flood of bad messages is not one of log lines."""
        now = time.monotonic()
        if now - self._logged.get(key, -1.0) >= 1.0:
            self._logged[key] = now
            logger.warning(message, *args, exc_info=exc_info)
