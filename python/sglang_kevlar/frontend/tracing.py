"""A redirect as a span of the request's own trace, beside those of upstream (`--enable-trace`).

OpenTelemetry itself is upstream's affair: nothing of it is imported here, and nothing happens while tracing is off.
"""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.observability.trace import TraceSliceContext

from sglang_kevlar.observability.events import Redirect

SPAN = "kevlar_redirect"
#: of a span; also how upstream names its own (`--trace-level`): 1 is the coarsest
LEVEL = 1


def redirect_span(context: Any, redirect: Redirect) -> None:
    """``context``: upstream's of that request. The span ends now, with the next token, and began with the loss."""
    if not context.tracing_enable:
        return
    end = time.time_ns()
    start = end - int(redirect.stall_s * 1e9)
    # Upstream has ended the frontend's part of the request with its dispatch: slices have no parent after that.
    context.rebuild_thread_context(start)
    context.trace_slice(
        TraceSliceContext(
            slice_name=SPAN,
            start_time_ns=start,
            end_time_ns=end,
            level=LEVEL,
            attrs={
                "kevlar.from_group": redirect.from_group,
                "kevlar.from_epoch": redirect.from_epoch,
                "kevlar.to_group": redirect.to_group,
                "kevlar.to_epoch": redirect.to_epoch,
                "kevlar.cause": redirect.cause,
                "kevlar.kind": redirect.kind,
                "kevlar.stall_ms": round(redirect.stall_s * 1e3, 3),
                "kevlar.recomputed_tokens": redirect.recomputed_tokens,
                "kevlar.restored_tokens": redirect.restored_tokens,
            },
        ),
        thread_finish_flag=True,
    )
