"""The real `control.membership` and `control.detection` in the simulated host of `membership_world`.

Replay one run with ``python test/sim/campaign.py --world membership --seed N``.
"""

from __future__ import annotations

import secrets

import pytest
from membership_world import simulate


@pytest.mark.parametrize("seed", range(25))
def test_no_false_alarm_and_nothing_missed(seed):
    sim = simulate(seed)
    assert len(sim.lost) > 1


def test_every_kind_of_loss_occurs_and_a_seed_replays():
    runs = [simulate(seed) for seed in range(1, 9)]
    assert {"exit", "stopped", "hang", "report"} <= {kind for sim in runs for kind in sim.lost.values()}
    assert simulate(1).trace == runs[0].trace


def test_fresh_seeds():
    first = secrets.randbelow(10**9)
    print(f"seeds {first} to {first + 4}")
    for seed in range(first, first + 5):
        simulate(seed)
