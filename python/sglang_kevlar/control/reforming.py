"""Which processes of a worker group outlive its epoch, and who takes whose place in the next. Pure.

An epoch ends for all of a group at once. Where one of its ranks died, the others may *leave*: they end their schedulers
and wait, and the next epoch is made of them and of a new process for each that is missing, from the spares if there is
one. That this works is an assumption about processes that just went through a failure. So it is tried only after an
epoch that served, a rank that does not leave in time is killed, and when an epoch that was *re-formed* does not become
ready in time, the next is made of new processes alone. Twice in a row by itself, and there are no re-forms for a time.
That weights can be loaded before the scheduler that uses them is another assumption: a start that fails by itself,
until one was ready that way, or twice in a row, is repeated without, and when that succeeds, it stays so for a time.

Neither is given up for good: a supervisor lives for months, and what failed may have been the machine's bad hour. How
long is `control.breaker`'s to say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sglang_kevlar.control.breaker import Breaker

#: seconds in which a rank may leave; it takes some ten milliseconds when nothing blocks it
LEAVE_WITHIN = 2.0
#: the same on a device, where graphs and what NCCL has are given up first: a second was seen, on a busy one
LEAVE_WITHIN_ON_DEVICE = 10.0
#: seconds between two requests to leave: one may come where nobody hears it
ASK_AGAIN = 0.2
#: seconds for the death of another to show, when a rank leaves unasked because its loop failed
DEATH_SHOWS_WITHIN = 0.1
#: a re-formed epoch may take so many times as long to become ready as one of new processes, and so many seconds
_PATIENCE = 3.0
_LEAST_PATIENCE = 10.0
#: for how long an epoch has to have served to be no repetition, and a re-form to have worked
HEALTHY_AFTER = 5.0
#: failed re-forms in a row after which none is tried for a time, and starts that failed because weights came first;
#: and the shortest and the longest such time. At worst a re-form costs thrice a start, once a day
_STRIKES, _LOAD_STRIKES = 2, 1
_REST = (300.0, 86400.0)


class Reforming:
    def __init__(self, allowed: bool, spares: Iterable[str], start_timeout: float) -> None:
        """``spares``: the seats that one is kept for. ``start_timeout``: seconds for an epoch of new processes."""
        self._allowed = allowed
        self._wanted = tuple(spares) if allowed else ()
        self._start_timeout = start_timeout
        self._trust = Breaker(_STRIKES, *_REST)
        #: the same of loading weights first; and whether a group was ready that way, and no start failed since
        self._loading = Breaker(_LOAD_STRIKES, *_REST)
        self._proved = False
        #: the last start failed, and loading first may be why: the next is without
        self.suspect = False
        #: seconds that the last epoch of new processes took to become ready
        self._took: float | None = None
        self._began = 0.0
        #: of the epoch of now, or the last one: it was re-formed; and its new ranks load their weights as upstream
        #: does, though they could be of several epochs
        self.reformed = self.loads_in_place = False

    @property
    def loads_first_again(self) -> bool:
        """Whether the epoch that has begun shows if weights can be loaded first, though that failed the last time."""
        return not self.loads_in_place and self._loading.failures > 0

    @property
    def rests_until(self) -> float:
        """Nobody outlives an epoch before, and no spare is kept."""
        return self._trust.open_until

    def survivors(self, served: bool, planned: bool, alive: Collection[str], now: float) -> frozenset[str]:
        """Who is asked to leave, of an epoch that has ended; the others are killed.

        ``served``: it was ready. ``planned``: the operator wants new processes. ``alive``: ranks that can leave.
        """
        if not self._allowed or self.loads_in_place or self._trust.is_open(now) or not served or planned:
            return frozenset()
        return frozenset(alive)

    def keeps_spares(self, served: bool, now: float) -> bool:
        """Whether those of an epoch that has ended may be of the next; they are as suspect as what failed."""
        return served and not self._trust.is_open(now)

    def form(self, there: Collection[str], now: float) -> None:
        """An epoch begins; ``there``: seats whose rank left the last one for this, or was a spare."""
        self.reformed = bool(there)
        self.loads_in_place = self._allowed and (self.suspect or self._loading.is_open(now))
        self._began = now

    def missing_spares(self, spares: Collection[str]) -> list[str]:
        """Seats for which one is to be started, while the group serves."""
        return [seat for seat in self._wanted if seat not in spares] if self._proved else []

    def deadline(self) -> float:
        """When the epoch that began last has to be ready."""
        if not self.reformed or self._took is None:
            return self._began + self._start_timeout
        return self._began + min(self._start_timeout, max(_LEAST_PATIENCE, _PATIENCE * self._took))

    def succeeded(self, now: float) -> None:
        """The epoch is ready."""
        if not self.reformed:
            self._took = now - self._began
        if self.suspect:
            self._loading.failed(now)
            self.suspect = False
        elif self._allowed and not self.loads_in_place:
            self._loading.worked()
            self._proved = True

    def ended(self, served_for: float | None, by_itself: bool, now: float) -> None:
        """The epoch is over. ``served_for``: seconds; None: it was never ready.

        ``by_itself``: nobody from outside ended it, or a process of it.
        """
        if self.reformed:
            if served_for is not None and served_for >= HEALTHY_AFTER:
                self._trust.worked()
            elif by_itself:
                self._trust.failed(now)
        elif served_for is None and by_itself:
            # What worked is blamed only the second time; and when it fails without, too, that was not why.
            first = self._allowed and not self.loads_in_place
            self.suspect, self._proved = first and not self._proved, self._proved and not first

    def forget(self, now: float) -> bool:
        """What failed before may have been put right. Whether something was set aside for it."""
        aside = self._trust.is_open(now) or self._loading.is_open(now)
        self._trust.worked()
        self._loading.worked()
        self.suspect = False
        return aside

    def set_aside(self, now: float) -> list[str]:
        """What is not done for now, until when and why; for the log, as is `tried_again`."""
        texts = []
        if self._trust.is_open(now):
            seconds = self._trust.open_until - now
            texts.append(f"no re-forms for {seconds:.0f} s, because {_in_a_row(self._trust)}")
        if self._loading.is_open(now):
            seconds, why = self._loading.open_until - now, _in_a_row(self._loading)
            texts.append(
                f"for {seconds:.0f} s weights are not loaded first, and no rank outlives an epoch, because {why}"
            )
        return texts

    def tried_again(self) -> str:
        """What the epoch that has begun does though it failed the last time."""
        if self.reformed and self._trust.failures:
            return f"a re-form is tried again, after {_in_a_row(self._trust)}"
        if self.loads_first_again:
            return f"weights are loaded first again, after {_in_a_row(self._loading)}"
        return ""


def _in_a_row(breaker: Breaker) -> str:
    return "1 failed" if breaker.failures == 1 else f"{breaker.failures} in a row failed"
