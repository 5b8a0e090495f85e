"""Who waits, for how long, and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.control.admission import HoldQueue, must_wait
from sglang_kevlar.protocol.launch import KevlarArgs

ARGS = KevlarArgs(hold_queue=2, hold_timeout=10.0)


def test_redirected_before_new_each_first_in_first_out():
    queue = HoldQueue(ARGS)
    queue.hold("new1", 0.0, redirected=False)
    queue.hold("new2", 0.0, redirected=False)
    queue.hold("moved1", 1.0, redirected=True)
    queue.hold("moved2", 1.0, redirected=True)
    order = []
    while (held := queue.first()) is not None:
        order.append(held.rid)
        assert queue.remove(held.rid) is held
    assert order == ["moved1", "moved2", "new1", "new2"]


def test_full_for_new_requests_never_for_redirected_ones():
    queue = HoldQueue(ARGS)
    assert queue.hold("a", 0.0, redirected=False)
    assert queue.hold("b", 0.0, redirected=True)
    assert not queue.hold("c", 0.0, redirected=False)
    assert "c" not in queue
    assert queue.hold("d", 0.0, redirected=True)
    assert len(queue) == 3
    queue.remove("d")
    queue.remove("b")
    assert queue.hold("c", 0.0, redirected=False)


def test_holding_twice_is_an_error_and_removing_twice_is_not():
    queue = HoldQueue(ARGS)
    queue.hold("a", 0.0, redirected=True)
    with pytest.raises(AssertionError, match="already held"):
        queue.hold("a", 1.0, redirected=False)
    assert queue.remove("a").since == 0.0
    assert queue.remove("a") is None


def test_deadlines():
    queue = HoldQueue(ARGS)
    queue.hold("new", 0.0, redirected=False)
    queue.hold("moved", 3.0, redirected=True)
    assert queue.expired(9.9) == []
    assert [held.rid for held in queue.expired(10.0)] == ["new"]
    assert "new" not in queue and "moved" in queue and queue.expired(12.9) == []
    assert [held.rid for held in queue.expired(99.0)] == ["moved"]
    assert len(queue) == 0


@pytest.mark.parametrize(
    ("room", "degraded", "waiting", "waits"),
    [
        (True, False, 0, False),
        (False, False, 0, False),  # with all groups up their own queues do it, as upstream
        (True, False, 3, True),  # while many are given out
        (True, True, 0, False),
        (False, True, 0, True),
        (True, True, 1, True),  # nobody goes before those who wait
    ],
)
def test_a_new_request_waits_behind_others_and_after_a_loss_of_capacity(room, degraded, waiting, waits):
    assert must_wait(room, degraded, waiting) is waits


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["hold", "remove", "expire", "first"]), st.integers(0, 8), st.booleans()), max_size=60
    )
)
def test_nobody_is_lost_doubled_or_held_too_long(script):
    queue = HoldQueue(ARGS)
    model: dict[str, tuple[bool, float]] = {}
    now = 0.0
    for kind, number, redirected in script:
        now += number / 2
        rid = f"r{number}"
        if kind == "hold" and rid not in model:
            accepted = queue.hold(rid, now, redirected)
            assert accepted == (redirected or len(model) < ARGS.hold_queue)
            if accepted:
                model[rid] = (redirected, now)
        elif kind == "remove":
            assert (queue.remove(rid) is None) == (model.pop(rid, None) is None)
        elif kind == "expire":
            over = {held.rid for held in queue.expired(now)}
            assert over == {r for r, (_, since) in model.items() if since + ARGS.hold_timeout <= now}
            for r in over:
                del model[r]
        held = queue.first()
        if model:
            first = min(model, key=lambda r: (not model[r][0], model[r][1], list(model).index(r)))
            assert held is not None and held.rid == first
        else:
            assert held is None
        assert len(queue) == len(model) and all(r in queue for r in model)
