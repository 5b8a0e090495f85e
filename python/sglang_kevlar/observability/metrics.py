"""Prometheus metrics of our own, on upstream's /metrics, in prometheus_client's multiprocess mode as upstream's.

They live in the frontend. Counters and histograms go on over a restart of the frontend (the files of a dead process
stay in PROMETHEUS_MULTIPROC_DIR and are summed). Gauges are `livemostrecent`: the files of a dead process are removed
at the next start, so no value of a process that is gone is shown, whatever the wall clock did in between.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from typing import Any, Literal

#: modes whose value means a process that lives; upstream uses livesum and mostrecent
_LIVE_GAUGE = re.compile(r"gauge_(?:live[a-z]*|mostrecent)_(\d+)\.db")

#: seconds; from a pidfd that fires within a millisecond to a hang that is judged after minutes
DETECTION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STALL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
HOLD_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 45, 60, 120)

#: of weights from one group to another
TRANSFER_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
#: ``changed``: the weights were being changed meanwhile, so it did not count
TransferOutcome = Literal["done", "changed", "failed"]

#: of the shadow of each group; they start from zero with each epoch of it
SHADOW_GAUGES = {
    "linked": "1 while another group keeps its KV.",
    "lag_tokens": "Valid KV that the shadow lacks, in tokens; of the rank furthest behind.",
    "lag_seconds": "Age of the oldest KV on its way to the shadow.",
    "sent_bytes": "Sent to the shadow by all ranks since the group started.",
    "saved_tokens": "Not sent, because the shadow had them: shared prefixes.",
    "dropped_tokens": "Not sent, because they had left the cache before their turn came.",
    "store_tokens": "Tokens of other groups that this group keeps.",
    "store_capacity_tokens": "Tokens of other groups that it has room for.",
    "store_lookups": "Times that a prefix was looked for in its store.",
    "store_hits": "Times that it was found there.",
    "promoted_tokens": "Tokens it took from its store into its KV pool.",
    "promoted_ahead_tokens": "Of those: for requests that still ran on their own group.",
    "audited_blocks": "Blocks of its store compared with what the model computes (--shadow-audit).",
    "wrong_blocks": "Of those: blocks that were something else.",
    "rejected_frames": "Messages of the shadow stream that its ranks did not accept.",
}


class NoMetrics:
    """Metrics are off. Also the list of what can be recorded."""

    def failover(self, group: int, cause: str, detection_s: float) -> None:
        """``cause`` is one of few words (a label), not the text for the log."""

    def redirect(self, group: int) -> None:
        """A request left ``group``."""

    def resumed(self, stall_s: float, recomputed_tokens: int, restored_tokens: int) -> None:
        """``stall_s``: from the loss to the next token of a redirected request."""

    def refused(self, kind: str) -> None: ...

    def hold(self, seconds: float) -> None:
        """A held request went on its way, or was refused, after this long."""

    def held(self, requests: int) -> None:
        """Requests that are held now."""

    def group(self, group: int, *, ready: bool, epoch: int) -> None: ...

    def shadow(self, group: int, values: dict[str, float]) -> None:
        """What a group says of its shadow now; ``values`` by the names in SHADOW_GAUGES."""

    def formed(self, group: int, how: str, seconds: float) -> None:
        """A group is ready; ``how``: see `protocol.group.GroupFormed`, ``seconds``: since it began to form."""

    def weight_transfer(self, outcome: TransferOutcome, size: int, seconds: float) -> None:
        """One try to give a group the weights of another. ``size``: bytes that were taken."""


class PrometheusMetrics(NoMetrics):
    """``groups``: ids of all groups, so that each has a value from the start.

    Raises RuntimeError unless PROMETHEUS_MULTIPROC_DIR was set before prometheus_client was first imported: the
    values would then not appear on /metrics. Once per process, as the names are registered globally.
    """

    def __init__(self, groups: Iterable[int]) -> None:
        directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if not directory:
            raise RuntimeError("PROMETHEUS_MULTIPROC_DIR is not set")
        forget_dead_processes(directory)
        # Not before: prometheus_client looks at the environment when it is imported.
        from prometheus_client import Counter, Gauge, Histogram, values

        if not getattr(values.ValueClass, "_multiprocess", False):
            raise RuntimeError("prometheus_client was imported before PROMETHEUS_MULTIPROC_DIR was set")

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
            return Gauge(f"sglang_kevlar_{name}", text, labels, multiprocess_mode="livemostrecent")

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
            return Counter(f"sglang_kevlar_{name}", text, labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return Histogram(f"sglang_kevlar_{name}", text, buckets=buckets)

        self._failovers = counter("failovers_total", "Worker groups lost.", ("group", "cause"))
        self._redirects = counter("redirects_total", "Requests taken from a lost worker group.", ("group",))
        self._recomputed = counter("recomputed_tokens_total", "Tokens computed again for redirected requests.")
        self._restored = counter("restored_tokens_total", "Tokens of redirected requests whose KV was there.")
        self._refused = counter("refused_requests_total", "Requests ended with an error by the failover.", ("kind",))
        self._held = gauge("held_requests", "Requests that wait for a worker group.")
        self._ready = gauge("group_ready", "1 while the worker group serves.", ("group",))
        self._epoch = gauge("group_epoch", "Incarnation of the worker group.", ("group",))
        self._shadow = {name: gauge(f"shadow_{name}", text, ("group",)) for name, text in SHADOW_GAUGES.items()}
        self._detection = histogram("detection_seconds", "From the failure to its detection.", DETECTION_BUCKETS)
        self._stall = histogram(
            "redirect_stall_seconds", "From the loss of its group to the next token of a request.", STALL_BUCKETS
        )
        self._hold = histogram("hold_seconds", "Time that requests waited for a worker group.", HOLD_BUCKETS)
        self._formed = counter("groups_formed_total", "Worker groups that became ready.", ("group", "how"))
        self._formed_seconds = counter("groups_formed_seconds_total", "Time that it took them.", ("group", "how"))
        self._transfers = counter("weight_transfers_total", "Tries to copy weights between groups.", ("outcome",))
        self._transferred = counter("weight_transfer_bytes_total", "Weights copied between groups, by all ranks.")
        self._transfer = histogram("weight_transfer_seconds", "Time of those that were done.", TRANSFER_BUCKETS)
        self.held(0)
        for group in groups:
            self.group(group, ready=False, epoch=0)

    def failover(self, group: int, cause: str, detection_s: float) -> None:
        self._failovers.labels(group, cause).inc()
        self._detection.observe(detection_s)

    def redirect(self, group: int) -> None:
        self._redirects.labels(group).inc()

    def resumed(self, stall_s: float, recomputed_tokens: int, restored_tokens: int) -> None:
        self._stall.observe(stall_s)
        self._recomputed.inc(recomputed_tokens)
        self._restored.inc(restored_tokens)

    def refused(self, kind: str) -> None:
        self._refused.labels(kind).inc()

    def hold(self, seconds: float) -> None:
        self._hold.observe(seconds)

    def held(self, requests: int) -> None:
        self._held.set(requests)

    def group(self, group: int, *, ready: bool, epoch: int) -> None:
        self._ready.labels(group).set(int(ready))
        self._epoch.labels(group).set(epoch)

    def shadow(self, group: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._shadow[name].labels(group).set(value)

    def formed(self, group: int, how: str, seconds: float) -> None:
        self._formed.labels(group, how).inc()
        self._formed_seconds.labels(group, how).inc(seconds)

    def weight_transfer(self, outcome: TransferOutcome, size: int, seconds: float) -> None:
        self._transfers.labels(outcome).inc()
        self._transferred.inc(size)
        if outcome == "done":
            self._transfer.observe(seconds)


def forget_dead_processes(directory: str) -> None:
    """Removes the gauges, ours and upstream's, of processes that are gone. Their counters stay: they are sums.

    On the event loop that also serves /metrics: prometheus_client raises when a file vanishes while it is read.
    """
    for name in os.listdir(directory):
        match = _LIVE_GAUGE.fullmatch(name)
        if match and not os.path.exists(f"/proc/{match[1]}"):
            # The dead process's supervisor tidies up too.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))
