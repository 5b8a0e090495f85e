"""Which group keeps the shadow of which."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a group is, as far as shadows are concerned."""

    name: str
    #: label of its host: what may be lost together has the same
    host: str = ""
    #: of the frontend's own launch: its ranks and those of others of it reach each other through files
    local: bool = True
    standby: bool = False
    #: of its software: KV does not go from one to another
    version: str = ""
    #: by rank: where all others reach its stores; empty: nowhere
    endpoints: tuple[str, ...] = ()


def partners(up: Mapping[int, Place], draining: Collection[int], before: Mapping[int, int]) -> dict[int, int]:
    """Target by source, over the groups that are ``up``. ``before``: what was the plan until now.

    A group that drains is about to go, and is chosen only when there is nobody else. Of the rest, those on another host
    come first: what ends a host must not end KV and its shadow. Among them, standbys: they have room to spare. Who is
    left is as good as any other, and they share the load evenly, with as few links moved as that takes.
    """
    choices = {source: _choices(source, up, draining) for source in sorted(up)}
    targets = {source: before[source] for source in choices if before.get(source) in choices[source]}
    kept = _kept(up, targets)
    for source, possible in choices.items():
        if possible and source not in targets:
            # Of those that keep the least, the next one around the ring.
            targets[source] = min(possible, key=lambda target: (kept[target], target < source, target))
            kept[targets[source]] += 1
    while moves := _relief(targets, choices, kept):
        for source, target in moves:
            kept[targets[source]] -= 1
            kept[target] += 1
            targets[source] = target
    return targets


def _choices(source: int, up: Mapping[int, Place], draining: Collection[int]) -> list[int]:
    """The best groups for the shadow of ``source``, one as good as another; none when it reaches nobody."""
    here = up[source]
    ranks: dict[tuple[bool, bool, bool], list[int]] = {}
    for target, there in sorted(up.items()):
        reached = bool(there.endpoints) or (here.local and there.local)
        if target != source and reached and there.version == here.version:
            rank = (target in draining, there.host == here.host, not there.standby)
            ranks.setdefault(rank, []).append(target)
    return ranks[min(ranks)] if ranks else []


def _kept(up: Collection[int], targets: Mapping[int, int]) -> dict[int, int]:
    """How many shadows each group keeps."""
    kept = dict.fromkeys(up, 0)
    for target in targets.values():
        kept[target] += 1
    return kept


def _relief(
    targets: Mapping[int, int], choices: Mapping[int, list[int]], kept: Mapping[int, int]
) -> list[tuple[int, int]]:
    """Moves (source, its new target) after which a group keeps one less, and one that kept two less or fewer has it.

    The fewest for the group that keeps the most. None when no such moves are left: then the load is as even as it gets.
    """
    for full in sorted(kept, key=lambda group: (-kept[group], group)):
        #: by group that could take one more: the move that would bring it there
        reached: dict[int, tuple[int, int]] = {}
        waiting = deque([full])
        while waiting:
            giver = waiting.popleft()
            for source in [source for source, target in targets.items() if target == giver]:
                for target in choices[source]:
                    if target == full or target in reached:
                        continue
                    reached[target] = (source, giver)
                    waiting.append(target)
                    if kept[target] <= kept[full] - 2:
                        return _back(target, full, reached)
    return []


def _back(target: int, full: int, reached: Mapping[int, tuple[int, int]]) -> list[tuple[int, int]]:
    moves = []
    while target != full:
        source, giver = reached[target]
        moves.append((source, target))
        target = giver
    return moves
