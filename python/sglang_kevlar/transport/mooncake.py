"""Windows between processes anywhere: Mooncake Transfer Engine writes what the source has into the target's memory.

Over RDMA or NVLink where it finds them, otherwise over TCP. Facts about it (0.3.13) that shaped this:

* A write that has begun goes on after the target has unregistered the memory, and over whatever lies there by then. So
  a window is registered once and never given back to the process, only to the next session; what a late write does to
  that one, its checksums tell. Memory that a source packs is never used as a window, and the other way round.
* It remembers for good what it once learnt of a name, which is a host and a port. A process that comes back under the
  name of another cannot be written to; a new engine can.
* It waits a minute, whatever is set, for the first answer of a process that it can connect to.
* Its synchronous calls wait by spinning. Those of the engine's beginning and end hold the interpreter's lock, the end
  for up to seconds: so there is one for the life of a process.
"""

from __future__ import annotations

import mmap
import os
import secrets
import time
from typing import Any

import numpy as np

from sglang_kevlar.transport import TransportError, nothing_along

#: seconds without progress after which a write has failed
STALL = 5
#: seconds after which it is given up whatever it does
TIMEOUT = 15.0
#: bytes of all windows of a process together: what a source asks for is bounded
MAX_WINDOWS = 4 << 30
#: bytes a second at which a write is first looked after
_GUESS = 4e9
#: seconds between two looks at a write, least and most; between them, a tenth of what it has taken so far
_LOOK = (5e-5, 5e-3)

_ENVIRONMENT = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": str(STALL),
    "MC_TCP_STATUS_TIMEOUT_SEC": str(STALL),
    "MC_SLICE_TIMEOUT": str(STALL),
}
#: what `transfer_submit_write` returns instead of a number to ask about
_NOT_SUBMITTED = (0, -1, 2**64 - 1)


def load() -> Any:
    """Its Python module. Raises TransportError with what is missing."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mooncake import engine
    except ImportError as error:
        raise TransportError(
            f"Mooncake Transfer Engine cannot be imported: {error}. Install the package (pip install "
            "'sglang-kevlar[mooncake]', with CUDA 'sglang-kevlar[mooncake-cuda]') and the libraries that it needs "
            "(Debian: apt-get install libibverbs1 librdmacm1 libnuma1)"
        ) from None
    return engine


class Mooncake:
    name = "mooncake"
    #: whoever reaches its ports can write
    authentic = False
    push_bytes = 8 << 20

    def __init__(self, host: str) -> None:
        self._host = host
        self._engine = self._sending = _Engine(host)
        #: of this process, whatever its name was before
        self._identity = secrets.token_hex(8)
        #: kept: the end of an engine takes seconds and frees memory that a late write may still go to
        self._replaced: list[_Engine] = []
        #: by name: the process that had it when we first wrote there
        self._known: dict[str, str] = {}

    def offer(self, name: str, size: int) -> OutgoingWindow:
        return OutgoingWindow(self, self._sending, self._sending.outgoing.take(size))

    def take(self, descriptor: str, size: int) -> IncomingWindow:
        if descriptor != OutgoingWindow.descriptor:
            raise TransportError("the source does not use Mooncake")
        return IncomingWindow(self._engine, self._identity, self._engine.incoming.take(size))

    def check_name(self, name: str, identity: str) -> None:
        """Raises TransportError for a name that was another's; the next window can be used with it."""
        if self._known.setdefault(name, identity) != identity:
            self._known = {}
            self._replaced.append(self._sending)
            self._sending = _Engine(self._host)
            raise TransportError(f"{name} was another process before: Mooncake needs a new engine for it")


class _Engine:
    def __init__(self, host: str) -> None:
        self.calls = load().TransferEngine()
        # It finds out by itself what there is besides TCP.
        if self.calls.initialize(host, "P2PHANDSHAKE", "rdma", "") != 0:
            raise TransportError("Mooncake Transfer Engine does not start; its message is above")
        self.name = f"{host}:{self.calls.get_rpc_port()}"
        self.outgoing = _Memory(self)
        self.incoming = _Memory(self)


class _Memory:
    """Buffers of an engine in one role, registered when they are first needed, and kept."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        #: all of them: none goes away because its window was not closed
        self._buffers: list[np.ndarray] = []
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """uint8 (size,). Raises TransportError."""
        for position, buffer in enumerate(self._free):
            if len(buffer) == size:
                return self._free.pop(position)
        total = sum(map(len, self._buffers))
        if not 0 < size <= MAX_WINDOWS - total:
            raise TransportError(f"no window of {size} bytes: {total} of {MAX_WINDOWS} are taken")
        try:
            buffer = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
        except OSError as error:
            raise TransportError(f"no window of {size} bytes: {error}") from None
        # The call for a single one would hold the interpreter's lock.
        if self._engine.calls.batch_register_memory([buffer.ctypes.data], [size]) != 0:
            raise TransportError(f"Mooncake cannot register {size} bytes of memory; its message is above")
        self._buffers.append(buffer)
        return buffer

    def give_back(self, buffer: np.ndarray) -> None:
        self._free.append(buffer)


class OutgoingWindow:
    descriptor = "mooncake"

    def __init__(self, transport: Mooncake, engine: _Engine, buffer: np.ndarray) -> None:
        self.bytes = buffer
        self._transport = transport
        self._engine = engine
        self._target = ""
        self._address = 0

    def accepted(self, descriptor: str) -> None:
        try:
            self._target, address, identity = descriptor.split()
            self._address = int(address, 16)
        except ValueError:
            raise TransportError(f"{descriptor[:100]!r} is no window of Mooncake's") from None
        self._transport.check_name(self._target, identity)
        # The first contact waits for up to a minute for a target that has stopped. This one has just answered. And
        # where nothing arrives, nothing is packed.
        self.push(0, 1)

    def push(self, offset: int, size: int) -> None:
        calls = self._engine.calls
        started = time.monotonic()
        source = self.bytes.ctypes.data + offset
        number = calls.transfer_submit_write(self._target, source, self._address + offset, size)
        if number in _NOT_SUBMITTED:
            raise TransportError(f"Mooncake does not reach {self._target}")
        pause = size / _GUESS
        while (status := calls.transfer_check_status(number)) == 0:
            time.sleep(pause)
            taken = time.monotonic() - started
            if taken > TIMEOUT:
                raise TransportError(f"Mooncake's write to {self._target} does not end")
            pause = min(max(taken / 10, _LOOK[0]), _LOOK[1])
        if status != 1:
            raise TransportError(f"Mooncake's write to {self._target} failed")

    def close(self) -> None:
        self._engine.outgoing.give_back(self.bytes)
        del self.bytes


class IncomingWindow:
    def __init__(self, engine: _Engine, identity: str, buffer: np.ndarray) -> None:
        self.bytes = buffer
        self.descriptor = f"{engine.name} {buffer.ctypes.data:x} {identity}"
        self._engine = engine

    def read(self, offset: int, size: int, along: bytes | None) -> np.ndarray:
        nothing_along(along)
        return self.bytes[offset : offset + size]

    def close(self) -> None:
        self._engine.incoming.give_back(self.bytes)
        del self.bytes
