"""Two processes with upstream's groups; one is killed while the other waits for it, which then meets a new one.

The same on a CPU (gloo) and on GPUs (NCCL: torch's group, upstream's PyNCCL, and that in a captured graph).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from sglang.srt.distributed import parallel_state  # noqa: E402
from sglang.srt.layers.sampler import Sampler  # noqa: E402

from sglang_kevlar.control.reforming import LEAVE_WITHIN_ON_DEVICE  # noqa: E402
from sglang_kevlar.worker import communicators, device_aborts  # noqa: E402
from sglang_kevlar.worker.free_port import free_port  # noqa: E402
from sglang_kevlar.worker.member import LEAVE  # noqa: E402

PATIENCE = 120.0


class Left(BaseException):
    pass


class Sums:
    """Over the ranks, by each way that there is."""

    def __init__(self, rank: int, port: int, backend: str) -> None:
        self.rank, self.backend = rank, backend
        meeting = f"tcp://127.0.0.1:{port}"
        device = torch.cuda.current_device() if backend == "nccl" else rank
        parallel_state.init_distributed_environment(2, rank, meeting, device, backend)
        parallel_state._TP = self.group = parallel_state.init_model_parallel_group(
            [[0, 1]], device, backend, use_custom_allreduce=False, group_name="tp"
        )
        self.graph: Any = None
        if backend == "nccl":
            self.static = torch.ones(8, device=self.group.device)
            self.graph = torch.cuda.CUDAGraph()
            with self.group.pynccl_comm.change_state(enable=True), torch.cuda.graph(self.graph):
                self.group.pynccl_comm.all_reduce(self.static)

    def check(self) -> None:
        expected = [3.0] * 8
        if self.graph is not None:
            self.static.fill_(self.rank + 1)
            self.graph.replay()
            torch.cuda.synchronize()
            assert self.static.tolist() == expected
            with self.group.pynccl_comm.change_state(enable=True):
                assert self._sum(self.group.pynccl_comm.all_reduce) == expected
        assert self._sum(lambda each: dist.all_reduce(each, group=self.group.device_group)) == expected

    def tokens(self) -> None:
        """A prefill with a grammar, as far as the ranks have to do with each other: logits, then which tokens."""
        logits = torch.ones(8, 256, device=self.group.device)
        gathered = [torch.empty_like(logits) for _ in range(2)]
        dist.all_gather(gathered, logits, group=self.group.device_group)
        sampled = torch.cat(gathered, dim=1).argmax(dim=1) + self.rank
        sampler = SimpleNamespace(tp_sync_group=self.group.device_group)
        Sampler._sync_token_ids_across_tp(sampler, sampled, SimpleNamespace(grammars=[None], vocab_size=512))
        counts = torch.zeros(8, 512, device=self.group.device)
        counts.scatter_add_(1, sampled.unsqueeze(1), torch.ones(8, 1, device=self.group.device))
        dist.all_reduce(counts, group=self.group.device_group)
        assert counts.sum() == 16

    def request(self) -> None:
        """What the first rank has for the others, when there is a request."""
        dist.broadcast_object_list([None], src=0, group=self.group.cpu_group)

    def nothing(self) -> None:
        while True:
            time.sleep(0.01)

    def _sum(self, how: Any) -> list[float]:
        each = torch.full((8,), self.rank + 1.0, device=self.group.device)
        how(each)
        return list(each.tolist())


class StandIn:
    """For PyNCCL where there is no device: to give it up takes until its graphs are gone, and then until its peers give
    it up, too. It holds the group of CPUs, as upstream's does."""

    available, comm = True, 1

    def __init__(self, group: Any, graphs_gone: threading.Event, peers: Any) -> None:
        self.group = group

        def abort(_: int) -> None:
            graphs_gone.wait(PATIENCE)
            peers.wait(PATIENCE)

        self.nccl = SimpleNamespace(lib={"ncclCommAbort": abort}, NCCL_CHECK=lambda _: None)


def member(rank: int, backend: str, on_device: bool, pipe: Any, peers: Any) -> None:
    loop: object | None = None

    def leave(*_: object) -> None:
        if loop is not None:
            raise Left

    if backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    elif on_device:
        communicators.uses_device = lambda: True
    signal.signal(LEAVE, leave)
    if on_device:
        device_aborts.prepare()
    device_aborts.Rescue(LEAVE, lambda: loop, communicators.give_up)
    while True:
        sums = Sums(rank, pipe.recv(), backend)
        sums.check()
        sums.tokens()
        pipe.send("met")
        way, graphs_gone = pipe.recv(), threading.Event()
        if backend == "gloo" and on_device and way in ("request", "nothing"):
            sums.group.pynccl_comm = StandIn(sums.group.cpu_group, graphs_gone, peers)
        loop = object()
        try:
            getattr(sums, way)()
            raise AssertionError("nobody was there, and it went on")
        except (Left, RuntimeError):
            loop = None
        del sums
        communicators.release()
        gc.collect()
        graphs_gone.set()
        communicators.finish()
        pipe.send("left")


class Pair:
    """Of such processes, from outside."""

    def __init__(self, backend: str, on_device: bool) -> None:
        # A process that has used the driver of its GPUs cannot be forked.
        self._context: Any = multiprocessing.get_context("spawn" if backend == "nccl" else "fork")
        self._how = backend, on_device
        self._peers = self._context.Barrier(2)
        self._members = [self._start(rank) for rank in range(2)]

    def _start(self, rank: int) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=member, args=(rank, *self._how, theirs, self._peers), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def meet(self) -> None:
        port = free_port(0, 1)
        for _, pipe in self._members:
            pipe.send(port)
        for rank in range(2):
            self._hear(rank, "met")

    def _hear(self, rank: int, word: str, patience: float = PATIENCE, asking: bool = False) -> None:
        process, pipe = self._members[rank]
        deadline = time.monotonic() + patience
        while not pipe.poll(0.2):
            assert process.is_alive() and time.monotonic() < deadline, f"rank {rank} does not say that it {word}"
            if asking:
                os.kill(process.pid, LEAVE)
        assert pipe.recv() == word

    def lose(self, rank: int, waits_for: str) -> None:
        """The other one waits for it, leaves, and is there for the next `meet` with a new one."""
        other = 1 - rank
        pid = self._members[other][0].pid
        self._members[other][1].send(waits_for)
        time.sleep(0.2)
        process, pipe = self._members[rank]
        process.kill()
        process.join()
        pipe.close()
        self._hear(other, "left", LEAVE_WITHIN_ON_DEVICE, asking=True)
        assert self._members[other][0].pid == pid
        self._members[rank] = self._start(rank)

    def leave(self) -> None:
        """Nobody is dead, and both are asked to leave; one waits for the other, and hears nothing."""
        pids = [process.pid for process, _ in self._members]
        for (_, pipe), way in zip(self._members, ("nothing", "request"), strict=True):
            pipe.send(way)
        time.sleep(0.2)
        for pid in pids:
            os.kill(pid, LEAVE)
        for rank in range(2):
            self._hear(rank, "left", LEAVE_WITHIN_ON_DEVICE)
        assert [process.pid for process, _ in self._members] == pids

    def end(self) -> None:
        for process, pipe in self._members:
            process.kill()
            process.join()
            pipe.close()


def lose_peers(backend: str, on_device: bool) -> None:
    pair = Pair(backend, on_device)
    try:
        pair.meet()
        for rank, waits_for in ((1, "check"), (0, "check"), (1, "tokens"), (0, "tokens")):
            pair.lose(rank, waits_for)
            pair.meet()
        pair.leave()
        pair.meet()
    finally:
        pair.end()
