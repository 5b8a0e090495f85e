"""What became of one request: whole and right, or what is wrong with it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

End: TypeAlias = Literal[
    "complete",  # and right, as far as it is compared
    "tie",  # another way from a point at which two tokens are equally likely
    "left",  # by our own doing
    "frontend",  # it broke off with a frontend that we killed
    "refused",  # with an error that says why
    "cut",
    "hung",
    "changed",
    "short",
    "doubled",
]
#: never right, whatever is demanded of the tokens
BROKEN: tuple[End, ...] = ("cut", "hung", "short", "doubled")


class Reference(msgspec.Struct, frozen=True):
    """The answer without faults: its tokens, and at each the two likeliest with the distance between them."""

    output: list[int]
    likeliest: list[tuple[int, int]]
    gaps: list[float]


class Answer(msgspec.Struct, kw_only=True):
    """One request. Times are monotonic seconds, ``stall`` the longest wait between two of its tokens."""

    prompt: int
    asked: int
    started: float
    end: End = "cut"
    #: what the server said, or how it is wrong
    detail: str = ""
    output: list[int] = []
    ended: float = 0.0
    first_token: float | None = None
    stall: float = 0.0
    redirects: int = 0
    streamed: bool = False


def judge(output: list[int], asked: int, reference: Reference | None, tie: float) -> tuple[End, str]:
    """A finished answer. Without a reference only its length is judged."""
    if reference is not None:
        expected = reference.output[:asked]
        fork = next((i for i, (one, other) in enumerate(zip(output, expected, strict=False)) if one != other), None)
        if fork is not None and (problem := _problem_at(fork, output, expected, reference, tie)) is not None:
            return problem
        if fork is not None and len(output) == asked:
            return "tie", f"another way from token {fork} on, a tie of {reference.gaps[fork]:.2g}"
    if len(output) < asked:
        return "short", f"{len(output)} tokens instead of {asked}"
    if len(output) > asked:
        return "doubled", f"{len(output)} tokens instead of {asked}"
    return "complete", ""


def _problem_at(
    fork: int, output: list[int], expected: list[int], reference: Reference, tie: float
) -> tuple[End, str] | None:
    """Of an answer that differs from its reference from ``fork`` on; None at a tie."""
    if output[fork] in reference.likeliest[fork] and reference.gaps[fork] < tie:
        return None
    rest = output[fork:]
    for again in range(1, min(fork, 8) + 1):
        # The same tokens once more, and then on as expected.
        if len(rest) > again and rest == expected[fork - again : fork - again + len(rest)]:
            return "doubled", f"{again} tokens before token {fork} came twice"
    gap = reference.gaps[fork]
    return "changed", f"token {fork} is {output[fork]}, not {expected[fork]} (the likeliest two are {gap:.2g} apart)"
