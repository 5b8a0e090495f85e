"""An upstream engine in this process, with our scheduler, that can be given half-finished requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
os.environ.setdefault("OMP_NUM_THREADS", "1")

from sglang.srt.entrypoints.engine import Engine  # noqa: E402
from sglang.srt.managers import scheduler as upstream_scheduler  # noqa: E402
from sglang.srt.managers.detokenizer_manager import run_detokenizer_process  # noqa: E402
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput  # noqa: E402
from sglang.srt.managers.scheduler import run_scheduler_process  # noqa: E402
from sglang.utils import TypeBasedDispatcher  # noqa: E402

from sglang_kevlar.protocol.resume import ResumeState  # noqa: E402
from sglang_kevlar.worker.resume import StartedReqOutput, as_resumed, register_wire_types  # noqa: E402


def run_kevlar_scheduler(*args: Any, **kwargs: Any) -> None:
    """Entry of the scheduler process."""
    from sglang.srt.plugins import load_plugins

    from sglang_kevlar.upstream.plugin import verify_applied
    from sglang_kevlar.worker.scheduler import KevlarScheduler

    load_plugins()
    verify_applied()
    upstream_scheduler.Scheduler = KevlarScheduler
    run_scheduler_process(*args, **kwargs)


def run_detokenizer(*args: Any, **kwargs: Any) -> None:
    """Entry of the detokenizer process: upstream's, after this module's shim."""
    run_detokenizer_process(*args, **kwargs)


def _shared_memory(processes: list[psutil.Process]) -> list[Path]:
    """Files in /dev/shm that a process has mapped. By inode: glibc renames a semaphore after mapping it."""
    mapped = set()
    for process in processes:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            mapped |= {(device, inode) for _, _, _, device, inode, *_ in map(str.split, lines)}
    found = []
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            if (device, str(status.st_ino)) in mapped:
                found.append(path)
    return found


@dataclass
class Request:
    """One request in upstream's terms; ``extra`` are further arguments of ``Engine.async_generate``."""

    prompt: list[int]
    params: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)


class ResumeEngine(Engine):
    """Takes over requests at any token: see :meth:`run`."""

    run_scheduler_process_func = staticmethod(run_kevlar_scheduler)
    run_detokenizer_process_func = staticmethod(run_detokenizer)

    def __init__(self, **kwargs: Any) -> None:
        os.environ.setdefault("SGLANG_KEVLAR", "1")
        register_wire_types()
        super().__init__(**kwargs)
        self._resumes: dict[str, ResumeState] = {}
        self._count = 0
        #: tokens prefilled again for each resume, in the order in which the scheduler began them
        self.recomputed: list[int] = []
        self._dispatch = self.tokenizer_manager._dispatch_to_scheduler
        self.tokenizer_manager._dispatch_to_scheduler = self._dispatch_resumed
        self.tokenizer_manager._result_dispatcher += TypeBasedDispatcher([(StartedReqOutput, self._on_started)])

    def _on_started(self, report: StartedReqOutput) -> None:
        if report.recomputed_tokens:  # 0 is a request that was not resumed
            self.recomputed.append(report.recomputed_tokens)

    def shutdown(self) -> None:
        """Upstream's, which kills its processes, and the shared memory that they leave behind for that."""
        left = _shared_memory(psutil.Process().children(recursive=True))
        super().shutdown()
        for path in left:
            path.unlink(missing_ok=True)

    def _dispatch_resumed(self, message: Any) -> None:
        if isinstance(message, TokenizedGenerateReqInput) and message.rid in self._resumes:
            message = as_resumed(message, self._resumes.pop(message.rid))
        self._dispatch(message)

    def run(self, requests: list[Request], resumes: list[ResumeState | None] | None = None) -> list[dict[str, Any]]:
        """Last chunks of concurrent requests, each from the start or behind its ``resumes`` entry.

        Chunks are cumulative. That of a resumed request holds only its new ids and log-probs, but its whole text. An
        answer that is an error is returned as ``{"error": message}``.
        """
        return self.loop.run_until_complete(self._run(requests, resumes or [None] * len(requests)))

    def forget(self) -> None:
        """Empty the prefix cache and the cache of compiled grammars. Refused by upstream until the engine is idle."""
        for _ in range(100):
            if self.flush_cache().success:
                return
            time.sleep(0.05)
        raise TimeoutError("the engine does not become idle")

    async def _run(self, requests: list[Request], resumes: list[ResumeState | None]) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*map(self._one, requests, resumes)))

    async def _one(self, request: Request, resume: ResumeState | None) -> dict[str, Any]:
        self._count += 1
        rid = f"t{self._count}~0"
        if resume is not None:
            self._resumes[rid] = resume
        arguments = request.extra | {"input_ids": request.prompt, "sampling_params": dict(request.params), "rid": rid}
        answer: dict[str, Any] = {}
        try:
            # Streamed, as everything between frontend and groups: upstream then holds possible stop strings back.
            async for chunk in await self.async_generate(**arguments, stream=True):
                answer = chunk
        except Exception as error:
            return {"error": str(error)}
        reason = answer["meta_info"]["finish_reason"]
        return {"error": reason["message"]} if reason["type"] == "abort" else answer
