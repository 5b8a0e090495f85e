"""Groups that lose ranks under load, the same on CPUs (test_reform.py) and on GPUs (test/gpu)."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
from cases import LONG_PROMPT, Answer, native
from server import Server

CASES = [
    native("greedy", sampling={"max_new_tokens": 100}),
    native("long", prompt=LONG_PROMPT, sampling={"max_new_tokens": 60}),
    native("penalty", sampling={"frequency_penalty": 0.6, "presence_penalty": 0.3, "max_new_tokens": 100}),
    native("log-probs", stream=False, return_logprob=True, logprob_start_len=0, sampling={"max_new_tokens": 100}),
    native("regex", sampling={"regex": r"([a-z]{1,6} ){40}", "max_new_tokens": 100}),
]


MANY = ["--max-redirects", "50", "--poison-deaths", "5"]


class World:
    """A server whose groups lose ranks, and what it answered before."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.expected: list[Answer] = self.ask()

    def ask(self) -> list[Answer]:
        with ThreadPoolExecutor(len(CASES)) as pool:
            return list(pool.map(lambda case: case.run(self.server.url), CASES))

    def check(self, answers: list[Answer]) -> None:
        differences = [
            f"{case.name}: {difference}"
            for case, one, other in zip(CASES, self.expected, answers, strict=True)
            if (difference := one.difference(other)) is not None
        ]
        assert not differences

    def lose(self, group: int, ranks: list[int], after: float) -> None:
        """Kill ranks of a group under load: the answers stay, and who lives keeps its process."""
        before = self.server.group(group)
        with ThreadPoolExecutor(len(CASES)) as pool:
            running = [pool.submit(case.run, self.server.url) for case in CASES]
            time.sleep(after)
            for rank in ranks:
                os.kill(before["pids"]["ranks"][rank], signal.SIGKILL)
            self.check([one.result() for one in running])
        now = self.wait_epoch(group, before["epoch"])
        for rank, (one, other) in enumerate(zip(before["pids"]["ranks"], now["pids"]["ranks"], strict=True)):
            assert (one != other) is (rank in ranks), f"rank {rank}: {one}, then {other}"

    def leave(self, group: int) -> None:
        """Nobody dies but the detokenizer: all ranks leave the epoch, and are those of the next."""
        before = self.server.group(group)
        os.kill(before["pids"]["detokenizer"], signal.SIGKILL)
        assert self.wait_epoch(group, before["epoch"])["pids"]["ranks"] == before["pids"]["ranks"]
        self.check(self.ask())

    def wait_epoch(self, group: int, behind: int) -> dict[str, Any]:
        def there(status: dict[str, Any]) -> bool:
            found = status["groups"][group]
            return found["epoch"] > behind and found["state"] == "ready"

        return self.server.wait(there, f"group {group} behind epoch {behind}")["groups"][group]

    def spare_takes_over(self, group: int) -> None:
        """The only rank of a group dies, and its spare is the next."""
        spare = self.spare(group)
        self.lose(group, [0], 0.3)
        assert self.server.group(group)["pids"]["ranks"] == [spare]

    def spare(self, group: int) -> int:
        """The rank that serves in no epoch. It is started while the group serves."""
        deadline = time.monotonic() + 60
        while True:
            found = self.server.group(group)["pids"]
            serving = {found["supervisor"], found["detokenizer"], *found["ranks"]}
            children = psutil.Process(found["supervisor"]).children()
            spares = [child.pid for child in children if child.pid not in serving and _is_rank(child)]
            if len(spares) == 1:
                return spares[0]
            assert time.monotonic() < deadline, spares
            time.sleep(0.2)

    def check_alone(self, group: int) -> None:
        """All cases on this group, while the other one starts."""
        other = self.server.group(1 - group)
        os.kill(other["pids"]["supervisor"], signal.SIGKILL)
        self.server.wait(lambda s: s["groups"][1 - group]["state"] != "ready", "the other group is down")
        self.check(self.ask())
        self.server.wait_ready()


def _is_rank(process: psutil.Process) -> bool:
    return "scheduler" in " ".join(process.cmdline()) or "rank" in process.name()
