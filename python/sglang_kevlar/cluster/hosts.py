"""This host as others see it: its label, and the address at which they reach it."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import msgspec

from sglang_kevlar.cluster.keys import is_loopback
from sglang_kevlar.cluster.sockets import split_address
from sglang_kevlar.protocol.launch import JoinArgs, KevlarArgs


def label() -> str:
    """This host's name; what does not belong into a label is left out."""
    name = "".join(c for c in socket.gethostname().partition(".")[0] if c.isascii() and (c.isalnum() or c in "-_"))
    return name.lstrip("-_")[:64] or "host"


def completed(kevlar: KevlarArgs, join: JoinArgs | None) -> KevlarArgs:
    """With label and address where they were not given; for a launch that is alone as it was."""
    if join is None and kevlar.listen is None:
        return kevlar
    address = kevlar.advertise
    if address is None:
        address = _own(kevlar.listen) if kevlar.listen is not None else None
        if join is not None:
            address = towards(join.frontends[0])
    return msgspec.structs.replace(kevlar, advertise=address, host_label=kevlar.host_label or label())


def _own(listen: str) -> str | None:
    """The address that is listened on; for a wildcard the one behind this host's name. None: others reach none."""
    host = split_address(listen)[0].strip("[]")
    try:
        if not ip_address(host).is_unspecified:
            return host
    except ValueError:
        return host
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
    return None if is_loopback(found) else found


def towards(there: str) -> str | None:
    """The address of this host from which that one, HOST:PORT, is reached. Sends nothing."""
    host, port = split_address(there)
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None
