#!/usr/bin/env python3
"""Which requests survive the death of a worker: each feature undisturbed, then with a fault while it generates.

    python test/conformance/run.py --url http://127.0.0.1:30000 \\
        --fault 'python test/conformance/kill_busiest.py' --recover 'python test/conformance/wait_whole.py'

Black box, over HTTP: any server with SGLang's API. ``--fault`` is run once the request has ``--at`` tokens, or, when it
does not stream, after a part of the time that it takes undisturbed; it returns when the worker that runs the request
is dead, and fails when there is none. ``--recover`` returns when the server is whole again. Both get in their
environment:

    KEVLAR_FAULT_URL        the server
    KEVLAR_FAULT_FEATURE    such as "/generate stream: greedy"
    KEVLAR_FAULT_ENDPOINT   such as "/generate"

A fault that came after the end of its request is repeated, earlier.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client import Answer, ask
from features import Feature, features, learn, selected
from verdict import Judgement, Verdict, first_difference, judge, unusable

ATTEMPTS = 4
COMMAND_TIMEOUT = 600.0
#: when a fault is injected at the latest, and always when the request does not stream: part of the undisturbed time
LATEST = 0.4


@dataclass
class Result:
    """A row of the table, and what stands behind it."""

    feature: Feature
    verdict: Verdict
    detail: str
    undisturbed: Answer
    disturbed: Answer | None = None

    def summary(self) -> dict[str, Any]:
        """For the JSON file."""
        answers = {"undisturbed": asdict(self.undisturbed), "disturbed": self.disturbed and asdict(self.disturbed)}
        row = {"feature": self.feature.name, "endpoint": self.feature.endpoint, "stream": self.feature.stream}
        return row | {"verdict": str(self.verdict), "detail": self.detail, **answers}


class Fault:
    """The fault command, run beside one request: when it has ``tokens`` tokens, or ``seconds`` after it was sent."""

    def __init__(self, command: str, environment: dict[str, str], tokens: int, seconds: float) -> None:
        self._command, self._environment = command, environment
        self._tokens, self._seconds = tokens, seconds
        self._due = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.ended = 0.0
        self.failed = ""

    def start(self) -> None:
        self._thread.start()

    def on_event(self, events: int) -> None:
        if events >= self._tokens:
            self._due.set()

    def join(self) -> None:
        self._due.set()
        self._thread.join()

    def _run(self) -> None:
        self._due.wait(self._seconds)
        self.failed = shell(self._command, self._environment)
        self.ended = time.monotonic()


def shell(command: str, environment: dict[str, str]) -> str:
    """Run it. What went wrong, or nothing."""
    try:
        done = subprocess.run(
            command,
            shell=True,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"no end of: {command}"
    return f"{command}: status {done.returncode}: {done.stdout[-500:]}" if done.returncode else ""


class Suite:
    def __init__(self, url: str, fault: str, recover: str | None, at: int, hang: float) -> None:
        self._url, self._fault, self._recover = url, fault, recover
        self._at, self._hang = at, hang

    def run(self, listed: list[Feature]) -> list[Result]:
        """All undisturbed runs come first: a server is not undisturbed while a worker of it restarts."""
        self.recover({})
        expected = {feature.id: self._undisturbed(feature) for feature in listed}
        results = []
        for feature in listed:
            results.append(self._disturbed(feature, *expected[feature.id]))
            print(f"{feature.id:70} {results[-1].verdict}  {results[-1].detail[:200]}", file=sys.stderr, flush=True)
        return results

    def _undisturbed(self, feature: Feature) -> tuple[Answer, str | None]:
        """The answer, and in what a second one differs from it: no failover can then be asked to be exact."""
        first, second = (ask(self._url, feature.endpoint, feature.body, self._hang) for _ in range(2))
        if unusable(first) is not None or not feature.exact:
            return first, None
        # Of two equal answers the second is the one whose time counts: nothing is done in it for the first time.
        return second, first_difference(first, second)

    def _disturbed(self, feature: Feature, undisturbed: Answer, instability: str | None) -> Result:
        if (problem := unusable(undisturbed)) is not None:
            return Result(feature, Verdict.UNSUPPORTED, problem, undisturbed)
        environment = {
            "KEVLAR_FAULT_URL": self._url,
            "KEVLAR_FAULT_FEATURE": feature.id,
            "KEVLAR_FAULT_ENDPOINT": feature.endpoint,
        }
        answer, missed = Answer(), ""
        for attempt in range(ATTEMPTS):
            self.recover(environment)
            seconds = undisturbed.seconds * LATEST / 2**attempt
            fault = Fault(self._fault, environment, max(1, self._at >> attempt), seconds)
            fault.start()
            # A request that does not stream is silent until its end, and may be run again from its beginning.
            hang = self._hang + (0 if feature.stream else 3 * undisturbed.seconds)
            answer = ask(self._url, feature.endpoint, feature.body, hang, fault.on_event)
            fault.join()
            missed = fault.failed or ("it ended before the fault" if answer.ended < fault.ended else "")
            if not missed or _went_wrong(answer):
                break
        if missed and not _went_wrong(answer):
            return Result(feature, Verdict.NOT_HIT, missed, undisturbed, answer)
        judgement = judge(undisturbed, answer, feature.exact and instability is None)
        return Result(feature, judgement.verdict, _explained(judgement, instability), undisturbed, answer)

    def recover(self, environment: dict[str, str]) -> None:
        if self._recover and (failed := shell(self._recover, {"KEVLAR_FAULT_URL": self._url, **environment})):
            raise RuntimeError(f"the server did not recover: {failed}")


def _went_wrong(answer: Answer) -> bool:
    """It was hit, then, whatever the fault command says."""
    return bool(answer.error or answer.broken or answer.hung or not answer.done)


def _explained(judgement: Judgement, instability: str | None) -> str:
    note = f"two undisturbed answers differ: {instability}" if instability else ""
    return "; ".join(part for part in (judgement.detail, note) if part)


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    how = {True: "stream", False: "whole"}
    return [[r["endpoint"], how[r["stream"]], r["feature"], r["verdict"], r["detail"][:160]] for r in results]


def table(head: list[str], body: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--fault", required=True, help="shell command that kills the busiest worker")
    parser.add_argument("--recover", help="shell command that returns when the server is whole again")
    parser.add_argument("--at", type=int, default=40, help="tokens after which the fault is injected")
    parser.add_argument("--hang", type=float, default=60.0, help="seconds of silence that count as hung")
    parser.add_argument("--features", nargs="*", default=[], help="only those whose name contains one of these")
    parser.add_argument("--lora", help="name of an adapter that the server has loaded")
    parser.add_argument("--eos-id", type=int, default=2, help="the model's end-of-sequence token")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()

    suite = Suite(args.url.rstrip("/"), args.fault, args.recover, args.at, args.hang)
    suite.recover({})
    listed = selected(features(learn(args.url, args.hang, args.eos_id, args.lora)), args.features)
    results = [result.summary() for result in suite.run(listed)]
    suite.recover({})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.markdown:
        print(table(["endpoint", "answer", "feature", "verdict", "detail"], rows(results)))
    else:
        for row in rows(results):
            print(f"{row[0]:22}{row[1]:8}{row[2]:44}{row[3]:30}{row[4]}")
    counts = collections.Counter(result["verdict"] for result in results)
    print("\n" + ", ".join(f"{verdict}: {counts[verdict]}" for verdict in Verdict if counts[verdict]))
    good = (Verdict.EXACT, Verdict.KEPT, Verdict.UNSUPPORTED)
    return 0 if all(result["verdict"] in good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
