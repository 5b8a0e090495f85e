"""Upstream's TokenizerManager over several worker groups instead of one scheduler."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeAlias

import fastapi
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedEmbeddingReqInput,
    BatchTokenizedGenerateReqInput,
    EmbeddingReqInput,
    GenerateReqInput,
    OpenSessionReqInput,
    ShutdownReq,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
    UnloadLoRAAdapterReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightFromDiskReqOutput,
)
from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS
from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager
from sglang.srt.runtime_context import get_lora
from sglang.srt.server_args import PortArgs, ServerArgs

from sglang_kevlar import __version__
from sglang_kevlar.control.membership import Event
from sglang_kevlar.frontend import cached_weights
from sglang_kevlar.frontend.channels import Channel
from sglang_kevlar.frontend.control_requests import ControlRequests
from sglang_kevlar.frontend.drains import Drains
from sglang_kevlar.frontend.endpoints import GroupStateConflict, UnknownGroup, first_answer
from sglang_kevlar.frontend.failover import Failover
from sglang_kevlar.frontend.groups import WorkerGroups
from sglang_kevlar.frontend.history import History, States
from sglang_kevlar.frontend.host import BatchOutput, Host
from sglang_kevlar.frontend.in_flight import Call
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.loads import GroupLoadReader
from sglang_kevlar.frontend.outcome import Failure, RequestOutcome, outcome_of
from sglang_kevlar.frontend.peers import start as peers
from sglang_kevlar.frontend.peers.kept import KeptPeers
from sglang_kevlar.frontend.replay import RunTimeChanges
from sglang_kevlar.frontend.rolling_weights import RollingWeights
from sglang_kevlar.frontend.tracing import redirect_span
from sglang_kevlar.frontend.wire_check import Unsendable, check_request
from sglang_kevlar.observability.events import FailoverEvents, Redirect
from sglang_kevlar.observability.metrics import NoMetrics, PrometheusMetrics, forget_dead_processes
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.worker.resume import register_wire_types

logger = logging.getLogger(__name__)
Json: TypeAlias = dict[str, Any]

#: seconds between two looks at what the groups say of their shadows
SHADOW_METRICS_INTERVAL = 2.0

#: the HTTP request whose sub-requests are being registered; None for Engine and internal requests
_current_outcome: contextvars.ContextVar[RequestOutcome | None] = contextvars.ContextVar("outcome", default=None)

#: the group a probe is for; None: the router decides
_pinned_group: contextvars.ContextVar[int | None] = contextvars.ContextVar("pinned_group", default=None)

#: the call that a request belongs to: all of it is made with the same weights
_current_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("call", default=None)


class KevlarTokenizerManager(TokenizerManager, Host):
    def __init__(self, server_args: ServerArgs, port_args: PortArgs, *, plan: LaunchPlan, paths: Paths) -> None:
        self.plan = plan
        self.paths = paths
        self.started_at = time.monotonic()
        #: HTTP requests and Engine calls that are under way, in whatever stage
        self._generating = 0
        #: requests that outlive their connection
        self.kept = KeptRuns(plan.kevlar.stream_retention, plan.kevlar.stream_memory << 20)
        #: the HTTP application, where there is one
        self.app: Any = None
        #: with --peers, once it serves
        self.peers: KeptPeers | None = None
        register_wire_types()
        super().__init__(server_args, port_args)

    # ---- instead of upstream's sockets ---------------------------------------------------------------------------

    def init_ipc_channels(self, port_args: PortArgs) -> None:
        """No socket of one scheduler: channels come and go with the groups (`frontend.channels`)."""
        self.recv_from_detokenizer = None
        self.send_to_scheduler = None
        self.tokenizer_ipc_name = None
        groups = range(self.plan.kevlar.worker_groups)
        self._metrics = metrics = PrometheusMetrics(groups) if self.enable_metrics else NoMetrics()
        self.identity = peers.identity_of(self.plan, secure=bool(self.server_args.ssl_certfile))
        self.groups = WorkerGroups(self.plan, self.paths, self._on_membership, self.identity)
        self.failover = Failover(
            host=self,
            groups=self.groups,
            plan=self.plan,
            paths=self.paths,
            # Unlike any other frontend's, also one of another host: groups tell requests apart by it.
            incarnation=f"{os.getpid():x}{uuid.uuid4().hex[:8]}",
            events=FailoverEvents(metrics),
            metrics=metrics,
        )
        self.history = History(self.failover.latency, self._states)
        self.load_snapshot_reader = GroupLoadReader(self.plan, self.failover)
        self.drains = Drains(self.groups.drain, self.failover.move_away, self.failover._task_done)

    def init_communicators(self) -> None:
        super().init_communicators()
        at_start = frozenset(ref.lora_name for ref in get_lora().lora_paths or ())
        self._changes = RunTimeChanges(at_start, self.paths.changes)
        args = self.plan.kevlar
        self._control = ControlRequests(
            self.failover, self.groups.kill, self._changes, self.plan.tp_size, args.control_timeout, self._metrics
        )
        self.failover.journal.weights = self._changes.content
        self.rolling = RollingWeights(
            self.failover, self.groups, self._control, self._changes, args.control_timeout, self._weights_switched
        )
        specs = [(spec[0], spec[1]) for spec in _COMMUNICATOR_SPECS]
        for name, answer in [*specs, ("update_weights_from_disk", UpdateWeightFromDiskReqOutput)]:
            setattr(self, f"{name}_communicator", self._control.communicator(name, answer))

    def auto_create_handle_loop(self) -> None:
        """Upstream's, at the first call of any kind. A later call from another event loop would wait for ever."""
        if self.event_loop is not None and asyncio.get_running_loop() is not self.event_loop:
            raise RuntimeError(
                "this Engine belongs to the event loop of its first call, and was called from another one: make all "
                "calls from one asyncio.run(...), or all of them without one"
            )
        super().auto_create_handle_loop()

    async def handle_loop(self) -> None:
        if self._changes.inherited:
            await self._take_over_changes()
        self.groups.start()
        if self.identity is not None and self.groups.sessions is not None:
            self.peers = peers.start(self.plan, self.identity, self.groups.sessions, self.kept, self.app)
        self.asyncio_tasks.add(asyncio.create_task(self.history.watch()))
        if self.enable_metrics:
            self.asyncio_tasks.add(asyncio.create_task(self._watch_shadows()))
        await self.failover.run()

    async def _watch_shadows(self) -> None:
        while True:
            for group, gauges in self.groups.shadow_gauges().items():
                self._metrics.shadow(group, gauges)
            await asyncio.sleep(SHADOW_METRICS_INTERVAL)

    async def _take_over_changes(self) -> None:
        """Know what a frontend before this one changed: the groups that run have it, those that start will get it."""
        logger.info("taking over the run-time changes of the frontend before")
        changes = self._changes
        if changes.weights is not None:
            self._update_model_path_info(changes.weights.model_path, changes.weights.load_format)
        if changes.weight_version is not None:
            self._update_weight_version_if_provided(changes.weight_version)
        for change in changes.adapters:
            if isinstance(change, UnloadLoRAAdapterReqInput):
                await self.lora_registry.unregister(change.lora_name)
            else:
                await self.lora_registry.register(change.to_ref())
                self.lora_ref_cache[change.lora_name] = change.to_ref()
        self.is_pause = changes.paused

    # ---- requests ------------------------------------------------------------------------------------------------

    async def generate_request(
        self, obj: GenerateReqInput | EmbeddingReqInput, request: fastapi.Request | None = None
    ) -> AsyncIterator[Any]:
        outcome = outcome_of(request)
        _current_outcome.set(outcome)
        call = Call()
        _current_call.set(call)
        stream = super().generate_request(obj, request)
        if outcome is not None and outcome.kept is not None:
            outcome.kept.name(obj)
            stream = outcome.kept.watch(stream)
        self._generating += 1
        try:
            async for output in stream:
                yield output
        finally:
            self._generating -= 1
            self.failover.call_ended(call)
            await stream.aclose()

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        if isinstance(obj, TokenizedGenerateReqInput | TokenizedEmbeddingReqInput):
            _check([obj])
            self.failover.submit(obj, _current_outcome.get(), _pinned_group.get(), _current_call.get())
        elif isinstance(obj, BatchTokenizedGenerateReqInput | BatchTokenizedEmbeddingReqInput):
            _check(obj)
            for item in obj:
                self.failover.submit(item, _current_outcome.get(), call=_current_call.get())
        elif isinstance(obj, AbortReq):
            self.failover.abort(obj)
        elif isinstance(obj, ShutdownReq):
            pass  # the launcher ends the groups, after us
        else:
            self._control.broadcast(obj)

    async def _async_dispatch_to_scheduler(self, obj: Any) -> None:
        self._dispatch_to_scheduler(obj)

    async def open_session(self, obj: OpenSessionReqInput, request: fastapi.Request | None = None) -> None:
        raise fastapi.HTTPException(
            400, "sessions live in one worker group and do not survive it: sglang_kevlar does not serve them"
        )

    def update_request_meta_info(
        self, meta_info: Json, state: ReqState, customized_info: Json, index: int, finish_reason: Json | None
    ) -> None:
        super().update_request_meta_info(meta_info, state, customized_info, index, finish_reason)
        entry = self.failover.journal.get(meta_info["id"])
        if entry is not None and (version := self.rolling.version_of(entry.weights)) is not None:
            # Upstream names those that requests begin with now.
            meta_info["weight_version"] = version
        if entry is not None and entry.redirects:
            meta_info["kevlar"] = {"redirects": entry.redirects, "recomputed_tokens": entry.recomputed_tokens}

    # ---- what the actor asks of us (Host) ------------------------------------------------------------------------

    async def deliver(self, batch: BatchOutput) -> None:
        marked = self.failover.redirected or self.rolling.under_way
        if marked and getattr(batch, "customized_info", batch) is None:
            # An empty value makes upstream call update_request_meta_info, where we say more of some requests.
            batch.customized_info = {}
        await self._handle_batch_output(batch)
        self.last_receive_tstamp = time.time()

    def finish_aborted(self, abort: AbortReq) -> None:
        state = self.rid_to_state.get(abort.rid)
        self._handle_abort_req(abort)
        if state is None:
            return
        if getattr(state.obj, "stream", False) and self.incremental_streaming_output:
            # Upstream repeats the whole text and the last token here, which such a client would append.
            state.out_list[-1].update(text="", output_ids=[])
        if self.enable_lora and state.obj.lora_path:
            # Upstream releases the adapter of some aborted requests only, and only while their client listens.
            state.obj.lora_path = None
            asyncio.get_running_loop().create_task(self.lora_registry.release(state.obj.lora_id))

    def delivered_text(self, rid: str) -> str:
        state = self.rid_to_state.get(rid)
        return "" if state is None else state.get_text()

    def control_reply(self, group: int, epoch: int, reply: Any) -> None:
        if not self._control.answer((group, epoch), reply):
            self._result_dispatcher(reply)

    def redirect_through(self, rid: str, redirect: Redirect) -> None:
        state = self.rid_to_state.get(rid) if self.enable_trace else None
        if state is not None:
            redirect_span(state.time_stats.trace_ctx, redirect)

    def group_lost(self, group: int, epoch: int) -> None:
        self._control.group_lost((group, epoch))
        if self.enable_metrics:
            # Upstream's gauges of the dead ranks would go on showing their last values.
            forget_dead_processes(self.paths.prometheus)

    async def prepare_group(self, channel: Channel) -> str | None:
        return await self._control.prepare(channel)

    # ---- control requests ----------------------------------------------------------------------------------------

    async def _wait_for_model_update_from_disk(self, obj: UpdateWeightFromDiskReqInput) -> tuple[bool, str, Any]:
        answers = await self._control.update_weights_from_disk(obj)
        success = all(answer.success for answer in answers)
        if success:
            self._update_model_path_info(obj.model_path, obj.load_format)
        if len(answers) == 1:
            return success, answers[0].message, answers[0].num_paused_requests
        return (
            success,
            " | ".join(answer.message for answer in answers),
            [answer.num_paused_requests for answer in answers],
        )

    async def roll_weights(self, request: UpdateWeightFromDiskReqInput, deadline: float) -> None:
        """Weights from disk, one group after the other. Raises HTTPException: see `RollingWeights.start`."""
        self.auto_create_handle_loop()
        cached_weights.refuse_writing(request)
        if self.is_pause:
            raise fastapi.HTTPException(409, "generation is paused: requests would not end")
        if request.load_format is None:
            request.load_format = self.config_value("load_format")
        self.rolling.start(request, self.config_value("weight_version"), deadline)

    def _weights_switched(self, request: UpdateWeightFromDiskReqInput) -> None:
        self._update_model_path_info(request.model_path, request.load_format)
        self._update_weight_version_if_provided(request.weight_version)
        if self.mm_processor is not None:
            self.mm_processor.clear_preprocess_cache()

    # ---- operation -----------------------------------------------------------------------------------------------

    def _on_membership(self, event: Event) -> None:
        self.failover.on_event(event)
        self.history.look()

    def _states(self) -> States:
        return [(group, self._state(group, state), epoch) for group, state, epoch in self.groups.states()]

    def _state(self, group: int, state: str) -> str:
        """``starting`` when its processes are ready and it is being brought up to date."""
        channel = self.failover.channels.get(group)
        return "starting" if state == "ready" and (channel is None or not channel.up_to_date) else state

    def kevlar_history(self, instance: str, after: int) -> dict[str, Any]:
        """The JSON of GET /kevlar/history."""
        return self.history.json(instance, after)

    def kevlar_status(self) -> dict[str, Any]:
        """The JSON of GET /kevlar/status."""
        groups = self.groups.snapshot()
        # By the journal: a group that is drained is out of the router and still runs what it has.
        running = Counter(r.entry.attempt.group for r in self.failover.requests.values() if r.entry.attempt is not None)
        for group in groups:
            channel = self.failover.channels.get(group["id"])
            group["state"] = self._state(group["id"], group["state"])
            # Until it is up to date a group may have other weights, and serves none.
            current = channel is not None and channel.up_to_date
            group["weight_version"] = self._weight_version(channel) if channel is not None and current else None
            group["running"] = running[group["id"]]
            group["queued"] = self._queued(group["id"])
            draining = self.groups.is_draining(group["id"])
            group["moves_in_s"] = self.drains.moves_in(group["id"]) if draining else None
        return {
            "version": __version__,
            "upstream": self.plan.upstream,
            "uptime_s": round(time.monotonic() - self.started_at, 3),
            "held": len(self.failover.hold),
            "groups": groups,
            "weights": self.rolling.status(),
            "kept": self.kept.status(),
            "frontends": [] if self.peers is None else self.peers.records.status(),
            "failovers": self.failover.events.history(),
        }

    def _weight_version(self, channel: Channel) -> Any:
        return self.rolling.version_of(channel.weights) or self.config_value("weight_version")

    def _queued(self, group: int) -> int:
        load = self.load_snapshot_reader.read(group)
        return 0 if load is None else load.num_waiting_reqs

    def serves(self) -> bool:
        return bool(self.failover.router.groups)

    async def drain_group(self, group: int, deadline: float) -> None:
        """No new requests to this group; what runs there ends there, or is moved after ``deadline`` seconds."""
        self.rolling.refuse_if_under_way()
        self.drains.drain(self._known(group), deadline)
        self.failover.route()

    async def undrain_group(self, group: int) -> None:
        self.drains.end(self._known(group))
        self.failover.route()

    async def restart_group(self, group: int) -> None:
        """Move the group's requests to the others and start it anew."""
        self.rolling.refuse_if_under_way()
        channel = self.failover.channels.get(self._known(group))
        if channel is None:
            cause = self.groups.cause(group)
            raise GroupStateConflict(f"group {group} is not serving; it is restarted by itself (down: {cause})")
        self.drains.end(group)
        self.groups.kill(group, channel.epoch, "restart asked for by an operator", planned=True)

    def _known(self, group: int) -> int:
        known = self.groups.ids()
        if group not in known:
            raise UnknownGroup(f"there is no worker group {group}; there are {', '.join(map(str, known)) or 'none'}")
        return group

    async def probe_groups(self, timeout: float) -> dict[int, bool]:
        """Whether each serving group generates: one token each, made for this or seen passing by."""
        probes = {group: self._probe(group) for group in list(self.failover.router.groups)}
        return await first_answer(probes, timeout)

    async def _probe(self, group: int) -> bool:
        channel = self.failover.channels[group]
        before = channel.received
        while channel.received == before:
            load = self.failover.router.groups.get(group)
            if load is None:
                return False
            if load.requests == 0:
                await self._generate_one(group)
            else:
                await asyncio.sleep(0.01)
        return True

    async def _generate_one(self, group: int) -> None:
        # Not upstream's health-check id: a scheduler that is busy by now would not answer that one.
        rid = f"kevlar-probe-{uuid.uuid4().hex}"
        fields: dict[str, Any] = {"rid": rid, "input_ids": [0], "log_metrics": False}
        fields["sampling_params"] = {"max_new_tokens": 1, "temperature": 0.0}
        request = GenerateReqInput(**fields) if self.is_generation else EmbeddingReqInput(**fields)
        _pinned_group.set(group)
        try:
            async for _ in self.generate_request(request):
                pass
        finally:
            if rid in self.rid_to_state:
                self.abort_request(rid)

    async def sigterm_watchdog(self) -> None:
        """Drain, then stop the HTTP server. The launcher, which sent the signal, ends the groups after us."""
        while not self.gracefully_exit:
            await asyncio.sleep(0.1)
        self.kept.drain()
        # Not rid_to_state, as upstream does: it keeps an entry for ever of every request with n > 1.
        remaining = -1
        while requests := max(len(self.failover.requests), self._generating):
            if requests != remaining:
                logger.info("draining: %d requests remain", requests)
            remaining = requests
            await asyncio.sleep(0.1)
        self.stop()
        if self._server_stop_hook is not None:
            self._server_stop_hook()

    def stop(self) -> None:
        """End everything of ours on the event loop. Groups live on."""
        for task in self.asyncio_tasks:
            task.cancel()
        self.drains.close()
        self.failover.close()
        self.groups.close()


def _refused_first(name: str) -> None:
    """What is refused at all is, before it aborts requests or takes the lock that all new ones would wait for."""
    upstreams = getattr(TokenizerManager, name)

    @functools.wraps(upstreams)
    async def refusing(self: KevlarTokenizerManager, obj: Any, *args: Any, **kwargs: Any) -> Any:
        cached_weights.refuse_writing(obj)
        if name not in _WHILE_ROLLING:
            self.rolling.refuse_if_under_way()
        return await upstreams(self, obj, *args, **kwargs)

    setattr(KevlarTokenizerManager, name, refusing)


#: may come while weights go from group to group
_WHILE_ROLLING = ("check_weights", "release_memory_occupation", "resume_memory_occupation")

for _name in (
    *_WHILE_ROLLING,
    "begin_weight_update",
    "end_weight_update",
    "load_lora_adapter",
    "load_lora_adapter_from_tensors",
    "pause_generation",
    "unload_lora_adapter",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
    "update_weights_from_tensor",
):
    _refused_first(_name)


def _check(requests: Iterable[Any]) -> None:
    """All of them, before any is submitted. Raises Unsendable, which is also the outcome of the HTTP request."""
    try:
        for request in requests:
            check_request(request)
    except Unsendable as error:
        if (outcome := _current_outcome.get()) is not None:
            # Upstream has begun a stream by now; as the outcome it becomes a proper error response.
            outcome.fail(Failure(400, str(error), "invalid"))
        raise
