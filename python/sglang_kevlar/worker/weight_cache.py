"""Weights of another process: upstream's weight cache daemon, one for each device (``--weight-cache-mode client``).

The daemon outlives groups, so a rank that starts maps its shard instead of loading it, and a spare takes no memory for
one. Who attaches, to which daemon, and that what lies there fits, is upstream's (``srt/weight_cache/ipc_loader.py``).
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
from typing import Any

from sglang.srt.weight_cache.ipc_loader import IpcModelLoader

logger = logging.getLogger(__name__)


def prepare() -> None:
    """Once, before weights are loaded."""
    IpcModelLoader._start_daemon_liveness_watchdog = _end_with


def _end_with(_loader: IpcModelLoader, daemon: int | None) -> None:
    """End this process as soon as the daemon is dead. Upstream looks every five seconds, and what a rank computes
    meanwhile is of memory that belongs to nobody.

    Raises RuntimeError when it is dead already, or cannot be watched.
    """
    if not daemon or daemon <= 0:
        raise RuntimeError("the weight cache daemon did not say which process it is, so its death would go unnoticed")
    try:
        watched = os.pidfd_open(daemon)
    except OSError as error:
        raise RuntimeError(f"the weight cache daemon (pid {daemon}) cannot be watched: {error}") from error

    def watch() -> None:
        dead = select.poll()
        dead.register(watched, select.POLLIN)
        dead.poll()
        logger.critical(
            "The weight cache daemon (pid %d) died, and the weights are its memory: this rank ends.", daemon
        )
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="weight-cache", daemon=True).start()
    logger.info("Weights are those of the weight cache daemon with pid %d.", daemon)


def holds(loaded: Any) -> bool:
    """Whether these weights (upstream's ``LoadedModel``) are a daemon's. Without one, upstream loads them from disk."""
    return bool(loaded.loader.preloaded_weights_bytes)
