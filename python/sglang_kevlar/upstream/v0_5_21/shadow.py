"""Of the shadow, of weights that go from group to group, and of those of a weight cache daemon."""

from __future__ import annotations

from sglang_kevlar.upstream.contract import Seam
from sglang_kevlar.upstream.declare import FRONTEND, RANK, SPEAKERS, methods, seam

_SCHEDULER = "srt.managers.scheduler:Scheduler"
_REQ = "srt.managers.schedule_batch:Req"
_BATCH = "srt.managers.schedule_batch:ScheduleBatch"
_TREE = "srt.mem_cache.unified_radix_cache:UnifiedRadixCache"
_TREE_CORE = "srt.mem_cache.unified_cache.unified_tree_core_interface:UnifiedTreeCoreInterface"
_POOL = "srt.mem_cache.memory_pool:"

SEAMS: tuple[Seam, ...] = (
    seam(
        _SCHEDULER,
        RANK,
        fields="request_receiver tree_cache req_to_token_pool token_to_kv_pool_allocator page_size server_args "
        "disable_radix_cache is_generation spec_algorithm device forward_stream schedule_stream enable_overlap "
        "weight_updater _engine_paused",
    ),
    *methods(
        _SCHEDULER,
        RANK,
        init_request_receiver="",
        process_batch_result="batch result",
        flush_cache="empty_cache",
    ),
    seam(
        "srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager",
        RANK,
        fields="offload_tags _session",
    ),
    seam(
        "srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager._select_runners",
        RANK,
        signature="self selector",
    ),
    seam("srt.constants:GPU_MEMORY_TYPE_WEIGHTS", FRONTEND + RANK),
    # A weight cache daemon's: who must not write to them, what they take, and how its death is noticed.
    seam("srt.runtime_context:get_model", FRONTEND + RANK, signature=""),
    seam("srt.model_loader.loader:BaseModelLoader", RANK, fields="preloaded_weights_bytes"),
    seam(
        "srt.weight_cache.ipc_loader:IpcModelLoader._start_daemon_liveness_watchdog", RANK, signature="self daemon_pid"
    ),
    seam(
        "srt.weight_cache.ipc_loader:IpcModelLoader._fetch_from_cache",
        RANK,
        signature="self model_config device_config",
    ),
    seam("srt.weight_cache.protocol:get_socket_path", RANK, passes="device_uuid"),
    seam("srt.weight_cache.protocol:recv_msg", RANK, passes="sock"),
    seam("srt.weight_cache.protocol:send_msg", RANK, passes="sock obj"),
    seam("srt.platforms:current_platform", RANK),
    seam("srt.lora.layers:BaseLayerWithLoRA", RANK),
    seam("srt.managers.io_struct:BaseReq", SPEAKERS + RANK),
    # What may write to the weights.
    *(
        seam(f"srt.managers.io_struct:{kind}", RANK)
        for kind in (
            "BeginWeightUpdateReqInput",
            "CheckWeightsReqInput",
            "EndWeightUpdateReqInput",
            "ReleaseMemoryOccupationReqInput",
            "ResumeMemoryOccupationReqInput",
            "UpdateWeightFromDiskReqInput",
            "UpdateWeightsFromDistributedReqInput",
            "UpdateWeightsFromIPCReqInput",
            "UpdateWeightsFromTensorReqInput",
        )
    ),
    seam("srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver", RANK),
    *methods("srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver", RANK, _pull_raw_reqs=""),
    seam(_BATCH, RANK, fields="prefix_lens extend_lens"),
    seam(
        _REQ,
        RANK,
        fields="extra_key cache_salt rid input_embeds positional_embed_overrides multimodal_inputs beam_group "
        "skip_radix_cache_insert session sampling_params kv",
    ),
    seam("srt.managers.io_struct:FlushCacheReqInput", RANK),
    seam(
        _POOL + "MHATokenToKVPool",
        RANK,
        fields="k_buffer v_buffer kv_cache_layout is_quantized_kv_cache quant_method dtype size",
    ),
    seam(_POOL + "MLATokenToKVPool", RANK, fields="kv_buffer dtype size"),
    seam(_POOL + "ReqToTokenPool", RANK, fields="req_to_token"),
    seam("srt.mem_cache.radix_cache:RadixKey", RANK, passes="token_ids extra_key cache_salt"),
    seam("srt.mem_cache.base_prefix_cache:MatchPrefixParams", RANK, passes="key"),
    seam("srt.mem_cache.base_prefix_cache:InsertParams", RANK, passes="key value prev_prefix_len"),
    seam("srt.mem_cache.base_prefix_cache:MatchResult", RANK, fields="device_indices last_device_node host_hit_length"),
    seam("srt.mem_cache.base_prefix_cache:IncLockRefResult.to_dec_params", RANK, signature="self"),
    seam("srt.mem_cache.common:evict_from_tree_cache", RANK, signature="tree_cache num_tokens"),
    seam("srt.mem_cache.allocator:BaseTokenToKVPoolAllocator.alloc", RANK, passes="need_size"),
    seam("srt.mem_cache.allocator:BaseTokenToKVPoolAllocator.get_kvcache", RANK, signature="self"),
    seam("srt.mem_cache.allocator:BaseTokenToKVPoolAllocator.available_size", RANK, signature="self"),
    seam(_SCHEDULER + ".is_fully_idle", RANK, passes="self"),
    seam(_TREE, RANK, fields="tree_core"),
    seam(_TREE + ".match_prefix", RANK, passes="params"),
    seam(_TREE + ".evictable_size", RANK, signature="self"),
    seam(_TREE + ".insert", RANK, passes="params"),
    seam(_TREE + ".inc_lock_ref", RANK, passes="node_id"),
    seam(_TREE + ".dec_lock_ref", RANK, passes="node_id params"),
    seam(_TREE + ".root_node_handle", RANK, passes="extra_key"),
    # Read-only, unlike match_prefix: ranks may call them in different steps.
    seam(_TREE_CORE + ".match_full_device_prefix", RANK, signature="self key"),
    seam(_TREE_CORE + ".collect_full_device_indices", RANK, signature="self from_node_id until_node_id"),
)
