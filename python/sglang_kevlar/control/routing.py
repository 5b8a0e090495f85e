"""Which group gets a request: the one that has its prefix cached, unless it is full or much busier than another.

The router remembers which blocks of prompt tokens it sent where. That is a guess at the groups' radix trees, good
enough to choose by and bounded; the trees themselves stay the judges of what is a hit.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

#: prompt tokens per remembered block
BLOCK = 64
#: blocks remembered per group, oldest forgotten first
BLOCKS_PER_GROUP = 32_768
#: a cached prefix is followed only while its group is at most this much busier than the least busy one,
#: in requests and as a factor (the thresholds of SGLang's own cache-aware router, for as many groups as a host has)
IMBALANCE_REQUESTS = 16
IMBALANCE_FACTOR = 1.5


@dataclass
class GroupLoad:
    """What is in flight on one group, counted by the frontend itself: it is never stale."""

    epoch: int
    #: KV tokens the group can hold (upstream's max_total_num_tokens)
    capacity_tokens: int
    #: name of the weights that it serves
    weights: str = ""
    requests: int = 0
    tokens: int = 0
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def fits(self, tokens: int) -> bool:
        """Whether it can hold ``tokens`` more without evicting what it is running."""
        return self.tokens + tokens <= self.capacity_tokens

    def remember(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block in self.blocks:
                self.blocks.move_to_end(block)
            else:
                self.blocks[block] = None
        while len(self.blocks) > BLOCKS_PER_GROUP:
            self.blocks.popitem(last=False)


class Router:
    """Chooses among the groups that serve. Groups are added when ready and removed when lost or drained."""

    def __init__(self) -> None:
        self.groups: dict[int, GroupLoad] = {}

    def add(self, group: int, epoch: int, capacity_tokens: int, weights: str = "") -> None:
        assert group not in self.groups, f"group {group} already serves"
        self.groups[group] = GroupLoad(epoch, capacity_tokens, weights)

    def remove(self, group: int, heir: int | None = None) -> None:
        """``heir``: the group that has the shadow of its cache, where its prefixes are to be looked for now."""
        gone = self.groups.pop(group, None)
        inherits = None if gone is None or heir is None else self.having(gone.weights).get(heir)
        if gone is not None and inherits is not None:
            inherits.remember(gone.blocks)

    def having(self, weights: str) -> dict[int, GroupLoad]:
        """Those that serve ``weights``: all, but for the time of a `control.rolling` update."""
        return {group: load for group, load in self.groups.items() if load.weights == weights}

    def choose(self, blocks: Sequence[int], tokens: int = 0, spread: bool = False, weights: str = "") -> int | None:
        """The group for a prompt of these blocks (`block_hashes`), or None when none serves ``weights``.

        ``tokens``: what it may take of a group's KV pool. Where that is not free it would wait, or push out others.
        ``spread`` ignores prefixes: redirected requests go to whoever is least busy, so that a lost group's
        requests land on all survivors and not on one.
        """
        groups = self.having(weights)
        if not groups:
            return None
        least = min(groups, key=lambda group: self._busy(group))
        if spread or len(groups) == 1:
            return least
        best, matched = least, 0
        for group, load in groups.items():
            hits = 0
            for block in blocks:
                if block not in load.blocks:
                    break
                hits += 1
            if hits > matched:
                best, matched = group, hits
        if best != least and (self._much_busier(best, least) or self._only_fits(least, best, tokens)):
            return least
        return best

    def started(self, group: int, tokens: int, blocks: Sequence[int]) -> None:
        load = self.groups[group]
        load.requests += 1
        load.tokens += tokens
        load.remember(blocks)

    def finished(self, group: int, epoch: int, tokens: int) -> None:
        """The counterpart of `started`; of a group that is gone, or came back as another epoch, nothing is left."""
        load = self.groups.get(group)
        if load is None or load.epoch != epoch:
            return
        load.requests -= 1
        load.tokens -= tokens
        assert load.requests >= 0 and load.tokens >= 0, f"load of group {group} below zero"

    def set_weights(self, group: int, weights: str) -> None:
        """With other weights its cache is another, or flushed."""
        load = self.groups.get(group)
        if load is not None:
            load.weights = weights
            load.blocks.clear()

    def has_room(self, tokens: int, weights: str = "") -> bool:
        """Whether a group with ``weights`` can hold ``tokens`` more without evicting what it is running; an idle one
        takes any, or what is larger than all would wait for ever."""
        return any(load.requests == 0 or load.fits(tokens) for load in self.having(weights).values())

    def _busy(self, group: int) -> tuple[int, int, int]:
        load = self.groups[group]
        return (load.tokens, load.requests, group)

    def _only_fits(self, group: int, other: int, tokens: int) -> bool:
        return self.groups[group].fits(tokens) and not self.groups[other].fits(tokens)

    def _much_busier(self, group: int, least: int) -> bool:
        busy, idle = self.groups[group].requests, self.groups[least].requests
        return busy - idle > IMBALANCE_REQUESTS and busy > IMBALANCE_FACTOR * idle


def block_hashes(prompt: array[int] | list[int], namespace: str = "") -> array[int]:
    """One hash per full block, each covering everything before it.

    ``namespace`` keeps apart what the radix trees keep apart (LoRA, extra_key, cache_salt).
    """
    tokens = prompt if isinstance(prompt, array) else array("q", prompt)
    hashes = array("q")
    value = hash(namespace)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        value = hash((value, tokens[start : start + BLOCK].tobytes()))
        hashes.append(value)
    return hashes
