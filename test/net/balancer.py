"""A load balancer in front of several HTTP servers, as an operator would have it: HAProxy, or nginx.

    with Balancer({"a": ("10.77.0.1", 30000), "b": ("10.77.0.2", 30000)}) as balancer:
        httpx.get(balancer.url)
        balancer.wait({"a": "UP", "b": "DOWN"})

A request is sent to another server only if none has seen a byte of it. Streams are passed on as they come.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

Start = Callable[..., subprocess.Popen]
#: seconds for a start, an end, a change of state
_PATIENCE = 20.0

_HAPROXY = """
global
    stats socket {directory}/stats mode 600
    # By default it makes room for as many as this machine lets it open.
    maxconn 1000
defaults
    mode {mode}
    timeout connect 1s
    timeout check 500ms
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
    retries 2
    option redispatch 1
{http}
frontend public
    bind {address}:{port}
    default_backend servers
backend servers
    balance roundrobin
    option httpchk GET {check}
    default-server check inter 200ms fall 2 rise 1{marked_down}
{servers}
"""
_HAPROXY_HTTP = """    option http-no-delay
    retry-on conn-failure
"""

_NGINX = """
daemon off;
master_process off;
pid {directory}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory};
    proxy_temp_path {directory};
    fastcgi_temp_path {directory};
    uwsgi_temp_path {directory};
    scgi_temp_path {directory};
    upstream servers {{
{servers}
    }}
    server {{
        listen {address}:{port};
        location / {{
            proxy_pass http://servers;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_connect_timeout 1s;
            proxy_read_timeout 1h;
            proxy_next_upstream error timeout;
        }}
    }}
}}
"""


def unavailable(kind: str = "haproxy") -> str | None:
    """Why there is no such balancer on this machine; None: there is."""
    return None if shutil.which(kind) else f"no {kind} (Debian: apt-get install {kind})"


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


class Balancer:
    """Context manager. ``start`` and ``network`` put it onto a host: ``Host.popen`` and ``Host.network``.

    ``mode`` is HAProxy's: ``http`` chooses a server for each request, ``tcp`` for each connection. With
    ``cut_when_down`` it closes the streams of a server that fails its checks. SGLang's /health makes a token each time;
    a ``check`` of /ready does not. nginx checks nobody: a server whose
    connection failed gets none for a second.
    """

    def __init__(
        self,
        servers: Mapping[str, tuple[str, int]],
        *,
        kind: str = "haproxy",
        mode: str = "http",
        cut_when_down: bool = False,
        check: str = "/health",
        address: str = "127.0.0.1",
        start: Start = subprocess.Popen,
        network: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._servers = servers
        self._kind = kind
        self._mode = mode
        self._cut_when_down = cut_when_down
        self._check = check
        self._address = address
        self._start = start
        self._network = network
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Balancer:
        with contextlib.ExitStack() as stack:
            self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-balancer-")))
            self._log: IO[bytes] = stack.enter_context((self._directory / "log").open("wb"))
            with self._network():
                self.port = _free_port(self._address)
            self.url = f"http://{self._address}:{self.port}"
            self._process = self._start(self._command(), stdout=self._log, stderr=subprocess.STDOUT)
            stack.callback(self._end)
            self._wait_listening()
            self._ending = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def states(self) -> dict[str, str]:
        """Each server as HAProxy sees it: ``UP`` or ``DOWN`` (or on its way to either, as ``UP 1/2``)."""
        with socket.socket(socket.AF_UNIX) as stats:
            stats.settimeout(_PATIENCE)
            stats.connect(str(self._directory / "stats"))
            stats.sendall(b"show stat\n")
            answer = b"".join(iter(lambda: stats.recv(65_536), b"")).decode()
        header, *rows = answer.lstrip("# ").splitlines()
        columns = header.split(",")
        found = (dict(zip(columns, row.split(","), strict=False)) for row in rows if row)
        return {row["svname"]: row["status"] for row in found if row["svname"] in self._servers}

    def wait(self, wanted: Mapping[str, str]) -> None:
        """Until HAProxy sees the servers so."""
        deadline = time.monotonic() + _PATIENCE
        while (states := self.states()) != dict(wanted):
            assert time.monotonic() < deadline, f"{states}, not {wanted}, for {_PATIENCE:g} s"
            time.sleep(0.02)

    def _command(self) -> list[str]:
        if self._kind == "nginx":
            servers = [f"        server {host}:{port} fail_timeout=1s;" for host, port in self._servers.values()]
            text = _NGINX
        else:
            servers = [f"    server {name} {host}:{port}" for name, (host, port) in self._servers.items()]
            text = _HAPROXY
        text = text.format(
            directory=self._directory,
            address=self._address,
            port=self.port,
            mode=self._mode,
            http=_HAPROXY_HTTP if self._mode == "http" else "",
            check=self._check,
            marked_down=" on-marked-down shutdown-sessions" if self._cut_when_down else "",
            servers="\n".join(servers),
        )
        configuration = self._directory / "configuration"
        configuration.write_text(text)
        if self._kind == "nginx":
            return ["nginx", "-e", "stderr", "-p", str(self._directory), "-c", str(configuration)]
        return ["haproxy", "-db", "-f", str(configuration)]

    def _wait_listening(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            with contextlib.suppress(OSError), self._network():
                socket.create_connection((self._address, self.port), timeout=1).close()
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._kind} does not start: {(self._directory / 'log').read_text()[-1000:]}")
            time.sleep(0.02)

    def _end(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(_PATIENCE)
