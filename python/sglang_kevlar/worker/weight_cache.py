"""Weights of another process: upstream's weight cache daemon, one for each device (``--weight-cache-mode client``).

The daemon outlives groups, so a rank that starts maps its shard instead of loading it, and a spare takes no memory for
one. Who attaches, to which daemon, and that what lies there fits, is upstream's (``srt/weight_cache/ipc_loader.py``).
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

from sglang.srt.platforms import current_platform
from sglang.srt.weight_cache.ipc_loader import IpcModelLoader
from sglang.srt.weight_cache.protocol import get_socket_path, recv_msg, send_msg

from sglang_kevlar.protocol.launch import EXIT_WEIGHTS_GONE

logger = logging.getLogger(__name__)

#: seconds for a daemon to say that it is there, and between two tries to find one
_ANSWERS_WITHIN, _LOOK_EVERY = 5.0, 0.2
#: seconds between two lines that say that it is waited for
_SAY_EVERY = 30.0
#: seconds for the last line of a rank: a log that is held up must not keep it alive
_LAST_WORDS = 0.1

#: daemons with which this process ends
_watched: set[int] = set()


def prepare(mapped_once: Path) -> None:
    """Once, before weights are loaded. ``mapped_once``: a file that says that this rank has had those of a daemon.

    From then on it waits for one: for as long as its group may take to start, a spare without end. Upstream would load
    from disk where none listens, and one that is started again listens only when it has loaded, too: the device would
    hold them twice.
    """
    fetch = IpcModelLoader._fetch_from_cache

    def fetch_again(loader: IpcModelLoader, model_config: Any, device_config: Any) -> dict[str, Any] | None:
        while True:
            waits = mapped_once.exists()
            if waits:
                _wait(loader.socket_path or get_socket_path(current_platform.get_device_uuid(device_config.gpu_id)))
            found: dict[str, Any] | None = fetch(loader, model_config, device_config)
            if found is not None or not waits:
                return found

    def end_with_daemon(loader: IpcModelLoader, daemon: int | None) -> None:
        _end_with(loader.socket_path, daemon)
        mapped_once.touch()

    IpcModelLoader._fetch_from_cache = fetch_again
    IpcModelLoader._start_daemon_liveness_watchdog = end_with_daemon


def holds(loaded: Any) -> bool:
    """Whether these weights (upstream's ``LoadedModel``) are a daemon's. Without one, upstream loads them from disk."""
    return bool(loaded.loader.preloaded_weights_bytes)


def _wait(path: str) -> None:
    say_at = time.monotonic()
    while _daemon_at(path) is None:
        if time.monotonic() >= say_at:
            logger.warning("Waiting for the weight cache daemon at %s, which had the weights of this rank.", path)
            say_at += _SAY_EVERY
        time.sleep(_LOOK_EVERY)


def _daemon_at(path: str) -> int | None:
    """The process that answers there, by its number in the namespace of this one; None: none of this user does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(_ANSWERS_WITHIN)
        try:
            line.connect(path)
            pid, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.getuid():
                return None
            send_msg(line, {"type": "ping"})
            answer = recv_msg(line)
        except (OSError, ValueError):
            return None
    return pid if answer.get("status") == "ok" else None


def _end_with(path: str, daemon: int | None) -> None:
    """End this process as soon as the daemon is dead. Upstream looks every five seconds, and what a rank computes
    meanwhile is of memory that belongs to nobody.

    Raises RuntimeError when its death could not be seen.
    """
    seen = _daemon_at(path)
    if seen is None:
        raise RuntimeError(f"the weight cache daemon at {path} does not answer any more")
    if daemon != seen:
        raise RuntimeError(
            f"the weight cache daemon at {path} says that it is process {daemon}, and from here it is {seen}: its "
            "death would not be seen. Both must be in one PID namespace"
        )
    if daemon in _watched:
        return
    try:
        watched = os.pidfd_open(daemon)
    except OSError as error:
        raise RuntimeError(f"the weight cache daemon (pid {daemon}) cannot be watched: {error}") from error
    _watched.add(daemon)
    threading.Thread(target=_watch, args=(watched, daemon), name="weight-cache", daemon=True).start()
    logger.info("Weights are those of the weight cache daemon with pid %d.", daemon)


def _watch(watched: int, daemon: int) -> None:
    dead = select.poll()
    dead.register(watched, select.POLLIN)
    dead.poll()
    why = f"The weight cache daemon (pid {daemon}) died, and the weights are its memory: this rank ends."
    words = threading.Thread(target=logger.critical, args=(why,), daemon=True)
    words.start()
    words.join(_LAST_WORDS)
    os._exit(EXIT_WEIGHTS_GONE)
