"""Seeded sampling and matrix products do not depend on what else is in the batch."""

import importlib

import pytest
import torch

from sglang_kevlar.platform import batch_invariance, seeded_sampling, torchvision_shim

torchvision_shim.install()


def _murmur3(words: list[int]) -> int:
    """MurmurHash3 x86-32 of little-endian words, seed 0, in plain integers."""
    state = 0
    for word in words:
        word = word * 0xCC9E2D51 & 0xFFFFFFFF
        word = (word << 15 | word >> 17) * 0x1B873593 & 0xFFFFFFFF
        state ^= word
        state = ((state << 13 | state >> 19) * 5 + 0xE6546B64) & 0xFFFFFFFF
    state ^= 4 * len(words)
    state = (state ^ state >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    state = (state ^ state >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return state ^ state >> 16


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_hash_is_murmur3_of_seed_position_and_column(dtype):
    seeds = [0, 42, 2**32 - 1, 2**40 + 17, 2**63 - 1]
    positions = [0, 1, 17, 16_383, 2**31 - 1]
    columns = [0, 1, 127, 151_935]
    got = batch_invariance.murmur_hash32(
        torch.tensor(seeds, dtype=torch.int64).to(dtype), torch.tensor(positions), torch.tensor(columns)
    )
    expected = [
        [_murmur3([seed & 0xFFFFFFFF, seed >> 32, position, column]) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert got.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "outer"), [(64, 2048), (256, 512), (1000, 333)])
def test_a_row_of_a_product_is_the_same_in_every_batch(dtype, inner, outer):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, inner, generator=generator).to(dtype)
    b = torch.randn(outer, inner, generator=generator).to(dtype).t()
    bias = torch.randn(outer, generator=generator).to(dtype)
    whole, whole_biased = batch_invariance.mm(a, b), batch_invariance.addmm(bias, a, b)
    assert torch.allclose(
        whole.float(), a.float() @ b.float(), rtol=2e-2, atol=0.5 if dtype is torch.bfloat16 else 1e-3
    )
    for start, stop in ((0, 1), (7, 9), (15, 17), (3, 30), (49, 50)):
        assert torch.equal(batch_invariance.mm(a[start:stop], b), whole[start:stop])
        assert torch.equal(batch_invariance.addmm(bias, a[start:stop], b), whole_biased[start:stop])


def test_products_of_nothing():
    assert batch_invariance.mm(torch.zeros(0, 8), torch.zeros(8, 3)).shape == (0, 3)


@pytest.fixture
def sampler(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    module = importlib.import_module("sglang.srt.layers.sampler")
    monkeypatch.setattr(module, "murmur_hash32", batch_invariance.murmur_hash32)
    # Compiled by upstream's decorator when another test imported it first.
    with torch.compiler.set_stance("force_eager"):
        yield module


def _forbidden(*_args, **_kwargs):
    raise AssertionError("the original is for requests without a seed")


def _case(n=6, vocabulary=300):
    probs = torch.softmax(torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(3)) * 2, dim=-1)
    return probs, torch.arange(n) + 100, torch.arange(n) * 7


def test_an_unrestricted_request_draws_the_same_beside_a_restricted_one(sampler):
    probs, seeds, positions = _case()
    alone = seeded_sampling.make_unrestricted(_forbidden)(probs, seeds, positions)
    everything = torch.full((6,), 1 << 30)
    top_p = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.2])
    together = seeded_sampling.make_restricted(_forbidden)(
        probs, everything, top_p, torch.zeros(6), False, seeds, positions
    )
    assert alone.tolist()[:5] == together.tolist()[:5]


def test_restrictions_hold_and_min_p_needs_no_normalisation(sampler):
    probs, _, _ = _case(1)
    n = 400
    probs = probs.expand(n, -1).contiguous()
    seeds, positions = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    sample = seeded_sampling.make_restricted(_forbidden)
    order = probs[0].sort(descending=True).indices
    tokens = sample(probs, torch.full((n,), 3), torch.ones(n), torch.zeros(n), False, seeds, positions)
    assert set(tokens.tolist()) == set(order[:3].tolist())
    floor = probs[0].max() * 0.5
    tokens, ranked, ids, weight = sample(
        probs,
        torch.full((n,), 1 << 30),
        torch.ones(n),
        torch.full((n,), 0.5),
        True,
        seeds,
        positions,
        return_filtered_probs=True,
    )
    allowed = set((probs[0] >= floor).nonzero().view(-1).tolist())
    assert set(tokens.tolist()) == allowed
    assert set(ids[0][ranked[0] > 0].tolist()) == allowed
    assert torch.equal(weight, probs.gather(1, tokens[:, None].long()).view(-1))


def test_without_a_seed_the_original_samples(sampler):
    probs, _, positions = _case()
    assert seeded_sampling.make_unrestricted(lambda *_: "original")(probs) == "original"
    restricted = seeded_sampling.make_restricted(lambda *_, **__: "original")
    assert restricted(probs, None, None, None, False, None, positions) == "original"
