"""A source and a store of shadows, with their real threads, sockets and window, and who does harm in between."""

from __future__ import annotations

import threading
import time
import zlib
from array import array
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
import zmq

from sglang_kevlar.platform import torchvision_shim
from sglang_kevlar.shadow.sockets import Network, dial, frame, listen, unframe

torchvision_shim.install()

from sglang_kevlar.control.shadow_keys import KeyChain, root_key  # noqa: E402
from sglang_kevlar.protocol.launch import window_name  # noqa: E402
from sglang_kevlar.protocol.shadow import (  # noqa: E402
    SHADOW_VERSION,
    Accept,
    FromStore,
    Hello,
    Layout,
    Parcel,
    ShadowCounters,
    ToStore,
)
from sglang_kevlar.shadow.pool import Staged  # noqa: E402
from sglang_kevlar.shadow.sender import Piece, ShadowSender, Target  # noqa: E402
from sglang_kevlar.shadow.server import Port, ShadowServer  # noqa: E402
from sglang_kevlar.shadow.store import ShadowStore  # noqa: E402
from sglang_kevlar.transport import Transport, digest  # noqa: E402

if TYPE_CHECKING:
    from sglang_kevlar.shadow.rank import Line

TOKENS = 4
ORIGIN = ("adapter", "salt")
LAYOUT = Layout(
    version=SHADOW_VERSION,
    upstream="0",
    model="m",
    shard="tp0/1 pp0/1",
    kv_dtype="float32",
    page_size=1,
    block_tokens=TOKENS,
    rows=[8, 4, 4],
)


def eventually(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)
    return value


def content(key: bytes) -> np.ndarray:
    """The bytes of a block, as the store has them: those of one buffer behind those of the other."""
    return np.random.default_rng(zlib.crc32(key)).integers(0, 256, LAYOUT.block_bytes, dtype=np.uint8)


def rows_of(keys: list[bytes]) -> list[np.ndarray]:
    """The same bytes as they come from the pool: an array of (tokens, row) for each buffer."""
    rows = []
    column = 0
    for row in LAYOUT.rows:
        width = row * TOKENS
        rows.append(np.concatenate([content(key)[column : column + width].reshape(TOKENS, row) for key in keys]))
        column += width
    return rows


#: by key: the tokens of the block
TOKENS_OF: dict[bytes, bytes] = {}


def tokens_of(keys: list[bytes]) -> bytes:
    return b"".join(TOKENS_OF[key] for key in keys)


def sequence(name: int, blocks: int, shared: int = 0) -> list[bytes]:
    """Keys of a sequence; the first ``shared`` blocks are those of every other."""
    tokens = array("q", [0] * shared * TOKENS + [name] * (blocks - shared) * TOKENS)
    chain = KeyChain(root_key("weights", None, None), TOKENS)
    chain.grow(tokens)
    for position, key in enumerate(chain.keys):
        TOKENS_OF[key] = tokens[position * TOKENS : (position + 1) * TOKENS].tobytes()
    return chain.keys


class Source:
    """A sender, and what the scheduler does with it."""

    def __init__(
        self,
        directory: Any,
        launch: str,
        transport: Transport,
        group: int = 0,
        epoch: int = 1,
        bandwidth: float = 0.0,
        line: Line | None = None,
        network: Network | None = None,
    ) -> None:
        """``line``: instead of the plain one."""
        self.counters = ShadowCounters()
        self.counters_file = str(directory / f"g{group}e{epoch}.shadow")
        self.windows = 0
        self.group, self.epoch = group, epoch
        self._launch = launch
        self._transport = transport if line is None else line.transport(transport)
        network = Network(None) if network is None else network
        self.sender = ShadowSender(
            launch,
            str(group),
            epoch,
            LAYOUT,
            bandwidth,
            network.dial if line is None else partial(line.dial, network),
            self._window,
            self.counters,
            self.counters_file,
        )
        #: the longest that the scheduler was held up, in CPU time: others use this machine too
        self.slowest = 0.0
        self.most_staged = 0
        self.sender.start()

    def _window(self) -> str:
        self.windows += 1
        return window_name(self._launch, self.group, self.epoch, 0, self.windows)

    def to(self, store: Store | Proxy | None, epoch: int = 1, endpoint: str = "") -> Source:
        """``endpoint``: another way to the store."""
        target = None if store is None else Target("9", epoch, endpoint or store.endpoint, self._transport)
        self.sender.retarget(target)
        return self

    def linked(self) -> Source:
        eventually(lambda: self.sender.link is not None)
        return self

    def offer(self, keys: list[bytes], request: bytes | None = None) -> bool:
        """Send what is missing of ``keys``, as far as there is room. True when nothing was missing."""
        started = time.thread_time()
        link = self.sender.link
        if link is None:
            return False
        first = link.missing(keys, 0)
        last = min(len(keys), first + self.sender.room())
        if first < last:
            rows = np.concatenate([part.reshape(-1) for part in rows_of(keys[first:last])])
            staged = Staged(torch.from_numpy(rows), LAYOUT.rows)
            piece_blocks = self.sender.piece_blocks
            for start in range(first, last, piece_blocks):
                end = min(last, start + piece_blocks)
                parent = keys[start - 1] if start else None
                piece = Piece(
                    keys=keys[start:end],
                    parent=parent,
                    staged=staged,
                    first=(start - first) * TOKENS,
                    tokens=tokens_of(keys[start:end]),
                    origin=ORIGIN,
                    request=request,
                )
                self.sender.queue(piece, link)
            self.sender.wake()
        self.most_staged = max(self.most_staged, self.sender._staged)
        self.slowest = max(self.slowest, time.thread_time() - started)
        return first == len(keys)

    def send(self, keys: list[bytes], request: bytes | None = None, seconds: float = 5.0) -> Source:
        """Until all of it is there, as the target says."""
        eventually(lambda: self.offer(keys, request) and self.sender.waiting_tokens == 0, seconds)
        return self


class Store:
    def __init__(
        self,
        directory: Any,
        transport: Transport,
        name: str = "store",
        capacity: int = 64,
        start: bool = True,
        readers: int = 1,
        network: Network | None = None,
    ) -> None:
        """``network``: also over TCP, and reached there; ``file`` is where ranks of its launch do."""
        self.counters = ShadowCounters()
        self.file = self.endpoint = f"ipc://{directory}/{name}"
        ports = [Port(listen(self.file), [transport])]
        if network is not None:
            socket, self.endpoint = network.listen("127.0.0.1", 1 << 20)
            ports.append(Port(socket, [transport], local=False))
        self.store = ShadowStore(capacity, LAYOUT.block_bytes, readers)
        self.server = ShadowServer(ports, LAYOUT, self.store, self.counters)
        self._started = False
        if start:
            self.start()

    def start(self) -> None:
        self._started = True
        self.server.start()

    def stop(self) -> None:
        if self._started:
            self._started = False
            self.server.stop()

    def has(self, keys: list[bytes]) -> int:
        """How many blocks a lookup finds; all of them have the right bytes."""
        count = self.store.pin(keys, "has")
        if count:
            found = self.store.read("has", 0, count)
            assert all(np.array_equal(block, content(key)) for block, key in zip(found, keys, strict=False))
            self.store.release("has")
        self.store.check()
        return count

    def live(self, key: bytes) -> int:
        with self.store._lock:
            return self.store._index.get(key).live


class Peer:
    """Somebody who speaks the protocol by hand."""

    def __init__(
        self,
        store: Store,
        launch: str,
        transport: Transport,
        group: int = 0,
        epoch: int = 1,
        size: int = 4096,
        network: Network | None = None,
    ) -> None:
        self._socket = dial(store.file) if network is None else network.dial(store.endpoint)
        self._transport = transport
        self.session = window_name(launch, group, epoch, 0, time.monotonic_ns())
        self.window = transport.offer(self.session, size)
        self._accepted = False
        #: by parcel: what goes along with it
        self._along: dict[int, bytes] = {}
        self.hello = Hello(
            session=self.session,
            launch=launch,
            group=str(group),
            epoch=epoch,
            layout=LAYOUT,
            transport=transport.name,
            window=self.window.descriptor,
            window_bytes=size,
        )

    def say(self, message: ToStore) -> None:
        along = self._along.pop(message.sequence, None) if isinstance(message, Parcel) else None
        self.raw(frame(message), *([] if along is None else [along]))

    def raw(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def hears(self, seconds: float = 3.0) -> FromStore | None:
        if not self._socket.poll(seconds * 1000):
            return None
        message = unframe(self._socket.recv(), msgspec.msgpack.Decoder(FromStore))
        if isinstance(message, Accept):
            self.window.accepted(message.window)
            self._accepted = True
        return message

    def ask(self, message: ToStore) -> FromStore:
        self.say(message)
        answer = self.hears()
        assert answer is not None
        return answer

    def parcel(self, keys: list[bytes], number: int, offset: int = 0, **changes: Any) -> Parcel:
        """A good one, with its bytes in the window, but for ``changes``."""
        for position, key in enumerate(keys):
            start = offset + position * LAYOUT.block_bytes
            self.window.bytes[start : start + LAYOUT.block_bytes] = content(key)
        if self._accepted and (along := self.window.push(offset, len(keys) * LAYOUT.block_bytes)) is not None:
            self._along[number] = bytes(along)
        crcs = [zlib.crc32(content(key).data) for key in keys]
        parcel = Parcel(
            session=self.session,
            sequence=number,
            offset=offset,
            parent=None,
            keys=keys,
            crcs=crcs,
            tokens=tokens_of(keys),
            origin=ORIGIN,
            digests=[] if self._transport.authentic else [digest(content(key).data) for key in keys],
        )
        return msgspec.structs.replace(parcel, **changes)

    def close(self) -> None:
        self._socket.close()
        self.window.close()


class Proxy:
    """Stands between sources and a store, and passes on what ``harm`` makes of each message to the store."""

    def __init__(self, directory: Any, store: Store) -> None:
        self.endpoint = f"ipc://{directory}/proxy"
        self._behind = store.file
        #: message, and as it came; returns what is passed on
        self.harm: Callable[[Any, bytes], list[bytes]] = lambda message, data: [data]
        #: what came along with a parcel; returns what goes along with it
        self.harm_along: Callable[[bytes], list[bytes]] = lambda along: [along]
        self.seen: list[Any] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def once(self, kind: type, harm: Callable[[Any, bytes], list[bytes]], after: int = 0) -> threading.Event:
        """Do harm to one message of a kind, when ``after`` others of it have passed. The event: it was done."""
        done = threading.Event()
        passed = 0

        def choose(message: Any, data: bytes) -> list[bytes]:
            nonlocal passed
            if done.is_set() or not isinstance(message, kind):
                return [data]
            passed += 1
            if passed <= after:
                return [data]
            done.set()
            return harm(message, data)

        self.harm = choose
        return done

    def _run(self) -> None:
        context = zmq.Context.instance()
        front = context.socket(zmq.ROUTER)
        front.bind(self.endpoint)
        behind: dict[bytes, zmq.Socket] = {}
        poller = zmq.Poller()
        poller.register(front, zmq.POLLIN)
        while not self._stopping:
            for socket, _ in poller.poll(20):
                if socket is not front:
                    name = next(name for name, other in behind.items() if other is socket)
                    front.send_multipart([name, socket.recv()])
                    continue
                name, data, *along = front.recv_multipart()
                if name not in behind:
                    behind[name] = dial(self._behind)
                    poller.register(behind[name], zmq.POLLIN)
                message = unframe(data, msgspec.msgpack.Decoder(ToStore))
                self.seen.append(message)
                for part in self.harm(message, data):
                    behind[name].send_multipart([part, *(self.harm_along(along[0]) if along else [])])
        for socket in [front, *behind.values()]:
            socket.close(linger=0)

    def stop(self) -> None:
        self._stopping = True
        self._thread.join()
