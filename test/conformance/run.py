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
    KEVLAR_FAULT_REQUESTS   how many requests are running; with more than one, the command has to fail if they are
                            not all on the worker that it kills

A fault that failed, or came after the end of its request, is repeated for that request alone, earlier each time.
``--together`` saves time: most of a run is waiting for workers to start again.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client import Answer, ask
from features import Feature, features, learn, selected
from verdict import Verdict, first_difference, judge, unusable

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


@dataclass
class Expected:
    #: undisturbed and alone
    answer: Answer
    #: seconds that the same took together with those that it shares a fault with
    seconds_together: float
    #: in what that second answer differs: no failover can then be asked to be exact
    instability: str | None


class Fault:
    """The fault command, run beside requests: when each has its tokens, or ``seconds`` after they were sent.

    One that is far ahead is not waited with until it ends.
    """

    def __init__(self, command: str, environment: dict[str, str], seconds: float) -> None:
        self._command, self._environment, self._seconds = command, environment, seconds
        self._lock = threading.Lock()
        self._waited_for = 0
        self._due = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.ended = 0.0
        self.failed = ""

    def after(self, tokens: int) -> Callable[[int], None]:
        """Have it wait for a request to get as many tokens. The request reports to what this returns."""
        self._waited_for += 1
        reached = False

        def on_event(events: int) -> None:
            nonlocal reached
            if events >= 3 * tokens:
                self._due.set()
            if events < tokens or reached:
                return
            reached = True
            with self._lock:
                self._waited_for -= 1
                if not self._waited_for:
                    self._due.set()

        return on_event

    def start(self) -> None:
        self._thread.start()

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
        return "the command does not end"
    output = " ".join(done.stdout.split())
    return f"status {done.returncode}: {output[-300:]}" if done.returncode else ""


class Suite:
    """``together``: how many requests at most share a fault."""

    def __init__(self, url: str, fault: str, recover: str | None, at: int, hang: float, together: int = 1) -> None:
        self._url, self._fault, self._recover = url, fault, recover
        self._at, self._hang, self._together = at, hang, together

    def run(self, listed: list[Feature]) -> Iterator[Result]:
        """All undisturbed runs come first: a server is not undisturbed while a worker of it restarts."""
        self.recover()
        groups = list(rounds(listed, self._together))
        expected: dict[str, Expected] = {}
        for group in groups:
            expected |= self._undisturbed(group)
        for group in groups:
            served = [f for f in group if unusable(expected[f.id].answer) is None]
            yield from (unsupported(f, expected[f.id].answer) for f in group if f not in served)
            results = self._round(served, expected) if len(served) > 1 else []
            alone = [f for f in served if f.id not in {r.feature.id for r in results if r.verdict != Verdict.NOT_HIT}]
            yield from (result for result in results if result.feature not in alone)
            for feature in alone:
                yield self._alone(feature, expected)

    def _undisturbed(self, group: list[Feature]) -> dict[str, Expected]:
        alone = [ask(self._url, feature.endpoint, feature.body, self._hang) for feature in group]
        together = self._ask_together(group, [self._hang] * len(group), [lambda events: None] * len(group))
        return {
            feature.id: Expected(one, other.seconds, first_difference(one, other) if feature.exact else None)
            for feature, one, other in zip(group, alone, together, strict=True)
        }

    def _ask_together(
        self, group: list[Feature], hangs: list[float], listeners: list[Callable[[int], None]]
    ) -> list[Answer]:
        with ThreadPoolExecutor(len(group)) as pool:
            asked = [
                pool.submit(ask, self._url, feature.endpoint, feature.body, hang, listener)
                for feature, hang, listener in zip(group, hangs, listeners, strict=True)
            ]
            return [one.result() for one in asked]

    def _alone(self, feature: Feature, expected: dict[str, Expected]) -> Result:
        """Until the fault hits it, earlier each time."""
        for attempt in range(ATTEMPTS):
            (result,) = self._round([feature], expected, attempt)
            if result.verdict != Verdict.NOT_HIT:
                break
        return result

    def _round(self, group: list[Feature], expected: dict[str, Expected], attempt: int = 0) -> list[Result]:
        """One fault while all of them generate."""
        self.recover()
        wanted = [expected[feature.id] for feature in group]
        seconds = [one.answer.seconds if len(group) == 1 else one.seconds_together for one in wanted]
        environment = {
            "KEVLAR_FAULT_URL": self._url,
            "KEVLAR_FAULT_FEATURE": ", ".join(feature.id for feature in group),
            "KEVLAR_FAULT_REQUESTS": str(len(group)),
        }
        fault = Fault(self._fault, environment, min(seconds) * LATEST / 2**attempt)
        listeners = [fault.after(max(1, self._at >> attempt)) for _ in group]
        # A request that does not stream is silent until its end, and may be run again from its beginning.
        hangs = [self._hang + (0 if f.stream else 3 * s) for f, s in zip(group, seconds, strict=True)]
        fault.start()
        answers = self._ask_together(group, hangs, listeners)
        fault.join()
        return [self._judged(f, one, a, fault) for f, one, a in zip(group, wanted, answers, strict=True)]

    def _judged(self, feature: Feature, expected: Expected, answer: Answer, fault: Fault) -> Result:
        missed = fault.failed or ("it ended before the fault" if answer.ended < fault.ended else "")
        if missed and not _went_wrong(answer):
            return Result(feature, Verdict.NOT_HIT, missed, expected.answer, answer)
        judgement = judge(expected.answer, answer, feature.exact and expected.instability is None)
        note = f"two undisturbed answers differ: {expected.instability}" if expected.instability else ""
        detail = "; ".join(part for part in (judgement.detail, note) if part)
        return Result(feature, judgement.verdict, detail, expected.answer, answer)

    def recover(self) -> None:
        if self._recover and (failed := shell(self._recover, {"KEVLAR_FAULT_URL": self._url})):
            raise RuntimeError(f"the server did not recover: {failed}")


def rounds(listed: list[Feature], together: int) -> Iterator[list[Feature]]:
    """Requests that share their prompts' beginning, and so probably a worker, at most ``together`` of them."""

    def alike(feature: Feature) -> tuple[object, ...]:
        return feature.endpoint, feature.stream, feature.body.get("lora_path")

    for _, group in itertools.groupby(listed, alike):
        left = list(group)
        while left:
            yield left[:together]
            del left[:together]


def unsupported(feature: Feature, undisturbed: Answer) -> Result:
    return Result(feature, Verdict.UNSUPPORTED, unusable(undisturbed) or "", undisturbed)


def _went_wrong(answer: Answer) -> bool:
    """It was hit, then, whatever the fault command says."""
    return bool(answer.error or answer.broken or answer.hung or not answer.done)


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
    parser.add_argument("--together", type=int, default=1, help="requests that share a fault; see above")
    parser.add_argument("--hang", type=float, default=60.0, help="seconds of silence that count as hung")
    parser.add_argument("--features", nargs="*", default=[], help="only those whose name contains one of these")
    parser.add_argument("--lora", help="name of an adapter that the server has loaded")
    parser.add_argument("--eos-id", type=int, default=2, help="the model's end-of-sequence token")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()

    suite = Suite(args.url.rstrip("/"), args.fault, args.recover, args.at, args.hang, args.together)
    suite.recover()
    listed = selected(features(learn(args.url, args.hang, args.eos_id, args.lora)), args.features)
    results = []
    for result in suite.run(listed):
        print(f"{result.feature.id:70} {result.verdict}  {result.detail[:200]}", file=sys.stderr, flush=True)
        results.append(result.summary())
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    suite.recover()
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
