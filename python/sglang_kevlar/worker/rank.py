"""``python -m sglang_kevlar.worker.rank``: one scheduler rank of one epoch of a worker group.

SGLang's own scheduler process, with our Scheduler in it.
"""

from __future__ import annotations

from sglang_kevlar.launcher.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import gc
import os
from typing import TYPE_CHECKING, Any

from sglang_kevlar.worker.bootstrap import Incarnation, argument_parser, describe, run_member

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_kevlar.shadow.promote import Promoter
    from sglang_kevlar.shadow.rank import RankShadow
    from sglang_kevlar.worker.sabotage import OrderTaker
    from sglang_kevlar.worker.weights.rank import RankWeights


class _ReadyPipe:
    """Stands in for the pipe through which upstream's scheduler process reports its initialisation."""

    def __init__(self, incarnation: Incarnation) -> None:
        self._incarnation = incarnation

    def send(self, init_info: dict[str, Any]) -> None:
        self._incarnation.status.send(init_info)


def _scheduler_class(incarnation: Incarnation, rank: int) -> type[Scheduler]:
    """KevlarScheduler, made to report how it started and ended: upstream's process function keeps that to itself."""
    from sglang_kevlar.shadow import rank as shadow
    from sglang_kevlar.worker.scheduler import KevlarScheduler
    from sglang_kevlar.worker.weights import rank as weights

    orders = _orders(incarnation, rank) if incarnation.plan.kevlar.allow_chaos else None

    class RankScheduler(KevlarScheduler):
        started: RankScheduler | None = None
        heartbeat = incarnation.heartbeat

        def start_shadow(self) -> tuple[RankShadow | None, Promoter | None]:
            place = (incarnation.group, incarnation.epoch, rank)
            line = None if orders is None else orders.frames
            return shadow.start(self, incarnation.plan, incarnation.paths, *place, line)

        def make_weights(self) -> RankWeights | None:
            place = (incarnation.group, incarnation.epoch, rank)
            return weights.RankWeights(self, incarnation.plan, incarnation.paths, *place)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                incarnation.label_metrics()
                super().__init__(*args, **kwargs)
            except Exception as error:
                incarnation.status.send({"status": "error", "error": describe(error)})
                raise
            type(self).started = self
            # Upstream asks for it once, after the server's warm-up (``/freeze_gc``), of the groups that run then.
            gc.collect()
            gc.freeze()
            self.heartbeat.idle()

    if orders is None:
        return RankScheduler
    from sglang_kevlar.worker.sabotage import obedient

    return obedient(RankScheduler, orders)


def _orders(incarnation: Incarnation, rank: int) -> OrderTaker:
    from sglang_kevlar.worker.sabotage import OrderTaker

    return OrderTaker(incarnation.paths.channel(incarnation.group, incarnation.epoch, f"chaos{rank}"))


def _run(incarnation: Incarnation, rank: int) -> bool:
    server_args = incarnation.load_upstream()
    # Upstream binds a rank to its NUMA node by numactl in front of the interpreter, or, with this, from inside.
    os.environ["SGLANG_NUMA_BIND_V2"] = "0"
    from sglang.srt.managers import scheduler as upstream
    from sglang.srt.utils import maybe_reindex_device_id

    scheduler_class: Any = _scheduler_class(incarnation, rank)
    upstream.Scheduler = scheduler_class
    plan = incarnation.plan
    pp_rank, tp_rank = divmod(rank, plan.tp_size)
    with maybe_reindex_device_id(plan.gpu_ids[incarnation.group][rank]) as gpu_id:
        upstream.run_scheduler_process(
            server_args, incarnation.port_args(), gpu_id, tp_rank, pp_rank, None, _ReadyPipe(incarnation)
        )
    # It returns after an exception too, once it has logged it.
    return scheduler_class.started is not None and scheduler_class.started.gracefully_exit


def main() -> None:
    parser = argument_parser()
    parser.add_argument("--rank", type=int, required=True)
    args = parser.parse_args()
    incarnation = Incarnation(args, "rank", f"rank{args.rank}")
    run_member(incarnation, lambda: _run(incarnation, args.rank))


if __name__ == "__main__":
    main()
