"""Groups whose peer is dead are left, and others are made in the same process (`test/gpu` does the same with NCCL)."""

from __future__ import annotations

import pytest

from dead_peer import lose_peers


@pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "as-on-a-device"])
def test_a_rank_outlives_its_peer(on_device: bool) -> None:
    lose_peers("gloo", on_device)
