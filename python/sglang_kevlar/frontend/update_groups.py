"""Process groups by which a trainer sends weights: which ranks of which worker groups are in them.

Upstream gives rank ``rank_offset + tp_rank`` to every rank of *its* engine. Several worker groups have to take
consecutive ranks, and a collective in which one of them is missing would hang the others until the deadline.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from fastapi import HTTPException
from sglang.srt.managers.io_struct import (
    DestroyWeightsUpdateGroupReqInput,
    InitWeightsUpdateGroupReqInput,
    UpdateWeightsFromDistributedReqInput,
)

GroupEpoch = tuple[int, int]


class UpdateGroups:
    def __init__(self, tp_size: int) -> None:
        self._tp_size = tp_size
        #: name -> the incarnations that joined it
        self._members: dict[str, frozenset[GroupEpoch]] = {}

    def messages(self, request: Any, serving: Collection[GroupEpoch]) -> dict[GroupEpoch, Any]:
        """What each group that serves is to be sent. Raises HTTPException 400 for what would hang."""
        if isinstance(request, InitWeightsUpdateGroupReqInput):
            return self._init(request, sorted(serving))
        if isinstance(request, DestroyWeightsUpdateGroupReqInput):
            self._members.pop(request.group_name, None)
        elif isinstance(request, UpdateWeightsFromDistributedReqInput):
            members = self._members.get(request.group_name)
            if members is not None and members != frozenset(serving):
                raise HTTPException(
                    400,
                    f"update_weights_from_distributed: {request.group_name!r} was made with the ranks of "
                    f"{_names(members)}, and {_names(serving)} serve now; destroy it and make it anew",
                )
        return dict.fromkeys(serving, request)

    def _init(self, request: Any, serving: list[GroupEpoch]) -> dict[GroupEpoch, Any]:
        ranks = len(serving) * self._tp_size
        if request.rank_offset + ranks > request.world_size:
            raise HTTPException(
                400,
                f"init_weights_update_group: {len(serving)} worker groups with {self._tp_size} ranks each serve, so "
                f"ranks {request.rank_offset} to {request.rank_offset + ranks - 1} are taken: world_size must be at "
                f"least {request.rank_offset + ranks}, got {request.world_size}",
            )
        self._members[request.group_name] = frozenset(serving)
        return {
            member: msgspec.structs.replace(request, rank_offset=request.rank_offset + index * self._tp_size)
            for index, member in enumerate(serving)
        }


def _names(members: Collection[GroupEpoch]) -> str:
    return ", ".join(f"worker group {group} (epoch {epoch})" for group, epoch in sorted(members)) or "no worker groups"
