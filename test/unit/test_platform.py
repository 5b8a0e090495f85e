"""The CPU platform plug-in: when it steps aside, what it answers, how threads are shared out."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sglang_kevlar.platform import activate, threads, torchvision_shim

torchvision_shim.install()


def test_plugin_takes_over_without_an_accelerator(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert activate() == "sglang_kevlar.platform.cpu.TorchCpuPlatform"


def test_plugin_steps_aside_for_an_accelerator_and_for_upstreams_cpu_engine(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert activate() is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="torchvision loads by itself")
def test_torchvision_imports_after_the_shim_however_often_it_runs():
    code = (
        "from sglang_kevlar.platform import torchvision_shim as t; t.install(); t.install();"
        "import torchvision; t.install(); import torch; assert hasattr(torch.ops.torchvision, 'nms')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="torchvision loads by itself")
@pytest.mark.parametrize("first", ["", "t.install();"])
def test_the_shim_is_installed_when_torchvision_is_imported(first):
    code = (
        "from sglang_kevlar.platform import torchvision_shim as t; import sys; t.install_on_import();"
        f"t.install_on_import(); assert 'torch' not in sys.modules; {first}"
        "import gc, torchvision; gc.collect(); import torch; assert hasattr(torch.ops.torchvision, 'nms');"
        "assert t._watch not in sys.meta_path"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def _arguments(**given):
    unset = dict.fromkeys(
        ("device", "attention_backend", "prefill_attention_backend", "decode_attention_backend", "lora_paths")
    )
    values = {
        **unset,
        "max_total_tokens": None,
        "max_running_requests": None,
        "sleep_on_idle": False,
        "lora_backend": "csgmv",
        "enable_lora": None,
    }
    return SimpleNamespace(**{**values, **given})


@pytest.fixture
def platform(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    from sglang_kevlar.platform.cpu import TorchCpuPlatform

    return TorchCpuPlatform()


def test_defaults_fill_only_what_is_open(platform):
    open_args = _arguments(device="cpu", attention_backend="intel_amx")
    platform.apply_server_args_defaults(open_args)
    assert open_args.attention_backend == "torch_native"
    assert open_args.sleep_on_idle
    assert open_args.lora_backend == "torch_native"
    assert open_args.max_total_tokens and open_args.max_running_requests

    given = _arguments(
        device="cpu", prefill_attention_backend="torch_native", max_total_tokens=1234, max_running_requests=7
    )
    platform.apply_server_args_defaults(given)
    assert (given.attention_backend, given.max_total_tokens, given.max_running_requests) == (None, 1234, 7)


def test_defaults_leave_other_devices_alone(platform):
    arguments = _arguments(device="cuda")
    platform.apply_server_args_defaults(arguments)
    assert arguments == _arguments(device="cuda")


def test_deterministic_inference_accepts_torch_native(platform):
    platform.apply_server_args_defaults(_arguments(device="cpu"))
    platform.apply_server_args_defaults(_arguments(device="cpu"))
    from sglang.srt.server_args import DETERMINISTIC_ATTENTION_BACKEND_CHOICES

    assert DETERMINISTIC_ATTENTION_BACKEND_CHOICES.count("torch_native") == 1


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (2, 4, 1), (16, 1, 15), (16, 2, 7), (64, 4, 15)]
)
def test_cores_are_shared_out(monkeypatch, cores, ranks, expected):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert threads.compute_threads(ranks) == expected


def test_thread_settings_of_the_user_win(monkeypatch):
    calls = {}
    monkeypatch.setattr(torch, "set_num_threads", lambda n: calls.update(threads=n))
    monkeypatch.setattr(threads.os, "sched_setaffinity", lambda _, cores: calls.update(cores=cores))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0,2-3|5")
    threads.bind_rank(0, 2)
    assert calls == {"cores": {0, 2, 3}}
    with pytest.raises(ValueError, match="rank 2"):
        threads.bind_rank(2, 3)


def test_cores_that_do_not_parse_are_refused():
    with pytest.raises(ValueError):
        threads.parse_cores("0-x")


def test_hooks_fit_the_installed_sglang():
    # In a process of its own: they replace module attributes.
    code = (
        "from sglang_kevlar.platform import torchvision_shim; torchvision_shim.install();"
        "from sglang_kevlar.platform.hooks import register_cpu_hooks; register_cpu_hooks(); register_cpu_hooks();"
        "import sglang.srt.layers.sampler as s, sglang.srt.lora.layers as l, sglang.srt.batch_invariant_ops as b;"
        "from sglang_kevlar.platform import batch_invariance as ours;"
        "assert s.murmur_hash32 is ours.murmur_hash32 and b.enable_batch_invariant_mode is ours.enable;"
        "assert l.torch.tensor([1], pin_memory=True).pin_memory().tolist() == [1]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_hook_whose_target_moved_is_refused():
    from sglang_kevlar.platform import hooks

    with pytest.raises(RuntimeError, match=r"math\.no_such_name"):
        hooks._replace("math", "no_such_name", object())
    with pytest.raises(RuntimeError, match="no_such_module"):
        hooks._replace("no_such_module", "name", object())
