"""Messages between a group supervisor (DEALER) and the frontend (ROUTER), msgpack over ``Paths.control``.

A report is a full statement of what the supervisor knows, never a difference: it is sent at every change
and every ``REPORT_INTERVAL``, so a frontend that starts late or comes back needs nothing else.
"""

from __future__ import annotations

from typing import Literal

import msgspec

#: seconds between two reports with no change between them
REPORT_INTERVAL = 0.5

#: in what a rank says when it is ready, beside upstream's: where ranks of other hosts reach its shadow store
SHADOW_ENDPOINT = "shadow_endpoint"

GroupPhase = Literal["starting", "ready", "down", "stopped"]

#: of what an epoch was made: around ranks, or spares, that had their weights; of forks; of new processes
GroupFormed = Literal["reformed", "warm", "cold"]

#: "unfit": the frontend cannot use it (does not connect, does not read, cannot be brought up to date). Of groups on
#: other hosts: "network", their session ended; "left", they said so.
LossKind = Literal["exit", "stopped", "hang", "errors", "report", "unfit", "operator", "network", "left"]


class ProcessRef(msgspec.Struct, frozen=True):
    """A process that cannot be confused with a later one of the same pid."""

    name: str  # "supervisor", "rank0", ..., "detokenizer"
    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat


class GroupReport(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    group: int
    epoch: int
    phase: GroupPhase
    supervisor: ProcessRef
    #: ranks and detokenizer of this epoch; empty while down
    members: list[ProcessRef]
    #: what the ranks said when they became ready (upstream's Scheduler.get_init_info), rank 0's
    init_info: dict[str, object] | None = None
    #: where ranks of other hosts reach the shadow stores of these, by rank; empty: nowhere
    shadow_endpoints: list[str] = []
    #: why the last epoch ended, or why this one does not start
    cause: str = ""
    #: how it was lost, where only the supervisor can know that; while down
    kind: LossKind | None = None
    #: ranks on other hosts are at a long step, for which those of this one may wait
    busy_elsewhere: bool = False
    #: epochs that ended since this supervisor started, without one becoming ready in between
    failed_starts: int = 0
    #: seconds until the next start, while down
    retry_in: float = 0.0
    #: of an epoch that is ready, and how many seconds it took from its beginning
    formed: GroupFormed | None = None
    formed_s: float = 0.0


class KillGroup(msgspec.Struct, frozen=True, kw_only=True, tag="kill"):
    """Frontend to supervisor: this epoch is fenced. Kill it and start the next one.

    Ignored when ``epoch`` is not the current one. ``planned`` (drain, restart by operator)
    skips the back-off, and what was set aside for its failures is tried again.
    """

    group: int
    epoch: int
    cause: str
    planned: bool = False
