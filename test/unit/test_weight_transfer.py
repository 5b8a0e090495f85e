"""Weights from one rank to another, in two processes: exact, or refused with the cause."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

import torch  # noqa: E402
import zmq  # noqa: E402

from sglang_kevlar.cluster import keys  # noqa: E402
from sglang_kevlar.protocol.weights import Taken  # noqa: E402
from sglang_kevlar.shadow.sockets import Network  # noqa: E402
from sglang_kevlar.worker.weights import source as source_module  # noqa: E402
from sglang_kevlar.worker.weights.memory import NoPlainMemory, WeightMemory  # noqa: E402
from sglang_kevlar.worker.weights.sockets import TransferError, listen  # noqa: E402
from sglang_kevlar.worker.weights.source import WeightSource  # noqa: E402
from sglang_kevlar.worker.weights.target import WeightTarget  # noqa: E402


class Model(torch.nn.Module):
    """Tied, transposed, packed, in a list, of several types, and with a scale that is a number."""

    def __init__(self, seed: int, rows: int = 300, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.nn.Embedding(rows, 64)
        self.head = torch.nn.Linear(64, rows, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.copy_(torch.rand(rows, 64, generator=generator))
        self.register_buffer("table", torch.rand(5, generator=generator).to(torch.bfloat16), persistent=False)
        self.packed = torch.nn.Parameter(
            torch.randint(0, 255, (3, 7), dtype=torch.uint8, generator=generator), requires_grad=False
        )
        self.w_kc = torch.rand(2, 9, 4, generator=generator).transpose(1, 2)
        self.parts = [torch.rand(11, generator=generator), None]
        self.big = torch.nn.Parameter(torch.rand(3, 1 << 20, generator=generator), requires_grad=False)
        self.scale_float = scale


def values(model: Model) -> list[torch.Tensor]:
    return [model.embed.weight, model.head.weight, model.table, model.packed, model.w_kc, model.parts[0], model.big]


def serve(endpoint: str, seed: int, how: str, key: keys.ClusterKey | None, pipe: Any) -> None:
    model = Model(seed, rows=301 if how == "layout" else 300, scale=2.0 if how == "number" else 1.0)
    memory = WeightMemory({"target": model})
    read, count = memory.read, 0

    def faulty(piece: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2 and how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == 2 and how == "hang":
            time.sleep(60)
        if count == 2 and how == "stop":
            threading.Thread(target=source.stop, args=("its weights are just being changed", True)).start()
        if count == 2 and how == "corrupt":
            original = read(piece).copy()
            source._say = corrupting  # type: ignore[method-assign]
            return original
        return read(piece)

    memory.read = faulty  # type: ignore[method-assign]
    socket, where = listen(Network(key), endpoint)
    source = WeightSource(memory, socket, where, "ticket")
    say = source._say

    def corrupting(message: Any, data: Any = None) -> None:
        if data is not None:
            damaged = bytearray(data)
            damaged[100 % len(damaged)] ^= 1
            data = memoryview(damaged)
            source._say = say  # type: ignore[method-assign]
        say(message, data)

    source.start()
    pipe.send(where)
    source.join()
    time.sleep(60)  # a rank goes on, and the last message is on its way


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts a source, and gives its endpoint."""
    context = multiprocessing.get_context("fork")
    processes = []

    def begin(how: str = "", seed: int = 1, endpoint: str | None = None, key: keys.ClusterKey | None = None) -> str:
        ours, theirs = context.Pipe()
        where = endpoint or f"ipc://{tmp_path}/weights0"
        process = context.Process(target=serve, args=(where, seed, how, key, theirs), daemon=True)
        process.start()
        processes.append(process)
        assert ours.poll(30)
        return str(ours.recv())

    yield begin
    for process in processes:
        process.kill()
        process.join()


def fetch(endpoint: str, model: Model, ticket: str = "ticket", key: Any = None, timeout: float = 20.0) -> int:
    network = Network(key)
    try:
        return WeightTarget(WeightMemory({"target": model}), network, endpoint, ticket, timeout).fetch()
    finally:
        network.close()


def same(one: Model, other: Model) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


def test_all_of_them_arrive_in_the_memory_where_they_are_used(start: Any) -> None:
    model, wanted = Model(2), Model(1)
    before = [value.data_ptr() for value in values(model)]
    assert not same(model, wanted)
    # The tied tensor travels once.
    assert fetch(start(), model) == sum(v.nbytes for v in values(wanted)) - wanted.head.weight.nbytes
    assert same(model, wanted) and [value.data_ptr() for value in values(model)] == before


def test_over_tcp_with_the_key_and_not_without(start: Any) -> None:
    secret = keys.generate().encode()
    key = keys.ClusterKey(secret, zmq.curve_public(secret))
    endpoint, model = start(endpoint="127.0.0.1", key=key), Model(2)
    assert endpoint.startswith("tcp://127.0.0.1:")
    with pytest.raises(TransferError):
        fetch(endpoint, Model(2), timeout=1.5)
    fetch(endpoint, model, key=key)
    assert same(model, Model(1))


@pytest.mark.parametrize(
    ("how", "why", "busy"),
    [
        ("die", "died", False),
        ("corrupt", "digests differ", False),
        ("layout", "target.embed.weight is float32 \\[301, 64\\]", False),
        ("number", "target.scale_float is 2.0 there and 1.0 here", False),
        ("stop", "just being changed", True),
        ("hang", "said nothing", False),
    ],
)
def test_what_goes_wrong_is_told_apart(start: Any, monkeypatch: Any, how: str, why: str, busy: bool) -> None:
    monkeypatch.setattr(source_module, "SILENCE", 2.0)
    with pytest.raises(TransferError, match=why) as failed:
        fetch(start(how), Model(2))
    assert failed.value.busy is busy


def test_who_has_not_the_ticket_gets_nothing_and_the_transfer_goes_on(start: Any) -> None:
    endpoint, model = start(), Model(2)
    with pytest.raises(TransferError, match="no such transfer"):
        fetch(endpoint, Model(2), ticket="other")
    fetch(endpoint, model)
    assert same(model, Model(1))


def test_a_source_that_is_not_there_is_not_waited_for_longer_than_allowed(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="too long"):
        fetch(f"ipc://{tmp_path}/nobody", Model(2), timeout=0.5)


def test_what_is_not_plain_memory_is_refused_by_name() -> None:
    model = Model(1)
    model.other = torch.eye(3).to_sparse()
    with pytest.raises(NoPlainMemory, match="target"):
        WeightMemory({"target": model})


def test_what_cannot_be_said_is_not_waited_for() -> None:
    target = WeightTarget(WeightMemory({"target": Model(2)}), Network(None), "", "ticket", 1.0)
    with zmq.Context() as context, context.socket(zmq.DEALER) as target._socket:  # of no connection
        with pytest.raises(TransferError, match="no connection"):
            target._say(Taken())
