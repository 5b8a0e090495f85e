"""The requests that a resume must continue exactly, and the comparison of a continued answer with the whole one."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from resume_engine import Request, ResumeEngine

from sglang_kevlar.protocol.resume import ResumeState

THINK_END = 4
TOKENS = 32
#: every string of the language is long, and the model has choices in it
REGEX = r"[a-z]{3,6}( [a-z]{2,7}){20}"
EBNF = 'root ::= item (", " item){12}\nitem ::= [0-9]+ ":" [a-f]{2,5}'
SCHEMA = (
    '{"type": "object", "properties": {"name": {"type": "string", "minLength": 12, "maxLength": 20}, '
    '"list": {"type": "array", "minItems": 4, "maxItems": 6, "items": {"type": "integer"}}}, '
    '"required": ["name", "list"]}'
)
STRUCTURAL_TAG = (
    '{"type": "structural_tag", "triggers": ["<tool_call>"], "structures": [{"begin": "<tool_call>", '
    '"schema": {"type": "object", "properties": {"n": {"type": "string", "minLength": 9, "maxLength": 12}}, '
    '"required": ["n"]}, "end": "</tool_call>"}]}'
)


@dataclass
class Case:
    name: str
    request: Request


def prompt(seed: int, length: int = 24) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, 2000) for _ in range(length)]


def cases(*, seeded: bool) -> list[Case]:
    """``seeded``: the engine samples deterministically, so that sampled requests can be compared too."""
    made: list[Case] = []

    def add(name: str, extra: dict[str, Any] | None = None, length: int = 24, **params: Any) -> None:
        params = {"temperature": 0.0, "max_new_tokens": TOKENS, **params}
        made.append(Case(name, Request(prompt(len(made), length), params, extra or {})))

    add("greedy")
    add("greedy, long prompt", length=150)
    add("ignore_eos", ignore_eos=True)
    add("frequency", frequency_penalty=0.7)
    add("presence", presence_penalty=0.9)
    add("repetition", repetition_penalty=1.4)
    add("all penalties", frequency_penalty=0.3, presence_penalty=0.4, repetition_penalty=1.2, min_new_tokens=20)
    add("negative penalties", frequency_penalty=-0.4, presence_penalty=-0.3, repetition_penalty=0.9)
    # The bias makes the end of sequence the most likely token from the first step on.
    add("min_new_tokens", min_new_tokens=17, logit_bias={"2": 8.0})
    add("logit_bias", logit_bias={str(token): 1.5 for token in range(400, 900, 3)}, frequency_penalty=1.0)
    add("log-probs", {"return_logprob": True, "top_logprobs_num": 3})
    add("prompt log-probs", {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2})
    add("late prompt log-probs", {"return_logprob": True, "logprob_start_len": 10}, repetition_penalty=1.2)
    add("log-probs of ids", {"return_logprob": True, "token_ids_logprob": [5, 17, 400]})
    add("prompt log-probs of ids", {"return_logprob": True, "logprob_start_len": 3, "token_ids_logprob": [5, 17]})
    add("regex", regex=REGEX)
    add("regex, penalties", regex=REGEX, frequency_penalty=1.0, repetition_penalty=1.3)
    add("ebnf", ebnf=EBNF, presence_penalty=0.5)
    add("json", json_schema=SCHEMA, max_new_tokens=64)
    add("json, log-probs", {"return_logprob": True, "logprob_start_len": 0}, json_schema=SCHEMA, max_new_tokens=64)
    add("structural tag", structural_tag=STRUCTURAL_TAG, logit_bias={"5": 4.0})
    add("reasoning tokens", {"require_reasoning": True})
    add("stop_regex", stop_regex="[0-9]{2}[a-z]")
    add("every fourth token", {"return_logprob": True}, stream_interval=4)
    if seeded:
        sampled = {"temperature": 0.9, "top_p": 0.95, "top_k": 50}
        add("sampled", sampling_seed=11, **sampled)
        add("sampled, min_p, penalties", sampling_seed=12, min_p=0.02, frequency_penalty=0.5, **sampled)
        add("sampled, regex", sampling_seed=13, regex=REGEX, **sampled)
        add("sampled, log-probs", {"return_logprob": True, "top_logprobs_num": 2}, sampling_seed=14, **sampled)
    return made


def derived_cases(engine: ResumeEngine) -> list[Case]:
    """Requests whose end is somewhere in what the model says: stop strings, stop ids, the end of reasoning."""
    seeds = (101, 102, 103)
    base = [Request(prompt(seed), {"temperature": 0.0, "max_new_tokens": TOKENS}) for seed in seeds]
    tokenizer = engine.tokenizer_manager.tokenizer
    made: list[Case] = []
    for request, answer in zip(base, engine.run(base), strict=True):
        ids = answer["output_ids"]
        # Across three tokens, without the first and last character of the outer ones.
        stop = tokenizer.decode(ids[20:23])
        for name, more in {
            "stop string": {"stop": [stop]},
            "stop string kept": {"stop": [stop, "never"], "no_stop_trim": True},
            "near miss": {"stop": [stop[:-1] + "\x00"]},
            "stop id": {"stop_token_ids": [ids[25]]},
        }.items():
            made.append(Case(name, Request(request.prompt, request.params | more)))
    made += _reasoning_cases(engine)
    return made


def _reasoning_cases(engine: ResumeEngine) -> Iterator[Case]:
    """The end of reasoning comes in mid-answer by a bias on it, found by trying."""
    for strength in range(2, 20):
        request = Request(
            prompt(7),
            {"temperature": 0.0, "max_new_tokens": 48, "logit_bias": {str(THINK_END): strength * 0.5}},
            {"require_reasoning": True},
        )
        ids = engine.run([request])[0]["output_ids"]
        if THINK_END in ids[4:24]:
            constrained = Request(request.prompt, request.params | {"regex": REGEX}, request.extra)
            yield Case("reasoning ends", request)
            yield Case("reasoning, then regex", constrained)
            return
    pytest.fail("no bias makes this model end its reasoning")


def check_resumes(
    engine: ResumeEngine,
    tested: list[Case],
    *,
    cuts_of: Callable[[int], list[int]] | None = None,
    before_resume: Callable[[], Any] = lambda: None,
) -> int:
    """Run ``tested`` whole and cut at several points, and compare. Returns the number of resumes."""
    whole = engine.run([case.request for case in tested])
    for case, answer in zip(tested, whole, strict=True):
        assert "error" not in answer, f"{case.name}: {answer}"
    jobs = [
        (case, answer, cut)
        for case, answer in zip(tested, whole, strict=True)
        for cut in (cuts_of or default_cuts)(len(answer["output_ids"]))
    ]
    before_resume()
    # In another order, so that batches are put together differently from the whole runs.
    random.Random(0).shuffle(jobs)
    resumed = engine.run(
        [case.request for case, _, _ in jobs],
        [
            ResumeState(
                output_ids=array("q", answer["output_ids"][:cut]),
                cached_tokens=answer["meta_info"]["cached_tokens"],
                input_logprobs_sent=bool(case.request.extra.get("return_logprob")),
            )
            for case, answer, cut in jobs
        ],
    )
    faults = [
        f"{case.name}, cut at {cut} of {len(answer['output_ids'])}: {fault}"
        for (case, answer, cut), rest in zip(jobs, resumed, strict=True)
        for fault in differences(answer, rest, cut)
    ]
    assert not faults, "\n".join(faults)
    return len(jobs)


def default_cuts(length: int) -> list[int]:
    return sorted({cut for cut in (1, 2, length // 3, length // 2, length - 3, length - 1) if 0 < cut < length})


def every_cut(length: int) -> list[int]:
    return list(range(1, length))


def differences(whole: dict[str, Any], rest: dict[str, Any], cut: int) -> Iterator[str]:
    """How ``rest``, continued behind ``cut`` tokens, is not the same answer as ``whole``."""
    if "error" in rest:
        yield rest["error"]
        return
    expected = whole["output_ids"][cut:]
    if rest["output_ids"] != expected:
        same = next((i for i, (a, b) in enumerate(zip(rest["output_ids"], expected, strict=False)) if a != b), "end")
        yield f"ids differ from new token {same} on: {rest['output_ids'][:40]} instead of {expected[:40]}"
        return
    if rest["text"] != whole["text"]:
        yield f"text {rest['text']!r} instead of {whole['text']!r}"
    old, new = whole["meta_info"], rest["meta_info"]
    for name in (
        "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "num_retractions",
        "weight_versions",
    ):  # fmt: skip
        if old[name] != new[name]:
            yield f"{name} {new[name]} instead of {old[name]}"
    for name in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
        if name in old and not _close(old[name][cut:], new[name]):
            yield f"{name} {new[name]} instead of {old[name][cut:]}"
    for name in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
        if new.get(name):
            yield f"{name} sent again"


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_close, a, b))
    return bool(a == b)
