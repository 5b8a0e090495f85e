"""A weight update that goes from group to group: whatever is lost meanwhile, requests begin and end somewhere."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.control.rolling import Done, Refuse, RollingUpdate, Switch, Take, Wait


def rolling(**fields: bool) -> RollingUpdate:
    return RollingUpdate("old", "new", **({"old_replayable": True} | fields))


def test_two_groups_one_after_the_other() -> None:
    course = rolling()
    assert course.next({0: "old", 1: "old"}, 5) == Take(0, last=False)
    assert course.next({0: "new", 1: "old"}, 5) == Switch()
    course.switched = True
    assert course.next({0: "new", 1: "old"}, 5) == Take(1, last=True)
    assert isinstance(course.next({0: "new"}, 5), Wait)
    assert course.next({0: "new", 1: "new"}, 0) == Done()


def test_requests_begin_with_the_new_weights_when_half_of_the_groups_have_them() -> None:
    course = rolling(proven=True)
    for new in range(5):
        serving = {group: "new" if group < new else "old" for group in range(5)}
        assert course.next(serving, 0) == (Switch() if new >= 3 else Take(new, last=False))


def test_the_only_group_is_not_taken() -> None:
    assert isinstance(rolling().next({0: "old"}, 0), Wait)
    assert isinstance(rolling().next({}, 0), Wait)


def test_a_group_that_starts_has_the_old_weights_while_nobody_else_has_them_and_they_are_needed() -> None:
    course = rolling()
    assert course.starts_with({0: "old"}, 0) == "old", "nobody knows yet whether the new ones can be loaded"
    course.proven = True
    assert course.starts_with({0: "old"}, 9) == "new"
    assert course.starts_with({0: "new"}, 0) == "old", "requests still begin with them"
    course.switched = True
    assert course.starts_with({0: "new"}, 1) == "old"
    assert course.starts_with({0: "new"}, 0) == "new"


def test_weights_that_nobody_can_have_again_are_given_up() -> None:
    course = rolling(old_replayable=False)
    assert course.starts_with({}, 9) == "new"
    assert isinstance(course.next({}, 9), Wait)
    assert course.next({0: "new"}, 9) == Switch()
    course.switched = True
    assert course.next({0: "new"}, 9) == Refuse()


class World:
    """Groups that are taken, lost and start again; requests that begin and end."""

    def __init__(self, groups: int, replayable: bool) -> None:
        self.course = rolling(old_replayable=replayable)
        self.groups: dict[int, str | None] = dict.fromkeys(range(groups), "old")
        self.taken: int | None = None
        self.running = {"old": 0, "new": 0}

    @property
    def serving(self) -> dict[int, str]:
        return {group: weights for group, weights in self.groups.items() if weights and group != self.taken}

    def begin(self) -> None:
        weights = "new" if self.course.switched else "old"
        if weights in self.serving.values():
            self.running[weights] += 1

    def start(self, group: int) -> None:
        if self.groups[group] is None:
            self.groups[group] = self.course.starts_with(self.serving, self.running["old"])

    def lose(self, group: int) -> None:
        self.groups[group] = None
        self.taken = None if self.taken == group else self.taken

    def go(self, loads: bool) -> bool:
        """One step of the driver; whether it is done."""
        if self.taken is not None:
            if not loads:
                return False
            self.groups[self.taken], self.taken, self.course.proven = "new", None, True
            return False
        before = self.serving
        step = self.course.next(before, self.running["old"])
        if isinstance(step, Take):
            rest = [group for group, weights in before.items() if weights == "old" and group != step.group]
            assert step.last == (not rest) and self.course.switched >= step.last
            if not step.last or not self.running["old"]:
                self.taken = step.group
            begins = "new" if self.course.switched else "old"
            left = begins not in before.values() or begins in self.serving.values()
            assert left, "a step left nobody that requests can begin on"
        elif isinstance(step, Switch):
            assert "new" in before.values() and not self.course.switched
            self.course.switched = True
        elif isinstance(step, Refuse):
            assert self.course.switched and "old" not in before.values() and not self.course.old_replayable
            self.running["old"] = 0
        return isinstance(step, Done)


@settings(max_examples=300, deadline=None)
@given(
    groups=st.integers(2, 5),
    replayable=st.booleans(),
    events=st.lists(
        st.tuples(st.sampled_from(["begin", "end", "lose", "start", "go"]), st.integers(0, 4)), max_size=60
    ),
)
def test_whatever_happens_it_comes_to_an_end(groups: int, replayable: bool, events: list[tuple[str, int]]) -> None:
    world = World(groups, replayable)
    for event, value in events:
        if event == "begin":
            world.begin()
        elif event == "end" and world.serving:
            for weights in world.running.keys() & set(world.serving.values()):
                world.running[weights] = max(0, world.running[weights] - 1)
        elif event == "lose":
            world.lose(value % groups)
        elif event == "start":
            world.start(value % groups)
        elif event == "go" and world.go(loads=value > 0):
            break
        new = "new" in world.serving.values()
        assert world.course.proven or not new or not replayable
    # From here on nothing is lost.
    for _ in range(20 * groups):
        for group in range(groups):
            world.start(group)
        for weights in set(world.serving.values()) & world.running.keys():
            world.running[weights] = max(0, world.running[weights] - 1)
        if world.go(loads=True):
            break
        if not any(world.running.values()) and set(world.groups.values()) == {"new"} and world.go(True):
            break
    else:
        pytest.fail(f"never done: {world.groups} {world.running} {world.course}")
    assert set(world.groups.values()) <= {"new", None} and not world.running["old"]


def test_no_two_names_of_the_same_weights() -> None:
    with pytest.raises(AssertionError):
        RollingUpdate("same", "same", old_replayable=True)
