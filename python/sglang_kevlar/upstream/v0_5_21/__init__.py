"""Every class, method, field and constant of SGLang 0.5.21 that we rely on, by the process that uses it."""

from __future__ import annotations

from sglang_kevlar.upstream.contract import Seam
from sglang_kevlar.upstream.v0_5_21 import cpu, frontend, reform, shadow, start, worker

#: files in sglang_kevlar/patches/0.5.21
PATCHES: tuple[str, ...] = ("0001-ollama-last-text.patch", "0002-tool-call-in-one-step.patch")

SEAMS: tuple[Seam, ...] = (
    *start.START,
    *start.BETWEEN_PROCESSES,
    *frontend.SERVER,
    *frontend.LANGUAGE,
    *reform.SEAMS,
    *worker.SEAMS,
    *shadow.SEAMS,
    *cpu.SEAMS,
)
