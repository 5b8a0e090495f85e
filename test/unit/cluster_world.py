"""Real sockets over loopback for the tests of the cluster's protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import zmq

from sglang_kevlar.cluster import keys
from sglang_kevlar.cluster.dialler import Dialler
from sglang_kevlar.cluster.listener import Listener
from sglang_kevlar.control.frontend_end import Sessions
from sglang_kevlar.control.group_end import GroupEnd
from sglang_kevlar.control.session import Event
from sglang_kevlar.protocol.cluster import Configuration, GroupState, Identity

LEASE = 3.0
#: seconds in which what must happen happens, on a machine that is busy
PATIENCE = 20.0
SAME = Configuration(
    version="0.1.0", upstream="0.5.21", model="llama", model_digest="abc", tp=1, pp=1, dtype="float32",
    kv_cache_dtype="auto", page_size=1, context_length=2048, other={"random_seed": "7"},
)  # fmt: skip
READY = GroupState(epoch=1, phase="ready", init_info={"max_total_num_tokens": 1000})

_E = TypeVar("_E")


def made_key() -> keys.ClusterKey:
    secret = keys.generate().encode()
    return keys.ClusterKey(secret, zmq.curve_public(secret))


class Heard:
    """What an end says of its sessions."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[_E]) -> list[_E]:
        return [event for event in self.events if isinstance(event, kind)]


def sessions(lease: float = LEASE) -> Sessions:
    return Sessions("frontend", SAME, lease)


@contextmanager
def listening(key: keys.ClusterKey | None, lease: float = LEASE) -> Iterator[tuple[Listener, Heard]]:
    heard = Heard()
    listener = Listener("127.0.0.1:0", key, sessions(lease), heard)
    try:
        yield listener, heard
    finally:
        listener.close("the test is over", None)


@contextmanager
def dialling(
    address: str, key: keys.ClusterKey | None, name: str = "group", *, instance: str = "", **changes: Any
) -> Iterator[tuple[Dialler, Heard]]:
    """``changes``: of the configuration."""
    heard = Heard()
    configuration = SAME.__class__(**{field: getattr(SAME, field) for field in SAME.__struct_fields__} | changes)
    identity = Identity(name=name, host="host", instance=instance or f"i-{name}")
    dialler = Dialler(address, key, GroupEnd(identity, configuration, READY, time.monotonic()), heard)
    try:
        yield dialler, heard
    finally:
        dialler.close("the test is over")


def turn(*ends: Listener | Dialler, until: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Let the ends work by turns, without an event loop."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not happen"
        for each in ends:
            each.poll(0.005)


async def eventually(until: Callable[[], object], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not until():
            await asyncio.sleep(0.005)
