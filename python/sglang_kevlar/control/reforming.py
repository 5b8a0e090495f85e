"""Which processes of a worker group outlive its epoch, and who takes whose place in the next. Pure.

An epoch ends for all of a group at once. Where one of its ranks died, the others may *leave*: they end their schedulers
and wait, and the next epoch is made of them and of a new process for each that is missing, from the spares if there is
one. That this works is an assumption about processes that just went through a failure. So it is tried only after an
epoch that served, a rank that does not leave in time is killed, and when an epoch that was *re-formed* does not become
ready in time, the next is made of new processes alone. Twice in a row by itself, and there are no more re-forms.
That weights can be loaded before the scheduler that uses them is another assumption: until a group was ready that way,
a start that fails by itself is repeated without, and when that succeeds, it stays so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

#: seconds in which a rank may leave; it takes some ten milliseconds when nothing blocks it
LEAVE_WITHIN = 2.0
#: seconds between two requests to leave: one may come where nobody hears it
ASK_AGAIN = 0.2
#: seconds for the death of another to show, when a rank leaves unasked because its loop failed
DEATH_SHOWS_WITHIN = 0.1
#: a re-formed epoch may take so many times as long to become ready as one of new processes, and so many seconds
_PATIENCE = 3.0
_LEAST_PATIENCE = 10.0
#: failed re-forms in a row after which no more are tried
_STRIKES = 2


class Reforming:
    def __init__(self, allowed: bool, spares: Iterable[str], start_timeout: float) -> None:
        """``spares``: the seats that one is kept for. ``start_timeout``: seconds for an epoch of new processes."""
        self._allowed = allowed
        self._wanted = tuple(spares) if allowed else ()
        self._start_timeout = start_timeout
        self._strikes = 0
        #: a group was ready whose ranks had loaded their weights first; or only one was whose ranks had not
        self._proved = self._refuted = False
        #: the last start failed, and loading first may be why: the next is without
        self.suspect = False
        #: seconds that the last epoch of new processes took to become ready
        self._took: float | None = None
        self._began = 0.0
        #: whether the epoch of now, or the last one, was re-formed
        self.reformed = False

    @property
    def given_up(self) -> bool:
        return self._strikes >= _STRIKES or self._refuted

    @property
    def loads_in_place(self) -> bool:
        """Whether a new rank is to load its weights as upstream does, though it could be of several epochs."""
        return self._allowed and (self.given_up or self.suspect)

    def survivors(self, served: bool, planned: bool, alive: Collection[str]) -> frozenset[str]:
        """Who is asked to leave, of an epoch that ends now; the others are killed.

        ``served``: it was ready. ``planned``: the operator wants new processes. ``alive``: ranks that can leave.
        """
        if not self._allowed or self.given_up or not served or planned:
            return frozenset()
        return frozenset(alive)

    def at_once(self, served: bool, survivors: Collection[str], spares: Collection[str]) -> bool:
        """Whether the next epoch begins without the wait before new processes: who it is made of is there already."""
        return bool(survivors) or (served and bool(spares) and not self.given_up)

    def form(self, there: Collection[str], now: float) -> None:
        """An epoch begins; ``there``: seats whose rank left the last one for this, or was a spare."""
        self.reformed = bool(there)
        self._began = now

    def missing_spares(self, spares: Collection[str]) -> list[str]:
        """Seats for which one is to be started, while the group serves."""
        return [] if self.given_up else [seat for seat in self._wanted if seat not in spares]

    def deadline(self) -> float:
        """When the epoch that began last has to be ready."""
        if not self.reformed or self._took is None:
            return self._began + self._start_timeout
        return self._began + min(self._start_timeout, max(_LEAST_PATIENCE, _PATIENCE * self._took))

    def succeeded(self, now: float) -> None:
        """The epoch is ready."""
        if self.reformed:
            self._strikes = 0
        else:
            self._took = now - self._began
        if self.suspect:
            self._refuted, self.suspect = True, False
        self._proved = self._proved or not self.loads_in_place

    def failed(self, by_itself: bool) -> None:
        """The epoch ended before it was ready. ``by_itself``: nobody from outside ended it, or a process of it."""
        if self.reformed and by_itself:
            self._strikes += 1
        elif by_itself:
            # When it fails without, too, that was not why.
            self.suspect = self._allowed and not self._proved and not self.loads_in_place
