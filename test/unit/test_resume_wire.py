"""The wire message of a continued request."""

from __future__ import annotations

import pickle
from array import array
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
io_struct = pytest.importorskip("sglang.srt.managers.io_struct")

from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from sglang_kevlar.protocol.resume import ResumeState  # noqa: E402
from sglang_kevlar.worker.resume import (  # noqa: E402
    ResumedGenerateReqInput,
    as_resumed,
    register_wire_types,
    why_not_resumable,
)


def tokenized(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "rid": "abc~3",
        "input_text": "hello",
        "input_ids": array("q", [1, 2, 3]),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": SamplingParams(max_new_tokens=9, frequency_penalty=0.5),
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [4],
        "stream": True,
        "lora_id": "adapter",
        "cache_salt": "tenant",
        "extra_key": "key",
        "priority": 7,
    }
    return io_struct.TokenizedGenerateReqInput(**(fields | changes))


@pytest.mark.parametrize("pickled", [False, True])
def test_both_ends_understand_it(pickled: bool) -> None:
    register_wire_types()
    register_wire_types()
    original = tokenized()
    resume = ResumeState(output_ids=array("q", [5, 6, 7]), cached_tokens=2, input_logprobs_sent=True)
    sent = as_resumed(original, resume)
    if pickled:
        received = pickle.loads(pickle.dumps(sent, pickle.HIGHEST_PROTOCOL))
        received.sampling_params = original.sampling_params  # has no equality of its own
    else:
        received = io_struct.msgpack_decode(io_struct.msgpack_encode(sent))
    assert type(received) is ResumedGenerateReqInput
    assert received.resume == resume
    for name in original.__struct_fields__:
        assert getattr(received, name) == getattr(original, name), name
    # A fresh request still arrives as what it is.
    again = io_struct.msgpack_decode(io_struct.msgpack_encode(original))
    assert type(again) is io_struct.TokenizedGenerateReqInput


def test_the_journalled_request_stays_as_it_is() -> None:
    original = tokenized()
    before = io_struct.msgpack_encode(original)
    resumed = as_resumed(original, ResumeState(output_ids=array("q", [1])))
    resumed.rid = "abc~4"
    resumed.stream = False
    assert io_struct.msgpack_encode(original) == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"session_params": io_struct.SessionParams(id="s")}, "session"),
        ({"input_embeds": [[0.5]]}, "input embeddings"),
        ({"mm_inputs": io_struct.MultimodalProcessorOutput(mm_items=[])}, "multimodal"),
        ({"sampling_params": SamplingParams(beam_width=3)}, "beam search"),
        ({"return_hidden_states": True}, "hidden states"),
        ({"return_hidden_states": "last"}, None),
    ],
)
def test_what_cannot_be_continued_is_named(changes: dict[str, Any], reason: str | None) -> None:
    found = why_not_resumable(tokenized(**changes))
    assert (found is None) if reason is None else (found is not None and reason in found)
