"""Which state each group was in, and since when: what the timeline of the page shows. Pure: time is passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

#: seconds that are kept
WINDOW = 900.0
#: changes of one group that are kept: one that flaps has a shorter past, not more memory
CHANGES = 256
#: of a group that is not there any more
GONE = "gone"


class Change(NamedTuple):
    at: float
    state: str
    epoch: int


class Timeline:
    """``now``: monotonic seconds."""

    def __init__(self) -> None:
        self._changes: dict[int, deque[Change]] = {}

    def observe(self, now: float, groups: Iterable[tuple[int, str, int]]) -> None:
        """All groups that there are: id, state, epoch. Only what is news is kept."""
        seen = set()
        for group, state, epoch in groups:
            seen.add(group)
            changes = self._changes.get(group)
            if changes is None:
                changes = self._changes[group] = deque(maxlen=CHANGES)
            if not changes or (changes[-1].state, changes[-1].epoch) != (state, epoch):
                changes.append(Change(now, state, epoch))
        for group, changes in list(self._changes.items()):
            if group not in seen and changes[-1].state != GONE:
                changes.append(Change(now, GONE, changes[-1].epoch))
            # The last one before the window says how the window begins.
            while len(changes) > 1 and changes[1].at < now - WINDOW:
                changes.popleft()
            if changes[-1].state == GONE and changes[-1].at < now - WINDOW:
                del self._changes[group]

    def changes(self) -> list[dict[str, Any]]:
        return [
            {"group": group, "changes": [[round(c.at, 3), c.state, c.epoch] for c in changes]}
            for group, changes in sorted(self._changes.items())
        ]
