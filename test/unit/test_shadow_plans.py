"""What groups are told about shadows: all that is news, and nothing twice."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

import frontend_fakes  # noqa: F401  (before sglang)
from sglang_kevlar.control.shadow_partners import partners
from sglang_kevlar.frontend.shadows import ShadowPlans


@dataclass(frozen=True)
class Channel:
    group: int
    epoch: int


def told(plans: ShadowPlans, epochs: dict[int, int], draining=(), content: str = "w") -> dict:
    """(content, target) by (group, epoch) of those that are told something."""
    news = plans.news([Channel(group, epoch) for group, epoch in epochs.items()], draining, content)
    assert len({channel for channel, _ in news}) == len(news)
    return {(channel.group, channel.epoch): (plan.content, plan.target) for channel, plan in news}


def test_news_only():
    plans = ShadowPlans(3)
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
    plans = ShadowPlans(2)
    told(plans, {0: 1, 1: 1})
    assert told(plans, {0: 1, 1: 2}) == {(0, 1): ("w", (1, 2)), (1, 2): ("w", (0, 1))}
    # Also one that is told of again after it was not up to date for a while.
    assert told(plans, {0: 1}) == {(0, 1): ("w", None)}
    assert told(plans, {0: 1, 1: 2}) == {(0, 1): ("w", (1, 2)), (1, 2): ("w", (0, 1))}


def test_while_the_weights_change_there_is_no_content_and_then_another():
    plans = ShadowPlans(2)
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
    plans = ShadowPlans(3)
    up = {0: 1, 1: 1, 2: 1}
    told(plans, up)
    assert told(plans, up, draining=[1]) == {(0, 1): ("w", (2, 1))}
    assert plans.targets[1] == 2
    assert told(plans, up) == {(0, 1): ("w", (1, 1))}


def test_standbys():
    plans = ShadowPlans(2)
    assert told(plans, {0: 1, 1: 1, 2: 5}) == {(0, 1): ("w", (2, 5)), (1, 1): ("w", (2, 5)), (2, 5): ("w", (0, 1))}
    assert told(plans, {1: 1, 2: 5}) == {(2, 5): ("w", (1, 1))}


@pytest.mark.parametrize("seed", range(3))
def test_who_acts_on_all_news_knows_the_whole_plan(seed):
    dice = random.Random(seed)
    plans = ShadowPlans(3)
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
        news = told(plans, epochs, draining, content)
        assert not news.items() & knows.items(), "nothing is told twice"
        knows = {who: what for who, what in {**knows, **news}.items() if who in epochs.items()}
        targets = partners(epochs, draining, 3)
        assert plans.targets == targets
        for source, epoch in epochs.items():
            target = targets.get(source)
            assert knows[source, epoch] == (content, None if target is None else (target, epochs[target]))
