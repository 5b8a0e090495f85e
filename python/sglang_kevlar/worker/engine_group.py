"""What a worker group is made of: command lines of its members, and where its ranks meet."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.worker.free_port import free_port

#: command lines of the members by name; the supervisor appends descriptors
Commands = Mapping[str, Sequence[str]]


class Meeting(NamedTuple):
    """Where the ranks of an epoch find each other; ``host``: None for this one."""

    port: int
    host: str | None = None


def engine_commands(paths: Paths, plan: LaunchPlan, group: int) -> Commands:
    """The real members: SGLang's scheduler ranks and detokenizer."""
    common = ["--run-dir", paths.run_dir, "--group", str(group)]
    module = [sys.executable, "-m"]
    members = {
        f"rank{rank}": [*module, "sglang_kevlar.worker.rank", *common, "--rank", str(rank)] for rank in plan.ranks
    }
    if 0 in plan.ranks:
        members["detokenizer"] = [*module, "sglang_kevlar.worker.detokenizer", *common]
    return members


def meeting_port(plan: LaunchPlan, group: int) -> int:
    """On this host, for the next epoch."""
    return free_port(group, plan.kevlar.worker_groups, taken=(plan.port,))
