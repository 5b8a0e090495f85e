"""Several hosts on one machine, and faults between them: each host is a network namespace.

    with Hosts("a", "b") as hosts:                    # in-kernel, as fast as it goes: down, up, tbf
        server = hosts["a"].popen([...])              # listens on hosts["a"].address
        with hosts["b"].network():                    # sockets and processes made here are of host b
            socket.create_connection((hosts["a"].address, 80))
        hosts["a"].down()                             # the cable is pulled: no FIN, no RST, silence

    with Hosts("a", "b", "c", wire=True) as hosts:    # through a process: every fault of ``Faults``
        hosts.fault(Faults(blocked=True), source="a", target="b")
        hosts.heal()

Only the network is apart: hosts share pids, files and /dev/shm. Their neighbours are fixed, so nobody learns from ARP
that a host is gone, as nobody does behind a router. When it ends, all processes in the namespaces are killed and the
namespaces removed. What a SIGKILLed test left, the next one removes (or ``python test/net/hosts.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from net.link_faults import NONE, Faults

_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
#: pid and start time of the process whose it is: a pid alone comes back
_NAME = re.compile(r"kv-(\d+)-(\d+)-\d+-\w+")
_SWITCH = "switch"
_serial = itertools.count()
#: seconds for a command, an answer of the wire, the death of what was killed
_PATIENCE = 20.0


class HostsProblem(Exception):
    """A command failed, or the wire did."""


@functools.cache
def unavailable(wire: bool = False) -> str | None:
    """Why this machine cannot have hosts; None: it can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "no ip and tc (Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if wire and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun"
    try:
        with Hosts("probe", wire=wire):
            return None
    except HostsProblem as problem:
        return str(problem)


def _run(*command: str, lines: Iterable[str] = ()) -> None:
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=_PATIENCE)
    if done.returncode:
        raise HostsProblem(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")


def _started(pid: int) -> int | None:
    """When ``pid`` started, in the kernel's ticks; None: there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None


def _inside(namespaces: Sequence[str]) -> list[int]:
    """The processes in these namespaces, without this one."""
    files = set()
    for namespace in namespaces:
        with contextlib.suppress(OSError):
            found = (_NAMESPACES / namespace).stat()
            files.add((found.st_dev, found.st_ino))
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                found = (entry / "ns/net").stat()
                if (found.st_dev, found.st_ino) in files:
                    pids.append(int(entry.name))
    return pids


def _remove(namespaces: Sequence[str]) -> None:
    """Kill what runs in them, then remove them. What somebody else removes meanwhile is no matter."""
    deadline = time.monotonic() + _PATIENCE
    while (pids := _inside(namespaces)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=_PATIENCE)


def sweep() -> list[str]:
    """Remove what processes left that are no more. Returns the names of it."""
    left = []
    if _NAMESPACES.is_dir():
        for entry in _NAMESPACES.iterdir():
            owner = _NAME.fullmatch(entry.name)
            if owner is not None and _started(int(owner[1])) != int(owner[2]):
                left.append(entry.name)
    if left:
        _remove(left)
    return left


class Host:
    """One network namespace, with one interface ``eth0``."""

    def __init__(self, hosts: Hosts, name: str, index: int) -> None:
        self.name = name
        self.namespace = f"{hosts.prefix}-{name}"
        self.address = f"10.77.0.{index + 1}"
        self.mac = f"02:00:00:00:00:{index + 1:02x}"
        self.index = index
        self._hosts = hosts

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Sockets and processes that *this thread* makes meanwhile are this host's, and stay so."""
        setns = ctypes.CDLL(None, use_errno=True).setns
        with open("/proc/thread-self/ns/net") as before, open(_NAMESPACES / self.namespace) as there:
            if setns(there.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")
            try:
                yield
            finally:
                if setns(before.fileno(), _CLONE_NEWNET):
                    os.abort()  # in the wrong network every later test would fail, with no hint of why

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """Start a process on this host. It, and what it starts, is killed when the hosts end."""
        with self.network():
            process = subprocess.Popen(command, **options)
        self._hosts.children.append(process)
        return process

    def pids(self) -> list[int]:
        """All processes on this host, those that were only started by others on it included."""
        return _inside([self.namespace])

    def down(self) -> None:
        """Pull the cable: nothing in, nothing out, and what was on its way is lost. Connections stay."""
        self._hosts.carrier(self, up=False)

    def up(self) -> None:
        self._hosts.carrier(self, up=True)

    def limit(self, rate: int | None) -> None:
        """Bytes a second that leave this host, to all others together. None: no limit."""
        if rate is None:
            _run("tc", "-n", self.namespace, "qdisc", "del", "dev", "eth0", "root")
            return
        shape = f"rate {rate * 8}bit burst {max(rate // 100, 16_000)} latency 100ms".split()
        _run("tc", "-n", self.namespace, "qdisc", "replace", "dev", "eth0", "root", "tbf", *shape)


class Hosts:
    """Context manager over hosts by name. ``seed`` decides which frames are hit; ``grace``: seconds at the end, in
    which what our children started may put things in order, when they have been killed."""

    def __init__(self, *names: str, wire: bool = False, seed: int = 0, grace: float = 3.0) -> None:
        if len(set(names)) != len(names) or not 0 < len(names) < 255 or _SWITCH in names:
            raise ValueError(f"names of hosts differ from each other and from {_SWITCH!r}: {names}")
        self.prefix = f"kv-{os.getpid()}-{_started(os.getpid())}-{next(_serial)}"
        self._hosts = {name: Host(self, name, index) for index, name in enumerate(names)}
        self._switch = f"{self.prefix}-{_SWITCH}"
        self._seed = seed
        self._grace = grace
        self._with_wire = wire
        self._wire: subprocess.Popen[str] | None = None
        self._down: set[int] = set()
        self._faults: dict[tuple[int, int], Faults] = {}
        self.children: list[subprocess.Popen] = []

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def __enter__(self) -> Hosts:
        sweep()
        try:
            _run("ip", "-batch", "-", lines=[f"netns add {name}" for name in self._names()])
            if self._with_wire:
                self._start_wire()
            else:
                self._make_bridge()
            for host in self:
                self._configure(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        except KeyboardInterrupt:
            self.close()
            raise

    def close(self) -> None:
        for child in self.children:
            child.kill()
        deadline = time.monotonic() + self._grace
        while time.monotonic() < deadline and _inside(self._names()):
            time.sleep(0.01)
        _remove(self._names())
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=_PATIENCE)
        if self._wire is not None:
            self._wire.kill()
            self._wire.wait(_PATIENCE)
            for pipe in (self._wire.stdin, self._wire.stdout, self._wire.stderr):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]

    # ---- faults

    def fault(self, faults: Faults, *, source: str | None = None, target: str | None = None) -> None:
        """Instead of what was there on the paths from ``source`` to ``target``; None: all. In force on return."""
        sources = [host.index for host in self if source in (None, host.name)]
        targets = [host.index for host in self if target in (None, host.name)]
        if not sources or not targets:
            raise KeyError(f"no such host: {source!r} to {target!r}")
        for pair in itertools.product(sources, targets):
            self._faults[pair] = faults
        self._set_paths(itertools.product(sources, targets))

    def heal(self) -> None:
        """All paths without faults, all cables in. What ``Host.limit`` limits stays so."""
        for host in self:
            if host.index in self._down:
                host.up()
        if self._with_wire:
            self.fault(NONE)

    def carrier(self, host: Host, *, up: bool) -> None:
        (self._down.discard if up else self._down.add)(host.index)
        if self._with_wire:
            self._order({"carrier": host.index, "up": up})
            everybody = range(len(self._hosts))
            self._set_paths({(i, host.index) for i in everybody} | {(host.index, i) for i in everybody})
        else:
            _run("ip", "-n", self._switch, "link", "set", f"p{host.index}", "up" if up else "down")

    def count(self, source: str, target: str) -> dict[str, int]:
        """Frames on this path so far: ``passed`` and ``lost``."""
        return self._order({"count": [self[source].index, self[target].index]})

    def _set_paths(self, pairs: Iterable[tuple[int, int]]) -> None:
        for source, target in pairs:
            down = {source, target} & self._down
            faults = Faults(blocked=True) if down else self._faults.get((source, target), NONE)
            self._order({"from": [source], "to": [target], "faults": asdict(faults)})

    def _order(self, order: dict[str, Any]) -> Any:
        if self._wire is None:
            raise ValueError("such faults need Hosts(..., wire=True)")
        assert self._wire.stdin is not None and self._wire.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._wire.stdin.write(json.dumps(order) + "\n")
            self._wire.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._wire is not None and self._wire.stdout is not None and self._wire.stderr is not None
        if not select.select([self._wire.stdout], [], [], _PATIENCE)[0]:
            raise HostsProblem(f"the wire says nothing for {_PATIENCE:g} s")
        line = self._wire.stdout.readline()
        if not line:
            raise HostsProblem(f"the wire ended ({self._wire.wait(_PATIENCE)}): {self._wire.stderr.read()[-500:]}")
        return json.loads(line)

    # ---- making them

    def _names(self) -> list[str]:
        return [*(host.namespace for host in self), *([] if self._with_wire else [self._switch])]

    def _start_wire(self) -> None:
        files = [str(_NAMESPACES / host.namespace) for host in self]
        self._wire = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("wire.py")), str(self._seed), *files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the test, which ends it
        )
        if self._answer() != "ready":
            raise HostsProblem("the wire does not start")

    def _make_bridge(self) -> None:
        cables = [
            f"link add p{host.index} netns {self._switch} type veth peer name eth0 netns {host.namespace}"
            for host in self
        ]
        _run("ip", "-batch", "-", lines=cables)
        ports = [f"link set p{host.index} master bridge up" for host in self]
        lines = ["link add bridge type bridge forward_delay 0", "link set bridge up", *ports]
        _run("ip", "-n", self._switch, "-batch", "-", lines=lines)

    def _configure(self, host: Host) -> None:
        others = [other for other in self if other is not host]
        lines = [
            "link set lo up",
            f"link set eth0 address {host.mac}",
            f"address add {host.address}/24 dev eth0",
            "link set eth0 up",
            *(f"neighbour replace {other.address} lladdr {other.mac} dev eth0 nud permanent" for other in others),
        ]
        _run("ip", "-n", host.namespace, "-batch", "-", lines=lines)


if __name__ == "__main__":
    print("\n".join(sweep()) or "nothing was left")
