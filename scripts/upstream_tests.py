#!/usr/bin/env python3
"""Run upstream's own tests of the HTTP surface against a server that is up.

    python scripts/upstream_tests.py --url http://127.0.0.1:30000 --model MODEL [--only json regex] [--markdown]

SGLang's wheel carries the bodies of its server tests as classes to be mixed into test cases (`sglang/test/kits`); the
servers that upstream runs them against need GPUs, these do not. With ``--stock`` on the server's side the same run
says what upstream itself does here: a test that fails there too, fails for the machine or the model.
Exit status 1 when one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import signal
import sys
import types
import unittest
from typing import Any

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

#: module and class in sglang.test.kits, and what it is given beyond the address
KITS: list[tuple[str, str, dict[str, Any]]] = [
    ("basic_api_contract_kit", "BasicAPIContractMixin", {}),
    ("basic_decode_correctness_kit", "BasicDecodeCorrectnessMixin", {}),
    ("basic_scheduler_stress_kit", "BasicSchedulerStressMixin", {}),
    ("anthropic_messages_kit", "AnthropicMessagesMixin", {}),
    ("json_constrained_kit", "JSONConstrainedMixin", {}),
    ("json_mode_kit", "JSONModeMixin", {}),
    ("regex_constrained_kit", "RegexConstrainedMixin", {}),
    ("ebnf_constrained_kit", "EBNFConstrainedMixin", {}),
    ("matched_stop_kit", "MatchedStopMixin", {}),
    ("abort_timeout_kit", "AbortAllMixin", {"abort_all_num_requests": 8}),
    (
        "pause_generation_kit",
        "PauseResumeInPlaceMixin",
        {"pause_num_requests": 8, "pause_max_new_tokens": 400, "pause_duration": 2, "pause_ignore_eos": True},
    ),
]


class Alive:
    """Upstream's tests look whether the server's process lives; what this script has of it is its address."""

    def poll(self) -> None:
        return None


class TooLong(Exception):
    pass


def cases(args: argparse.Namespace) -> list[tuple[str, unittest.TestCase]]:
    import openai

    found = []
    for module, name, given in KITS:
        if args.only and not any(part in module for part in args.only):
            continue
        mixin = getattr(importlib.import_module(f"sglang.test.kits.{module}"), name)
        shared = {"base_url": args.url, "model": args.model, "api_key": "none", "process": Alive()}
        shared["served_model_name"] = args.served_model_name
        shared["client"] = openai.Client(api_key="none", base_url=args.url + "/v1", max_retries=0)
        case = types.new_class(name, (mixin, unittest.TestCase), {}, lambda body, s={**shared, **given}: body.update(s))
        found += [(module, case(test)) for test in unittest.defaultTestLoader.getTestCaseNames(case)]
    return found


def run(case: unittest.TestCase, timeout: int) -> str:
    """'' when it passed; else the last line of why not."""

    def too_long(*_: Any) -> None:
        raise TooLong(f"not over after {timeout} s")

    result = unittest.TestResult()
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(timeout)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            case.run(result)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    skipped = [reason for _, reason in result.skipped]
    failed = [trace.strip().splitlines()[-1] for _, trace in (*result.errors, *result.failures)]
    return (failed + ["skipped: " + reason for reason in skipped] + [""])[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--model", required=True, help="the directory of the server's model")
    parser.add_argument("--served-model-name", default="default")
    parser.add_argument("--only", nargs="*", help="parts of kits' names")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for one test")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    failures = 0
    for kit, case in cases(args):
        why = run(case, args.timeout)
        failures += bool(why) and not why.startswith("skipped")
        name = case.id().rpartition(".")[2]
        row = (kit, name, "passes" if not why else why[:160].replace("|", "\\|"))
        print("| " + " | ".join(row) + " |" if args.markdown else "  ".join(row), flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
