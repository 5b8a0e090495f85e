"""Windows from one process to another: what arrives, and what becomes of those whose other end is gone."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from sglang_kevlar import transport
from sglang_kevlar.launcher import prepare
from sglang_kevlar.protocol.launch import KevlarArgs, Paths, window_name
from sglang_kevlar.transport import Transport, TransportError, mooncake

SIZE = 1 << 20
NUMBERS = itertools.count()

#: the target: takes what is offered, line by line, and says what it has in the window
TARGET = """
import sys, zlib
from sglang_kevlar import transport
taken = transport.choose(sys.argv[1], "127.0.0.1")
for line in sys.stdin:
    word, *rest = line.split()
    if word == "take":
        window = taken.take(rest[0], int(rest[1]))
        print(window.descriptor, flush=True)
    elif word == "close":
        window.close()
    else:
        offset, size = map(int, rest)
        print(zlib.crc32(window.bytes[offset : offset + size].data), flush=True)
"""


class Target:
    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", TARGET, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid

    def ask(self, *words: object) -> str:
        self.tell(*words)
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, *words: object) -> None:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)

    def take(self, source: Transport, size: int = SIZE) -> transport.Outgoing:
        """A window from ``source`` to here."""
        outgoing = source.offer(window_name("0" * 8, 0, os.getpid(), 0, next(NUMBERS)), size)
        outgoing.accepted(self.ask("take", outgoing.descriptor, size))
        return outgoing

    def checksum(self, offset: int, size: int) -> int:
        return int(self.ask("checksum", offset, size))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@cache
def source_of(name: str) -> Transport:
    return transport.choose(name, "127.0.0.1")


def skip_without(name: str) -> None:
    try:
        transport.require(name)
    except TransportError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["shm", "mooncake"])
def name(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return request.param


@pytest.fixture
def target(name: str) -> Iterator[Target]:
    target = Target(name)
    yield target
    target.kill()


@pytest.fixture
def engine() -> mooncake.Mooncake:
    skip_without("mooncake")
    source = source_of("mooncake")
    assert isinstance(source, mooncake.Mooncake)
    return source


def test_what_is_pushed_arrives_where_it_was(name: str, target: Target) -> None:
    window = target.take(source_of(name))
    dice = np.random.default_rng(1)
    for _ in range(100):
        first, last = sorted(int(end) for end in dice.integers(0, SIZE + 1, 2))
        if first == last:
            continue
        window.bytes[first:last] = dice.integers(0, 256, last - first, dtype=np.uint8)
        window.push(first, last - first)
        assert target.checksum(first, last - first) == zlib.crc32(window.bytes[first:last].data)
    assert target.checksum(0, SIZE) == zlib.crc32(window.bytes.data)
    window.close()


def test_windows_follow_each_other(name: str, target: Target) -> None:
    for number in range(20):
        window = target.take(source_of(name), SIZE if number % 3 else 2 * SIZE)
        window.bytes[:] = number
        window.push(0, len(window.bytes))
        assert target.checksum(0, SIZE) == zlib.crc32(bytes([number]) * SIZE)
        target.tell("close")
        window.close()


@pytest.mark.parametrize("name", ["mooncake"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_push_to_who_is_not_there_any_more_fails_soon(name: str, target: Target, number: int) -> None:
    size = 32 * SIZE  # more than sockets hold
    window = target.take(source_of(name), size)
    os.kill(target.pid, number)
    started = time.monotonic()
    with pytest.raises(TransportError, match="failed"):
        window.push(0, size)
    assert time.monotonic() - started < 2 * mooncake.STALL
    # Others can be written to as before.
    other = Target(name)
    again = other.take(source_of(name), size)
    again.push(0, size)
    assert other.checksum(0, size) == zlib.crc32(again.bytes.data)
    other.kill()
    window.close()
    again.close()


@pytest.mark.parametrize("name", ["mooncake"], indirect=True)
def test_a_write_that_does_not_end_is_given_up(name: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    window = target.take(source_of(name), 32 * SIZE)
    os.kill(target.pid, signal.SIGSTOP)
    monkeypatch.setattr(mooncake, "TIMEOUT", 0.2)
    started = time.monotonic()
    with pytest.raises(TransportError, match="does not end"):
        window.push(0, 32 * SIZE)
    assert time.monotonic() - started < 2
    window.close()


@pytest.mark.parametrize("name", ["mooncake"], indirect=True)
def test_a_process_under_the_name_of_another_is_reached_with_the_next_window(name: str, target: Target) -> None:
    source = transport.choose(name, "127.0.0.1")
    window = target.take(source)
    window.push(0, SIZE)
    target.tell("close")
    where, address, _ = target.ask("take", window.descriptor, SIZE).split()
    with pytest.raises(TransportError, match="another process"):
        window.accepted(f"{where} {address} {secrets.token_hex(8)}")
    window.close()
    after = target.take(source)
    assert after._engine is not window._engine  # type: ignore[attr-defined]
    after.bytes[:] = 3
    after.push(0, SIZE)
    assert target.checksum(0, SIZE) == zlib.crc32(bytes([3]) * SIZE)


@pytest.mark.parametrize("descriptor", ["", "x", "a x c", "127.0.0.1:1 0x12", "a 1 b c d", "\0" * 1000])
def test_a_target_that_describes_nothing_is_not_written_to(engine: mooncake.Mooncake, descriptor: str) -> None:
    window = engine.offer("", SIZE)
    with pytest.raises(TransportError, match="no window of Mooncake"):
        window.accepted(descriptor)
    window.close()


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no.such.host.invalid:17", "nonsense"])
def test_a_target_that_nobody_knows_is_not_reached(engine: mooncake.Mooncake, host: str) -> None:
    window = engine.offer("", SIZE)
    with pytest.raises(TransportError, match="does not reach"):
        window.accepted(f"{host} 100000 {secrets.token_hex(8)}")
    window.close()


def test_windows_are_used_again_and_bounded(engine: mooncake.Mooncake, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * SIZE
    taken = [engine.take("mooncake", size) for _ in range(3)]
    outgoing = engine.offer("", size)
    descriptors = {window.descriptor for window in taken}
    assert len(descriptors) == 3
    for window in taken:
        window.close()
    monkeypatch.setattr(mooncake, "MAX_WINDOWS", sum(map(len, engine._engine.incoming._buffers)))
    again = [engine.take("mooncake", size) for _ in range(3)]
    assert {window.descriptor for window in again} == descriptors
    # What the source packs is never where a target's late writes could land.
    assert outgoing.bytes.ctypes.data not in [window.bytes.ctypes.data for window in again]
    for bad in (size, 0, -1, 2**62):
        with pytest.raises(TransportError, match="no window of"):
            engine.take("mooncake", bad)
    for window in (*again, outgoing):
        window.close()


@pytest.mark.parametrize(
    ("cause", "source"),
    [
        ("No module named 'mooncake'", None),
        ("libibverbs.so.1: cannot open", "raise ImportError('libibverbs.so.1: cannot open shared object file')"),
    ],
)
def test_without_the_package_or_its_libraries_a_launch_says_so(
    tmp_path, monkeypatch: pytest.MonkeyPatch, cause: str, source: str | None
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "mooncake"]:
        monkeypatch.delitem(sys.modules, module)
    if source is None:
        monkeypatch.setitem(sys.modules, "mooncake", None)
        cause = "import of mooncake halted"
    else:
        (tmp_path / "mooncake").mkdir()
        (tmp_path / "mooncake" / "__init__.py").touch()
        (tmp_path / "mooncake" / "engine.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(prepare.LaunchRefused) as refused:
        prepare.prepare(Paths(str(tmp_path)), "0" * 8, KevlarArgs(shadow_transport="mooncake"), [])
    message = str(refused.value)
    assert message.startswith("--shadow-transport mooncake: ") and cause in message
    assert "pip install 'sglang-kevlar[mooncake]'" in message and "apt-get install libibverbs1" in message
    monkeypatch.undo()
