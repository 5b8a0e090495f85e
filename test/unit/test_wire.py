"""What travels between hosts is what it was, of the types listed, and never a pickle."""

from __future__ import annotations

import pickle
import typing
from array import array
from typing import Any

import msgspec
import pytest

from frontend_fakes import AbortReq, BatchStrOutput, str_batch, tokenized
from sglang_kevlar.cluster import batches, wire
from sglang_kevlar.protocol.resume import ResumeState
from sglang_kevlar.worker.resume import StartedReqOutput, as_resumed

# isort: split
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import BatchEmbeddingOutput, BatchTokenIDOutput, FlushCacheReqInput

LENGTH = {"type": "length", "length": 3}


def test_requests_and_outputs_are_what_they_were() -> None:
    request = tokenized("r", [1, 2, 3])
    request.sampling_params.logit_bias = {5: 1.5}  # as a client of the Python API may give it
    request.time_stats = object()
    arrived = wire.decode_request(wire.encode(request))
    assert arrived.time_stats is None and arrived.sampling_params.logit_bias == {"5": 1.5}
    assert request.sampling_params.logit_bias == {5: 1.5} and request.time_stats is not None, "ours is left as it was"
    request.sampling_params.logit_bias, request.time_stats = {"5": 1.5}, None
    assert arrived == request and arrived.input_ids == array("q", [1, 2, 3])
    resumed = as_resumed(request, ResumeState(output_ids=array("q", [4, 5]), cached_tokens=1, input_logprobs_sent=True))
    assert wire.decode_request(wire.encode(resumed)) == resumed
    for output in (
        str_batch(("r", [7], "x", LENGTH)),
        AbortReq(rid="r"),
        StartedReqOutput(rid="r", recomputed_tokens=3),
    ):
        assert wire.decode_answer(wire.encode(output)) == output


def test_what_is_pickled_is_refused_in_both_directions() -> None:
    batch = str_batch(("r", [7], "x", None))
    batch.customized_info = {"a": object()}
    with pytest.raises(wire.NotForNetwork, match="customized_info"):
        wire.encode(batch)
    pickled = io_struct.PickleWrapper(pickle.dumps("x"))
    for field in ("customized_info", "time_stats"):
        batch = str_batch(("r", [7], "x", None))
        setattr(batch, field, pickled)
        with pytest.raises(wire.NotForNetwork, match=field):
            wire.decode_answer(msgspec.msgpack.Encoder(enc_hook=wire.enc_hook).encode(batch))
    for payload in (msgspec.msgpack.encode(pickled), pickle.dumps(tokenized("r", [1])), b"", b"\xc1"):
        for decode in (wire.decode_request, wire.decode_answer):
            with pytest.raises(wire.NotForNetwork):
                decode(payload)


@pytest.mark.parametrize("code", [4, 5, 6])
def test_handles_of_one_host_are_not_opened(code: int) -> None:
    request = tokenized("r", [1])
    data = msgspec.msgpack.decode(wire.encode(request))
    at = next(i for i, value in enumerate(data) if isinstance(value, msgspec.msgpack.Ext))
    data[at] = msgspec.msgpack.Ext(code, msgspec.msgpack.encode({"name": "psm_x"}))
    with pytest.raises(wire.NotForNetwork):
        wire.decode_request(msgspec.msgpack.encode(data))


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_read_or_refused(payload: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_answer):
        try:
            decode(payload)
        except wire.NotForNetwork:
            pass


def test_types_go_one_way_and_others_not_at_all() -> None:
    with pytest.raises(wire.NotForNetwork):
        wire.decode_answer(wire.encode(FlushCacheReqInput()))
    with pytest.raises(wire.NotForNetwork, match="UpdateWeightsFromIPCReqInput is not sent"):
        wire.encode(io_struct.UpdateWeightsFromIPCReqInput(zmq_handles={}))
    with pytest.raises(wire.NotForNetwork, match="is not sent"):
        wire.encode(object())


# ---- cutting by frontend


def rows(batch: BatchStrOutput) -> list[Any]:
    return list(zip(batch.rids, batch.output_strs, batch.finished_reasons, strict=True))


@given(st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=8))
def test_each_owner_gets_its_rows_in_order_and_nobody_others(owners: list[int | None]) -> None:
    batch = str_batch(*((f"r{i}", [i], f"t{i}", LENGTH if i % 2 else None) for i in range(len(owners))))
    parts = batches.cut(batch, owners)
    assert set(parts) == set(owners) - {None}
    for owner, part in parts.items():
        assert rows(part) == [row for row, of in zip(rows(batch), owners, strict=True) if of == owner]
        assert [ids.tolist() for ids in part.output_ids] == [[i] for i, of in enumerate(owners) if of == owner]
        assert part.input_token_logprobs_val is None
    assert len(batch.rids) == len(owners), "the batch itself is left as it was"


def test_stacked_hidden_states_are_cut_by_their_rows() -> None:
    batch = BatchEmbeddingOutput(
        rids=["a", "b", "c"], finished_reasons=[None] * 3, embeddings=[[1.0], [2.0], [3.0]], prompt_tokens=[1, 2, 3],
        cached_tokens=[0] * 3, placeholder_tokens_idx=None, placeholder_tokens_val=None,
        pooled_hidden_states=[torch.tensor([[1.0], [2.0], [3.0]])],
    )  # fmt: skip
    part = batches.cut(batch, [0, 1, 0])[0]
    assert part.embeddings == [[1.0], [3.0]] and part.pooled_hidden_states[0].tolist() == [[1.0], [3.0]]


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    batch = str_batch(("a", [1], "x", None), ("b", [2], "y", None))
    batch.token_steps = [[1]]
    with pytest.raises(batches.UnknownShape, match="token_steps"):
        batches.cut(batch, [0, 1])


@pytest.mark.parametrize("kind", [BatchStrOutput, BatchTokenIDOutput, BatchEmbeddingOutput])
def test_every_field_of_upstreams_batches_is_a_list_by_request(kind: type) -> None:
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        if field.name in ("customized_info", "time_stats"):
            continue
        hint = hints[field.name]
        options = typing.get_args(hint) if typing.get_origin(hint) is typing.Union else (hint,)
        assert all(option is type(None) or typing.get_origin(option) is list for option in options), field.name
