"""Upstream's messages between hosts: typed msgpack, and no pickle in either direction.

On one host upstream pickles them, or wraps what it pickles of them. Here only the types listed travel, each is decoded
as what it is declared to be, and what could only be pickled is refused by name.
"""

from __future__ import annotations

import copy
from array import array
from typing import Any, Union

import msgspec
import numpy as np
import torch
from sglang.srt.managers import io_struct
from sglang.srt.utils.msgpack_utils import dec_hook, enc_hook, ext_hook

from sglang_kevlar.worker.resume import ResumedGenerateReqInput, ShadowPlanReq, StartedReqOutput
from sglang_kevlar.worker.weights.messages import (
    FetchWeightsReq,
    FetchWeightsReqOutput,
    ServeWeightsReq,
    ServeWeightsReqOutput,
)

#: Control requests that read, and change nothing: any frontend may ask. By the type of their answer.
READS: dict[type, type] = {
    io_struct.GetInternalStateReq: io_struct.GetInternalStateReqOutput,
    io_struct.GetWeightsByNameReqInput: io_struct.GetWeightsByNameReqOutput,
    io_struct.CheckWeightsReqInput: io_struct.CheckWeightsReqOutput,
}

#: Control requests after which the group gives other answers than one that has started anew.
CHANGES: tuple[type, ...] = (
    io_struct.UpdateWeightFromDiskReqInput,
    io_struct.UpdateWeightVersionReqInput,
    io_struct.UpdateWeightsFromDistributedReqInput,
    io_struct.BeginWeightUpdateReqInput,
    io_struct.EndWeightUpdateReqInput,
    io_struct.LoadLoRAAdapterReqInput,
    io_struct.UnloadLoRAAdapterReqInput,
    FetchWeightsReq,
)

#: to a group. Not here, for what they carry is pickled or a handle of one host: updates and adapters from tensors, IPC
#: updates. Not here either: what the launcher or one scheduler alone is concerned with.
_TO_GROUP: tuple[type, ...] = (
    io_struct.TokenizedGenerateReqInput,
    io_struct.TokenizedEmbeddingReqInput,
    ResumedGenerateReqInput,
    io_struct.AbortReq,
    ShadowPlanReq,
    *READS,
    *CHANGES,
    ServeWeightsReq,
    io_struct.FlushCacheReqInput,
    io_struct.PauseGenerationReqInput,
    io_struct.ContinueGenerationReqInput,
    io_struct.InitWeightsUpdateGroupReqInput,
    io_struct.DestroyWeightsUpdateGroupReqInput,
    io_struct.ReleaseMemoryOccupationReqInput,
    io_struct.ResumeMemoryOccupationReqInput,
    io_struct.SetInternalStateReq,
    io_struct.ProfileReq,
    io_struct.ExpertDistributionReq,
    io_struct.SlowDownReqInput,
    io_struct.FreezeGCReq,
    io_struct.ConfigureLoggingReq,
)
_FROM_GROUP: tuple[type, ...] = (
    io_struct.BatchStrOutput,
    io_struct.BatchTokenIDOutput,
    io_struct.BatchEmbeddingOutput,
    io_struct.AbortReq,
    StartedReqOutput,
    *READS.values(),
    io_struct.FlushCacheReqOutput,
    io_struct.UpdateWeightFromDiskReqOutput,
    io_struct.UpdateWeightVersionReqOutput,
    io_struct.UpdateWeightsFromDistributedReqOutput,
    io_struct.InitWeightsUpdateGroupReqOutput,
    io_struct.DestroyWeightsUpdateGroupReqOutput,
    io_struct.BeginWeightUpdateReqOutput,
    io_struct.EndWeightUpdateReqOutput,
    io_struct.ReleaseMemoryOccupationReqOutput,
    io_struct.ResumeMemoryOccupationReqOutput,
    io_struct.LoRAUpdateOutput,
    io_struct.SetInternalStateReqOutput,
    io_struct.ProfileReqOutput,
    io_struct.ExpertDistributionReqOutput,
    io_struct.SlowDownReqOutput,
    ServeWeightsReqOutput,
    FetchWeightsReqOutput,
)

#: fields that upstream pickles: with what none of them has, a scheduler makes its own, and a frontend reports no times
_DROPPED = "time_stats"
_REFUSED = ("customized_info",)
#: of upstream's extension types, those that are values and no handles of one host
_ARRAY, _TENSOR, _NUMPY = 1, 2, 3


class NotForNetwork(ValueError):
    """This message cannot go to, or come from, another host; the text says why."""


def reads(message: Any) -> bool:
    return type(message) in READS


def encode(message: Any) -> bytes:
    """Raises NotForNetwork."""
    kind = type(message)
    if kind not in _TO_GROUP and kind not in _FROM_GROUP:
        raise NotForNetwork(f"{kind.__name__} is not sent to groups on other hosts")
    for field in _REFUSED:
        if getattr(message, field, None) is not None:
            raise NotForNetwork(f"{kind.__name__}.{field} is not sent to other hosts")
    if getattr(message, _DROPPED, None) is not None or hasattr(message, "sampling_params"):
        message = copy.copy(message)
        if hasattr(message, _DROPPED):
            message.time_stats = None
        _with_text_keys(message)
    try:
        return _encoder.encode(message)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise NotForNetwork(f"{kind.__name__}: {error}"[:300]) from error


def decode_request(payload: bytes) -> Any:
    """What a frontend sent to a group. Raises NotForNetwork."""
    return _decode(_request_decoder, payload)


def decode_answer(payload: bytes) -> Any:
    """What a group sent to a frontend. Raises NotForNetwork."""
    return _decode(_answer_decoder, payload)


def _decode(decoder: msgspec.msgpack.Decoder[Any], payload: bytes) -> Any:
    try:
        message = decoder.decode(payload)
    except Exception as error:  # upstream's hooks raise all kinds of things of bytes that are none of theirs
        raise NotForNetwork(f"it cannot be read: {error}"[:300]) from error
    for field in (_DROPPED, *_REFUSED):
        if getattr(message, field, None) is not None:
            raise NotForNetwork(f"{type(message).__name__}.{field} came from another host")
    return message


def _with_text_keys(message: Any) -> None:
    sampling = getattr(message, "sampling_params", None)
    if sampling is not None and isinstance(sampling.logit_bias, dict):
        message.sampling_params = sampling = copy.copy(sampling)
        sampling.logit_bias = {str(token): bias for token, bias in sampling.logit_bias.items()}


def _enc_hook(value: object) -> object:
    if isinstance(value, array | torch.Tensor | np.ndarray | np.floating | np.integer | np.bool_):
        return enc_hook(value)
    raise TypeError(f"a {type(value).__name__} is not sent to other hosts")


def _ext_hook(code: int, data: memoryview) -> object:
    if code not in (_ARRAY, _TENSOR, _NUMPY):
        raise NotForNetwork(f"extension type {code} does not come from other hosts")
    return ext_hook(code, data)


def _decoder_of(kinds: tuple[type, ...]) -> msgspec.msgpack.Decoder[Any]:
    # Lax, as what upstream pickles is: `16.0` where an integer is declared.
    return msgspec.msgpack.Decoder(Union[kinds], strict=False, dec_hook=dec_hook, ext_hook=_ext_hook)  # noqa: UP007


_encoder = msgspec.msgpack.Encoder(enc_hook=_enc_hook)
_request_decoder = _decoder_of(_TO_GROUP)
_answer_decoder = _decoder_of(_FROM_GROUP)
