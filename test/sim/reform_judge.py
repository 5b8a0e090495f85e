"""What each epoch of the group in `reform_world` may be made of, by what became of its processes and what was ordered.

The judge sees the truth: it does not ask the group's rules whether they were followed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reform_process import Process

#: seconds of a member that asks for the end of everything
_QUIT_WITHIN = 2.0
#: as the documentation says: failed re-forms in a row, and seconds after which one that served has worked
_STRIKES = 2
_HEALTHY = 5.0
#: seconds for which what failed is set aside: at first, and at most
_REST, LONGEST_REST = 300.0, 86400.0
#: looks within which a member of a starting epoch is found to be stopped
_STOPPED_LOOKS = 30
#: looks within which an epoch that serves is over once a member of it does not
_BROKEN_LOOKS = 120
#: so many requests to leave may be lost before a rank need not have left
_UNHEARD = 5


class Judge:
    def __init__(self, least_backoff: float, start_timeout: float, step: float) -> None:
        self._least_backoff = least_backoff
        self._start_timeout = start_timeout
        self._begun_at = 0.0
        self._step = step
        #: who must not be of any epoch any more
        self._barred: set[int] = set()
        self._begin_after = 0.0
        self._reformed = False
        #: re-forms that failed in a row, and until when there are none
        self.failed_reforms = 0
        self.rests_until = 0.0
        #: the same of weights that are loaded first; whether that worked and no start failed since; and whether the
        #: next start is without, to see whether that was why
        self.failed_loads = 0
        self.loads_in_place_until = 0.0
        self._loads_first = False
        self._on_trial = False
        self._in_place = False
        self._ready_at: float | None = None
        #: how often something was set aside, and tried again and had worked
        self.rests = self.returns = 0
        #: until when the epoch has to end, since a member of it asked for that
        self._quit: tuple[int, float] | None = None
        self._jumped_at = self._ended_at = 0.0
        self._stopped_looks: dict[int, int] = {}
        self._broken_looks = 0

    def begun(
        self, members: Mapping[str, Process], there: Mapping[str, Process], reformed: bool, cold: bool, now: float
    ) -> None:
        """An epoch of these; ``there``: the spares that there were. ``cold``: new ones are no forks."""
        pids = {member.pid for member in members.values()}
        assert not pids & self._barred, "a process is in an epoch that must not be used again"
        assert all(member.alive for member in members.values()), "a dead process is in an epoch"
        assert now >= self._begin_after, "an epoch begins before its time"
        assert not reformed or not self.reforms_rest(now), "re-formed though that is set aside"
        in_place = {member.in_place for member in members.values() if member.is_rank}
        assert in_place == {self._on_trial or now < self.loads_in_place_until}, "weights are not loaded as they must be"
        assert cold == (in_place == {False} and self.failed_loads > 0), "two things are tried at once, or nothing"
        unused = [seat for seat, spare in there.items() if reformed and members[seat].pid > spare.pid]
        assert not unused, "a spare is not used"
        self._reformed = reformed
        self._in_place = True in in_place
        self._begun_at, self._ready_at = now, None

    def reforms_rest(self, now: float) -> bool:
        return now < self.rests_until

    def spare_begun(self, now: float) -> None:
        assert not self.reforms_rest(now), "a spare is started though re-forms are set aside"
        assert not self._in_place, "a spare is started though weights cannot be loaded first"

    def is_ready(self, now: float) -> None:
        self._ready_at = now
        if self._in_place and self._on_trial:
            self.failed_loads += 1
            self.loads_in_place_until = now + min(LONGEST_REST, _REST * 2 ** (self.failed_loads - 1))
            self.rests += 1
        elif not self._in_place:
            self.returns += self.failed_loads > 0
            self.failed_loads, self._loads_first = 0, True
        self._on_trial = False

    def _judge_end(self, by_itself: bool, now: float) -> None:
        """What it says about re-forms and loads."""
        if self._reformed and self._ready_at is not None and now - self._ready_at >= _HEALTHY:
            self.returns += self.failed_reforms >= _STRIKES
            self.failed_reforms = 0
        elif self._reformed and by_itself:
            self.failed_reforms += 1
            if self.failed_reforms >= _STRIKES:
                self.rests_until = now + min(LONGEST_REST, _REST * 2 ** (self.failed_reforms - _STRIKES))
                self.rests += 1
        elif self._ready_at is None and by_itself and not self._reformed:
            # Of a way that worked the first failure is free.
            self._on_trial = not self._in_place and not self._loads_first
            self._loads_first = self._loads_first and self._in_place

    def ended(
        self, members: Collection[Process], everybody: Collection[Process], served: bool, by_itself: bool,
        how: str, now: float,
    ) -> None:  # fmt: skip
        """``how``: by a "restart" or "fence" of the frontend, a loop that "failed", or else."""
        self._ended_at = self._begin_after = now
        self._quit = None
        self._judge_end(by_itself, now)
        if how == "restart":
            # An operator's: all that failed is tried again.
            self.failed_reforms = self.failed_loads = 0
            self.rests_until = self.loads_in_place_until = 0.0
            self._on_trial = False
        if not served or self.reforms_rest(now):
            self._barred |= {process.pid for process in everybody}
            if how != "restart":
                self._begin_after = now + self._least_backoff
        elif how == "restart":
            self._barred |= {member.pid for member in members}
        elif how == "fence":
            self._barred |= {member.pid for member in members if member.halted}
        elif how == "failed" and all(member.alive for member in members):
            self._barred |= {member.pid for member in members if member.broke}

    def asked_for_the_end(self, epoch: int, now: float) -> None:
        self._quit = self._quit or (epoch, now + _QUIT_WITHIN)

    def waits_for_an_end(self) -> bool:
        return self._quit is not None

    def jumped(self, now: float) -> None:
        self._jumped_at = now

    def killed(self, process: Process) -> None:
        """By its supervisor."""
        able = process.leaving and not process.struck and process.unheard < _UNHEARD
        assert not able or self._jumped_at >= self._ended_at, "a rank that could leave was killed"

    def look(self, members: Collection[Process], phase: str, epoch: int | None, now: float) -> None:
        """``epoch``: that has not ended."""
        if self._quit is not None and self._quit[0] == epoch:
            assert now <= self._quit[1] + self._step, "the end that a member asked for does not come"
        starting = phase == "starting" and len(members) > 0
        assert not starting or now <= self._begun_at + self._start_timeout + self._step, "a start takes too long"
        halted = {member.pid for member in members if phase == "starting" and member.halted and member.alive}
        self._stopped_looks = {pid: self._stopped_looks.get(pid, 0) + 1 for pid in halted}
        assert max(self._stopped_looks.values(), default=0) <= _STOPPED_LOOKS, "stopped in a start, and not found"
        broken = phase == "ready" and any(m.state != "serving" or m.hung or m.halted for m in members)
        self._broken_looks = self._broken_looks + 1 if broken else 0
        assert self._broken_looks <= _BROKEN_LOOKS, "an epoch goes on in which somebody does not serve"
