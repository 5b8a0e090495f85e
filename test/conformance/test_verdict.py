"""Every way an answer can end, and the verdict on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from client import Answer, Choice
from verdict import Verdict, first_difference, judge


def whole(**changes: Any) -> Answer:
    """A complete answer of two sequences."""
    choices = [
        Choice("abcdef", [1, 2, 3], "length", {"reasoning": "hm"}, {"output": [[-0.5, 1]]}, [4, 3]),
        Choice("ghi", [4, 5], {"type": "stop", "matched": "x"}, {}, {}, [4, 2]),
    ]
    return Answer(**{"status": 200, "choices": choices, "usage": [8, 5], "done": True, **changes})


def with_choice(index: int = 0, **changes: Any) -> Answer:
    answer = whole()
    for name, value in changes.items():
        setattr(answer.choices[index], name, value)
    return answer


def cut(**changes: Any) -> Answer:
    """Its end is missing: a part of the text, the finish reasons and the end marker."""
    choices = [Choice("abc", [1], parts={"reasoning": "hm"}), Choice("g", [4])]
    return whole(**{"choices": choices, "usage": None, "done": False, **changes})


ABORT = {"type": "abort", "message": "gave up"}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "disturbed, verdict, words",
    [
        (cut(broken="ReadError"), Verdict.CUT, "6 characters: ReadError"),
        (cut(), Verdict.CUT, "without its end marker"),
        (Answer(broken="ConnectError"), Verdict.CUT, "nothing: ConnectError"),
        (cut(hung=True, broken="ReadTimeout"), Verdict.HUNG, "silent"),
        (whole(done=False, hung=True), Verdict.HUNG, "silent"),
        (Answer(status=503, error="try again"), Verdict.REFUSED, "after nothing: try again"),
        (cut(error="cannot go on"), Verdict.REFUSED, "cannot go on"),
        (cut(error="cannot go on", broken="ReadError"), Verdict.REFUSED, "cannot go on"),
        (cut(error="lost", done=True), Verdict.SILENT, "end marker"),
        (with_choice(finish=ABORT), Verdict.SILENT, "gave up"),
        (with_choice(finish="abort"), Verdict.SILENT, "abort"),
        (whole(retracted="text: 'a' became 'b'"), Verdict.DIFFERENT, "taken back"),
        (whole(after_end="data: more"), Verdict.DIFFERENT, "after the end"),
    ],
)
def test_ends_that_need_no_comparison(disturbed: Answer, verdict: Verdict, words: str, exact: bool) -> None:
    judgement = judge(whole(), disturbed, exact)
    assert judgement.verdict == verdict
    assert words in judgement.detail


@pytest.mark.parametrize(
    "disturbed, verdict, words",
    [
        (whole(), Verdict.EXACT, ""),
        (with_choice(logprobs={"output": [[-0.5004, 1]]}), Verdict.EXACT, ""),
        (with_choice(logprobs={"output": [[-0.6, 1]]}), Verdict.DIFFERENT, "log-probs[0]"),
        (with_choice(logprobs={"output": [[-0.5, 1], [-0.5, 1]]}), Verdict.DIFFERENT, "log-probs"),
        (with_choice(logprobs={}), Verdict.DIFFERENT, "log-probs"),
        (with_choice(text="abXdef"), Verdict.DIFFERENT, "text[0], from character 2"),
        (with_choice(text="abcdefg", token_ids=[1, 2, 3, 3]), Verdict.DIFFERENT, "token ids[0]: 4 entries, not 3"),
        (with_choice(text="abcabcdef"), Verdict.DIFFERENT, "text[0]"),
        (with_choice(parts={"reasoning": "no"}), Verdict.DIFFERENT, "parts"),
        (with_choice(finish="stop"), Verdict.DIFFERENT, "finish reason[0]"),
        (with_choice(1, finish={"type": "stop", "matched": "y"}), Verdict.DIFFERENT, "finish reason[1]"),
        (with_choice(usage=[7, 3]), Verdict.DIFFERENT, "usage"),
        (whole(usage=[8, 6]), Verdict.DIFFERENT, "usage"),
        (whole(usage=None), Verdict.DIFFERENT, "usage"),
        (whole(choices=[*whole().choices, Choice("more")]), Verdict.DIFFERENT, "3 sequences, not 2"),
        (with_choice(text="abc", token_ids=[1, 2]), Verdict.SILENT, "token ids[0]"),
        (whole(choices=whole().choices[:1]), Verdict.SILENT, "1 sequences, not 2"),
        (cut(done=True), Verdict.SILENT, "token ids"),
        (with_choice(text="", parts={"reasoning": "h"}), Verdict.SILENT, "text"),
        # The last 'f' is lost in the middle: not a shortened answer, but another one.
        (with_choice(text="bcdef"), Verdict.DIFFERENT, "text"),
    ],
)
def test_exact(disturbed: Answer, verdict: Verdict, words: str) -> None:
    judgement = judge(whole(), disturbed, exact=True)
    assert judgement.verdict == verdict
    assert words in judgement.detail


@pytest.mark.parametrize(
    "disturbed, verdict, words",
    [
        (with_choice(text="other", token_ids=[9, 9, 9], parts={}, logprobs={}), Verdict.KEPT, ""),
        (with_choice(usage=[4, 2]), Verdict.SILENT, "tokens: [2, 2], not [3, 2]"),
        (with_choice(usage=[4, 4]), Verdict.DIFFERENT, "tokens: [4, 2], not [3, 2]"),
        (with_choice(finish="stop"), Verdict.DIFFERENT, "finish"),
        (whole(choices=whole().choices[:1]), Verdict.DIFFERENT, "1 sequences"),
    ],
)
def test_not_exact(disturbed: Answer, verdict: Verdict, words: str) -> None:
    judgement = judge(whole(), disturbed, exact=False)
    assert judgement.verdict == verdict
    assert words in judgement.detail


def test_tokens_come_from_the_usage_of_the_request_where_sequences_have_none() -> None:
    mine, theirs = (Answer(200, [Choice("abc", finish="length")], [4, tokens], True) for tokens in (9, 8))
    assert judge(mine, copy.deepcopy(mine), exact=False).verdict == Verdict.KEPT
    assert judge(mine, theirs, exact=False).verdict == Verdict.SILENT


@pytest.mark.parametrize(
    "undisturbed",
    [
        Answer(404, error="no such route"),
        Answer(broken="ConnectError"),
        cut(),
        Answer(200, done=True),
        with_choice(finish=ABORT),
        whole(retracted="text"),
    ],
)
def test_nothing_is_judged_without_an_undisturbed_answer(undisturbed: Answer) -> None:
    assert judge(undisturbed, whole(), exact=True).verdict == Verdict.UNSUPPORTED


def test_times_and_events_are_no_difference() -> None:
    assert first_difference(whole(), whole(events=9, started=1.0, first_event=2.0, ended=3.0)) is None
