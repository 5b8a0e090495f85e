"""What was changed at run time and a group that starts again does not know: replayed to it before it serves.

No two groups ever serve different weights unnoticed. What can be replayed (weights from disk, adapters, the weight
version's name, a pause) is; after an update that only live processes received (from tensors, a distributed group or
IPC) the weights themselves come from a group that has them (`frontend.weight_transfers`). While there is none, a group
that starts again stays out of service, with that as its named reason.
"""

from __future__ import annotations

import os
import pickle
import uuid
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqInput,
    ContinueGenerationReqInput,
    EndWeightUpdateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    PauseGenerationReqInput,
    UnloadLoRAAdapterReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromIPCReqInput,
    UpdateWeightsFromTensorReqInput,
    UpdateWeightVersionReqInput,
)

_LIVE_ONLY = (
    BeginWeightUpdateReqInput,
    EndWeightUpdateReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromIPCReqInput,
    UpdateWeightsFromTensorReqInput,
)
_WEIGHTS = (*_LIVE_ONLY, UpdateWeightFromDiskReqInput)

#: changes that can still be taken back. More than that are never under way at once.
_RECENT = 64


def changes_weights(request: Any) -> bool:
    return isinstance(request, _WEIGHTS)


@dataclass(frozen=True)
class _Changes:
    weights: UpdateWeightFromDiskReqInput | None = None
    version: UpdateWeightVersionReqInput | None = None
    adapters: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    pause: PauseGenerationReqInput | None = None
    #: names the weights; KV of one name is of no use under another
    content: str = "0"
    not_replayable: str | None = None


class RunTimeChanges:
    """The changes since start, as few as give the same state. Bounded by the number of loaded adapters."""

    def __init__(self, start_adapters: frozenset[str], file: str | None = None) -> None:
        """``start_adapters``: names from --lora-paths, which every fresh group has.

        ``file``: where the changes are kept for a frontend that takes over, with who has them (same user, in the
        private run directory). Without it they end with this process.
        """
        self._start_adapters = start_adapters
        self._file = file
        self._changes = _Changes()
        #: group -> epoch that has all changes
        self._up_to_date: dict[int, int] = {}
        #: names of groups that may have taken weights that no frontend knows of
        self._doubtful: set[str] = set()
        #: a frontend before this one left changes behind
        self.inherited = file is not None and os.path.exists(file)
        if self.inherited:
            with open(file, "rb") as saved:  # type: ignore[arg-type]
                self._changes, self._up_to_date, self._doubtful = pickle.load(saved)
        #: `_changes` is `_settled` with the `_recent` ones on top: each request with a name for the weights after it
        self._settled = self._changes
        self._recent: deque[tuple[Any, str]] = deque()
        #: while an update goes from group to group: what was before it; and whether no group has taken it yet
        self._old: _Changes | None = None
        self._unproven = False

    @property
    def not_replayable(self) -> str | None:
        """Why a group that starts again must not serve without the weights of one that has them; None while everything
        can be replayed."""
        return self._changes.not_replayable

    def is_change(self, request: Any) -> bool:
        """Whether groups that did not do what ``request`` asks for differ from those that did."""
        return self._after(self._changes, request, "") is not self._changes

    def has_all(self, group: int, epoch: int) -> bool:
        """Whether this incarnation was brought up to date, by this frontend or one before it."""
        return self._up_to_date.get(group) == epoch

    def set_up_to_date(self, group: int, epoch: int) -> None:
        self._up_to_date[group] = epoch
        self._save()

    def _save(self) -> None:
        if self._file is None:
            return
        with open(f"{self._file}.new", "wb") as out:
            changes = self._old if self._unproven and self._old is not None else self._changes
            pickle.dump((changes, self._up_to_date, self._doubtful), out)
        os.replace(f"{self._file}.new", self._file)

    def record(self, request: Any) -> None:
        """``request`` was sent to the groups that serve. Whatever changes nothing is ignored."""
        content = uuid.uuid4().hex
        changes = self._after(self._changes, request, content)
        if changes is self._changes:
            return
        self._recent.append((request, content))
        if len(self._recent) > _RECENT:
            self._settled = self._after(self._settled, *self._recent.popleft())
        self._changes = changes
        self._save()

    def begin_rolling(self, request: UpdateWeightFromDiskReqInput) -> None:
        """``request`` goes from group to group; no other change comes until `end_rolling`.

        For a frontend that takes over meanwhile it was never sent, until a group has taken it. After that it gives the
        new weights to all: it has no requests of the old ones.
        """
        assert self._old is None
        self._old, self._unproven = self._changes, True
        self.record(request)

    def sent_to(self, name: str) -> None:
        """Of the update that goes from group to group, to a group of this name: whatever comes, it may have it."""
        if self._unproven:
            self._doubtful.add(name)
            self._save()

    def is_doubtful(self, name: str) -> bool:
        """Whether a frontend before this one did not live to see which weights this group has. Asked once."""
        if self._unproven or name not in self._doubtful:
            return False
        self._doubtful.discard(name)
        self._save()
        return True

    def proven(self) -> None:
        """A group has taken the update that goes from group to group; the others do not have it yet."""
        if self._unproven:
            self._unproven = False
            self._up_to_date.clear()
            self._doubtful.clear()
            self._save()

    def end_rolling(self) -> None:
        self._old, self._unproven = None, False
        self._doubtful.clear()
        self._save()

    def retract(self, request: Any) -> None:
        """No group did what ``request`` asked for, so none must later. Others, also later ones, stay."""
        kept = deque(change for change in self._recent if change[0] is not request)
        if len(kept) == len(self._recent):
            return
        self._recent = kept
        self._changes = self._settled
        for change in kept:
            self._changes = self._after(self._changes, *change)
        self._save()

    def _after(self, now: _Changes, request: Any, content: str) -> _Changes:
        """``now`` itself when ``request`` changes nothing."""
        if isinstance(request, UpdateWeightFromDiskReqInput):
            version = now.version if request.weight_version is None else None
            return replace(now, weights=request, version=version, content=content, not_replayable=None)
        if isinstance(request, _LIVE_ONLY):
            why = (
                f"model weights were changed by {type(request).__name__.removesuffix('ReqInput')}, which only the "
                f"running groups received; update from disk, or restart the server, to bring it back"
            )
            version = now.version
            named = getattr(request, "weight_version", None)
            if named is None and version is None and now.weights is not None:
                named = now.weights.weight_version  # these are not replayed any more
            if named is not None:
                version = UpdateWeightVersionReqInput(new_version=named)
            return replace(now, version=version, content=content, not_replayable=why)
        if isinstance(request, UpdateWeightVersionReqInput):
            return replace(now, version=request)
        if isinstance(request, LoadLoRAAdapterReqInput | LoadLoRAAdapterFromTensorsReqInput):
            name = request.lora_name
            return replace(now, adapters={**now.adapters, name: (*now.adapters.get(name, ()), request)})
        if isinstance(request, UnloadLoRAAdapterReqInput):
            adapters = {name: changes for name, changes in now.adapters.items() if name != request.lora_name}
            if request.lora_name in self._start_adapters:
                adapters[request.lora_name] = (request,)
            return replace(now, adapters=adapters)
        if isinstance(request, PauseGenerationReqInput):
            return replace(now, pause=request if request.mode != "abort" else None)
        if isinstance(request, ContinueGenerationReqInput):
            return replace(now, pause=None)
        return now

    @property
    def content(self) -> str:
        return self._changes.content

    @property
    def weights(self) -> UpdateWeightFromDiskReqInput | None:
        return self._changes.weights

    @property
    def weight_version(self) -> str | None:
        """The operator's name of the weights, when it was changed."""
        version, weights = self._changes.version, self._changes.weights
        return version.new_version if version is not None else weights and weights.weight_version

    @property
    def paused(self) -> bool:
        return self._changes.pause is not None

    @property
    def adapters(self) -> list[Any]:
        """Loads and unloads, in order."""
        return [change for changes in self._changes.adapters.values() for change in changes]

    def replay(self, old: bool = False) -> list[Any]:
        """The requests that bring a fresh group up to date, in order. After updates that only live processes received,
        a group that has the weights by now. ``old``: to what was before an update that goes from group to group."""
        assert not old or self._old is not None
        now = self._old if old and self._old is not None else self._changes
        weights = now.weights if now.not_replayable is None else None
        return [change for change in (weights, now.version, *self.adapters, now.pause) if change is not None]
