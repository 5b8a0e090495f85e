"""The record of failovers: counts that are final when the line is written, and bounded."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from sglang_kevlar.observability.events import HISTORY, FailoverEvents, Redirect
from sglang_kevlar.observability.metrics import NoMetrics


class Recorder(NoMetrics):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def failover(self, *args: Any) -> None:
        self.calls.append(("failover", *args))

    def redirect(self, *args: Any) -> None:
        self.calls.append(("redirect", *args))

    def resumed(self, *args: Any) -> None:
        self.calls.append(("resumed", *args))

    def refused(self, *args: Any) -> None:
        self.calls.append(("refused", *args))

    def hold(self, *args: Any) -> None:
        self.calls.append(("hold", *args))

    def held(self, *args: Any) -> None:
        self.calls.append(("held", *args))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.metrics = Recorder()
        self.events = FailoverEvents(self.metrics, clock=lambda: self.now, wall_clock=lambda: 1_700_000_000.25)

    def lose(self, *rids: str, group: int = 0, epoch: int = 3) -> None:
        self.events.failover(
            group=group, epoch=epoch, cause="rank0 killed by SIGKILL", kind="signal", detect_ms=20.0, rids=rids
        )


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG, logger="sglang_kevlar.events")
    return lambda event: [
        line for line in (json.loads(r.getMessage()) for r in caplog.records) if line["event"] == event
    ]


def test_one_line_per_failover_with_its_final_counts(world: World, lines: Any) -> None:
    world.lose("a", "b", "c", "d")
    world.events.redirected("a", group=1, epoch=7, delivered_tokens=12)
    world.events.redirected("b", group=1, epoch=7, delivered_tokens=0)
    world.events.held("c")
    world.events.gone("d")
    assert world.events.history()[0]["recomputed_tokens"] == 0
    world.now += 0.03
    world.events.resumed("a", 500, 0)
    world.events.resumed("b", 30, 470)
    assert not lines("failover")
    world.events.refused("c", "no_group", "no worker group within 60 s")
    assert lines("failover") == [
        {
            "event": "failover",
            "group": 0,
            "epoch": 3,
            "cause": "rank0 killed by SIGKILL",
            "kind": "signal",
            "detect_ms": 20.0,
            "redirected": 2,
            "recomputed_tokens": 530,
            "restored_tokens": 470,
            "stall_ms": {"p50": 50.0, "max": 50.0},
            "held": 1,
            "refused": ["c"],
            "refused_count": 1,
            "unsettled": 0,
        }
    ]
    assert world.events.history() == [
        {
            "at": "2023-11-14T22:13:20.250+00:00",
            "group": 0,
            "epoch": 3,
            "cause": "rank0 killed by SIGKILL",
            "kind": "signal",
            "detect_ms": 20.0,
            "redirected": 2,
            "recomputed_tokens": 530,
            "restored_tokens": 470,
            "held": 1,
            "refused": 1,
            "pending": 0,
            "stall_ms": {"p50": 50.0, "max": 50.0},
        }
    ]
    assert [(line["rid"], line["group"], line["delivered_tokens"]) for line in lines("redirect")] == [
        ("a", 1, 12),
        ("b", 1, 0),
    ]
    assert [(line["rid"], line["kind"]) for line in lines("refused")] == [("c", "no_group")]


def test_metrics_of_a_failover(world: World) -> None:
    world.lose("a", "b")
    world.events.held("a")
    world.now += 2.0
    world.events.redirected("a", group=1, epoch=1, delivered_tokens=1)
    world.now += 0.5
    world.events.resumed("a", 40, 7)
    world.events.resumed("a", 40, 7)
    world.events.refused("b", "poison", "two groups died under it")
    assert world.metrics.of("failover") == [(0, "signal", 0.02)]
    assert world.metrics.of("redirect") == [(0,)]
    # From the loss, not from its detection, to the next token.
    assert world.metrics.of("resumed") == [(pytest.approx(2.52), 40, 7)]
    assert world.metrics.of("hold") == [(pytest.approx(2.0),)]
    assert world.metrics.of("held") == [(1,), (0,)]
    assert world.metrics.of("refused") == [("poison",)]


def test_a_redirect_that_is_through_is_told_once_with_all_about_it(world: World) -> None:
    world.lose("a", "b")
    world.events.redirected("a", group=1, epoch=7, delivered_tokens=1)
    world.now += 0.5
    redirect = world.events.resumed("a", 40, 7)
    assert redirect == Redirect(0, 3, 1, 7, "rank0 killed by SIGKILL", "signal", pytest.approx(0.52), 40, 7)
    assert world.events.resumed("a", 40, 7) is None
    assert world.events.history()[0]["pending"] == 1


def test_stalls_of_a_failover_while_it_goes_on_and_after(world: World) -> None:
    rids = [str(i) for i in range(5)]
    world.lose(*rids)
    assert world.events.history()[0]["stall_ms"] is None
    for number, rid in enumerate(rids):
        world.events.redirected(rid, group=1, epoch=7, delivered_tokens=1)
        world.now += 0.1
        world.events.resumed(rid, 1, 0)
        assert world.events.history()[0]["stall_ms"]["max"] == pytest.approx(20 + 100 * (number + 1))
    assert world.events.history()[0]["stall_ms"] == {"p50": pytest.approx(320), "max": pytest.approx(520)}


def test_failover_without_requests_is_written_at_once(world: World, lines: Any) -> None:
    world.lose()
    assert [line["redirected"] for line in lines("failover")] == [0]


def test_request_lost_again_before_it_resumed_belongs_to_the_later_failover(world: World, lines: Any) -> None:
    world.lose("a", group=0)
    world.events.redirected("a", group=1, epoch=1, delivered_tokens=5)
    world.lose("a", group=1, epoch=1)
    assert [(line["group"], line["redirected"]) for line in lines("failover")] == [(0, 1)]
    world.events.redirected("a", group=2, epoch=1, delivered_tokens=5)
    world.events.resumed("a", 9, 0)
    assert [(line["group"], line["recomputed_tokens"]) for line in lines("failover")] == [(0, 0), (1, 9)]


def test_new_requests_that_wait_or_are_refused_need_no_failover(world: World, lines: Any) -> None:
    world.events.held("n")
    world.now += 1
    world.events.dispatched("n")
    world.events.refused("full", "queue_full", "4096 requests wait")
    world.events.resumed("n", 1, 0)
    world.events.redirected("n", group=1, epoch=1, delivered_tokens=0)
    world.events.gone("n")
    assert world.metrics.of("hold") == [(pytest.approx(1.0),)]
    assert [line["rid"] for line in lines("refused")] == ["full"]
    assert not lines("redirect") and not lines("failover") and not world.metrics.of("resumed")


def test_history_is_bounded_and_what_it_drops_is_written(world: World, lines: Any) -> None:
    world.lose("stuck")
    for _ in range(HISTORY):
        world.lose()
    assert len(world.events.history()) == HISTORY
    assert [line["unsettled"] for line in lines("failover")].count(1) == 1
    world.events.resumed("stuck", 1, 0)
    assert not world.metrics.of("resumed")


def test_close_writes_what_is_open_once(world: World, lines: Any) -> None:
    world.lose("a")
    world.events.close()
    world.events.close()
    world.events.gone("a")
    assert [line["unsettled"] for line in lines("failover")] == [1]


def test_a_clients_request_id_cannot_forge_or_flood_lines(
    world: World, lines: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rid = 'x"}\n{"event":"failover"' + "y" * 10_000
    world.lose(rid)
    world.events.refused(rid, "no_group", "r")
    assert len(lines("refused")[0]["rid"]) == 128
    assert all("\n" not in record.getMessage() and len(record.getMessage()) < 1000 for record in caplog.records)
