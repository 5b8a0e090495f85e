"""Who outlives an epoch, as rules (`control.reforming`). Test of the groups: test_reformed_groups.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_kevlar.control.reforming import Reforming


def survivors(rules: Reforming, now: float) -> frozenset[str]:
    return rules.survivors(served=True, planned=False, alive=["rank0"], now=now)


def reform(rules: Reforming, now: float, served_for: float | None, by_itself: bool = True) -> None:
    """A whole re-formed epoch, which ends then."""
    rules.form(["rank0"], now)
    if served_for is not None:
        rules.succeeded(now)
    rules.ended(served_for, by_itself, now)


def start(rules: Reforming, now: float, works: bool = True, by_itself: bool = True) -> None:
    """A start of new processes; when it works, the epoch serves for long and is then killed."""
    rules.form([], now)
    if works:
        rules.succeeded(now)
        rules.ended(1000.0, False, now)
    else:
        rules.ended(None, by_itself, now)


def test_only_an_epoch_that_served_leaves_survivors() -> None:
    rules = Reforming(True, (), 100.0)
    assert survivors(rules, 0.0) == {"rank0"}
    assert not rules.survivors(served=False, planned=False, alive=["rank0"], now=0.0)
    assert not rules.survivors(served=True, planned=True, alive=["rank0"], now=0.0)
    assert not survivors(Reforming(False, (), 100.0), 0.0)


def test_a_reform_has_less_time_than_a_start() -> None:
    rules = Reforming(True, (), 1800.0)
    rules.form([], 10.0)
    assert rules.deadline() == 1810.0
    rules.succeeded(30.0)  # 20 s
    rules.form(["rank0"], 100.0)
    assert rules.deadline() == 160.0
    rules.succeeded(101.0)
    rules.form([], 200.0)
    assert rules.deadline() == 2000.0
    rules.succeeded(200.5)
    rules.form(["rank0"], 300.0)
    assert rules.deadline() == 310.0


def test_two_bad_reforms_cost_minutes_and_not_the_life_of_the_supervisor() -> None:
    rules = Reforming(True, ["rank0"], 100.0)
    start(rules, 0.0)
    reform(rules, 10.0, served_for=None)
    assert survivors(rules, 10.0)
    reform(rules, 20.0, served_for=None)
    assert not survivors(rules, 20.0) and not survivors(rules, 319.0)
    assert rules.rests_until == 320.0 and not rules.keeps_spares(True, 319.0)
    assert rules.set_aside(119.0) == ["no re-forms for 201 s, because 2 in a row failed"]
    start(rules, 100.0)  # which says nothing about re-forms
    assert not survivors(rules, 319.0) and survivors(rules, 320.0)
    assert not rules.set_aside(320.0) and rules.keeps_spares(True, 320.0)
    # It works again, and all is as it was.
    rules.form(["rank0"], 1000.0)
    assert rules.tried_again() == "a re-form is tried again, after 2 in a row failed"
    rules.ended(60.0, True, 1060.0)
    rules.form(["rank0"], 1061.0)
    assert rules.tried_again() == ""
    rules.ended(None, True, 1062.0)
    assert survivors(rules, 1062.0)


def test_a_reform_that_fails_again_is_set_aside_for_longer() -> None:
    rules = Reforming(True, (), 100.0)
    start(rules, 0.0)
    now, lengths = 0.0, []
    for _ in range(12):
        reform(rules, now, served_for=None)
        lengths.append(max(0.0, rules.rests_until - now))
        now = max(now, rules.rests_until)
        assert survivors(rules, now)
    assert lengths[:4] == [0.0, 300.0, 600.0, 1200.0] and lengths[-1] == 86400.0


def test_a_reform_that_ends_by_itself_when_it_has_hardly_served_has_failed() -> None:
    rules = Reforming(True, ["rank0"], 100.0)
    start(rules, 0.0)
    reform(rules, 10.0, served_for=1.0)
    reform(rules, 20.0, served_for=4.9)
    assert not survivors(rules, 20.0) and not rules.keeps_spares(True, 20.0)


# served for how long, ended by itself
_REFORMS = [(None, True), (None, False), (1.0, True), (1.0, False), (5.0, True), (1e6, False)]


@given(st.lists(st.tuples(st.sampled_from([*_REFORMS, "start"]), st.floats(0.0, 1e6)), max_size=40))
def test_reforms_are_set_aside_after_two_failures_in_a_row_and_at_most_for_a_day(history: list) -> None:
    rules = Reforming(True, ["rank0"], 100.0)
    start(rules, 0.0)
    now, in_a_row = 0.0, 0
    for event, pause in history:
        now += pause
        if event == "start" or not survivors(rules, now):
            start(rules, now)
            continue
        reform(rules, now, *event)
        if event[0] is not None and event[0] >= 5.0:
            in_a_row = 0
        elif event[1]:
            in_a_row += 1
        fresh = event[1] and in_a_row >= 2
        assert (not survivors(rules, now)) == fresh
        assert survivors(rules, now + 86400.0)
        assert bool(rules.set_aside(now)) == fresh
        # It is the time at which one is started that waits.
        assert rules.missing_spares([]) == ["rank0"] and (rules.rests_until > now) == fresh


def test_loading_first_is_blamed_only_for_what_works_without() -> None:
    rules = Reforming(True, ["rank0"], 100.0)
    for _ in range(2):  # fails either way: tried in turns
        start(rules, 0.0, works=False)
        assert rules.suspect and not rules.loads_in_place
        start(rules, 0.0, works=False)
        assert not rules.suspect and rules.loads_in_place
    start(rules, 0.0, works=False, by_itself=False)
    assert not rules.suspect and not rules.loads_in_place
    start(rules, 0.0, works=False)
    start(rules, 0.0)
    assert rules.loads_in_place and not rules.missing_spares([])


def test_one_failed_first_start_costs_minutes_and_not_the_life_of_the_supervisor() -> None:
    rules = Reforming(True, ["rank0"], 100.0)
    start(rules, 0.0, works=False)
    start(rules, 10.0)
    [text] = rules.set_aside(10.0)
    assert text == "for 300 s weights are not loaded first, and no rank outlives an epoch, because 1 failed"
    rules.form([], 309.0)
    assert rules.loads_in_place
    # It lasts for twice as long when it fails again,
    start(rules, 310.0, works=False)
    assert not rules.loads_in_place and rules.suspect
    start(rules, 320.0)
    start(rules, 919.0)
    assert rules.loads_in_place and not rules.missing_spares([])
    rules.form([], 920.0)
    assert not rules.loads_in_place and rules.loads_first_again
    assert rules.tried_again() == "weights are loaded first again, after 2 in a row failed"
    # and is over when it works.
    rules.succeeded(921.0)
    assert rules.missing_spares([]) == ["rank0"] and not rules.set_aside(921.0) and not rules.loads_first_again


def test_loading_first_that_worked_is_blamed_when_it_fails_twice_in_a_row() -> None:
    rules = Reforming(True, (), 100.0)
    start(rules, 0.0)
    for _ in range(3):
        start(rules, 2.0, works=False)
        assert not rules.suspect
        start(rules, 3.0)
        assert not rules.loads_in_place
    start(rules, 4.0, works=False)
    start(rules, 5.0, works=False)
    assert rules.suspect


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 1e6)), max_size=40))
def test_the_third_start_is_one_that_upstream_could_make_too(history: list) -> None:
    """Whether weights can be loaded first may change whenever the group serves."""
    rules = Reforming(True, ["rank0"], 100.0)
    now = 0.0
    for first_works, pause in history:
        now += pause
        failed = 0
        rules.form([], now)
        while not (rules.loads_in_place or first_works):
            rules.ended(None, True, now)
            failed += 1
            rules.form([], now)
        assert failed <= 2
        rules.succeeded(now)
        rules.ended(1000.0, False, now)
        assert bool(survivors(rules, now)) != rules.loads_in_place
