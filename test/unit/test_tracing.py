"""The span of a redirect, in upstream's own classes where OpenTelemetry is installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")
from sglang.srt.observability import trace  # noqa: E402
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats  # noqa: E402

from sglang_kevlar.frontend.tracing import SPAN, redirect_span  # noqa: E402
from sglang_kevlar.observability.events import Redirect  # noqa: E402

REDIRECT = Redirect(0, 3, 1, 7, "rank0 exited", "exit", 0.25, 14, 500)


class Recorder:
    """Upstream's context of a request whose dispatch is behind it."""

    def __init__(self, enabled: bool) -> None:
        self.tracing_enable = enabled
        self.calls: list[tuple[Any, ...]] = []

    def rebuild_thread_context(self, ts: int) -> None:
        self.calls.append(("rebuild", ts))

    def trace_slice(self, slice: Any, thread_finish_flag: bool) -> None:
        self.calls.append(("slice", slice, thread_finish_flag))


def test_the_span_is_as_long_as_the_stall() -> None:
    context = Recorder(True)
    before = time.time_ns()
    redirect_span(context, REDIRECT)
    [(_, start), (_, piece, finished)] = context.calls
    assert finished and piece.slice_name == SPAN and piece.start_time_ns == start
    assert piece.end_time_ns - start == 250_000_000 and before <= piece.end_time_ns <= time.time_ns()
    assert piece.attrs["kevlar.from_group"] == 0 and piece.attrs["kevlar.to_group"] == 1
    assert piece.attrs["kevlar.recomputed_tokens"] == 14 and piece.attrs["kevlar.restored_tokens"] == 500


@pytest.mark.parametrize("context", [Recorder(False), trace.TraceNullContext()])
def test_without_tracing_nothing_happens(context: Any) -> None:
    redirect_span(context, REDIRECT)
    assert getattr(context, "calls", []) in ([], context)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Spans as upstream exports them."""
    if not trace.opentelemetry_imported:
        pytest.skip("no OpenTelemetry (pip install 'sglang-kevlar[tracing]')")
    assert importlib.util.find_spec("opentelemetry.sdk") is not None
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "tracer", provider.get_tracer("test"))
    monkeypatch.setattr(trace, "opentelemetry_initialized", True)
    monkeypatch.setattr(trace, "get_global_trace_level", lambda: 3)
    yield exporter
    provider.shutdown()


def test_it_is_in_the_requests_own_trace(exported: Any) -> None:
    stats = APIServerReqTimeStats()
    caller = f"{0xABC:032x}"
    stats.init_trace_ctx("request-1", None, {"traceparent": f"00-{caller}-{0xDEF:016x}-01"})
    stats.set_created_time()
    stats.set_tokenize_finish_time()
    stats.set_api_server_dispatch_time()
    stats.set_api_server_dispatch_finish_time()
    redirect_span(stats.trace_ctx, REDIRECT)
    # A second one of the same request, as after a second death.
    redirect_span(stats.trace_ctx, REDIRECT)
    stats.set_finished_time()
    spans = {span.context.span_id: span for span in exported.get_finished_spans()}
    redirects = [span for span in spans.values() if span.name == SPAN]
    assert len(redirects) == 2
    for span in redirects:
        assert f"{span.context.trace_id:032x}" == caller
        root = spans[spans[span.parent.span_id].parent.span_id]
        assert root.name.strip().startswith("Req ") and span.attributes["kevlar.cause"] == "rank0 exited"
