"""The frontend's ends of all sessions (`control.session`): one for each connected group, and the table of them.

A name is one group. While a session of that name lives, a join by another process is refused: two processes of one
name are a mistake of the operator, or the second is the successor of one that died, and then the end of a connection
tells within milliseconds, or that of the lease, after which it gets in. So nothing needs to be believed. Only the
same process replaces its own session: it noticed the end before we did.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from sglang_kevlar.control.session import (
    Effect,
    Ended,
    EndKind,
    HangUp,
    Joined,
    Link,
    NotRead,
    OutputsArrived,
    Send,
    StateChanged,
    Suspect,
    Trusted,
)
from sglang_kevlar.protocol.cluster import (
    CLUSTER_VERSION,
    Ask,
    Beat,
    Configuration,
    FromGroup,
    GroupState,
    Identity,
    Join,
    Kill,
    Leave,
    Outputs,
    Over,
    Refused,
    Requests,
    Setup,
    State,
    Told,
    Welcome,
    clip,
    payload_problem,
)

#: live sessions
MAX_GROUPS = 256
#: seconds after which a group tries again that was refused for something that passes
RETRY = 2.0


class FrontendEnd:
    """One session, from its `Welcome` on. When it is over every call is an error: the table has forgotten it."""

    def __init__(self, sender: bytes, join: Join, lease: float, now: float) -> None:
        self.sender = sender
        self.session = join.session
        self.identity = join.identity
        self.state: GroupState = join.state
        self.link = Link(join.session, lease, now)
        self.over = False

    def on_message(self, message: FromGroup, now: float) -> list[Effect]:
        assert not self.over
        if message.session != self.session:
            return self.end("protocol", f"it speaks of session {message.session} on the connection of another", now)
        link = self.link
        problem: str | None
        if isinstance(message, Join | Ask):
            problem = "it joins twice"
        elif isinstance(message, Over):
            return self.end("over", message.reason, now, tell=False)
        elif isinstance(message, Beat):
            problem = link.on_beat(message)
        else:
            problem = link.arrived(message.number)
        if problem is not None:
            return self.end("protocol", problem, now)
        link.heard(now)
        effects: list[Effect] = []
        if link.suspect:
            link.suspect = False
            effects.append(Trusted(self.session))
        if isinstance(message, Leave):
            return effects + self.end("left", message.reason, now, tell=False)
        if isinstance(message, State):
            if message.state.epoch < self.state.epoch:
                return effects + self.end("protocol", f"epoch {message.state.epoch} came after {self.state.epoch}", now)
            self.state = message.state
            effects.append(StateChanged(self.session, message.state))
        elif isinstance(message, Outputs) and message.epoch == self.state.epoch and self.state.phase == "ready":
            effects.append(OutputsArrived(self.session, message.epoch, message.payload))
        return effects

    def tick(self, now: float) -> list[Effect]:
        assert not self.over
        link = self.link
        link.tick(now)
        if link.silence > link.lease:
            return self.end("silent", f"nothing heard for {link.silence:.1f} s", link.heard_at)
        effects: list[Effect] = []
        if link.silence > link.lease / 2 and not link.suspect:
            link.suspect = True
            effects.append(Suspect(self.session, f"nothing heard for {link.silence:.1f} s"))
        if (beat := link.beat(now)) is not None:
            effects.append(Send(self.sender, beat))
        return effects

    def requests(self, epoch: int, payload: bytes, now: float) -> list[Effect]:
        """Raises ValueError for what is too large."""
        if (problem := payload_problem(payload)) is not None:
            raise ValueError(problem)
        try:
            number = self.link.number(len(payload))
        except NotRead as error:
            return self.end("unread", str(error), now)
        return [Send(self.sender, Requests(session=self.session, number=number, epoch=epoch, payload=payload))]

    def kill(self, epoch: int, cause: str, planned: bool, now: float) -> list[Effect]:
        try:
            number = self.link.number(len(cause))
        except NotRead as error:
            return self.end("unread", str(error), now)
        cause = clip(cause)
        return [Send(self.sender, Kill(session=self.session, number=number, epoch=epoch, cause=cause, planned=planned))]

    def leave(self, reason: str, now: float) -> list[Effect]:
        number = self.link.next
        farewell = Leave(session=self.session, number=number, reason=clip(reason))
        return [Send(self.sender, farewell), *self.end("left", reason, now, tell=False)]

    def end(self, kind: EndKind, reason: str, since: float, *, tell: bool = True) -> list[Effect]:
        """``tell``: the other side may not know yet."""
        assert not self.over, f"session {self.session} ended twice"
        self.over = True
        told: list[Effect] = [Send(self.sender, Over(session=self.session, reason=clip(reason)))] if tell else []
        return [*told, HangUp(self.sender), Ended(self.session, kind, reason, since)]


class Sessions:
    """All groups that are joined to this frontend.

    Methods that speak of a session that is over, or never was, do nothing: that it ended is already said.
    """

    def __init__(
        self,
        frontend: str,
        configuration: Configuration,
        lease: float,
        setup: Setup | None = None,
        identity: Identity | None = None,
        takes: Literal["group", "node"] = "group",
        version_skew: bool = False,
    ) -> None:
        """``identity``: of a frontend that other frontends join. ``takes`` nodes: the first node of a group does.
        ``version_skew``: groups may be of another version of this software."""
        self.frontend = frontend
        self.identity = identity
        self._takes = takes
        self._version_skew = version_skew
        self.configuration = configuration
        #: what those are told that ask before they start
        self.setup = setup
        self.lease = lease
        #: why nobody may join any more, and whether another try may be worth it
        self.closed: tuple[str, float | None] | None = None
        self._by_sender: dict[bytes, FrontendEnd] = {}
        self._by_session: dict[str, FrontendEnd] = {}
        self._by_name: dict[tuple[str, str], FrontendEnd] = {}

    def __len__(self) -> int:
        return len(self._by_sender)

    def __iter__(self) -> Iterator[FrontendEnd]:
        return iter(list(self._by_sender.values()))

    def session(self, session: str) -> FrontendEnd | None:
        return self._by_session.get(session)

    def knows(self, sender: bytes) -> bool:
        return sender in self._by_sender

    def on_message(self, sender: bytes, message: FromGroup, now: float) -> list[Effect]:
        end = self._by_sender.get(sender)
        if end is not None:
            return self._settle(end, end.on_message(message, now))
        if isinstance(message, Join):
            return self._join(sender, message, now)
        if isinstance(message, Ask):
            return self._tell(sender, message)
        if isinstance(message, Over):
            return [HangUp(sender)]
        return [Send(sender, Over(session=message.session, reason="there is no such session")), HangUp(sender)]

    def on_bad_frame(self, sender: bytes, problem: str, session: str, version: int | None, now: float) -> list[Effect]:
        """``session`` and ``version``: of a join of another version; else what may be said of it, and None."""
        end = self._by_sender.get(sender)
        if end is not None:
            return self._settle(end, end.end("protocol", f"not a message of this protocol: {problem}", now))
        if version is not None and version != CLUSTER_VERSION:
            return _refused(sender, session, _other_version(version), None)
        return [Send(sender, Over(session=session, reason=clip(f"not a message of this protocol: {problem}"))),
                HangUp(sender)]  # fmt: skip

    def on_closed(self, sender: bytes, reason: str, now: float) -> list[Effect]:
        """The connection is gone."""
        end = self._by_sender.get(sender)
        return [] if end is None else self._settle(end, end.end("closed", reason, now, tell=False))

    def on_unread(self, sender: bytes, now: float) -> list[Effect]:
        """The socket has no room left for it."""
        end = self._by_sender.get(sender)
        return [] if end is None else self._settle(end, end.end("unread", "it does not read", now))

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for end in self:
            effects += self._settle(end, end.tick(now))
        return effects

    def requests(self, session: str, epoch: int, payload: bytes, now: float) -> list[Effect]:
        """Raises ValueError for what is too large."""
        end = self._by_session.get(session)
        return [] if end is None else self._settle(end, end.requests(epoch, payload, now))

    def kill(self, session: str, epoch: int, cause: str, now: float, *, planned: bool = False) -> list[Effect]:
        end = self._by_session.get(session)
        return [] if end is None else self._settle(end, end.kill(epoch, cause, planned, now))

    def end(self, session: str, reason: str, now: float, kind: Literal["protocol", "over"] = "over") -> list[Effect]:
        """Ended by the layer above, for what it found in a payload, for instance."""
        end = self._by_session.get(session)
        return [] if end is None else self._settle(end, end.end(kind, reason, now))

    def close(self, reason: str, retry_s: float | None, now: float) -> list[Effect]:
        """This frontend ends: no more joins, and everybody is told."""
        self.closed = (reason, retry_s)
        effects: list[Effect] = []
        for end in self:
            effects += self._settle(end, end.leave(reason, now))
        return effects

    def _tell(self, sender: bytes, ask: Ask) -> list[Effect]:
        if ask.version != CLUSTER_VERSION:
            return _refused(sender, ask.session, _other_version(ask.version), None)
        if self.closed is not None:
            return _refused(sender, ask.session, *self.closed)
        if self.setup is None:
            return _refused(sender, ask.session, "nobody is told with what to start here", None)
        return [Send(sender, Told(session=ask.session, setup=self.setup)), HangUp(sender)]

    def _join(self, sender: bytes, join: Join, now: float) -> list[Effect]:
        identity, effects = join.identity, list[Effect]()
        if identity.kind == "frontend" and self.identity is None:
            return _refused(sender, join.session, "no --peers here, or it does not serve yet", RETRY)
        if identity.kind not in ("frontend", self._takes):
            return _refused(sender, join.session, f"a {self._takes} joins here, not a {identity.kind}", None)
        if join.version != CLUSTER_VERSION:
            return _refused(sender, join.session, _other_version(join.version), None)
        if self.closed is not None:
            return _refused(sender, join.session, *self.closed)
        if differences := self._differences(join):
            here = "the first node" if self._takes == "node" else "the frontend"
            both = f"{here} (here) and the {identity.kind} (there)"
            return _refused(sender, join.session, f"{both} differ: {'; '.join(differences)}", None)
        name = (identity.kind, identity.name)
        namesake = self._by_name.get(name)
        if namesake is not None:
            if namesake.identity.instance != identity.instance:
                host = namesake.identity.host
                taken = f"a {identity.kind} named {identity.name} is joined already, from host {host}"
                reason = taken if identity.kind == "node" else f"{taken}; give this one another name"
                return _refused(sender, join.session, reason, RETRY)
            effects += self._settle(namesake, namesake.end("replaced", "its group has joined again", now))
        if join.session in self._by_session:
            return [*effects, *_refused(sender, join.session, f"session {join.session} is another group's", RETRY)]
        if len(self) >= MAX_GROUPS:
            return [*effects, *_refused(sender, join.session, f"{MAX_GROUPS} groups are joined, the most", RETRY)]
        end = FrontendEnd(sender, join, self.lease, now)
        self._by_sender[sender] = self._by_session[join.session] = self._by_name[name] = end
        welcome = Welcome(session=join.session, frontend=self.frontend, lease=self.lease, identity=self.identity)
        return [*effects, Send(sender, welcome), Joined(join.session, identity, join.state, join.configuration.version)]

    def _differences(self, join: Join) -> list[str]:
        there = join.configuration
        if self._version_skew and join.identity.kind == "group":
            there = msgspec.structs.replace(there, version=self.configuration.version)
        return self.configuration.differences(there)

    def _settle(self, end: FrontendEnd, effects: list[Effect]) -> list[Effect]:
        if end.over:
            del self._by_sender[end.sender], self._by_session[end.session]
            del self._by_name[end.identity.kind, end.identity.name]
        return effects


def _other_version(version: int) -> str:
    return f"this frontend speaks version {CLUSTER_VERSION} of the cluster's protocol, the group {version}"


def _refused(sender: bytes, session: str, reason: str, retry_s: float | None) -> list[Effect]:
    return [Send(sender, Refused(session=session, reason=clip(reason), retry_s=retry_s)), HangUp(sender)]
