"""Rolling latencies: what is counted where, what is forgotten, and how far off a quantile may be."""

from __future__ import annotations

import random

from sglang_kevlar.observability.latency import ROLLING, WINDOW, RollingLatency

NOTHING = {"p50": None, "p99": None, "max": None}


def test_first_tokens_and_later_ones_are_told_apart() -> None:
    latency = RollingLatency()
    latency.tokens(100.2, 0.5, 1, first=True)
    latency.tokens(100.4, 0.02, 1, first=False)
    latency.tokens(100.6, 0.02, 1, first=False)
    assert latency.seconds(100.9, -1) == [], "a second that is not over"
    [[second, tokens, first, longest, p50, p99, wait]] = latency.seconds(101.0, -1)
    assert (second, tokens, first, longest) == (100, 3, 500.0, 500.0)
    assert p50 == p99 == wait == 20.0
    assert latency.seconds(101.0, 100) == []


def test_several_tokens_at_once_share_the_time_and_not_the_wait() -> None:
    latency = RollingLatency()
    latency.tokens(5.0, 0.4, 8, first=False)
    [row] = latency.seconds(6.0, -1)
    assert row[1] == 8 and row[4] < 64 and row[6] == 400.0
    assert row[2] is None and row[3] is None


def test_a_quantile_is_at_most_a_quarter_too_much() -> None:
    chance = random.Random(3)
    waits = sorted(chance.lognormvariate(-3.5, 0.8) for _ in range(5000))
    latency = RollingLatency()
    for wait in waits:
        latency.tokens(7.5, wait, 1, first=False)
    [row] = latency.seconds(8.0, -1)
    for shown, share in ((row[4], 0.5), (row[5], 0.99)):
        exact = waits[int(share * len(waits))] * 1e3
        assert exact * 0.98 <= shown <= exact * 1.27
    assert row[6] == round(waits[-1] * 1e3, 2)


def test_what_is_longer_than_all_classes_is_shown_as_it_was() -> None:
    latency = RollingLatency()
    latency.tokens(1.0, 400.0, 1, first=True)
    assert latency.rolling(2.0)["first_token_ms"] == {"p50": 400_000.0, "p99": 400_000.0, "max": 400_000.0}


def test_the_rolling_minute_forgets() -> None:
    latency = RollingLatency()
    assert latency.rolling(0.5)["first_token_ms"] == NOTHING
    for second in range(90):
        latency.tokens(second + 0.5, 5.0 if second == 0 else 0.01, 1, first=False)
    rolling = latency.rolling(90.0)
    assert rolling["tokens_per_s"] == 1.0 and rolling["inter_token_ms"]["max"] == 10.0
    assert rolling["first_token_ms"] == NOTHING
    assert latency.rolling(90.0 + ROLLING)["inter_token_ms"] == NOTHING, "nothing came in the last minute"


def test_it_is_bounded_and_old_seconds_are_not_shown() -> None:
    latency = RollingLatency()
    for second in range(3 * WINDOW):
        latency.tokens(float(second), 0.01, 1, first=False)
    rows = latency.seconds(3.0 * WINDOW, -1)
    assert [rows[0][0], rows[-1][0]] == [2 * WINDOW, 3 * WINDOW - 1]
    assert latency.seconds(10.0 * WINDOW, -1) == []
