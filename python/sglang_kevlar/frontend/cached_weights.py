"""Weights that worker groups map from upstream's weight cache daemons are not theirs to change."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.managers.io_struct import (
    CheckWeightsReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
)
from sglang.srt.runtime_context import get_model

from sglang_kevlar.frontend.replay import changes_weights


def refuse_writing(request: Any) -> None:
    """Upstream's scheduler ends when it is asked for this, or writes to the daemon's memory; so none is asked.

    Raises HTTPException 400.
    """
    if get_model().weight_cache_mode != "off" and _writes(request):
        raise HTTPException(
            400,
            f"{type(request).__name__.removesuffix('ReqInput')}: the weights are those of weight cache daemons "
            "(--weight-cache-mode client), which all groups and what else is attached to them share; start the daemons "
            "and the groups with other weights instead",
        )


def _writes(request: Any) -> bool:
    if isinstance(request, CheckWeightsReqInput):
        return request.action == "reset_tensors"
    if isinstance(request, ReleaseMemoryOccupationReqInput | ResumeMemoryOccupationReqInput):
        return not request.tags or GPU_MEMORY_TYPE_WEIGHTS in request.tags
    return changes_weights(request)
