"""A weight update that goes from group to group, while the others serve.

For its time there are two sets of weights. Every request is of one of them from its first token to its last: before the
switch requests begin with the old ones, from then on with the new ones, and never again with the old. Those that
began with the old ones end on groups that have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Take:
    """Empty this group and give it the new weights."""

    group: int
    #: no other group has the old weights: what runs there can only end there
    last: bool


@dataclass(frozen=True)
class Switch:
    """Requests begin with the new weights from now on."""


@dataclass(frozen=True)
class Wait:
    """For a group that starts, or for the last requests of the old weights."""

    why: str


@dataclass(frozen=True)
class Done:
    pass


@dataclass(frozen=True)
class Refuse:
    """No group can get the old weights any more: what began with them cannot go on."""


Step: TypeAlias = Take | Switch | Wait | Refuse | Done


@dataclass
class RollingUpdate:
    """The course of one update. Weights are known by their names (`frontend.replay`)."""

    old: str
    new: str
    #: the old weights can be given to a group that starts
    old_replayable: bool
    #: a group has taken the new weights: they can be loaded
    proven: bool = False
    switched: bool = False

    def __post_init__(self) -> None:
        assert self.old != self.new

    def next(self, serving: Mapping[int, str], old_requests: int) -> Step:
        """``serving``: by group that could take requests, the name of its weights; in the order in which they are best
        taken. ``old_requests``: how many under way began with the old weights. To be asked when no group is taken."""
        old = [group for group, weights in serving.items() if weights == self.old]
        new = [group for group, weights in serving.items() if weights == self.new]
        assert len(old) + len(new) == len(serving), f"a third kind of weights: {dict(serving)}"
        self.proven |= bool(new)
        if not self.switched:
            # At half, so that neither side is left with more than its share of the load for long. With no group left
            # that requests could begin on, at once: they need not wait for one to start.
            if new and len(new) >= len(old):
                return Switch()
            if len(old) > 1:
                return Take(old[0], last=False)
            if old or self.old_replayable:
                return Wait("no other worker group serves")
            return Switch() if self.proven else Wait("no worker group serves")
        if old:
            return Take(old[0], last=len(old) == 1)
        if old_requests and self.old_replayable:
            return Wait(f"{old_requests} requests that began with the old weights wait for a worker group")
        return Refuse() if old_requests else Done()

    def starts_with(self, serving: Mapping[int, str], old_requests: int) -> str:
        """The weights for a group that starts: the old ones while they are needed and nobody who serves has them."""
        needed = not self.switched or old_requests > 0
        served = self.old in serving.values()
        return self.old if self.old_replayable and (not self.proven or (needed and not served)) else self.new
