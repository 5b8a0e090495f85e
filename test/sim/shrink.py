"""From a run that fails to a short one that fails in the same way: fewer steps, and only the events that it takes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: raises, with the world in the error's ``world``: (seed, events that may happen, steps)
Simulate = Callable[[int, frozenset[str] | None, int], Any]


@dataclass
class Failure:
    error: BaseException
    #: where it was noticed
    place: str
    world: Any

    @property
    def happened(self) -> list[str]:
        return list(self.world.faults.happened)


def attempt(simulate: Simulate, seed: int, only: frozenset[str] | None, steps: int) -> Any:
    """A failure, or the world."""
    try:
        return simulate(seed, only, steps)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(error, f"{frame.filename}:{frame.lineno}", getattr(error, "world", None))


def shrink(
    simulate: Simulate, seed: int, first: Failure, steps: int, seconds: float
) -> tuple[Failure, frozenset[str], int]:
    """The failure, what may happen, and the steps, as small as was found in ``seconds``."""
    end = time.monotonic() + seconds

    def fails(events: list[str], limit: int) -> Failure | None:
        failure = attempt(simulate, seed, frozenset(events), limit)
        return failure if isinstance(failure, Failure) and failure.place == first.place else None

    best = first
    steps = min(steps, first.world.faults.step)
    events = first.happened
    share = 2
    while events and share <= 2 * len(events) and time.monotonic() < end:
        size = max(1, len(events) // share)
        for start in range(0, len(events), size):
            rest = events[:start] + events[start + size :]
            if (failure := fails(rest, steps)) is not None:
                # What did not happen any more is not needed either.
                best, events = failure, [name for name in failure.happened if name in rest]
                steps = min(steps, failure.world.faults.step)
                share = max(2, share - 1)
                break
            if time.monotonic() > end:
                break
        else:
            if size == 1:
                break
            share *= 2
    # The last step in which anything happens, and few more: the quiet end of a run is not counted.
    for limit in (int(events[-1].split(":")[0]) if events else 1, steps // 2):
        if limit < steps and (failure := fails(events, limit)) is not None:
            best, steps = failure, limit
    return best, frozenset(events), steps
