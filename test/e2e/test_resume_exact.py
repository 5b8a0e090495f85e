"""A request that is taken up in the middle by another scheduler goes on exactly as it would have.

One engine per configuration; the whole answer and the continued ones come from the same float32 model.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from resume_cases import (
    SCHEMA,
    Case,
    cases,
    check_resumes,
    derived_cases,
    every_cut,
    prompt,
)
from resume_engine import Request, ResumeEngine

from sglang_kevlar.protocol.resume import ResumeState

PORT = 33900

#: (id, engine arguments). Between them: both schedules, chunked prefill, pages, sampling seeds, tp, pp.
CONFIGURATIONS: list[Any] = [
    pytest.param({"enable_lora": True}, id="overlap"),
    pytest.param(
        {
            "disable_overlap_schedule": True,
            "enable_deterministic_inference": True,
            "chunked_prefill_size": 32,
            "page_size": 16,
        },
        id="no-overlap-seeded-chunked-pages",
    ),
    pytest.param({"tp_size": 2}, id="tp2", marks=pytest.mark.slow),
    pytest.param({"pp_size": 2}, id="pp2", marks=pytest.mark.slow),
    pytest.param({"enable_deterministic_inference": True}, id="overlap-seeded", marks=pytest.mark.slow),
    pytest.param({"enable_mixed_chunk": True, "chunked_prefill_size": 32}, id="mixed-chunk", marks=pytest.mark.slow),
    pytest.param({"disable_radix_cache": True}, id="no-radix-cache", marks=pytest.mark.slow),
]


def after(delivered: list[int]) -> ResumeState:
    return ResumeState(output_ids=array("q", delivered))


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def engine(request: pytest.FixtureRequest, models: Path) -> Iterator[ResumeEngine]:
    arguments = dict(request.param)
    if arguments.get("enable_lora"):
        arguments |= {"lora_paths": [f"adapter={models / 'lora'}"], "lora_backend": "torch_native"}
    engine = ResumeEngine(
        model_path=str(models / "llama-f32"),
        dtype="float32",
        device="cpu",
        port=PORT,
        log_level="error",
        max_total_tokens=20000,
        reasoning_parser="qwen3",
        **arguments,
    )
    yield engine
    engine.shutdown()


def all_cases(engine: ResumeEngine) -> list[Case]:
    arguments = engine.server_args
    made = cases(seeded=arguments.enable_deterministic_inference) + derived_cases(engine)
    if arguments.enable_lora:
        params = {"temperature": 0.0, "max_new_tokens": 32}
        lora = {"lora_path": "adapter"}
        made += [
            Case("lora", Request(prompt(80), params, lora)),
            Case("lora, penalties", Request(prompt(81), params | {"frequency_penalty": 0.8}, lora)),
            Case("lora, regex", Request(prompt(82), params | {"regex": r"[0-9]{3,5}(-[a-f]+){12}"}, lora)),
        ]
    return made


def test_continues_exactly(engine: ResumeEngine) -> None:
    """Nothing of the request is left in the group: no prefix, no compiled grammar."""
    tested = all_cases(engine)
    assert check_resumes(engine, tested, before_resume=engine.forget) > 3 * len(tested)
    # The first ones at least; later ones find the prefixes of other cuts of the same request.
    assert engine.recomputed[0] > 24


def test_continues_exactly_over_a_cached_prefix(engine: ResumeEngine) -> None:
    engine.forget()
    engine.recomputed.clear()
    check_resumes(engine, all_cases(engine))
    hits = [tokens for tokens in engine.recomputed if tokens <= (engine.server_args.page_size or 1)]
    assert bool(hits) == (not engine.server_args.disable_radix_cache)


@pytest.mark.slow
def test_continues_exactly_behind_every_token(engine: ResumeEngine) -> None:
    tested = all_cases(engine)
    for start in range(0, len(tested), 8):
        check_resumes(engine, tested[start : start + 8], cuts_of=every_cut)


def test_penalties_do_not_depend_on_the_batch(engine: ResumeEngine) -> None:
    """Upstream's do under the overlap schedule: of 24 mixed requests, some differ between undisturbed runs."""
    kinds: list[dict[str, Any]] = [
        {},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.8},
        {"frequency_penalty": 0.4, "repetition_penalty": 1.2, "presence_penalty": 0.3, "min_new_tokens": 20},
    ]
    requests = [
        Request(prompt(500 + i), {"temperature": 0.0, "max_new_tokens": 20 + i % 7} | kinds[i % len(kinds)])
        for i in range(15)
    ]
    alone = [engine.run([request])[0]["output_ids"] for request in requests]
    for _ in range(2):
        assert [answer["output_ids"] for answer in engine.run(requests)] == alone


def test_what_cannot_go_on_ends_that_request_only(engine: ResumeEngine) -> None:
    greedy = {"temperature": 0.0, "max_new_tokens": 24}
    plain = Request(prompt(300), greedy)
    answer = engine.run([plain])[0]
    ids = answer["output_ids"]
    stop = engine.tokenizer_manager.tokenizer.decode(ids[5:7])
    prompt_logprobs = Request(plain.prompt, greedy, {"return_logprob": True, "logprob_start_len": 0})
    impossible: list[tuple[Request, ResumeState, str]] = [
        (plain, after([]), "nothing was delivered"),
        (plain, after(ids), "max_new_tokens=24"),
        (plain, after([10**9]), "vocabulary"),
        (plain, after([-1]), "vocabulary"),
        (plain, after([*ids[:5], 2]), "already end"),
        (Request(plain.prompt, greedy | {"stop": [stop]}), after(ids[:7]), "already end"),
        (Request(plain.prompt, greedy | {"stop_token_ids": [ids[3]]}), after(ids[:4]), "already end"),
        (Request(plain.prompt, greedy | {"regex": "[0-9]{40}"}), after(ids[:4]), "grammar"),
        (Request(plain.prompt, greedy | {"json_schema": SCHEMA}), after(ids[:4]), "grammar"),
        (Request(plain.prompt, greedy | {"regex": "("}), after(ids[:4]), "compile"),
        (prompt_logprobs, after(ids[:4]), "prompt log-probs"),
        (Request(plain.prompt, greedy | {"beam_width": 2}), after(ids[:4]), "beam search"),
    ]
    # Good ones in between, which must not notice.
    requests = [request for bad, _, _ in impossible for request in (bad, plain)]
    resumes = [resume for _, bad, _ in impossible for resume in (bad, after(ids[:6]))]
    answers = engine.run(requests, resumes)
    for (_, _, reason), bad, good in zip(impossible, answers[::2], answers[1::2], strict=True):
        assert reason in bad.get("error", ""), f"{reason}: {bad}"
        assert good["output_ids"] == ids[6:]
    assert engine.run([plain])[0]["output_ids"] == ids
