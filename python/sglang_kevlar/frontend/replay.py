"""What was changed at run time and a group that starts again does not know: replayed to it before it serves.

No two groups ever serve different weights unnoticed. What can be replayed (weights from disk, adapters, the weight
version's name, a pause) is; after an update that only live processes received (from tensors, a distributed group or
IPC) a group that starts again stays out of service, with that as its named reason.
"""

from __future__ import annotations

import os
import pickle
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqInput,
    ContinueGenerationReqInput,
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
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromIPCReqInput,
    UpdateWeightsFromTensorReqInput,
)
_WEIGHTS = (*_LIVE_ONLY, UpdateWeightFromDiskReqInput)


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
        #: a frontend before this one left changes behind
        self.inherited = file is not None and os.path.exists(file)
        if self.inherited:
            with open(file, "rb") as saved:  # type: ignore[arg-type]
                self._changes, self._up_to_date = pickle.load(saved)
        #: the request of the last change, and what stood before it
        self._before: tuple[Any, _Changes] = (None, self._changes)

    @property
    def not_replayable(self) -> str | None:
        """Why a group that starts again must not serve; None while everything can be replayed."""
        return self._changes.not_replayable

    def is_change(self, request: Any) -> bool:
        """Whether groups that did not do what ``request`` asks for differ from those that did."""
        return self._changed(request) is not self._changes

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
            pickle.dump((self._changes, self._up_to_date), out)
        os.replace(f"{self._file}.new", self._file)

    def record(self, request: Any) -> None:
        """``request`` was sent to the groups that serve. Whatever changes nothing is ignored."""
        changes = self._changed(request)
        if changes is not self._changes:
            self._before = (request, self._changes)
            self._changes = changes
            self._save()

    def retract(self, request: Any) -> None:
        """No group did what ``request`` asked for, so none must later. Ignored unless it is the last change."""
        last, before = self._before
        if last is request:
            self._changes = before
            self._save()

    def _changed(self, request: Any) -> _Changes:
        now = self._changes
        if isinstance(request, UpdateWeightFromDiskReqInput):
            return replace(now, weights=request, content=uuid.uuid4().hex, not_replayable=None)
        if isinstance(request, _LIVE_ONLY):
            why = (
                f"model weights were changed by {type(request).__name__.removesuffix('ReqInput')}, which only the "
                f"running groups received; update from disk, or restart the server, to bring it back"
            )
            return replace(now, content=uuid.uuid4().hex, not_replayable=why)
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

    def replay(self) -> list[Any]:
        """The requests that bring a fresh group up to date, in order."""
        now = self._changes
        return [change for change in (now.weights, now.version, *self.adapters, now.pause) if change is not None]
