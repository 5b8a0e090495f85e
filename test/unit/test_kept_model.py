"""Which ranks keep their weights, and what that does to the free memory that upstream measures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

import torch  # noqa: E402
from sglang.srt.distributed import bootstrap  # noqa: E402
from sglang.srt.model_executor import model_runner  # noqa: E402

from sglang_kevlar.worker import communicators, kept_model  # noqa: E402

GB = 1 << 30


def on_a_device(**other: Any) -> Any:
    graphs = SimpleNamespace(prefill=SimpleNamespace(backend="breakable"), decode=SimpleNamespace(backend="full"))
    flags = ["enable_mscclpp", "enable_torch_symm_mem", "enable_symm_mem", "pre_warm_nccl"]
    flags += ["enable_tp_lm_head_all_to_all"]
    plain: dict[str, Any] = {
        "device": "cuda",
        "tp_size": 2,
        "pp_size": 1,
        "disable_custom_all_reduce": True,
        "flashinfer_allreduce_fusion_backend": None,
        "cuda_graph_config": graphs,
    }
    return SimpleNamespace(**{**plain, **dict.fromkeys(flags, False), **other})


def reasons(args: Any) -> list[str]:
    return [reason for reason, holds in kept_model._why_not_on_device(args).items() if holds]


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("disable_custom_all_reduce", False, "--disable-custom-all-reduce"),
        ("flashinfer_allreduce_fusion_backend", "auto", "fused all-reduces"),
        ("enable_symm_mem", True, "--enable-symm-mem"),
        ("pre_warm_nccl", True, "--pre-warm-nccl"),
    ],
)
def test_what_waits_for_a_dead_rank_past_nccl_has_to_be_off(field: str, value: Any, why: str) -> None:
    assert reasons(on_a_device()) == []
    (reason,) = reasons(on_a_device(**{field: value}))
    assert why in reason
    assert reasons(on_a_device(**{field: value}, tp_size=1)) == []  # there is nobody to wait for


@pytest.mark.parametrize(
    ("name", "value"), [("TORCH_DISTRIBUTED_DEBUG", "DETAIL"), ("SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM", "1")]
)
def test_settings_with_which_a_rank_cannot_leave_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    (reason,) = reasons(on_a_device())
    assert name in reason


def test_graphs_that_stay_in_the_model_are_refused_of_a_single_rank_too() -> None:
    graphs = SimpleNamespace(prefill=SimpleNamespace(backend="tc_piecewise"), decode=SimpleNamespace(backend="full"))
    (reason,) = reasons(on_a_device(cuda_graph_config=graphs, tp_size=1))
    assert "torch.compile" in reason


def test_the_pool_is_sized_as_if_kept_weights_were_still_to_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False), torch.nn.Linear(1024, 1024, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(1024, dtype=torch.float64))
    assert kept_model.size(model) == 4 * 1024 * 1024 + 8 * 1024
    free = 10.0
    monkeypatch.setattr(bootstrap, "get_available_gpu_memory", lambda device, gpu_id, empty_cache: free)
    loader = SimpleNamespace(preloaded_weights_bytes=0)
    loaded = SimpleNamespace(model=model, loader=loader)
    monkeypatch.setattr(model_runner, "load_model_with_memory_saver", lambda **_: loaded)
    monkeypatch.setattr(communicators, "groups", dict)
    kept = kept_model.KeptModel()

    def measure() -> float:
        return float(bootstrap.get_available_gpu_memory("cpu", 0))

    assert measure() == free
    assert model_runner.load_model_with_memory_saver(is_draft_worker=False) is loaded
    assert measure() == pytest.approx(free + kept_model.size(model) / GB, rel=1e-6)
    # Of a daemon's weights upstream has the size from the loader, and adds it when the scheduler is made.
    loader.preloaded_weights_bytes = kept_model.size(model)
    assert measure() == free
    loader.preloaded_weights_bytes = 0
    kept.observe([kept_model.FetchWeightsReq(ticket="", endpoints=[], timeout=1.0)])  # it will be loaded again
    assert measure() == free


def test_ranks_of_which_some_kept_nothing_agree_on_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their pools would be of different sizes, and they would decide differently."""
    kept = kept_model.KeptModel.__new__(kept_model.KeptModel)
    kept._kept = SimpleNamespace(
        model=torch.nn.Linear(1024, 1024, bias=False), loader=SimpleNamespace(preloaded_weights_bytes=0)
    )
    kept._free = lambda *_, **__: 10.0
    others = 9.5 * GB

    def least(here: torch.Tensor, op: Any, group: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN and group == "all"
        here.fill_(min(float(here), others))

    monkeypatch.setattr(torch.distributed, "all_reduce", least)
    assert kept._free_before_load("cpu", 0, True, cpu_group="all") == pytest.approx(9.5)
