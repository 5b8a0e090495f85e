"""The paged allocator in torch against a straightforward reference, upstream's own checks switched on."""

import random

import pytest
import torch

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator  # noqa: E402

from sglang_kevlar.platform.allocator import TorchPagedAllocator, build_allocator  # noqa: E402


class Reference:
    """Walks every token: a new page at a page boundary, otherwise the slot behind the last one."""

    def __init__(self, size: int, page_size: int) -> None:
        self.page_size = page_size
        self.free = list(range(1, size // page_size + 1))

    def extend(self, requests: list[tuple[int, int, int]]) -> list[int] | None:
        """``requests``: (prefix length, length, slot of the last prefix token)."""
        free, slots = list(self.free), []
        for prefix, length, last in requests:
            for position in range(prefix, length):
                if position % self.page_size:
                    last += 1
                elif not free:
                    return None
                else:
                    last = free.pop(0) * self.page_size
                slots.append(last)
        self.free = free
        return slots


def _tensors(requests):
    prefix, length, last = (torch.tensor(values, dtype=torch.int64) for values in zip(*requests, strict=True))
    return prefix, length, last


def _build(size, page_size, need_sort=False):
    return build_allocator(
        size, page_size=page_size, dtype=torch.float32, device="cpu", kvcache=None, need_sort=need_sort
    )


@pytest.fixture(autouse=True)
def _upstream_debug_checks(monkeypatch):
    monkeypatch.setenv("SGLANG_DEBUG_MEMORY_POOL", "1")


def test_page_size_one_gets_the_plain_allocator():
    assert isinstance(_build(64, 1), TokenToKVPoolAllocator)
    assert isinstance(_build(64, 4), TorchPagedAllocator)


@pytest.mark.parametrize("page_size", [2, 3, 16, 64])
@pytest.mark.parametrize("need_sort", [False, True])
def test_a_random_life_of_requests_agrees_with_the_reference(page_size, need_sort):
    rng = random.Random(page_size)
    size = page_size * 40
    ours, reference = _build(size, page_size, need_sort), Reference(size, page_size)
    assert ours.debug_mode
    live: dict[int, list[int]] = {}
    exhausted = 0
    for step in range(400):
        # New requests and continued ones in the same batch; extend by any number of tokens, or decode by one.
        decode = bool(live) and rng.random() < 0.6
        names = rng.sample(sorted(live), rng.randint(1, len(live))) if live else []
        grow = {name: 1 if decode else rng.randint(1, 3 * page_size) for name in names}
        if not decode:
            grow[1000 + step] = rng.randint(1, 4 * page_size)
        batch = [
            (len(slots := live.get(name, [])), len(slots) + extra, slots[-1] if slots else -1)
            for name, extra in grow.items()
        ]
        prefix, length, last = _tensors(batch)
        # Upstream keeps pages that wait for sorting apart; the reference has one list. Sort both at the same time.
        if need_sort and ours.staged_pages:
            ours.merge_and_sort_free()
            reference.free.sort()
        expected = reference.extend(batch)
        total = sum(grow.values())
        if decode:
            got = ours.alloc_decode(length, length, last)
        else:
            got = ours.alloc_extend(prefix, prefix, length, length, last, total)
        assert (None if got is None else got.tolist()) == expected
        if got is None:
            exhausted += 1
            victims = rng.sample(sorted(live), min(len(live), 3))
            for victim in victims:
                slots = live.pop(victim)
                pages = sorted({slot // page_size for slot in slots})
                ours.free(torch.tensor(slots))
                reference.free = pages + reference.free if not need_sort else reference.free + pages
            continue
        remaining = got.tolist()
        for name, extra in grow.items():
            live.setdefault(name, []).extend(remaining[:extra])
            del remaining[:extra]
        assert ours.available_size() == len(reference.free) * page_size
    assert exhausted, "the pool never ran out; the test misses that path"
    held = [slot for slots in live.values() for slot in slots]
    assert len(held) == len(set(held))
    assert min(held) >= page_size, "page 0 is the padding page"


def test_exhaustion_changes_nothing():
    allocator = _build(8, 4)
    prefix, length, last = _tensors([(0, 9, -1)])
    assert allocator.alloc_extend(prefix, prefix, length, length, last, 9) is None
    assert allocator.available_size() == 8
