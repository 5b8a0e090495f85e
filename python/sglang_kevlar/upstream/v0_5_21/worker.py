"""Of ranks and detokenizers."""

from __future__ import annotations

from sglang_kevlar.upstream.contract import Seam
from sglang_kevlar.upstream.declare import DETOKENIZER, RANK, methods, seam

_SCHEDULER = "srt.managers.scheduler:Scheduler"
_REQ = "srt.managers.schedule_batch:Req"
_BATCH = "srt.managers.schedule_batch:ScheduleBatch"

SEAMS: tuple[Seam, ...] = (
    seam(
        "srt.managers.scheduler:run_scheduler_process",
        RANK,
        passes="server_args port_args gpu_id tp_rank pp_rank dp_rank pipe_writer",
    ),
    seam("srt.utils:maybe_reindex_device_id", RANK, signature="gpu_id"),
    seam("srt.environ:Envs", RANK, fields="SGLANG_FORCE_STREAM_INTERVAL"),
    seam("srt.managers.scheduler_components.output_streamer:DEFAULT_FORCE_STREAM_INTERVAL", RANK),
    seam(
        _SCHEDULER,
        RANK,
        fields="grammar_manager waiting_queue ipc_channels batch_result_processor model_config dllm_config "
        "gracefully_exit _request_dispatcher model_worker",
    ),
    *methods(
        _SCHEDULER,
        RANK,
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
    seam(_SCHEDULER + ".handle_generate_request", RANK, passes="recv_req"),
    seam("srt.managers.tp_worker:TpModelWorker", RANK, fields="forward_batch_generation"),
    seam("srt.managers.utils:GenerationBatchResult", RANK, fields="next_token_ids delay_sample_func copy_done"),
    seam("srt.configs.model_config:ModelConfig", RANK, fields="dtype"),
    *methods(
        "srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer",
        RANK,
        stream_output="reqs return_logprob skip_req",
    ),
    seam("utils:TypeBasedDispatcher", RANK, signature="mapping", fields="__iadd__"),
    seam("srt.managers.scheduler_components.output_sender:SenderWrapper.send_output", RANK, passes="output recv_obj"),
    seam("srt.constrained.grammar_manager:GrammarManager", RANK, fields="grammar_queue"),
    seam("srt.constrained.base_grammar_backend:BaseGrammarObject", RANK, fields="accept_token is_terminated"),
    seam(
        "srt.managers.scheduler_components.batch_result_processor:"
        "SchedulerBatchResultProcessor._maybe_update_reasoning_tokens",
        RANK,
        signature="self req next_token_id",
    ),
    seam(
        _REQ,
        RANK,
        fields="output_ids is_retracted retracted_stain cached_tokens cached_tokens_device send_token_offset "
        "return_logprob logprob_start_len input_logprob_sent send_output_token_logprobs_offset logprob grammar "
        "to_finish finished_reason finished_len origin_input_ids sampling_params prefix_indices",
    ),
    seam(_REQ + ".set_finish_with_abort", RANK, passes="error_msg status_code err_type"),
    seam(_REQ + ".finished", RANK, signature="self"),
    seam(_REQ + "._check_str_based_finish", RANK, passes=""),
    seam(_REQ + "._check_token_based_finish", RANK, passes="new_accepted_tokens"),
    seam(
        "srt.managers.schedule_batch:ReqLogprob",
        RANK,
        fields="output_token_logprobs_val output_token_logprobs_idx output_top_logprobs_val output_top_logprobs_idx "
        "output_token_ids_logprobs_val output_token_ids_logprobs_idx",
    ),
    seam(
        _BATCH,
        RANK,
        fields="reqs forward_mode extend_num_tokens sampling_info input_ids decoding_reqs enable_overlap "
        "spec_algorithm device seq_lens_cpu",
    ),
    *methods(_BATCH, RANK, cumulate_penalty_output_tokens=""),
    seam("srt.sampling.sampling_batch_info:SamplingBatchInfo", RANK, fields="penalizer_orchestrator"),
    *methods(
        "srt.sampling.sampling_batch_info:SamplingBatchInfo", RANK, adjusted_from_schedule_batch="batch vocab_size"
    ),
    seam(
        "srt.sampling.penaltylib:BatchedPenalizerOrchestrator",
        RANK,
        fields="is_required penalizers vocab_size cumulate_output_tokens",
    ),
    *(
        seam(f"srt.sampling.penaltylib:{penalizer}", RANK, fields=f"is_prepared {fields}")
        for penalizer, fields in (
            ("BatchedFrequencyPenalizer", "frequency_penalties cumulated_frequency_penalties"),
            ("BatchedPresencePenalizer", "presence_penalties cumulated_presence_penalties"),
            ("BatchedRepetitionPenalizer", "repetition_penalties cumulated_repetition_penalties"),
            ("BatchedMinNewTokensPenalizer", "len_output_tokens"),
        )
    ),
    seam("srt.utils.common:is_pin_memory_available", RANK, passes="device"),
    seam("srt.runtime_context:get_parallel", RANK, signature=""),
    seam("srt.runtime_context:get_observability", RANK, signature=""),
    seam("srt.runtime_context:get_context", RANK, signature=""),
    seam("srt.runtime_context:RuntimeContext.override", RANK, passes="source extra_metric_labels"),
    seam(
        "srt.managers.detokenizer_manager:run_detokenizer_process",
        DETOKENIZER,
        passes="server_args port_args detokenizer_manager_class",
    ),
    seam("srt.managers.detokenizer_manager:DetokenizerManager", DETOKENIZER, fields="_request_dispatcher"),
    # What our template process imports, of which ranks are forked.
    seam("srt.models.registry:ModelRegistry", RANK),
    *methods(
        "srt.managers.detokenizer_manager:DetokenizerManager",
        DETOKENIZER,
        init_request_dispatcher="",
        event_loop="",
    ),
)
