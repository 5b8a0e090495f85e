"""The journal: what every request is, what its client was already given, and which attempt may add to it.

The journal is the truth; KV is a cache of it. A request is in exactly one of these places:

    held        accepted, not on any group (none is ready, or capacity was lost)
    attempt     on one incarnation of one group, under a wire id nobody else has

An attempt ends by `fence` (its group was lost) or with the request. After that its wire id is unknown, so
nothing that still arrives under it can add a token, whatever path it took.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal

from sglang_kevlar.protocol.launch import KevlarArgs
from sglang_kevlar.protocol.resume import MOVED, ResumeState

#: Separates the request id from the attempt in a wire id. Wire ids are looked up; but for their end nobody parses them.
WIRE_SEPARATOR = "~"

#: at most this many of a request's future tokens are counted as load: most requests end before their limit
RESERVE_NEW_TOKENS = 512

#: a group that dies by itself this many seconds after a request was sent to it, and has not begun to run it, may have
#: died of taking it in. Sooner than that no scheduler dies of a request: several groups were killed at once.
INTAKE_DEATH = (0.005, 2.0)

RefusalKind = Literal["poison", "redirect_limit", "not_continuable", "weights"]


@dataclass(frozen=True)
class Attempt:
    """One try of a request on one incarnation of one group."""

    wire_rid: str
    group: int
    epoch: int
    #: KV tokens counted against the group while it runs there
    reserved_tokens: int
    sent_at: float


@dataclass(frozen=True)
class Refusal:
    """Why a request cannot go on. ``message`` goes to the client and names the request."""

    kind: RefusalKind
    message: str


@dataclass
class Entry:
    """A request in flight. ``delivered`` is every token given to the client's side so far, in order."""

    rid: str
    prompt_tokens: int
    #: new tokens it may still ask for, clipped (see RESERVE_NEW_TOKENS)
    max_new_tokens: int
    #: name of the weights that it began with, and has to its end
    weights: str
    #: why this request cannot be continued once a token was delivered; None when it can
    not_continuable: str | None = None
    delivered: array[int] = field(default_factory=lambda: array("q"))
    attempt: Attempt | None = None
    #: the group of this attempt has begun to run it; before that it only waits there
    started: bool = False
    redirects: int = 0
    #: of those, how many were asked for by an operator: maintenance must not use up what failures may take
    planned_moves: int = 0
    #: tokens computed again because of redirects, as the group that resumed reported them
    recomputed_tokens: int = 0
    cached_tokens: int = 0
    input_logprobs_sent: bool = False
    #: groups that died while they ran this request, since its last delivered token
    deaths_without_progress: list[int] = field(default_factory=list)
    #: some group began to run it, so taking it in kills nobody
    ever_started: bool = False
    #: groups that died shortly after they were sent this request, while no group had begun to run it
    intake_deaths: list[int] = field(default_factory=list)

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + len(self.delivered)

    @property
    def reserved_tokens(self) -> int:
        remaining = self.max_new_tokens - len(self.delivered)
        return self.context_tokens + max(0, min(remaining, RESERVE_NEW_TOKENS))

    def resume_state(self) -> ResumeState | None:
        """State to continue from, or None when nothing was delivered and the request simply runs again."""
        if not self.delivered:
            return None
        return ResumeState(
            output_ids=self.delivered[:],
            cached_tokens=self.cached_tokens,
            input_logprobs_sent=self.input_logprobs_sent,
        )


class Journal:
    """All requests in flight, by request id, and their attempts, by wire id.

    ``incarnation`` tells the attempts of this frontend from those of one that died, whose tokens a group may
    still be producing.
    """

    def __init__(self, args: KevlarArgs, incarnation: str) -> None:
        self._args = args
        self._incarnation = incarnation
        self._next_attempt = 0
        self._entries: dict[str, Entry] = {}
        self._by_wire: dict[str, Entry] = {}
        #: name of the weights that requests begin with; entries never continue with others
        self.weights = ""
        #: during a `control.rolling` update, of those that groups serve besides
        self.other_weights: str | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, rid: str) -> Entry | None:
        return self._entries.get(rid)

    def open(
        self,
        rid: str,
        prompt_tokens: int,
        max_new_tokens: int,
        not_continuable: str | None = None,
        weights: str | None = None,
    ) -> Entry:
        """``weights``: of the call that it is a part of, when others of that have begun."""
        assert rid not in self._entries, f"request {rid} is already open"
        begins_with = self.weights if weights is None else weights
        entry = Entry(rid, prompt_tokens, max_new_tokens, weights=begins_with, not_continuable=not_continuable)
        self._entries[rid] = entry
        return entry

    def begin_attempt(
        self, entry: Entry, group: int, epoch: int, now: float = 0.0, weights: str | None = None
    ) -> Attempt:
        """The request goes to ``(group, epoch)``, which has ``weights``. It must not be anywhere else."""
        assert self._entries.get(entry.rid) is entry, f"request {entry.rid} is not open"
        assert entry.attempt is None, f"request {entry.rid} already runs on group {entry.attempt}"
        has = self.weights if weights is None else weights
        assert not entry.delivered or entry.weights == has, f"request {entry.rid} continues with other weights"
        self._next_attempt += 1
        # Terminated: upstream aborts by prefix, and attempt 1 must not take attempt 12 with it.
        end = MOVED if entry.redirects else ";"
        wire_rid = f"{entry.rid}{WIRE_SEPARATOR}{self._incarnation}.{self._next_attempt}{end}"
        entry.started = False
        entry.attempt = Attempt(wire_rid, group, epoch, entry.reserved_tokens, now)
        entry.weights = has
        self._by_wire[wire_rid] = entry
        return entry.attempt

    def serves(self, weights: str) -> bool:
        return weights in (self.weights, self.other_weights)

    def accept(self, wire_rid: str, group: int, epoch: int) -> Entry | None:
        """The request a message of ``(group, epoch)`` belongs to, or None when that attempt was fenced."""
        entry = self._by_wire.get(wire_rid)
        if entry is None:
            return None
        attempt = entry.attempt
        assert attempt is not None and attempt.wire_rid == wire_rid
        if (attempt.group, attempt.epoch) != (group, epoch):
            return None
        return entry

    def deliver(self, entry: Entry, tokens: list[int] | array[int]) -> None:
        """``tokens`` are given to the client's side. Progress clears the suspicion of `deaths_without_progress`."""
        assert entry.attempt is not None, f"token for request {entry.rid}, which runs nowhere"
        if len(tokens):
            entry.started = True
            entry.delivered.extend(tokens)
            entry.deaths_without_progress.clear()
            entry.intake_deaths.clear()

    def take_over(self, entry: Entry, tokens: list[int] | array[int], cached_tokens: int) -> None:
        """``tokens`` were given to its client by another frontend, which was lost. It is on no group yet."""
        assert self._entries.get(entry.rid) is entry and entry.attempt is None
        if not entry.delivered:
            entry.cached_tokens = cached_tokens
        entry.delivered.extend(tokens)
        entry.input_logprobs_sent = True

    def go_on(self, entry: Entry) -> None:
        """All that was given to its client has been taken over: from here on it is a request that was moved."""
        assert self._entries.get(entry.rid) is entry and entry.attempt is None
        entry.redirects += bool(entry.delivered)

    def close(self, rid: str) -> Entry | None:
        """The request ended, however. None when it was not open (a second end of the same request)."""
        entry = self._entries.pop(rid, None)
        if entry is not None:
            self._end_attempt(entry)
        return entry

    def running_on(self, group: int, epoch: int) -> list[Entry]:
        return [
            entry
            for entry in self._by_wire.values()
            if entry.attempt is not None and (entry.attempt.group, entry.attempt.epoch) == (group, epoch)
        ]

    def take_away(self, entry: Entry) -> None:
        """End its attempt on a group that lives, to go on elsewhere: an operator wants the group empty."""
        assert entry.attempt is not None and self.stays(entry) is None
        self._end_attempt(entry)
        entry.redirects += 1
        entry.planned_moves += 1
        entry.ever_started |= entry.started

    def fence(
        self,
        group: int,
        epoch: int,
        planned: bool = False,
        crashed_at: float | None = None,
        counted: bool = True,
    ) -> list[Entry]:
        """End every attempt on ``(group, epoch)``. Returns their requests, longest context first.

        That order loses the least when there is not room for all: the longest cost most to compute again.
        Those it had begun to run are suspected of its death, and, of a process that ended by itself (``crashed_at``),
        those it had just been sent; none when that was ``planned`` (drain, restart by an operator). Not ``counted``:
        it is no move of those that `max_redirects` allows.
        """
        lost = self.running_on(group, epoch)
        for entry in lost:
            assert entry.attempt is not None
            sent_at = entry.attempt.sent_at
            self._end_attempt(entry)
            entry.redirects += 1
            entry.planned_moves += not counted
            entry.ever_started |= entry.started
            if planned:
                continue
            if entry.started:
                entry.deaths_without_progress.append(group)
            elif not entry.ever_started and crashed_at is not None:
                soonest, latest = INTAKE_DEATH
                if soonest <= crashed_at - sent_at <= latest:
                    entry.intake_deaths.append(group)
        lost.sort(key=lambda entry: entry.context_tokens, reverse=True)
        return lost

    def refusal(self, entry: Entry) -> Refusal | None:
        """Why ``entry``, just fenced, must not run again; None when it may."""
        args = self._args
        rid, deaths = entry.rid, entry.deaths_without_progress
        if len(deaths) >= args.poison_deaths:
            groups = ", ".join(str(group) for group in deaths)
            return Refusal(
                "poison",
                f"request {rid}: worker groups {groups} died one after the other while running it, with no token "
                f"delivered in between; it is not given to another group",
            )
        # One more than above: it is weaker evidence, and everything else that just arrived shares it.
        if len(deaths) + len(entry.intake_deaths) > args.poison_deaths:
            groups = ", ".join(str(group) for group in (*entry.intake_deaths, *deaths))
            return Refusal(
                "poison",
                f"request {rid}: worker groups {groups} died one after the other as soon as they were given it; it is "
                f"not given to another group",
            )
        if entry.redirects - entry.planned_moves > args.max_redirects:
            return Refusal("redirect_limit", f"request {rid}: moved {args.max_redirects} times, the limit")
        return self.stays(entry)

    def stays(self, entry: Entry) -> Refusal | None:
        """Why ``entry`` can only end where it began: what is said when that group is lost. None: it can be moved."""
        rid = entry.rid
        if entry.delivered and entry.not_continuable is not None:
            return Refusal("not_continuable", f"request {rid}: its worker group was lost and {entry.not_continuable}")
        if entry.delivered and not self.serves(entry.weights):
            return Refusal(
                "weights", f"request {rid}: its worker group was lost, and its model weights are no longer served"
            )
        return None

    def _end_attempt(self, entry: Entry) -> None:
        if entry.attempt is not None:
            del self._by_wire[entry.attempt.wire_rid]
            entry.attempt = None

    def check(self) -> None:
        """Assert the invariants that hold between any two calls (for tests and the simulation)."""
        for wire_rid, entry in self._by_wire.items():
            assert entry.attempt is not None and entry.attempt.wire_rid == wire_rid
            assert self._entries.get(entry.rid) is entry
        running = sum(entry.attempt is not None for entry in self._entries.values())
        assert running == len(self._by_wire)
