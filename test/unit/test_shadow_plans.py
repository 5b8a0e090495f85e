"""What groups are told about shadows: all that is news, and nothing twice."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest

from frontend_fakes import plan  # before sglang
from sglang_kevlar.control.shadow_partners import Place, partners
from sglang_kevlar.frontend.shadows import ShadowPlans
from sglang_kevlar.protocol.launch import KevlarArgs, Paths
from sglang_kevlar.protocol.shadow import ShadowTarget

ACTIVE = 3


@dataclass(frozen=True)
class Channel:
    group: int
    epoch: int
    place: Place
    ours: bool = True
    weights: str = "w"

    def tells_plans(self) -> bool:
        return self.ours


def channel(group: int, epoch: int, active: int = ACTIVE) -> Channel:
    return Channel(group, epoch, Place(str(group), standby=group >= active))


def plans_of(active: int = ACTIVE, **flags: Any) -> ShadowPlans:
    args = KevlarArgs(worker_groups=5, standby_groups=5 - active, **flags)
    return ShadowPlans(plan(args), Paths("/run"))


def news_of(plans: ShadowPlans, channels: list, draining=(), weights: str = "w") -> list:
    return plans.news([replace(each, weights=weights) for each in channels], draining)


def told(plans: ShadowPlans, epochs: dict[int, int], draining=(), content: str = "w", active: int = ACTIVE) -> dict:
    """(content, target's group and epoch) by (group, epoch) of those that are told something."""
    news = news_of(plans, [channel(group, epoch, active) for group, epoch in epochs.items()], draining, content)
    assert len({channel for channel, _ in news}) == len(news)
    return {(channel.group, channel.epoch): (plan.content, as_pair(plan.target)) for channel, plan in news}


def as_pair(target: ShadowTarget | None) -> tuple[int, int] | None:
    if target is None:
        return None
    assert target.endpoints == [f"ipc:///run/g{target.name}e{target.epoch}.shadow0"]
    return int(target.name), target.epoch


def test_news_only():
    plans = plans_of()
    assert told(plans, {0: 1}) == {(0, 1): ("w", None)}
    assert told(plans, {0: 1}) == {}
    assert told(plans, {0: 1, 1: 1}) == {(0, 1): ("w", (1, 1)), (1, 1): ("w", (0, 1))}
    # A third joins the ring: the first's target stays as it is.
    assert told(plans, {0: 1, 1: 1, 2: 1}) == {(1, 1): ("w", (2, 1)), (2, 1): ("w", (0, 1))}
    assert plans.targets == {0: 1, 1: 2, 2: 0}
    # One is lost: only who shadowed to it hears of it.
    assert told(plans, {0: 1, 2: 1}) == {(0, 1): ("w", (2, 1))}
    # It returns as another incarnation, which knows nothing.
    assert told(plans, {0: 1, 1: 2, 2: 1}) == {(0, 1): ("w", (1, 2)), (1, 2): ("w", (2, 1))}
    assert told(plans, {0: 1, 1: 2, 2: 1}) == {}


def test_a_group_that_was_replaced_before_anybody_noticed():
    plans = plans_of()
    told(plans, {0: 1, 1: 1})
    assert told(plans, {0: 1, 1: 2}) == {(0, 1): ("w", (1, 2)), (1, 2): ("w", (0, 1))}
    # Also one that is told of again after it was not up to date for a while.
    assert told(plans, {0: 1}) == {(0, 1): ("w", None)}
    assert told(plans, {0: 1, 1: 2}) == {(0, 1): ("w", (1, 2)), (1, 2): ("w", (0, 1))}


def test_while_the_weights_change_there_is_no_content_and_then_another():
    plans = plans_of()
    up = {0: 1, 1: 1}
    told(plans, up, content="old")
    assert told(plans, up, content="") == {(0, 1): ("", (1, 1)), (1, 1): ("", (0, 1))}
    assert told(plans, up, content="") == {}
    # One that joins meanwhile is told no more than the others.
    assert told(plans, {**up, 1: 2}, content="") == {(0, 1): ("", (1, 2)), (1, 2): ("", (0, 1))}
    assert told(plans, {**up, 1: 2}, content="new") == {(0, 1): ("new", (1, 2)), (1, 2): ("new", (0, 1))}
    # Weights that could not be changed keep their name, and everybody hears it again.
    assert told(plans, {**up, 1: 2}, content="")
    assert len(told(plans, {**up, 1: 2}, content="new")) == 2


def test_who_drains_stops_to_keep_shadows_and_keeps_its_own():
    plans = plans_of()
    up = {0: 1, 1: 1, 2: 1}
    told(plans, up)
    assert told(plans, up, draining=[1]) == {(0, 1): ("w", (2, 1))}
    assert plans.targets[1] == 2
    assert told(plans, up) == {(0, 1): ("w", (1, 1))}


def test_standbys():
    plans = plans_of(2)
    first = told(plans, {0: 1, 1: 1, 2: 5}, active=2)
    assert first == {(0, 1): ("w", (2, 5)), (1, 1): ("w", (2, 5)), (2, 5): ("w", (0, 1))}
    assert told(plans, {1: 1, 2: 5}, active=2) == {(2, 5): ("w", (1, 1))}


@pytest.mark.parametrize("seed", range(3))
def test_who_acts_on_all_news_knows_the_whole_plan(seed):
    dice = random.Random(seed)
    plans = plans_of()
    epochs: dict[int, int] = {}
    next_epoch = 1
    knows: dict[tuple[int, int], tuple] = {}
    content = "w0"
    for step in range(300):
        group = dice.randrange(5)
        if dice.random() < 0.4:
            epochs.pop(group, None)
        elif group not in epochs or dice.random() < 0.2:
            epochs[group] = next_epoch
            next_epoch += 1
        if dice.random() < 0.2:
            content = "" if content else f"w{step}"
        draining = {group for group in epochs if dice.random() < 0.1}
        before = plans.targets
        news = told(plans, epochs, draining, content)
        assert not news.items() & knows.items(), "nothing is told twice"
        knows = {who: what for who, what in {**knows, **news}.items() if who in epochs.items()}
        targets = partners({g: channel(g, 1).place for g in epochs}, draining, before)
        assert plans.targets == targets
        for source, epoch in epochs.items():
            target = targets.get(source)
            assert knows[source, epoch] == (content, None if target is None else (target, epochs[target]))


def test_others_are_told_where_the_ranks_listen_and_those_of_this_launch_their_files():
    plans = plans_of()
    here = Channel(0, 1, Place("0", endpoints=("tcp://a:1",)))
    beside = Channel(1, 1, Place("1"))
    there = Channel(7, 3, Place("b7", "b", local=False, endpoints=("tcp://b:1",)))
    news = {who.group: plan.target for who, plan in news_of(plans, [here, beside, there])}
    assert news == {0: ShadowTarget("b7", 3, ["tcp://b:1"]), 1: news[0], 7: ShadowTarget("0", 1, ["tcp://a:1"])}
    news = {who.group: plan.target for who, plan in news_of(plans, [here, beside])}
    assert news[0] == ShadowTarget("1", 1, ["ipc:///run/g1e1.shadow0"])
    # It listens elsewhere now, though its epoch is the same: its launch was another.
    news_of(plans, [here, there])
    moved = Channel(7, 3, Place("b7", "b", local=False, endpoints=("tcp://b:2",)))
    assert [plan.target for _, plan in news_of(plans, [here, moved])] == [ShadowTarget("b7", 3, ["tcp://b:2"])]


def test_with_tcp_for_all_those_of_this_launch_are_told_that_too():
    plans = plans_of(shadow_transport="tcp")
    channels = [Channel(group, 1, Place(str(group), endpoints=(f"tcp://a:{group}",))) for group in range(2)]
    news = {who.group: plan.target for who, plan in news_of(plans, channels)}
    assert news == {0: ShadowTarget("1", 1, ["tcp://a:1"]), 1: ShadowTarget("0", 1, ["tcp://a:0"])}


def test_a_group_that_another_frontend_tells_is_told_once_it_is_ours() -> None:
    plans = plans_of()
    here, shared = channel(0, 1), Channel(1, 1, Place("x", local=False, endpoints=("tcp://x:1",)), ours=False)
    news = news_of(plans, [here, shared])
    assert [(who.group, plan.target.name) for who, plan in news] == [(0, "x")], "its store may be a target all the same"
    ours = Channel(1, 1, shared.place)
    assert [who.group for who, _ in news_of(plans, [here, ours])] == [1]


def test_weights_have_another_name_in_another_version_of_the_software() -> None:
    plans = plans_of()
    groups = [Channel(number, 1, Place(str(number), version=v)) for number, v in enumerate(("1", "1", "2"))]
    news = {who.group: plan for who, plan in news_of(plans, groups)}
    assert news[0].content == news[1].content != news[2].content and news[2].target is None
    assert news_of(plans, groups) == []
    assert {plan.content for _, plan in news_of(plans, groups, weights="")} == {""}, (
        "while they change there is no name"
    )
