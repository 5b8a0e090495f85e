"""What waits on a device for ranks that are dead is given up, so that a rank can leave its epoch.

On a CPU a collective ends with the connection to the peer. A kernel of NCCL waits for ever, and the loop inside a CUDA
call waits for the kernel, where it hears no signal. NCCL has a call for that, which sets a flag that its kernels look
at; then it waits itself until the last graph that was captured over the communicator is gone. So each communicator
is given up in a thread, and nobody waits for these before the graphs are garbage.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.sampler import Sampler

if TYPE_CHECKING:
    from sglang_kevlar.worker.communicators import Group

logger = logging.getLogger(__name__)

#: seconds for a loop to leave by itself when it is asked to
BY_ITSELF = 0.1
#: What torch does by itself when NCCL tells it that a peer is gone: its watchdog sleeps for a minute, for others to
#: write down what they were at, with the lock that every collective takes, and then ends the process. With that lock it
#: also prints where each collective was called, for which it keeps traces. And looking for ranks that are out of step
#: (DESYNC_DEBUG) would have it handle errors again, whatever the first of these says.
_NOT_BY_TORCH = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
    "TORCH_NCCL_DESYNC_DEBUG": "0",
    "TORCH_FR_BUFFER_SIZE": "0",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
}
#: a logit in place of one that is no number; what is larger overflows when it is divided by a temperature
_UNLIKELY, _CERTAIN = -1e30, 1e30


def prepare() -> None:
    """Once, in a process that is to outlive its peers, before it has any.

    What was begun behind a collective that is given up runs on whatever that left. It is of no use to anybody, and
    most of it does no harm; but an index that is none is a fault, and CUDA lets no process outlive that. Sampled tokens
    are the only such numbers that the ranks of a stage agree on; and where torch draws them of probabilities that are
    no numbers, it asserts on the device.
    """
    os.environ.update(_NOT_BY_TORCH)
    agree, preprocess = Sampler._sync_token_ids_across_tp, Sampler._preprocess_logits

    def agree_on_tokens(sampler: Sampler, tokens: torch.Tensor, sampling: Any) -> None:
        agree(sampler, tokens, sampling)
        tokens.clamp_(0, sampling.vocab_size - 1)

    def of_numbers(sampler: Sampler, logits: torch.Tensor, sampling: Any) -> torch.Tensor:
        # Tokens that a grammar or a client has ruled out stay so.
        logits = preprocess(sampler, logits, sampling)
        return logits.nan_to_num_(nan=_UNLIKELY, posinf=_CERTAIN, neginf=float("-inf")).clamp_(max=_CERTAIN)

    Sampler._sync_token_ids_across_tp = agree_on_tokens
    Sampler._preprocess_logits = of_numbers


class DeviceAborts:
    """Of one process. `begin` may come from two threads: of whoever is first, it counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] | None = None

    def begin(self, groups: Iterable[Group]) -> None:
        """Everything that waits in a collective of these groups on a device goes on. They are of no use any more."""
        with self._lock:
            if self._threads is not None:
                return
            held = list(groups)
            # By what they are: some of upstream's groups are one.
            of_torch = {id(each): each for each in (torch.distributed.group.WORLD, *(g.device_group for g in held))}
            coordinators = {id(group.coordinator): group.coordinator for group in held}
            calls = [
                *map(_abort_of_torch, of_torch.values()),
                *map(_abort_of_pynccl, coordinators.values()),
            ]
            self._threads = [
                threading.Thread(target=_run, args=(call,), name="abort", daemon=True)
                for call in calls
                if call is not None
            ]
            for thread in self._threads:
                thread.start()

    def finish(self, seconds: float) -> None:
        """After the last graph. The next `begin` is for other groups. Raises RuntimeError."""
        with self._lock:
            deadline = time.monotonic() + seconds
            for thread in self._threads or ():
                thread.join(max(0.0, deadline - time.monotonic()))
            if any(thread.is_alive() for thread in self._threads or ()):
                raise RuntimeError(f"NCCL does not give a communicator up within {seconds:g} s: a graph may hold it")
            self._threads = None


def _abort_of_torch(group: Any) -> Callable[[], None] | None:
    try:
        backend = group._get_backend(torch.device("cuda"))
    except (AttributeError, RuntimeError):  # it has none for a device
        return None
    return backend.abort if backend.name() == "nccl" else None


def _abort_of_pynccl(coordinator: Any) -> Callable[[], None] | None:
    """Upstream's own communicator beside torch's, which is the one in captured graphs. It destroys none, ever."""
    communicator = getattr(coordinator, "pynccl_comm", None)
    if communicator is None or not communicator.available:
        return None
    # Not itself: it holds the group of CPUs beside it, at whose end others see that this rank has left.
    handle, nccl = communicator.comm, communicator.nccl
    # Upstream's table of functions does not have it. Not the attribute, whose types others may have set.
    function = nccl.lib["ncclCommAbort"]
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int

    def abort() -> None:
        nccl.NCCL_CHECK(function(handle))

    return abort


def _run(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:
        # It is not used again in any case, and whether the rank still waits for it will show.
        logger.warning("giving up a communicator: %s", error)


class Rescue:
    """Frees a loop that does not hear that it is to leave. To be made by the main thread, of one that is for good."""

    def __init__(self, asked_by: int, loop: Callable[[], object | None], give_up: Callable[[], None]) -> None:
        """``asked_by``: a signal with a handler in Python. ``loop``: which one runs now, if one does."""
        self._asked_by = asked_by
        self._loop = loop
        self._give_up = give_up
        # A byte for each signal comes at once, whatever the main thread is at.
        self._signals, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._former = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="rescue", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while numbers := self._signals.recv(64):
            loop = self._loop()
            if self._asked_by not in numbers or loop is None:
                continue
            time.sleep(BY_ITSELF)
            if self._loop() is loop:
                logger.info("Asked to leave, and the loop does not hear it: what it may wait for is given up.")
                try:
                    self._give_up()
                except Exception:  # it is asked again
                    logger.exception("What it may wait for could not be given up.")

    def close(self) -> None:
        """By the main thread."""
        signal.set_wakeup_fd(self._former)
        self._writer.close()
        self._thread.join()
        self._signals.close()
