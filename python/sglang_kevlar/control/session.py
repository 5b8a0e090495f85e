"""A session between a frontend and a group on another host: what both ends keep of it, and what they make of it.

Pure: messages, ticks and the ends of connections go in, each with a monotonic time; out come effects, in the order in
which they have to be acted on: what to send, whom to hang up on, and events for the layer above.

Rules. One connection carries one session. Messages are numbered both ways, and a number that does not fit ends the
session; so does the end of the connection, or silence for longer than the lease. Silence counts in time during which
we ourselves ran: an interval between two ticks counts for `MAX_TICK` at most. What has ended is never current again.

Which end gives up first does not matter. The frontend's word is the fence: what it has ended delivers no token any
more, whatever the group believes. A group that goes on after that works for nobody until it hears `Over`, the end of
its connection, or nothing for a lease: its own lease only bounds the waste. A group that gives up first is silent from
then on, or says so, and its new session ends the old one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from sglang_kevlar.control.detection import MAX_TICK
from sglang_kevlar.protocol.cluster import Beat, FromGroup, GroupState, Identity, ToGroup

#: seconds between two looks at the clock, as the owners of sessions try to make them
TICK = 0.05
#: seconds between two beats, also while there is something else to send: only they tell what was seen
BEAT_INTERVAL = 0.15
#: what the other side may leave unread before it counts as not reading
MAX_UNSEEN = 50_000
MAX_UNSEEN_BYTES = 256 << 20

#: "closed": the connection ended. "silent": nothing for a lease. "protocol": something did not fit.
#: "unread": it does not read. "left": on purpose. "over": the other side says so. "replaced": by its next session.
EndKind = Literal["closed", "silent", "protocol", "unread", "left", "over", "replaced"]


@dataclass(frozen=True)
class Send:
    """``to``: the connection, as the frontend's socket names it; empty at a group's end, which has one."""

    to: bytes
    message: FromGroup | ToGroup


@dataclass(frozen=True)
class HangUp:
    """The connection is of no more use. What was sent before may still go out."""

    to: bytes


@dataclass(frozen=True)
class Dial:
    """Connect anew; the last connection, if there is one, is of no more use."""


@dataclass(frozen=True)
class Joined:
    """At the frontend's end."""

    session: str
    identity: Identity
    state: GroupState
    #: of its software
    version: str = ""


@dataclass(frozen=True)
class Admitted:
    """At the group's end."""

    session: str
    frontend: str
    lease: float
    identity: Identity | None = None


@dataclass(frozen=True)
class NotJoined:
    """At the group's end: a try failed. ``retry_s``: until the next; None when there is none."""

    reason: str
    retry_s: float | None


@dataclass(frozen=True)
class StateChanged:
    session: str
    state: GroupState


@dataclass(frozen=True)
class OutputsArrived:
    session: str
    epoch: int
    payload: bytes


@dataclass(frozen=True)
class RequestsArrived:
    session: str
    epoch: int
    payload: bytes


@dataclass(frozen=True)
class KillArrived:
    session: str
    epoch: int
    cause: str
    planned: bool


@dataclass(frozen=True)
class Suspect:
    """Silent for half the lease: better no new requests."""

    session: str
    why: str


@dataclass(frozen=True)
class Trusted:
    session: str


@dataclass(frozen=True)
class Ended:
    """Exactly one for every session that was `Joined` or `Admitted`, and nothing of it after that."""

    session: str
    kind: EndKind
    reason: str
    #: monotonic seconds of the earliest evidence
    since: float


Event = (
    Joined
    | Admitted
    | NotJoined
    | StateChanged
    | OutputsArrived
    | RequestsArrived
    | KillArrived
    | Suspect
    | Trusted
    | Ended
)
Effect = Send | HangUp | Dial | Event


class NotRead(Exception):
    """The other side has left too much unread; nothing more was sent."""


class Link:
    """Numbers, silence and what is unread of one session. The same at both ends."""

    def __init__(self, session: str, lease: float, now: float) -> None:
        self.session = session
        self.lease = lease
        self.suspect = False
        #: numbers of the next message to be sent, and to arrive
        self.next = 0
        self.expected = 0
        self.heard_at = now
        self._at = now
        self._silence = 0.0
        self._beat_at = now
        #: sizes of what was sent and not yet seen over there
        self._unseen: deque[int] = deque()
        self._unseen_bytes = 0

    @property
    def silence(self) -> float:
        return self._silence

    def tick(self, now: float) -> None:
        self._silence += min(max(now - self._at, 0.0), MAX_TICK)
        self._at = max(now, self._at)

    def heard(self, now: float) -> None:
        self.heard_at = max(now, self.heard_at)
        self._silence = 0.0

    def arrived(self, number: int) -> str | None:
        """Count a numbered message in; what is wrong with its number, or None."""
        if number != self.expected:
            return f"message {number} came where {self.expected} was to come"
        self.expected += 1
        return None

    def on_beat(self, beat: Beat) -> str | None:
        if beat.number != self.expected:
            return f"{beat.number} messages were sent and {self.expected} arrived"
        seen = self.next - len(self._unseen)
        if not seen <= beat.seen <= self.next:
            return f"{beat.seen} messages of {self.next} were seen, after {seen}"
        for _ in range(beat.seen - seen):
            self._unseen_bytes -= self._unseen.popleft()
        return None

    def number(self, size: int) -> int:
        """For a message of about ``size`` bytes that is sent now. Raises NotRead."""
        if len(self._unseen) >= MAX_UNSEEN or (self._unseen and self._unseen_bytes + size > MAX_UNSEEN_BYTES):
            raise NotRead(f"it has left {len(self._unseen)} messages of {self._unseen_bytes} bytes unread")
        number = self.next
        self.next += 1
        self._unseen.append(size)
        self._unseen_bytes += size
        return number

    def beat(self, now: float) -> Beat | None:
        """A beat, when it is time for one."""
        if now - self._beat_at < BEAT_INTERVAL:
            return None
        self._beat_at = now
        return Beat(session=self.session, number=self.next, seen=self.expected)
