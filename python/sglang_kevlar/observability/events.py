"""What happened at each failover: JSON lines in the log, the history of /kevlar/status, and the metrics.

Lines are the messages of logger ``sglang_kevlar.events``. Requests appear by id; never a prompt, never an output.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sglang_kevlar.observability.metrics import NoMetrics

logger = logging.getLogger("sglang_kevlar.events")

HISTORY = 256
#: stalls of one failover that are kept until it is settled; with more its median is that of the first ones
STALLS_KEPT = 4096
#: ids come from clients; also bounds how many of them one line lists
RID_CHARS = 128
REFUSED_LISTED = 1000


@dataclass
class _Failover:
    """Counts are of requests. Open until nothing is pending; then its line is written."""

    at: float  # seconds since the epoch
    lost_at: float  # monotonic seconds
    group: int
    epoch: int
    cause: str
    kind: str
    detect_ms: float
    pending: set[str]
    redirected: int = 0
    recomputed_tokens: int = 0
    restored_tokens: int = 0
    held: int = 0
    refused: list[str] = field(default_factory=list)
    #: seconds, of those requests that have resumed; emptied when the line is written
    stalls: list[float] = field(default_factory=list)
    stall_max: float = 0.0
    stall_ms: dict[str, float] | None = None

    def resumed(self, stall_s: float) -> None:
        self.stall_max = max(self.stall_max, stall_s)
        if len(self.stalls) < STALLS_KEPT:
            self.stalls.append(stall_s)

    def stall(self) -> dict[str, float] | None:
        """How long streams stood still, from the loss to their next token; None while none has gone on."""
        if self.stall_ms is not None or not self.stalls:
            return self.stall_ms
        p50 = sorted(self.stalls)[len(self.stalls) // 2]
        return {"p50": round(p50 * 1e3, 3), "max": round(self.stall_max * 1e3, 3)}

    def settled(self) -> None:
        self.stall_ms = self.stall()
        self.stalls = []

    def status(self) -> dict[str, Any]:
        return {
            "at": datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds"),
            "group": self.group,
            "epoch": self.epoch,
            "cause": self.cause,
            "kind": self.kind,
            "detect_ms": round(self.detect_ms, 3),
            "redirected": self.redirected,
            "recomputed_tokens": self.recomputed_tokens,
            "restored_tokens": self.restored_tokens,
            "held": self.held,
            "refused": len(self.refused),
            "pending": len(self.pending),
            "stall_ms": self.stall(),
        }


@dataclass(frozen=True)
class Redirect:
    """One that is through: the request has its next token. Times are monotonic seconds of the events' clock."""

    from_group: int
    from_epoch: int
    to_group: int
    to_epoch: int
    cause: str
    kind: str
    stall_s: float
    recomputed_tokens: int
    restored_tokens: int


class FailoverEvents:
    """Told of every step by the one actor that takes it; not thread-safe.

    A request that a failover took from its group is pending until it has its next token (`resumed`), is `refused`,
    `gone` (finished, aborted, client left), or taken again by a later failover. The failover's line is written when
    none is pending, so its counts are final; at the latest when HISTORY later ones push it out, or at `close`.
    """

    def __init__(
        self,
        metrics: NoMetrics,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._history: OrderedDict[int, _Failover] = OrderedDict()
        self._count = 0
        self._failover_of: dict[str, int] = {}
        #: of those pending, where they were sent: group, epoch
        self._sent_to: dict[str, tuple[int, int]] = {}
        self._held_since: dict[str, float] = {}

    def failover(self, *, group: int, epoch: int, cause: str, kind: str, detect_ms: float, rids: Iterable[str]) -> None:
        """``rids`` were on ``(group, epoch)``. ``kind`` is the metric's label: one of few words."""
        lost_at = self._clock() - detect_ms / 1000
        record = _Failover(self._wall_clock(), lost_at, group, epoch, cause, kind, detect_ms, set(rids))
        for rid in record.pending:
            self._settle(rid)
        self._count += 1
        self._history[self._count] = record
        self._failover_of.update(dict.fromkeys(record.pending, self._count))
        self._metrics.failover(group, kind, detect_ms / 1000)
        if not record.pending:
            self._write(record)
        if len(self._history) > HISTORY:
            _, oldest = self._history.popitem(last=False)
            for rid in oldest.pending:
                del self._failover_of[rid]
                self._sent_to.pop(rid, None)
            if oldest.pending:
                self._write(oldest)

    def redirected(self, rid: str, *, group: int, epoch: int, delivered_tokens: int) -> None:
        """A request of a lost group was sent to ``(group, epoch)``. It stays pending until it resumes there."""
        self._released(rid)
        record = self._record(rid)
        if record is None:
            return
        record.redirected += 1
        self._sent_to[rid] = (group, epoch)
        self._metrics.redirect(record.group)
        _log(
            logging.INFO,
            event="redirect",
            rid=rid,
            from_group=record.group,
            from_epoch=record.epoch,
            group=group,
            epoch=epoch,
            delivered_tokens=delivered_tokens,
        )

    def resumed(self, rid: str, recomputed_tokens: int, restored_tokens: int) -> Redirect | None:
        """The first token of a redirected request after its redirect. Others are ignored, at the cost of a lookup.

        ``restored_tokens``: of its context, those whose KV the group found: in its shadow store or in its own tree.
        """
        record = self._record(rid)
        if record is None:
            return None
        record.recomputed_tokens += recomputed_tokens
        record.restored_tokens += restored_tokens
        stall_s = self._clock() - record.lost_at
        record.resumed(stall_s)
        self._metrics.resumed(stall_s, recomputed_tokens, restored_tokens)
        sent_to = self._sent_to.get(rid)
        self._settle(rid)
        if sent_to is None:
            return None
        lost, why = (record.group, record.epoch), (record.cause, record.kind)
        return Redirect(*lost, *sent_to, *why, stall_s, recomputed_tokens, restored_tokens)

    def held(self, rid: str) -> None:
        """The request waits for a group; of a lost group or new."""
        self._held_since.setdefault(rid, self._clock())
        self._metrics.held(len(self._held_since))
        record = self._record(rid)
        if record is not None:
            record.held += 1

    def dispatched(self, rid: str) -> None:
        """A new request goes to a group (for one of a lost group: `redirected`). Ends its hold, if it was held."""
        self._released(rid)

    def refused(self, rid: str, kind: str, reason: str) -> None:
        """The request ends with an error of ours. ``reason`` names no content."""
        self._released(rid)
        self._metrics.refused(kind)
        _log(logging.WARNING, event="refused", rid=rid, kind=kind, reason=reason)
        record = self._record(rid)
        if record is not None:
            record.refused.append(rid)
            self._settle(rid)

    def gone(self, rid: str) -> None:
        """The request ended in another way: finished, aborted, or its client left. Safe to call for every request."""
        self._released(rid)
        self._settle(rid)

    def history(self) -> list[dict[str, Any]]:
        """``failovers`` of /kevlar/status, oldest first."""
        return [record.status() for record in self._history.values()]

    def close(self) -> None:
        """At shutdown: writes the lines of failovers that are still open."""
        for record in self._history.values():
            if record.pending:
                self._write(record)
                record.pending.clear()
        self._failover_of.clear()
        self._sent_to.clear()

    def _record(self, rid: str) -> _Failover | None:
        number = self._failover_of.get(rid)
        return None if number is None else self._history[number]

    def _settle(self, rid: str) -> None:
        number = self._failover_of.pop(rid, None)
        if number is None:
            return
        self._sent_to.pop(rid, None)
        record = self._history[number]
        record.pending.discard(rid)
        if not record.pending:
            self._write(record)

    def _released(self, rid: str) -> None:
        since = self._held_since.pop(rid, None)
        if since is not None:
            self._metrics.hold(self._clock() - since)
            self._metrics.held(len(self._held_since))

    def _write(self, record: _Failover) -> None:
        record.settled()
        _log(
            logging.WARNING,
            event="failover",
            group=record.group,
            epoch=record.epoch,
            cause=record.cause,
            kind=record.kind,
            detect_ms=round(record.detect_ms, 3),
            redirected=record.redirected,
            recomputed_tokens=record.recomputed_tokens,
            restored_tokens=record.restored_tokens,
            stall_ms=record.stall_ms,
            held=record.held,
            refused=[rid[:RID_CHARS] for rid in record.refused[:REFUSED_LISTED]],
            refused_count=len(record.refused),
            unsettled=len(record.pending),
        )


def _log(level: int, **values: Any) -> None:
    if logger.isEnabledFor(level):
        if "rid" in values:
            values["rid"] = values["rid"][:RID_CHARS]
        logger.log(level, "%s", json.dumps(values, separators=(",", ":")))
