"""A line from sources to stores, over each transport: what its tests are made of."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from shadow_world import LAYOUT, Peer, Proxy, Source, Store

from sglang_kevlar.shadow import sender as sender_module
from sglang_kevlar.shadow import server as server_module
from sglang_kevlar.transport import Transport, TransportError, choose, require
from sglang_kevlar.transport import shared_memory as shm_module

TRANSPORTS = ("shm", "tcp", "mooncake")
WINDOW = 8 * LAYOUT.block_bytes


#: engines of Mooncake last as long as the process does
SPARE: list[Transport] = []


class World:
    """Makes what a test needs, and ends it."""

    def __init__(self, directory, transport: str) -> None:
        self.directory = directory
        self.transport_name = transport
        self._transports: list[Transport] = []
        self.launch = secrets.token_hex(4)
        self._made: list = []

    def transport(self) -> Transport:
        """One as of a process of its own."""
        spare = SPARE.pop() if SPARE and self.transport_name == "mooncake" else choose(self.transport_name, "127.0.0.1")
        self._transports.append(spare)
        return spare

    def store(self, *args, **kwargs) -> Store:
        self._made.append(store := Store(self.directory, self.transport(), *args, **kwargs))
        return store

    def source(self, *args, **kwargs) -> Source:
        source = Source(self.directory, self.launch, self.transport(), *args, **kwargs)
        self._made.append(source.sender)
        return source

    def proxy(self, store: Store) -> Proxy:
        self._made.append(proxy := Proxy(self.directory, store))
        return proxy

    def peer(self, *args, **kwargs) -> Peer:
        peer = Peer(args[0], self.launch, self.transport(), *args[1:], **kwargs)
        self._made.append(peer)
        return peer

    def windows(self) -> list[str]:
        return [name for name in os.listdir(shm_module.DIRECTORY) if self.launch in name]

    def end(self) -> None:
        while self._made:
            made = self._made.pop()
            made.close() if isinstance(made, Peer) else made.stop()
        assert self.windows() == []
        if self.transport_name == "mooncake":
            SPARE.extend(self._transports)


def make_world(transport: str, directory: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The body of a fixture."""
    try:
        require(transport)
    except TransportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(sender_module, "WINDOW_BYTES", WINDOW)
    monkeypatch.setattr(server_module, "STOP_POLL", 20)
    monkeypatch.setattr(sender_module, "TICK", 20)
    monkeypatch.setattr(sender_module, "PAUSE", 0.0)
    monkeypatch.setattr(sender_module, "COUNTERS_INTERVAL", 0.02)
    world = World(directory, transport)
    yield world
    world.end()
