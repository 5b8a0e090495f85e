"""A group's end of its sessions with one frontend (`control.session`), one after the other, for ever.

Told to `Dial`, its owner connects and says so, or that it could not. A try that fails, and a session that ends, is
followed by the next try, with back-off; unless the frontend said that none will go better.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang_kevlar.control.backoff import Backoff
from sglang_kevlar.control.detection import MAX_TICK
from sglang_kevlar.control.session import (
    Admitted,
    Dial,
    Effect,
    Ended,
    EndKind,
    HangUp,
    KillArrived,
    Link,
    NotJoined,
    NotRead,
    RequestsArrived,
    Send,
    Suspect,
    Trusted,
)
from sglang_kevlar.protocol.cluster import (
    Beat,
    Configuration,
    GroupState,
    Identity,
    Join,
    Kill,
    Leave,
    Outputs,
    Over,
    Refused,
    Requests,
    State,
    ToGroup,
    Told,
    Welcome,
    clip,
    payload_problem,
)

#: seconds for a connection, and then for an answer
CONNECT_TIME = 10.0
JOIN_TIME = 10.0
#: seconds between two tries
BACKOFF_BASE, BACKOFF_CAP = 0.1, 5.0

#: "apart": until the next try. "closed": there is none any more.
Phase = Literal["apart", "dialling", "joining", "joined", "closed"]


class GroupEnd:
    def __init__(
        self, identity: Identity, configuration: Configuration, state: GroupState, now: float, frontend: int = 0
    ) -> None:
        """``frontend``: its number among those of this gateway, so that no two sessions of it have one name."""
        self.phase: Phase = "apart"
        self.state = _clipped(state)
        #: of the last session, or the one that is being tried
        self.session = ""
        #: why there is none
        self.reason = "not tried yet"
        self._identity = identity
        self._frontend = frontend
        self._configuration = configuration
        self._backoff = Backoff(BACKOFF_BASE, BACKOFF_CAP)
        self._tries = 0
        self._retry_at = now
        self._at = now
        #: watched seconds that this phase has lasted
        self._waited = 0.0
        self._joined_at = now
        self._link: Link | None = None

    def tick(self, now: float) -> list[Effect]:
        self._waited += min(max(now - self._at, 0.0), MAX_TICK)
        self._at = max(now, self._at)
        if self.phase == "apart" and now >= self._retry_at:
            self._enter("dialling")
            return [Dial()]
        if self.phase == "dialling" and self._waited > CONNECT_TIME:
            return self._failed(f"no connection after {CONNECT_TIME:.0f} s", now)
        if self.phase == "joining" and self._waited > JOIN_TIME:
            return self._failed(f"no answer after {JOIN_TIME:.0f} s", now)
        if self.phase != "joined":
            return []
        link = self._current()
        link.tick(now)
        if link.silence > link.lease:
            return self._ended("silent", f"nothing heard for {link.silence:.1f} s", link.heard_at, now)
        effects: list[Effect] = []
        if link.silence > link.lease / 2 and not link.suspect:
            link.suspect = True
            effects.append(Suspect(self.session, f"nothing heard for {link.silence:.1f} s"))
        if (beat := link.beat(now)) is not None:
            effects.append(Send(b"", beat))
        return effects

    def on_connected(self, now: float) -> list[Effect]:
        if self.phase != "dialling":
            return []
        self._tries += 1
        self.session = f"{self._identity.instance}-{self._frontend}.{self._tries}"
        self._enter("joining")
        return [
            Send(
                b"",
                Join(
                    session=self.session, identity=self._identity, configuration=self._configuration, state=self.state
                ),
            )
        ]

    def on_closed(self, reason: str, now: float) -> list[Effect]:
        """The connection is gone, or did not come about."""
        if self.phase == "joined":
            return self._ended("closed", reason, now, now, tell=False)
        return self._failed(reason, now) if self.phase in ("dialling", "joining") else []

    def on_bad_frame(self, problem: str, now: float) -> list[Effect]:
        return self._problem(f"not a message of this protocol: {problem}", now)

    def on_unread(self, now: float) -> list[Effect]:
        """The socket has no room left."""
        if self.phase == "joined":
            return self._ended("unread", "it does not read", now, now)
        return self._failed("it does not read", now) if self.phase == "joining" else []

    def on_message(self, message: ToGroup, now: float) -> list[Effect]:
        if self.phase not in ("joining", "joined"):
            return []  # what was still on its way
        if message.session != self.session:
            return self._problem(f"it speaks of session {message.session} in {self.session}", now)
        if self.phase == "joining":
            return self._answer(message, now)
        link = self._current()
        problem: str | None
        if isinstance(message, Over):
            return self._ended("over", message.reason, now, now, tell=False)
        if isinstance(message, Welcome | Refused | Told):
            problem = "a second answer to a join"
        elif isinstance(message, Beat):
            problem = link.on_beat(message)
        else:
            problem = link.arrived(message.number)
        if problem is not None:
            return self._problem(problem, now)
        link.heard(now)
        effects: list[Effect] = []
        if link.suspect:
            link.suspect = False
            effects.append(Trusted(self.session))
        if isinstance(message, Leave):
            return effects + self._ended("left", message.reason, now, now, tell=False)
        # What is meant for another epoch was sent before the frontend heard of this one.
        if isinstance(message, Requests) and message.epoch == self.state.epoch:
            effects.append(RequestsArrived(self.session, message.epoch, message.payload))
        elif isinstance(message, Kill) and message.epoch == self.state.epoch:
            effects.append(KillArrived(self.session, message.epoch, message.cause, message.planned))
        return effects

    def change_state(self, state: GroupState, now: float) -> list[Effect]:
        """The group's state is another. Always called before anything of a new epoch is sent."""
        assert state.epoch >= self.state.epoch, f"epoch {state.epoch} after {self.state.epoch}"
        self.state = state = _clipped(state)
        if self.phase == "joining":
            # The join has the old one. Nothing is numbered before the welcome: said again then.
            return []
        return self._state(now) if self.phase == "joined" else []

    def outputs(self, epoch: int, payload: bytes, now: float) -> list[Effect]:
        """For this frontend. Without a session there is nobody to have it. Raises ValueError for what is too large."""
        if self.phase != "joined":
            return []
        if (problem := payload_problem(payload)) is not None:
            raise ValueError(problem)
        try:
            number = self._current().number(len(payload))
        except NotRead as error:
            return self._ended("unread", str(error), now, now)
        return [Send(b"", Outputs(session=self.session, number=number, epoch=epoch, payload=payload))]

    def leave(self, reason: str, now: float) -> list[Effect]:
        """For good, and on purpose."""
        joined, tried = self.phase == "joined", self.phase in ("dialling", "joining")
        self._enter("closed")
        if not joined:
            return [HangUp(b"")] if tried else []
        farewell = Leave(session=self.session, number=self._current().next, reason=clip(reason))
        return [Send(b"", farewell), HangUp(b""), Ended(self.session, "left", reason, now)]

    def _answer(self, message: ToGroup, now: float) -> list[Effect]:
        if isinstance(message, Welcome):
            self._enter("joined")
            self._joined_at = now
            self._link = Link(self.session, message.lease, now)
            self.reason = ""
            return [Admitted(self.session, message.frontend, message.lease, message.identity), *self._state(now)]
        if isinstance(message, Refused):
            if message.retry_s is None:
                self._enter("closed")
                self.reason = message.reason
                return [HangUp(b""), NotJoined(message.reason, None)]
            return self._failed(message.reason, now, message.retry_s)
        if isinstance(message, Over):
            return self._failed(message.reason, now)
        return self._problem("no answer to a join", now)

    def _state(self, now: float) -> list[Effect]:
        try:
            number = self._current().number(0)
        except NotRead as error:
            return self._ended("unread", str(error), now, now)
        return [Send(b"", State(session=self.session, number=number, state=self.state))]

    def _problem(self, problem: str, now: float) -> list[Effect]:
        if self.phase == "joined":
            return self._ended("protocol", problem, now, now)
        return self._failed(problem, now) if self.phase == "joining" else []

    def _failed(self, reason: str, now: float, at_least: float = 0.0) -> list[Effect]:
        wait = max(at_least, self._backoff.failed(0.0))
        self._wait(wait, reason, now)
        return [HangUp(b""), NotJoined(reason, wait)]

    def _ended(self, kind: EndKind, reason: str, since: float, now: float, *, tell: bool = True) -> list[Effect]:
        assert self.phase == "joined", f"session {self.session} ended twice"
        self._wait(self._backoff.failed(now - self._joined_at), reason, now)
        told: list[Effect] = [Send(b"", Over(session=self.session, reason=clip(reason)))] if tell else []
        return [*told, HangUp(b""), Ended(self.session, kind, reason, since)]

    def _wait(self, seconds: float, reason: str, now: float) -> None:
        self._enter("apart")
        self._retry_at = now + seconds
        self.reason = reason

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._waited = 0.0

    def _current(self) -> Link:
        assert self._link is not None and self._link.session == self.session
        return self._link


def _clipped(state: GroupState) -> GroupState:
    return msgspec.structs.replace(state, cause=clip(state.cause), suspicions=[clip(why) for why in state.suspicions])
