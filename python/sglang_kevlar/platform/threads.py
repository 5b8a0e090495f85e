"""How many threads a rank computes with."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

#: worker groups on this host, set by the launcher: their ranks share its cores
GROUPS_ENV = "SGLANG_KEVLAR_GROUPS"


def compute_threads(ranks: int) -> int:
    """Threads of each of ``ranks`` ranks on this host, without ``OMP_NUM_THREADS``: the usable cores, shared out.

    One core is left to HTTP server and detokenizer where there are more than two.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, (cores - (cores > 2)) // ranks)


def bind_rank(rank: int, ranks: int) -> None:
    """Set threads and, if asked to, cores of this rank.

    ``OMP_NUM_THREADS`` wins. ``SGLANG_CPU_OMP_THREADS_BIND`` (``0-3|4-7``: cores per rank) is honoured by affinity;
    upstream does it in ``sgl_kernel`` only, refuses more ranks than NUMA nodes without it, and binds every thread.

    Raises:
        ValueError: the binding has no entry for this rank, or does not parse.
    """
    import torch

    binding = os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "all")
    if binding != "all":
        entries = binding.split("|")
        if rank >= len(entries):
            raise ValueError(f"SGLANG_CPU_OMP_THREADS_BIND={binding!r} has no entry for rank {rank}")
        os.sched_setaffinity(0, parse_cores(entries[rank]))
        ranks = 1
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(compute_threads(ranks * int(os.environ.get(GROUPS_ENV, "1"))))
    logger.info("rank %d computes with %d threads", rank, torch.get_num_threads())


def parse_cores(text: str) -> set[int]:
    """``0,2-4`` -> {0, 2, 3, 4}. Raises ValueError."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
