"""Names of the events of a kept request, and who may go on behind which.

``RID:OFFSET.K~TAG``: the K-th event made of the output that brought the request to OFFSET tokens, which came to the
frontend TAG. One that goes on with the request makes the same events of what it took over, under the same names, up to
its base, and others behind that, under its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Point:
    """Behind the ``k``-th event at ``offset`` tokens."""

    offset: int
    k: int


#: behind whatever came at its offset
LAST_K = 10**6


@dataclass(frozen=True)
class EventId:
    rid: str
    point: Point
    tag: str


@dataclass(frozen=True)
class Lineage:
    """Through whose hands a request went. ``before``: (tag, tokens up to which that one's events are also ours)."""

    tag: str
    before: tuple[tuple[str, int], ...] = ()

    def taken_up(self, tag: str, base: int) -> Lineage:
        """The lineage of ``tag``, which goes on behind ``base`` tokens of ours."""
        earlier = tuple((old, min(offset, base)) for old, offset in self.before)
        return Lineage(tag, (*earlier, (self.tag, base)))

    def tag_at(self, offset: int) -> str:
        """Whose output it was that brought the request to ``offset`` tokens."""
        return next((tag for tag, base in self.before if offset <= base), self.tag)

    def shares(self, tag: str, point: Point) -> bool:
        """Whether what ``tag`` had sent when it was at ``point`` is the beginning of what we have or will make."""
        return tag == self.tag or any(tag == old and point.offset <= base for old, base in self.before)
