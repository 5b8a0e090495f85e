"""Of what clients reach: the frontend, and the frontend language."""

from __future__ import annotations

from sglang_kevlar.upstream.contract import Seam
from sglang_kevlar.upstream.declare import FRONTEND, SPEAKERS, methods, seam

_TOKENIZER_MANAGER = "srt.managers.tokenizer_manager:TokenizerManager"

SERVER: tuple[Seam, ...] = (
    seam("srt.entrypoints.http_server:app", FRONTEND),
    seam("srt.entrypoints.http_server:HEALTH_CHECK_TIMEOUT", FRONTEND),
    seam(
        "srt.entrypoints.http_server:_setup_and_run_http_server",
        FRONTEND,
        passes="server_args tokenizer_manager template_manager port_args scheduler_infos subprocess_watchdog "
        "launch_callback",
    ),
    *(
        seam(f"srt.entrypoints.http_server:{endpoint}", FRONTEND)
        for endpoint in ("health_generate", "ready", "lifespan")
    ),
    seam(
        "srt.entrypoints.engine:Engine._launch_subprocesses",
        FRONTEND,
        passes="server_args init_tokenizer_manager_func run_scheduler_process_func run_detokenizer_process_func "
        "port_args",
    ),
    seam(
        "srt.entrypoints.engine:Engine._launch_scheduler_processes",
        FRONTEND,
        signature="cls server_args port_args run_scheduler_process_func placement_group",
    ),
    seam(
        "srt.entrypoints.engine:Engine._launch_detokenizer_subprocesses",
        FRONTEND,
        signature="cls server_args port_args run_detokenizer_process_func",
    ),
    seam(
        "srt.entrypoints.engine:Engine",
        FRONTEND,
        fields="tokenizer_manager loop shutdown",
    ),
    *methods("srt.entrypoints.engine:Engine", FRONTEND, _serialize_tensors_per_rank="tensors load_format"),
    seam("srt.entrypoints.engine:SchedulerInitResult", FRONTEND, passes="scheduler_infos wait_for_ready"),
    seam(
        "srt.entrypoints.engine:init_tokenizer_manager",
        FRONTEND,
        passes="server_args port_args TokenizerManagerClass",
    ),
    seam(
        _TOKENIZER_MANAGER,
        FRONTEND,
        passes="server_args port_args",
        fields="_result_dispatcher rid_to_state asyncio_tasks gracefully_exit server_status last_receive_tstamp "
        "is_generation enable_metrics load_snapshot_reader recv_from_detokenizer send_to_scheduler "
        "tokenizer_ipc_name event_loop _server_stop_hook enable_trace mm_processor is_pause",
    ),
    *methods(
        _TOKENIZER_MANAGER,
        FRONTEND,
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
    seam(_TOKENIZER_MANAGER + "._update_weight_version_if_provided", FRONTEND, signature="self weight_version"),
    seam(_TOKENIZER_MANAGER + "._handle_batch_output", FRONTEND, signature="self recv_obj"),
    seam(_TOKENIZER_MANAGER + "._handle_abort_req", FRONTEND, signature="self recv_obj"),
    seam(_TOKENIZER_MANAGER + "._update_model_path_info", FRONTEND, signature="self model_path load_format"),
    seam(_TOKENIZER_MANAGER + ".config_value", FRONTEND, signature="self name"),
    seam("srt.managers.tokenizer_manager:ReqState.get_text", FRONTEND, signature="self"),
    seam("srt.managers.tokenizer_manager:ServerStatus", FRONTEND, fields="Starting"),
    seam("srt.managers.tokenizer_control_mixin:_COMMUNICATOR_SPECS", FRONTEND),
    *methods("srt.managers.communicator:FanOutCommunicator", FRONTEND, set_fan_out="fan_out"),
    seam("srt.managers.load_snapshot:LoadSnapshot", SPEAKERS, fields="num_waiting_reqs"),
    seam("srt.managers.load_snapshot:ShmLoadSnapshotReader", SPEAKERS, signature="path dp_size", fields="close"),
    seam("srt.managers.load_snapshot:ShmLoadSnapshotReader.read", SPEAKERS, signature="self dp_rank"),
    seam("srt.managers.load_snapshot:shm_path_for", SPEAKERS, signature="ipc_name"),
    seam("srt.runtime_context:get_lora", FRONTEND, signature=""),
    seam("srt.constants:HEALTH_CHECK_RID_PREFIX", FRONTEND),
    seam("srt.utils.auth:AuthLevel", FRONTEND, fields="ADMIN_OPTIONAL"),
    seam("srt.utils.auth:auth_level", FRONTEND, signature="level"),
    seam(
        "srt.observability.trace:TraceSliceContext",
        FRONTEND,
        passes="slice_name start_time_ns end_time_ns level attrs",
    ),
    seam("srt.observability.trace:TraceReqContext.trace_slice", FRONTEND, passes="slice thread_finish_flag"),
    seam("srt.observability.trace:TraceReqContext.rebuild_thread_context", FRONTEND, passes="ts"),
    seam("srt.observability.trace_async:TraceReqContextAsync.trace_slice", FRONTEND, passes="thread_finish_flag"),
    seam("srt.observability.trace_async:TraceReqContextAsync.rebuild_thread_context", FRONTEND, passes="ts"),
    seam("srt.observability.req_time_stats:ReqTimeStatsBase", FRONTEND, fields="trace_ctx"),
    seam("srt.environ:envs", FRONTEND),
    seam(
        "srt.environ:Envs",
        FRONTEND,
        fields="SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION SGLANG_DIAG_BYPASS_HEALTH_GENERATE",
    ),
)

#: of programs in the frontend language
LANGUAGE: tuple[Seam, ...] = (
    seam("lang.backend.base_backend:BaseBackend", FRONTEND, signature=""),
    seam("lang.backend.base_backend:BaseBackend.flush_cache", FRONTEND, signature="self"),
    seam("lang.backend.base_backend:BaseBackend.get_server_info", FRONTEND, signature="self"),
    seam("lang.backend.base_backend:BaseBackend.generate", FRONTEND, signature="self s sampling_params"),
    seam("lang.backend.base_backend:BaseBackend.generate_stream", FRONTEND, signature="self s sampling_params"),
    *methods(
        "lang.backend.runtime_endpoint:RuntimeEndpoint",
        FRONTEND,
        cache_prefix="prefix_str",
        commit_lazy_operations="s",
        fill_image="s",
        _generate_http_request="s data",
        _add_images="s data",
        _handle_dtype_to_regex="sampling_params",
    ),
    seam("lang.backend.runtime_endpoint:RuntimeEndpoint", FRONTEND, fields="select model_info chat_template"),
    seam("lang.chat_template:get_chat_template_by_model_path", FRONTEND, signature="model_path"),
    seam("lang.global_config:global_config", FRONTEND),
    seam("lang.ir:SglSamplingParams.to_srt_kwargs", FRONTEND, signature="self"),
)
