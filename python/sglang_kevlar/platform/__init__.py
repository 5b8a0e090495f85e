"""Serving on a CPU with plain torch: no CUDA, no compiled kernels. Entry point of group ``sglang.srt.platforms``."""

from __future__ import annotations


def activate() -> str | None:
    """Dotted path of the CPU platform class, or None where an accelerator is to be used.

    Also None with ``SGLANG_USE_CPU_ENGINE=1``: that asks for upstream's own CPU engine (``sgl_kernel``).
    ``SGLANG_PLATFORM`` is upstream's; naming us there on a machine with an accelerator is refused by upstream.
    """
    import os

    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator() != torch.device("cpu"):
        return None
    return "sglang_kevlar.platform.cpu.TorchCpuPlatform"
