"""What a block of KV is called: by everything its content depends on.

KV of a token depends on all tokens before it, on the weights, the adapter, and the tenant it may be shared with. The
key of a block is a hash over all of that, so equal keys mean equal KV, a shared prefix has the same keys in every
request, and what belongs to other weights or to another tenant is never found: nothing has to be deleted for that.

Keys form the radix tree: each is made from its parent's, one level a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 16
#: tokens of a block where the pages of the pool are not larger
MIN_BLOCK_TOKENS = 16


def block_tokens(page_size: int) -> int:
    """Tokens a block holds: whole pages, and enough of them that keeping books costs little."""
    return page_size * max(1, -(-MIN_BLOCK_TOKENS // page_size))


def root_key(content: str, extra_key: str | None, cache_salt: str | None) -> bytes:
    """The parent of first blocks. ``content`` names the weights; the other two separate upstream's radix trees."""
    digest = blake2b(digest_size=KEY_BYTES)
    for part in (content, extra_key, cache_salt):
        # An absent part and an empty one are the same upstream.
        data = (part or "").encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def belong(keys: Sequence[bytes], parent: bytes | None, tokens: bytes) -> bool:
    """Whether ``keys`` are those of ``tokens`` (int64, the same number for each), behind ``parent``.

    Of the first block of a sequence, whose parent is None, this cannot be said.
    """
    width = len(tokens) // len(keys)
    for position, key in enumerate(keys):
        own = tokens[position * width : (position + 1) * width]
        if parent is not None and blake2b(parent + own, digest_size=KEY_BYTES).digest() != key:
            return False
        parent = key
    return True


class KeyChain:
    """The keys of one sequence of tokens, as far as they were asked for."""

    __slots__ = ("_block", "keys", "root")

    def __init__(self, root: bytes, block: int) -> None:
        self.root = root
        self.keys: list[bytes] = []
        self._block = block

    def grow(self, tokens: array[int]) -> None:
        """Append the keys of the blocks that follow; ``tokens`` (int64) are theirs alone, whole blocks of them."""
        assert tokens.typecode == "q" and len(tokens) % self._block == 0
        parent = self.keys[-1] if self.keys else self.root
        for start in range(0, len(tokens), self._block):
            digest = blake2b(parent, digest_size=KEY_BYTES)
            digest.update(tokens[start : start + self._block].tobytes())
            parent = digest.digest()
            self.keys.append(parent)

    def parent_of(self, block: int) -> bytes | None:
        return self.keys[block - 1] if block else None
