"""Upstream's scheduler, which can also take up a request in the middle and say whether it is alive."""

from __future__ import annotations

import dataclasses
import logging
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, ClassVar, Protocol

import torch
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedEmbeddingReqInput,
    BatchTokenizedGenerateReqInput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.runtime_context import get_parallel
from sglang.utils import TypeBasedDispatcher

from sglang_kevlar.protocol.group import SHADOW_ENDPOINT
from sglang_kevlar.protocol.resume import MOVED
from sglang_kevlar.shadow.lookup import PromoteReq
from sglang_kevlar.shadow.promote import Promoter
from sglang_kevlar.shadow.rank import RankShadow
from sglang_kevlar.upstream.differences import cached_prefix
from sglang_kevlar.worker.forced_decode import ForcedDecode, ForcedOutputStreamer, first_forced
from sglang_kevlar.worker.penalties import count_inputs
from sglang_kevlar.worker.resume import (
    ResumedGenerateReqInput,
    ShadowPlanReq,
    StartedReqOutput,
    apply_resume,
    register_wire_types,
    undo_resume,
    why_not_resumable,
)
from sglang_kevlar.worker.weights.messages import FetchWeightsReq, ServeWeightsReq
from sglang_kevlar.worker.weights.rank import RankWeights

logger = logging.getLogger(__name__)

#: What is queued and answered by forward passes; everything else is answered at once, by the loop itself.
_WORK = (
    TokenizedGenerateReqInput,
    BatchTokenizedGenerateReqInput,
    TokenizedEmbeddingReqInput,
    BatchTokenizedEmbeddingReqInput,
)


class Heartbeat(Protocol):
    """Called at every step, from the scheduler's thread: microseconds at most. See ``protocol.heartbeat``."""

    def forward(self, tokens: int) -> None: ...

    def idle(self) -> None: ...

    def control(self) -> None: ...

    def wait(self) -> None: ...


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class PromotingReceiver(SchedulerRequestReceiver):  # type: ignore[misc]
    """Upstream's receiver, which can put something before a request into the broadcast to all ranks."""

    promote: Callable[[list[Any]], list[Any]]

    def _pull_raw_reqs(self) -> list[Any] | None:
        # super() without arguments does not work in a class with slots made by the decorator.
        messages: list[Any] | None = SchedulerRequestReceiver._pull_raw_reqs(self)
        # Later stages of a pipeline get what the first one received, with what is before it.
        return self.promote(messages) if messages is not None and get_parallel().pp_rank == 0 else messages


class KevlarScheduler(Scheduler):  # type: ignore[misc]
    #: Set on the class by the rank process before it constructs the scheduler.
    heartbeat: ClassVar[Heartbeat | None] = None
    #: of a pipeline: not the first
    _later_stage = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        register_wire_types()
        #: the resume of the request that is just being taken in
        self._arriving_resume: Any = None
        self.shadow: RankShadow | None = None
        self._promoter: Promoter | None = None
        self.weights: RankWeights | None = None
        super().__init__(*args, **kwargs)
        #: Tokens of the batches that may be in flight. With overlap a step waits for the batch before; a pipeline
        #: stage waits for all microbatches.
        parallel = get_parallel()
        depth = parallel.pp_size + parallel.pp_async_batch_depth if parallel.pp_size > 1 else 2
        self._in_flight: deque[int] = deque(maxlen=depth)
        self._later_stage = parallel.pp_rank > 0
        self._forced = ForcedDecode(self.model_worker)
        self.shadow, self._promoter = self.start_shadow()
        self.weights = self.make_weights()

    def start_shadow(self) -> tuple[RankShadow | None, Promoter | None]:
        """This rank's part of the shadow. A rank process, which knows its group, makes one."""
        return None, None

    def make_weights(self) -> RankWeights | None:
        """This rank's part in handing weights from group to group. Also of a rank process."""
        return None

    def get_init_info(self) -> dict[str, Any]:
        said: dict[str, Any] = super().get_init_info()
        return said if self.shadow is None else {**said, SHADOW_ENDPOINT: self.shadow.endpoint}

    # --- resuming a request

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        self._request_dispatcher += TypeBasedDispatcher(
            [
                (ResumedGenerateReqInput, self.handle_resumed_request),
                (PromoteReq, self._promote),
                (ShadowPlanReq, self._follow_shadow_plan),
                (ServeWeightsReq, self._serve_weights),
                (FetchWeightsReq, self._fetch_weights),
            ]
        )

    def handle_resumed_request(self, recv_req: ResumedGenerateReqInput) -> None:
        """Take in a request that already has output. Whatever is wrong with it ends the request, not the scheduler."""
        if reason := why_not_resumable(recv_req):
            self._refuse_resume(recv_req, reason)
            return
        queued_for_grammar = len(self.grammar_manager.grammar_queue)
        self._arriving_resume = recv_req.resume
        try:
            self.handle_generate_request(recv_req)
        finally:
            self._arriving_resume = None
        # Its grammar is being compiled: it comes to _add_request_to_queue later, with the resume on it.
        for req in self.grammar_manager.grammar_queue[queued_for_grammar:]:
            req.kevlar_resume = recv_req.resume

    def _refuse_resume(self, recv_req: ResumedGenerateReqInput, reason: str) -> None:
        message = f"Request {recv_req.rid} cannot be continued after the loss of its worker group: {reason}."
        logger.error(message)
        finished_reason = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": message}
        self.ipc_channels.send_to_tokenizer.send_output(
            AbortReq(rid=recv_req.rid, finished_reason=finished_reason), recv_req
        )

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        resume = req.__dict__.pop("kevlar_resume", None) or self._arriving_resume
        if resume is not None and req.to_finish is None and not req.finished():
            try:
                apply_resume(req, resume, self)
            except Exception as error:
                undo_resume(req)
                req.set_finish_with_abort(
                    f"Request {req.rid} cannot be continued after the loss of its worker group: {error}.",
                    status_code=HTTPStatus.SERVICE_UNAVAILABLE,
                    err_type="ServiceUnavailableError",
                )
        super()._add_request_to_queue(req, is_retracted)
        if resume is not None and self.waiting_queue and self.waiting_queue[-1] is req:
            self._move_to_front(req)

    def _move_to_front(self, req: Req) -> None:
        """A client that already sees its answer does not wait behind new requests."""
        self.waiting_queue.pop()
        position = next((i for i, queued in enumerate(self.waiting_queue) if not queued.retracted_stain), None)
        self.waiting_queue.insert(len(self.waiting_queue) if position is None else position, req)

    def _abort_on_queued_limit(self, recv_req: Req) -> bool:
        # --max-queued-requests is for new work: what was accepted once is not turned away, wherever it goes.
        accepted = recv_req.retracted_stain or recv_req.rid.endswith(MOVED)
        return False if accepted else super()._abort_on_queued_limit(recv_req)

    def _report_started(self, batch: ScheduleBatch) -> None:
        """Tell the frontend which requests run for the first time here, before they do: they may be what kills us.

        And how much of a resumed one is prefilled again: all that no prefix in the tree covers.
        """
        for req in batch.reqs:
            if "kevlar_started" not in req.__dict__:
                req.kevlar_started = True
                context = req.__dict__.pop("kevlar_resumed_context", None)
                recomputed = 0 if context is None else context - cached_prefix(req)
                report = StartedReqOutput(rid=req.rid, recomputed_tokens=recomputed)
                self.ipc_channels.send_to_tokenizer.send_output(report, req)
                if self.shadow is not None:
                    self.shadow.exporter.begin(req)

    # --- decoding the last delivered tokens again

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return ForcedOutputStreamer

    def begin_forced_decode(self, req: Req) -> None:
        """Where the KV of all but a few delivered tokens of ``req`` is cached, have these decoded, not prefilled."""
        # In float32 both round alike, as far as tokens can tell, and a prefill is faster.
        if self.model_config.dtype == torch.float32 or not self.spec_algorithm.is_none():
            return
        if self.disable_radix_cache or not hasattr(self.tree_cache, "tree_core"):
            return
        tokens = array("q", req.origin_input_ids) + req.output_ids
        key = RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt)
        cached, _, _ = self.tree_cache.tree_core.match_full_device_prefix(key)
        kept = first_forced(req, cached)
        if kept is not None:
            self._forced.begin(req, kept)

    # --- the shadow

    def init_request_receiver(self) -> None:
        super().init_request_receiver()
        plain: SchedulerRequestReceiver = self.request_receiver  # type: ignore[has-type]
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        self.request_receiver = PromotingReceiver(**fields, promote=self._with_promotions)

    def _with_promotions(self, messages: list[Any]) -> list[Any]:
        if self.shadow is None:
            return messages
        if not messages and self._may_promote_ahead():
            return list(self.shadow.promotions_ahead())
        return self.shadow.with_promotions(messages)

    def _may_promote_ahead(self) -> bool:
        """Whether nothing runs or waits, and the pool is there: of a paused engine it may have been released."""
        return not self._engine_paused and not self.weight_updater.offload_tags and bool(self.is_fully_idle())

    def _promote(self, promote: PromoteReq) -> None:
        if self._promoter is not None:
            self._promoter.apply(promote)
        else:  # its transport did not start here, say; so this rank has not answered the lookup
            assert promote.blocks == 0

    def _follow_shadow_plan(self, plan: ShadowPlanReq) -> None:
        if self.shadow is not None:
            self.shadow.follow(plan)

    def flush_cache(self, empty_cache: bool = True) -> bool:
        flushed = bool(super().flush_cache(empty_cache))
        if flushed and self.shadow is not None:
            self.shadow.flushed()
        return flushed

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        if self.shadow is not None or self._promoter is not None:
            self._wait_for_pass(result)
        if self.shadow is not None:
            self.shadow.exporter.before_result(batch)
        if self._promoter is not None:
            self._promoter.auditor.before_result(batch)
        super().process_batch_result(batch, result)
        self._forced.check(batch)
        if self.shadow is not None:
            self.shadow.exporter.after_result(batch)

    def _wait_for_pass(self, result: Any) -> None:
        """As upstream is about to. Behind a collective that is given up anything is computed, which must not be copied:
        a rank that leaves its epoch gets no further than here."""
        if result.copy_done is not None:
            result.copy_done.synchronize()
        elif self.device == "cuda" and get_parallel().pp_size == 1:  # the loop of a pipeline has waited
            torch.cuda.current_stream().synchronize()

    # --- weights that go to another group, or come from one

    def _serve_weights(self, request: ServeWeightsReq) -> None:
        assert self.weights is not None, "only frontends ask for it, and they have groups"
        self.weights.serve(request)

    def _fetch_weights(self, request: FetchWeightsReq) -> None:
        assert self.weights is not None, "only frontends ask for it, and they have groups"
        self.weights.fetch(request)

    # --- penalties under the overlap schedule

    @contextmanager
    def _forward_isolation(self, batch: ScheduleBatch, *, overlap: bool) -> Iterator[None]:
        if overlap:
            count_inputs(batch)
        with super()._forward_isolation(batch, overlap=overlap):
            yield

    # --- heartbeat

    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        if batch.forward_mode.is_extend():
            self._report_started(batch)
        if self.heartbeat is not None:
            extend = batch.forward_mode.is_extend() and batch.extend_num_tokens
            self._in_flight.append(extend or len(batch.reqs))
            self.heartbeat.forward(sum(self._in_flight))
        with self._forced.in_step(batch):
            return super().run_batch(batch, *args, **kwargs)

    # A later stage of a pipeline waits for the one before it, which may be busy with a batch or a control request that
    # this one knows nothing of. The first stage waits for the last: its deadline is for all of them.

    def ingest_requests(self, *args: Any, **kwargs: Any) -> list[Any]:
        if self._later_stage and self.heartbeat is not None:
            self.heartbeat.wait()
        received: list[Any] = super().ingest_requests(*args, **kwargs)
        return received

    def _pp_recv_proxy_tensors(self) -> Any:
        if self._later_stage and self.heartbeat is not None:
            self.heartbeat.wait()
        return super()._pp_recv_proxy_tensors()

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        if self.heartbeat is not None and not all(isinstance(recv_req, _WORK) for recv_req in recv_reqs):
            self.heartbeat.control()
        if self.weights is not None:
            self.weights.before(recv_reqs)
        super().process_input_requests(recv_reqs)
        if self.weights is not None and (answer := self.weights.turn()) is not None:
            self.ipc_channels.send_to_tokenizer.send_output(answer)
        # Scheduling what arrived is work with a deadline. If nothing comes of it, the loop says idle.
        if self.heartbeat is not None and (recv_reqs or (self._later_stage and self._in_flight)):
            self.heartbeat.forward(sum(self._in_flight))

    def on_idle(self) -> None:
        self._beat_idle()
        if self.shadow is not None:
            self.shadow.exporter.idle()
        super().on_idle()

    def _record_scheduler_state_for_paused_engine(self) -> None:
        # A paused engine neither runs batches nor counts as idle upstream.
        self._beat_idle()
        super()._record_scheduler_state_for_paused_engine()

    def _beat_idle(self) -> None:
        if self.heartbeat is not None:
            self._in_flight.clear()
            self.heartbeat.idle()
