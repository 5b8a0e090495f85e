"""A rank's whole part in shadowing: source of its own KV, store of another group's, and what it takes from there."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import zmq
from sglang.srt.managers.io_struct import FlushCacheReqInput
from sglang.srt.runtime_context import get_parallel

from sglang_kevlar.cluster import keys
from sglang_kevlar.control.shadow_keys import block_tokens
from sglang_kevlar.protocol.launch import LaunchPlan, Paths, window_name
from sglang_kevlar.protocol.shadow import SHADOW_VERSION, Layout, ShadowCounters, ShadowTarget
from sglang_kevlar.shadow import shelf
from sglang_kevlar.shadow.export import Exporter
from sglang_kevlar.shadow.lookup import Lookups, PromoteReq
from sglang_kevlar.shadow.pool import PoolRows
from sglang_kevlar.shadow.promote import Promoter
from sglang_kevlar.shadow.sender import ShadowSender, Target
from sglang_kevlar.shadow.server import Port, ShadowServer
from sglang_kevlar.shadow.shelf import SharedStore
from sglang_kevlar.shadow.sockets import Network, is_network, listen
from sglang_kevlar.shadow.store import ShadowStore
from sglang_kevlar.transport import Transport, TransportError, choose
from sglang_kevlar.worker.resume import ShadowPlanReq

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

#: where ranks are reached that nobody of another host comes to
LOOPBACK = "127.0.0.1"
#: seconds between two looks for what can be promoted ahead
AHEAD_INTERVAL = 0.1


@dataclass(frozen=True)
class Place:
    """Which rank of which group this is, and what it has in common with the others."""

    plan: LaunchPlan
    paths: Paths
    group: int
    epoch: int
    rank: int
    rows: PoolRows
    layout: Layout

    @property
    def stage(self) -> int:
        return self.rank // self.plan.tp_size

    @property
    def keeper(self) -> int:
        """The rank that sends and keeps what this one has: the first of its stage if all of them have the same."""
        return self.stage * self.plan.tp_size if self.rows.replicated else self.rank

    @property
    def keepers(self) -> list[int]:
        ranks = self.plan.tp_size * self.plan.pp_size
        return list(range(0, ranks, self.plan.tp_size if self.rows.replicated else 1))

    @property
    def sharers(self) -> int:
        """How many ranks have the same KV as this one, itself included."""
        return self.plan.tp_size if self.rows.replicated else 1

    def endpoint(self, rank: int) -> str:
        return self.paths.channel(self.group, self.epoch, f"shadow{rank}")

    def stores(self) -> list[str] | None:
        """Endpoints of the other stores of the group. None: not known yet, or one has none."""
        others = [rank for rank in self.keepers if rank != self.rank]
        if self.plan.node is None:
            return [self.endpoint(rank) for rank in others]
        try:
            with open(self.paths.shadow_stores(self.group, self.epoch), "rb") as file:
                told = msgspec.json.decode(file.read(), type=list[str])
        except FileNotFoundError:
            return None
        found = [
            self.endpoint(rank) if rank in self.plan.ranks else told[rank] if rank < len(told) else ""
            for rank in others
        ]
        return found if all(found) else None


class Line(Protocol):
    """What the sender's frames and bytes travel by, where that is not the plain one (`worker.sabotage`)."""

    def transport(self, transport: Transport) -> Transport: ...

    def dial(self, network: Network, endpoint: str, unread: int) -> zmq.Socket[bytes]: ...


class RankShadow:
    """Everything but the threads' inner life is called by the scheduler, on its thread."""

    def __init__(self, scheduler: Scheduler, place: Place, line: Line | None = None) -> None:
        args, paths, layout = place.plan.kevlar, place.paths, place.layout
        group, epoch, rank = place.group, place.epoch, place.rank
        capacity = min(
            int(args.shadow_memory * 2**30) // layout.block_bytes, place.rows.capacity_tokens // layout.block_tokens
        )
        if capacity < 1:
            raise ValueError("--shadow-memory has no room for a single block")
        self._rank = rank
        self.counters = ShadowCounters(
            ranks=place.sharers, token_bytes=layout.token_bytes, store_capacity_tokens=capacity * layout.block_tokens
        )
        self._store = ShadowStore(capacity, layout.block_bytes, place.sharers)
        network = self._network = Network(keys.load(args.cluster_key_file))
        near = choose(args.shadow_transport, args.advertise or LOOPBACK)
        tcp = near if near.name == "tcp" else choose("tcp", LOOPBACK)
        far = tcp if near.name == "shm" else near
        #: how KV is sent to ranks that are reached through files, and over the network
        self._near, self._far = (near, far) if line is None else (line.transport(near), line.transport(far))
        #: where ranks of other hosts reach the store; empty: nowhere
        self.endpoint = ""
        ports: list[Port] = []
        if args.advertise is not None or args.shadow_transport == "tcp":
            largest = max(layout.block_bytes, tcp.push_bytes)
            socket, self.endpoint = network.listen(args.advertise or LOOPBACK, largest)
            # The first rank of a group on several hosts asks this way.
            ports.append(Port(socket, {far, tcp}, local=False, asked=place.plan.node is not None))
        ports.append(Port(listen(place.endpoint(rank)), [near]))
        self._server = ShadowServer(ports, layout, self._store, self.counters)
        windows = itertools.count()
        self._sender = ShadowSender(
            place.plan.launch_id,
            str(group),
            epoch,
            layout,
            args.shadow_bandwidth * 1e6,
            network.dial if line is None else partial(line.dial, network),
            lambda: window_name(place.plan.launch_id, group, epoch, rank, next(windows)),
            self.counters,
            paths.shadow_counters(group, epoch, rank),
        )
        tree = scheduler.tree_cache
        self.exporter = Exporter(
            place.rows,
            layout.block_tokens,
            scheduler.req_to_token_pool.req_to_token,
            tree,
            self._sender,
            args.shadow_min_context,
            self.counters,
        )
        self.promoter = _promoter(scheduler, place, self._store, self.counters)
        auditor = self.promoter.auditor
        self._lookups = Lookups(
            self._store,
            layout.block_tokens,
            layout.block_bytes,
            tree,
            place.stores,
            network.dial,
            lambda: auditor.choose(args.shadow_audit),
            self.counters,
        )
        #: when KV may be promoted ahead again, monotonic seconds
        self._ahead_at = math.inf if args.shadow_audit else 0.0
        self._server.start()
        self._sender.start()

    def stop(self) -> None:
        """What it keeps for others is lost, as with a process that dies. Its threads end in the background."""
        self._lookups.close()
        # Not a method: the scheduler's pools and groups, which this object holds, are not to wait for that.
        parts = (self._sender, self._server, self._store, self._network)
        threading.Thread(target=_end, args=parts, name="kevlar-shadow-end", daemon=True).start()

    def follow(self, plan: ShadowPlanReq) -> None:
        if plan.content != self.exporter.content:
            # What it holds is of other weights, and would only be found if a name came back.
            self._store.clear()
        self.exporter.set_content(plan.content)
        self._sender.retarget(None if plan.target is None else self._target(plan.target))

    def _target(self, told: ShadowTarget) -> Target | None:
        """None when the rank that corresponds to this one has no store."""
        endpoint = told.endpoints[self._rank] if self._rank < len(told.endpoints) else ""
        if not endpoint:
            return None
        return Target(told.name, told.epoch, endpoint, self._far if is_network(endpoint) else self._near)

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

    def promotions_ahead(self) -> list[PromoteReq]:
        """First rank only, when the group has nothing else to do."""
        if time.monotonic() < self._ahead_at or not len(self._store):
            return []
        promotions = self._lookups.ahead(self.exporter.content, self.promoter.spare_tokens())
        self._ahead_at = time.monotonic() + AHEAD_INTERVAL
        return promotions

    def _forgets(self, message: Any) -> bool:
        """Whether KV that was cached before ``message`` must not be used behind it."""
        if isinstance(message, ShadowPlanReq):
            # One that only names another target comes right before the requests of a lost group.
            return message.content != self.exporter.content
        return isinstance(message, FlushCacheReqInput)


def _end(sender: ShadowSender, server: ShadowServer, store: ShadowStore, network: Network) -> None:
    sender.stop()
    server.stop()
    store.close()
    network.close()


def start(
    scheduler: Scheduler,
    plan: LaunchPlan,
    paths: Paths,
    group: int,
    epoch: int,
    rank: int,
    line: Line | None = None,
) -> tuple[RankShadow | None, Promoter | None]:
    """The second alone at a rank whose KV another one keeps for it. ``line``: instead of the plain one.

    None of both when there cannot be a shadow: requests are then computed again at a failover, and the log says why.
    """
    alone = plan.kevlar.worker_groups == 1 and plan.kevlar.advertise is None
    if plan.kevlar.shadow_memory == 0 or alone:
        return None, None
    try:
        if scheduler.disable_radix_cache or not hasattr(scheduler.tree_cache, "tree_core"):
            raise ValueError("it needs SGLang's unified radix cache")
        if not scheduler.is_generation:
            raise ValueError("the model does not generate")
        if not scheduler.spec_algorithm.is_none():
            raise ValueError("KV of draft models is not supported")
        rows = PoolRows(scheduler.token_to_kv_pool_allocator.get_kvcache(), _stream_of_passes(scheduler, plan.pp_size))
        place = Place(plan, paths, group, epoch, rank, rows, _layout(scheduler, rows, plan))
        if place.sharers > 1:
            if plan.node is not None and len(plan.ranks) < plan.tp_size:
                raise ValueError(
                    "tensor-parallel ranks with the same KV (MLA) share one store, and are on several hosts"
                )
            shelf.check()
        if place.keeper != rank:
            store = SharedStore(place.endpoint(place.keeper), place.layout.block_bytes)
            return None, _promoter(scheduler, place, store, ShadowCounters())
        shadow = RankShadow(scheduler, place, line)
        return shadow, shadow.promoter
    except (ValueError, TransportError, keys.KeyProblem) as reason:
        logger.warning("KV is not shadowed: %s. A request of a lost worker group is computed again.", reason)
        return None, None


def _stream_of_passes(scheduler: Scheduler, pp_size: int) -> Any:
    """None on a CPU."""
    if scheduler.device != "cuda":
        return None
    of_their_own = scheduler.enable_overlap or pp_size > 1
    return scheduler.forward_stream if of_their_own else scheduler.schedule_stream


def _promoter(
    scheduler: Scheduler, place: Place, store: ShadowStore | SharedStore, counters: ShadowCounters
) -> Promoter:
    args = place.plan.kevlar
    return Promoter(
        store,
        place.stage,
        place.rows,
        place.layout.block_tokens,
        scheduler.req_to_token_pool.req_to_token,
        scheduler.tree_cache,
        scheduler.token_to_kv_pool_allocator,
        standby=place.group >= args.worker_groups - args.standby_groups,
        counters=counters,
    )


def _layout(scheduler: Scheduler, rows: PoolRows, plan: LaunchPlan) -> Layout:
    parallel = get_parallel()
    args = scheduler.server_args
    # On other hosts the same model may lie elsewhere.
    model = args.model_path if plan.configuration is None else plan.configuration.model_digest
    return Layout(
        version=SHADOW_VERSION,
        upstream=plan.upstream,
        model=f"{model} {args.revision} {args.load_format} {args.quantization}",
        shard=f"tp{parallel.tp_rank}/{parallel.tp_size} pp{parallel.pp_rank}/{parallel.pp_size}",
        kv_dtype=rows.dtype,
        page_size=scheduler.page_size,
        block_tokens=block_tokens(scheduler.page_size),
        rows=rows.row_bytes,
    )
