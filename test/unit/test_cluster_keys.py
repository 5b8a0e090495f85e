"""Who has the cluster's key gets in, and nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sglang_kevlar.cluster import keys

WAIT = 3_000


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    context.linger = 0  # of all its sockets: one to a server that does not let it in never gets its message away
    yield context
    context.destroy(linger=0)


def made() -> keys.ClusterKey:
    secret = keys.generate().encode()
    return keys.ClusterKey(secret, zmq.curve_public(secret))


def listening(context: zmq.Context, key: keys.ClusterKey | None) -> tuple[zmq.Socket, str]:
    server = context.socket(zmq.ROUTER)
    keys.secure_server(server, key)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    return server, f"tcp://127.0.0.1:{port}"


def heard(server: zmq.Socket, wait: int) -> bytes | None:
    return server.recv_multipart()[-1] if server.poll(wait) else None


def dialled(context: zmq.Context, key: keys.ClusterKey | None, endpoint: str) -> zmq.Socket:
    client = context.socket(zmq.DEALER)
    keys.secure_client(client, key)
    client.connect(endpoint)
    client.send(b"hello")
    return client


def test_a_holder_of_the_key_is_heard(context: zmq.Context) -> None:
    key = made()
    admission = keys.admit_only(context, key)
    server, endpoint = listening(context, key)
    client = dialled(context, key, endpoint)
    assert heard(server, WAIT) == b"hello"
    client.close()
    admission.stop()


@pytest.mark.parametrize("which", ["none", "another", "its own pair behind the server's public key"])
def test_others_are_not(context: zmq.Context, which: str) -> None:
    key, other = made(), made()
    admission = keys.admit_only(context, key)
    server, endpoint = listening(context, key)
    if which == "its own pair behind the server's public key":
        client = context.socket(zmq.DEALER)
        client.curve_publickey, client.curve_secretkey, client.curve_serverkey = other.public, other.secret, key.public
        client.connect(endpoint)
        client.send(b"hello")
    else:
        client = dialled(context, None if which == "none" else other, endpoint)
    assert heard(server, 500) is None
    client.close()
    client = dialled(context, key, endpoint)
    assert heard(server, WAIT) == b"hello"
    client.close()
    admission.stop()


def test_a_key_from_a_file_and_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.ENVIRONMENT, raising=False)
    assert keys.load(None) is None
    file = tmp_path / "key"
    file.write_text(keys.generate() + "\n")
    file.chmod(0o600)
    loaded = keys.load(str(file))
    monkeypatch.setenv(keys.ENVIRONMENT, file.read_text())
    assert loaded == keys.load(None)
    assert loaded.secret.decode() not in repr(loaded)


def test_what_is_no_key_is_refused_by_name_and_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "key"
    for text in ("", "too short", "x" * 41, "\x00" * 40):
        file.write_text(text)
        file.chmod(0o600)
        with pytest.raises(keys.KeyProblem, match="is no cluster key"):
            keys.load(str(file))
    file.chmod(0o640)
    with pytest.raises(keys.KeyProblem, match="chmod 600"):
        keys.load(str(file))
    with pytest.raises(keys.KeyProblem, match="cannot read"):
        keys.load(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("*", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert keys.is_loopback(host) is loopback
