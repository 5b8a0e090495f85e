"""The support matrix of SGLang's flags: what is refused and why, and what is served with a remark.

Every other flag of a supported version (``upstream/flags_...txt``) passes through with its meaning. A row
for a flag that the installed version does not have is for another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec


class Refused(msgspec.Struct, frozen=True):
    """A flag, the values that are refused, and the reason the operator is given."""

    field: str
    #: the values, in words, for the table
    when: str
    applies: Callable[[Any], bool]
    reason: str


def _set(field: str, reason: str) -> Refused:
    return Refused(field, "set", lambda value: bool(value), reason)


def _above(field: str, limit: int, reason: str) -> Refused:
    return Refused(field, f"above {limit}", lambda value: value is not None and value > limit, reason)


def _other_than(field: str, allowed: tuple[str | None, ...], reason: str) -> Refused:
    words = " or ".join(repr(value) for value in allowed if value is not None)
    return Refused(field, f"other than {words}", lambda value: value not in allowed, reason)


def _one_of(field: str, values: tuple[str, ...], reason: str) -> Refused:
    return Refused(field, " or ".join(repr(value) for value in values), lambda value: value in values, reason)


_REPLICAS = "worker groups are the replicas here, and fail over to each other; use --worker-groups"
_JOINS = (
    "a worker group over several hosts is one that joins: `launch_worker_group --join ... --nnodes`, where it is served"
)
_GRPC = "requests that do not come through the HTTP server have no journal and could not be continued"
_PD = "a group prefills and decodes; prefill-decode disaggregation moves KV outside our journal"
_ENCODER = "encoder disaggregation is for multimodal models, which are not served"
_ELASTIC = "an elastic expert-parallel group changes its own membership, which would contradict the supervisor's"
_CONTEXT_PARALLEL = "the KV of one request is spread over ranks; not tested through a failover"
_MEMORY_SAVER = "a restarted group would come back with its memory occupied, unlike the others"
_PORT = "every group would bind the same port"
_SIDE_OUTPUT = "what was computed for tokens before a failover would be missing or doubled in the answer"
_MEGAKERNEL = "experimental in SGLang, and takes some steps away from the forward pass we resume by; not tested"
_WATERMARK = "the mark depends on the tokens before; that a continued answer goes on with it is not tested"
_SESSION = "a session lives in one scheduler and dies with it"
_CACHE_BACKEND = "an external cache that several groups and their restarts share is not tested"
_DEBUG_FILES = "all groups would write the same files; debug with --stock"

REFUSED: tuple[Refused, ...] = (
    _above("dp_size", 1, _REPLICAS),
    Refused("enable_dp_attention", "set", bool, "data-parallel attention needs --dp-size; " + _REPLICAS),
    _above("attn_dp_size", 1, "data-parallel attention has a scheduler for each of its parts; " + _REPLICAS),
    _above("nnodes", 1, _JOINS),
    _above("node_rank", 0, _JOINS),
    _set("dist_init_addr", "every start of every group has a rendezvous of its own; " + _JOINS),
    _set("nccl_port", "every start of every group picks a free port of its own"),
    _set("gated_launch_port", _PORT),
    _above("tokenizer_worker_num", 1, "the journal is in one frontend process"),
    _set("enable_http_worker_reuseport", "it is for several tokenizer workers; the journal is in one frontend process"),
    _above("detokenizer_worker_num", 1, "a worker group has one detokenizer; use more groups"),
    _set("skip_tokenizer_init", "the journal reads what the detokenizer sends"),
    _set("smg_grpc_mode", _GRPC),
    _set("grpc_mode", _GRPC),
    _set("grpc_port", _GRPC),
    _set("sidecar", "it is a client of the gRPC server, which is not served"),
    _set("enable_http2", "errors in a stream are put right by an ASGI layer that is tested with uvicorn only"),
    _set("use_ray", "processes are started and watched by our supervisors, not by Ray"),
    _other_than("disaggregation_mode", ("null", None), _PD),
    _set("enable_pd_role_switch", _PD),
    _set("enable_pdmux", "it replaces the scheduler's event loop; not tested"),
    _set("encoder_only", _ENCODER),
    _set("language_only", _ENCODER),
    _set("encoder_urls", _ENCODER),
    _set("encoder_register_urls", _ENCODER),
    _set("enable_adaptive_dispatch_to_encoder", _ENCODER),
    _set("enable_multimodal", "images, video and audio reach a scheduler in shared memory that is read once"),
    _other_than("moe_a2a_backend", ("none", None), "not tested through the death of a rank"),
    _set("enable_megamoe_for_layernorm_sp", "not tested through the death of a rank"),
    _set("enable_eplb", "experts that move between ranks while serving are not tested"),
    _set("elastic_ep_backend", _ELASTIC),
    _set("enable_elastic_expert_backup", _ELASTIC),
    _set("ep_join_mode", _ELASTIC),
    _set("max_ep_size", _ELASTIC),
    _above("attn_cp_size", 1, _CONTEXT_PARALLEL),
    _above("dcp_size", 1, _CONTEXT_PARALLEL),
    _set("enable_prefill_cp", _CONTEXT_PARALLEL),
    _set("enable_cp_tp_group_sharing", _CONTEXT_PARALLEL),
    _set("enable_kv_cache_sharding", _CONTEXT_PARALLEL),
    _above("moe_dp_size", 1, "not tested through a failover"),
    _above("dwdp_size", 1, "not tested through a failover"),
    _set("speculative_algorithm", "resuming a request between draft and verification is not tested"),
    _other_than("decoupled_spec_role", ("null", None), "speculative decoding is not served"),
    _set("dllm_algorithm", "a diffusion model does not append tokens, so delivered ones cannot be continued from"),
    _set("enable_hisparse", "its host-side KV is not rebuilt by a resume"),
    _set("enable_nvidia_megakernel", _MEGAKERNEL),
    _set("enable_amd_monokernel", _MEGAKERNEL),
    _set("enable_watermark", _WATERMARK),
    _set("watermark_config", _WATERMARK),
    _set("enable_streaming_session", _SESSION),
    _set("enable_session_radix_cache", _SESSION),
    _set("enable_return_hidden_states", _SIDE_OUTPUT),
    _set("return_hidden_states_mode", _SIDE_OUTPUT),
    _set("enable_return_aux_hidden_states", _SIDE_OUTPUT),
    _set("enable_return_routed_experts", _SIDE_OUTPUT),
    _set("enable_return_indexer_topk", _SIDE_OUTPUT),
    _set("enable_memory_saver", _MEMORY_SAVER),
    _set("enable_weights_cpu_backup", _MEMORY_SAVER),
    _set("enable_draft_weights_cpu_backup", _MEMORY_SAVER),
    _set("checkpoint_engine_wait_weights_before_ready", "a restarted group would wait for weights nobody sends again"),
    _other_than(
        "weight_cache_mode",
        ("off", "client", None),
        "such daemons end with SGLang's own launcher; start them by `python -m sglang.srt.weight_cache.daemon`, which "
        "outlives worker groups, and use client",
    ),
    _set("delete_ckpt_after_loading", "a restarted group has to load the checkpoint again"),
    _set("remote_instance_weight_loader_start_seed_via_transfer_engine", _PORT),
    _one_of("load_format", ("remote_instance",), "the seed's ports are for one loader, and gone when a group restarts"),
    _set("modelopt_checkpoint_save_path", "all groups would write the same files; do it once with --stock"),
    _set("modelopt_export_path", "all groups would write the same files; do it once with --stock"),
    _set("kv_events_config", _PORT),
    Refused("load_publish_endpoint", "set", lambda value: value not in (None, "", "off"), _PORT),
    _set("enable_forward_pass_metrics", "its consumers expect one engine behind the endpoint"),
    _set("forward_pass_metrics_ipc_name", "its consumers expect one engine behind the endpoint"),
    _set("enable_unified_cache_external_linker", _CACHE_BACKEND),
    _set("enable_lmcache", _CACHE_BACKEND),
    _set("enable_flexkv", _CACHE_BACKEND),
    _set("debug_tensor_dump_output_folder", _DEBUG_FILES),
    _set("debug_tensor_dump_input_file", _DEBUG_FILES),
    _set("msprobe_dump_config", _DEBUG_FILES),
    _other_than("device", ("cuda", "cpu", None), "worker groups are made for CUDA and CPU only"),
)

#: Environment variables that select what the flags above refuse.
REFUSED_ENVIRONMENT: dict[str, str] = {
    "SGLANG_RUST_SERVER": "the Rust server answers clients from inside a scheduler and dies with it",
    "DUMPER_SERVER_PORT": "whoever reaches the port can run code in a rank (CVE-2026-111391); debug with --stock",
    "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": "every start of every group has a rendezvous of its own",
}

_RANKS = "When a rank dies, its group forms again around the others (`--reform`), or all of its ranks start anew."
#: Served, and this is good to know.
REMARKS: dict[str, str] = {
    "tp_size": _RANKS,
    "pp_size": _RANKS,
    "ep_size": "Inside a group, over its tensor-parallel ranks. Fails over by recomputation; "
    "tested with one rank only.",
    "base_gpu_id": "First device of group 0; the groups follow each other.",
    "gpu_id_step": "Between the ranks of a group, and from one group to the next.",
    "numa_node": "One entry for each device of all groups, by device index.",
    "random_seed": "Drawn once at launch: all groups and restarts have the same.",
    "disable_radix_cache": "A moved request is computed again from its first token.",
    "disable_overlap_schedule": "Needed only where a custom logit processor reads the output so far; penalties are "
    "exact with overlap too.",
    "enable_deterministic_inference": "Makes seeded sampling exact across a failover; without it SGLang "
    "ignores `sampling_seed`.",
    "chunked_prefill_size": "With deterministic inference over Triton or FlashInfer at least 4096: SGLang never begins "
    "a prompt that is longer than a smaller one, nor what waits behind it (sgl-project/sglang#36344).",
    "dtype": "float32 is exact. In bf16 and fp16 a moved request goes on as it would have only with the shadow, and "
    "not when it has to be prefilled again: prefill and decode round differently.",
    "kv_cache_dtype": "Of all groups: the shadow is of this type. fp8 needs CUDA (or AMX), and is not tested. fp4, "
    "and fp8 on a CPU, are not shadowed: moved requests are computed again.",
    "enable_lora": "Adapters loaded at run time are loaded again into a restarted group.",
    "lora_paths": "Ids are the same in all groups.",
    "enable_custom_logit_processor": "A processor sees all tokens of a moved request; what it keeps elsewhere is lost.",
    "is_embedding": "Requests are run again on another group.",
    "enable_mis": "Score requests are run again on another group.",
    "max_running_requests": "For each group.",
    "max_queued_requests": "For each group. Requests that wait for a group are bounded by `--hold-queue`.",
    "max_total_tokens": "For each group.",
    "mem_fraction_static": "For each group, of its devices.",
    "cpu_offload_gb": "For each group.",
    "enable_paged_experts": "The experts that are paged lie in pinned host memory of each group. Not tested.",
    "hicache_size": "For each group.",
    "hicache_ratio": "For each group.",
    "hicache_host_memory_fraction": "Each group takes this fraction of what is available when it starts: "
    "divide it by the number of groups.",
    "enable_hierarchical_cache": "Each group has its own; it is empty after a restart. Needs CUDA. "
    "What only the host tier has is not shadowed.",
    "hicache_storage_backend": "Shared by all groups; keys are SGLang's.",
    "load_format": "With `presharded`, make the shards once with `--stock`: groups that start together would all "
    "write them.",
    "stream_interval": "Also how often a streaming request is journalled: at a failover, tokens not yet reported "
    "are computed again.",
    "watchdog_timeout": "Ends the group, which is restarted, not the server. `--hang-timeout` detects hangs sooner.",
    "soft_watchdog_timeout": "In each group.",
    "weight_cache_mode": "`client`: each rank, and each spare, maps the weights of the daemon of its device. When that "
    "dies, the ranks that map it end at once, and with them their group. Weights cannot be changed at run time.",
    "weight_cache_socket": "Of one rank; left out, each finds the daemon of its device.",
    "weight_version": "A request is not continued on another version of the weights.",
    "enable_metrics": "SGLang's metrics of a group carry its number as a label.",
    "extra_metric_labels": "In all groups.",
    "crash_dump_folder": "Dumped when the frontend crashes.",
    "enable_response_store": "Kept in the frontend: lost when the frontend dies.",
    "served_model_name": "The same for all groups.",
    "log_requests": "Prompts are logged as SGLang does; our own log lines never contain them.",
    "enable_strict_thinking": "Not tested through a failover.",
    "mamba_backend": "Models with recurrent state resume by recomputation; not tested.",
}
