"""Of all processes: the launch, and what travels between them."""

from __future__ import annotations

from sglang_kevlar.upstream.contract import Seam
from sglang_kevlar.upstream.declare import ALL, DETOKENIZER, FRONTEND, GATEWAY, PREPARE, RANK, SERVING, SPEAKERS, seam

START: tuple[Seam, ...] = (
    seam("srt.server_args:prepare_server_args", PREPARE, signature="argv"),
    seam("srt.server_args:ServerArgs", PREPARE, fields="resolve_once check_server_args add_cli_args __reduce__"),
    seam(
        "srt.server_args:ServerArgs",
        PREPARE,
        fields="tokenizer_path revision quantization kv_cache_dtype page_size lora_paths random_seed",
    ),
    seam("srt.server_args:ServerArgs", ALL, fields="host port model_path tp_size pp_size"),
    seam("srt.arg_groups.overrides:resolving_view", PREPARE + RANK, signature="server_args"),
    seam("srt.arg_groups.model_override_base:model_config_of", PREPARE, signature="server_args"),
    seam(
        "srt.configs.model_config:ModelConfig",
        PREPARE,
        fields="is_multimodal hf_config model_path dtype context_len",
    ),
    seam("srt.entrypoints.engine:_set_envs_and_config", PREPARE, signature="server_args"),
    seam("srt.parser.template_detection:resolve_auto_parsers", PREPARE, signature="server_args"),
    seam("srt.utils:configure_logger", PREPARE + GATEWAY, passes="server_args prefix"),
    seam("srt.plugins:load_plugins", ALL, signature=""),
    seam("srt.plugins.hook_registry:HookRegistry", ALL, fields="_hooks _patched"),
    seam("srt.plugins.hook_registry:HookRegistry.register", ALL, passes="target hook hook_type"),
    seam("srt.plugins.hook_registry:HookType", ALL, fields="AFTER AROUND"),
    seam("srt.utils:set_ulimit", RANK + DETOKENIZER, passes=""),
    # Of groups on several hosts: which ranks are on which (`LaunchPlan.ranks`), where they meet, by which address.
    seam("srt.entrypoints.engine:_calculate_rank_ranges", PREPARE, signature="node_rank"),
    seam("srt.distributed.bootstrap:_resolve_dist_init_method", RANK, signature="dist_port"),
    seam("srt.environ:Envs", RANK, fields="SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"),
    seam("srt.utils.network:get_local_ip_auto", RANK, signature="fallback"),
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

BETWEEN_PROCESSES: tuple[Seam, ...] = (
    seam(
        "srt.server_args:PortArgs",
        SERVING,
        signature="tokenizer_ipc_name scheduler_input_ipc_name detokenizer_ipc_name nccl_port rpc_ipc_name "
        "metrics_ipc_name tokenizer_worker_ipc_name decoupled_spec_ipc_config load_collector_ipc_name instance_id",
    ),
    seam("srt.managers.io_struct:", SERVING + GATEWAY),
    *(seam(f"srt.managers.io_struct:{name}", SPEAKERS) for name in _ON_THE_WIRE),
    # Cut by frontend, a value for each request: `cluster.batches`; a test looks at every field.
    seam("srt.managers.io_struct:BatchEmbeddingOutput", SPEAKERS, fields="rids pooled_hidden_states"),
    seam("srt.managers.io_struct:hook_custom_types", SPEAKERS + RANK),
    seam("srt.managers.io_struct:sock_send", SPEAKERS, signature="socket obj flags"),
    seam("srt.managers.io_struct:sock_recv", SPEAKERS, signature="socket flags"),
    seam("srt.managers.io_struct:msgpack_decode", SPEAKERS, signature="data"),
    seam("srt.managers.io_struct:msgpack_encode", FRONTEND, signature="obj"),
    seam("srt.utils.msgpack_utils:enc_hook", SPEAKERS, signature="obj"),
    seam("srt.utils.msgpack_utils:dec_hook", SPEAKERS, signature="tp obj"),
    seam("srt.utils.msgpack_utils:ext_hook", SPEAKERS, signature="code data"),
    seam("srt.managers.io_struct:_USE_PICKLE_IPC", SPEAKERS),
    seam("srt.managers.io_struct:BaseReq", FRONTEND + RANK, fields="rid"),
    seam(
        "srt.managers.io_struct:TokenizedGenerateReqInput",
        FRONTEND + RANK,
        fields="rid input_ids sampling_params stream session_params input_embeds positional_embed_overrides mm_inputs "
        "return_hidden_states lora_id extra_key cache_salt time_stats",
    ),
    seam(
        "srt.managers.io_struct:TokenizedEmbeddingReqInput",
        FRONTEND + RANK,
        fields="rid input_ids lora_id mm_inputs time_stats",
    ),
    seam("srt.managers.io_struct:BatchTokenizedGenerateReqInput", FRONTEND + RANK, fields="__iter__"),
    seam("srt.managers.io_struct:BatchTokenizedEmbeddingReqInput", FRONTEND + RANK, fields="__iter__"),
    seam("srt.managers.io_struct:AbortReq", FRONTEND + RANK, fields="rid finished_reason abort_message abort_all"),
    seam(
        "srt.managers.io_struct:BatchStrOutput",
        FRONTEND,
        fields="rids finished_reasons output_strs output_ids cached_tokens customized_info",
    ),
    seam(
        "srt.managers.io_struct:BatchTokenIDOutput",
        FRONTEND,
        fields="rids finished_reasons output_ids cached_tokens customized_info",
    ),
    seam("srt.managers.io_struct:BatchEmbeddingOutput", FRONTEND, fields="rids finished_reasons"),
    seam("srt.managers.io_struct:GenerateReqInput", FRONTEND, fields="rid input_ids sampling_params log_metrics"),
    seam("srt.managers.io_struct:EmbeddingReqInput", FRONTEND, fields="rid input_ids sampling_params log_metrics"),
    seam("srt.managers.io_struct:PauseGenerationReqInput", FRONTEND, fields="mode"),
    seam(
        "srt.managers.io_struct:UpdateWeightFromDiskReqInput", FRONTEND, fields="model_path load_format weight_version"
    ),
    seam(
        "srt.managers.io_struct:UpdateWeightFromDiskReqOutput", FRONTEND, fields="success message num_paused_requests"
    ),
    seam("srt.managers.io_struct:LoadLoRAAdapterReqInput", FRONTEND, fields="lora_name"),
    seam("srt.managers.io_struct:LoadLoRAAdapterFromTensorsReqInput", FRONTEND, fields="lora_name"),
    seam("srt.managers.io_struct:UnloadLoRAAdapterReqInput", FRONTEND, fields="lora_name"),
    seam("srt.managers.io_struct:InitWeightsUpdateGroupReqInput", FRONTEND, fields="rank_offset world_size group_name"),
    seam("srt.managers.io_struct:DestroyWeightsUpdateGroupReqInput", FRONTEND, fields="group_name"),
    seam("srt.managers.io_struct:UpdateWeightsFromDistributedReqInput", FRONTEND, fields="group_name"),
    seam("srt.managers.io_struct:UpdateWeightVersionReqInput", FRONTEND, fields="new_version"),
    *(
        seam(f"srt.managers.io_struct:{name}", FRONTEND)
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
    seam(
        "srt.sampling.sampling_params:SamplingParams",
        FRONTEND + RANK,
        fields="stream_interval max_new_tokens beam_width top_k min_new_tokens custom_params logit_bias",
    ),
)
