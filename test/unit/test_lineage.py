"""Who may go on behind what: frontends that take a request over from each other, in any order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kevlar.control.lineage import LAST_K, Lineage, Point


def test_the_first_frontend_names_all_its_events() -> None:
    lineage = Lineage("a")
    assert [lineage.tag_at(offset) for offset in (0, 7, 10**6)] == ["a"] * 3
    assert lineage.shares("a", Point(10**6, LAST_K)) and not lineage.shares("b", Point(0, 0))


def test_what_was_taken_over_keeps_its_names() -> None:
    lineage = Lineage("a").taken_up("b", 10).taken_up("c", 15)
    assert lineage == Lineage("c", (("a", 10), ("b", 15)))
    assert [lineage.tag_at(offset) for offset in (0, 10, 11, 15, 16)] == ["a", "a", "b", "b", "c"]


@pytest.mark.parametrize(
    ("tag", "offset", "may"),
    [
        ("a", 10, True),
        ("a", 11, False),  # a had sent more than b knew
        ("b", 15, True),
        ("b", 16, False),
        ("c", 99, True),
        ("d", 0, False),
    ],
)
def test_a_client_is_continued_behind_what_both_have(tag: str, offset: int, may: bool) -> None:
    assert Lineage("a").taken_up("b", 10).taken_up("c", 15).shares(tag, Point(offset, LAST_K)) is may


def test_who_knew_less_than_its_predecessors_shares_less() -> None:
    """b had 10 tokens of a, and c has only 6 of what b had: all of them a's."""
    lineage = Lineage("a").taken_up("b", 10).taken_up("c", 6)
    assert [lineage.tag_at(offset) for offset in (6, 7)] == ["a", "c"]
    assert lineage.shares("a", Point(6, LAST_K)) and not lineage.shares("a", Point(7, 0))
    assert not lineage.shares("b", Point(7, 0))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6))
def test_shares_is_what_the_tokens_say(hands: list[tuple[int, int]]) -> None:
    """Each frontend makes tokens of its own behind what it took over: (how many it takes over, how many it adds)."""
    lineage, tokens = Lineage("t0"), ["t0"] * 5
    had = {"t0": list(tokens)}
    for number, (base, more) in enumerate(hands, 1):
        tag, base = f"t{number}", min(base, len(tokens))
        lineage = lineage.taken_up(tag, base)
        tokens = tokens[:base] + [tag] * more
        had[tag] = list(tokens)
    for offset, owner in enumerate(tokens, 1):
        assert lineage.tag_at(offset) == owner
    for tag, theirs in had.items():
        for offset in range(len(theirs) + 1):
            shares = lineage.shares(tag, Point(offset, 0))
            # Never behind anything else; what it need not know is that tokens which it did not take over are its own.
            assert not shares or theirs[:offset] == tokens[:offset]
            if theirs[:offset] and theirs[offset - 1] == tag and theirs[:offset] == tokens[:offset]:
                assert shares
