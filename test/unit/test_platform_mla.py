"""Latent attention in plain torch: the numbers of dense attention, whatever is cached and however it is cut."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")

from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool  # noqa: E402

from sglang_kevlar.platform import batch_invariance, mla_attention  # noqa: E402
from sglang_kevlar.shadow.pool import PoolRows  # noqa: E402

HEADS, RANK, NOPE, ROPE, VALUE = 4, 64, 32, 16, 24
WIDTH = RANK + ROPE
CONTEXT, SLOTS = 700, 2000
SCALING = 0.2


class Layer:
    """Two requests of random tokens with a latent pool, and the weights of a layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        generator = torch.Generator().manual_seed(0)
        self.w_key, self.w_value = random(HEADS, NOPE, RANK), random(HEADS, RANK, VALUE) / 8
        self.query = random(2, CONTEXT, HEADS, NOPE + ROPE) / 3
        self.latent = random(2, CONTEXT, WIDTH) / 3
        slots = torch.randperm(SLOTS, generator=generator)
        self.req_to_token = slots[: 2 * CONTEXT].view(2, CONTEXT)
        # What nobody wrote must not matter.
        self.pool = torch.full((SLOTS, 1, WIDTH), float("nan"), dtype=dtype)
        self.pool[self.req_to_token, 0] = self.latent

    def dense(self) -> torch.Tensor:
        """Keys and values of every head, and ordinary causal attention, in float64: (2, CONTEXT, HEADS, VALUE)."""
        latent, rope = self.latent.double().split([RANK, ROPE], dim=-1)
        keys = torch.einsum("btr,hnr->bhtn", latent, self.w_key.double())
        keys = torch.cat([keys, rope.unsqueeze(1).expand(-1, HEADS, -1, -1)], dim=-1)
        values = torch.einsum("btr,hrv->bhtv", latent, self.w_value.double())
        queries = self.query.double().transpose(1, 2)
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=SCALING).transpose(1, 2)

    def run(self, step: Any, cuts: list[tuple[int, int]]) -> list[torch.Tensor]:
        """``step`` over positions ``first`` to ``end`` of both requests: (tokens, HEADS, VALUE) of each."""
        counts = [end - first for first, end in cuts]
        query = torch.cat([self.query[row, first:end] for row, (first, end) in enumerate(cuts)])
        nope, rope = query.split([NOPE, ROPE], dim=-1)
        absorbed = torch.cat([torch.bmm(nope.transpose(0, 1), self.w_key).transpose(0, 1), rope], dim=-1)
        output = torch.zeros(len(query), HEADS, RANK, dtype=query.dtype)
        lengths = torch.tensor([end for _, end in cuts])
        arguments = [absorbed, output, self.pool, self.pool[..., :RANK], self.req_to_token, torch.arange(2), lengths]
        if step is mla_attention.make_extend:
            arguments += [torch.tensor([first for first, _ in cuts]), torch.tensor(counts)]
        options = {"scaling": SCALING, "enable_gqa": True, "causal": True, "sliding_window_size": None}
        step(None)(SimpleNamespace(), *arguments, None, **options)
        values = torch.bmm(output.transpose(0, 1), self.w_value).transpose(0, 1)
        return list(values.split(counts))


CUTS = [
    [(0, 1), (0, 2)],
    [(0, CONTEXT), (690, CONTEXT)],
    [(64, 128), (63, 130)],
    [(CONTEXT - 1, CONTEXT), (0, 65)],
]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_prefill_is_dense_attention(cuts: list[tuple[int, int]], dtype: torch.dtype, tolerance: float) -> None:
    layer = Layer(dtype)
    expected = layer.dense()
    for row, part in enumerate(layer.run(mla_attention.make_extend, cuts)):
        torch.testing.assert_close(part.double(), expected[row, slice(*cuts[row])], rtol=tolerance, atol=tolerance)


def test_a_decode_step_is_dense_attention() -> None:
    layer = Layer()
    expected = layer.dense()
    for position in (0, 63, 64, CONTEXT - 2):
        one, other = layer.run(mla_attention.make_decode, [(position, position + 1), (position + 1, position + 2)])
        torch.testing.assert_close(one.double(), expected[0, [position]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.double(), expected[1, [position + 1]], rtol=1e-5, atol=1e-5)


def test_a_prefill_behind_a_prefix_costs_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[int] = []
    plain = mla_attention.attend
    monkeypatch.setattr(mla_attention, "attend", lambda query, *args: queries.append(len(query)) or plain(query, *args))
    Layer().run(mla_attention.make_extend, [(600, 603), (640, 641)])
    assert queries == [3, 1]


@pytest.fixture
def invariant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Dropping the library object takes its operators back.
    monkeypatch.setattr(batch_invariance, "_library", None)
    batch_invariance.enable()
    yield


@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_batch_invariance_no_bit_depends_on_the_cut(dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    whole = layer.run(mla_attention.make_extend, [(0, CONTEXT), (0, CONTEXT)])
    for cuts in (*CUTS, [(17, 300), (299, 301)]):
        for row, part in enumerate(layer.run(mla_attention.make_extend, cuts)):
            assert torch.equal(part, whole[row][slice(*cuts[row])])
    for position in (0, 63, 64, CONTEXT - 1):
        for row, part in enumerate(layer.run(mla_attention.make_decode, [(position, position + 1)] * 2)):
            assert torch.equal(part[0], whole[row][position])


def test_other_attention_is_left_to_the_original() -> None:
    cache = torch.zeros(4, 1, 8)
    arguments = [torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), cache, cache.clone(), *[torch.zeros(1)] * 5, None]
    for make, count in ((mla_attention.make_extend, 10), (mla_attention.make_decode, 8)):
        seen: list[Any] = []
        make(lambda *args, seen=seen, **options: seen.append((args, options)))("self", *arguments[:count], scaling=2.0)
        [(args, options)] = seen
        assert args == ("self", *arguments[:count]) and options == {"scaling": 2.0}


def pool(**more: Any) -> Any:
    return mla_attention.build_pool(
        8, page_size=2, dtype=torch.float32, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, layer_num=2, device="cpu",
        enable_memory_saver=False, **more,
    )  # fmt: skip


def test_the_pool_is_upstreams_own_which_can_be_shadowed() -> None:
    made = pool(index_head_dim=None, start_layer=0, end_layer=2)
    assert type(made) is MLATokenToKVPool
    assert PoolRows(made).row_bytes == [WIDTH * 4] * 2
    key, value = made.get_key_buffer(0), made.get_value_buffer(0)
    assert mla_attention._holds_latents(key, value) and value.shape[-1] == RANK


def test_sparse_attention_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="sparse"):
        pool(index_head_dim=64)


def test_upstream_asks_us_how_to_compute_and_hands_over_whole_latents() -> None:
    # In a process of its own: hooks replace module attributes.
    code = (
        "from sglang_kevlar.platform import torchvision_shim; torchvision_shim.install();"
        "from sglang_kevlar.platform.hooks import mla_attention, register_cpu_hooks; register_cpu_hooks();"
        "import sglang.srt.models.deepseek_common.attention_backend_handler as handlers;"
        "import sglang.srt.models.deepseek_common.utils as utils;"
        "handler = handlers.AttentionBackendRegistry.get_handler('torch_native');"
        "assert handler is mla_attention.absorb_always;"
        "assert handler(None, None) is handlers.AttnForwardMethod.MLA;"
        # A backend in this list gets the part with the positions apart.
        "assert 'torch_native' not in utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
