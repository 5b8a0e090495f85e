"""Frontends with nothing but their sessions with each other, over loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from cluster_world import SAME, eventually

from sglang_kevlar.cluster.keys import ClusterKey
from sglang_kevlar.cluster.listener import Listener
from sglang_kevlar.control.frontend_end import Sessions
from sglang_kevlar.control.session import Event
from sglang_kevlar.frontend.peers.links import LinkHandler, PeerLinks
from sglang_kevlar.protocol.cluster import Configuration, Identity
from sglang_kevlar.protocol.records import PeerMessage

LEASE = 3.0


class Handler:
    """links.LinkHandler that notes what it hears."""

    def __init__(self) -> None:
        self.peers: dict[str, Identity] = {}
        self.log: list[tuple[str, str]] = []
        self.messages: list[PeerMessage] = []
        self.on_message: Callable[[PeerMessage], None] = lambda _: None

    def joined(self, peer: Identity) -> None:
        assert peer.name not in self.peers
        self.peers[peer.name] = peer
        self.log.append(("joined", peer.name))

    def arrived(self, name: str, messages: list[PeerMessage]) -> None:
        assert name in self.peers
        for message in messages:
            self.on_message(message)
            self.messages.append(message)

    def left(self, name: str) -> None:
        del self.peers[name]
        self.log.append(("left", name))


class Frontend:
    """On the running event loop."""

    def __init__(
        self,
        name: str,
        key: ClusterKey | None,
        *,
        handler: LinkHandler | None = None,
        url: str = "http://nowhere",
        instance: str | None = None,
        configuration: Configuration = SAME,
        address: str = "127.0.0.1:0",
    ) -> None:
        self.identity = Identity(kind="frontend", name=name, host="h", instance=instance or f"{name}1", url=url)
        self.handler: Any = handler or Handler()
        self.key, self.configuration = key, configuration
        self.links: PeerLinks | None = None
        sessions = Sessions(name, configuration, LEASE, None, self.identity)
        self.listener = Listener(address, key, sessions, self._on_event)
        self.listener.start()

    @property
    def address(self) -> str:
        return self.listener.address.removeprefix("tcp://")

    def link(self, addresses: dict[str, str]) -> None:
        others = {name: at for name, at in addresses.items() if name != self.identity.name}
        self.links = PeerLinks(self.identity, others, self.configuration, self.key, self.listener, self.handler)
        self.links.start()

    def _on_event(self, event: Event) -> None:
        if self.links is not None and self.links.owns(event):
            self.links.on_session(event)

    def close(self) -> None:
        if self.links is not None:
            self.links.close()
        self.listener.close("the test is over", None)


def linked(*frontends: Frontend) -> None:
    addresses = {frontend.identity.name: frontend.address for frontend in frontends}
    for frontend in frontends:
        frontend.link(addresses)


async def until_joined(frontends: Iterable[Frontend]) -> None:
    frontends = list(frontends)
    await eventually(lambda: all(len(f.handler.peers) == len(frontends) - 1 for f in frontends))


def play(script: Callable[[list[Frontend]], Any], *frontends: Callable[[], Frontend]) -> None:
    """Runs ``script(frontends)``; it may add to them, and all are closed."""

    async def main() -> None:
        made: list[Frontend] = []
        try:
            made += [make() for make in frontends]
            async with asyncio.timeout(60):
                await script(made)
        finally:
            for frontend in made:
                frontend.close()

    asyncio.run(main())
