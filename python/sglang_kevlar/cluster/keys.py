"""``python -m sglang_kevlar.cluster.keys > FILE``: the key of a cluster, and sockets that speak only to its holders.

One secret, in a file or an environment variable, is what makes a process a member. Sockets use ZMQ's CURVE with it on
both ends: what they carry is encrypted and authenticated, frame by frame, and who does not have it gets no further
than the handshake.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass, field
from ipaddress import ip_address

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

#: the key itself, instead of a file
ENVIRONMENT = "SGLANG_KEVLAR_CLUSTER_KEY"
#: characters of a key: 32 bytes in Z85
_LENGTH = 40
#: name under which sockets ask whether a key may come in
_DOMAIN = "kevlar"
#: milliseconds in which a connection has to prove that it has the key: until then it costs a file descriptor
_HANDSHAKE = 5_000
#: milliseconds without a word of a peer's ZMQ after which its connection is closed
_HEARTBEAT, _HEARTBEAT_TIMEOUT = 1_000, 10_000


class KeyProblem(Exception):
    """There is no key, or it is none; the message is for the operator and does not contain it."""


@dataclass(frozen=True)
class ClusterKey:
    """Z85, 40 bytes each. Every member has both, and is server and client with the same pair."""

    secret: bytes = field(repr=False)
    public: bytes


def generate() -> str:
    """A new key, one line of text."""
    return zmq.curve_keypair()[1].decode()


def load(path: str | None) -> ClusterKey | None:
    """From the file at ``path``, or from the environment; None when there is neither. Raises KeyProblem."""
    if path is None:
        text, source = os.environ.get(ENVIRONMENT), ENVIRONMENT
        if text is None:
            return None
    else:
        source = path
        try:
            with open(path) as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    raise KeyProblem(f"others than its owner may read the cluster key {path}: chmod 600 it")
                text = file.read(1000)
        except (OSError, UnicodeDecodeError) as error:
            raise KeyProblem(f"cannot read the cluster key: {error}") from None
    secret = text.strip().encode()
    try:
        if len(secret) != _LENGTH:
            raise ValueError
        return ClusterKey(secret, zmq.curve_public(secret))
    except (ValueError, zmq.ZMQError):
        raise KeyProblem(f"{source} is no cluster key; python -m sglang_kevlar.cluster.keys makes one") from None


def is_loopback(host: str) -> bool:
    """Whether only this host reaches ``host``: there, and nowhere else, a key may be missing."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def secure_server(socket: zmq.Socket[bytes], key: ClusterKey | None) -> None:
    """Before it is bound. Its context must be one that `admit_only` was called for."""
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE)
    _watch_connections(socket)
    if key is not None:
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = key.public, key.secret
        socket.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)


def secure_client(socket: zmq.Socket[bytes], key: ClusterKey | None) -> None:
    """Before it is connected. It speaks to servers with the same key only."""
    _watch_connections(socket)
    if key is not None:
        socket.curve_publickey, socket.curve_secretkey = key.public, key.secret
        socket.curve_serverkey = key.public


def admit_only(context: zmq.Context[zmq.Socket[bytes]], key: ClusterKey | None) -> ThreadAuthenticator | None:
    """Start the thread that answers the context's sockets whether a client may come in. ``stop`` ends it."""
    if key is None:
        return None
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(_DOMAIN, _Holders(key))
    return authenticator


class _Holders:
    def __init__(self, key: ClusterKey) -> None:
        self._public = key.public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def _watch_connections(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("usage: python -m sglang_kevlar.cluster.keys > FILE")
    os.umask(0o077)
    print(generate())
