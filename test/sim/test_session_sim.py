"""The real ends of sessions (`control.frontend_end`, `control.group_end`) in the simulated world of `session_sim`.

Replay one run with ``python test/sim/campaign.py --world session --seed N``.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from session_sim import GROUPS, STEPS, simulate

from sglang_kevlar.control import session
from sglang_kevlar.control.frontend_end import FrontendEnd, Sessions
from sglang_kevlar.control.group_end import GroupEnd
from sglang_kevlar.control.session import Effect, Link
from sglang_kevlar.protocol.cluster import Requests, ToGroup

SEEDS = 60
FRESH = 20


def test_what_is_delivered_is_what_was_sent_and_every_group_joins_again() -> None:
    worlds = [simulate(seed) for seed in range(SEEDS)]
    ends: Counter[str] = sum((Counter(world.ends) for world in worlds), Counter())
    assert set(ends) == {"silent", "over", "closed", "protocol", "left", "replaced"}, ends
    assert sum(world.delivered for world in worlds) > SEEDS * STEPS / 4, "what is judged"
    assert all(world.joins["frontend"] >= GROUPS for world in worlds)
    assert len({kind for world in worlds for kind in world.faults.counts}) >= 16, "kinds of faults"


def test_fresh_seeds() -> None:
    first = secrets.randbelow(10**9)
    print(f"seeds {first} to {first + FRESH - 1}")
    for seed in range(first, first + FRESH):
        simulate(seed)


def test_a_seed_replays_and_its_schedule_does() -> None:
    first, second = simulate(7), simulate(7)
    assert first.trace == second.trace and first.faults.happened == second.faults.happened
    again = simulate(7, frozenset(first.faults.happened))
    assert again.trace == first.trace and again.faults.counts == first.faults.counts
    assert not simulate(7, frozenset()).faults.counts


# What the invariants are worth: each of these is broken in one place, and must be found out.


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def check(match: str, seeds: int = 40) -> None:
        for seed in range(seeds):
            try:
                simulate(seed)
            except AssertionError as error:
                assert re.search(match, str(error)), error
                return
        pytest.fail("not noticed")

    yield check


def test_numbers_that_nobody_looks_at_are_noticed(monkeypatch: pytest.MonkeyPatch, caught: Any) -> None:
    monkeypatch.setattr(Link, "arrived", lambda self, number: setattr(self, "expected", number + 1))
    caught("not a prefix")


def test_a_last_message_that_nobody_misses_is_noticed(monkeypatch: pytest.MonkeyPatch, caught: Any) -> None:
    monkeypatch.setattr(Link, "on_beat", lambda self, beat: None)
    caught("never arrived", seeds=300)


def test_no_lease_is_noticed(monkeypatch: pytest.MonkeyPatch, caught: Any) -> None:
    monkeypatch.setattr(Link, "tick", lambda self, now: None)
    caught("does not learn of the end|not whole")


def test_a_lease_of_time_in_which_we_did_not_run_is_noticed(monkeypatch: pytest.MonkeyPatch, caught: Any) -> None:
    monkeypatch.setattr(session, "MAX_TICK", 1000.0)
    caught("of watched time only")


def test_no_beats_are_noticed(monkeypatch: pytest.MonkeyPatch, caught: Any) -> None:
    monkeypatch.setattr(Link, "beat", lambda self, now: None)
    caught("where nothing was held up|not whole|not joined")


def test_a_session_that_goes_on_after_its_end_is_noticed(monkeypatch: pytest.MonkeyPatch, caught: Any) -> None:
    real = FrontendEnd.end

    def end(self: FrontendEnd, *args: Any, **options: Any) -> list[Effect]:
        effects = real(self, *args, **options)
        self.over = False
        return [effect for effect in effects if not isinstance(effect, session.HangUp)]

    monkeypatch.setattr(FrontendEnd, "end", end)
    caught("after its end|ended twice")


def test_a_second_session_of_one_name_is_noticed(monkeypatch: pytest.MonkeyPatch, caught: Any) -> None:
    class Forgetful(dict[str, FrontendEnd]):
        def get(self, *args: Any) -> None:
            return None

        def __delitem__(self, key: str) -> None:
            self.pop(key, None)

    real = Sessions.__init__

    def init(self: Sessions, *args: Any) -> None:
        real(self, *args)
        self._by_name = Forgetful()

    monkeypatch.setattr(Sessions, "__init__", init)
    caught("two sessions of")


def test_requests_for_an_epoch_that_is_over_are_noticed(monkeypatch: pytest.MonkeyPatch, caught: Any) -> None:
    real = GroupEnd.on_message

    def on_message(self: GroupEnd, message: ToGroup, now: float) -> list[Effect]:
        if isinstance(message, Requests):
            message = msgspec.structs.replace(message, epoch=self.state.epoch)
        return real(self, message, now)

    monkeypatch.setattr(GroupEnd, "on_message", on_message)
    caught("of a former epoch")


def test_a_group_that_does_not_try_again_is_noticed(monkeypatch: pytest.MonkeyPatch, caught: Any) -> None:
    real = GroupEnd._wait

    def wait(self: GroupEnd, seconds: float, reason: str, now: float) -> None:
        real(self, seconds + 1000.0, reason, now)

    monkeypatch.setattr(GroupEnd, "_wait", wait)
    caught("not whole")
