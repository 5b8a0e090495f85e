"""Of ranks that outlive an epoch."""

from __future__ import annotations

from sglang_kevlar.upstream.contract import Seam
from sglang_kevlar.upstream.declare import RANK, methods, seam

_SCHEDULER = "srt.managers.scheduler:Scheduler"

SEAMS: tuple[Seam, ...] = (
    seam("srt.runtime_context:publish", RANK, passes="server_args role ranks"),
    seam("srt.runtime_context:spawn_world_rank", RANK, passes="server_args tp_rank pp_rank"),
    seam("srt.runtime_context:SpawnRanks", RANK, passes="world_rank dp_rank gpu_id"),
    seam("srt.managers.scheduler:configure_scheduler_process", RANK, passes="server_args gpu_id"),
    seam("srt.managers.scheduler:create_scheduler_watchdog", RANK, signature="scheduler watchdog_timeout soft"),
    seam("srt.distributed.bootstrap:measure_pre_model_load_memory", RANK, signature="device is_draft_worker"),
    seam(
        "srt.distributed.bootstrap:get_available_gpu_memory",
        RANK,
        signature="device gpu_id distributed empty_cache cpu_group",
    ),
    seam(
        "srt.model_executor.model_runner:load_model_with_memory_saver",
        RANK,
        signature="model_config load_config device gpu_id memory_saver_adapter is_draft_worker",
    ),
    seam("srt.distributed.parallel_state:GroupCoordinator", RANK, fields="device_group cpu_group pynccl_comm destroy"),
    seam("srt.distributed.device_communicators.pynccl:PyNcclCommunicator", RANK, fields="available comm nccl"),
    seam("srt.distributed.device_communicators.pynccl_wrapper:NCCLLibrary", RANK, fields="lib NCCL_CHECK"),
    seam("srt.distributed.parallel_state:destroy_model_parallel", RANK, passes=""),
    seam("srt.distributed.parallel_state:destroy_distributed_environment", RANK, passes=""),
    seam("srt.distributed.parallel_state:abort_distributed_environment", RANK, passes=""),
    seam("srt.runtime_context:reset_context", RANK, passes=""),
    seam(
        "srt.layers.sampler:Sampler._sync_token_ids_across_tp",
        RANK,
        signature="self batch_next_token_ids sampling_info",
    ),
    seam("srt.layers.sampler:Sampler._preprocess_logits", RANK, signature="self logits sampling_info"),
    seam("srt.utils:cpu_has_amx_support", RANK, passes=""),
    seam("srt.utils:is_host_cpu_arm64", RANK, passes=""),
    seam(
        "srt.server_args:ServerArgs",
        RANK,
        fields="device enable_dp_attention dp_size ep_size enable_lora speculative_algorithm enable_hierarchical_cache "
        "enable_memory_saver cpu_offload_gb enable_torch_compile disaggregation_mode enable_pdmux elastic_ep_backend "
        "load_format disable_custom_all_reduce flashinfer_allreduce_fusion_backend enable_mscclpp "
        "enable_torch_symm_mem enable_symm_mem pre_warm_nccl enable_tp_lm_head_all_to_all cuda_graph_config",
    ),
    seam(
        "srt.environ:Envs",
        RANK,
        fields="SGLANG_ENABLE_PCIE_IPC_ALLREDUCE SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK "
        "SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM",
    ),
    seam(
        "srt.managers.scheduler_components.ipc_channels:SchedulerIpcChannels",
        RANK,
        fields="recv_from_tokenizer recv_from_rpc send_to_tokenizer send_to_detokenizer send_metrics_from_scheduler",
    ),
    seam(_SCHEDULER, RANK, fields="is_initializing cur_batch_for_debug run_event_loop load_snapshot_writer"),
    *methods(
        _SCHEDULER,
        RANK,
        init_soft_watchdog="",
        init_metrics_collector="",
        init_ipc_channels="port_args",
        init_idle_sleeper="",
        init_tokenizer="",
        handle_freeze_gc="recv_req",
    ),
)
