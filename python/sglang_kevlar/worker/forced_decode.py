"""Decoding again, step by step, the few delivered tokens whose KV did not reach the shadow.

Prefill and decode round differently, so in bf16 a prefill over those tokens takes the other branch of a near-tie in
about every tenth stream (benchmark/shadow_rounding.py). Instead the request goes on where its KV ends: it is given its
delivered tokens only up to there, and decodes the rest as ordinary steps of the batch, in which what was sampled is
replaced, on the device and before anything reads it, by what was delivered. Nothing of it is sent a second time.

The token to put in follows from the position alone, so retractions and chunked prefill need no extra care.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

#: More missing tokens than this are prefilled: a step for each would cost the client more time than it is worth.
MAX_FORCED_TOKENS = 32


def first_forced(req: Req, with_kv: int) -> int | None:
    """How many delivered tokens ``req`` keeps to go on from where its KV ends; None: it is to be prefilled.

    ``with_kv``: tokens of its context that the tree has, from the first on.
    """
    kept = with_kv + 1 - len(req.origin_input_ids)
    return kept if 0 < kept < len(req.output_ids) <= kept + MAX_FORCED_TOKENS else None


class ForcedDecode:
    """Of one rank. All ranks of a group do the same, as all of it follows from requests and tree."""

    def __init__(self, model_worker: Any) -> None:
        self._forced: weakref.WeakSet[Req] = weakref.WeakSet()
        #: rows of the batch, and their tokens (2, n), on the host: each stream uploads its own, which lives as long as
        #: that stream needs it
        self._pending: torch.Tensor | None = None
        self._forward: Callable[..., Any] = model_worker.forward_batch_generation
        model_worker.forward_batch_generation = self._forward_and_force

    def begin(self, req: Req, kept: int) -> None:
        """``req``, about to be queued with all its delivered tokens, is given the first ``kept`` of them."""
        req.kevlar_delivered = req.output_ids
        req.output_ids = req.output_ids[:kept]
        self._forced.add(req)

    @contextmanager
    def in_step(self, batch: ScheduleBatch) -> Iterator[None]:
        """Around a forward pass of ``batch``: what it samples is replaced where it was delivered long ago."""
        self._pending = self._known_tokens(batch) if self._forced else None
        try:
            yield
        finally:
            self._pending = None

    def _known_tokens(self, batch: ScheduleBatch) -> torch.Tensor | None:
        rows, tokens = [], []
        for row, req in enumerate(batch.reqs):
            delivered = req.__dict__.get("kevlar_delivered")
            if delivered is not None:
                # The context of this step; what it samples stands behind it.
                position = int(batch.seq_lens_cpu[row]) - len(req.origin_input_ids)
                if 0 <= position < len(delivered):
                    rows.append(row)
                    tokens.append(delivered[position])
        if not rows:
            return None
        return torch.tensor([rows, tokens], pin_memory=torch.device(batch.device).type == "cuda")

    def _forward_and_force(self, *args: Any, **kwargs: Any) -> Any:
        result = self._forward(*args, **kwargs)
        if (known := self._pending) is None:
            return result
        sample = result.delay_sample_func
        if sample is not None:

            def sample_and_force() -> Any:
                sampled = sample()
                _put(sampled.next_token_ids, known)
                return sampled

            result.delay_sample_func = sample_and_force
        elif result.next_token_ids is not None:  # as on all stages of a pipeline but the last
            _put(result.next_token_ids, known)
        return result

    def check(self, batch: ScheduleBatch) -> None:
        """After a result was processed. Raises AssertionError when a request took another way than it was given."""
        if not self._forced:
            return
        for req in batch.reqs:
            delivered = req.__dict__.get("kevlar_delivered")
            if delivered is None:
                continue
            last = len(req.output_ids) - 1
            if last < len(delivered):
                assert req.output_ids[last] == delivered[last], f"request {req.rid}: token {last} was changed"
            else:
                self._end(req)
            if req.finished():
                self._end(req)

    def _end(self, req: Req) -> None:
        req.__dict__.pop("kevlar_delivered", None)
        self._forced.discard(req)


def _put(sampled: torch.Tensor, known: torch.Tensor) -> None:
    """In the stream in which ``sampled`` is made."""
    rows, tokens = known.to(sampled.device, non_blocking=True)
    sampled[rows] = tokens.to(sampled.dtype)


class ForcedOutputStreamer(SchedulerOutputStreamer):  # type: ignore[misc]
    """Upstream's, which sends nothing of a request whose client has it all."""

    def stream_output(self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None) -> None:
        shown = [req for req in reqs if not _hidden(req)]
        if shown or not reqs:
            SchedulerOutputStreamer.stream_output(self, shown, return_logprob, skip_req)


def _hidden(req: Req) -> bool:
    delivered: array[int] | None = req.__dict__.get("kevlar_delivered")
    if delivered is None or len(req.output_ids) > len(delivered):
        return False
    if req.finished():
        # Aborted on the way: its usage is of what was delivered.
        req.output_ids = delivered
        req.finished_len = len(delivered)
        return False
    return True
