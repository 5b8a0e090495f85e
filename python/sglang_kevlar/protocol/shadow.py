"""Messages of a shadow link, rank to rank (msgpack over ZMQ; the bytes of KV go through the window beside it, or in a
second frame behind the `Parcel` that names them: `transport`).

A source's rank is a DEALER, the store of the same rank of the target a ROUTER. One session: `Hello`, answered by
`Accept` or `Refuse`; then `Parcel`, `Ended`, `Forget` and `Still` in one numbered order, answered by `Ack`, or by
`Resync` when something did not arrive as it was sent, or the store was emptied. Every message names its session, so
what is left of an older one is dropped.

The ranks of the target ask each other's stores by `Lookup`, from the same socket type. Where all tensor-parallel ranks
have the same KV (MLA), only the first of each pipeline stage sends and keeps it; the others read it there.
"""

from __future__ import annotations

import msgspec

SHADOW_VERSION = 6


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What makes KV bytes of one rank readable for another: all of it must be equal on both sides."""

    version: int
    upstream: str
    #: resolved path or name of the model, and how its weights were loaded
    model: str
    #: tensor- and pipeline-parallel position and sizes: "tp0/2 pp0/1"
    shard: str
    kv_dtype: str
    page_size: int
    block_tokens: int
    #: bytes of one token in each buffer of the pool, in order
    rows: list[int]

    @property
    def token_bytes(self) -> int:
        return sum(self.rows)

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens


class ShadowTarget(msgspec.Struct, frozen=True):
    """Which incarnation keeps the shadow of a group, and where its ranks are."""

    #: of the group
    name: str
    epoch: int
    #: of the stores of its ranks, in their order; empty where a rank has none
    endpoints: list[str]


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    session: str
    #: of the source. Names of groups are those of a launch: two of them may have a group 0 each
    launch: str
    group: str
    epoch: int
    layout: Layout
    #: how KV will come (`transport.Transport.name`)
    transport: str
    #: descriptor of the source's end of the window (`transport.Outgoing`), and its size in bytes
    window: str
    window_bytes: int


class Parcel(msgspec.Struct, frozen=True, kw_only=True, tag="parcel"):
    """Blocks of one sequence that follow each other; their KV is at ``offset`` of the window, one behind the other."""

    session: str
    sequence: int
    offset: int
    #: key of the block before; None: the first is the first of its sequence
    parent: bytes | None
    keys: list[bytes]
    #: CRC-32 of each block
    crcs: list[int]
    #: int64 each, of all blocks: whoever keeps the KV can put it into a radix tree by itself
    tokens: bytes
    #: their ``extra_key`` (LoRA adapter) and ``cache_salt``
    origin: tuple[str | None, str | None]
    #: the running request this is for; None: of a finished one
    request: bytes | None = None
    #: cryptographic, of each block (`transport.digest`); empty where its transport has no need of them
    digests: list[bytes] = []


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """A running request ended: its blocks are kept no longer than others."""

    session: str
    sequence: int
    request: bytes


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag="forget"):
    """The source's cache was flushed: drop everything that it sent."""

    session: str
    sequence: int


class Still(msgspec.Struct, frozen=True, kw_only=True, tag="still"):
    """Nothing is new. Answered as all the others, so that a source with nothing to send learns if the link is gone."""

    session: str
    sequence: int


class Accept(msgspec.Struct, frozen=True, kw_only=True, tag="accept"):
    """The session is open. ``held``: keys that need not be sent, of earlier sessions and of other sources."""

    session: str
    held: list[bytes]
    #: descriptor of the target's end of the window (`transport.Incoming`)
    window: str


class Refuse(msgspec.Struct, frozen=True, kw_only=True, tag="refuse"):
    session: str
    reason: str


class Ack(msgspec.Struct, frozen=True, kw_only=True, tag="ack"):
    """Everything up to ``sequence`` was taken in; ``gone``: keys that are not held (any more)."""

    session: str
    #: counts the acknowledgements of the session: what one says is gone, the next does not repeat
    number: int
    sequence: int
    gone: list[bytes]


class Resync(msgspec.Struct, frozen=True, kw_only=True, tag="resync"):
    """Something of this session is not as it was sent, or not held any more. The source begins a new one."""

    session: str
    reason: str


class Lookup(msgspec.Struct, frozen=True, kw_only=True, tag="lookup"):
    """How many of ``keys``, blocks that follow each other, are held intact?

    They are pinned under ``ticket`` until the scheduler has used them.
    """

    ticket: str
    keys: list[bytes]


class Shelf(msgspec.Struct, frozen=True, kw_only=True):
    """Where pinned blocks lie in the memory of the store that holds them, for other ranks on its host."""

    #: file that can be mapped, while the rank lives
    memory: str
    slots: list[int]


class Held(msgspec.Struct, frozen=True, kw_only=True, tag="held"):
    ticket: str
    blocks: int
    #: where tensor-parallel ranks share one store
    shelf: Shelf | None = None


class Release(msgspec.Struct, frozen=True, kw_only=True, tag="release"):
    """Another rank, which reads the blocks of ``ticket`` too, has done so."""

    ticket: str


ToStore = Hello | Parcel | Ended | Forget | Still | Lookup | Release
FromStore = Accept | Refuse | Ack | Resync | Held


class ShadowCounters(msgspec.Struct, kw_only=True):
    """One rank's account of both roles, written to its counters file about twice a second."""

    #: how many ranks it is for: those that have the same KV keep one shadow together
    ranks: int = 1
    #: name and epoch of the group that keeps this rank's shadow, and whether it accepted
    to: tuple[str, int] | None = None
    linked: bool = False
    #: valid KV of running requests that the target has not acknowledged; 0 while there is none
    lag_tokens: int = 0
    #: age of the oldest of them that was copied
    lag_ms: float = 0.0
    token_bytes: int = 0
    sent_tokens: int = 0
    sent_bytes: int = 0
    #: acknowledged by the target, in its store or evicted there since
    shadowed_tokens: int = 0
    #: not sent because the target had them already
    saved_tokens: int = 0
    #: no longer cached here when their turn came
    dropped_tokens: int = 0
    resyncs: int = 0
    #: this rank as a store
    store_tokens: int = 0
    store_capacity_tokens: int = 0
    evicted_tokens: int = 0
    rejected_frames: int = 0
    #: of prefixes that the tree did not have; by the first rank, which asks for all
    lookups: int = 0
    hits: int = 0
    promoted_tokens: int = 0
    #: of those: while their request still ran on its own group
    promoted_ahead_tokens: int = 0
    #: compared with what the model computes, and found to be something else
    audited_blocks: int = 0
    wrong_blocks: int = 0
    #: CPU seconds of the scheduler's thread in shadow code
    scheduler_cpu_s: float = 0.0
