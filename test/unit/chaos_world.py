"""A server for `sglang_kevlar.chaos` to be tried on: its own answers, statuses and processes, and harm on demand.

Its processes only sleep; they are killed for real, and come again as those of a worker group would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from sglang_kevlar.launcher.process import identify, record
from sglang_kevlar.protocol.launch import KevlarArgs, LaunchPlan, Paths

_SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
#: seconds until a group that lost a process is ready again
RESTART = 0.3
MEMBERS = ("supervisor", "rank0", "detokenizer")


def answer_to(prompt: list[int], count: int) -> list[int]:
    return [100 + (sum(prompt) * 31 + position * position) % 1000 for position in range(count)]


class FakeServer:
    """Two groups. A context manager."""

    def __init__(self, directory: Path, launch_id: str = "0123abcd", allow_chaos: bool = False) -> None:
        self.paths = Paths(str(directory))
        plan = LaunchPlan(
            version=1,
            upstream="test",
            launch_id=launch_id,
            kevlar=KevlarArgs(allow_chaos=allow_chaos),
            tp_size=1,
            pp_size=1,
            gpu_ids=[[0], [0]],
            host="",
            port=0,
            server_args_file="",
        )
        Path(self.paths.plan).write_bytes(msgspec.json.encode(plan))
        #: what is wrong with the answers from now on; "" for nothing
        self.harm = ""
        #: tokens between which the reference has a tie, by position
        self.tie_at: int | None = None
        #: seconds between two tokens
        self.pace = 0.002
        self.moved = 0
        self._epochs = [1, 1]
        self._down_since: list[float | None] = [None, None]
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._failovers: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        for group in (0, 1):
            self._start(group)
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(30)
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for child in self._children.values():
            child.kill()
            child.wait()

    def pid(self, name: str) -> int:
        return self._children[name].pid

    def _start(self, group: int) -> None:
        arguments = ["sglang_kevlar.worker.supervisor", "--run-dir", self.paths.run_dir, "--group", str(group)]
        for member in MEMBERS:
            name = f"g{group}.{member}"
            if name in self._children:
                self._children[name].kill()
                self._children[name].wait()
            child = self._children[name] = subprocess.Popen([*_SLEEP, *arguments])
            identity = identify(child.pid)
            assert identity is not None
            record(self.paths.processes, name, identity)

    async def _serve(self) -> int:
        app = web.Application()
        app.add_routes([web.get("/kevlar/status", self._status), web.post("/generate", self._generate)])
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _end(self) -> None:
        await self._runner.cleanup()
        handlers = asyncio.all_tasks() - {asyncio.current_task()}
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)

    async def _status(self, _: web.Request) -> web.Response:
        now = time.monotonic()
        groups = []
        for group in (0, 1):
            dead = [name for name in MEMBERS if self._children[f"g{group}.{name}"].poll() is not None]
            if dead and self._down_since[group] is None:
                self._down_since[group] = now
                record = {"at": f"{now:.6f}", "group": group, "cause": f"{dead[0]} exited", "detect_ms": 1.0}
                record |= {"redirected": self.moved, "recomputed_tokens": 0, "restored_tokens": 0}
                self._failovers.append(record)
            since = self._down_since[group]
            if since is not None and now - since > RESTART:
                self._start(group)
                self._epochs[group] += 1
                self._down_since[group] = since = None
            pids = {
                "supervisor": self.pid(f"g{group}.supervisor"),
                "ranks": [self.pid(f"g{group}.rank0")],
                "detokenizer": self.pid(f"g{group}.detokenizer"),
            }
            state = "ready" if since is None else "restarting"
            groups.append({"id": group, "state": state, "epoch": self._epochs[group], "pids": pids, "running": group})
        body = {"uptime_s": now - self._started, "groups": groups, "failovers": self._failovers}
        return web.json_response(body)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        right = answer_to(prompt, count)
        if body.get("return_logprob"):
            top = [[[-1.0, token, None], [-3.0, token + 1, None]] for token in right]
            if self.tie_at is not None:
                top[self.tie_at][1][0] = -1.0 - 1e-6
            meta = {"completion_tokens": count, "finish_reason": {"type": "length"}, "output_top_logprobs": top}
            return web.json_response({"output_ids": right, "meta_info": meta})
        tokens = list(right)
        middle = count // 2
        if self.harm == "status":
            return web.json_response({"error": {"message": "no group"}}, status=503)
        if self.harm == "changed":
            tokens[middle] += 1
        if self.harm == "short":
            tokens = tokens[:-1]
        if self.harm == "doubled":
            tokens = [*tokens[: middle + 1], *tokens[middle:]]
        if not body["stream"]:
            return web.json_response({"output_ids": tokens, "meta_info": self._meta(tokens, len(tokens))})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):  # clients may leave
            await self._stream(request, response, tokens, middle)
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse, tokens: list[int], middle: int) -> None:
        for length in range(1, len(tokens) + 1):
            await asyncio.sleep(self.pace)
            event: dict[str, Any] = {"output_ids": tokens[:length], "meta_info": self._meta(tokens, length)}
            if length > middle:
                if self.harm == "hung":
                    await asyncio.sleep(30)
                if self.harm == "stall":
                    await asyncio.sleep(0.3 if length == middle + 1 else 0.0)
                if self.harm == "error":
                    event = {"error": {"message": "cannot be continued"}}
                if self.harm == "cut":
                    return
                if self.harm == "dropped" and request.transport is not None:
                    request.transport.close()
                    return
                if self.harm == "taken back":
                    event["output_ids"] = [token + 1 for token in tokens[:length]]
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if "error" in event:
                return
        await response.write(b"data: [DONE]\n\n")

    def _meta(self, tokens: list[int], length: int) -> dict[str, Any]:
        reason = {"type": "length"} if length == len(tokens) else None
        return {"completion_tokens": length, "finish_reason": reason}
