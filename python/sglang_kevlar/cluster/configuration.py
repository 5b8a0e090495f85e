"""What a launch has to have in common with others that serve the same requests (imports sglang)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import msgspec
from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs

from sglang_kevlar import __version__
from sglang_kevlar.cluster import fingerprint
from sglang_kevlar.protocol.cluster import Configuration, clip
from sglang_kevlar.protocol.launch import KevlarArgs

#: Flags in which groups of one server may differ: where things are, what room there is, what is logged and measured,
#: what the frontend does with them. Everything else must be equal.
_MAY_DIFFER = """
    model_path tokenizer_path revision download_dir weight_loader_disable_mmap weight_loader_prefetch_checkpoints
    weight_loader_prefetch_num_threads weight_loader_drop_cache_after_load custom_weight_loader
    weight_cache_socket weight_cache_timeout
    model_loader_extra_config chat_template hf_chat_template_name completion_template trust_request_chat_template
    mem_fraction_static max_running_requests max_queued_requests max_total_tokens chunked_prefill_size
    max_prefill_tokens prefill_max_requests schedule_conservativeness cpu_offload_gb cuda_graph_config
    cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_bs_decode cuda_graph_bs_prefill device
    base_gpu_id gpu_id_step numa_node nccl_port dist_timeout dist_init_addr nnodes node_rank gated_launch_port
    enable_p2p_check
    watchdog_timeout soft_watchdog_timeout sleep_on_idle gc_threshold gc_warning_threshold_secs host port
    fastapi_root_path skip_server_warmup warmups enable_http2 http2_max_concurrent_streams
    http2_initial_connection_window_size ssl_keyfile ssl_certfile ssl_ca_certs ssl_keyfile_password
    enable_ssl_refresh api_key admin_api_key served_model_name file_storage_path tokenizer_worker_num
    detokenizer_worker_num log_level log_level_http log_requests log_requests_level log_requests_format
    log_requests_target uvicorn_access_log_exclude_prefixes crash_dump_folder show_time_cost decode_log_interval
    enable_request_time_stats_logging enable_metrics enable_mfu_metrics enable_metrics_for_all_schedulers
    load_snapshot_publish_interval tokenizer_metrics_custom_labels_header tokenizer_metrics_allowed_custom_labels
    extra_metric_labels bucket_time_to_first_token bucket_inter_token_latency bucket_e2e_request_latency
    prompt_tokens_buckets generation_tokens_buckets smg_http_sidecar_port load_publish_endpoint
    enable_forward_pass_metrics forward_pass_metrics_worker_id forward_pass_metrics_ipc_name enable_trace
    trace_modules otlp_traces_endpoint otlp_service_name export_metrics_to_file export_metrics_to_file_dir
    stat_loggers
""".split()  # noqa: SIM905 - a list of that would be a page long
#: have a field of their own, from what the model is and not only from what was said
_OWN_FIELD = frozenset(
    ["tp_size", "pp_size", "dtype", "quantization", "kv_cache_dtype", "page_size", "context_length", "lora_paths"]
)

#: ours that all ranks of a group must have in common
_KEVLAR_OF_A_GROUP = (
    "standby_groups",
    "shadow_memory",
    "shadow_min_context",
    "shadow_transport",
    "shadow_audit",
    "hang_timeout",
    "hang_per_ktoken",
    "start_timeout",
    "control_timeout",
    "allow_chaos",
)

_NOT_COMPARED = frozenset((*_MAY_DIFFER, *_OWN_FIELD))


#: Flags in which the nodes of one group may differ, too: where things are on a host, and what is logged there. In all
#: else their ranks must not: they decide in step with each other.
_OF_A_NODE = """
    model_path tokenizer_path download_dir weight_loader_disable_mmap weight_loader_prefetch_checkpoints
    weight_loader_prefetch_num_threads weight_loader_drop_cache_after_load weight_cache_socket
    base_gpu_id gpu_id_step numa_node nccl_port
    dist_init_addr node_rank gated_launch_port host port fastapi_root_path ssl_keyfile ssl_certfile ssl_ca_certs
    ssl_keyfile_password api_key admin_api_key file_storage_path log_level log_level_http log_requests
    log_requests_level log_requests_format log_requests_target crash_dump_folder show_time_cost decode_log_interval
    export_metrics_to_file_dir
""".split()  # noqa: SIM905 - a list of that would be a page long


def of_node(server_args: ServerArgs, common: Configuration, kevlar: KevlarArgs) -> Configuration:
    """What the nodes of one group must have in common. ``common``: that with other groups."""
    view = resolving_view(server_args)
    shown = {field: clip(str(getattr(kevlar, field))) for field in _KEVLAR_OF_A_GROUP}
    flags = _flags(lambda name: getattr(view, name), but=frozenset((*_OF_A_NODE, *_OWN_FIELD)))
    return msgspec.structs.replace(common, other={**common.other, **flags, **shown})


def of(server_args: ServerArgs) -> Configuration:
    """Of a launch whose arguments are resolved. Raises OSError when the model's files cannot be read."""
    view = resolving_view(server_args)
    model = model_config_of(server_args)
    other = _flags(lambda name: getattr(view, name), _NOT_COMPARED)
    if view.tokenizer_path not in (None, server_args.model_path):
        other["tokenizer"] = _digest(view.tokenizer_path, server_args.revision, model)
    adapters = {ref.lora_name: ref.lora_id for ref in view.lora_paths or ()}
    return Configuration(
        version=__version__,
        upstream=version("sglang"),
        model=clip(", ".join(model.hf_config.architectures or ("unknown",))),
        model_digest=_digest(server_args.model_path, server_args.revision, model),
        tp=view.tp_size,
        pp=view.pp_size,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=view.quantization,
        kv_cache_dtype=view.kv_cache_dtype,
        page_size=view.page_size or 1,
        context_length=model.context_len,
        other=other | ({"lora_paths": clip(repr(adapters))} if adapters else {}),
    )


def _digest(path: str, revision: str | None, model: Any) -> str:
    if os.path.isdir(path):
        return fingerprint.of_directory(path)
    # Of a hub: its files may not be here yet, and a revision names them.
    described = json.dumps([path, revision, model.hf_config.to_dict()], sort_keys=True, default=str)
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _flags(value_of: Callable[[str], Any], but: frozenset[str]) -> dict[str, str]:
    """Those that differ from upstream's defaults, which both sides have in common: they are of one version."""
    found = {}
    for field in ServerArgs.__struct_fields__:
        if field.startswith("_") or field in but:
            continue
        value = value_of(field)
        if value not in (None, False, "", (), []):
            found[field] = clip(repr(value))
    return found
