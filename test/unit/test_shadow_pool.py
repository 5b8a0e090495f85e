"""Rows of the real pools: what is read, laid out as blocks and written elsewhere is the same KV."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

from sglang.srt.mem_cache import memory_pool  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool  # noqa: E402

from sglang_kevlar.control.shadow_keys import block_tokens  # noqa: E402
from sglang_kevlar.shadow.pool import PoolRows, pack  # noqa: E402
from sglang_kevlar.shadow.rank import _stream_of_passes  # noqa: E402

SIZE = 128
LAYERS = 3


def mha(page: int, dtype: torch.dtype, **changes) -> MHATokenToKVPool:
    settings = dict(head_num=2, head_dim=8, layer_num=LAYERS, device="cpu", enable_memory_saver=False)
    return MHATokenToKVPool(SIZE, page, dtype, **{**settings, **changes})


def mla(page: int, dtype: torch.dtype, **changes) -> MLATokenToKVPool:
    settings = dict(kv_lora_rank=8, qk_rope_head_dim=4, layer_num=LAYERS, device="cpu", enable_memory_saver=False)
    return MLATokenToKVPool(SIZE, page, dtype, **{**settings, **changes})


def buffers(pool) -> list[torch.Tensor]:
    return [*pool.k_buffer, *pool.v_buffer] if isinstance(pool, MHATokenToKVPool) else list(pool.kv_buffer)


def fill(pool, seed: int) -> None:
    """Any bytes: NaNs and infinities too."""
    generator = torch.Generator().manual_seed(seed)
    for buffer in buffers(pool):
        data = torch.randint(0, 256, (buffer.numel() * buffer.element_size(),), generator=generator, dtype=torch.uint8)
        buffer.copy_(data.view(buffer.dtype).view(buffer.shape))


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def slots_of(pages: list[int], page: int) -> torch.Tensor:
    return torch.tensor([number * page + token for number in pages for token in range(page)])


POOLS = {
    "mha f32": lambda page: mha(page, torch.float32),
    "mha bf16, other v": lambda page: mha(page, torch.bfloat16, v_head_dim=4),
    "mha fp8": lambda page: mha(page, torch.float8_e4m3fn),
    "mla bf16": lambda page: mla(page, torch.bfloat16),
    "mla fp8": lambda page: mla(page, torch.float8_e5m2),
}


@pytest.mark.parametrize("page", [1, 16, 32])
@pytest.mark.parametrize("kind", POOLS)
def test_round_trip_through_blocks(kind, page):
    source, target = POOLS[kind](page), POOLS[kind](page)
    fill(source, 1)
    fill(target, 2)
    before = [raw(buffer).copy() for buffer in buffers(target)]
    rows = PoolRows(source)
    block = block_tokens(page)
    assert rows.capacity_tokens == SIZE
    assert rows.token_bytes == sum(buffer[0].numel() * buffer.element_size() for buffer in buffers(source))

    # Slots in any order: page p of the pool holds tokens of the sequence anywhere.
    dice = np.random.default_rng(page)
    pages = (dice.permutation(SIZE // page) + 1).tolist()
    count = 3 * block
    origin, destination = slots_of(pages, page)[:count], slots_of(pages[::-1], page)[:count]
    staged = rows.read(origin.to(torch.int32))
    # What the pool holds later changes nothing in the copy.
    kept = [raw(buffer[origin]) for buffer in buffers(source)]
    for buffer in buffers(source):
        buffer.zero_()

    arrays = staged.wait()
    whole = np.zeros((3, block * rows.token_bytes), dtype=np.uint8)
    pack(arrays, 0, 3, block, whole)
    for number in range(3):
        one = np.zeros((1, block * rows.token_bytes), dtype=np.uint8)
        pack(arrays, number * block, 1, block, one)
        assert np.array_equal(one[0], whole[number]), "a block is the same whatever is beside it"

    skip = 5 if page == 1 else 0
    PoolRows(target).write(destination[skip:], whole, skip)
    for buffer, rows_kept, untouched in zip(buffers(target), kept, before, strict=True):
        got = raw(buffer)
        assert np.array_equal(got[destination[skip:]], rows_kept[skip:])
        others = np.setdiff1d(np.arange(len(got)), destination[skip:])
        assert np.array_equal(got[others], untouched[others])


@pytest.mark.parametrize("kind", POOLS)
def test_part_of_the_blocks_and_a_skip_of_all_but_a_token(kind):
    source, target = POOLS[kind](1), POOLS[kind](1)
    fill(source, 3)
    rows = PoolRows(source)
    out = np.zeros((4, 16 * rows.token_bytes), dtype=np.uint8)
    slots = torch.arange(1, 65)
    pack(rows.read(slots).wait(), 0, 4, 16, out)
    PoolRows(target).write(slots[16 + 15 : 48], out[1:3], 15)
    for ours, theirs in zip(buffers(target), buffers(source), strict=True):
        assert np.array_equal(raw(ours[32:49]), raw(theirs[32:49]))
        assert not raw(ours[:32]).any() and not raw(ours[49:]).any()


def test_the_layout_tells_dtypes_and_shapes_apart():
    names = {PoolRows(make(1)).dtype for make in POOLS.values()}
    assert names == {"float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
    assert PoolRows(mha(1, torch.bfloat16, v_head_dim=4)).row_bytes == [32] * LAYERS + [16] * LAYERS
    assert PoolRows(mla(1, torch.bfloat16)).row_bytes == [24] * LAYERS


@pytest.mark.parametrize(
    "name",
    [
        "MHATokenToKVPoolFP4",
        "MHATokenToKVPoolMXFP8",
        "NoOpMHATokenToKVPool",
        "PageMajorMHATokenToKVPool",
        "HybridLinearKVPool",
        "MLATokenToKVPoolFP4",
        "DSATokenToKVPool",
        "MHATokenToKOnlyPool",
        "MiniMaxSparseKVPool",
    ],
)
def test_a_pool_that_holds_more_than_rows_is_refused_by_name(name):
    """Most of them are subclasses of one that is supported."""
    kind = getattr(memory_pool, name)
    with pytest.raises(ValueError, match=name):
        PoolRows(kind.__new__(kind))


def test_what_is_no_pool_and_another_layout_are_refused():
    with pytest.raises(ValueError, match="SimpleNamespace"):
        PoolRows(SimpleNamespace(kv_buffer=[], size=1))
    with pytest.raises(ValueError, match="page_first"):
        PoolRows(mha(16, torch.float32, kv_cache_layout="page_first"))


def test_a_pool_with_scales_beside_its_rows_is_refused():
    """Upstream makes FP4 pools of the plain class, with another method."""
    pool = mha(1, torch.bfloat16)
    pool.quant_method = SimpleNamespace(name="nvfp4")
    with pytest.raises(ValueError, match=r"quantised \(nvfp4\)"):
        PoolRows(pool)


def test_want_of_memory_for_a_copy_is_no_error_and_all_else_is(monkeypatch):
    rows = PoolRows(mha(1, torch.float32))
    slots = torch.arange(1, 17)

    def fails(error):
        def empty(*args, **kwargs):
            raise error

        monkeypatch.setattr(torch, "empty", empty)

    fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert rows.read(slots) is None
    fails(RuntimeError("CUDA error: out of memory"))  # of pinned memory
    assert rows.read(slots) is None
    fails(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rows.read(slots)


@pytest.mark.parametrize(
    ("device", "overlap", "stages", "stream"),
    [("cpu", True, 1, None), ("cuda", True, 1, "own"), ("cuda", False, 1, "scheduler's"), ("cuda", False, 2, "own")],
)
def test_copies_are_in_the_stream_of_the_passes(device, overlap, stages, stream):
    scheduler = SimpleNamespace(
        device=device, enable_overlap=overlap, forward_stream="own", schedule_stream="scheduler's"
    )
    assert _stream_of_passes(scheduler, stages) == stream
