"""Messages between a frontend (ROUTER) and the gateway of a worker group on another host (DEALER), msgpack over TCP.

One connection carries one session. The group says `Join`, the frontend `Welcome` or `Refused`. From then on what each
side sends is numbered from 0; a `Beat` has no number of its own, it tells the next one. `Over` says that a session
has ended or never was; nothing of it counts any more. See `control.session`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from sglang_kevlar.protocol.group import GroupPhase, LossKind
from sglang_kevlar.protocol.shadow import ShadowCounters

CLUSTER_VERSION = 1

#: ZMQ closes a connection on which something larger comes; what is sent is checked before (`payload_problem`)
MAX_FRAME_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = MAX_FRAME_BYTES - (1 << 20)
MAX_TEXT = 4096
MAX_RANKS = 1024

_PLAIN = r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z"
#: goes into logs, metrics and addresses
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=_PLAIN)]
#: an instance, and a number
Session = Annotated[str, Meta(min_length=1, max_length=128, pattern=_PLAIN)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Short = Annotated[str, Meta(max_length=256)]
Number = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0, le=3600)]
Payload = Annotated[bytes, Meta(max_length=MAX_PAYLOAD_BYTES)]


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    #: a frontend joins others by the same protocol: its `Outputs` and their `Requests` carry `protocol.records`
    #: the other nodes of a group on several hosts join the first one: its `Requests` carry `protocol.nodes`
    kind: Literal["group", "frontend", "node"] = "group"
    #: of the group, or frontend: one in a cluster
    name: Name
    #: label of its host: shadows prefer another
    host: Name
    #: drawn by each gateway process; its sessions are named after it
    instance: Name
    #: of a frontend: where it serves HTTP, as the others reach it
    url: Text = ""


class Configuration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must be equal for two groups to give the same answers to the same requests."""

    version: Short
    upstream: Short
    model: Text
    #: over everything that makes it that model: its files, not its path
    model_digest: Short
    tp: Annotated[int, Meta(ge=1, le=MAX_RANKS)]
    pp: Annotated[int, Meta(ge=1, le=MAX_RANKS)]
    dtype: Short
    quantization: Short | None = None
    kv_cache_dtype: Short
    page_size: Annotated[int, Meta(ge=1)]
    context_length: Annotated[int, Meta(ge=1)]
    #: flags that change answers, by name
    other: Annotated[dict[Short, Text], Meta(max_length=1024)] = {}

    def differences(self, there: Configuration) -> list[str]:
        """Each field that differs, by name, with both values; ``self`` is "here"."""
        names = [name for name in self.__struct_fields__ if name != "other"]
        mine = {name: getattr(self, name) for name in names} | self.other
        theirs = {name: getattr(there, name) for name in names} | there.other
        return [
            f"{name}: {_shown(mine, name)} here, {_shown(theirs, name)} there"
            for name in dict.fromkeys([*mine, *theirs])
            if name not in mine or name not in theirs or mine[name] != theirs[name]
        ]


def _shown(values: dict[str, object], name: str) -> str:
    return repr(values[name]) if name in values else "not set"


class GroupState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the gateway knows of its group, never a difference."""

    #: the group's own count
    epoch: Number
    phase: GroupPhase
    #: while ready
    init_info: dict[str, object] | None = None
    #: why the last epoch ended, or why this one does not start
    cause: Text = ""
    #: how it was lost; None while it is not
    kind: LossKind | None = None
    #: this frontend may change the group and say who keeps its shadow; of all that it joined one may
    primary: bool = False
    #: wrong with it, and not proven
    suspicions: Annotated[list[Text], Meta(max_length=MAX_RANKS)] = []
    pids: Annotated[dict[Short, Number], Meta(max_length=MAX_RANKS)] = {}
    role: Literal["active", "standby"] = "active"
    loads: Annotated[list[dict[str, object]], Meta(max_length=MAX_RANKS)] = []
    shadow: Annotated[list[ShadowCounters], Meta(max_length=MAX_RANKS)] = []
    #: where the ranks' stores listen, by rank
    shadow_endpoints: Annotated[list[Text], Meta(max_length=MAX_RANKS)] = []
    #: of a node: the ranks of which the shadow counters are
    shadow_ranks: Annotated[list[Number], Meta(max_length=MAX_RANKS)] = []
    #: of a node: one of its ranks is at a long step, for which those of other nodes may wait
    busy: bool = False


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    session: Session


class Setup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """With what a group is to be started that wants to join."""

    #: flags of upstream
    argv: Annotated[list[Text], Meta(max_length=1024)]
    #: ours, by the names of `protocol.launch.KevlarArgs`
    kevlar: dict[Short, object]


class Ask(_Message, frozen=True, kw_only=True, tag="ask"):
    """Before it starts a group asks with what; nothing else comes over this connection."""

    version: int = CLUSTER_VERSION


class Told(_Message, frozen=True, kw_only=True, tag="told"):
    setup: Setup


class Join(_Message, frozen=True, kw_only=True, tag="join"):
    version: int = CLUSTER_VERSION
    identity: Identity
    configuration: Configuration
    state: GroupState


class Welcome(_Message, frozen=True, kw_only=True, tag="welcome"):
    #: who speaks: another one after each start of a frontend
    frontend: Name
    identity: Identity | None = None
    #: seconds of silence after which either side gives the session up
    lease: Annotated[float, Meta(ge=0.5, le=600)]


class Refused(_Message, frozen=True, kw_only=True, tag="refused"):
    reason: Text
    #: seconds after which another try may go better; None: no other try
    retry_s: Seconds | None = None


class State(_Message, frozen=True, kw_only=True, tag="state"):
    number: Number
    state: GroupState


class Requests(_Message, frozen=True, kw_only=True, tag="requests"):
    """To the group: a message of upstream's for its scheduler."""

    number: Number
    #: as the group counts; for another than its current one it is not meant
    epoch: Number
    payload: Payload


class Outputs(_Message, frozen=True, kw_only=True, tag="outputs"):
    """From the group: a message of upstream's for the frontend."""

    number: Number
    epoch: Number
    payload: Payload


class Kill(_Message, frozen=True, kw_only=True, tag="kill"):
    """To the group: end this epoch, begin the next. ``planned``: an operator's restart, without back-off; what was set
    aside for its failures is tried again."""

    number: Number
    epoch: Number
    cause: Text
    planned: bool = False


class Beat(_Message, frozen=True, kw_only=True, tag="beat"):
    #: the next that will be sent: tells that nothing is missing at the end
    number: Number
    #: how many arrived from the other side
    seen: Number


class Leave(_Message, frozen=True, kw_only=True, tag="leave"):
    """On purpose, after everything that was sent before."""

    number: Number
    reason: Text


class Over(_Message, frozen=True, kw_only=True, tag="over"):
    reason: Text


FromGroup = Ask | Join | State | Outputs | Beat | Leave | Over
ToGroup = Told | Welcome | Refused | Requests | Kill | Beat | Leave | Over

from_group = msgspec.msgpack.Decoder(FromGroup)
to_group = msgspec.msgpack.Decoder(ToGroup)
_encoder = msgspec.msgpack.Encoder()


class _AnyVersion(msgspec.Struct, frozen=True, tag_field="type", tag="join"):
    session: Session
    version: int


_any_version = msgspec.msgpack.Decoder(_AnyVersion)

_M = TypeVar("_M")


class BadFrame(Exception):
    """Not a message of this direction; says what is wrong with it, in a few words."""


def encode(message: FromGroup | ToGroup) -> bytes:
    return _encoder.encode(message)


def decode(decoder: msgspec.msgpack.Decoder[_M], frame: bytes) -> _M:
    """Raises BadFrame."""
    if len(frame) > MAX_FRAME_BYTES:
        raise BadFrame(f"{len(frame)} bytes, at most {MAX_FRAME_BYTES} are taken")
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadFrame(clip(str(error) or type(error).__name__, 200)) from None


def version_of(frame: bytes) -> tuple[str, int] | None:
    """Session and version of a `Join` that may be of another version, which need not look like ours otherwise."""
    try:
        join = _any_version.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return join.session, join.version


def payload_problem(payload: bytes) -> str | None:
    """Why it cannot be sent to another host."""
    if len(payload) <= MAX_PAYLOAD_BYTES:
        return None
    return f"{len(payload)} bytes cannot be sent to another host at once, at most {MAX_PAYLOAD_BYTES}"


def clip(text: str, length: int = MAX_TEXT) -> str:
    """What is longer than the other side takes loses its end, not the session."""
    return text if len(text) <= length else text[: length - 3] + "..."
