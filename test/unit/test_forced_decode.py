"""Decoding delivered tokens again: which, what replaces what was sampled, and what is not sent."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer  # noqa: E402

from sglang_kevlar.worker.forced_decode import (  # noqa: E402
    MAX_FORCED_TOKENS,
    ForcedDecode,
    ForcedOutputStreamer,
    first_forced,
)


class FakeReq:
    def __init__(self, prompt: int, delivered: int) -> None:
        self.rid = "r"
        self.origin_input_ids = array("q", range(prompt))
        self.output_ids = array("q", range(100, 100 + delivered))
        self.end: Any = None

    def finished(self) -> bool:
        return self.end is not None


class Worker:
    """Samples token 7 for every row."""

    def __init__(self, delayed: bool) -> None:
        self.delayed = delayed

    def forward_batch_generation(self, batch: Any) -> Any:
        result = SimpleNamespace(next_token_ids=None, delay_sample_func=None)

        def sample() -> Any:
            result.next_token_ids = torch.full((len(batch.reqs),), 7, dtype=torch.int32)
            return result

        if self.delayed:
            result.delay_sample_func = sample
            return result
        return sample()


@pytest.mark.parametrize(
    ("with_kv", "kept"),
    [
        (9, None),  # the prompt is not complete: it is prefilled, as it was the first time
        (10, None),
        (49 - MAX_FORCED_TOKENS - 1, None),  # too much is missing
        (49 - MAX_FORCED_TOKENS, 40 - MAX_FORCED_TOKENS),
        (48, 39),
        (49, None),  # nothing is missing but the last token, which is an input in any case
    ],
)
def test_it_goes_on_from_the_token_behind_its_kv(with_kv: int, kept: int | None) -> None:
    assert first_forced(FakeReq(prompt=10, delivered=40), with_kv) == kept  # type: ignore[arg-type]


@pytest.mark.parametrize("delayed", [False, True])
def test_delivered_tokens_replace_sampled_ones_until_they_are_used_up(
    delayed: bool, sent: list[tuple[int, ...]]
) -> None:
    worker = Worker(delayed)
    forced = ForcedDecode(worker)
    req, other = FakeReq(prompt=10, delivered=6), FakeReq(prompt=3, delivered=2)
    forced.begin(req, kept=3)  # type: ignore[arg-type]
    assert list(req.output_ids) == [100, 101, 102]
    for step in range(5):
        batch = SimpleNamespace(
            reqs=[other, req], device="cpu", seq_lens_cpu=torch.tensor([5 + step, 13 + step]), return_logprob=False
        )
        with forced.in_step(batch):
            result = worker.forward_batch_generation(batch)
        if delayed:  # as the overlap schedule does for grammars, in the next step
            assert result.delay_sample_func() is result
        sampled = result.next_token_ids.tolist()
        other.output_ids.append(sampled[0])
        req.output_ids.append(sampled[1])
        stream(batch.reqs)
        forced.check(batch)
    assert list(other.output_ids) == [100, 101, 7, 7, 7, 7, 7]
    assert list(req.output_ids) == [100, 101, 102, 103, 104, 105, 7, 7]
    assert sent == [(3,), (4,), (5,), (6, 7), (7, 8)]


def test_a_token_that_was_changed_is_noticed() -> None:
    forced = ForcedDecode(Worker(delayed=False))
    req = FakeReq(prompt=10, delivered=6)
    forced.begin(req, kept=3)  # type: ignore[arg-type]
    req.output_ids.append(7)
    with pytest.raises(AssertionError, match="token 3 was changed"):
        forced.check(SimpleNamespace(reqs=[req]))  # type: ignore[arg-type]


def test_one_aborted_on_the_way_ends_with_what_was_delivered(sent: list[tuple[int, ...]]) -> None:
    forced = ForcedDecode(Worker(delayed=False))
    req = FakeReq(prompt=10, delivered=6)
    forced.begin(req, kept=3)  # type: ignore[arg-type]
    req.end = "abort"
    stream([req])
    forced.check(SimpleNamespace(reqs=[req]))  # type: ignore[arg-type]
    assert sent == [(6,)]
    # Its client has all of it: from here on nothing is replaced or hidden.
    stream([req])
    assert sent == [(6,), (6,)]


def stream(reqs: list[FakeReq]) -> None:
    ForcedOutputStreamer.stream_output(object.__new__(ForcedOutputStreamer), reqs, False)  # type: ignore[arg-type]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The lengths of the outputs of the requests of which something was sent, by step."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        SchedulerOutputStreamer,
        "stream_output",
        lambda self, reqs, *_: seen.append(tuple(len(req.output_ids) for req in reqs)),
    )
    return seen
