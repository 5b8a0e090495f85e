"""The journal: every rule, and a model of it under any order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_kevlar.control.journal import RESERVE_NEW_TOKENS, Entry, Journal
from sglang_kevlar.protocol.launch import KevlarArgs

ARGS = KevlarArgs(max_redirects=3, poison_deaths=2)


@pytest.fixture
def journal() -> Journal:
    return Journal(ARGS, "inc")


def running(journal: Journal, rid: str = "a", group: int = 0, epoch: int = 1, **fields) -> Entry:
    entry = journal.open(rid, **({"prompt_tokens": 10, "max_new_tokens": 20} | fields))
    journal.begin_attempt(entry, group, epoch)
    return entry


def test_a_request_is_accepted_from_its_incarnation_only(journal):
    entry = running(journal)
    wire = entry.attempt.wire_rid
    assert journal.accept(wire, 0, 1) is entry
    assert journal.accept(wire, 0, 2) is None
    assert journal.accept(wire, 1, 1) is None
    assert journal.accept("a", 0, 1) is None
    assert journal.accept("", 0, 1) is None


def test_wire_ids_are_never_used_twice_and_carry_the_incarnation(journal):
    entry = running(journal)
    first = entry.attempt.wire_rid
    journal.fence(0, 1)
    second = journal.begin_attempt(entry, 1, 1).wire_rid
    journal.close("a")
    third = running(journal).attempt.wire_rid
    assert len({first, second, third}) == 3
    assert all("inc" in wire for wire in (first, second, third))
    assert running(Journal(ARGS, "other")).attempt.wire_rid not in (first, second, third)


def test_after_a_fence_the_old_wire_id_is_unknown_also_on_the_same_group(journal):
    entry = running(journal)
    wire = entry.attempt.wire_rid
    assert journal.fence(0, 1) == [entry]
    assert journal.accept(wire, 0, 1) is None
    journal.begin_attempt(entry, 0, 2)
    assert journal.accept(wire, 0, 1) is None
    assert journal.accept(wire, 0, 2) is None


def test_a_fence_takes_one_incarnation_and_returns_the_longest_context_first(journal):
    short, long = running(journal, "short", prompt_tokens=5), running(journal, "long", prompt_tokens=50)
    grown = running(journal, "grown", prompt_tokens=5)
    journal.deliver(grown, [1] * 10)
    other, later = running(journal, "other", group=1), running(journal, "later", epoch=2)
    assert journal.fence(0, 1) == [long, grown, short]
    assert journal.fence(0, 1) == []
    assert other.attempt is not None and later.attempt is not None


def test_close_ends_the_attempt_and_may_be_repeated(journal):
    entry = running(journal)
    wire = entry.attempt.wire_rid
    assert journal.close("a") is entry
    assert journal.close("a") is None
    assert journal.accept(wire, 0, 1) is None
    assert len(journal) == 0 and journal.get("a") is None
    journal.check()


def test_misuse_is_an_error(journal):
    entry = running(journal)
    with pytest.raises(AssertionError, match="already open"):
        journal.open("a", 1, 1)
    with pytest.raises(AssertionError, match="already runs"):
        journal.begin_attempt(entry, 1, 1)
    journal.fence(0, 1)
    with pytest.raises(AssertionError, match="runs nowhere"):
        journal.deliver(entry, [1])
    journal.close("a")
    with pytest.raises(AssertionError, match="not open"):
        journal.begin_attempt(entry, 1, 1)


def test_resume_state_is_what_was_delivered(journal):
    entry = running(journal)
    assert entry.resume_state() is None
    journal.deliver(entry, [7, 8])
    journal.deliver(entry, [])
    journal.deliver(entry, [9])
    entry.cached_tokens, entry.input_logprobs_sent = 4, True
    state = entry.resume_state()
    assert (state.output_ids.tolist(), state.cached_tokens, state.input_logprobs_sent) == ([7, 8, 9], 4, True)
    state.output_ids.append(1)
    assert entry.delivered.tolist() == [7, 8, 9]


def test_reserved_tokens_are_context_and_a_bounded_future(journal):
    entry = running(journal, max_new_tokens=20)
    assert entry.attempt.reserved_tokens == 30
    journal.deliver(entry, [1] * 5)
    assert entry.reserved_tokens == 30
    assert entry.attempt.reserved_tokens == 30
    journal.deliver(entry, [1] * 20)  # more than asked for: never a negative future
    assert entry.reserved_tokens == 35
    assert running(journal, "b", max_new_tokens=10**6).reserved_tokens == 10 + RESERVE_NEW_TOKENS


def lose(journal: Journal, entry: Entry, group: int, planned: bool = False):
    if entry.attempt is None:
        journal.begin_attempt(entry, group, 1)
    entry.started = True
    assert journal.fence(entry.attempt.group, entry.attempt.epoch, planned) == [entry]
    return journal.refusal(entry)


def test_poison_after_deaths_without_progress(journal):
    entry = running(journal)
    assert lose(journal, entry, 0) is None
    refusal = lose(journal, entry, 1)
    assert refusal.kind == "poison" and "request a" in refusal.message and "0, 1" in refusal.message


def test_a_request_that_only_waited_is_not_suspected(journal):
    entry = running(journal)
    for group in range(ARGS.max_redirects):
        if entry.attempt is None:
            journal.begin_attempt(entry, group, 1)
        journal.fence(entry.attempt.group, entry.attempt.epoch)
        assert journal.refusal(entry) is None


def crash(journal: Journal, entry: Entry, group: int, after: float):
    """The group ends by itself, ``after`` seconds after it was sent the request, which it did not begin to run."""
    if entry.attempt is None:
        journal.begin_attempt(entry, group, 1, now=100.0)
    sent_at = entry.attempt.sent_at
    journal.fence(entry.attempt.group, entry.attempt.epoch, crashed_at=sent_at + after)
    return journal.refusal(entry)


def test_a_request_that_ends_whatever_receives_it_is_poison_too_one_death_later(journal):
    entry = running(journal)
    assert crash(journal, entry, 0, 0.1) is None
    assert crash(journal, entry, 1, 0.1) is None
    refusal = crash(journal, entry, 0, 0.1)
    assert refusal.kind == "poison" and "request a" in refusal.message and "0, 1, 0" in refusal.message


@pytest.mark.parametrize("after", [0.0001, 60.0])
def test_deaths_at_once_or_long_after_arrival_are_not_held_against_what_waits(journal, after):
    entry = running(journal)
    assert [crash(journal, entry, group, after) for group in range(ARGS.max_redirects)] == [None] * ARGS.max_redirects


def test_what_some_group_began_to_run_is_not_suspected_by_its_arrival(journal):
    entry = running(journal)
    assert lose(journal, entry, 0) is None
    assert [crash(journal, entry, group, 0.1) for group in (1, 0)] == [None, None]


def test_progress_clears_the_suspicion_and_an_empty_delivery_does_not(journal):
    entry = running(journal)
    lose(journal, entry, 0)
    journal.begin_attempt(entry, 1, 1)
    journal.deliver(entry, [5])
    assert lose(journal, entry, 1) is None
    journal.begin_attempt(entry, 2, 1)
    journal.deliver(entry, [])
    assert lose(journal, entry, 2).kind == "poison"


def test_planned_fences_are_no_deaths_but_count_as_moves(journal):
    entry = running(journal)
    for group in range(ARGS.max_redirects):
        assert lose(journal, entry, group, planned=True) is None
    refusal = lose(journal, entry, 9, planned=True)
    assert refusal.kind == "redirect_limit" and "request a" in refusal.message


def test_what_cannot_be_continued_is_refused_only_after_a_token(journal):
    entry = running(journal, not_continuable="it is special")
    assert lose(journal, entry, 0) is None
    journal.begin_attempt(entry, 1, 1)
    journal.deliver(entry, [1])
    refusal = lose(journal, entry, 1)
    assert refusal.kind == "not_continuable" and "it is special" in refusal.message and "request a" in refusal.message


def test_other_weights_refuse_a_started_request_only(journal):
    entry = running(journal)
    journal.weights += "'"
    assert lose(journal, entry, 0, planned=True) is None
    journal.begin_attempt(entry, 1, 1)
    journal.deliver(entry, [1])
    assert lose(journal, entry, 1, planned=True) is None
    journal.begin_attempt(entry, 2, 1)
    journal.weights += "'"
    assert lose(journal, entry, 2, planned=True).kind == "weights"


def test_weights_that_change_while_it_waits_refuse_it_too(journal):
    entry = running(journal)
    journal.deliver(entry, [1])
    assert lose(journal, entry, 0) is None
    journal.weights += "'"
    assert journal.refusal(entry).kind == "weights"


RIDS = [f"r{i}" for i in range(5)]
GROUPS = [0, 1, 2]


class Model:
    def __init__(self) -> None:
        self.delivered: list[int] = []
        self.place: tuple[int, int] | None = None
        self.wire: str | None = None
        self.redirects = 0
        self.deaths = 0
        self.continuable = True
        self.weights = ""


class JournalMachine(RuleBasedStateMachine):
    """Any order of open, begin, accept, deliver, fence, close and weight updates, beside a model."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal(ARGS, "inc")
        self.model: dict[str, Model] = {}
        self.retired: set[str] = set()
        self.epochs = dict.fromkeys(GROUPS, 1)
        self.tokens = 0
        self.weights = 0

    @rule(rid=st.sampled_from(RIDS), continuable=st.booleans(), prompt=st.integers(0, 50))
    def open(self, rid, continuable, prompt):
        if rid in self.model:
            with pytest.raises(AssertionError):
                self.journal.open(rid, prompt, 10)
            return
        self.journal.open(rid, prompt, 10, None if continuable else "why")
        self.model[rid] = Model()
        self.model[rid].continuable = continuable

    @precondition(lambda self: self.model)
    @rule(data=st.data(), group=st.sampled_from(GROUPS))
    def begin(self, data, group):
        rid = data.draw(st.sampled_from(sorted(self.model)))
        entry, model = self.journal.get(rid), self.model[rid]
        if model.place is not None:
            with pytest.raises(AssertionError):
                self.journal.begin_attempt(entry, group, self.epochs[group])
            return
        has = data.draw(st.sampled_from(sorted({self.journal.weights, self.journal.other_weights} - {None})))
        if model.delivered and model.weights != has:
            with pytest.raises(AssertionError):
                self.journal.begin_attempt(entry, group, self.epochs[group], weights=has)
            return
        attempt = self.journal.begin_attempt(entry, group, self.epochs[group], weights=has)
        assert attempt.wire_rid not in self.retired
        assert attempt.wire_rid not in {other.wire for other in self.model.values()}
        model.place, model.wire = (group, self.epochs[group]), attempt.wire_rid
        model.weights = has

    @precondition(lambda self: any(model.place for model in self.model.values()))
    @rule(data=st.data(), count=st.integers(0, 3))
    def deliver(self, data, count):
        rid = data.draw(st.sampled_from(sorted(rid for rid, model in self.model.items() if model.place)))
        model = self.model[rid]
        entry = self.journal.accept(model.wire, *model.place)
        assert entry is self.journal.get(rid)
        tokens = list(range(self.tokens, self.tokens + count))
        self.tokens += count
        self.journal.deliver(entry, tokens)
        model.delivered += tokens
        model.deaths = 0 if tokens else model.deaths

    @rule(data=st.data(), group=st.sampled_from(GROUPS), epoch=st.integers(0, 8))
    def accept_anything(self, data, group, epoch):
        wires = sorted(self.retired | {model.wire for model in self.model.values() if model.wire} | {"", *RIDS})
        wire = data.draw(st.sampled_from(wires))
        entry = self.journal.accept(wire, group, epoch)
        expected = [rid for rid, model in self.model.items() if model.wire == wire and model.place == (group, epoch)]
        assert [entry.rid] == expected if entry is not None else not expected

    @rule(group=st.sampled_from(GROUPS), planned=st.booleans())
    def fence(self, group, planned):
        place = (group, self.epochs[group])
        self.epochs[group] += 1
        lost = {rid for rid, model in self.model.items() if model.place == place}
        for rid in lost:
            self.journal.get(rid).started = True
        entries = self.journal.fence(*place, planned)
        assert {entry.rid for entry in entries} == lost
        lengths = [entry.context_tokens for entry in entries]
        assert lengths == sorted(lengths, reverse=True)
        for entry in entries:
            model = self.model[entry.rid]
            self.retired.add(model.wire)
            model.place = model.wire = None
            model.redirects += 1
            model.deaths += not planned

    @rule(rid=st.sampled_from(RIDS))
    def close(self, rid):
        entry = self.journal.close(rid)
        model = self.model.pop(rid, None)
        assert (entry is None) == (model is None)
        if model is not None and model.wire is not None:
            self.retired.add(model.wire)

    @rule()
    def update_weights(self):
        self.weights += 1
        self.journal.weights, self.journal.other_weights = str(self.weights), None

    @rule()
    def update_weights_group_by_group(self):
        self.weights += 1
        self.journal.weights, self.journal.other_weights = str(self.weights), self.journal.weights

    @rule()
    def all_groups_are_updated(self):
        self.journal.other_weights = None

    @invariant()
    def agrees(self):
        self.journal.check()
        assert len(self.journal) == len(self.model)
        for rid, model in self.model.items():
            entry = self.journal.get(rid)
            assert entry.delivered.tolist() == model.delivered
            place = None if entry.attempt is None else (entry.attempt.group, entry.attempt.epoch)
            assert place == model.place
            assert (entry.resume_state() is None) == (not model.delivered)
            refusal = self.journal.refusal(entry)
            kinds = {
                "poison": model.deaths >= ARGS.poison_deaths,
                "redirect_limit": model.redirects > ARGS.max_redirects,
                "not_continuable": bool(model.delivered) and not model.continuable,
                "weights": bool(model.delivered)
                and model.weights not in (self.journal.weights, self.journal.other_weights),
            }
            if refusal is None:
                assert not any(kinds.values())
            else:
                assert kinds[refusal.kind] and rid in refusal.message
        for wire in self.retired:
            for group, epoch in self.epochs.items():
                assert self.journal.accept(wire, group, epoch) is None
                assert self.journal.accept(wire, group, epoch - 1) is None


JournalMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestJournalModel = JournalMachine.TestCase
