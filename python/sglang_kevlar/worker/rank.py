"""``python -m sglang_kevlar.worker.rank``: one scheduler rank of a worker group.

SGLang's own scheduler process, with our Scheduler in it. It becomes part of an epoch in steps: imports; the weights of
its shard, for which it needs no other rank; and when it is told, a scheduler with communicators. When the epoch ends
around it, and this rank can outlive it, that scheduler goes and the process waits for the next order.
"""

from __future__ import annotations

from sglang_kevlar.launcher.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import gc
import logging
import os
import signal
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_kevlar.worker.bootstrap import Incarnation, Membership, argument_parser, describe, run_member
from sglang_kevlar.worker.member import LEAVE
from sglang_kevlar.worker.orders import IN_PLACE

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.server_args import ServerArgs

    from sglang_kevlar.shadow.promote import Promoter
    from sglang_kevlar.shadow.rank import RankShadow
    from sglang_kevlar.worker.kept_model import KeptModel
    from sglang_kevlar.worker.sabotage import OrderTaker
    from sglang_kevlar.worker.weights.rank import RankWeights


logger = logging.getLogger(__name__)


class EpochOver(BaseException):
    """Raised in the scheduler's loop when this rank is asked to leave. No `Exception`: handlers there would take it."""


class _ReadyPipe:
    """Stands in for the pipe through which upstream's scheduler process reports its initialisation."""

    def __init__(self, incarnation: Incarnation) -> None:
        self._incarnation = incarnation

    def send(self, init_info: dict[str, Any]) -> None:
        self._incarnation.send(init_info)


class Rank:
    def __init__(self, membership: Membership, rank: int, in_place: bool) -> None:
        self._membership = membership
        self._in_place = in_place
        self._rank = rank
        self._pp_rank, self._tp_rank = divmod(rank, membership.plan.tp_size)
        #: None: this process does not outlive an epoch
        self._kept: KeptModel | None = None
        #: stands for the loop that runs, so that it may be ended
        self._in_loop: object | None = None
        self._left_because: str | None = None

    def run(self) -> bool:
        """Until it ends or is ended. Whether it ended as it should."""
        plan = self._membership.plan
        server_args = self._membership.load_upstream()
        # Upstream binds a rank to its NUMA node by numactl in front of the interpreter, or, with this, from inside.
        os.environ["SGLANG_NUMA_BIND_V2"] = "0"
        from sglang.srt.utils import maybe_reindex_device_id

        with maybe_reindex_device_id(plan.gpu_ids[self._membership.group][self._rank]) as gpu_id:
            self._load(server_args, gpu_id)
            gc.collect()
            gc.freeze()  # nothing of this is garbage, ever; of a scheduler everything is, once it has left
            self._membership.status.send({"status": "loaded", "can_leave": self._kept is not None})
            while (incarnation := self._membership.next_epoch()) is not None:
                self._left_because = None
                graceful = self._serve(server_args, incarnation, gpu_id)
                if self._left_because is None:
                    return graceful
                incarnation.send({"status": "left", "error": self._left_because})
        return True

    def _load(self, server_args: ServerArgs, gpu_id: int) -> None:
        plan = self._membership.plan
        if server_args.weight_cache_mode == "client":
            from sglang_kevlar.worker import weight_cache

            weight_cache.prepare(Path(self._membership.paths.mapped(self._membership.group, self._rank)))
        if plan.kevlar.reform == "off" or plan.node is not None or self._in_place:
            return
        from sglang_kevlar.worker.kept_model import KeptModel, why_not

        if (reason := why_not(server_args, plan.kevlar.reform == "on")) is not None:
            logger.info("A death costs all ranks of the group their process: %s", reason)
        else:
            from sglang_kevlar.worker import retirement

            if plan.kevlar.spare_ranks:
                # The spares of some ranks take memory of their devices, which is no reason not to start.
                os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "false")
            retirement.prepare()
            if plan.on_device:
                from sglang_kevlar.worker import device_aborts

                if plan.tp_size * plan.pp_size > 1:
                    device_aborts.prepare()
            self._names = retirement.Names()
            self._kept = KeptModel()
            self._kept.load(server_args, gpu_id, self._tp_rank, self._pp_rank)
            signal.signal(LEAVE, self._on_leave)
            if plan.on_device:
                from sglang_kevlar.worker import communicators

                self._rescue = device_aborts.Rescue(LEAVE, lambda: self._in_loop, communicators.give_up)

    def _on_leave(self, *_: object) -> None:
        if self._in_loop is not None:
            raise EpochOver

    def _serve(self, server_args: ServerArgs, incarnation: Incarnation, gpu_id: int) -> bool:
        from sglang.srt.managers import scheduler as upstream

        scheduler_class: Any = self._scheduler_class(incarnation)
        upstream.Scheduler = scheduler_class
        place = (gpu_id, self._tp_rank, self._pp_rank, None)
        upstream.run_scheduler_process(server_args, incarnation.port_args(), *place, _ReadyPipe(incarnation))
        # It returns after an exception too, once it has logged it.
        started, scheduler_class.started = scheduler_class.started, None
        graceful = started is not None and bool(started.gracefully_exit)
        if self._left_because is not None:
            from sglang_kevlar.worker import communicators, retirement

            assert self._kept is not None
            self._kept.unbind()
            retirement.retire(started, scheduler_class.chaos)
            self._names.free()
            remains = weakref.ref(started)
            del started
            gc.collect()
            if remains() is not None:
                gc.unfreeze()  # somebody froze it (``/freeze_gc``): then all has to be looked at
                gc.collect()
                gc.freeze()
            if remains() is not None:
                # Its pools would be there a second time in the next epoch.
                raise RuntimeError("the scheduler of the last epoch is still held by something")
            communicators.finish()
        return graceful

    def _scheduler_class(self, incarnation: Incarnation) -> type[Scheduler]:
        """KevlarScheduler, made to report how it starts and ends: upstream's process function keeps that to itself."""
        from sglang_kevlar.shadow import rank as shadow
        from sglang_kevlar.worker.scheduler import KevlarScheduler
        from sglang_kevlar.worker.weights import rank as weights

        process, plan, rank = self, incarnation.plan, self._rank
        orders = self._chaos(incarnation) if plan.kevlar.allow_chaos else None

        class RankScheduler(KevlarScheduler):
            started: RankScheduler | None = None
            heartbeat = incarnation.heartbeat
            chaos = orders

            def start_shadow(self) -> tuple[RankShadow | None, Promoter | None]:
                place = (incarnation.group, incarnation.epoch, rank)
                line = None if orders is None else orders.frames
                return shadow.start(self, plan, incarnation.paths, *place, line)

            def make_weights(self) -> RankWeights | None:
                return weights.RankWeights(self, plan, incarnation.paths, incarnation.group, incarnation.epoch, rank)

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                try:
                    incarnation.label_metrics()
                    super().__init__(*args, **kwargs)
                except Exception as error:
                    incarnation.send({"status": "error", "error": describe(error)})
                    raise
                type(self).started = self
                self.heartbeat.idle()

            def process_input_requests(self, recv_reqs: list[Any]) -> None:
                if process._kept is not None:
                    process._kept.observe(recv_reqs)
                super().process_input_requests(recv_reqs)

            def handle_freeze_gc(self, recv_req: Any) -> Any:
                if process._kept is None:
                    return super().handle_freeze_gc(recv_req)
                # What is there for good is frozen; the scheduler itself has to be found when it is garbage.
                self.ipc_channels.send_to_detokenizer.send_output(recv_req, recv_req)
                return None

            def run_event_loop(self) -> None:
                if process._kept is None:
                    super().run_event_loop()
                    return
                try:
                    process._in_loop = object()
                    super().run_event_loop()
                    process._in_loop = None
                except EpochOver:
                    process._in_loop = None  # first: it may be asked once more
                    process._left_because = ""
                except Exception as error:
                    process._in_loop = None
                    process._left_because = describe(error)

        if orders is None:
            return RankScheduler
        from sglang_kevlar.worker.sabotage import obedient

        return obedient(RankScheduler, orders)

    def _chaos(self, incarnation: Incarnation) -> OrderTaker:
        from sglang_kevlar.worker.sabotage import OrderTaker

        return OrderTaker(incarnation.paths.channel(incarnation.group, incarnation.epoch, f"chaos{self._rank}"))


def main() -> None:
    parser = argument_parser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument(IN_PLACE, action="store_true", dest="in_place")
    args = parser.parse_args()
    membership = Membership(args, "rank", f"rank{args.rank}")
    run_member(membership, Rank(membership, args.rank, args.in_place).run)


if __name__ == "__main__":
    main()
