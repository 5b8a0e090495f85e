"""What a group that starts again is told of the changes it missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

from sglang.srt.managers.io_struct import (  # noqa: E402
    ContinueGenerationReqInput,
    FlushCacheReqInput,
    LoadLoRAAdapterReqInput,
    PauseGenerationReqInput,
    UnloadLoRAAdapterReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightVersionReqInput,
)

from sglang_kevlar.frontend.replay import RunTimeChanges, changes_weights  # noqa: E402

START = frozenset({"start"})


def load(name: str, path: str = "/p") -> Any:
    return LoadLoRAAdapterReqInput(lora_name=name, lora_path=path)


def unload(name: str) -> Any:
    return UnloadLoRAAdapterReqInput(lora_name=name)


def disk(path: str) -> Any:
    return UpdateWeightFromDiskReqInput(model_path=path)


def distributed() -> Any:
    return UpdateWeightsFromDistributedReqInput(names=["w"], dtypes=["float32"], shapes=[[1]])


def version(name: str) -> Any:
    return UpdateWeightVersionReqInput(new_version=name)


def after(*requests: Any) -> RunTimeChanges:
    changes = RunTimeChanges(START)
    for request in requests:
        changes.record(request)
    return changes


def test_nothing_changed():
    assert after().replay() == [] and after(FlushCacheReqInput()).replay() == []


def test_weights_then_version_then_adapters_then_pause():
    pause, adapter, name, weights = PauseGenerationReqInput(mode="retract"), load("a"), version("v"), disk("/w")
    assert after(pause, adapter, name, weights).replay() == [weights, name, adapter, pause]


def test_only_the_last_weights_and_version():
    last, name = disk("/2"), version("2")
    assert after(disk("/1"), version("1"), last, name).replay() == [last, name]


def test_live_updates_cannot_be_replayed_until_weights_come_from_disk():
    changes = after(distributed())
    assert "UpdateWeightsFromDistributed" in changes.not_replayable
    changes.record(load("a"))
    assert changes.not_replayable is not None
    changes.record(disk("/w"))
    assert changes.not_replayable is None
    assert changes_weights(distributed()) and changes_weights(disk("/w")) and not changes_weights(load("a"))


def test_adapters_in_the_order_of_their_loading_and_unloaded_ones_not():
    a, b, c = load("a"), load("b"), load("c")
    assert after(a, b, unload("a"), c).replay() == [b, c]
    again = load("a", "/other")
    assert after(a, b, unload("a"), again).replay() == [b, again]
    assert after(unload("a")).replay() == []


def test_adapters_of_the_start_are_unloaded_and_loaded_again():
    gone, back = unload("start"), load("start", "/new")
    assert after(gone).replay() == [gone]
    assert after(gone, back).replay() == [gone, back]
    gone_again = unload("start")
    assert after(gone, back, gone_again).replay() == [gone_again]


def test_a_pause_lasts_until_it_is_ended_and_an_abort_is_none():
    assert after(PauseGenerationReqInput(mode="in_place"), ContinueGenerationReqInput()).replay() == []
    assert after(PauseGenerationReqInput(mode="abort")).replay() == []


def test_it_stays_as_small_as_what_is_loaded():
    requests = [request for _ in range(50) for request in (load("a"), unload("a"), unload("start"), load("start"))]
    assert len(after(*requests).replay()) == 2


def test_what_no_group_did_is_taken_back():
    good, bad, adapter = disk("/good"), disk("/bad"), load("a")
    changes = after(good, adapter, bad)
    changes.record(FlushCacheReqInput())
    changes.retract(bad)
    assert changes.replay() == [good, adapter]
    changes.retract(bad)
    assert changes.replay() == [good, adapter]

    live = distributed()
    changes.record(live)
    changes.retract(live)
    assert changes.not_replayable is None

    failed = unload("a")
    changes.record(failed)
    changes.retract(failed)
    assert changes.replay() == [good, adapter]


def test_what_is_taken_back_takes_nothing_else_with_it():
    """Changes of different kinds overlap: one may fail after the next was recorded."""
    good, bad, adapter, other = disk("/good"), disk("/bad"), load("a"), load("b")
    changes = after(good, adapter, bad, other)
    content = changes.content
    changes.retract(adapter)
    assert changes.replay() == [bad, other] and changes.content == content
    changes.retract(bad)
    assert changes.replay() == [good, other] and changes.content != content

    live, weights = distributed(), disk("/w")
    changes = after(live, weights)
    changes.retract(weights)
    assert changes.not_replayable is not None
    changes.retract(live)
    assert changes.not_replayable is None


def test_old_changes_stay_although_they_can_no_longer_be_taken_back():
    first = load("first")
    changes = after(first, *(load(f"a{i}") for i in range(100)))
    assert len(changes.replay()) == 101
    changes.retract(first)
    assert changes.replay()[0] is first


def test_the_weight_version_is_the_last_one_named():
    named = UpdateWeightFromDiskReqInput(model_path="/w", weight_version="disk")
    assert after(version("old"), named).weight_version == "disk"
    assert after(version("old"), named).replay() == [named]
    assert after(named, version("new")).weight_version == "new"
    assert after(version("kept"), disk("/unnamed")).weight_version == "kept"
    live = UpdateWeightsFromDistributedReqInput(names=[], dtypes=[], shapes=[], weight_version="live")
    assert after(named, live).weight_version == "live"
    # The weights on disk have no name of their own, so a group that starts has to be told.
    unnamed = disk("/later")
    (weights, told) = after(live, unnamed).replay()
    assert weights is unnamed and told.new_version == "live"


def test_while_an_update_goes_from_group_to_group_there_are_two_states(tmp_path: Path) -> None:
    changes = RunTimeChanges(frozenset(), str(tmp_path / "changes"))
    first, adapter, second = disk("/first"), load("a"), disk("/second")
    for request in (first, adapter):
        changes.record(request)
    changes.set_up_to_date(0, 1)
    old = changes.content
    changes.begin_rolling(second)
    assert changes.replay(old=True) == [first, adapter] and changes.replay() == [second, adapter]
    assert changes.content != old

    # Until a group has taken it, it was never sent, for a frontend that takes over; but one may have it.
    changes.sent_to("0")
    after_a_crash = RunTimeChanges(frozenset(), str(tmp_path / "changes"))
    assert after_a_crash.replay() == [first, adapter] and after_a_crash.content == old
    assert not changes.is_doubtful("0") and not after_a_crash.is_doubtful("1")
    assert after_a_crash.is_doubtful("0") and not after_a_crash.is_doubtful("0"), "it starts anew once"

    changes.proven()
    changes.set_up_to_date(0, 1)
    after_a_crash = RunTimeChanges(frozenset(), str(tmp_path / "changes"))
    assert after_a_crash.replay() == [second, adapter] and after_a_crash.has_all(0, 1)
    assert not after_a_crash.is_doubtful("0") and not after_a_crash.has_all(1, 1)

    changes.retract(second)
    changes.end_rolling()
    assert changes.content == old and changes.replay() == [first, adapter]
    assert RunTimeChanges(frozenset(), str(tmp_path / "changes")).replay() == [first, adapter]
    with pytest.raises(AssertionError):
        changes.replay(old=True)
