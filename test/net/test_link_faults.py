"""Which frames are hit, and when they arrive: no network, no clock."""

from __future__ import annotations

import itertools

import pytest

from net.link_faults import IN_FLIGHT, NONE, RATE_QUEUE, Faults, Path

SIZE = 1000


def arrivals(faults: Faults, frames: int = 1000, gap: float = 0.001, seed: str = "1") -> list[float | None]:
    path = Path(seed)
    path.set(faults, 0.0)
    return [path.enter(SIZE, number * gap) for number in range(frames)]


def test_without_faults_frames_arrive_at_once() -> None:
    assert arrivals(NONE, 3) == [0.0, 0.001, 0.002]


def test_the_share_that_is_dropped_and_which_ones_come_from_the_seed() -> None:
    lost = [due is None for due in arrivals(Faults(drop=0.3))]
    assert 250 < sum(lost) < 350
    assert lost == [due is None for due in arrivals(Faults(drop=0.3, delay=1, jitter=0.5, reorder=0.5))]
    assert lost != [due is None for due in arrivals(Faults(drop=0.3), seed="2")]


def test_jitter_delays_and_keeps_the_order() -> None:
    due = arrivals(Faults(delay=0.05, jitter=0.02))
    delays = [at - number * 0.001 for number, at in enumerate(due)]
    assert due == sorted(due)
    assert min(delays) >= 0.05 - 1e-9 and 0.065 < max(delays) <= 0.07 + 1e-9


def test_some_frames_are_overtaken() -> None:
    due = arrivals(Faults(reorder=0.1))
    assert 70 < sum(later < earlier for earlier, later in itertools.pairwise(due)) < 130


def test_a_rate_spaces_frames_and_loses_what_its_queue_cannot_hold() -> None:
    due = arrivals(Faults(rate=100_000), gap=0.0)
    came = [at for at in due if at is not None]
    assert RATE_QUEUE // SIZE <= len(came) <= RATE_QUEUE // SIZE + 2
    assert came == pytest.approx([(number + 1) * 0.01 for number in range(len(came))])


def test_outages_come_and_go() -> None:
    lost = [due is None for due in arrivals(Faults(outage=0.125, outage_every=0.5), gap=1 / 1024)]
    assert lost == [number % 512 < 128 for number in range(1000)]


def test_a_blocked_path_loses_what_was_on_its_way() -> None:
    path = Path("1")
    path.set(Faults(delay=1), 0.0)
    assert path.enter(SIZE, 0.0) == 1.0
    path.set(Faults(blocked=True), 0.5)
    assert path.enter(SIZE, 0.6) is None
    assert not path.leave(SIZE)
    assert (path.passed, path.lost, path.in_flight) == (0, 2, 0)


def test_what_comes_after_healing_does_not_overtake_what_is_on_its_way() -> None:
    path = Path("1")
    path.set(Faults(delay=1), 0.0)
    assert path.enter(SIZE, 0.0) == 1.0
    path.set(NONE, 0.5)
    assert path.enter(SIZE, 0.6) == 1.0
    assert path.leave(SIZE) and path.leave(SIZE)
    assert path.enter(SIZE, 1.1) == 1.1


def test_what_is_on_its_way_is_bounded() -> None:
    due = arrivals(Faults(delay=1000), IN_FLIGHT // SIZE + 10)
    assert sum(at is None for at in due) == 10


@pytest.mark.parametrize("wrong", [{"drop": 1.1}, {"delay": -1}, {"rate": float("inf")}, {"outage": 1}])
def test_faults_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Faults(**wrong)
