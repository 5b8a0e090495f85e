"""Who waits on a device for a dead rank is freed: with stand-ins for NCCL here, with NCCL in `test/gpu`."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

import torch  # noqa: E402

from sglang_kevlar.worker import device_aborts  # noqa: E402
from sglang_kevlar.worker.communicators import Group  # noqa: E402
from sglang_kevlar.worker.device_aborts import DeviceAborts, Rescue  # noqa: E402

LEAVE = signal.SIGUSR2


class Library:
    """Of NCCL, as upstream has it loaded."""

    def __init__(self, abort: Callable[[int], int]) -> None:
        self._abort = abort

    def __getitem__(self, name: str) -> Any:
        assert name == "ncclCommAbort"
        return lambda communicator: self._abort(communicator)


def check(result: int) -> None:
    if result:
        raise RuntimeError(f"NCCL error: {result}")


def coordinator(number: int, abort: Callable[[int], int], available: bool = True) -> Any:
    library = SimpleNamespace(lib=Library(abort), NCCL_CHECK=check)
    return SimpleNamespace(pynccl_comm=SimpleNamespace(available=available, comm=number, nccl=library))


def device_group(name: str, abort: Callable[[], None]) -> Any:
    return SimpleNamespace(_get_backend=lambda device: SimpleNamespace(name=lambda: name, abort=abort))


def test_each_communicator_is_given_up_once_though_groups_share_it() -> None:
    given_up: list[object] = []
    one, two = (coordinator(number, lambda number: given_up.append(number) or 0) for number in (1, 2))
    nccl = device_group("nccl", lambda: given_up.append("nccl"))
    gloo = device_group("gloo", lambda: given_up.append("gloo"))
    without = coordinator(3, lambda number: given_up.append(number) or 0, available=False)
    aborts = DeviceAborts()
    groups = [Group(one, nccl, gloo), Group(one, nccl, gloo), Group(two, gloo, gloo), Group(without, object(), None)]
    aborts.begin(groups)
    aborts.begin(groups)  # by whoever comes second
    aborts.finish(10)
    assert sorted(map(str, given_up)) == ["1", "2", "nccl"]
    aborts.finish(10)
    aborts.begin([Group(two, gloo, gloo)])  # of the next epoch
    aborts.finish(10)
    assert sorted(map(str, given_up)) == ["1", "2", "2", "nccl"]


def test_tokens_that_were_not_agreed_on_can_still_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An all-reduce that was given up may leave anything, and the next kernels use it as an index."""
    monkeypatch.setattr(os, "environ", told := {})
    left = [-(2**62), -1, 0, 511, 512, 2**62]

    class Sampler:
        def _sync_token_ids_across_tp(self, tokens: torch.Tensor, sampling: Any) -> None:
            tokens.copy_(torch.tensor(left))

        def _preprocess_logits(self, logits: torch.Tensor, sampling: Any) -> torch.Tensor:
            return logits

    monkeypatch.setattr(device_aborts, "Sampler", Sampler)
    device_aborts.prepare()
    assert told["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == told["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    tokens = torch.zeros(6, dtype=torch.int64)
    Sampler()._sync_token_ids_across_tp(tokens, SimpleNamespace(vocab_size=512))
    assert tokens.tolist() == [0, 0, 0, 511, 511, 511]


def test_tokens_are_drawn_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch asserts that, on the device; logits that were gathered from a dead rank may be anything."""
    monkeypatch.setattr(os, "environ", {})

    class Sampler:
        _sync_token_ids_across_tp = None

        def _preprocess_logits(self, logits: torch.Tensor, sampling: Any) -> torch.Tensor:
            return logits

    monkeypatch.setattr(device_aborts, "Sampler", Sampler)
    device_aborts.prepare()
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan, nan, nan, nan], [inf, 1.0, -inf, nan], [1.0, 2.0, -inf, 3.0], [3e38, 1.0, 0, 0]])
    for kind in (torch.float32, torch.bfloat16):
        taken = Sampler()._preprocess_logits(given := logits.to(kind), None)
        assert taken is given
        probabilities = torch.softmax(taken.float() / 1e-6, dim=-1)
        torch.multinomial(probabilities, 1)
        assert probabilities[0].tolist() == [0.25] * 4 and probabilities[1].tolist() == [1, 0, 0, 0]
        assert taken[2].tolist() == [1, 2, -inf, 3]


def test_one_that_waits_for_its_graphs_does_not_keep_the_others_waiting() -> None:
    graphs_gone, other = threading.Event(), threading.Event()

    def waits(_: int) -> int:
        return 0 if graphs_gone.wait(30) else 1

    aborts = DeviceAborts()
    aborts.begin(
        [Group(coordinator(1, waits), None, None), Group(coordinator(2, lambda _: other.set() or 0), None, None)]
    )
    assert other.wait(30)
    with pytest.raises(RuntimeError, match="a graph may hold it"):
        aborts.finish(0.1)
    graphs_gone.set()
    aborts.finish(30)


def test_an_abort_that_fails_is_told_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    aborts = DeviceAborts()
    aborts.begin([Group(coordinator(1, lambda _: 5), None, None)])
    aborts.finish(30)
    assert "NCCL error: 5" in caplog.text


class Left(BaseException):
    pass


def stuck_or_not(stuck: bool, pipe: Any) -> None:
    """A loop inside a call that no signal ends, as a CUDA call is, or one that hears signals. It cannot be freed at
    first."""
    device_aborts.BY_ITSELF = 1.0  # a busy machine is not to be taken for a loop that does not hear
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_init(mutex, None)
    libc.pthread_mutex_lock(mutex)
    loop: object | None = object()
    given_up: list[str] = []

    def leave(*_: object) -> None:
        if loop is not None:
            raise Left

    def give_up() -> None:
        given_up.append("device")
        if len(given_up) == 1:
            pipe.send("failed")
            raise RuntimeError("not yet")
        libc.pthread_mutex_unlock(mutex)

    signal.signal(LEAVE, leave)
    rescue = Rescue(LEAVE, lambda: loop, give_up)
    os.kill(os.getpid(), signal.SIGCHLD)  # is no request to leave
    pipe.send("in")
    try:
        if stuck:
            libc.pthread_mutex_lock(mutex)
        while True:
            time.sleep(0.01)
    except Left:
        loop = None
    time.sleep(0.5 * device_aborts.BY_ITSELF)
    loop = object()  # of the next epoch
    time.sleep(1.5 * device_aborts.BY_ITSELF)
    rescue.close()
    pipe.send(given_up)


@pytest.mark.parametrize("stuck", [True, False])
def test_a_loop_that_does_not_hear_is_freed_and_only_that(stuck: bool) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=stuck_or_not, args=(stuck, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(30) and ours.recv() == "in"
        time.sleep(0.1)
        os.kill(process.pid, LEAVE)
        if stuck:
            assert ours.poll(30) and ours.recv() == "failed"
            os.kill(process.pid, LEAVE)  # as the supervisor does, until it has left
        assert ours.poll(30)
        assert ours.recv() == (["device"] * 2 if stuck else [])
    finally:
        process.kill()
        process.join()
