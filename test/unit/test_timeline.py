"""Which states of which groups are remembered, and for how long."""

from __future__ import annotations

from sglang_kevlar.observability.timeline import CHANGES, WINDOW, Timeline


def test_only_changes_are_kept() -> None:
    timeline = Timeline()
    for at, state, epoch in [(1, "starting", 1), (2, "ready", 1), (3, "ready", 1), (4, "down", 1), (5, "starting", 2)]:
        timeline.observe(float(at), [(0, state, epoch), (1, "ready", 7)])
    [first, second] = timeline.changes()
    assert first["group"] == 0 and second == {"group": 1, "changes": [[1.0, "ready", 7]]}
    assert first["changes"] == [[1.0, "starting", 1], [2.0, "ready", 1], [4.0, "down", 1], [5.0, "starting", 2]]


def test_another_epoch_is_a_change_also_in_the_same_state() -> None:
    timeline = Timeline()
    timeline.observe(1.0, [(0, "ready", 1)])
    timeline.observe(2.0, [(0, "ready", 2)])
    assert timeline.changes()[0]["changes"] == [[1.0, "ready", 1], [2.0, "ready", 2]]


def test_the_state_in_which_the_window_begins_stays() -> None:
    timeline = Timeline()
    timeline.observe(0.0, [(0, "starting", 1)])
    timeline.observe(10.0, [(0, "ready", 1)])
    timeline.observe(20.0 + WINDOW, [(0, "down", 1)])
    assert timeline.changes()[0]["changes"] == [[10.0, "ready", 1], [20.0 + WINDOW, "down", 1]]


def test_a_group_that_is_not_there_any_more_is_gone_and_then_forgotten() -> None:
    timeline = Timeline()
    timeline.observe(0.0, [(0, "ready", 1), (5, "ready", 3)])
    timeline.observe(1.0, [(0, "ready", 1)])
    assert timeline.changes()[1]["changes"][-1] == [1.0, "gone", 3]
    timeline.observe(2.0, [(0, "ready", 1), (5, "starting", 4)])
    assert timeline.changes()[1]["changes"][-1] == [2.0, "starting", 4], "it may come back"
    timeline.observe(3.0, [(0, "ready", 1)])
    timeline.observe(4.0 + WINDOW, [(0, "ready", 1)])
    assert [one["group"] for one in timeline.changes()] == [0]


def test_a_group_that_flaps_takes_no_more_memory() -> None:
    timeline = Timeline()
    for i in range(3 * CHANGES):
        timeline.observe(i / 10, [(0, ("ready", "suspect")[i % 2], 1)])
    assert len(timeline.changes()[0]["changes"]) == CHANGES
