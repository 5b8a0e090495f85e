"""The run itself, against a server that counts, with a fault that is a file: every verdict comes out at its end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from features import Feature
from run import Suite, rounds, rows, table
from verdict import Verdict

TOKENS = 40


class Counting(BaseHTTPRequestHandler):
    """Streams one number after the other; when the fault is there, ``behaviour`` of the request happens."""

    fault: Path

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        ids = []
        for token in range(TOKENS):
            ids.append(token)
            if self.fault.exists():
                match body["behaviour"]:
                    case "cut":
                        return
                    case "silent":
                        self._event({"error": {"message": "lost"}})
                        break
                    case "refuse":
                        return self._event({"error": {"message": "lost"}})
                    case "hang":
                        return time.sleep(1.0)
                    case "skip":
                        ids[-1] = -token
            meta = {"finish_reason": None, "prompt_tokens": 1, "completion_tokens": len(ids)}
            meta["finish_reason"] = "length" if len(ids) == TOKENS else None
            self._event({"text": "." * len(ids), "output_ids": ids, "meta_info": meta})
            time.sleep(0.001 if body["behaviour"] == "fast" else 0.012)
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Server", (Counting,), {"fault": tmp_path / "fault"}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_every_verdict_comes_out(url: str, tmp_path: Path) -> None:
    wanted = {
        "go on": Verdict.EXACT,
        "cut": Verdict.CUT,
        "silent": Verdict.SILENT,
        "refuse": Verdict.REFUSED,
        "hang": Verdict.HUNG,
        "skip": Verdict.DIFFERENT,
    }
    features = [Feature(name, "/generate", {"behaviour": name, "stream": True}) for name in wanted]
    features += [Feature("unknown", "/generate", {"stream": True})]
    log = tmp_path / "log"
    suite = Suite(
        url,
        fault=f'echo "$KEVLAR_FAULT_FEATURE" >> {log}; touch {tmp_path}/fault',
        recover=f"rm -f {tmp_path}/fault",
        at=3,
        hang=0.5,
    )
    results = list(suite.run(features))
    assert {r.feature.name: r.verdict for r in results} == {**wanted, "unknown": Verdict.UNSUPPORTED}
    assert log.read_text().splitlines() == [feature.id for feature in features[:-1]]
    cells = rows([result.summary() for result in results])
    assert cells[1][:4] == ["/generate", "stream", "cut", "cut"]
    assert table(["a", "b"], [["x|y", "z"]]) == "| a | b |\n| --- | --- |\n| x\\|y | z |"


def test_a_fault_that_comes_too_late_is_repeated_and_then_said(url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    suite = Suite(url, fault=f"sleep 0.4; echo x >> {log}", recover=None, at=8, hang=1.0)
    (result,) = suite.run([Feature("fast", "/generate", {"behaviour": "fast", "stream": True})])
    assert result.verdict == Verdict.NOT_HIT
    assert len(log.read_text().split()) == 4


def test_a_fault_command_that_fails_is_no_success(url: str) -> None:
    suite = Suite(url, fault="echo nothing runs; exit 3", recover=None, at=3, hang=1.0)
    (result,) = suite.run([Feature("go on", "/generate", {"behaviour": "go on", "stream": True})])
    assert result.verdict == Verdict.NOT_HIT
    assert "status 3: nothing runs" in result.detail
    with pytest.raises(RuntimeError, match="did not recover"):
        Suite(url, fault="true", recover="false", at=3, hang=1.0).recover()


def test_requests_that_share_a_fault(url: str, tmp_path: Path) -> None:
    """One that was over too soon has it again, alone."""
    names = ["go on", "cut", "skip"]
    features = [Feature(name, "/generate", {"behaviour": name, "stream": True}) for name in names]
    features.insert(1, Feature("fast", "/generate", {"behaviour": "fast", "stream": True}))
    log = tmp_path / "log"
    fault = f'echo "$KEVLAR_FAULT_REQUESTS" >> {log}; sleep 0.15; touch {tmp_path}/fault'
    suite = Suite(url, fault, recover=f"rm -f {tmp_path}/fault", at=3, hang=1.0, together=3)
    verdicts = {result.feature.name: result.verdict for result in suite.run(features)}
    assert verdicts == {
        "go on": Verdict.EXACT,
        "cut": Verdict.CUT,
        "skip": Verdict.DIFFERENT,
        "fast": Verdict.NOT_HIT,
    }
    assert log.read_text().split()[:2] == ["3", "1"]


def test_only_what_probably_shares_a_worker_shares_a_fault() -> None:
    def feature(endpoint: str, **body: object) -> Feature:
        return Feature("f", endpoint, body)

    native, lora, chat = feature("/generate"), feature("/generate", lora_path="a"), feature("/v1/chat/completions")
    listed = [native, native, native, lora, chat, feature("/generate", stream=True), native]
    assert [len(group) for group in rounds(listed, 2)] == [2, 1, 1, 1, 1, 1]
    assert [len(group) for group in rounds(listed, 1)] == [1] * 7
