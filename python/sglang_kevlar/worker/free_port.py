"""A port for the rendezvous of a group's ranks."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection

#: below: services with fixed ports, mostly
_LOWEST = 10_000
_ATTEMPTS = 100


def free_port(group: int, groups: int, taken: Collection[int] = ()) -> int:
    """A port that nobody has now, and that nobody else is likely to take until the ranks bind it, seconds later.

    Not one of those that the kernel gives to outgoing connections, and of the others one that no other group of this
    server picks. ``taken``: ports that somebody will bind later.
    """
    candidates = range(_LOWEST, _first_ephemeral())
    if len(candidates) < 1000:  # a host on which nearly all ports are ephemeral
        candidates = range(_LOWEST, 65_536)
    ours = candidates[group % groups :: groups]
    for _ in range(_ATTEMPTS):
        port = random.choice(ours)
        if port not in taken and _is_free(port):
            return port
    raise OSError(f"none of {_ATTEMPTS} ports between {candidates[0]} and {candidates[-1]} is free")


def _first_ephemeral() -> int:
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            return int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768  # Linux's default


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
