"""The course of a worker group on its host: its epochs, one after the other, and which processes each is made of.

What its supervisor decides, without its processes, sockets and clock: `worker.supervisor` is this with those, and
`test/sim/reform_world.py` this with simulated ones. An epoch is *starting* until all its members are ready, serves, and
ends for all of them at once; the next begins when none of them is left in it. Which of them it may use again is
`control.reforming`'s to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Generic, Protocol, TypeVar

from sglang_kevlar.control.backoff import Backoff
from sglang_kevlar.control.detection import CALM_INTERVAL, EpochWatch, Observation
from sglang_kevlar.control.reforming import ASK_AGAIN, DEATH_SHOWS_WITHIN, HEALTHY_AFTER, Reforming
from sglang_kevlar.protocol.group import GroupPhase, LossKind
from sglang_kevlar.protocol.launch import EXIT_CONFIG, EXIT_FAILED_START, KevlarArgs

#: seconds before a re-form
_REFORM_BACKOFF = 0.02
#: seconds between the death of a process's first thread, which a frontend may see, and its end
_END_SHOWS_WITHIN = 0.1
#: seconds before a spare is replaced that died
_SPARE_PAUSE = 5.0
#: seconds between SIGTERM and SIGKILL at shutdown
_STOP_TIMEOUT = 5.0
#: seconds in which a member that sent SIGQUIT may end by itself, which says more about why
_QUIT_GRACE = 2.0


class Running(Protocol):
    """A process, as far as a course is concerned with it."""

    @property
    def pid(self) -> int: ...
    def kill(self) -> None: ...
    def ending(self) -> bool: ...
    def stopped(self) -> bool: ...


class Occupant(Protocol):
    """A process in a seat of the group, such as rank 1; or that waits for one."""

    name: str
    #: it serves in its epoch
    ready: bool
    #: it could be of another epoch, and was asked to leave this one
    can_leave: bool
    leaving: bool

    @property
    def process(self) -> Running: ...
    def ask_to_leave(self) -> None: ...


class Warmth(Protocol):
    """What is known of warm starts (`worker.warm_start`)."""

    @property
    def importing(self) -> bool: ...
    @property
    def suspect(self) -> bool: ...
    def begin(self, cold: bool) -> None: ...
    def failed(self) -> None: ...
    def succeeded(self) -> None: ...
    def forget(self) -> bool: ...


M = TypeVar("M", bound=Occupant)


class Course(ABC, Generic[M]):
    """What is done is done by the methods that a subclass has to have. None of them waits for a process."""

    def __init__(
        self,
        kevlar: KevlarArgs,
        seats: Sequence[str],
        spares: Sequence[str],
        *,
        reforms: bool,
        leave_within: float,
        warmth: Warmth,
        clock: Callable[[], float],
        exit_on_failed_start: bool,
    ) -> None:
        """``seats``: what an epoch is made of. ``spares``: for which of them a spare is kept. ``leave_within``: seconds
        in which a rank that lives has to have left. ``clock``: monotonic."""
        self._kevlar = kevlar
        self._seats = tuple(seats)
        self._warmth = warmth
        self._clock = clock
        self._exit_on_failed_start = exit_on_failed_start
        self._leave_within = leave_within
        longest = kevlar.restart_backoff_max
        self._backoff = Backoff(kevlar.restart_backoff, longest)
        self._reform_backoff = Backoff(min(_REFORM_BACKOFF, longest), longest, HEALTHY_AFTER)
        self._reforming = Reforming(reforms, spares, kevlar.start_timeout)

        self._epoch = 0
        self._phase: GroupPhase = "starting"
        #: of the epoch of now, by seat
        self._members: dict[str, M] = {}
        #: of none: ranks that left the last one, and spares
        self._left: dict[str, M] = {}
        self._spares: dict[str, M] = {}
        #: of no use any more, killed, and not dead yet
        self._doomed: list[M] = []
        #: when to look again at ranks that are leaving, and when they have to have left
        self._ask_at = self._leave_deadline = float("inf")
        #: when the next spare may be started
        self._spare_at = 0.0
        #: ranks whose loop failed, with what they said, until it shows whether another one's death is why
        self._failed_loops: dict[str, str] = {}
        self._failed_deadline = float("inf")
        #: why the frontend has given up this epoch, and when that counts if no death has shown by then
        self._fence: tuple[str, float] | None = None
        self._started_at = self._ended_at = 0.0
        self._cause = ""
        self._kind: LossKind | None = None
        self._failed_starts = 0
        self._ready_at: float | None = None
        self._start_deadline = float("inf")
        self._start_watch = EpochWatch(kevlar, 0.0)
        self._quit_deadline = float("inf")
        self._next_start = 0.0
        #: when what does not end by itself is killed, once the group shuts down
        self._stop_deadline: float | None = None
        self._exit_status = 0
        self._ending = False

    # -- what is done

    @abstractmethod
    def _begin_epoch(self) -> int:
        """The number of a new epoch, whose members will be told to `_join` it."""

    @abstractmethod
    def _new_member(self, seat: str, in_place: bool) -> M:
        """Start a process for a seat. ``in_place``: it loads its weights when it has joined."""

    @abstractmethod
    def _join(self, member: M) -> None:
        """Order it to be part of the epoch that has begun."""

    @abstractmethod
    def _hear(self, member: M) -> None:
        """Take what it has said since."""

    @abstractmethod
    def _on_ready(self) -> None:
        """The epoch serves."""

    @abstractmethod
    def _on_epoch_gone(self) -> None:
        """Nobody is left in the epoch: what dead members left behind can go."""

    @abstractmethod
    def _report(self) -> None:
        """Say how things are."""

    @abstractmethod
    def _report_first(self) -> None:
        """Say it before others can see what follows from it."""

    @abstractmethod
    def _log(self, text: str) -> None: ...

    @abstractmethod
    def _quit_cause(self) -> str:
        """Why a member asked for the end of everything."""

    # -- when

    def _all(self) -> list[M]:
        return [*self._members.values(), *self._left.values(), *self._spares.values(), *self._doomed]

    def _start_at(self) -> float:
        """When the next epoch may start, as things are."""
        if self._members or self._doomed or self._stop_deadline is not None or self._warmth.importing:
            return float("inf")
        if any(member.process.ending() for member in [*self._left.values(), *self._spares.values()]):
            return float("inf")  # one that is about to be dead would take a place; its end is heard of
        return self._next_start

    def _next_deadline(self) -> float:
        """When `_check_deadlines` has to be called again, whatever is heard."""
        deadlines = [self._quit_deadline, self._start_at(), self._ask_at, self._leave_deadline, self._failed_deadline]
        if self._fence is not None:
            deadlines.append(self._fence[1])
        if self._missing_spare() is not None:
            deadlines.append(self._spare_at)
        if self._phase == "starting":
            deadlines += [self._start_deadline, self._clock() + CALM_INTERVAL]
        if self._stop_deadline is not None:
            deadlines.append(self._stop_deadline)
        return min(deadlines)

    def _check_deadlines(self) -> None:
        now = self._clock()
        if self._phase == "starting" and now >= self._start_deadline:
            # We may have been stopped ourselves: what members said in time counts.
            for member in list(self._members.values()):
                self._hear(member)
            if self._phase == "starting":
                late = [m.name for m in self._members.values() if not m.ready]
                self._end_epoch(f"{', '.join(late)} not ready after {now - self._started_at:.0f} s")
        if self._phase == "starting":
            # Of a group that serves, the frontend watches this.
            stopped = frozenset(m.name for m in self._members.values() if m.process.stopped())
            if (loss := self._start_watch.observe(Observation({}, stopped), now)) is not None:
                self._end_epoch(loss.cause, by_itself=False)
        self._check_fence(now)
        self._check_leavers(now)
        if now >= self._spare_at and (name := self._missing_spare()) is not None:
            self._spares[name] = self._new_member(name, self._in_place(name))
        if now >= self._quit_deadline:
            self._quit_deadline = float("inf")
            if self._members and not self._ending:
                self._end_epoch(self._quit_cause())
        if self._stop_deadline is not None and now >= self._stop_deadline:
            for member in self._all():
                member.process.kill()
            self._stop_deadline = float("inf")

    def _check_fence(self, now: float) -> None:
        if self._fence is not None and now >= self._fence[1]:
            # Of several that hang nobody knows which is the cause; one that is stopped, or about to end, can be told.
            guilty = [m.name for m in self._members.values() if m.process.stopped() or m.process.ending()]
            self._end_epoch(self._fence[0], by_itself=False, whole=not guilty, guilty=guilty)

    def _check_leavers(self, now: float) -> None:
        if now >= self._failed_deadline:
            failed = self._failed_loops
            cause = "; ".join(f"{name}'s scheduler failed: {error}" for name, error in failed.items())
            # When nobody else is dead, they failed by themselves. A large process may take longer to be all dead.
            dying = [m.name for m in self._members.values() if m.process.ending()]
            whole = f"{', '.join(dying)} ended; {cause}" if dying else cause
            # Who is dying may have been killed.
            self._end_epoch(whole, by_itself=not dying, guilty=dying or failed)
        if now >= self._ask_at:
            self._ask_at = now + ASK_AGAIN
            for member in self._members.values():
                if member.leaving:
                    member.ask_to_leave()
        if now >= self._leave_deadline:
            self._leave_deadline = float("inf")
            for member in self._members.values():
                if member.leaving:
                    self._log(f"{member.name} (pid {member.process.pid}) does not leave epoch {self._epoch}: killed")
                    member.process.kill()

    # -- an epoch begins

    def _start(self) -> None:
        assert not self._members, f"epoch {self._epoch} is not over"
        now = self._started_at = self._clock()
        self._phase, self._ready_at, self._ending = "starting", None, False
        self._quit_deadline = float("inf")
        self._start_watch = EpochWatch(self._kevlar, now)
        self._epoch = self._begin_epoch()
        left, self._left = self._left, {}
        missing = sorted(set(self._seats) - left.keys())
        spares = [name for name in missing if name in self._spares]
        self._reforming.form([*left, *spares], now)
        self._warmth.begin(cold=self._reforming.loads_first_again)
        self._start_deadline = self._reforming.deadline()
        if self._reforming.reformed:
            around, after = ", ".join(sorted(left)) or "nobody", now - self._ended_at
            self._log(
                f"epoch {self._epoch} is re-formed around {around}, {after:.2f} s after the last one ended; "
                f"new: {', '.join(missing)}" + (f", of which {', '.join(spares)} from the spares" if spares else "")
            )
        if again := self._reforming.tried_again():
            self._log(f"epoch {self._epoch}: {again}")
        for name in self._seats:
            member = left.get(name) or self._spares.pop(name, None) or self._new_member(name, self._in_place(name))
            self._members[name] = member
            self._join(member)
        self._report()

    def _in_place(self, seat: str) -> bool:
        return self._reforming.loads_in_place and seat.startswith("rank")

    def _missing_spare(self) -> str | None:
        if self._phase != "ready" or self._warmth.importing:
            return None
        return next(iter(self._reforming.missing_spares(self._spares)), None)

    # -- what members say

    def _on_said(self, member: M, message: dict[str, object]) -> None:
        ours = self._members.get(member.name) is member
        status = message.get("status")
        if status == "left" and ours:
            self._on_left(member, str(message.get("error", "")))
        elif status == "error" and ours and not self._ending:
            self._end_epoch(f"{member.name} failed to start: {message.get('error', 'unknown error')}")
        elif status == "error" and not ours:
            self._log(f"{member.name} (pid {member.process.pid}), a spare: {message.get('error', 'unknown error')}")
        elif status == "ready" and not self._ending:
            self._ready_if_all()

    def _on_left(self, member: M, error: str) -> None:
        if self._phase == "ready":
            # Its loop failed: because another rank is dead, or by itself.
            self._failed_loops[member.name] = error
            self._failed_deadline = min(self._failed_deadline, self._clock() + DEATH_SHOWS_WITHIN)
        elif not self._ending:
            self._end_epoch(f"{member.name}'s scheduler failed: {error}")
        elif member.leaving:
            self._keep_member(member)

    def _keep_member(self, member: M) -> None:
        """It has left the epoch, and is of the next one."""
        member.leaving = False
        self._left[member.name] = self._members.pop(member.name)
        self._gone_if_empty()

    def _all_ready(self) -> bool:
        return all(m.ready for m in self._members.values())

    def _ready_if_all(self) -> None:
        if self._phase == "starting" and self._members and self._all_ready():
            now = self._ready_at = self._clock()
            self._phase = "ready"
            self._failed_starts = 0
            blamed = self._reforming.suspect
            self._reforming.succeeded(now)
            if blamed:
                self._log("; ".join(self._reforming.set_aside(now)))
            if self._reforming.reformed:
                self._log(f"epoch {self._epoch} is ready, {now - self._started_at:.2f} s after it was begun")
            self._warmth.succeeded()
            self._report()
            self._on_ready()
            self._exit_on_failed_start = False

    # -- an epoch ends

    def _on_dead(self, member: M, how: str, *, by_itself: bool, hopeless: bool) -> None:
        """It has ended. ``by_itself``: nobody killed it. ``hopeless``: it says that no other try can go better."""
        if hopeless:
            self._exit_status = EXIT_CONFIG
        ours = self._members.get(member.name) is member
        if ours and not self._ending:
            self._end_epoch(how, by_itself=by_itself)
        if ours:
            del self._members[member.name]
        elif self._left.get(member.name) is member:
            self._log(f"{how}: it waited for the next epoch")
            del self._left[member.name]
        elif member in self._doomed:
            self._doomed.remove(member)
        else:
            assert self._spares.get(member.name) is member, f"{member.name} is of nowhere"
            self._log(f"{how}: it was a spare")
            del self._spares[member.name]
            self._spare_at = self._clock() + _SPARE_PAUSE

    def _gone_if_empty(self) -> None:
        if self._members:
            return
        self._ask_at = self._leave_deadline = float("inf")
        self._on_epoch_gone()
        if self._exit_status or self._stop_deadline is not None:
            for member in self._all():
                member.process.kill()

    def _end_epoch(
        self,
        cause: str,
        *,
        planned: bool = False,
        by_itself: bool = True,
        kind: LossKind | None = None,
        passing: bool = False,
        whole: bool = False,
        guilty: Collection[str] = (),
    ) -> None:
        """The group is lost: say so, kill what is left of it, and plan the next start.

        ``by_itself``: nobody from outside ended it. ``kind``: of a loss that only this process sees. ``passing``: a
        first start that failed so is worth another try. ``whole``: no process of it is used again; ``guilty``: not
        these.
        """
        now = self._ended_at = self._clock()
        served = self._phase == "ready"
        self._ending = True
        self._phase, self._cause, self._kind = "down", cause, kind
        if self._ready_at is None and not planned:
            self._failed_starts += 1
            if by_itself and not self._reforming.reformed:
                self._warmth.failed()
        alone = [
            m.name for m in self._members.values() if m.can_leave and m.name not in guilty and not m.process.ending()
        ]
        served_for = None if self._ready_at is None else now - self._ready_at
        self._reforming.ended(served_for, by_itself, now)
        if planned:
            # Mostly by an operator, who may have put right what failed.
            aside = [self._reforming.forget(now), self._warmth.forget()]
            news = ["what was set aside is tried again"] if any(aside) else []
            self._spare_at = now
        else:
            # Spares are none while re-forms are set aside.
            self._spare_at = max(self._spare_at, self._reforming.rests_until)
            news = self._reforming.set_aside(now)
        survivors = self._reforming.survivors(served, planned or whole, alone, now)
        keeps_spares = self._reforming.keeps_spares(served, now)
        failed, self._failed_loops, self._failed_deadline = self._failed_loops, {}, float("inf")
        self._fence = None
        at_once = bool(survivors) or (keeps_spares and bool(self._spares))
        backoff = self._reform_backoff if at_once else self._backoff
        delay = 0.0 if planned else backoff.failed(served_for or 0.0)
        self._next_start = now + delay
        if kind is not None:
            # Before others see the ends of processes, and take them for the cause.
            self._report_first()
        if self._stop_deadline is None:
            self._leave_deadline, self._ask_at = now + self._leave_within, now + ASK_AGAIN
            for member in self._members.values():
                if member.name not in survivors:
                    member.process.kill()
                elif member.name not in failed:
                    member.leaving = True
                    member.ask_to_leave()
            if not keeps_spares:
                self._doomed += [*self._left.values(), *self._spares.values()]
                self._left, self._spares = {}, {}
                for member in self._doomed:
                    member.process.kill()
            what_next = "; ".join([self._what_next(delay), *news])
            self._log(f"epoch {self._epoch} ended: {cause}; {what_next}")
            hopeless = self._ready_at is None and not passing and not self._warmth.suspect
            hopeless = hopeless and not self._reforming.suspect
            if self._exit_on_failed_start and hopeless and not self._exit_status:
                self._exit_status = EXIT_FAILED_START
            for name in failed.keys() & survivors:
                self._keep_member(self._members[name])
        self._report()

    def _what_next(self, delay: float) -> str:
        return f"next start in {delay:g} s"

    # -- from outside

    def _on_kill_order(self, epoch: int, cause: str, planned: bool) -> None:
        """The frontend gives an epoch up, or the operator wants another one."""
        if epoch != self._epoch or not self._members or self._ending:
            return
        if planned:
            self._end_epoch(cause, planned=True, by_itself=False)
        elif self._fence is None:
            # Often it is told of a death that shows here a little later, and what died says who did not.
            self._fence = (cause, self._clock() + _END_SHOWS_WITHIN)

    def _on_quit(self) -> None:
        """A member asks for the end of everything."""
        if self._members and not self._ending:
            self._quit_deadline = min(self._quit_deadline, self._clock() + _QUIT_GRACE)

    def _on_shutdown(self) -> None:
        if self._stop_deadline is None:
            self._stop_deadline = self._clock() + _STOP_TIMEOUT
            self._stop()

    def _finished(self) -> bool:
        return not self._all() and (self._stop_deadline is not None or self._exit_status != 0)

    def _stop(self) -> None:
        self._ending = True
        self._phase, self._cause, self._kind = "stopped", "shutdown", None
