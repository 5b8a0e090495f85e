#!/usr/bin/env python3
"""Measure the line that a rank's shadow travels over: see README.md beside this file.

    python benchmark/shadow_link.py [--quick] [--transports tcp] [--rates 0 1000 100] [--delays 0 10 50]

The sender and the store of a rank, each in a process of its own, as two hosts have them; no engine. With --rates or
--delays they are on hosts of their own (`test/net`), with such a line between them, which needs root, ip and tc.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test"))

from net.hosts import Host, Hosts, unavailable
from net.link_faults import Faults
from sglang_kevlar.cluster import keys
from sglang_kevlar.control.shadow_keys import KeyChain, root_key
from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

from sglang_kevlar.protocol.launch import window_name  # noqa: E402
from sglang_kevlar.protocol.shadow import SHADOW_VERSION, Layout, ShadowCounters  # noqa: E402
from sglang_kevlar.shadow.pool import Staged  # noqa: E402
from sglang_kevlar.shadow.sender import Piece, ShadowSender, Target  # noqa: E402
from sglang_kevlar.shadow.server import Port, ShadowServer  # noqa: E402
from sglang_kevlar.shadow.sockets import Network, listen  # noqa: E402
from sglang_kevlar.shadow.store import ShadowStore  # noqa: E402
from sglang_kevlar.transport import choose  # noqa: E402

BLOCK = 16
#: of a rank: 8 layers of 2 KV heads of 128 bf16 values, as an eighth of a middling model has
TOKEN_BYTES = 8 * 2 * 2 * 128 * 2
LAYOUT = Layout(
    version=SHADOW_VERSION, upstream="", model="", shard="", kv_dtype="bfloat16", page_size=1, block_tokens=BLOCK,
    rows=[TOKEN_BYTES // 16] * 16,
)  # fmt: skip
STORE_BYTES = 1 << 30
STORE, SOURCE = "store", "source"
#: share of the line that the second measurement, of the lag, asks for
LOAD = 0.5


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def store(directory: str, transport_name: str, host: str) -> None:
    """Until its input ends; then says what it used."""
    network = Network(keys.load(f"{directory}/key"))
    transport = choose(transport_name, host)
    ports = [Port(listen(f"ipc://{directory}/store"), [transport])]
    socket, endpoint = network.listen(host, 1 << 20)
    ports.append(Port(socket, [transport], local=False))
    held = ShadowStore(STORE_BYTES // LAYOUT.block_bytes, LAYOUT.block_bytes)
    server = ShadowServer(ports, LAYOUT, held, ShadowCounters())
    server.start()
    used = cpu()
    print(endpoint, flush=True)
    sys.stdin.readline()
    print(cpu() - used, flush=True)
    os._exit(0)


def source(directory: str, transport_name: str, host: str, endpoint: str, megabytes: int, rate: float) -> None:
    """``rate``: bytes a second that are offered; 0: as many as go. Prints what it measured as one line.

    The lag of a parcel is the time from when its KV was copied until it is known that it is in the store.
    """
    network = Network(keys.load(f"{directory}/key"))
    counters = ShadowCounters()
    launch = secrets.token_hex(4)
    names = itertools.count()
    sender = ShadowSender(
        launch, "0", 1, LAYOUT, 0.0, network.dial, lambda: window_name(launch, 0, 1, 0, next(names)), counters,
        f"{directory}/counters",
    )  # fmt: skip
    sender.start()
    sender.retarget(Target("1", 1, endpoint, choose(transport_name, host)))
    link = wait_for(lambda: sender.link)
    blocks = megabytes * 10**6 // LAYOUT.block_bytes
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, 255, 32 * LAYOUT.block_bytes, np.uint8))
    lags: list[float] = []
    acknowledge = link.acknowledge

    def acknowledged(sequence: int, gone: Iterable[bytes]) -> int:
        now = time.monotonic()
        lags.extend(now - at for number, at in sender._unacknowledged if number <= sequence)
        return acknowledge(sequence, gone)

    link.acknowledge = acknowledged
    started, used, sent = time.monotonic(), cpu(), 0
    while sent < blocks:
        due = blocks if not rate else int((time.monotonic() - started) * rate / LAYOUT.block_bytes)
        count = min(32, blocks - sent, sender.room(), due - sent, sender.piece_blocks)
        if count > 0:
            # Of another sequence each: nothing is evicted for its sake that somebody waits for.
            chain = KeyChain(root_key(str(sent), None, None), BLOCK)
            tokens = array("q", [sent] * count * BLOCK)
            chain.grow(tokens)
            piece = Piece(chain.keys, None, Staged(rows, LAYOUT.rows), 0, tokens.tobytes(), (None, None), None)
            sender.queue(piece, link)
            sender.wake()
            sent += count
        else:
            time.sleep(0.001)
    wait_for(lambda: sender.waiting_tokens == 0)
    elapsed = time.monotonic() - started
    assert sender.link is link and counters.resyncs == 0, "it began anew"
    median, p99 = np.percentile(lags, (50, 99)) * 1e3
    print(elapsed, cpu() - used, median, p99, flush=True)
    os._exit(0)


def wait_for(condition: Any, seconds: float = 300.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.001)
    return value


@dataclass(frozen=True)
class Line:
    #: Mbit/s; 0: as fast as it goes
    rate: int
    #: milliseconds, one way; None: without the process that delays, which is itself a limit
    delay: int | None

    @property
    def loopback(self) -> bool:
        return not self.rate and self.delay is None

    @property
    def words(self) -> str:
        if self.loopback:
            return "loopback | none"
        return f"{self.rate or 'unlimited'} | {'none' if self.delay is None else self.delay}"

    @contextlib.contextmanager
    def hosts(self) -> Iterator[dict[str, Host | None]]:
        """Its ends, by who runs there."""
        if self.loopback:
            yield {STORE: None, SOURCE: None}
            return
        with Hosts(STORE, SOURCE, wire=self.delay is not None) as hosts:
            if self.delay:
                hosts.fault(Faults(delay=self.delay / 1e3))
            for host in hosts:
                if self.rate:
                    host.limit(self.rate * 125_000)
            yield {host.name: host for host in hosts}


def address_of(host: Host | None) -> str:
    return "127.0.0.1" if host is None else host.address


def network_of(host: Host | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if host is None else host.network()


class Ends:
    """The processes at both ends of a line: this file again, with ``--role``. Gone at the end whatever happens."""

    def __init__(self, line: Line, stack: contextlib.ExitStack) -> None:
        self._hosts = stack.enter_context(line.hosts())
        self._stack = stack

    def start(self, end: str, role: str, *arguments: object) -> subprocess.Popen[str]:
        host = self._hosts[end]
        process: subprocess.Popen[str] = (subprocess.Popen if host is None else host.popen)(
            [sys.executable, __file__, "--role", role, address_of(host), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(process.communicate)
        self._stack.callback(process.kill)
        return process


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def measure(transport: str, line: Line, megabytes: int, rate: float = 0.0) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        key = Path(directory, "key")
        key.touch(0o600)
        key.write_text(keys.generate())
        ends = Ends(line, stack)
        keeper = ends.start(STORE, "store", directory, transport)
        [endpoint] = said(keeper)
        if transport == "shm":
            endpoint = f"ipc://{directory}/store"
        sending = ends.start(SOURCE, "source", directory, transport, endpoint, megabytes, rate)
        elapsed, used, median, p99 = map(float, said(sending))
        print("", file=keeper.stdin, flush=True)
        [stored] = map(float, said(keeper))
    return {
        "MB/s": megabytes / elapsed,
        "source": used / megabytes * 1e3,
        "store": stored / megabytes * 1e3,
        "median": median,
        "p99": p99,
    }


def plain(line: Line, megabytes: int) -> float:
    """MB/s that one TCP connection gets out of it, without us."""

    def sink() -> None:
        connection, _ = listening.accept()
        while connection.recv(1 << 20):
            pass
        connection.sendall(b"!")

    with line.hosts() as hosts, contextlib.ExitStack() as stack:
        with network_of(hosts[STORE]):
            listening = stack.enter_context(socket.create_server((address_of(hosts[STORE]), 0)))
        with network_of(hosts[SOURCE]):
            connection = stack.enter_context(socket.create_connection(listening.getsockname()))
        threading.Thread(target=sink, daemon=True).start()
        started = time.monotonic()
        for _ in range(megabytes):
            connection.sendall(bytes(10**6))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        return megabytes / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp"], choices=["shm", "tcp", "mooncake"])
    parser.add_argument("--rates", nargs="+", type=int, default=[0], help="of the line, Mbit/s; 0: no limit")
    parser.add_argument("--delays", nargs="+", type=int, default=[None], help="of the line, ms one way")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.role:
        play(*args.role)
        return
    repeats = 1 if args.quick else args.repeats
    lines = [Line(rate, delay) for rate in args.rates for delay in args.delays]
    if not all(line.loopback for line in lines) and (reason := unavailable(wire=args.delays != [None])):
        sys.exit(reason)
    points = [(name, line) for line in lines for name in args.transports if name != "shm" or line.loopback]
    # So that an end by SIGTERM leaves no process and no namespace.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(f"load {os.getloadavg()[0]:.1f}, {repeats} runs each; median (least - most)\n")
    head = ["transport", "line, Mbit/s", "delay, ms one way", "plain TCP, MB/s", "MB/s"]
    head += ["CPU of source, ms a MB", "of store", "lag at half load, ms, p50", "p99"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for transport, line in points:
        megabytes = min(300, line.rate or 300)
        megabytes = megabytes // 10 if args.quick else megabytes
        cells = [[plain(line, megabytes) for _ in range(repeats)]]
        full = [measure(transport, line, megabytes) for _ in range(repeats)]
        speed = sorted(one["MB/s"] for one in full)[repeats // 2]
        half = [measure(transport, line, megabytes, LOAD * speed * 1e6) for _ in range(repeats)]
        cells += [[one[name] for one in full] for name in ("MB/s", "source", "store")]
        cells += [[one[name] for one in half] for name in ("median", "p99")]
        print(f"| {transport} | {line.words} | {' | '.join(map(spread, cells))} |", flush=True)


def play(role: str, host: str, *rest: str) -> None:
    """What this process is at one end of a line."""
    match role, rest:
        case "store", (directory, transport):
            store(directory, transport, host)
        case "source", (directory, transport, endpoint, megabytes, rate):
            source(directory, transport, host, endpoint, int(megabytes), float(rate))


def spread(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.3g} ({ordered[0]:.3g} - {ordered[-1]:.3g})"


if __name__ == "__main__":
    main()
