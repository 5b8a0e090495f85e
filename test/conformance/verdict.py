"""What became of a request under which a worker died: its undisturbed answer and its disturbed one to a verdict."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from client import Answer, Choice

LOGPROB_TOLERANCE = 1e-3


class Verdict(enum.StrEnum):
    EXACT = "continued exactly"
    #: what it should have been cannot be told (sampled without a seed): nothing lost, doubled or taken back
    KEPT = "continued"
    DIFFERENT = "continued with another answer"
    REFUSED = "refused clearly"
    CUT = "cut"
    SILENT = "cut but reported as complete"
    HUNG = "hung"
    #: no judgement of a failover:
    UNSUPPORTED = "not served, fault or not"
    NOT_HIT = "not hit by the fault"


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    detail: str = ""


def judge(undisturbed: Answer, disturbed: Answer, exact: bool) -> Judgement:
    """``exact``: the disturbed answer has to equal the undisturbed one; or only its form and length."""
    if (problem := unusable(undisturbed)) is not None:
        return Judgement(Verdict.UNSUPPORTED, problem)
    if disturbed.hung:
        return Judgement(Verdict.HUNG, f"silent after {_amount(disturbed)}")
    if error := disturbed.error or _aborted(disturbed):
        if disturbed.done:
            # Whoever waits for the end of the stream takes what came before for the whole answer.
            return Judgement(Verdict.SILENT, f"after {_amount(disturbed)}: the end marker follows the error {error}")
        return Judgement(Verdict.REFUSED, f"after {_amount(disturbed)}: {error}")
    if disturbed.broken:
        return Judgement(Verdict.CUT, f"after {_amount(disturbed)}: {disturbed.broken}")
    if not disturbed.done:
        return Judgement(Verdict.CUT, f"after {_amount(disturbed)}: the stream ends without its end marker")
    if disturbed.retracted:
        return Judgement(Verdict.DIFFERENT, f"taken back: {disturbed.retracted}")
    if disturbed.after_end:
        return Judgement(Verdict.DIFFERENT, f"after the end: {disturbed.after_end}")
    return _judge_exact(undisturbed, disturbed) if exact else _judge_kept(undisturbed, disturbed)


def unusable(undisturbed: Answer) -> str | None:
    """Why nothing can be compared with this answer, or None."""
    problem = undisturbed.error or _aborted(undisturbed) or undisturbed.broken or undisturbed.retracted
    if problem:
        return problem
    if not undisturbed.done or not undisturbed.choices:
        return "the undisturbed answer is not complete"
    return None


def _aborted(answer: Answer) -> str:
    """SGLang ends a request that it gives up with this finish reason, without an error."""
    for choice in answer.choices:
        if choice.finish == "abort" or (isinstance(choice.finish, dict) and choice.finish.get("type") == "abort"):
            return f"finish reason {choice.finish}"
    return ""


def _judge_exact(undisturbed: Answer, disturbed: Answer) -> Judgement:
    if (difference := first_difference(undisturbed, disturbed)) is None:
        return Judgement(Verdict.EXACT)
    if _is_shortened(undisturbed, disturbed):
        return Judgement(Verdict.SILENT, difference)
    return Judgement(Verdict.DIFFERENT, difference)


def _is_shortened(undisturbed: Answer, disturbed: Answer) -> bool:
    """What is there is right, but some is missing."""
    if len(disturbed.choices) > len(undisturbed.choices):
        return False
    pairs = list(zip(undisturbed.choices, disturbed.choices, strict=False))
    kept = all(_said(mine).startswith(_said(theirs)) for mine, theirs in pairs)
    length = sum(len(_said(choice)) for choice in disturbed.choices)
    return kept and length < sum(len(_said(choice)) for choice in undisturbed.choices)


def _judge_kept(undisturbed: Answer, disturbed: Answer) -> Judgement:
    """For a feature that generates up to its token limit, so that the number of tokens is known."""
    expected, got = _tokens(undisturbed), _tokens(disturbed)
    if len(disturbed.choices) != len(undisturbed.choices):
        return Judgement(Verdict.DIFFERENT, f"{len(disturbed.choices)} sequences, not {len(undisturbed.choices)}")
    if expected != got:
        verdict = Verdict.SILENT if sum(got) < sum(expected) else Verdict.DIFFERENT
        return Judgement(verdict, f"tokens: {got}, not {expected}")
    if finish := _difference([c.finish for c in undisturbed.choices], [c.finish for c in disturbed.choices], "finish"):
        return Judgement(Verdict.DIFFERENT, finish)
    return Judgement(Verdict.KEPT)


def _tokens(answer: Answer) -> list[int]:
    per_choice = [choice.usage[1] for choice in answer.choices if choice.usage]
    return per_choice or (answer.usage or [0, 0])[1:]


# ---- comparing


def first_difference(undisturbed: Answer, disturbed: Answer) -> str | None:
    """None when both are the same answer; log-probs within rounding."""
    if len(undisturbed.choices) != len(disturbed.choices):
        return f"{len(disturbed.choices)} sequences, not {len(undisturbed.choices)}"
    fields: list[tuple[str, Callable[[Choice], Any]]] = [
        ("token ids", lambda choice: choice.token_ids),
        ("text", lambda choice: choice.text),
        ("parts", lambda choice: choice.parts),
        ("finish reason", lambda choice: choice.finish),
        ("usage", lambda choice: choice.usage),
        ("log-probs", lambda choice: choice.logprobs),
    ]
    for name, of in fields:
        mine, theirs = [of(choice) for choice in undisturbed.choices], [of(choice) for choice in disturbed.choices]
        if difference := _difference(mine, theirs, name):
            return difference
    return _difference(undisturbed.usage, disturbed.usage, "usage")


def _difference(expected: Any, got: Any, where: str) -> str | None:
    if isinstance(expected, float) and isinstance(got, float | int):
        return None if abs(expected - got) <= LOGPROB_TOLERANCE else f"{where}: {got}, not {expected}"
    if isinstance(expected, str) and isinstance(got, str) and expected != got:
        at = next(
            (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
        )
        return f"{where}, from character {at}: {got[at : at + 40]!r}, not {expected[at : at + 40]!r}"
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        for i, (a, b) in enumerate(zip(expected, got, strict=False)):
            if difference := _difference(a, b, f"{where}[{i}]"):
                return difference
        return None if len(expected) == len(got) else f"{where}: {len(got)} entries, not {len(expected)}"
    if isinstance(expected, dict) and isinstance(got, dict):
        return _difference(sorted(expected.items()), sorted(got.items()), where)
    return None if expected == got else f"{where}: {got!r}, not {expected!r}"


def _said(choice: Choice) -> str:
    """Everything that one sequence says, parsed parts included."""
    return "".join(choice.parts[name] for name in sorted(choice.parts)) + choice.text


def _amount(answer: Answer) -> str:
    characters = sum(len(_said(choice)) for choice in answer.choices)
    return f"{characters} characters" if characters else "nothing"
