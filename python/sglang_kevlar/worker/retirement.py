"""The end of a scheduler whose process goes on: its threads, sockets, groups and names."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import prometheus_client
import sglang.srt.managers.scheduler as upstream

from sglang_kevlar.worker import communicators

if TYPE_CHECKING:
    from sglang_kevlar.worker.sabotage import OrderTaker
    from sglang_kevlar.worker.scheduler import KevlarScheduler


class _Watched:
    """What upstream's watchdog sees of a scheduler, without keeping it alive."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = weakref.ref(scheduler)

    def __getattr__(self, name: str) -> Any:
        scheduler = self._scheduler()
        if scheduler is None:
            raise SystemExit  # ends the watchdog's thread without a word
        return getattr(scheduler, name)


def prepare() -> None:
    """Once, before the first scheduler."""
    create = upstream.create_scheduler_watchdog
    upstream.create_scheduler_watchdog = lambda scheduler, **how: create(_Watched(scheduler), **how)


class Names:
    """Metrics that a scheduler registers, under names that the next one needs."""

    def __init__(self) -> None:
        self._before = set(prometheus_client.REGISTRY._collector_to_names)

    def free(self) -> None:
        for collector in set(prometheus_client.REGISTRY._collector_to_names) - self._before:
            prometheus_client.REGISTRY.unregister(collector)


def retire(scheduler: KevlarScheduler, chaos: OrderTaker | None) -> None:
    """What is left holds nothing but itself, and is garbage with the last reference from outside."""
    communicators.release()
    if chaos is not None:
        chaos.stop()
    if scheduler.shadow is not None:
        scheduler.shadow.stop()
    if scheduler.weights is not None:
        scheduler.weights.stop()
    scheduler.is_initializing, scheduler.cur_batch_for_debug = False, None
    if scheduler.load_snapshot_writer is not None:
        scheduler.load_snapshot_writer.close()
    channels = scheduler.ipc_channels
    sockets = [
        channels.recv_from_tokenizer,
        channels.recv_from_rpc,
        channels.send_to_tokenizer.socket,
        channels.send_to_detokenizer.socket,
        channels.send_metrics_from_scheduler,
    ]
    for context in {socket.context for socket in sockets if socket is not None}:
        context.destroy(linger=0)
