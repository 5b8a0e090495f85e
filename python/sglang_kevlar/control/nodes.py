"""A group on several hosts: what the first node knows of the others, and what it has them do.

Every node counts its own epochs. An epoch of the group is one of each node, started by an order of the first one. An
order is for the epoch behind the one that the node has stated, and is answered by a state before another is given, in
the same session: so a node's epoch belongs to one order, and what was not ordered in this session is killed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sglang_kevlar.protocol.cluster import GroupState
from sglang_kevlar.protocol.group import LossKind
from sglang_kevlar.protocol.nodes import StartNode

#: phases of a node with ranks at work
RUNNING = ("starting", "ready")


@dataclass(frozen=True)
class Order:
    """To be sent: start what comes after this epoch of the node."""

    session: str
    after: int
    start: StartNode


@dataclass(frozen=True)
class Kill:
    session: str
    epoch: int
    cause: str


@dataclass(frozen=True)
class Lost:
    """The group's epoch cannot go on."""

    cause: str
    kind: LossKind
    #: nothing is wrong with what was to be started: it may well start with the same flags
    passing: bool


Effect = Order | Kill | Lost


class _Node:
    def __init__(self) -> None:
        self.session: str | None = None
        self.host = ""
        self.state: GroupState | None = None
        #: of the node: the epoch that belongs to the group's current one
        self.wanted: int | None = None
        #: the epoch that was ordered, until the node says that it is there
        self.ordered: int | None = None
        #: why it is not there
        self.reason = "it has not joined"


class Nodes:
    """The first node's view. Effects are in the order in which they have to be acted on."""

    def __init__(self, ranks: Collection[int]) -> None:
        """``ranks``: of the other nodes."""
        self._nodes = {rank: _Node() for rank in sorted(ranks)}

    def missing(self) -> list[str]:
        """Why the group cannot start now; empty: it can."""
        return [f"node {rank}: {why}" for rank, node in self._nodes.items() if (why := _not_free(node))]

    @property
    def ready(self) -> bool:
        return all(
            node.state is not None and node.state.epoch == node.wanted and node.state.phase == "ready"
            for node in self._nodes.values()
        )

    @property
    def busy(self) -> bool:
        """Ranks elsewhere may have to wait for one of theirs."""
        return any(node.state is not None and node.state.busy for node in self._nodes.values())

    def state(self, rank: int) -> GroupState | None:
        return self._nodes[rank].state

    def begin(self, start: StartNode) -> list[Effect]:
        """The group's next epoch. Only when nothing is `missing`."""
        assert not self.missing()
        effects: list[Effect] = []
        for node in self._nodes.values():
            assert node.state is not None and node.session is not None
            node.wanted = node.ordered = node.state.epoch + 1
            effects.append(Order(node.session, node.state.epoch, start))
        return effects

    def end(self, cause: str) -> list[Effect]:
        """The group's epoch is over. Whoever has not begun with it yet is told when it has."""
        effects: list[Effect] = []
        for node in self._nodes.values():
            node.wanted = None
            effects += _unwanted(node, cause)
        return effects

    def on_joined(self, rank: int, session: str, host: str, state: GroupState) -> list[Effect]:
        node = self._nodes[rank]
        node.session, node.host, node.state = session, host, state
        # Whatever it runs was not ordered in this session.
        node.wanted = node.ordered = None
        return _unwanted(node, "it is of an earlier session")

    def on_state(self, rank: int, state: GroupState) -> list[Effect]:
        node = self._nodes[rank]
        node.state = state
        if node.ordered is not None and state.epoch >= node.ordered:
            node.ordered = None
        if node.wanted is None:
            return _unwanted(node, "the group has ended this epoch")
        if state.epoch < node.wanted or (state.epoch == node.wanted and state.phase in RUNNING):
            return []
        node.wanted = None
        cause = state.cause if state.phase not in RUNNING else f"it went on to epoch {state.epoch} by itself"
        left = state.phase == "stopped"
        kind: LossKind = "left" if left else state.kind or "exit"
        lost = Lost(f"node {rank} ({node.host}): {cause}", kind, passing=left)
        if left and node.session is not None:
            # It waits for that, so that no other rank sees the end of its ranks before the reason is known.
            return [lost, Kill(node.session, state.epoch, cause)]
        return [lost, *_unwanted(node, cause)]

    def on_left(self, rank: int, reason: str, kind: LossKind) -> list[Effect]:
        """Its session is over."""
        node = self._nodes[rank]
        wanted = node.wanted
        node.session = node.state = node.wanted = node.ordered = None
        node.reason = reason
        if wanted is None:
            return []
        return [Lost(f"node {rank} ({node.host}): {reason}", kind, passing=True)]


def _not_free(node: _Node) -> str:
    if node.state is None:
        return node.reason
    if node.ordered is not None:
        return "it has not begun with what it was told"
    return f"its epoch {node.state.epoch} has not ended" if node.state.phase in RUNNING else ""


def _unwanted(node: _Node, cause: str) -> list[Effect]:
    if node.session is None or node.state is None or node.state.phase not in RUNNING:
        return []
    return [Kill(node.session, node.state.epoch, cause)]


class Follower:
    """Another node's part: what it was told to start, and has not yet."""

    def __init__(self) -> None:
        self.order: StartNode | None = None

    def on_order(self, after: int, order: StartNode, *, epoch: int, running: bool) -> bool:
        """``epoch``: the node's last one. False: it is meant for another state of this node, so not to be done."""
        if after != epoch or running or self.order is not None:
            return False
        self.order = order
        return True

    def on_over(self) -> None:
        """The session with the first node is over, and its orders with it."""
        self.order = None

    def take(self) -> StartNode:
        assert self.order is not None
        order, self.order = self.order, None
        return order
