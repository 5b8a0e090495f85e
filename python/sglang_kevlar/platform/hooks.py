"""What the CPU needs changed in SGLang and no platform method covers. Applied in ranks only, on this platform only.

Plain attribute replacement, at the places that use the name, checked on the spot: upstream's hook registry only logs
what it could not apply, and applies after all plug-ins have run.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from sglang_kevlar.platform import batch_invariance, mla_attention, prefix_attention, seeded_sampling, threads

#: modules that copy small tensors to the device through pinned memory, whatever the platform says
_PINNING = ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend")

_applied = False


def register_cpu_hooks() -> None:
    """Apply everything once. Called by ``TorchCpuPlatform.init_backend`` in every process that loads a model.

    Raises:
        RuntimeError: a target is not there in this version of SGLang.
    """
    global _applied
    if _applied:
        return
    # Sampling with a seed: the CPU branch of the hash is in sgl_kernel.
    _replace("sglang.srt.layers.sampler", "murmur_hash32", batch_invariance.murmur_hash32)
    for name, make in (
        ("sampling_from_probs_torch", seeded_sampling.make_unrestricted),
        ("top_k_top_p_min_p_sampling_from_probs_torch", seeded_sampling.make_restricted),
    ):
        _replace("sglang.srt.layers.sampler", name, make(_find("sglang.srt.layers.sampler", name)))
    # Imported by name inside the function that uses it, from the package.
    _replace("sglang.srt.batch_invariant_ops", "enable_batch_invariant_mode", batch_invariance.enable)
    _replace("sglang.srt.distributed.bootstrap", "_bind_threads_if_cpu", _bind_threads)
    # On arm64 it calls sgl_kernel whether it is there or not.
    _replace("sglang.srt.distributed.bootstrap", "_init_cpu_threads_env", _no_thread_environment)
    backend = _find("sglang.srt.layers.attention.torch_native_backend", "TorchNativeAttnBackend")
    dispatch = _find("sglang.srt.models.deepseek_common.attention_backend_handler", "AttentionBackendRegistry")
    try:
        dispatch.register("torch_native", mla_attention.absorb_always)
        backend._run_sdpa_forward_extend = mla_attention.make_extend(
            prefix_attention.make_extend(backend._run_sdpa_forward_extend)
        )
        backend._run_sdpa_forward_decode = mla_attention.make_decode(backend._run_sdpa_forward_decode)
    except AttributeError as error:
        raise RuntimeError(f"sglang's torch_native attention has changed; the CPU platform replaces {error}") from error
    unpinned = _UnpinnedTorch()
    for module in _PINNING:
        _replace(module, "torch", unpinned)
    # Without an accelerator the method only raises.
    torch.Tensor.pin_memory = _same_tensor
    _applied = True


def _find(module_name: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"sglang has no {module_name}.{name} any more; the CPU platform replaces it") from error


def _replace(module_name: str, name: str, value: object) -> None:
    _find(module_name, name)
    setattr(importlib.import_module(module_name), name, value)


def _bind_threads(*, device: str) -> None:
    """Stands in for ``bootstrap._bind_threads_if_cpu``."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    threads.bind_rank(
        rank=parallel.pp_rank * parallel.tp_size + parallel.tp_rank, ranks=parallel.tp_size * parallel.pp_size
    )


def _no_thread_environment(**_: Any) -> None:
    return None


def _same_tensor(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


class _UnpinnedTorch:
    """``torch`` for a module that asks for pinned tensors: the same, without pinning."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)

    @staticmethod
    def zeros(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs)
