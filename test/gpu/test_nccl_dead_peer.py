"""`test/unit/test_dead_peer.py` with NCCL, whose kernels wait for a dead rank for ever, one of them in a graph."""

from __future__ import annotations

import pytest


@pytest.mark.gpu(1)
@pytest.mark.usefixtures("two_ranks")
def test_a_rank_on_a_device_outlives_its_peer() -> None:
    from dead_peer import lose_peers

    lose_peers("nccl", True)
