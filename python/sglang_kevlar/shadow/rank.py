"""A rank's whole part in shadowing: source of its own KV, and store of another group's."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import FlushCacheReqInput
from sglang.srt.runtime_context import get_parallel

from sglang_kevlar.control.shadow_keys import block_tokens
from sglang_kevlar.protocol.launch import LaunchPlan, Paths, window_name
from sglang_kevlar.protocol.shadow import SHADOW_VERSION, Layout, ShadowCounters
from sglang_kevlar.shadow.export import Exporter
from sglang_kevlar.shadow.pool import PoolRows
from sglang_kevlar.shadow.promote import Lookups, Promoter, PromoteReq
from sglang_kevlar.shadow.sender import ShadowSender, Target
from sglang_kevlar.shadow.server import ShadowServer
from sglang_kevlar.shadow.store import ShadowStore
from sglang_kevlar.transport import TransportError, choose
from sglang_kevlar.worker.resume import ShadowPlanReq

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

#: all groups are on this host; what listens there is not for the network
GROUPS_HOST = "127.0.0.1"


class RankShadow:
    """Everything but the threads' inner life is called by the scheduler, on its thread."""

    def __init__(
        self, scheduler: Scheduler, rows: PoolRows, plan: LaunchPlan, paths: Paths, group: int, epoch: int, rank: int
    ) -> None:
        args = plan.kevlar
        block = block_tokens(scheduler.page_size)
        layout = _layout(scheduler, rows, plan.upstream, block)
        capacity = min(int(args.shadow_memory * 2**30) // layout.block_bytes, rows.capacity_tokens // block)
        if capacity < 1:
            raise ValueError("--shadow-memory has no room for a single block")
        self._paths = paths
        self._rank = rank
        self.counters = ShadowCounters(
            token_bytes=layout.token_bytes, store_capacity_tokens=capacity * layout.block_tokens
        )
        self._store = ShadowStore(capacity, layout.block_bytes)
        transport = choose(args.shadow_transport, GROUPS_HOST)
        self._server = ShadowServer(self._endpoint(group, epoch, rank), layout, self._store, transport, self.counters)
        windows = itertools.count()
        self._sender = ShadowSender(
            group,
            epoch,
            layout,
            args.shadow_bandwidth * 1e6,
            transport,
            lambda: window_name(plan.launch_id, group, epoch, rank, next(windows)),
            self.counters,
            paths.shadow_counters(group, epoch, rank),
        )
        tree = scheduler.tree_cache
        self.exporter = Exporter(
            rows,
            block,
            scheduler.req_to_token_pool.req_to_token,
            tree,
            self._sender,
            args.shadow_min_context,
            self.counters,
        )
        others = [other for other in range(plan.tp_size * plan.pp_size) if other != rank]
        self._lookups = Lookups(
            self._store, block, tree, [self._endpoint(group, epoch, other) for other in others], self.counters
        )
        self._promoter = Promoter(self._store, rows, block, tree, scheduler.token_to_kv_pool_allocator, self.counters)
        self._server.start()
        self._sender.start()

    def _endpoint(self, group: int, epoch: int, rank: int) -> str:
        return self._paths.channel(group, epoch, f"shadow{rank}")

    def follow(self, plan: ShadowPlanReq) -> None:
        if plan.content != self.exporter.content:
            # What it holds is of other weights, and would only be found if a name came back.
            self._store.clear()
        self.exporter.set_content(plan.content)
        target = None
        if plan.target is not None:
            group, epoch = plan.target
            target = Target(group, epoch, self._endpoint(group, epoch, self._rank))
        self._sender.retarget(target)

    def flushed(self) -> None:
        """The cache was flushed: neither this rank nor the one that keeps its shadow remembers anything."""
        self._store.clear()
        self.exporter.forget()
        self._sender.flushed()

    def with_promotions(self, messages: list[Any]) -> list[Any]:
        """First rank only: the messages of this step, each that can use it behind a `PromoteReq`."""
        result: list[Any] = []
        content = self.exporter.content
        for message in messages:
            if self._forgets(message):
                # It has not been acted on yet. What came behind it must not find what is there before it.
                content = ""
            promote = self._lookups.find(message, content)
            if promote is not None:
                result.append(promote)
            result.append(message)
        return result

    def _forgets(self, message: Any) -> bool:
        """Whether KV that was cached before ``message`` must not be used behind it."""
        if isinstance(message, ShadowPlanReq):
            # One that only names another target comes right before the requests of a lost group.
            return message.content != self.exporter.content
        return isinstance(message, FlushCacheReqInput)

    def promote(self, promote: PromoteReq) -> None:
        self._promoter.apply(promote)


def start(scheduler: Scheduler, plan: LaunchPlan, paths: Paths, group: int, epoch: int, rank: int) -> RankShadow | None:
    """None when there cannot be a shadow: requests are then computed again at a failover, and the log says why."""
    if plan.kevlar.shadow_memory == 0 or plan.kevlar.worker_groups == 1:
        return None
    try:
        if scheduler.disable_radix_cache or not hasattr(scheduler.tree_cache, "tree_core"):
            raise ValueError("it needs SGLang's unified radix cache")
        if not scheduler.is_generation:
            raise ValueError("the model does not generate")
        if not scheduler.spec_algorithm.is_none():
            raise ValueError("KV of draft models is not supported")
        cuda = scheduler.device == "cuda"
        rows = PoolRows(scheduler.token_to_kv_pool_allocator.get_kvcache(), scheduler.forward_stream if cuda else None)
        return RankShadow(scheduler, rows, plan, paths, group, epoch, rank)
    except (ValueError, TransportError) as reason:
        logger.warning("KV is not shadowed: %s. A request of a lost worker group is computed again.", reason)
        return None


def _layout(scheduler: Scheduler, rows: PoolRows, upstream: str, block: int) -> Layout:
    parallel = get_parallel()
    args = scheduler.server_args
    return Layout(
        version=SHADOW_VERSION,
        upstream=upstream,
        model=f"{args.model_path} {args.revision} {args.load_format} {args.quantization}",
        shard=f"tp{parallel.tp_rank}/{parallel.tp_size} pp{parallel.pp_rank}/{parallel.pp_size}",
        kv_dtype=rows.dtype,
        page_size=scheduler.page_size,
        block_tokens=block,
        rows=rows.row_bytes,
    )
