"""`--enable-trace`: a request that is moved says so in its own trace, and goes on there in its new group."""

from __future__ import annotations

import gzip
import importlib.util
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cases import PROMPT
from server import Server

pytestmark = pytest.mark.skipif(
    any(
        importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec(f"opentelemetry.{name}") is None
        for name in ("sdk", "exporter", "proto")
    ),
    reason="no OpenTelemetry (pip install 'sglang-kevlar[tracing]')",
)

PATIENCE = 60.0


@dataclass
class Span:
    name: str
    trace: str
    id: str
    parent: str
    begin: int
    end: int
    attributes: dict[str, Any] = field(default_factory=dict)


class Collector:
    """OTLP over HTTP, in memory."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}
                    times = (span.start_time_unix_nano, span.end_time_unix_nano)
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    self.spans.append(Span(span.name, *ids, *times, values))

    def wait(self, condition: Callable[[list[Span]], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := condition(list(self.spans))):
            assert time.monotonic() < deadline, f"no {what} in {sorted({span.name for span in self.spans})}"
            time.sleep(0.1)
        return found


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    flags = ("--enable-trace", "--otlp-traces-endpoint", collector.endpoint)
    env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "SGLANG_OTLP_EXPORTER_SCHEDULE_DELAY_MILLIS": "200"}
    server = Server(models / "llama-f32", tmp_path_factory.mktemp("server") / "log", *flags, env=env)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def ask(server: Server, trace: str) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
    body = {"text": PROMPT, "sampling_params": sampling}
    headers = {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}
    return httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=180).json()


@pytest.mark.timeout(600)
def test_a_redirect_is_a_span_of_the_requests_own_trace(server: Server, collector: Collector) -> None:
    traces = [secrets.token_hex(16) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, server, trace) for trace in traces]
        group = server.serving_group()
        server.wait(lambda s: s["groups"][group]["running"] >= 1, "a running request", 30)
        time.sleep(0.3)
        server.kill(group)
        answers = [one.result() for one in running]
    marked = [trace for trace, answer in zip(traces, answers, strict=True) if "kevlar" in answer["meta_info"]]
    assert marked, "none was moved"
    spans = collector.wait(
        lambda all: (
            (found := [one for one in all if one.name == "kevlar_redirect"]) and len(found) >= len(marked) and found
        ),
        "span of each redirect",
    )
    assert sorted(span.trace for span in spans) == sorted(marked)
    failover = server.status()["failovers"][-1]
    for span in spans:
        said = span.attributes
        assert (said["kevlar.from_group"], said["kevlar.from_epoch"]) == (group, failover["epoch"])
        assert said["kevlar.to_group"] == 1 - group and said["kevlar.cause"] == failover["cause"]
        assert abs((span.end - span.begin) / 1e6 - said["kevlar.stall_ms"]) < 1
        assert 0 < said["kevlar.stall_ms"] <= failover["stall_ms"]["max"] + 0.001
    for name in ("recomputed_tokens", "restored_tokens"):
        assert sum(span.attributes[f"kevlar.{name}"] for span in spans) == failover[name]

    # Under the request's own root, beside what upstream says of it, in the group that goes on with it too.
    trace = marked[0]
    redirect = next(span for span in spans if span.trace == trace)

    def whole(all: list[Span]) -> dict[str, Span] | None:
        own = {span.id: span for span in all if span.trace == trace}
        return own if any(span.name.strip().startswith("Req ") for span in own.values()) else None

    own = collector.wait(whole, "root span of a moved request")
    root = own[own[redirect.parent].parent]
    assert root.name.strip().startswith("Req ") and root.begin <= redirect.begin and redirect.end <= root.end
    collector.wait(
        lambda all: any(s.trace == trace and s.begin > redirect.begin and "decode" in s.name.lower() for s in all),
        "decode of the group that goes on",
    )


@pytest.mark.timeout(600)
def test_a_request_that_stays_has_no_such_span(server: Server, collector: Collector) -> None:
    server.wait_ready()
    trace = secrets.token_hex(16)
    assert "kevlar" not in ask(server, trace)["meta_info"]
    collector.wait(lambda all: any(s.trace == trace and s.name.strip().startswith("Req ") for s in all), "root span")
    assert not [s for s in collector.spans if s.trace == trace and s.name == "kevlar_redirect"]
