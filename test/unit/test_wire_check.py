"""Requests that would end the scheduler that receives them, or raise when they are sent, are refused before."""

from __future__ import annotations

from typing import Any

import pytest

from frontend_fakes import tokenized
from sglang_kevlar.frontend.wire_check import Unsendable, check_message, check_request

# isort: split
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput
from sglang.srt.sampling.sampling_params import SamplingParams


@pytest.fixture(autouse=True, params=["pickle", "msgpack"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Upstream has two, chosen by SGLANG_USE_PICKLE_IPC."""
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", request.param == "pickle")
    return request.param


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"max_new_tokens": 5.5}, "sampling_params.max_new_tokens: Expected `int | null`"),
        ({"regex": 5}, "sampling_params.regex"),
        ({"logit_bias": {"1": "much"}}, "sampling_params.logit_bias"),
        ({"custom_params": deep(5000)}, "nested too deeply"),
        ({"top_k": 10**30}, "out of range"),
        ({"top_k": 2**31}, "sampling_params.top_k: it is out of range"),
        ({"max_new_tokens": None, "min_new_tokens": 2**40}, "sampling_params.min_new_tokens"),
        ({"stop": "\ud800"}, "surrogate"),
    ],
)
def test_what_a_scheduler_could_not_take_is_refused_by_name(sampling: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsendable) as refused:
        check_request(tokenized("mine", [1], sampling_params=SamplingParams(**sampling)))
    assert str(refused.value).startswith("request mine: ") and said in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"token_ids_logprob": "x"}, "token_ids_logprob"),
        ({"return_logprob": "yes"}, "return_logprob"),
        ({"input_text": "a\udfff"}, "surrogate"),
        ({"extra_key": 7}, "extra_key"),
    ],
)
def test_other_fields_too(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsendable, match=said):
        check_request(tokenized("mine", [1], **fields))


def test_the_refusal_itself_can_be_sent() -> None:
    with pytest.raises(Unsendable) as refused:
        check_request(tokenized("a\ud800", [1]))
    str(refused.value).encode()


def test_ids_that_upstream_takes_for_health_checks_are_refused() -> None:
    with pytest.raises(Unsendable, match="HEALTH_CHECK"):
        check_request(tokenized("HEALTH_CHECK_mine", [1]))


def test_good_ones_pass() -> None:
    check_request(tokenized("mine", [1], sampling_params=SamplingParams(stop=["é"], top_k=-1, stop_token_ids=[2, 3])))
    check_request(tokenized("mine", []))
    check_message(LoadLoRAAdapterReqInput(lora_name="a", lora_path="/p"))


@pytest.mark.parametrize("sampling", [{"max_new_tokens": 16.0}, {"custom_params": deep(3)}])
def test_what_only_pickle_carries_is_refused_only_without_it(codec: str, sampling: dict[str, Any]) -> None:
    request = tokenized("mine", [1], sampling_params=SamplingParams(**sampling))
    if codec == "pickle":
        check_request(request)
    else:
        with pytest.raises(Unsendable, match="sampling_params"):
            check_request(request)


def test_control_requests_have_the_same_check(codec: str) -> None:
    wrong = LoadLoRAAdapterReqInput(lora_name="a", lora_path="/p", pinned="sometimes")
    if codec == "msgpack":
        with pytest.raises(Unsendable, match="pinned: Expected `bool"):
            check_message(wrong)
    with pytest.raises(Unsendable, match="nested too deeply"):
        check_message(LoadLoRAAdapterReqInput(lora_name="a", lora_path="/p", pinned=deep(5000)))
