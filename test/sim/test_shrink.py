"""A failing run becomes a short one that can be replayed."""

from __future__ import annotations

import logging

import campaign
import failover_world
import pytest
import shadow_sim
from shrink import Failure, attempt, shrink

from sglang_kevlar.control.journal import Entry
from sglang_kevlar.control.shadow_link import ShadowLink


@pytest.fixture(autouse=True)
def quiet_log():
    yield
    logging.disable(logging.NOTSET)


def smallest(simulate, steps: int) -> tuple[int, int, Failure]:
    for seed in range(40):
        failure = attempt(simulate, seed, None, steps)
        if isinstance(failure, Failure):
            small, events, fewer = shrink(simulate, seed, failure, steps, seconds=20.0)
            again = attempt(simulate, seed, events, fewer)
            assert isinstance(again, Failure) and again.place == failure.place, "it does not replay"
            return len(failure.happened), len(events), small
    pytest.fail("nothing fails")


def test_a_failure_of_the_shadow_shrinks(monkeypatch):
    real = ShadowLink.acknowledge
    monkeypatch.setattr(ShadowLink, "acknowledge", lambda self, sequence, gone: real(self, sequence, ()))
    before, after, _ = smallest(shadow_sim.simulate, 100)
    assert after < before / 4


def test_a_failure_of_the_frontend_shrinks(monkeypatch):
    real = Entry.resume_state

    def late(self):
        state = real(self)
        return state and type(state)(output_ids=state.output_ids[:-1])

    monkeypatch.setattr(Entry, "resume_state", late)
    _, after, small = smallest(failover_world.simulate, 200)
    assert after <= 12, small.happened


def test_the_runner_counts_and_says_how_to_replay(monkeypatch, capsys):
    assert campaign.run(5, 300, 60.0, ["failover", "membership"]) == 0
    assert "no invariant broken" in capsys.readouterr().out
    monkeypatch.setattr(campaign, "SHRINK_SECONDS", 3.0)
    monkeypatch.setattr(Entry, "resume_state", lambda self: None)
    assert campaign.run(1, 10**6, 60.0, ["failover"]) == 1
    said = capsys.readouterr().out
    assert "shrunk from" in said and "--world failover --seed" in said and "--only" in said
