"""Of a group that frontends share: each request and each answer is one frontend's."""

from __future__ import annotations

from sglang_kevlar.control.owners import Owners


def test_a_request_is_of_whoever_began_it_until_it_ends() -> None:
    owners = Owners()
    assert owners.begin("a", 0) and owners.begin("b", 1) and not owners.begin("a", 1)
    assert [owners.owner(rid) for rid in ("a", "b", "c", None)] == [0, 1, None, None]
    owners.end("a")
    owners.end("a")
    assert owners.owner("a") is None and owners.begin("a", 1) and owners.of(1) == ["b", "a"]


def test_a_frontend_that_is_gone_leaves_requests_for_nobody() -> None:
    owners = Owners()
    for rid, frontend in (("a", 0), ("b", 1), ("c", 0)):
        owners.begin(rid, frontend)
    assert owners.forget(0) == ["a", "c"] and owners.forget(0) == [] and len(owners) == 1
    assert owners.owner("a") is None and owners.owner("b") == 1


def test_answers_go_to_those_who_asked_in_their_order() -> None:
    owners = Owners()
    for frontend in (0, 1, 0):
        owners.ask("State", frontend)
    owners.ask("Weights", 1)
    assert [owners.answered("State"), owners.answered("Weights")] == [0, 1]
    owners.forget(1)
    owners.ask("State", 1)
    assert [owners.answered("State") for _ in range(4)] == [None, 0, 1, None], (
        "the answer to one that is gone is nobody's"
    )
    owners.ask("State", 0)
    owners.clear()
    assert owners.answered("State") is None
