"""Equal keys mean equal KV, and a shared prefix has the same keys however it came about."""

from __future__ import annotations

import itertools
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.control.shadow_keys import (
    KEY_BYTES,
    MIN_BLOCK_TOKENS,
    KeyChain,
    belong,
    block_tokens,
    root_key,
)

BLOCK = 4
#: few values, so that equal prefixes are common; and the largest, so that none is cut off
tokens = st.lists(st.sampled_from([0, 1, 2, 256, 2**31, 2**40]), max_size=8 * BLOCK).map(
    lambda values: array("q", values[: len(values) // BLOCK * BLOCK])
)
parts = st.sampled_from([None, "", "a", "aa", "b", "é", "\udce9", "a\0"])


def keys_of(sequence: array[int], root: bytes = b"r" * KEY_BYTES, block: int = BLOCK) -> list[bytes]:
    chain = KeyChain(root, block)
    chain.grow(sequence)
    return chain.keys


@given(tokens, tokens)
@settings(max_examples=200, deadline=None)
def test_two_sequences_share_keys_exactly_as_far_as_they_share_tokens(one: array[int], other: array[int]):
    shared = 0
    while one[: (shared + 1) * BLOCK] == other[: (shared + 1) * BLOCK] and (shared + 1) * BLOCK <= min(
        len(one), len(other)
    ):
        shared += 1
    first, second = keys_of(one), keys_of(other)
    assert first[:shared] == second[:shared]
    assert not set(first[shared:]) & set(second)
    # Not even the same tokens at another place are the same KV.
    assert len(set(first)) == len(first) == len(one) // BLOCK


@given(tokens, st.lists(st.integers(0, 8), max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_chain_does_not_depend_on_how_it_grew(sequence: array[int], cuts: list[int]):
    chain = KeyChain(b"r" * KEY_BYTES, BLOCK)
    edges = [0, *sorted(min(cut * BLOCK, len(sequence)) for cut in cuts), len(sequence)]
    for start, end in itertools.pairwise(edges):
        chain.grow(sequence[start:end])
    assert chain.keys == keys_of(sequence)
    assert [chain.parent_of(n) for n in range(len(chain.keys))] == [None, *chain.keys[:-1]][: len(chain.keys)]


@given(st.tuples(parts, parts, parts), st.tuples(parts, parts, parts))
@settings(max_examples=300, deadline=None)
def test_other_weights_or_tenants_share_nothing(one, other):
    def same(root):
        return tuple(part or "" for part in root)

    roots = [root_key(content or "", extra, salt) for content, extra, salt in (one, other)]
    assert (roots[0] == roots[1]) == (same(one) == same(other))
    sequence = array("q", range(2 * BLOCK))
    shared = set(keys_of(sequence, roots[0])) & set(keys_of(sequence, roots[1]))
    assert bool(shared) == (roots[0] == roots[1])


def test_no_key_is_shared_between_block_sizes():
    sequence = array("q", [7] * 64)
    by_size = [set(keys_of(sequence, block=block)) for block in (1, 2, 16, 32, 64)]
    for one, other in itertools.combinations(by_size, 2):
        assert not one & other


def test_blocks_are_whole_pages_and_not_small():
    for page in range(1, 130):
        block = block_tokens(page)
        assert block % page == 0 and MIN_BLOCK_TOKENS <= block < MIN_BLOCK_TOKENS + max(page, MIN_BLOCK_TOKENS)


@pytest.mark.parametrize("bad", [array("q", [1] * (BLOCK + 1)), array("l", [1] * BLOCK), array("i", [1] * BLOCK)])
def test_a_chain_grows_by_whole_blocks_of_int64_only(bad):
    chain = KeyChain(b"", BLOCK)
    with pytest.raises(AssertionError):
        chain.grow(bad)
    assert chain.keys == []


@given(tokens.filter(bool), st.data())
@settings(max_examples=200, deadline=None)
def test_tokens_belong_to_their_keys_and_no_others_do(sequence: array[int], data: st.DataObject):
    root = b"r" * KEY_BYTES
    keys = keys_of(sequence, root)
    start = data.draw(st.integers(0, len(keys) - 1))
    parent = keys[start - 1] if start else root
    own = sequence[start * BLOCK :]
    assert belong(keys[start:], parent, own.tobytes())
    wrong = own[:]
    wrong[data.draw(st.integers(0, len(wrong) - 1))] ^= 1
    assert not belong(keys[start:], parent, wrong.tobytes())
    assert not belong(keys[start:], b"p" * KEY_BYTES, own.tobytes())
    # Of a first block nobody can say; of what follows it they can.
    assert belong(keys[:1], None, wrong[:BLOCK].tobytes())
    changed = keys[:]
    changed[0] = b"x"
    assert belong(changed, None, sequence.tobytes()) == (len(keys) == 1)
