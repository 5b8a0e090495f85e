"""Penalties after a resume and under the overlap schedule, on upstream's own penalizers."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")

import torch  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.sampling import penaltylib  # noqa: E402

from sglang_kevlar.worker import penalties  # noqa: E402

VOCAB = 50
STOP = 3


class Batch(SimpleNamespace):
    """Weakly referenced by the orchestrator, as a ScheduleBatch is."""


def request(output_ids: list[int], **params: Any) -> Any:
    defaults = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    return SimpleNamespace(
        sampling_params=SimpleNamespace(stop_token_ids={STOP}, **(defaults | params)),
        output_ids=output_ids,
        eos_token_ids={STOP},
        tokenizer=SimpleNamespace(additional_stop_token_ids=None, eos_token_id=STOP),
    )


def orchestrator(batch: Batch) -> Any:
    kinds = {
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
    }
    return penaltylib.BatchedPenalizerOrchestrator(vocab_size=VOCAB, batch=batch, penalizers=kinds)


def batch_of(outputs: list[list[int]], mode: ForwardMode = ForwardMode.EXTEND) -> Batch:
    kinds: list[dict[str, Any]] = [
        {"frequency_penalty": 0.3},
        {"presence_penalty": 0.7, "repetition_penalty": 1.3},
        {"frequency_penalty": 0.1, "presence_penalty": 0.2, "repetition_penalty": 1.7, "min_new_tokens": 9},
        {},
    ]
    reqs = [request(output, **kinds[i % len(kinds)]) for i, output in enumerate(outputs)]
    return Batch(reqs=reqs, device="cpu", forward_mode=mode, decoding_reqs=None)


def applied(orch: Any, rows: int) -> torch.Tensor:
    logits = torch.linspace(-4, 4, rows * VOCAB).view(rows, VOCAB).clone()
    orch.apply(logits)
    return logits


def count_step_by_step(batch: Batch) -> Any:
    """What upstream does while the requests run undisturbed, one token of each per step (0 where there is none)."""
    singles = []
    for req in batch.reqs:
        single = Batch(reqs=[req], device="cpu")
        orch = orchestrator(single)
        penalties.fix_order(orch)
        for token in req.output_ids:
            orch.cumulate_output_tokens(torch.tensor([token]))
        singles.append((single, orch))
    return singles


def expected(batch: Batch) -> torch.Tensor:
    rows = len(batch.reqs)
    logits = torch.linspace(-4, 4, rows * VOCAB).view(rows, VOCAB).clone()
    for row, (_, orch) in enumerate(count_step_by_step(batch)):
        if orch.is_required:
            orch.apply(logits[row : row + 1])
    return logits


@pytest.mark.parametrize("seed", range(8))
def test_replay_is_bit_for_bit_what_counting_step_by_step_gives(seed: int) -> None:
    generator = random.Random(seed)
    outputs = [[generator.randrange(VOCAB) for _ in range(generator.choice([0, 1, 8, 200]))] for _ in range(7)]
    batch = batch_of(outputs)
    orch = orchestrator(batch)
    info = SimpleNamespace(penalizer_orchestrator=orch)
    penalties.after_build(None, info, batch, VOCAB)  # type: ignore[arg-type]
    assert torch.equal(applied(orch, len(outputs)), expected(batch))


def test_a_batch_that_goes_straight_to_decode_leaves_its_last_token_to_that_step() -> None:
    batch = batch_of([[5, 6, 6], [7], [8, 9], []], ForwardMode.PREBUILT)
    orch = orchestrator(batch)
    penalties.fix_order(orch)
    penalties.replay_outputs(orch, batch)  # type: ignore[arg-type]
    orch.cumulate_output_tokens(torch.tensor([6, 7, 9, 0]))
    assert torch.equal(applied(orch, 3 + 1), expected(batch))


def overlapping(batch: Batch, orch: Any, input_ids: list[int], *, overlap: bool = True) -> Any:
    batch.enable_overlap = overlap
    batch.spec_algorithm = SimpleNamespace(is_none=lambda: True)
    batch.sampling_info = SimpleNamespace(penalizer_orchestrator=orch)
    batch.input_ids = torch.tensor(input_ids)
    return batch


def test_overlapped_decode_counts_the_ids_that_the_forward_pass_reads() -> None:
    batch = batch_of([[5, 6], [7, 7], [8, 9], [1, 1]], ForwardMode.DECODE)
    orch = orchestrator(batch)
    penalties.fix_order(orch)
    # The last value belongs to a beam member, which has no row here.
    for ids in ([5, 7, 8, 1, 40], [6, 7, 9, 1, 41]):
        penalties.count_inputs(overlapping(batch, orch, ids))
    assert torch.equal(applied(orch, 4), expected(batch))


def test_mixed_batch_counts_only_its_decoding_requests() -> None:
    batch = batch_of([[], [], [8, 9], [1]], ForwardMode.MIXED)
    orch = orchestrator(batch)
    penalties.fix_order(orch)
    batch.decoding_reqs = batch.reqs[2:]
    penalties.count_inputs(overlapping(batch, orch, [30, 31, 32, 33, 8, 1]))
    batch.decoding_reqs = batch.reqs[2:3]
    moved = batch.reqs
    batch.reqs = moved[:3]
    penalties.count_inputs(overlapping(batch, orch, [30, 31, 32, 33, 9]))
    batch.reqs = moved
    assert torch.equal(applied(orch, 4), expected(batch))


def test_without_overlap_upstream_counts() -> None:
    batch = batch_of([[5]], ForwardMode.DECODE)
    orch = orchestrator(batch)
    before = applied(orch, 1)
    penalties.count_inputs(overlapping(batch, orch, [5], overlap=False))
    assert torch.equal(applied(orch, 1), before)
    called: list[Any] = []
    penalties.skip_host_count(called.append, batch)
    batch.enable_overlap = True
    penalties.skip_host_count(called.append, batch)
    assert called == [batch]


def test_order_of_penalizers_does_not_depend_on_addresses() -> None:
    for _ in range(5):
        batch = batch_of([[1], [2], [3]])
        orch = orchestrator(batch)
        kinds = list(orch.penalizers)
        random.shuffle(kinds)
        orch.penalizers = {kind: orch.penalizers[kind] for kind in kinds}
        penalties.fix_order(orch)
        assert tuple(orch.penalizers) == penalties.ORDER
