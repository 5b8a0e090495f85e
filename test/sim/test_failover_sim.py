"""The frontend's real actor, journal, router, hold queue and membership, in the simulated world of `failover_world`.

Replay one run with ``python test/sim/campaign.py --world failover --seed N``.
"""

from __future__ import annotations

import logging
import re
import secrets
from typing import Any

import pytest
from failover_world import STEPS, simulate

from frontend_fakes import (
    FakeChannel,
)
from sglang_kevlar.control.admission import Held, HoldQueue
from sglang_kevlar.control.journal import Entry, Journal
from sglang_kevlar.control.rolling import Done, RollingUpdate, Switch
from sglang_kevlar.frontend import failover as failover_module
from sglang_kevlar.frontend import requests as requests_module
from sglang_kevlar.frontend.failover import Failover
from sglang_kevlar.frontend.in_flight import InFlight
from sglang_kevlar.frontend.rolling_weights import RollingWeights

SEEDS = 100
FRESH = 20


@pytest.fixture(autouse=True)
def quiet_log():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_clients_get_exactly_their_answers():
    ends: dict[str, int] = {}
    for seed in range(SEEDS):
        sim = simulate(seed)
        assert sim.count > STEPS
        for how, times in sim.ends.items():
            ends[how] = ends.get(how, 0) + times
    named = {"length", "abort", "aborted", "poison", "not_continuable", "weights", "no_group", "queue_full"}
    assert set(ends) - {"redirect_limit"} == named, ends
    assert ends["length"] > sum(ends.values()) * 0.4, ends


def test_a_seed_replays():
    first, second = simulate(3), simulate(3)
    assert first.trace == second.trace and first.ends == second.ends


def test_fresh_seeds():
    first = secrets.randbelow(10**9)
    print(f"seeds {first} to {first + FRESH - 1}")
    for seed in range(first, first + FRESH):
        simulate(seed)


# What the invariants are worth: each of these frontends is broken in one place, and must be found out.


def caught(match: str, actor: type[Failover] = Failover, seeds: int = 40) -> None:
    for seed in range(seeds):
        try:
            simulate(seed, actor=actor)
        except AssertionError as error:
            assert re.search(match, str(error)), error
            return
    pytest.fail("not noticed")


def test_a_missing_fence_is_noticed(monkeypatch):
    def accept(self: Journal, wire_rid: str, group: int, epoch: int) -> Entry | None:
        entry = self._entries.get(wire_rid.split("~")[0])
        return entry if entry is not None and entry.attempt is not None else None

    monkeypatch.setattr(Journal, "accept", accept)
    caught("fenced attempt|other tokens|which ended|other text|that nobody has|ends unasked|could go on")


def test_a_message_handled_twice_is_noticed(monkeypatch):
    class Twice(FakeChannel):
        def drain(self) -> list[Any]:
            return [message for message in super().drain() for _ in range(2)]

    real = failover_module.Failover._lost

    async def lost(self: Failover, channel: Any, event: Any) -> None:
        channel.__class__ = Twice
        await real(self, channel, event)

    monkeypatch.setattr(Failover, "_lost", lost)
    # The ids of the first handling are in the message already: the second must be under the wire ids again.
    original = Failover._outputs

    async def outputs(self: Failover, channel: Any, batch: Any) -> None:
        wires = list(batch.rids)
        await original(self, channel, batch)
        batch.rids = wires

    monkeypatch.setattr(Failover, "_outputs", outputs)
    caught("other tokens")


def test_a_resume_one_token_late_is_noticed(monkeypatch):
    real = Entry.resume_state

    def late(self: Entry) -> Any:
        state = real(self)
        return state and type(state)(output_ids=state.output_ids + state.output_ids[-1:])

    monkeypatch.setattr(Entry, "resume_state", late)
    caught("is not continued where its client is")


def test_a_forgotten_request_is_noticed(monkeypatch):
    real = HoldQueue.hold

    def hold(self: HoldQueue, rid: str, now: float, redirected: bool) -> bool:
        return True if redirected and rid.endswith("7") else real(self, rid, now, redirected)

    monkeypatch.setattr(HoldQueue, "hold", hold)
    caught("is forgotten")


def test_a_message_overtaken_at_a_loss_is_noticed(monkeypatch):
    class TakesFirst(Failover):
        async def _receive(self, channel: Any) -> None:
            while not channel.closed:
                await channel.arrival()
                if channel.closed:
                    return
                message = channel.take()
                async with self._turn:
                    if not channel.closed:
                        await self._handle(channel, message)
                        self._pump()

    caught("other t", TakesFirst, seeds=200)


def test_text_that_is_sent_again_is_noticed(monkeypatch):
    monkeypatch.setattr(InFlight, "new_text", lambda self, text, delivered: text)
    caught("other text")


def test_new_requests_before_redirected_ones_are_noticed(monkeypatch):
    def first(self: HoldQueue, served: Any) -> Any:
        return next((held for queue in (self._new, self._redirected) for held in queue.values()), None)

    monkeypatch.setattr(HoldQueue, "first", first)
    caught("goes before redirected|wait while a group serves")


def test_new_requests_that_come_while_many_are_moved_and_go_first_are_noticed(monkeypatch):
    monkeypatch.setattr(requests_module, "must_wait", lambda room, degraded, waiting: degraded and not room)
    caught("goes before redirected")


def test_many_that_are_moved_and_then_forgotten_are_noticed(monkeypatch):
    class Once(Failover):
        async def _pump_rest(self) -> None:
            pass

    caught("and then no more", Once)


def test_an_answer_under_two_weight_versions_is_noticed(monkeypatch):
    real = Journal.refusal

    def refusal(self: Journal, entry: Entry) -> Any:
        refused = real(self, entry)
        return None if refused is not None and refused.kind == "weights" else refused

    monkeypatch.setattr(Journal, "refusal", refusal)
    caught("continues across weights|continues with other weights", seeds=100)


def test_a_request_that_waits_for_ever_is_noticed(monkeypatch):
    monkeypatch.setattr(HoldQueue, "expired", lambda self, now: [])
    caught("beyond its time")


def test_a_hold_queue_without_a_bound_is_noticed(monkeypatch):
    real = HoldQueue.hold

    def hold(self: HoldQueue, rid: str, now: float, redirected: bool) -> bool:
        if real(self, rid, now, redirected):
            return True
        self._new[rid] = Held(rid, deadline=now + 1.0, since=now)
        return True

    monkeypatch.setattr(HoldQueue, "hold", hold)
    caught("too many wait")


def test_a_group_that_gets_other_weights_before_it_is_empty_is_noticed(monkeypatch):
    async def emptied(self: RollingWeights, course: Any, channel: Any, last: bool) -> bool:
        return not channel.closed

    monkeypatch.setattr(RollingWeights, "_emptied", emptied)
    caught("while it runs|continues with other weights|with weights|wait while|never ended|that nobody has")


def test_a_batch_whose_parts_have_different_weights_is_noticed(monkeypatch):
    real = Failover.submit

    def submit(self: Failover, message: Any, outcome: Any, pinned_group: Any = None, call: Any = None) -> None:
        real(self, message, outcome, pinned_group, None)

    monkeypatch.setattr(Failover, "submit", submit)
    caught("parts of a batch", seeds=200)


def test_requests_that_begin_with_weights_that_nobody_has_are_noticed(monkeypatch):
    monkeypatch.setattr(
        RollingUpdate, "next", lambda self, serving, old_requests: Done() if self.switched else Switch()
    )
    caught("waits while|nothing happens")
