"""Epochs of a group on several hosts: whatever is lost when, ranks that are started together are of one epoch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kevlar.control.nodes import RUNNING, Follower, Kill, Lost, Nodes, Order
from sglang_kevlar.protocol.cluster import GroupState
from sglang_kevlar.protocol.nodes import StartNode, decode, encode

MEETING = StartNode(host="10.0.0.1", port=1)


def state(epoch: int, phase: str, **more: object) -> GroupState:
    return GroupState(epoch=epoch, phase=phase, **more)


def joined(**states: GroupState) -> Nodes:
    nodes = Nodes(range(1, len(states) + 1))
    for rank, (host, said) in enumerate(states.items(), 1):
        assert nodes.on_joined(rank, f"s{rank}", host, said) == []
    return nodes


def test_it_waits_until_all_nodes_are_there() -> None:
    nodes = Nodes([1, 2])
    assert nodes.missing() == ["node 1: it has not joined", "node 2: it has not joined"]
    nodes.on_joined(1, "s1", "h1", state(0, "down"))
    assert nodes.missing() == ["node 2: it has not joined"]
    nodes.on_joined(2, "s2", "h2", state(7, "down"))
    assert nodes.missing() == []


def test_an_epoch_is_one_of_each_node_by_its_own_count() -> None:
    nodes = joined(h1=state(0, "down"), h2=state(7, "down"))
    assert nodes.begin(MEETING) == [Order("s1", 0, MEETING), Order("s2", 7, MEETING)]
    assert nodes.on_state(1, state(1, "ready")) == []
    assert not nodes.ready
    assert nodes.on_state(2, state(8, "starting")) == []
    assert not nodes.ready
    assert nodes.on_state(2, state(8, "ready")) == []
    assert nodes.ready


def test_what_ends_on_one_node_ends_on_all_and_is_named() -> None:
    nodes = joined(h1=state(0, "down"), h2=state(0, "down"))
    nodes.begin(MEETING)
    nodes.on_state(1, state(1, "ready"))
    nodes.on_state(2, state(1, "ready"))
    assert nodes.on_state(2, state(1, "down", cause="rank1 stopped", kind="stopped")) == [
        Lost("node 2 (h2): rank1 stopped", "stopped", passing=False)
    ]
    assert nodes.end("why") == [Kill("s1", 1, "why")]
    assert nodes.missing() == ["node 1: its epoch 1 has not ended"]
    assert nodes.on_state(1, state(1, "down")) == []
    assert nodes.missing() == []


def test_a_node_that_is_lost_is_waited_for_and_its_loss_held_against_nobody() -> None:
    nodes = joined(h1=state(0, "down"))
    nodes.begin(MEETING)
    nodes.on_state(1, state(1, "ready"))
    assert nodes.on_left(1, "nothing heard for 3.0 s", "network") == [
        Lost("node 1 (h1): nothing heard for 3.0 s", "network", passing=True)
    ]
    assert nodes.end("why") == []
    assert nodes.missing() == ["node 1: nothing heard for 3.0 s"]
    # It is there again before it has ended what it ran.
    assert nodes.on_joined(1, "s2", "h1", state(1, "ready")) == [Kill("s2", 1, "it is of an earlier session")]
    assert nodes.missing() == ["node 1: its epoch 1 has not ended"]


def test_a_node_that_stops_on_purpose_is_told_to_end_its_ranks_when_that_is_known() -> None:
    nodes = joined(h1=state(0, "down"))
    nodes.begin(MEETING)
    nodes.on_state(1, state(1, "ready"))
    lost, kill = nodes.on_state(1, state(1, "stopped", cause="this node shuts down"))
    assert isinstance(lost, Lost) and (lost.kind, lost.passing) == ("left", True)
    assert kill == Kill("s1", 1, "this node shuts down")


def test_no_second_order_before_the_first_is_answered() -> None:
    """Else it would not be known of which order the node's next epoch is."""
    nodes = joined(h1=state(0, "down"))
    nodes.begin(MEETING)
    assert nodes.end("rank0 exited") == []
    assert nodes.missing() == ["node 1: it has not begun with what it was told"]
    assert nodes.on_state(1, state(0, "down")) == []
    assert nodes.missing() == ["node 1: it has not begun with what it was told"]
    assert nodes.on_state(1, state(1, "starting")) == [Kill("s1", 1, "the group has ended this epoch")]
    nodes.on_state(1, state(1, "down"))
    assert nodes.missing() == []


def test_a_follower_does_only_what_is_meant_for_its_state() -> None:
    follower = Follower()
    assert not follower.on_order(1, MEETING, epoch=2, running=False)
    assert not follower.on_order(2, MEETING, epoch=2, running=True)
    assert follower.on_order(2, MEETING, epoch=2, running=False)
    assert not follower.on_order(2, MEETING, epoch=2, running=False)
    assert follower.take() == MEETING
    assert follower.on_order(2, MEETING, epoch=2, running=False)
    follower.on_over()
    assert follower.order is None


def test_orders_travel() -> None:
    assert decode(encode(MEETING)) == MEETING
    for wrong in (b"", b"x", encode(StartNode(host="h", port=0))):
        with pytest.raises(ValueError):
            decode(wrong)


# ---- all orders of events


@dataclass
class Node:
    """A later node, as its supervisor is, and both directions of its session."""

    orders: Follower = field(default_factory=Follower)
    epoch: int = 0
    phase: str = "down"
    meeting: StartNode | None = None
    session: str | None = None
    to_head: deque[GroupState] = field(default_factory=deque)
    to_node: deque[Order | Kill] = field(default_factory=deque)

    def say(self) -> None:
        if self.session is not None:
            self.to_head.append(state(self.epoch, self.phase))

    def end(self) -> None:
        if self.phase in RUNNING:
            self.phase = "down"
            self.say()


class World:
    """The first node's view and two others, with everything between them on its way for as long as it likes."""

    def __init__(self) -> None:
        self.head = Nodes([1, 2])
        self.nodes = {1: Node(), 2: Node()}
        self.meeting: StartNode | None = None
        self.sessions = self.epochs = 0
        self.lost: Lost | None = None

    def act(self, effects: list) -> None:
        for effect in effects:
            if isinstance(effect, Lost):
                self.lost = effect
                continue
            node = next((node for node in self.nodes.values() if node.session == effect.session), None)
            assert node is not None, "sent in a session that is over"
            node.to_node.append(effect)

    def step(self, what: str, rank: int) -> None:
        node = self.nodes[rank]
        if what == "join" and node.session is None:
            self.sessions += 1
            node.session = f"s{self.sessions}"
            self.act(self.head.on_joined(rank, node.session, f"h{rank}", state(node.epoch, node.phase)))
        elif what == "cut" and node.session is not None:
            node.session = None
            node.to_head.clear()
            node.to_node.clear()
            node.orders.on_over()
            node.end()
            self.act(self.head.on_left(rank, "cut", "network"))
        elif what == "to head" and node.to_head:
            self.act(self.head.on_state(rank, node.to_head.popleft()))
        elif what == "to node" and node.to_node:
            message = node.to_node.popleft()
            if isinstance(message, Kill):
                if message.epoch == node.epoch:
                    node.end()
            else:
                running = node.phase in RUNNING
                assert node.orders.on_order(message.after, message.start, epoch=node.epoch, running=running)
        elif what == "start" and node.orders.order is not None:
            node.epoch, node.phase, node.meeting = node.epoch + 1, "starting", node.orders.take()
            node.say()
        elif what == "ready" and node.phase == "starting":
            node.phase = "ready"
            node.say()
        elif what == "die":
            node.end()
        elif what == "begin" and self.meeting is None and not self.head.missing():
            self.epochs += 1
            self.meeting = StartNode(host="h", port=self.epochs)
            self.act(self.head.begin(self.meeting))
        elif what == "end" and self.meeting is not None:
            self.meeting = None
            self.act(self.head.end("rank0 exited"))
        if self.lost is not None and self.meeting is not None:
            self.meeting = None
            self.act(self.head.end(self.lost.cause))
        self.lost = None

    def check(self) -> None:
        if self.meeting is not None and self.head.ready:
            for node in self.nodes.values():
                # It may have died since, and not be heard yet; it has not started another one.
                assert node.meeting == self.meeting

    def settle(self) -> None:
        """Nothing else goes wrong."""
        for _ in range(50):
            for what in ("join", "to head", "to node", "start", "ready", "begin"):
                for rank in self.nodes:
                    for _ in range(5):
                        self.step(what, rank)
                        self.check()


STEPS = ("join", "cut", "to head", "to node", "start", "ready", "die", "begin", "end")


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from([1, 2])), max_size=150))
def test_a_group_that_is_ready_has_met_at_one_place_and_in_the_end_it_is_ready(steps: list[tuple[str, int]]) -> None:
    world = World()
    for what, rank in steps:
        world.step(what, rank)
        world.check()
    world.settle()
    assert world.meeting is not None and world.head.ready
    assert all(node.phase == "ready" for node in world.nodes.values())
