"""Whether a scheduler can take a message, asked before anything is opened for it.

Upstream checks little of what a client sends (`regex: 5`, `top_k: 10**30` pass). What cannot be encoded would raise
in the middle of a decision here, now or at the next failover; what has another type than declared ends the scheduler
that receives it, where it is decoded (msgpack) or first used (pickle, upstream's default), and then the next one.
"""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import msgspec
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput, TokenizedGenerateReqInput
from sglang.srt.utils.msgpack_utils import dec_hook, enc_hook, ext_hook

#: sampling parameters that schedulers put into int32 tensors; larger ones raise there
_INT32 = ("top_k", "min_new_tokens")
#: what encoding and decoding raise of a message that is wrong
_ERRORS = (msgspec.MsgspecError, pickle.PicklingError, TypeError, ValueError, OverflowError, RecursionError)
#: longest cause that is repeated to a client
_CAUSE_LENGTH = 200

#: of messages that are pickled: types as declared, but `16.0` for `16` is fine, as it is upstream
_encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook)
_lax_decoders = {
    kind: msgspec.msgpack.Decoder(kind, strict=False, dec_hook=dec_hook, ext_hook=ext_hook)
    for kind in (TokenizedGenerateReqInput, TokenizedEmbeddingReqInput)
}


class Unsendable(ValueError):
    """A scheduler could not take this message. The text is for the client; upstream answers a ValueError with 400."""


def check_request(message: TokenizedGenerateReqInput | TokenizedEmbeddingReqInput) -> None:
    """Raises Unsendable, naming the request. Costs one encoding and one decoding: 5 to 10 us for 2,000 tokens."""
    try:
        if message.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            # Upstream answers nothing to such an id: its client would wait for ever.
            raise Unsendable(f"a request id must not start with {HEALTH_CHECK_RID_PREFIX}")
        if io_struct._USE_PICKLE_IPC:
            _check_types(message)
        else:
            check_message(message)
        for name in _INT32:
            if not -(2**31) <= getattr(message.sampling_params, name) < 2**31:
                raise Unsendable(f"sampling_params.{name}: it is out of range")
    except Unsendable as error:
        raise Unsendable(f"request {printable(message.rid)}: {error}") from error.__cause__


def check_message(message: Any) -> None:
    """Raises Unsendable. Uses the very codec of both ends."""
    try:
        if io_struct._USE_PICKLE_IPC:
            pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        else:
            io_struct.msgpack_decode(io_struct.msgpack_encode(message))
    except _ERRORS as error:
        raise Unsendable(_cause(message, error)) from error


def printable(text: str) -> str:
    """``text`` as it can go into a response: lone surrogates escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _check_types(message: Any) -> None:
    """As `check_message`, of a request that is pickled: without what may then be anything."""
    bare = copy.copy(message)
    bare.time_stats = bare.mm_inputs = bare.positional_embed_overrides = None
    sampling = bare.sampling_params
    if sampling.custom_params is not None or sampling.logit_bias is not None:
        bare.sampling_params = sampling = copy.copy(sampling)
        check_message(sampling.custom_params)
        sampling.custom_params = None
        if isinstance(sampling.logit_bias, dict):
            sampling.logit_bias = {str(token): bias for token, bias in sampling.logit_bias.items()}
    try:
        _lax_decoders[type(message)].decode(_encoder.encode(bare))
    except _ERRORS as error:
        raise Unsendable(_cause(message, error)) from error


def _cause(message: Any, error: Exception) -> str:
    if isinstance(error, msgspec.ValidationError):
        said, _, path = str(error).rpartition(" - at `$")
        return f"{_field(type(message), path)}: {said or error}"[:_CAUSE_LENGTH]
    if isinstance(error, UnicodeEncodeError):
        return "it contains text that is not valid Unicode (a lone surrogate)"
    if isinstance(error, OverflowError):
        return "it contains a number that is out of range"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return printable(str(error))[:_CAUSE_LENGTH]


def _field(kind: Any, path: str) -> str:
    """The name of what ``path`` (``[8][0]...``) leads to: upstream's structs travel as arrays."""
    names = []
    # The first element of a tagged struct is its tag.
    skip = 1
    for index in re.findall(r"^\[(\d+)]|(?<=])\[(\d+)]", path):
        place = int(index[0] or index[1]) - skip
        fields = msgspec.structs.fields(kind)
        if not 0 <= place < len(fields):
            break
        names.append(fields[place].encode_name)
        kind, skip = fields[place].type, 0
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            break
    return ".".join(names) or "message"
