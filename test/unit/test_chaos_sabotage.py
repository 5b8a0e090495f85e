"""Orders to a rank: what is one is obeyed, what is none changes nothing, and harmed frames are found out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from shadow_line import World, make_world
from shadow_world import eventually, sequence

from sglang_kevlar.chaos.orders import Disobeyed, ask
from sglang_kevlar.protocol.chaos import HARMS, HarmFrames, Raise, Report, Sleep
from sglang_kevlar.worker.sabotage import OrderTaker, Sabotage, obedient


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/chaos0"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from make_world("shm", tmp_path, monkeypatch)


class Loop:
    """Stands in for a scheduler."""

    def ingest_requests(self) -> list[Any]:
        return ["a request"]


def test_the_loop_raises_once_and_only_when_it_was_ordered_to(endpoint: str) -> None:
    orders = OrderTaker(endpoint)
    loop = obedient(Loop, orders)()  # type: ignore[type-var]
    assert loop.ingest_requests() == ["a request"]
    ask(endpoint, Raise())
    with pytest.raises(Sabotage):
        loop.ingest_requests()
    ask(endpoint, Sleep(seconds=0.01))
    assert loop.ingest_requests() == ["a request"]
    assert loop.ingest_requests() == ["a request"]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{not json",
        b"[]",
        b"{}",
        b'{"order": "burn"}',
        b'{"order": "error", "really": true}',
        b'{"order": "hang"}',
        b'{"order": "hang", "seconds": -1}',
        b'{"order": "frames", "count": 0, "harm": "any", "seed": 1}',
        b'{"order": "frames", "count": 1, "harm": "burn", "seed": 1}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_order_is_refused_and_changes_nothing(endpoint: str, message: bytes) -> None:
    orders = OrderTaker(endpoint)
    with zmq.Context.instance().socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send(message)
        assert socket.poll(5000)
        assert "not an order" in json.loads(socket.recv())["error"]
    obedient(Loop, orders)().ingest_requests()  # type: ignore[type-var]
    assert ask(endpoint, Report()).to_harm == 0


def test_nobody_there(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_kevlar.chaos.orders.PATIENCE", 50)
    with pytest.raises(Disobeyed, match="no answer"):
        ask(endpoint, Raise())


@pytest.mark.parametrize("harm", [*HARMS, "any"])
def test_harmed_frames_never_become_kv(world: World, endpoint: str, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of harm happens as often as it was ordered, and all KV arrives in the end as it was sent."""
    monkeypatch.setattr("sglang_kevlar.shadow.sender.SILENCE", 0.3)  # a frame that was dropped is missed by nobody else
    orders = OrderTaker(endpoint)
    store = world.store()
    source = world.source(line=orders.frames).to(store).linked()
    source.send(sequence(1, 4))
    ask(endpoint, HarmFrames(count=3, harm=harm, seed=5))
    keys = [sequence(name, 4) for name in range(2, 8)]

    def all_harmed_and_sent() -> bool:
        sent = [source.offer(one) for one in keys]
        return all(sent) and source.sender.waiting_tokens == 0 and ask(endpoint, Report()).to_harm == 0

    name = 8
    while not _within(2.0, all_harmed_and_sent):
        keys.append(sequence(name, 4))  # something has to be sent for harm to be done
        name += 1
        assert name < 20, ask(endpoint, Report())
    eventually(lambda: all(source.offer(one) for one in keys) and source.sender.waiting_tokens == 0)
    assert sum(ask(endpoint, Report()).harmed.values()) == 3
    assert all(store.has(one) == 4 for one in keys)


def _within(seconds: float, condition: Any) -> bool:
    try:
        return bool(eventually(condition, seconds))
    except AssertionError:
        return False
