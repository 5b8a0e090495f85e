"""Of ranks on a CPU. ``platform.hooks`` checks them on the spot; here they are for ``check_upstream.py`` and tests."""

from __future__ import annotations

from sglang_kevlar.upstream.contract import Seam
from sglang_kevlar.upstream.declare import CPU, methods, seam

_ALLOCATOR = "srt.mem_cache.allocator:PagedTokenToKVPoolAllocator"

SEAMS: tuple[Seam, ...] = (
    seam("srt.platforms.cpu:CpuDeviceMixin", CPU),
    seam(
        "srt.platforms.interface:SRTPlatform",
        CPU,
        fields="is_out_of_tree is_pin_memory_available apply_server_args_defaults init_backend "
        "get_default_attention_backend get_mha_kv_pool_cls get_mla_kv_pool_cls get_paged_allocator_cls "
        "get_compile_backend get_dispatch_key_name",
    ),
    seam("srt.arg_groups.choices:DETERMINISTIC_ATTENTION_BACKEND_CHOICES", CPU),
    seam("srt.arg_groups.choices:RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND", CPU),
    seam("srt.mem_cache.memory_pool:MHATokenToKVPool", CPU),
    seam("srt.mem_cache.memory_pool:DSATokenToKVPool", CPU),
    seam(
        "srt.mem_cache.memory_pool:MLATokenToKVPool",
        CPU,
        passes="size page_size dtype kv_lora_rank qk_rope_head_dim layer_num device enable_memory_saver start_layer "
        "end_layer",
    ),
    seam(
        "srt.models.deepseek_common.attention_backend_handler:AttentionBackendRegistry.register",
        CPU,
        signature="cls backend_name handler_func",
    ),
    seam("srt.models.deepseek_common.attention_forward_methods.forward_methods:AttnForwardMethod", CPU, fields="MLA"),
    # A backend in this list gets queries and keys in two parts.
    seam("srt.models.deepseek_common.utils:FORWARD_ABSORB_CORE_ATTENTION_BACKENDS", CPU),
    seam("srt.mem_cache.allocator:BaseTokenToKVPoolAllocator", CPU),
    seam("srt.mem_cache.allocator:TokenToKVPoolAllocator", CPU, signature="size dtype device kvcache need_sort"),
    seam(
        _ALLOCATOR,
        CPU,
        signature="size page_size dtype device kvcache need_sort",
        fields="free_pages page_size debug_mode merge_and_sort_free",
    ),
    *methods(
        _ALLOCATOR,
        CPU,
        alloc_extend="prefix_lens prefix_lens_cpu seq_lens seq_lens_cpu last_loc extend_num_tokens num_new_pages",
        alloc_decode="seq_lens seq_lens_cpu last_loc",
    ),
    seam(
        "srt.layers.attention.torch_native_backend:TorchNativeAttnBackend._run_sdpa_forward_extend",
        CPU,
        signature="self query output k_cache v_cache req_to_token req_pool_indices seq_lens extend_prefix_lens "
        "extend_seq_lens encoder_lens scaling enable_gqa causal is_cross_attn sliding_window_size",
    ),
    seam(
        "srt.layers.attention.torch_native_backend:TorchNativeAttnBackend._run_sdpa_forward_decode",
        CPU,
        signature="self query output k_cache v_cache req_to_token req_pool_indices seq_lens encoder_lens scaling "
        "enable_gqa causal is_cross_attn sliding_window_size",
    ),
    seam("srt.layers.sampler:murmur_hash32", CPU, signature="seed positions col_indices"),
    seam("srt.layers.sampler:multinomial_with_seed", CPU, signature="logprobs seed positions"),
    seam("srt.layers.sampler:sampling_from_probs_torch", CPU, signature="probs sampling_seed positions"),
    seam(
        "srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
        CPU,
        signature="probs top_ks top_ps min_ps need_min_p_sampling sampling_seed positions return_filtered_probs",
    ),
    seam("srt.batch_invariant_ops:enable_batch_invariant_mode", CPU, signature="enable_bmm"),
    seam("srt.distributed.bootstrap:_bind_threads_if_cpu", CPU, signature="device"),
    seam("srt.distributed.bootstrap:_init_cpu_threads_env", CPU, signature="local_omp_cpuid dist_init_method"),
    seam("srt.lora.layers:torch", CPU),
    seam("srt.lora.backend.torch_backend:torch", CPU),
)
