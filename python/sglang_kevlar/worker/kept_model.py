"""The weights of a rank's shard, which outlive its epochs.

They are loaded before the rank is part of one: upstream's own constructor runs as far as that, over groups that cannot
speak yet (`communicators.unbound`). What it loaded is handed to the scheduler of each epoch in place of a load.
Pools are not kept: they are given back and made anew, which sizes them by upstream's rule.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

import sglang.srt.managers.scheduler as upstream
import torch
from sglang.srt.distributed import bootstrap
from sglang.srt.model_executor import model_runner
from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank

from sglang_kevlar.worker import communicators, weight_cache
from sglang_kevlar.worker.weights.messages import WRITERS, FetchWeightsReq

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

#: after which the weights are no longer those that a load would give, or may not be there
_CHANGES = (*WRITERS, FetchWeightsReq)

_GB = 1 << 30


class _Loaded(Exception):
    """Ends upstream's constructor once the weights are there."""


class _AsFarAsWeights(upstream.Scheduler):  # type: ignore[misc]
    """Without what belongs to an epoch."""

    def init_soft_watchdog(self) -> None: ...

    def init_metrics_collector(self) -> None: ...

    def init_ipc_channels(self, port_args: Any) -> None: ...

    def init_idle_sleeper(self) -> None: ...

    def init_tokenizer(self) -> None: ...


class _NoPorts:
    nccl_port = 0


class KeptModel:
    """Stands in for the function by which upstream's model runner loads a model."""

    def __init__(self) -> None:
        self._load = model_runner.load_model_with_memory_saver
        self._kept: Any = None
        #: what it was made over, or was bound to last
        self._groups: dict[str, communicators.Group] = {}
        self._preloading = False
        self._free = bootstrap.get_available_gpu_memory
        model_runner.load_model_with_memory_saver = self._take
        bootstrap.get_available_gpu_memory = self._free_before_load

    def load(self, server_args: ServerArgs, gpu_id: int, tp_rank: int, pp_rank: int) -> None:
        began = time.monotonic()
        world_rank = spawn_world_rank(server_args, tp_rank=tp_rank, pp_rank=pp_rank)
        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, dp_rank=None, gpu_id=gpu_id))
        upstream.configure_scheduler_process(server_args, gpu_id)
        self._preloading = True
        try:
            with communicators.unbound(world_rank, server_args.tp_size * server_args.pp_size):
                _AsFarAsWeights(server_args, _NoPorts())
        except _Loaded:
            pass
        finally:
            self._preloading = False
        assert self._kept is not None
        self.unbind()
        communicators.release()
        communicators.finish()
        logger.info("Weights are loaded, %.2f s; waiting for the other ranks.", time.monotonic() - began)

    def unbind(self) -> None:
        """Let go of the groups of an epoch, which is what closes them for others."""
        if self._kept is not None:
            self._groups = communicators.unbind(self._kept.model, self._groups)

    def observe(self, messages: list[Any]) -> None:
        """Called with everything that the scheduler receives, before it acts on it."""
        if self._kept is not None and any(isinstance(message, _CHANGES) for message in messages):
            logger.info("Weights may change now: those of the next epoch are loaded again.")
            self._kept = None

    def _free_before_load(
        self, device: str, gpu_id: int, distributed: bool = False, empty_cache: bool = True, cpu_group: Any = None
    ) -> float:
        """GB. Upstream measures it before a load, and leaves a part of it free beside the pool; so it has to be as if
        nothing were loaded yet. With all ranks it is the least, of which some may have kept nothing. What a weight
        cache daemon holds, upstream adds itself."""
        own = self._kept is not None and not weight_cache.holds(self._kept)
        kept = size(self._kept.model) if own else 0
        here = torch.tensor(self._free(device, gpu_id, empty_cache=empty_cache) * _GB + kept, dtype=torch.float32)
        if distributed:
            torch.distributed.all_reduce(here, op=torch.distributed.ReduceOp.MIN, group=cpu_group)
        return here.item() / _GB

    def _take(self, **how: Any) -> Any:
        if how["is_draft_worker"]:
            return self._load(**how)
        if self._kept is None:
            self._kept = self._load(**how)
        else:
            communicators.rebind(self._kept.model, self._groups, communicators.groups())
        self._groups = communicators.groups()
        if self._preloading:
            raise _Loaded
        return self._kept


def size(model: torch.nn.Module) -> int:
    """Bytes of its weights, tied ones once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def why_not(server_args: ServerArgs, device_asked_for: bool) -> str | None:
    """Why ranks with these arguments cannot outlive an epoch; None: they can.

    ``device_asked_for``: whether the operator wants it on other devices than a CPU, where not all of it has been shown.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.utils import cpu_has_amx_support, is_host_cpu_arm64

    args = resolving_view(server_args)
    on_cpu = args.device == "cpu"
    reasons = {
        "not all of it was shown on such a device (--reform on asks for it)": not on_cpu and not device_asked_for,
        "all-reduces through shared memory are for the life of a process": on_cpu
        and args.tp_size > 1
        and (cpu_has_amx_support() or is_host_cpu_arm64()),
        "--enable-dp-attention": args.enable_dp_attention,
        "--dp-size": args.dp_size > 1,
        "--ep-size": args.ep_size > 1,
        "--enable-lora changes the model's modules": bool(args.enable_lora),
        "a draft model": args.speculative_algorithm is not None,
        "--enable-hierarchical-cache": args.enable_hierarchical_cache,
        "--enable-memory-saver": args.enable_memory_saver,
        "--cpu-offload-gb": args.cpu_offload_gb > 0,
        "--enable-torch-compile": args.enable_torch_compile,
        "--disaggregation-mode": args.disaggregation_mode != "null",
        "--enable-pdmux": args.enable_pdmux,
        "an elastic EP backend": args.elastic_ep_backend is not None,
        "another load format than of files": args.load_format not in ("auto", "safetensors", "pt", "dummy"),
    }
    if not on_cpu:
        reasons |= _why_not_on_device(args)
    return next((reason for reason, holds in reasons.items() if holds), None)


def _why_not_on_device(args: Any) -> dict[str, bool]:
    """Graphs and kernels that cannot be given up. NCCL's can, so what goes past it has to be off."""
    from sglang.srt.environ import envs

    alone = args.tp_size * args.pp_size == 1
    between_ranks = {
        "kernels of custom all-reduce wait for a dead rank for ever (--disable-custom-all-reduce)": (
            not args.disable_custom_all_reduce
        ),
        "fused all-reduces wait for a dead rank for ever (--enforce-disable-flashinfer-allreduce-fusion)": (
            args.flashinfer_allreduce_fusion_backend is not None
        ),
        "--enable-mscclpp": args.enable_mscclpp,
        "--enable-torch-symm-mem": args.enable_torch_symm_mem,
        "--enable-symm-mem registers memory with communicators for the life of a process": args.enable_symm_mem,
        "--pre-warm-nccl": args.pre_warm_nccl,
        "TORCH_DISTRIBUTED_DEBUG=DETAIL has torch end a process whose peer is gone": (
            os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL"
        ),
        "SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM hides when a pass has ended": (
            envs.SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM.get()
        ),
        "--enable-tp-lm-head-all-to-all": args.enable_tp_lm_head_all_to_all,
        "SGLANG_ENABLE_PCIE_IPC_ALLREDUCE": envs.SGLANG_ENABLE_PCIE_IPC_ALLREDUCE.get(),
    }
    return {
        "a device that is not of CUDA": args.device != "cuda",
        "graphs of torch.compile stay in the model (--cuda-graph-backend-prefill, --cuda-graph-backend-decode)": (
            "tc_piecewise" in (args.cuda_graph_config.prefill.backend, args.cuda_graph_config.decode.backend)
        ),
        **({} if alone else between_ranks),
    }
