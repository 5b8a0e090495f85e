"""Sampling penalties that depend on the tokens of a request, and on nothing else.

Upstream counts output tokens into per-batch tensors as batches go by. Three things make the counts depend on timing
or on the process, and with them the tokens of a request that is continued elsewhere:

* every extend starts from zero, also that of a retracted or resumed request: `replay_outputs`;
* under the overlap schedule the token to count next is read from ``Req.output_ids`` before the previous step was
  processed, so counts lag by a step whenever batches overlap (and the last prompt token is counted as output):
  `count_inputs` counts the ids that the forward pass reads, on the device, and `skip_host_count` replaces upstream's;
* the penalizers are kept in a set of classes, ordered by address: with the overlap schedule off (pipeline parallelism
  too), subtraction and scaling are applied in an order that differs from process to process: `fix_order`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)
from sglang.srt.utils.common import is_pin_memory_available

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

#: Additive before multiplicative, as the overlap schedule always has it.
ORDER = (
    BatchedFrequencyPenalizer,
    BatchedPresencePenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedRepetitionPenalizer,
)


def after_build(_: None, info: SamplingBatchInfo, batch: ScheduleBatch, vocab_size: int) -> None:
    """Hook, after ``SamplingBatchInfo.adjusted_from_schedule_batch``."""
    orchestrator = info.penalizer_orchestrator
    fix_order(orchestrator)
    if orchestrator.is_required:
        replay_outputs(orchestrator, batch)


def skip_host_count(original: Callable[[ScheduleBatch], None], batch: ScheduleBatch) -> None:
    """Hook, around ``ScheduleBatch.cumulate_penalty_output_tokens``."""
    if not _counts_on_device(batch):
        original(batch)


def fix_order(orchestrator: BatchedPenalizerOrchestrator) -> None:
    penalizers = orchestrator.penalizers
    # An unknown penalizer fails here, at start-up's first batch, rather than being applied at a random place.
    orchestrator.penalizers = {kind: penalizers[kind] for kind in sorted(penalizers, key=ORDER.index)}


def replay_outputs(orchestrator: BatchedPenalizerOrchestrator, batch: ScheduleBatch) -> None:
    """Count what the requests of a new batch have already generated, in one scatter per penalizer."""
    # A batch that goes straight to decode has its last token counted by that step.
    mode = batch.forward_mode
    held_back = 0 if mode is not None and mode.is_extend() else 1
    rows: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    for row, req in enumerate(batch.reqs):
        count = len(req.output_ids) - held_back
        if count > 0:
            rows.append(torch.full((count,), row, dtype=torch.int64))
            tokens.append(torch.tensor(req.output_ids[:count], dtype=torch.int64))
    if not rows:
        return
    where = torch.stack([torch.cat(rows), torch.cat(tokens)])
    if is_pin_memory_available(batch.device):
        where = where.pin_memory()
    where = where.to(batch.device, non_blocking=True)
    count_tokens(orchestrator, where[0], where[1])


def count_inputs(batch: ScheduleBatch) -> None:
    """Count the tokens that this forward pass decodes from. To be called between resolving them and copying the
    accumulated penalties, in the stream of the forward pass.

    Nothing synchronises. The schedule stream filters and merges these tensors later, and is ordered behind this by
    upstream's write-after-read barrier, whose event comes further down in the same forward pass (on by default with
    CUDA; elsewhere SGLANG_ENABLE_WAR_BARRIER=1).
    """
    info = batch.sampling_info
    if info is None or not info.penalizer_orchestrator.is_required or not _counts_on_device(batch):
        return
    orchestrator = info.penalizer_orchestrator
    batch_size = len(batch.reqs)
    if batch.forward_mode.is_decode():
        # rows behind the requests are beam members, which have no penalizer rows
        orchestrator.cumulate_output_tokens(batch.input_ids[:batch_size])
    elif batch.forward_mode.is_extend() and batch.decoding_reqs:
        # mixed batch: prefills first, then one token of each decoding request
        decoding = len(batch.decoding_reqs)
        rows = torch.arange(batch_size - decoding, batch_size, device=batch.input_ids.device)
        count_tokens(orchestrator, rows, batch.input_ids[-decoding:])


def count_tokens(orchestrator: BatchedPenalizerOrchestrator, rows: torch.Tensor, tokens: torch.Tensor) -> None:
    """Count token ``tokens[i]`` for row ``rows[i]`` of the batch; both (n,) int64, rows may repeat.

    Equal addends are added one by one, not as a product, so the sums are bit for bit those of counting step by step.
    """
    at = rows * orchestrator.vocab_size + tokens
    for kind, penalizer in orchestrator.penalizers.items():
        if not penalizer.is_prepared():
            continue
        if kind is BatchedFrequencyPenalizer:
            penalties = penalizer.frequency_penalties.view(-1)[rows]
            penalizer.cumulated_frequency_penalties.view(-1).scatter_add_(0, at, penalties)
        elif kind is BatchedPresencePenalizer:
            penalizer.cumulated_presence_penalties.view(-1).scatter_(0, at, penalizer.presence_penalties.view(-1)[rows])
        elif kind is BatchedRepetitionPenalizer:
            penalties = penalizer.repetition_penalties.view(-1)[rows]
            penalizer.cumulated_repetition_penalties.view(-1).scatter_(0, at, penalties)
        else:
            lengths = penalizer.len_output_tokens.view(-1)
            lengths.scatter_add_(0, rows, torch.ones_like(rows, dtype=lengths.dtype))


def _counts_on_device(batch: ScheduleBatch) -> bool:
    # Speculative decoding counts accepted tokens itself, after they are known.
    return bool(batch.enable_overlap and batch.spec_algorithm.is_none())
