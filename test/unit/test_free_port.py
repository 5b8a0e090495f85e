"""Ports for the rendezvous: free, not ephemeral, and different for every group."""

from __future__ import annotations

import socket

import pytest

from sglang_kevlar.worker import free_port as module
from sglang_kevlar.worker.free_port import free_port


def test_groups_pick_different_ports_below_the_ephemeral_ones() -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first_ephemeral = int(file.read().split()[0])
    picked = [{free_port(group, 3) for _ in range(50)} for group in range(3)]
    assert not (picked[0] & picked[1] or picked[1] & picked[2] or picked[0] & picked[2])
    assert max(map(max, picked)) < first_ephemeral


def test_a_port_in_use_or_spoken_for_is_not_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        tried = iter([port, 20_001, 20_002])
        monkeypatch.setattr(module.random, "choice", lambda _: next(tried))
        monkeypatch.setattr(module, "_is_free", lambda p, real=module._is_free: p == 20_002 or (p == port and real(p)))
        assert free_port(0, 1, taken=(20_001,)) == 20_002


def test_with_no_port_at_all_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_free", lambda _: False)
    with pytest.raises(OSError, match="none of 100 ports"):
        free_port(0, 1)
