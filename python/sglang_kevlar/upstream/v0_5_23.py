"""SGLang 0.5.23, by what differs from 0.5.21 for us. Where our code differs too: ``upstream.differences``."""

from __future__ import annotations

from sglang_kevlar.upstream import v0_5_21
from sglang_kevlar.upstream.contract import Seam, revised

#: the version whose declarations and flags these are a difference to
BASE = "0.5.21"

#: files in sglang_kevlar/patches/0.5.23
PATCHES: tuple[str, ...] = ("0001-ollama-last-text.patch", "0002-tool-call-in-one-step.patch")

SEAMS: tuple[Seam, ...] = revised(
    v0_5_21.SEAMS,
    signatures={
        # Only prefill-decode disaggregation, which is not served, gives it.
        "sglang.srt.managers.scheduler:Scheduler.ingest_requests": "self stop_at_pause",
        "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch": "probs top_ks top_ps min_ps "
        "need_min_p_sampling sampling_seed positions return_filtered_probs max_top_k",
    },
    fields={
        # The slots of a prefix are no longer carried along, they are read off the path in the tree.
        "sglang.srt.managers.schedule_batch:Req": {"prefix_indices": "prefix_len"},
        "sglang.srt.mem_cache.base_prefix_cache:MatchResult": {"device_indices": "device_prefix_len"},
        "sglang.srt.platforms.interface:SRTPlatform": {
            "get_mha_kv_pool_cls": "get_kv_pool_cls",
            "get_mla_kv_pool_cls": "get_kv_pool_cls",
        },
    },
    added=(
        Seam(
            target="sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.path_device_indices",
            roles=("rank",),
            signature=("self", "node"),
        ),
        Seam(
            target="sglang.srt.platforms.interface:SRTPlatform.get_kv_pool_cls",
            roles=("cpu",),
            signature=("self", "kind"),
        ),
    ),
)
