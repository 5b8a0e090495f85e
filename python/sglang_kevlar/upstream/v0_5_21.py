"""Every class, method, field and constant of SGLang 0.5.21 that we rely on, by the process that uses it.

``signature`` where upstream calls what we overrode or replaced, ``passes`` where we call, ``fields`` what we read or
set on an object. An empty name is the module itself.
"""

from __future__ import annotations

from sglang_kevlar.upstream.contract import Role, Seam

#: files in sglang_kevlar/patches/0.5.21
PATCHES: tuple[str, ...] = ("0001-ollama-last-text.patch", "0002-tool-call-in-one-step.patch")

_PREPARE: tuple[Role, ...] = ("prepare",)
_FRONTEND: tuple[Role, ...] = ("frontend",)
_GATEWAY: tuple[Role, ...] = ("gateway",)
#: both speak to groups
_SPEAKERS: tuple[Role, ...] = ("frontend", "gateway")
_RANK: tuple[Role, ...] = ("rank",)
_DETOKENIZER: tuple[Role, ...] = ("detokenizer",)
_SERVING: tuple[Role, ...] = ("frontend", "rank", "detokenizer")
_ALL: tuple[Role, ...] = ("prepare", "frontend", "rank", "detokenizer")
_CPU: tuple[Role, ...] = ("cpu",)


def _seam(
    target: str,
    roles: tuple[Role, ...],
    *,
    signature: str | None = None,
    passes: str = "",
    fields: str = "",
    equals: str | int | None = None,
) -> Seam:
    return Seam(
        target="sglang." + target,
        roles=roles,
        signature=None if signature is None else tuple(signature.split()),
        passes=tuple(passes.split()),
        fields=tuple(fields.split()),
        equals=equals,
    )


def _methods(cls: str, roles: tuple[Role, ...], **signatures: str) -> tuple[Seam, ...]:
    """Methods that we override: upstream calls them with these parameters."""
    return tuple(_seam(f"{cls}.{name}", roles, signature=f"self {names}") for name, names in signatures.items())


_START = (
    _seam("srt.server_args:prepare_server_args", _PREPARE, signature="argv"),
    _seam("srt.server_args:ServerArgs", _PREPARE, fields="resolve_once check_server_args add_cli_args __reduce__"),
    _seam(
        "srt.server_args:ServerArgs",
        _PREPARE,
        fields="tokenizer_path revision quantization kv_cache_dtype page_size lora_paths random_seed",
    ),
    _seam("srt.server_args:ServerArgs", _ALL, fields="host port model_path tp_size pp_size"),
    _seam("srt.arg_groups.overrides:resolving_view", _PREPARE + _RANK, signature="server_args"),
    _seam("srt.arg_groups.model_override_base:model_config_of", _PREPARE, signature="server_args"),
    _seam(
        "srt.configs.model_config:ModelConfig",
        _PREPARE,
        fields="is_multimodal hf_config model_path dtype context_len",
    ),
    _seam("srt.entrypoints.engine:_set_envs_and_config", _PREPARE, signature="server_args"),
    _seam("srt.parser.template_detection:resolve_auto_parsers", _PREPARE, signature="server_args"),
    _seam("srt.utils:configure_logger", _PREPARE + _GATEWAY, passes="server_args prefix"),
    _seam("srt.plugins:load_plugins", _ALL, signature=""),
    _seam("srt.plugins.hook_registry:HookRegistry", _ALL, fields="_hooks _patched"),
    _seam("srt.plugins.hook_registry:HookRegistry.register", _ALL, passes="target hook hook_type"),
    _seam("srt.plugins.hook_registry:HookType", _ALL, fields="AFTER AROUND"),
    _seam("srt.utils:set_ulimit", _RANK + _DETOKENIZER, passes=""),
    # Of groups on several hosts: which ranks are on which (`LaunchPlan.ranks`), where they meet, by which address.
    _seam("srt.entrypoints.engine:_calculate_rank_ranges", _PREPARE, signature="node_rank"),
    _seam("srt.distributed.bootstrap:_resolve_dist_init_method", _RANK, signature="dist_port"),
    _seam("srt.environ:Envs", _RANK, fields="SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"),
    _seam("srt.utils.network:get_local_ip_auto", _RANK, signature="fallback"),
)

#: what travels between hosts, besides requests and outputs (`cluster.wire`)
_ON_THE_WIRE = """
    GetInternalStateReq GetInternalStateReqOutput GetWeightsByNameReqInput GetWeightsByNameReqOutput
    CheckWeightsReqInput CheckWeightsReqOutput FlushCacheReqInput FlushCacheReqOutput PauseGenerationReqInput
    ContinueGenerationReqInput UpdateWeightFromDiskReqInput UpdateWeightFromDiskReqOutput
    UpdateWeightVersionReqInput UpdateWeightVersionReqOutput UpdateWeightsFromDistributedReqInput
    UpdateWeightsFromDistributedReqOutput InitWeightsUpdateGroupReqInput InitWeightsUpdateGroupReqOutput
    DestroyWeightsUpdateGroupReqInput DestroyWeightsUpdateGroupReqOutput BeginWeightUpdateReqInput
    BeginWeightUpdateReqOutput EndWeightUpdateReqInput EndWeightUpdateReqOutput ReleaseMemoryOccupationReqInput
    ReleaseMemoryOccupationReqOutput ResumeMemoryOccupationReqInput ResumeMemoryOccupationReqOutput
    LoadLoRAAdapterReqInput UnloadLoRAAdapterReqInput LoRAUpdateOutput SetInternalStateReq
    SetInternalStateReqOutput ProfileReq ProfileReqOutput ExpertDistributionReq ExpertDistributionReqOutput
    SlowDownReqInput SlowDownReqOutput FreezeGCReq ConfigureLoggingReq TokenizedGenerateReqInput
    TokenizedEmbeddingReqInput AbortReq BatchStrOutput BatchTokenIDOutput BatchEmbeddingOutput
""".split()  # noqa: SIM905 - a list of that would be a page long

_IPC = (
    _seam(
        "srt.server_args:PortArgs",
        _SERVING,
        signature="tokenizer_ipc_name scheduler_input_ipc_name detokenizer_ipc_name nccl_port rpc_ipc_name "
        "metrics_ipc_name tokenizer_worker_ipc_name decoupled_spec_ipc_config load_collector_ipc_name instance_id",
    ),
    _seam("srt.managers.io_struct:", _SERVING + _GATEWAY),
    *(_seam(f"srt.managers.io_struct:{name}", _SPEAKERS) for name in _ON_THE_WIRE),
    # Cut by frontend, a value for each request: `cluster.batches`; a test looks at every field.
    _seam("srt.managers.io_struct:BatchEmbeddingOutput", _SPEAKERS, fields="rids pooled_hidden_states"),
    _seam("srt.managers.io_struct:hook_custom_types", _SPEAKERS + _RANK),
    _seam("srt.managers.io_struct:sock_send", _SPEAKERS, signature="socket obj flags"),
    _seam("srt.managers.io_struct:sock_recv", _SPEAKERS, signature="socket flags"),
    _seam("srt.managers.io_struct:msgpack_decode", _SPEAKERS, signature="data"),
    _seam("srt.managers.io_struct:msgpack_encode", _FRONTEND, signature="obj"),
    _seam("srt.utils.msgpack_utils:enc_hook", _SPEAKERS, signature="obj"),
    _seam("srt.utils.msgpack_utils:dec_hook", _SPEAKERS, signature="tp obj"),
    _seam("srt.utils.msgpack_utils:ext_hook", _SPEAKERS, signature="code data"),
    _seam("srt.managers.io_struct:_USE_PICKLE_IPC", _SPEAKERS),
    _seam("srt.managers.io_struct:BaseReq", _FRONTEND + _RANK, fields="rid"),
    _seam(
        "srt.managers.io_struct:TokenizedGenerateReqInput",
        _FRONTEND + _RANK,
        fields="rid input_ids sampling_params stream session_params input_embeds positional_embed_overrides mm_inputs "
        "return_hidden_states lora_id extra_key cache_salt time_stats",
    ),
    _seam(
        "srt.managers.io_struct:TokenizedEmbeddingReqInput",
        _FRONTEND + _RANK,
        fields="rid input_ids lora_id mm_inputs time_stats",
    ),
    _seam("srt.managers.io_struct:BatchTokenizedGenerateReqInput", _FRONTEND + _RANK, fields="__iter__"),
    _seam("srt.managers.io_struct:BatchTokenizedEmbeddingReqInput", _FRONTEND + _RANK, fields="__iter__"),
    _seam("srt.managers.io_struct:AbortReq", _FRONTEND + _RANK, fields="rid finished_reason abort_message abort_all"),
    _seam(
        "srt.managers.io_struct:BatchStrOutput",
        _FRONTEND,
        fields="rids finished_reasons output_strs output_ids cached_tokens customized_info",
    ),
    _seam(
        "srt.managers.io_struct:BatchTokenIDOutput",
        _FRONTEND,
        fields="rids finished_reasons output_ids cached_tokens customized_info",
    ),
    _seam("srt.managers.io_struct:BatchEmbeddingOutput", _FRONTEND, fields="rids finished_reasons"),
    _seam("srt.managers.io_struct:GenerateReqInput", _FRONTEND, fields="rid input_ids sampling_params log_metrics"),
    _seam("srt.managers.io_struct:EmbeddingReqInput", _FRONTEND, fields="rid input_ids sampling_params log_metrics"),
    _seam("srt.managers.io_struct:PauseGenerationReqInput", _FRONTEND, fields="mode"),
    _seam(
        "srt.managers.io_struct:UpdateWeightFromDiskReqInput", _FRONTEND, fields="model_path load_format weight_version"
    ),
    _seam(
        "srt.managers.io_struct:UpdateWeightFromDiskReqOutput", _FRONTEND, fields="success message num_paused_requests"
    ),
    _seam("srt.managers.io_struct:LoadLoRAAdapterReqInput", _FRONTEND, fields="lora_name"),
    _seam("srt.managers.io_struct:LoadLoRAAdapterFromTensorsReqInput", _FRONTEND, fields="lora_name"),
    _seam("srt.managers.io_struct:UnloadLoRAAdapterReqInput", _FRONTEND, fields="lora_name"),
    _seam(
        "srt.managers.io_struct:InitWeightsUpdateGroupReqInput", _FRONTEND, fields="rank_offset world_size group_name"
    ),
    _seam("srt.managers.io_struct:DestroyWeightsUpdateGroupReqInput", _FRONTEND, fields="group_name"),
    _seam("srt.managers.io_struct:UpdateWeightsFromDistributedReqInput", _FRONTEND, fields="group_name"),
    _seam("srt.managers.io_struct:UpdateWeightVersionReqInput", _FRONTEND, fields="new_version"),
    *(
        _seam(f"srt.managers.io_struct:{name}", _FRONTEND)
        for name in (
            "BeginWeightUpdateReqInput",
            "ContinueGenerationReqInput",
            "EndWeightUpdateReqInput",
            "OpenSessionReqInput",
            "ShutdownReq",
            "UpdateWeightsFromIPCReqInput",
            "UpdateWeightsFromTensorReqInput",
        )
    ),
    _seam(
        "srt.sampling.sampling_params:SamplingParams",
        _FRONTEND + _RANK,
        fields="stream_interval max_new_tokens beam_width top_k min_new_tokens custom_params logit_bias",
    ),
)

_TOKENIZER_MANAGER = "srt.managers.tokenizer_manager:TokenizerManager"
_FRONTEND_SEAMS = (
    _seam("srt.entrypoints.http_server:app", _FRONTEND),
    _seam("srt.entrypoints.http_server:HEALTH_CHECK_TIMEOUT", _FRONTEND),
    _seam(
        "srt.entrypoints.http_server:_setup_and_run_http_server",
        _FRONTEND,
        passes="server_args tokenizer_manager template_manager port_args scheduler_infos subprocess_watchdog "
        "launch_callback",
    ),
    *(
        _seam(f"srt.entrypoints.http_server:{endpoint}", _FRONTEND)
        for endpoint in ("health_generate", "ready", "lifespan")
    ),
    _seam(
        "srt.entrypoints.engine:Engine._launch_subprocesses",
        _FRONTEND,
        passes="server_args init_tokenizer_manager_func run_scheduler_process_func run_detokenizer_process_func "
        "port_args",
    ),
    _seam(
        "srt.entrypoints.engine:Engine._launch_scheduler_processes",
        _FRONTEND,
        signature="cls server_args port_args run_scheduler_process_func placement_group",
    ),
    _seam(
        "srt.entrypoints.engine:Engine._launch_detokenizer_subprocesses",
        _FRONTEND,
        signature="cls server_args port_args run_detokenizer_process_func",
    ),
    _seam(
        "srt.entrypoints.engine:Engine",
        _FRONTEND,
        fields="tokenizer_manager loop shutdown",
    ),
    *_methods("srt.entrypoints.engine:Engine", _FRONTEND, _serialize_tensors_per_rank="tensors load_format"),
    _seam("srt.entrypoints.engine:SchedulerInitResult", _FRONTEND, passes="scheduler_infos wait_for_ready"),
    _seam(
        "srt.entrypoints.engine:init_tokenizer_manager",
        _FRONTEND,
        passes="server_args port_args TokenizerManagerClass",
    ),
    _seam(
        _TOKENIZER_MANAGER,
        _FRONTEND,
        passes="server_args port_args",
        fields="_result_dispatcher rid_to_state asyncio_tasks gracefully_exit server_status last_receive_tstamp "
        "is_generation enable_metrics load_snapshot_reader recv_from_detokenizer send_to_scheduler "
        "tokenizer_ipc_name event_loop _server_stop_hook enable_trace mm_processor is_pause",
    ),
    *_methods(
        _TOKENIZER_MANAGER,
        _FRONTEND,
        init_ipc_channels="port_args",
        init_communicators="",
        handle_loop="",
        generate_request="obj request",
        _dispatch_to_scheduler="obj",
        auto_create_handle_loop="",
        _async_dispatch_to_scheduler="obj",
        open_session="obj request",
        update_request_meta_info="meta_info state customized_info index finish_reason",
        _wait_for_model_update_from_disk="obj",
        sigterm_watchdog="",
        # Refused while weights go from group to group.
        begin_weight_update="obj request",
        end_weight_update="obj request",
        load_lora_adapter="obj _",
        load_lora_adapter_from_tensors="obj _",
        unload_lora_adapter="obj _",
        pause_generation="obj",
        update_weights_from_disk="obj request",
        update_weights_from_distributed="obj request",
        update_weights_from_ipc="obj request",
        update_weights_from_tensor="obj request",
    ),
    _seam(_TOKENIZER_MANAGER + "._update_weight_version_if_provided", _FRONTEND, signature="self weight_version"),
    _seam(_TOKENIZER_MANAGER + "._handle_batch_output", _FRONTEND, signature="self recv_obj"),
    _seam(_TOKENIZER_MANAGER + "._handle_abort_req", _FRONTEND, signature="self recv_obj"),
    _seam(_TOKENIZER_MANAGER + "._update_model_path_info", _FRONTEND, signature="self model_path load_format"),
    _seam(_TOKENIZER_MANAGER + ".config_value", _FRONTEND, signature="self name"),
    _seam("srt.managers.tokenizer_manager:ReqState.get_text", _FRONTEND, signature="self"),
    _seam("srt.managers.tokenizer_manager:ServerStatus", _FRONTEND, fields="Starting"),
    _seam("srt.managers.tokenizer_control_mixin:_COMMUNICATOR_SPECS", _FRONTEND),
    *_methods("srt.managers.communicator:FanOutCommunicator", _FRONTEND, set_fan_out="fan_out"),
    _seam("srt.managers.load_snapshot:LoadSnapshot", _SPEAKERS, fields="num_waiting_reqs"),
    _seam("srt.managers.load_snapshot:ShmLoadSnapshotReader", _SPEAKERS, signature="path dp_size", fields="close"),
    _seam("srt.managers.load_snapshot:ShmLoadSnapshotReader.read", _SPEAKERS, signature="self dp_rank"),
    _seam("srt.managers.load_snapshot:shm_path_for", _SPEAKERS, signature="ipc_name"),
    _seam("srt.runtime_context:get_lora", _FRONTEND, signature=""),
    _seam("srt.constants:HEALTH_CHECK_RID_PREFIX", _FRONTEND),
    _seam("srt.utils.auth:AuthLevel", _FRONTEND, fields="ADMIN_OPTIONAL"),
    _seam("srt.utils.auth:auth_level", _FRONTEND, signature="level"),
    _seam(
        "srt.observability.trace:TraceSliceContext",
        _FRONTEND,
        passes="slice_name start_time_ns end_time_ns level attrs",
    ),
    _seam("srt.observability.trace:TraceReqContext.trace_slice", _FRONTEND, passes="slice thread_finish_flag"),
    _seam("srt.observability.trace:TraceReqContext.rebuild_thread_context", _FRONTEND, passes="ts"),
    _seam("srt.observability.trace_async:TraceReqContextAsync.trace_slice", _FRONTEND, passes="thread_finish_flag"),
    _seam("srt.observability.trace_async:TraceReqContextAsync.rebuild_thread_context", _FRONTEND, passes="ts"),
    _seam("srt.observability.req_time_stats:ReqTimeStatsBase", _FRONTEND, fields="trace_ctx"),
    _seam("srt.environ:envs", _FRONTEND),
    _seam(
        "srt.environ:Envs",
        _FRONTEND,
        fields="SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION SGLANG_DIAG_BYPASS_HEALTH_GENERATE",
    ),
)

#: of programs in the frontend language
_LANGUAGE_SEAMS = (
    _seam("lang.backend.base_backend:BaseBackend", _FRONTEND, signature=""),
    _seam("lang.backend.base_backend:BaseBackend.flush_cache", _FRONTEND, signature="self"),
    _seam("lang.backend.base_backend:BaseBackend.get_server_info", _FRONTEND, signature="self"),
    _seam("lang.backend.base_backend:BaseBackend.generate", _FRONTEND, signature="self s sampling_params"),
    _seam("lang.backend.base_backend:BaseBackend.generate_stream", _FRONTEND, signature="self s sampling_params"),
    *_methods(
        "lang.backend.runtime_endpoint:RuntimeEndpoint",
        _FRONTEND,
        cache_prefix="prefix_str",
        commit_lazy_operations="s",
        fill_image="s",
        _generate_http_request="s data",
        _add_images="s data",
        _handle_dtype_to_regex="sampling_params",
    ),
    _seam("lang.backend.runtime_endpoint:RuntimeEndpoint", _FRONTEND, fields="select model_info chat_template"),
    _seam("lang.chat_template:get_chat_template_by_model_path", _FRONTEND, signature="model_path"),
    _seam("lang.global_config:global_config", _FRONTEND),
    _seam("lang.ir:SglSamplingParams.to_srt_kwargs", _FRONTEND, signature="self"),
)

_SCHEDULER = "srt.managers.scheduler:Scheduler"
_REQ = "srt.managers.schedule_batch:Req"
_BATCH = "srt.managers.schedule_batch:ScheduleBatch"
#: of ranks that outlive an epoch
_REFORM_SEAMS = (
    _seam("srt.runtime_context:publish", _RANK, passes="server_args role ranks"),
    _seam("srt.runtime_context:spawn_world_rank", _RANK, passes="server_args tp_rank pp_rank"),
    _seam("srt.runtime_context:SpawnRanks", _RANK, passes="world_rank dp_rank gpu_id"),
    _seam("srt.managers.scheduler:configure_scheduler_process", _RANK, passes="server_args gpu_id"),
    _seam("srt.managers.scheduler:create_scheduler_watchdog", _RANK, signature="scheduler watchdog_timeout soft"),
    _seam("srt.distributed.bootstrap:measure_pre_model_load_memory", _RANK, signature="device is_draft_worker"),
    _seam(
        "srt.distributed.bootstrap:get_available_gpu_memory",
        _RANK,
        signature="device gpu_id distributed empty_cache cpu_group",
    ),
    _seam(
        "srt.model_executor.model_runner:load_model_with_memory_saver",
        _RANK,
        signature="model_config load_config device gpu_id memory_saver_adapter is_draft_worker",
    ),
    _seam(
        "srt.distributed.parallel_state:GroupCoordinator", _RANK, fields="device_group cpu_group pynccl_comm destroy"
    ),
    _seam("srt.distributed.device_communicators.pynccl:PyNcclCommunicator", _RANK, fields="available comm nccl"),
    _seam("srt.distributed.device_communicators.pynccl_wrapper:NCCLLibrary", _RANK, fields="lib NCCL_CHECK"),
    _seam("srt.distributed.parallel_state:destroy_model_parallel", _RANK, passes=""),
    _seam("srt.distributed.parallel_state:destroy_distributed_environment", _RANK, passes=""),
    _seam("srt.distributed.parallel_state:abort_distributed_environment", _RANK, passes=""),
    _seam("srt.runtime_context:reset_context", _RANK, passes=""),
    _seam(
        "srt.layers.sampler:Sampler._sync_token_ids_across_tp",
        _RANK,
        signature="self batch_next_token_ids sampling_info",
    ),
    _seam("srt.utils:cpu_has_amx_support", _RANK, passes=""),
    _seam("srt.utils:is_host_cpu_arm64", _RANK, passes=""),
    _seam(
        "srt.server_args:ServerArgs",
        _RANK,
        fields="device enable_dp_attention dp_size ep_size enable_lora speculative_algorithm enable_hierarchical_cache "
        "enable_memory_saver cpu_offload_gb enable_torch_compile disaggregation_mode enable_pdmux elastic_ep_backend "
        "load_format disable_custom_all_reduce flashinfer_allreduce_fusion_backend enable_mscclpp "
        "enable_torch_symm_mem enable_symm_mem pre_warm_nccl enable_tp_lm_head_all_to_all cuda_graph_config",
    ),
    _seam("srt.environ:Envs", _RANK, fields="SGLANG_ENABLE_PCIE_IPC_ALLREDUCE SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"),
    _seam(
        "srt.managers.scheduler_components.ipc_channels:SchedulerIpcChannels",
        _RANK,
        fields="recv_from_tokenizer recv_from_rpc send_to_tokenizer send_to_detokenizer send_metrics_from_scheduler",
    ),
    _seam(_SCHEDULER, _RANK, fields="is_initializing cur_batch_for_debug run_event_loop load_snapshot_writer"),
    *_methods(
        _SCHEDULER,
        _RANK,
        init_soft_watchdog="",
        init_metrics_collector="",
        init_ipc_channels="port_args",
        init_idle_sleeper="",
        init_tokenizer="",
        handle_freeze_gc="recv_req",
    ),
)

_WORKER_SEAMS = (
    _seam(
        "srt.managers.scheduler:run_scheduler_process",
        _RANK,
        passes="server_args port_args gpu_id tp_rank pp_rank dp_rank pipe_writer",
    ),
    _seam("srt.utils:maybe_reindex_device_id", _RANK, signature="gpu_id"),
    _seam("srt.environ:Envs", _RANK, fields="SGLANG_FORCE_STREAM_INTERVAL"),
    _seam("srt.managers.scheduler_components.output_streamer:DEFAULT_FORCE_STREAM_INTERVAL", _RANK),
    _seam(
        _SCHEDULER,
        _RANK,
        fields="grammar_manager waiting_queue ipc_channels batch_result_processor model_config dllm_config "
        "gracefully_exit _request_dispatcher model_worker",
    ),
    *_methods(
        _SCHEDULER,
        _RANK,
        init_request_dispatcher="",
        _add_request_to_queue="req is_retracted",
        _abort_on_queued_limit="recv_req",
        _forward_isolation="batch overlap",
        get_output_streamer_class="",
        run_batch="batch pp_proxy_tensors",
        process_input_requests="recv_reqs",
        ingest_requests="",
        _pp_recv_proxy_tensors="",
        on_idle="",
        get_init_info="",
        _record_scheduler_state_for_paused_engine="",
    ),
    _seam(_SCHEDULER + ".handle_generate_request", _RANK, passes="recv_req"),
    _seam("srt.managers.tp_worker:TpModelWorker", _RANK, fields="forward_batch_generation"),
    _seam("srt.managers.utils:GenerationBatchResult", _RANK, fields="next_token_ids delay_sample_func"),
    _seam("srt.configs.model_config:ModelConfig", _RANK, fields="dtype"),
    *_methods(
        "srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer",
        _RANK,
        stream_output="reqs return_logprob skip_req",
    ),
    _seam("utils:TypeBasedDispatcher", _RANK, signature="mapping", fields="__iadd__"),
    _seam("srt.managers.scheduler_components.output_sender:SenderWrapper.send_output", _RANK, passes="output recv_obj"),
    _seam("srt.constrained.grammar_manager:GrammarManager", _RANK, fields="grammar_queue"),
    _seam("srt.constrained.base_grammar_backend:BaseGrammarObject", _RANK, fields="accept_token is_terminated"),
    _seam(
        "srt.managers.scheduler_components.batch_result_processor:"
        "SchedulerBatchResultProcessor._maybe_update_reasoning_tokens",
        _RANK,
        signature="self req next_token_id",
    ),
    _seam(
        _REQ,
        _RANK,
        fields="output_ids is_retracted retracted_stain cached_tokens cached_tokens_device send_token_offset "
        "return_logprob logprob_start_len input_logprob_sent send_output_token_logprobs_offset logprob grammar "
        "to_finish finished_reason finished_len origin_input_ids sampling_params prefix_indices",
    ),
    _seam(_REQ + ".set_finish_with_abort", _RANK, passes="error_msg status_code err_type"),
    _seam(_REQ + ".finished", _RANK, signature="self"),
    _seam(_REQ + "._check_str_based_finish", _RANK, passes=""),
    _seam(_REQ + "._check_token_based_finish", _RANK, passes="new_accepted_tokens"),
    _seam(
        "srt.managers.schedule_batch:ReqLogprob",
        _RANK,
        fields="output_token_logprobs_val output_token_logprobs_idx output_top_logprobs_val output_top_logprobs_idx "
        "output_token_ids_logprobs_val output_token_ids_logprobs_idx",
    ),
    _seam(
        _BATCH,
        _RANK,
        fields="reqs forward_mode extend_num_tokens sampling_info input_ids decoding_reqs enable_overlap "
        "spec_algorithm device seq_lens_cpu",
    ),
    *_methods(_BATCH, _RANK, cumulate_penalty_output_tokens=""),
    _seam("srt.sampling.sampling_batch_info:SamplingBatchInfo", _RANK, fields="penalizer_orchestrator"),
    *_methods(
        "srt.sampling.sampling_batch_info:SamplingBatchInfo", _RANK, adjusted_from_schedule_batch="batch vocab_size"
    ),
    _seam(
        "srt.sampling.penaltylib:BatchedPenalizerOrchestrator",
        _RANK,
        fields="is_required penalizers vocab_size cumulate_output_tokens",
    ),
    *(
        _seam(f"srt.sampling.penaltylib:{penalizer}", _RANK, fields=f"is_prepared {fields}")
        for penalizer, fields in (
            ("BatchedFrequencyPenalizer", "frequency_penalties cumulated_frequency_penalties"),
            ("BatchedPresencePenalizer", "presence_penalties cumulated_presence_penalties"),
            ("BatchedRepetitionPenalizer", "repetition_penalties cumulated_repetition_penalties"),
            ("BatchedMinNewTokensPenalizer", "len_output_tokens"),
        )
    ),
    _seam("srt.utils.common:is_pin_memory_available", _RANK, passes="device"),
    _seam("srt.runtime_context:get_parallel", _RANK, signature=""),
    _seam("srt.runtime_context:get_observability", _RANK, signature=""),
    _seam("srt.runtime_context:get_context", _RANK, signature=""),
    _seam("srt.runtime_context:RuntimeContext.override", _RANK, passes="source extra_metric_labels"),
    _seam(
        "srt.managers.detokenizer_manager:run_detokenizer_process",
        _DETOKENIZER,
        passes="server_args port_args detokenizer_manager_class",
    ),
    _seam("srt.managers.detokenizer_manager:DetokenizerManager", _DETOKENIZER, fields="_request_dispatcher"),
    # What our template process imports, of which ranks are forked.
    _seam("srt.models.registry:ModelRegistry", _RANK),
    *_methods(
        "srt.managers.detokenizer_manager:DetokenizerManager",
        _DETOKENIZER,
        init_request_dispatcher="",
        event_loop="",
    ),
)

_TREE = "srt.mem_cache.unified_radix_cache:UnifiedRadixCache"
_TREE_CORE = "srt.mem_cache.unified_cache.unified_tree_core_interface:UnifiedTreeCoreInterface"
_POOL = "srt.mem_cache.memory_pool:"
_SHADOW_SEAMS = (
    _seam(
        _SCHEDULER,
        _RANK,
        fields="request_receiver tree_cache req_to_token_pool token_to_kv_pool_allocator page_size server_args "
        "disable_radix_cache is_generation spec_algorithm device forward_stream weight_updater _engine_paused",
    ),
    *_methods(
        _SCHEDULER,
        _RANK,
        init_request_receiver="",
        process_batch_result="batch result",
        flush_cache="empty_cache",
    ),
    _seam(
        "srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager",
        _RANK,
        fields="offload_tags _session",
    ),
    _seam(
        "srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager._select_runners",
        _RANK,
        signature="self selector",
    ),
    _seam("srt.constants:GPU_MEMORY_TYPE_WEIGHTS", _FRONTEND + _RANK),
    # A weight cache daemon's: who must not write to them, what they take, and how its death is noticed.
    _seam("srt.runtime_context:get_model", _FRONTEND + _RANK, signature=""),
    _seam("srt.model_loader.loader:BaseModelLoader", _RANK, fields="preloaded_weights_bytes"),
    _seam(
        "srt.weight_cache.ipc_loader:IpcModelLoader._start_daemon_liveness_watchdog", _RANK, signature="self daemon_pid"
    ),
    _seam(
        "srt.weight_cache.ipc_loader:IpcModelLoader._fetch_from_cache",
        _RANK,
        signature="self model_config device_config",
    ),
    _seam("srt.weight_cache.protocol:get_socket_path", _RANK, passes="device_uuid"),
    _seam("srt.weight_cache.protocol:recv_msg", _RANK, passes="sock"),
    _seam("srt.weight_cache.protocol:send_msg", _RANK, passes="sock obj"),
    _seam("srt.platforms:current_platform", _RANK),
    _seam("srt.lora.layers:BaseLayerWithLoRA", _RANK),
    _seam("srt.managers.io_struct:BaseReq", _SPEAKERS + _RANK),
    # What may write to the weights.
    *(
        _seam(f"srt.managers.io_struct:{kind}", _RANK)
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
    _seam("srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver", _RANK),
    *_methods("srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver", _RANK, _pull_raw_reqs=""),
    _seam(_BATCH, _RANK, fields="prefix_lens extend_lens"),
    _seam(
        _REQ,
        _RANK,
        fields="extra_key cache_salt rid input_embeds positional_embed_overrides multimodal_inputs beam_group "
        "skip_radix_cache_insert session sampling_params kv",
    ),
    _seam("srt.managers.io_struct:FlushCacheReqInput", _RANK),
    _seam(_POOL + "MHATokenToKVPool", _RANK, fields="k_buffer v_buffer kv_cache_layout dtype size"),
    _seam(_POOL + "MLATokenToKVPool", _RANK, fields="kv_buffer dtype size"),
    _seam(_POOL + "ReqToTokenPool", _RANK, fields="req_to_token"),
    _seam("srt.mem_cache.radix_cache:RadixKey", _RANK, passes="token_ids extra_key cache_salt"),
    _seam("srt.mem_cache.base_prefix_cache:MatchPrefixParams", _RANK, passes="key"),
    _seam("srt.mem_cache.base_prefix_cache:InsertParams", _RANK, passes="key value prev_prefix_len"),
    _seam(
        "srt.mem_cache.base_prefix_cache:MatchResult", _RANK, fields="device_indices last_device_node host_hit_length"
    ),
    _seam("srt.mem_cache.base_prefix_cache:IncLockRefResult.to_dec_params", _RANK, signature="self"),
    _seam("srt.mem_cache.common:evict_from_tree_cache", _RANK, signature="tree_cache num_tokens"),
    _seam("srt.mem_cache.allocator:BaseTokenToKVPoolAllocator.alloc", _RANK, passes="need_size"),
    _seam("srt.mem_cache.allocator:BaseTokenToKVPoolAllocator.get_kvcache", _RANK, signature="self"),
    _seam("srt.mem_cache.allocator:BaseTokenToKVPoolAllocator.available_size", _RANK, signature="self"),
    _seam(_SCHEDULER + ".is_fully_idle", _RANK, passes="self"),
    _seam(_TREE, _RANK, fields="tree_core"),
    _seam(_TREE + ".match_prefix", _RANK, passes="params"),
    _seam(_TREE + ".evictable_size", _RANK, signature="self"),
    _seam(_TREE + ".insert", _RANK, passes="params"),
    _seam(_TREE + ".inc_lock_ref", _RANK, passes="node_id"),
    _seam(_TREE + ".dec_lock_ref", _RANK, passes="node_id params"),
    _seam(_TREE + ".root_node_handle", _RANK, passes="extra_key"),
    # Read-only, unlike match_prefix: ranks may call them in different steps.
    _seam(_TREE_CORE + ".match_full_device_prefix", _RANK, signature="self key"),
    _seam(_TREE_CORE + ".collect_full_device_indices", _RANK, signature="self from_node_id until_node_id"),
)

#: Checked on the spot by ``platform.hooks`` on a CPU; here for ``scripts/check_upstream.py`` and the tests.
_ALLOCATOR = "srt.mem_cache.allocator:PagedTokenToKVPoolAllocator"
_CPU_SEAMS = (
    _seam("srt.platforms.cpu:CpuDeviceMixin", _CPU),
    _seam(
        "srt.platforms.interface:SRTPlatform",
        _CPU,
        fields="is_out_of_tree is_pin_memory_available apply_server_args_defaults init_backend "
        "get_default_attention_backend get_mha_kv_pool_cls get_mla_kv_pool_cls get_paged_allocator_cls "
        "get_compile_backend get_dispatch_key_name",
    ),
    _seam("srt.arg_groups.choices:DETERMINISTIC_ATTENTION_BACKEND_CHOICES", _CPU),
    _seam("srt.arg_groups.choices:RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND", _CPU),
    _seam("srt.mem_cache.memory_pool:MHATokenToKVPool", _CPU),
    _seam("srt.mem_cache.memory_pool:DSATokenToKVPool", _CPU),
    _seam(
        "srt.mem_cache.memory_pool:MLATokenToKVPool",
        _CPU,
        passes="size page_size dtype kv_lora_rank qk_rope_head_dim layer_num device enable_memory_saver start_layer "
        "end_layer",
    ),
    _seam(
        "srt.models.deepseek_common.attention_backend_handler:AttentionBackendRegistry.register",
        _CPU,
        signature="cls backend_name handler_func",
    ),
    _seam("srt.models.deepseek_common.attention_forward_methods.forward_methods:AttnForwardMethod", _CPU, fields="MLA"),
    # A backend in this list gets queries and keys in two parts.
    _seam("srt.models.deepseek_common.utils:FORWARD_ABSORB_CORE_ATTENTION_BACKENDS", _CPU),
    _seam("srt.mem_cache.allocator:BaseTokenToKVPoolAllocator", _CPU),
    _seam("srt.mem_cache.allocator:TokenToKVPoolAllocator", _CPU, signature="size dtype device kvcache need_sort"),
    _seam(
        _ALLOCATOR,
        _CPU,
        signature="size page_size dtype device kvcache need_sort",
        fields="free_pages page_size debug_mode merge_and_sort_free",
    ),
    *_methods(
        _ALLOCATOR,
        _CPU,
        alloc_extend="prefix_lens prefix_lens_cpu seq_lens seq_lens_cpu last_loc extend_num_tokens num_new_pages",
        alloc_decode="seq_lens seq_lens_cpu last_loc",
    ),
    _seam(
        "srt.layers.attention.torch_native_backend:TorchNativeAttnBackend._run_sdpa_forward_extend",
        _CPU,
        signature="self query output k_cache v_cache req_to_token req_pool_indices seq_lens extend_prefix_lens "
        "extend_seq_lens encoder_lens scaling enable_gqa causal is_cross_attn sliding_window_size",
    ),
    _seam(
        "srt.layers.attention.torch_native_backend:TorchNativeAttnBackend._run_sdpa_forward_decode",
        _CPU,
        signature="self query output k_cache v_cache req_to_token req_pool_indices seq_lens encoder_lens scaling "
        "enable_gqa causal is_cross_attn sliding_window_size",
    ),
    _seam("srt.layers.sampler:murmur_hash32", _CPU, signature="seed positions col_indices"),
    _seam("srt.layers.sampler:multinomial_with_seed", _CPU, signature="logprobs seed positions"),
    _seam("srt.layers.sampler:sampling_from_probs_torch", _CPU, signature="probs sampling_seed positions"),
    _seam(
        "srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
        _CPU,
        signature="probs top_ks top_ps min_ps need_min_p_sampling sampling_seed positions return_filtered_probs",
    ),
    _seam("srt.batch_invariant_ops:enable_batch_invariant_mode", _CPU, signature="enable_bmm"),
    _seam("srt.distributed.bootstrap:_bind_threads_if_cpu", _CPU, signature="device"),
    _seam("srt.distributed.bootstrap:_init_cpu_threads_env", _CPU, signature="local_omp_cpuid dist_init_method"),
    _seam("srt.lora.layers:torch", _CPU),
    _seam("srt.lora.backend.torch_backend:torch", _CPU),
)

SEAMS: tuple[Seam, ...] = (
    *_START,
    *_IPC,
    *_FRONTEND_SEAMS,
    *_LANGUAGE_SEAMS,
    *_REFORM_SEAMS,
    *_WORKER_SEAMS,
    *_SHADOW_SEAMS,
    *_CPU_SEAMS,
)
