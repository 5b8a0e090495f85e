"""The real `control.course` and `control.reforming` over the simulated processes of `reform_world`.

Replay one run with ``python test/sim/campaign.py --world reform --seed N``.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from typing import Any

import pytest
from reform_process import Process
from reform_world import Group, simulate

from sglang_kevlar.control.breaker import Breaker
from sglang_kevlar.control.reforming import ASK_AGAIN, Reforming

SEEDS = 60
FRESH = 20


def test_whatever_dies_or_hangs_the_group_serves_again():
    faults: Counter[str] = Counter()
    kept = reforms = rests = returns = 0
    for seed in range(SEEDS):
        world = simulate(seed)
        rests += world.judge.rests
        returns += world.judge.returns
        faults += world.faults.counts
        kept += world.kept
        reforms += world.reforms
    assert reforms > kept - SEEDS and kept > SEEDS
    assert rests > SEEDS and returns > SEEDS
    crashes = {kind for kind in faults if kind.startswith("crash while")}
    states = {"loading", "waiting", "binding", "serving", "leaving", "being a spare"}
    assert crashes == {f"crash while {state}" for state in states}
    assert min(faults[kind] for kind in ("two at once", "does not leave", "binding hangs", "stopped")) > 10, faults


def test_a_seed_replays():
    assert simulate(3).trace == simulate(3).trace


def test_fresh_seeds():
    first = secrets.randbelow(10**9)
    print(f"seeds {first} to {first + FRESH - 1}")
    for seed in range(first, first + FRESH):
        simulate(seed)


# What the invariants are worth: each of these is broken in one place, and must be found out.


def caught(match: str, group_class: type[Group] = Group, seeds: int = 40) -> None:
    for seed in range(seeds):
        try:
            simulate(seed, group_class=group_class)
        except AssertionError as error:
            assert re.search(match, str(error)), error
            return
    pytest.fail("not noticed")


def test_who_never_leaves_is_noticed():
    class Patient(Group):
        def _check_leavers(self, now: float) -> None:
            self._leave_deadline = now + ASK_AGAIN
            super()._check_leavers(now)

    caught("does not serve again", Patient)


def test_an_epoch_that_begins_too_early_is_noticed():
    class Hasty(Group):
        def _start_at(self) -> float:
            at = self._next_start if self._phase == "down" and not self._warmth.importing else super()._start_at()
            return at if self._stop_deadline is None else super()._start_at()

        def _start(self) -> None:
            self._members.clear()
            super()._start()

    caught("still in an epoch|nobody knows", Hasty)


def test_a_fence_that_keeps_nobody_is_noticed():
    class Strict(Group):
        def _end_epoch(self, cause: str, **how: Any) -> None:
            super()._end_epoch(cause, **{**how, "whole": "frontend" in cause})

    caught("another is not kept", Strict)


def test_ranks_of_an_epoch_that_never_served_are_noticed(monkeypatch):
    decide = Reforming.survivors
    monkeypatch.setattr(
        Reforming, "survivors", lambda self, served, planned, alive, now: decide(self, True, planned, alive, now)
    )
    caught("used again", Group)


def test_a_start_without_a_deadline_is_noticed(monkeypatch):
    monkeypatch.setattr(Reforming, "deadline", lambda self: float("inf"))
    caught("a start takes too long|does not serve again", seeds=150)


def test_weights_that_cannot_be_loaded_first_and_are_tried_for_ever_are_noticed(monkeypatch):
    class Stubborn(Group):
        def _in_place(self, seat: str) -> bool:
            return False

    caught("does not serve again|not loaded as they must be", Stubborn)


def test_loading_first_that_once_worked_and_is_never_blamed_is_noticed():
    class Trusting(Group):
        def _start(self) -> None:
            if self._reforming._loading.failures == 0 and self.world.readies:
                self._reforming.suspect = False
            super()._start()

    caught("does not serve again|not loaded as they must be", Trusting)


def test_a_forgotten_process_is_noticed():
    class Forgetful(Group):
        def _keep_member(self, member: Process) -> None:
            super()._keep_member(member)
            if member.name == "rank1":
                self._left.pop("rank1", None)

    caught("nobody knows", Forgetful)


def test_a_spare_that_is_not_replaced_is_noticed(monkeypatch):
    missing = Reforming.missing_spares
    monkeypatch.setattr(Reforming, "missing_spares", lambda self, spares: missing(self, spares) if not spares else [])
    caught("a spare is missing")


def test_a_dying_spare_that_takes_a_place_is_noticed():
    class Hasty(Group):
        def _start_at(self) -> float:
            busy = self._members or self._warmth.importing or self._stop_deadline is not None
            return float("inf") if busy else self._next_start

    caught("a dead process is in an epoch|too many processes", Hasty, seeds=60)


def test_a_spare_that_survives_a_failed_start_is_noticed():
    class Lenient(Group):
        def _end_epoch(self, cause: str, **how: Any) -> None:
            spares, self._spares = self._spares, {}
            super()._end_epoch(cause, **how)
            self._spares = spares

    caught("must not be used again", Lenient)


def test_a_guilty_rank_that_stays_is_noticed():
    class Forgiving(Group):
        def _end_epoch(self, cause: str, **how: Any) -> None:
            super()._end_epoch(cause, **{**how, "guilty": ()})

    caught("must not be used again", Forgiving)


def test_old_ranks_after_an_operators_restart_are_noticed():
    class Sparing(Group):
        def _end_epoch(self, cause: str, **how: Any) -> None:
            if how.get("planned"):
                self._reforming.forget(self._clock())
            super()._end_epoch(cause, **{**how, "planned": False})

    caught("must not be used again", Sparing)


@pytest.mark.parametrize("what", ["_trust", "_loading"])
def test_an_operators_restart_that_does_not_forget_what_failed_is_noticed(monkeypatch, what):
    forget = Reforming.forget

    def but_for(self: Reforming, now: float) -> bool:
        kept = getattr(self, what)
        setattr(self, what, Breaker(1, 1.0, 1.0))
        aside = forget(self, now)
        setattr(self, what, kept)
        return aside

    monkeypatch.setattr(Reforming, "forget", but_for)
    caught("another is not kept|not loaded as they must be|two things are tried at once", seeds=200)


def test_an_order_for_another_epoch_that_counts_is_noticed():
    class Credulous(Group):
        def _on_kill_order(self, epoch: int, cause: str, planned: bool) -> None:
            super()._on_kill_order(self._epoch, cause, planned)

    caught("an order for an epoch that is over", Credulous)


def test_a_failed_loop_that_nobody_judges_is_noticed():
    class Deaf(Group):
        def _check_leavers(self, now: float) -> None:
            self._failed_deadline = float("inf")
            super()._check_leavers(now)

    caught("in which somebody does not serve|does not serve again", Deaf)


def test_a_stopped_member_of_a_start_that_nobody_sees_is_noticed():
    class Blind(Group):
        def _start(self) -> None:
            super()._start()
            self._start_watch.observe = lambda *_: None  # type: ignore[method-assign]

    caught("stopped in a start", Blind)


def test_a_request_to_leave_that_is_made_once_is_noticed():
    class Once(Group):
        def _check_leavers(self, now: float) -> None:
            self._ask_at = float("inf")
            super()._check_leavers(now)

    caught("could leave was killed", Once)


def test_sigquit_that_nobody_hears_is_noticed():
    class Deaf(Group):
        def _on_quit(self) -> None:
            pass

    caught("asked for does not come", Deaf)


def test_a_start_without_a_backoff_is_noticed():
    class Eager(Group):
        def _end_epoch(self, cause: str, **how: Any) -> None:
            super()._end_epoch(cause, **how)
            self._next_start = self.world.now

    caught("before its time", Eager)


# What fails is set aside, and comes back.


def test_reforms_that_fail_and_are_tried_for_ever_are_noticed():
    class Stubborn(Group):
        def _end_epoch(self, cause: str, **how: Any) -> None:
            super()._end_epoch(cause, **how)
            self._reforming._trust.worked()

    caught("though that is set aside|must not be used again|though re-forms are set aside", Stubborn)


def test_reforms_that_are_given_up_for_good_are_noticed():
    class Resigned(Group):
        def _end_epoch(self, cause: str, **how: Any) -> None:
            super()._end_epoch(cause, **how)
            if self._reforming._trust.failures >= 2:
                self._reforming._trust.open_until = float("inf")

    caught("another is not kept|not re-formed again", Resigned)


def test_loading_first_that_is_given_up_for_good_is_noticed():
    class Resigned(Group):
        def _start(self) -> None:
            if self._reforming._loading.failures:
                self._reforming._loading.open_until = float("inf")
            super()._start()

    caught("not loaded as they must be|not re-formed again", Resigned)


def test_forks_that_are_tried_with_what_failed_before_are_noticed(monkeypatch):
    monkeypatch.setattr(Reforming, "loads_first_again", False)
    caught("two things are tried at once")


def test_a_time_that_does_not_double_is_noticed(monkeypatch):
    failed = Breaker.failed

    def always_the_first(self: Breaker, now: float) -> None:
        self._length = self._shortest
        failed(self, now)

    monkeypatch.setattr(Breaker, "failed", always_the_first)
    caught("though that is set aside|must not be used again|not loaded as they must be|before its time")


def test_a_reform_that_has_hardly_served_and_forgives_the_failed_ones_is_noticed():
    class Gullible(Group):
        def _on_ready(self) -> None:
            super()._on_ready()
            if self.reformed:
                self._reforming._trust.worked()

    caught("though that is set aside|must not be used again|before its time", Gullible, seeds=200)


def test_spares_that_are_started_while_reforms_are_set_aside_are_noticed():
    class Busy(Group):
        def _end_epoch(self, cause: str, **how: Any) -> None:
            super()._end_epoch(cause, **how)
            self._spare_at = 0.0

    caught("a spare is started though", Busy)


def test_spares_that_outlive_the_last_failed_reform_are_noticed(monkeypatch):
    monkeypatch.setattr(Reforming, "keeps_spares", lambda self, served, now: served)
    caught("must not be used again|though that is set aside|before its time", seeds=400)
