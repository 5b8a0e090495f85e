"""A model with latent attention (MLA) on the CPU platform, against transformers and against itself.

Its shadow is in test_shadow.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import cases, check_resumes, prompt
from resume_engine import Request, ResumeEngine

PORT = 33950
NEW_TOKENS = 48
#: around chunk and page boundaries, and past the original context of the model's yarn scaling
LENGTHS = (1, 15, 33, 64, 300, 5000)

CONFIGURATIONS: list[Any] = [
    pytest.param({"chunked_prefill_size": 1024}, id="overlap-chunked"),
    pytest.param(
        {
            "disable_overlap_schedule": True,
            "enable_deterministic_inference": True,
            "chunked_prefill_size": 32,
            "page_size": 16,
        },
        id="no-overlap-deterministic-small-chunks-pages",
    ),
    pytest.param({"tp_size": 2, "page_size": 64}, id="tp2-pages", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def engine(request: pytest.FixtureRequest, models: Path) -> Iterator[ResumeEngine]:
    engine = ResumeEngine(
        model_path=str(models / "mla-f32"),
        dtype="float32",
        device="cpu",
        port=PORT,
        log_level="error",
        max_total_tokens=20000,
        reasoning_parser="qwen3",
        **request.param,
    )
    yield engine
    engine.shutdown()


def greedy(ids: list[int], **extra: Any) -> Request:
    return Request(ids, {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}, extra)


@pytest.fixture(scope="module")
def reference(models: Path) -> dict[int, list[int]]:
    """What transformers generates for a prompt of each length."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "mla-f32", dtype=torch.float32)
    yarn = model.config.rope_parameters
    # DeepSeek's own code scales the scores by the square of yarn's magnitude too; not all of transformers do.
    magnitude = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1
    for layer in model.model.layers:
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5 * magnitude**2
    answers = {}
    for length in LENGTHS:
        ids = torch.tensor([prompt(length, length)])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        answers[length] = output[0, length:].tolist()
    return answers


def test_greedy_output_is_that_of_transformers(engine: ResumeEngine, reference: dict[int, list[int]]) -> None:
    engine.forget()
    answers = engine.run([greedy(prompt(length, length)) for length in LENGTHS])
    assert {length: answer["output_ids"] for length, answer in zip(LENGTHS, answers, strict=True)} == reference


def test_a_cached_prefix_does_not_change_the_answer(engine: ResumeEngine) -> None:
    base = prompt(1, 700)
    requests = [greedy([*base[:cut], *prompt(2, 40)]) for cut in (1, 64, 100, 699)]
    cold = []
    for request in requests:
        engine.forget()
        cold.append(engine.run([request])[0])
    engine.forget()
    engine.run([greedy(base)])
    warm = engine.run(requests)
    assert [answer["output_ids"] for answer in warm] == [answer["output_ids"] for answer in cold]
    page = engine.server_args.page_size or 1
    assert [answer["meta_info"]["cached_tokens"] for answer in warm] == [
        cut // page * page for cut in (1, 64, 100, 699)
    ]


def test_a_resumed_request_goes_on_exactly(engine: ResumeEngine) -> None:
    tested = cases(seeded=engine.server_args.enable_deterministic_inference)
    check_resumes(engine, tested, before_resume=engine.forget)


def test_with_deterministic_inference_the_batch_does_not_show(engine: ResumeEngine) -> None:
    if not engine.server_args.enable_deterministic_inference:
        pytest.skip("only with --enable-deterministic-inference")
    requests = [greedy(prompt(40 + i, 20 + 31 * i), return_logprob=True) for i in range(6)]
    alone = []
    for request in requests:
        engine.forget()
        alone.append(engine.run([request])[0]["meta_info"]["output_token_logprobs"])
    engine.forget()
    together = engine.run(requests)
    assert [answer["meta_info"]["output_token_logprobs"] for answer in together] == alone
