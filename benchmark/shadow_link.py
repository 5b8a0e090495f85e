#!/usr/bin/env python3
"""Measure the line that a rank's shadow travels over: see README.md beside this file.

    python benchmark/shadow_link.py [--quick] [--transports tcp] [--rates 0 1000 100]

The sender and the store of a rank, each in a process of its own, as two hosts have them; no engine. With --rates they
are in network namespaces with a limited line between them, which needs root, ip and tc.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
ADDRESSES = {"store": "10.91.0.1", "source": "10.91.0.2"}
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
    """``rate``: bytes a second that are offered; 0: as many as go. Prints what it measured as one line."""
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
    rows = [
        torch.from_numpy(np.random.default_rng(0).integers(0, 255, (BLOCK * 32, row), np.uint8)) for row in LAYOUT.rows
    ]
    lags = []
    started, used, sent = time.monotonic(), cpu(), 0
    while sent < blocks:
        due = blocks if not rate else int((time.monotonic() - started) * rate / LAYOUT.block_bytes)
        count = min(32, blocks - sent, sender.room(), due - sent, sender.piece_blocks)
        if count > 0:
            # Of another sequence each: nothing is evicted for its sake that somebody waits for.
            chain = KeyChain(root_key(str(sent), None, None), BLOCK)
            tokens = array("q", [sent] * count * BLOCK)
            chain.grow(tokens)
            piece = Piece(chain.keys, None, Staged(rows), 0, tokens.tobytes(), (None, None), None)
            sender.queue(piece, link)
            sender.wake()
            sent += count
        else:
            time.sleep(0.001)
        if rate:
            lags.append(sender._lag_ms())
    wait_for(lambda: sender.waiting_tokens == 0)
    elapsed = time.monotonic() - started
    assert sender.link is link and counters.resyncs == 0, "it began anew"
    lag = sorted(lags)
    print(elapsed, cpu() - used, lag[len(lag) // 2] if lag else 0, lag[int(len(lag) * 0.99)] if lag else 0, flush=True)
    os._exit(0)


def wait_for(condition: Any, seconds: float = 300.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.001)
    return value


@contextlib.contextmanager
def line(mbit: int) -> Iterator[dict[str, list[str]]]:
    """Two namespaces with a line between them; what to put before a command, by who runs it."""
    names = {role: f"kevlar-{os.getpid()}-{role}" for role in ADDRESSES}
    ends = dict(zip(ADDRESSES, (f"kv{os.getpid()}a", f"kv{os.getpid()}b"), strict=True))
    try:
        for name in names.values():
            run("ip", "netns", "add", name)
        run("ip", "link", "add", ends["store"], "type", "veth", "peer", "name", ends["source"])
        for role, name in names.items():
            run("ip", "link", "set", ends[role], "netns", name)
            inside = ("ip", "netns", "exec", name)
            run(*inside, "ip", "addr", "add", f"{ADDRESSES[role]}/24", "dev", ends[role])
            run(*inside, "ip", "link", "set", ends[role], "up")
            run(*inside, "ip", "link", "set", "lo", "up")
            limit = ("tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms")
            run(*inside, "tc", "qdisc", "add", "dev", ends[role], "root", *limit)
        yield {role: ["ip", "netns", "exec", name] for role, name in names.items()}
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def measure(transport: str, mbit: int, megabytes: int, rate: float = 0.0) -> dict[str, float]:
    """``mbit``: of the line; 0: loopback."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        key = Path(directory, "key")
        key.touch(0o600)
        key.write_text(keys.generate())
        before = stack.enter_context(line(mbit)) if mbit else {role: [] for role in ADDRESSES}
        hosts = ADDRESSES if mbit else dict.fromkeys(ADDRESSES, "127.0.0.1")

        def start(role: str, *arguments: object) -> subprocess.Popen[str]:
            command = [*before[role], sys.executable, __file__, "--role", role, directory, transport, hosts[role]]
            process = subprocess.Popen(
                [*command, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        keeper = start("store")
        assert keeper.stdin is not None and keeper.stdout is not None
        endpoint = keeper.stdout.readline().strip()
        if transport == "shm":
            endpoint = f"ipc://{directory}/store"
        sending = start("source", endpoint, megabytes, rate)
        assert sending.stdout is not None
        elapsed, used, median, p99 = map(float, sending.stdout.readline().split())
        print("", file=keeper.stdin, flush=True)
        stored = float(keeper.stdout.readline())
    return {
        "MB/s": megabytes / elapsed,
        "source": used / megabytes * 1e3,
        "store": stored / megabytes * 1e3,
        "median": median,
        "p99": p99,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp"], choices=["shm", "tcp", "mooncake"])
    parser.add_argument("--rates", nargs="+", type=int, default=[0], help="of the line, Mbit/s; 0: loopback")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.role:
        role, directory, transport, host, *rest = args.role
        if role == "store":
            store(directory, transport, host)
        source(directory, transport, host, rest[0], int(rest[1]), float(rest[2]))
    repeats = 1 if args.quick else args.repeats
    points = [(name, mbit) for mbit in args.rates for name in args.transports if name != "shm" or not mbit]
    # So that an end by SIGTERM leaves no process and no namespace.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(f"load {os.getloadavg()[0]:.1f}, {repeats} runs each; median (least - most)\n")
    print("| transport | line, Mbit/s | MB/s | CPU of source, ms a MB | of store | lag at half load, ms | p99 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for transport, mbit in points:
        megabytes = min(300, mbit) if mbit else 300
        megabytes = megabytes // 10 if args.quick else megabytes
        full = [measure(transport, mbit, megabytes) for _ in range(repeats)]
        speed = sorted(one["MB/s"] for one in full)[repeats // 2]
        half = [measure(transport, mbit, megabytes, LOAD * speed * 1e6) for _ in range(repeats)]
        columns = [[one[name] for one in full] for name in ("MB/s", "source", "store")]
        columns += [[one[name] for one in half] for name in ("median", "p99")]
        print(f"| {transport} | {mbit or 'loopback'} | " + " | ".join(map(spread, columns)) + " |", flush=True)


def spread(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.3g} ({ordered[0]:.3g} - {ordered[-1]:.3g})"


if __name__ == "__main__":
    main()
