"""What is put into the stream of the forward passes comes long after it was put there, and finds there what it was
given: the memory that the scheduler has let go of meanwhile is used again at once, in the scheduler's own stream."""

from __future__ import annotations

import threading
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402

from sglang_kevlar.shadow.pool import PoolRows, pack  # noqa: E402
from sglang_kevlar.worker.forced_decode import ForcedDecode  # noqa: E402

SLOTS, LAYERS, TOKENS = 256, 3, 64
#: cycles of the device, about half a second
PASS = 10**9


class Request:
    def __init__(self, delivered: int) -> None:
        self.origin_input_ids, self.output_ids = array("q", range(8)), array("q", range(100, 100 + delivered))


class World:
    def __init__(self, device: int = 0) -> None:
        self.device = torch.device("cuda", device)
        torch.cuda.set_device(self.device)
        self.forward, self.schedule = torch.cuda.Stream(), torch.cuda.Stream()
        shape = dict(head_num=2, head_dim=8, layer_num=LAYERS, device="cuda", enable_memory_saver=False)
        self.pool = MHATokenToKVPool(SLOTS, 1, torch.bfloat16, **shape)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.normal_()
        self.rows = PoolRows(self.pool, self.forward)
        torch.cuda.synchronize()

    def held(self, slots: list[int]) -> list[torch.Tensor]:
        return [buffer[slots].cpu() for buffer in (*self.pool.k_buffer, *self.pool.v_buffer)]

    def begin_pass(self) -> None:
        with torch.cuda.stream(self.forward):
            torch.cuda._sleep(PASS)

    def go_on(self) -> None:
        """The scheduler's next step, with tensors of its own."""
        for tokens in (TOKENS, 2, 1):
            _ = [torch.full((tokens,), SLOTS - 1, device=self.device) for _ in range(100)]
        torch.cuda.current_stream().synchronize()


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.gpu(1)
def test_rows_are_those_of_the_slots_that_were_asked_for(world: World) -> None:
    wanted = list(range(1, TOKENS + 1))
    expected = world.held(wanted)
    with torch.cuda.stream(world.schedule):
        slots = torch.tensor(wanted, device=world.device)
        world.begin_pass()
        staged = world.rows.read(slots)
        del slots
        world.go_on()
    assert staged is not None
    runs = staged.wait()
    got = [part for run in runs for part in run]
    for ours, theirs in zip(got, expected, strict=True):
        assert np.array_equal(ours, theirs.view(torch.uint8).reshape(TOKENS, -1).numpy())


@pytest.mark.gpu(1)
def test_rows_are_written_to_the_slots_that_were_told(world: World) -> None:
    """And what the scheduler does next finds them written."""
    source, target = list(range(1, TOKENS + 1)), list(range(TOKENS + 1, 2 * TOKENS + 1))
    staged = world.rows.read(torch.tensor(source, device=world.device))
    assert staged is not None
    blocks = np.zeros((TOKENS // 16, 16 * world.rows.token_bytes), dtype=np.uint8)
    pack(staged.wait(), 0, len(blocks), 16, blocks)
    untouched = list(range(2 * TOKENS + 1, SLOTS))
    before = world.held(untouched)
    with torch.cuda.stream(world.schedule):
        slots = torch.tensor(target, device=world.device)
        world.begin_pass()
        world.rows.write(slots, blocks, 0)
        blocks[:] = 0
        del slots
        world.go_on()
        assert world.forward.query()
    torch.cuda.synchronize()
    for ours, theirs in zip(world.held(target), world.held(source), strict=True):
        assert torch.equal(ours, theirs)
    for now, then in zip(world.held(untouched), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("delayed", [False, True])
def test_delivered_tokens_are_put_in_though_the_pass_takes_its_time(world: World, delayed: bool) -> None:
    """``delayed``: as with a grammar, when it is sampled later."""

    def forward(batch: Any) -> Any:
        result = SimpleNamespace(next_token_ids=None, delay_sample_func=None)

        def sample() -> Any:
            result.next_token_ids = torch.full((len(batch.reqs),), 7, dtype=torch.int32, device=world.device)
            return result

        torch.cuda._sleep(PASS)
        if delayed:
            result.delay_sample_func = sample
            return result
        return sample()

    worker = SimpleNamespace(forward_batch_generation=forward)
    forced = ForcedDecode(worker)
    requests = [Request(0), Request(6), Request(6)]
    for request in requests[1:]:
        forced.begin(request, 3)  # type: ignore[arg-type]
    batch: Any = SimpleNamespace(reqs=requests, seq_lens_cpu=torch.tensor([8, 11, 12]), device="cuda")
    with torch.cuda.stream(world.schedule):
        with forced.in_step(batch), torch.cuda.stream(world.forward):
            result = worker.forward_batch_generation(batch)
        world.go_on()
        if delayed:
            with torch.cuda.stream(world.forward):
                result.delay_sample_func()
            result.delay_sample_func = None
            world.go_on()
    torch.cuda.synchronize()
    assert result.next_token_ids.tolist() == [7, 103, 104]


@pytest.mark.gpu(2)
def test_who_waits_for_a_copy_does_so_on_its_device() -> None:
    world = World(device=1)
    staged = world.rows.read(torch.tensor([1, 2], device=world.device))
    assert staged is not None
    seen: list[int] = []

    def wait() -> None:
        staged.wait()
        seen.append(torch.cuda.current_device())

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    torch.cuda.set_device(0)
    assert seen == [1]
