"""Attention behind a cached prefix: the same numbers as over the whole context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402

from sglang_kevlar.platform import batch_invariance, prefix_attention  # noqa: E402

HEADS, KV_HEADS, WIDTH, SLOTS = 4, 2, 8, 1000
UPSTREAM = TorchNativeAttnBackend._run_sdpa_forward_extend


def attend(extend: Any, lengths: list[tuple[int, int]], **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    new = sum(count for _, count in lengths)
    query = torch.randn(new, HEADS, WIDTH, generator=generator)
    caches = [torch.randn(SLOTS, KV_HEADS, WIDTH, generator=generator) for _ in "kv"]
    table = torch.stack([torch.randperm(SLOTS, generator=generator)[:900] for _ in lengths])
    prefixes, counts = (torch.tensor(column) for column in zip(*lengths, strict=True))
    out = torch.zeros_like(query)
    extend(
        SimpleNamespace(_make_sliding_window_mask=TorchNativeAttnBackend._make_sliding_window_mask),
        query, out, *caches, table, torch.arange(len(lengths)), prefixes + counts, prefixes, counts, None,
        **{"scaling": 0.3, "enable_gqa": True, "causal": True} | options,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(
    "lengths", [[(1, 1)], [(500, 3), (0, 20), (17, 300)], [(0, 5)], [(128, prefix_attention.QUERIES + 1)]]
)
@pytest.mark.parametrize("options", [{}, {"sliding_window_size": 16}, {"causal": False}])
def test_like_upstream(lengths: list[tuple[int, int]], options: dict[str, Any]) -> None:
    ours = attend(prefix_attention.make_extend(UPSTREAM), lengths, **options)
    torch.testing.assert_close(ours, attend(UPSTREAM, lengths, **options), rtol=1e-5, atol=1e-6)


def test_costs_its_own_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[int] = []
    plain = prefix_attention.scaled_dot_product_attention
    monkeypatch.setattr(
        prefix_attention,
        "scaled_dot_product_attention",
        lambda query, *args, **more: queries.append(query.shape[2]) or plain(query, *args, **more),
    )
    attend(prefix_attention.make_extend(UPSTREAM), [(800, 2), (100, 1)])
    assert queries == [2, 1]


def test_batch_invariance_keeps_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_invariance, "enabled", lambda: True)
    monkeypatch.delattr(prefix_attention, "scaled_dot_product_attention")
    attend(prefix_attention.make_extend(UPSTREAM), [(800, 2)])
