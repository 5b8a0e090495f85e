"""The out-of-tree CPU platform: what upstream asks a platform for, answered with plain torch."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import SRTPlatform

logger = logging.getLogger(__name__)

#: KV slots without --max-total-tokens. Unbounded, every rank would take most of the machine's memory, and several
#: groups that start together each believe it to be free. Upstream still takes less if the model leaves less.
DEFAULT_MAX_TOTAL_TOKENS = 65_536
#: Requests in a batch without --max-running-requests. Upstream takes 2,048 or more and allocates that many rows of the
#: context length (134 MB at 16,384 positions); torch_native attention goes through a batch one request at a time.
DEFAULT_MAX_RUNNING_REQUESTS = 256

_ATTENTION = "torch_native"


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]  # mypy does not follow sglang
    """CPU without ``sgl_kernel``: torch_native attention, forward_native of every fused op, gloo."""

    def __init__(self) -> None:
        # Before upstream's `@torch.compile` decorators run, which read it. Compiling needs a C++ compiler, and holds
        # the first request up for half a minute (tp ranks, seeded sampling, penalties).
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

    def is_out_of_tree(self) -> bool:
        # The mixin says CPU; only out-of-tree platforms are asked for their classes and backends.
        return True

    def get_device(self, local_rank: int | None = 0) -> Any:
        # Resolving the flags asks without a rank, and wants the name.
        return "cpu" if local_rank is None else super().get_device(local_rank)

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        return False

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open. Runs in the process that resolves the flags."""
        if server_args.device not in (None, "cpu"):
            return
        from sglang.srt.arg_groups import choices

        # Upstream refuses other backends with --enable-deterministic-inference. torch_native computes a request by
        # itself, the prefix again with the rest, so neither batching nor a radix hit shows in it.
        for names in (
            choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
            choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
        ):
            if _ATTENTION not in names:
                names.append(_ATTENTION)

        # By now upstream has filled in the backend of its own CPU engine, whose kernels are not there.
        if server_args.attention_backend in (None, "intel_amx") and not (
            server_args.prefill_attention_backend or server_args.decode_attention_backend
        ):
            server_args.attention_backend = _ATTENTION
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_MAX_TOTAL_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
        # A flag without a negative form. The sleep is a poll of the request sockets: a request ends it at once.
        server_args.sleep_on_idle = True
        if server_args.lora_backend != "torch_native":
            if server_args.enable_lora or server_args.lora_paths:
                logger.warning("--lora-backend %s needs Triton; torch_native is used", server_args.lora_backend)
            server_args.lora_backend = "torch_native"

    def init_backend(self) -> None:
        """Called when upstream imports `model_runner`, also in a stock server.

        Too late for tp or pp > 1, where threads are bound before: our ranks register by `upstream.plugin`.
        """
        from sglang_kevlar.platform.hooks import register_cpu_hooks

        register_cpu_hooks()

    def get_default_attention_backend(self) -> str:
        return _ATTENTION

    def get_kv_pool_cls(self, *, kind: str) -> Any:
        """Instead of the next two from 0.5.22 on, and for all kinds whatever the model is. None: upstream's own."""
        from sglang_kevlar.platform.mla_attention import NoSparsePool

        return NoSparsePool if kind == "dsa" else None

    def get_mha_kv_pool_cls(self) -> Any:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> Any:
        from sglang_kevlar.platform.mla_attention import build_pool

        return build_pool

    def get_paged_allocator_cls(self) -> Any:
        """Called with a page size by keyword, for page size 1 too."""
        from sglang_kevlar.platform.allocator import build_allocator

        return build_allocator

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"
