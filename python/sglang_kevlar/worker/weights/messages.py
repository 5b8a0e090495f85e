"""Control requests by which the frontend has one group take over the weights of another."""

from __future__ import annotations

import msgspec
from sglang.srt.managers.io_struct import (
    BaseReq,
    BeginWeightUpdateReqInput,
    CheckWeightsReqInput,
    EndWeightUpdateReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromIPCReqInput,
    UpdateWeightsFromTensorReqInput,
)

#: what may write to the weights. Some of `CheckWeightsReqInput` does, too.
WRITERS = (
    BeginWeightUpdateReqInput,
    CheckWeightsReqInput,
    EndWeightUpdateReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromIPCReqInput,
    UpdateWeightsFromTensorReqInput,
)


class ServeWeightsReq(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """To a group that has them: each rank lets the same rank of another group have its weights, once.

    They are those that all requests before this one made; one that changes them ends it.
    """

    #: names the transfer, and admits to it
    ticket: str
    #: the other group is on another host
    network: bool = False


class ServeWeightsReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    ticket: str
    success: bool
    message: str = ""
    #: it may succeed in a moment: the weights are just being changed
    busy: bool = False
    #: where they are to be had, by rank
    endpoints: list[str] = msgspec.field(default_factory=list)


class FetchWeightsReq(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """To a group that does not serve: each rank takes the weights from the endpoint of its number."""

    ticket: str
    endpoints: list[str]
    #: seconds for all of it
    timeout: float


class FetchWeightsReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg, misc]
    """Success: every rank has them, and has compared the digests."""

    ticket: str
    success: bool
    message: str = ""
    busy: bool = False
    #: of all ranks
    bytes: int = 0


#: for `worker.resume.register_wire_types`
TYPES = (ServeWeightsReq, ServeWeightsReqOutput, FetchWeightsReq, FetchWeightsReqOutput)
