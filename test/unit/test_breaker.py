"""The circuit breaker over all histories of tries, each made as soon as it is allowed or later."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kevlar.control.breaker import Breaker

FIRST, LONGEST = 300.0, 86400.0
#: seconds after it is allowed, or at once, and whether it works
_TRIES = st.lists(st.tuples(st.floats(0.0, 1e6), st.booleans()), max_size=60)


def test_it_opens_for_twice_as_long_each_time_and_closes_for_good_when_it_worked() -> None:
    breaker = Breaker(2, FIRST, LONGEST)
    now, lengths = 0.0, []
    for _ in range(12):
        breaker.failed(now)
        lengths.append(max(0.0, breaker.open_until - now))
        now = max(now, breaker.open_until)
        assert not breaker.is_open(now)
    assert lengths[:5] == [0.0, 300.0, 600.0, 1200.0, 2400.0] and lengths[-1] == LONGEST
    breaker.worked()
    breaker.failed(now)
    assert not breaker.is_open(now)
    breaker.failed(now)
    assert breaker.open_until == now + FIRST


@given(_TRIES, st.integers(1, 3))
def test_it_is_open_only_after_so_many_failures_in_a_row_and_never_for_long(
    tries: list[tuple[float, bool]], failures: int
) -> None:
    breaker = Breaker(failures, FIRST, LONGEST)
    now, in_a_row, since = 0.0, 0, 0.0
    for pause, works in tries:
        now = max(now, breaker.open_until) + pause
        assert not breaker.is_open(now)
        if works:
            breaker.worked()
            in_a_row = 0
        else:
            since = since if in_a_row else now
            in_a_row += 1
            breaker.failed(now)
        assert breaker.is_open(now) == (in_a_row >= failures)
        length = breaker.open_until - now
        # What works again is back within the time that it had failed for, and the first length.
        assert length <= min(LONGEST, now - since + FIRST) + 1e-3


@given(st.lists(st.floats(0.0, 3600.0), min_size=1, max_size=200))
def test_what_never_works_is_tried_a_few_times_and_then_once_in_the_longest_time(pauses: list[float]) -> None:
    """Whenever something dies: it is tried, or not."""
    breaker = Breaker(2, FIRST, LONGEST)
    now, tries = 0.0, 0
    for pause in pauses * 5:
        now += pause
        if not breaker.is_open(now):
            tries += 1
            breaker.failed(now)
    assert tries <= 2 + math.ceil(math.log2(LONGEST / FIRST)) + now / LONGEST


@pytest.mark.parametrize("wrong", [(0, 1.0, 2.0), (1, 0.0, 2.0), (1, 3.0, 2.0)])
def test_a_breaker_that_is_none_is_refused(wrong: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="not a breaker"):
        Breaker(*wrong)
