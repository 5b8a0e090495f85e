"""`sglang_kevlar.ctl` as a process, against a small server that behaves as ours does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sglang_kevlar.ctl import tables
from sglang_kevlar.ctl.moves import Moves
from sglang_kevlar.ctl.server import Failed, KeyRefused, Server, Unreachable


class Fake:
    """Groups that drain at once, or never (``stuck``), and are back ``looks`` looks at the status after a restart."""

    def __init__(self) -> None:
        self.groups = [self.group(0), self.group(1)]
        self.keys: tuple[str, str] | None = None
        self.asked: list[str] = []
        self.stuck: set[int] = set()
        #: whose drain is forgotten, as by a frontend that starts anew; that die while they drain
        self.forgets: set[int] = set()
        self.dies: set[int] = set()
        #: never back
        self.lost: set[int] = set()
        self.back: dict[int, int] = {}
        self.answer: bytes | None = None
        #: of the status: what becomes of a weight update, look by look
        self.updates: list[dict[str, Any] | None] = []
        self.bodies: list[Any] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @staticmethod
    def group(number: int) -> dict[str, Any]:
        pids = {"supervisor": 10 + number, "ranks": [20 + number], "detokenizer": 30 + number}
        shadow = {"to": 1 - number, "lag_tokens": 14}
        return {
            "id": number, "name": str(number), "role": "active", "state": "ready", "epoch": 1, "pids": pids,
            "running": 3, "queued": 2, "shadow": shadow, "weight_version": "default", "host": "h", "link": "local",
            "cause": "", "moves_in_s": None,
        }  # fmt: skip

    def status(self) -> dict[str, Any]:
        for number, looks in list(self.back.items()):
            self.back[number] = looks - 1
            if looks <= 0:
                del self.back[number]
                self.groups[number].update(state="ready", epoch=self.groups[number]["epoch"] + 1)
        stall = {"p50": 12.3456, "max": 50.0}
        failover = {"at": "2026-11-27T00:00:00", "group": 0, "cause": "rank0 exited", "detect_ms": 0.4}
        failover |= {"redirected": 2, "recomputed_tokens": 28, "restored_tokens": 999, "stall_ms": stall}
        known = {"version": "1", "upstream": "2", "uptime_s": 5.0, "held": 0}
        update = self.updates.pop(0) if len(self.updates) > 1 else [*self.updates, None][0]
        return {**known, "groups": self.groups, "failovers": [failover], "weights": update}

    def act(self, path: str) -> tuple[int, Any]:
        self.asked.append(path)
        if path == "/kevlar/weights":
            return 202, {}
        _, _, _, number, action = path.partition("?")[0].split("/")
        group = self.groups[int(number)]
        if action == "drain":
            left = 1 if int(number) in self.stuck else 0
            group.update(state="draining", running=left, moves_in_s=None if int(number) in self.forgets else 0.0)
            if int(number) in self.dies:
                group.update(state="down")
        elif action == "undrain":
            group.update(state="ready", moves_in_s=None)
        elif group["state"] == "down":
            return 409, {"error": {"message": "it is down", "code": 409}}
        else:
            group.update(state="starting", running=0, moves_in_s=None)
            if int(number) not in self.lost:
                self.back[int(number)] = 3
        return 202, {"group": int(number), "action": action}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, fake.status() if self.path == "/kevlar/status" else None)

            def do_POST(self) -> None:
                if size := int(self.headers["Content-Length"] or 0):
                    fake.bodies.append(json.loads(self.rfile.read(size)))
                self._answer(*fake.act(self.path)) if self._allowed(admin=True) else self._answer(401, {})

            def _allowed(self, admin: bool) -> bool:
                wanted = None if fake.keys is None else f"Bearer {fake.keys[admin]}"
                return wanted is None or self.headers["Authorization"] == wanted

            def _answer(self, status: int, body: Any) -> None:
                if self.command == "GET" and not self._allowed(admin=False):
                    status, body = 401, {"error": "Unauthorized"}
                data = json.dumps(body).encode() if fake.answer is None else fake.answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    try:
        yield made
    finally:
        made.close()


def ctl(fake: Fake | str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    url = fake if isinstance(fake, str) else fake.url
    command = [sys.executable, "-m", "sglang_kevlar.ctl", words[0], "--url", url, *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env={**os.environ, **environment})


def moves(fake: Fake, said: list[str], timeout: float = 5.0, force: bool = False) -> Moves:
    """In virtual time."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return Moves(Server(fake.url, None, None), said.append, 1.0, timeout, force, lambda: now[0], sleep)


def test_status_and_failovers_for_people_and_programs(fake: Fake) -> None:
    fake.groups[1].update(state="draining", moves_in_s=3.2, cause="an \x1b[31mescape")
    shown = ctl(fake, "status")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[2].split()[:5] == ["GROUP", "ROLE", "STATE", "EPOCH", "PIDS"]
    assert "10 20 30" in lines[3] and "14 tok" in lines[3]
    assert "draining (moves in 3 s)" in lines[4]
    assert "an ?[31mescape" in shown.stdout and "\x1b" not in shown.stdout
    assert json.loads(ctl(fake, "status", "--json").stdout)["groups"] == fake.groups
    failovers = tables.of_failovers(fake.status()["failovers"])
    assert "rank0 exited" in failovers and "12.3 ms" in failovers and "50.0 ms" in failovers
    assert tables.of_failovers([]) == "none"
    # An older server says less.
    assert "rank0" in tables.of_failovers([{"cause": "rank0 exited", "group": 0}])


def test_restart_all_goes_one_after_the_other(fake: Fake) -> None:
    said: list[str] = []
    done = moves(fake, said).restart_all()
    assert [(each["group"], each["epoch"]) for each in done] == [(0, 2), (1, 2)]
    drain = "/kevlar/groups/{}/drain?deadline=1.0"
    assert fake.asked == [
        drain.format(0), "/kevlar/groups/0/restart", drain.format(1), "/kevlar/groups/1/restart"
    ]  # fmt: skip
    assert any("group 1: ready, epoch 2" in line for line in said)


def test_a_rolling_restart_stops_at_the_first_that_does_not_come_back(fake: Fake) -> None:
    fake.lost.add(0)
    with pytest.raises(Failed, match=r"group 0 is not back after 5 s.*restarted: 0 of 2; left alone: 1"):
        moves(fake, []).restart_all()
    assert all("groups/0" in path for path in fake.asked)


def test_a_group_that_does_not_get_empty_goes_on_serving(fake: Fake) -> None:
    fake.stuck.add(0)
    with pytest.raises(Failed, match="1 requests still run there"):
        moves(fake, []).restart(0)
    assert fake.asked[-1] == "/kevlar/groups/0/undrain" and fake.groups[0]["state"] == "ready"
    assert moves(fake, [], force=True).restart(0)["epoch"] == 2, "--force does not restart it"


def test_a_group_that_is_lost_while_it_drains_serves_when_it_is_back(fake: Fake) -> None:
    fake.dies.add(0)
    with pytest.raises(Failed, match="it is down"):
        moves(fake, []).restart(0)
    assert fake.asked[-1] == "/kevlar/groups/0/undrain"


@pytest.mark.parametrize("act", ["drain", "restart"])
def test_a_frontend_that_has_forgotten_a_drain_is_not_taken_for_an_empty_group(fake: Fake, act: str) -> None:
    fake.forgets.add(0)
    with pytest.raises(Failed, match="group 0 drains no more"):
        getattr(moves(fake, []), act)(0)
    assert "/kevlar/groups/0/restart" not in fake.asked


def test_the_last_group_is_not_emptied_unless_told_so(fake: Fake) -> None:
    fake.groups[1]["state"] = "down"
    for act in (moves(fake, []).restart, moves(fake, []).drain):
        with pytest.raises(Failed, match="no other group serves"):
            act(0)
    with pytest.raises(Failed, match="group 1 is down"):
        moves(fake, []).restart(1)
    assert not fake.asked
    moves(fake, [], force=True).drain(0)
    assert fake.groups[0]["state"] == "draining"


def test_drain_and_undrain(fake: Fake) -> None:
    drained = ctl(fake, "drain", "1", "--grace", "0", "--json")
    assert drained.returncode == 0 and json.loads(drained.stdout) == {"group": 1, "action": "drain"}
    assert "drains, 0 requests run" in drained.stderr
    assert ctl(fake, "undrain", "1").returncode == 0
    assert fake.asked == ["/kevlar/groups/1/drain?deadline=0.0", "/kevlar/groups/1/undrain"]
    unknown = ctl(fake, "drain", "7")
    assert unknown.returncode == 1 and "there is no group 7; there are: 0, 1" in unknown.stderr


def test_what_is_wrong_is_said_with_a_status_of_its_own(fake: Fake) -> None:
    fake.keys = ("user", "admin")
    refused = ctl(fake, "status")
    assert refused.returncode == 4 and "key is missing or wrong" in refused.stderr
    environment = {"SGLANG_KEVLAR_API_KEY": "user", "SGLANG_KEVLAR_ADMIN_API_KEY": "admin"}
    assert ctl(fake, "undrain", "0", **environment).returncode == 0
    assert ctl(fake, "undrain", "0", SGLANG_KEVLAR_API_KEY="user").returncode == 4
    fake.keys = None
    assert ctl(fake, "drain", "-1").returncode == 2
    assert ctl(fake, "restart").returncode == 2
    fake.groups[0]["state"] = "down"
    with pytest.raises(Failed, match="it is down"):
        Server(fake.url, None, None).maintain(0, "restart")
    for answer in (b"<html>", b"[1]", b'{"groups": 1}'):
        fake.answer = answer
        with pytest.raises(Unreachable, match="not as SGLang-Kevlar"):
            Server(fake.url, None, None).status()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://no.such.host.invalid", "nonsense", "http://[::", "http://localhost:abc", ""]
)
def test_a_server_that_is_not_there(url: str) -> None:
    with pytest.raises(Unreachable) as caught:
        Server(url, None, None, timeout=5).status()
    assert not isinstance(caught.value, KeyRefused) and caught.value.exit_status == 3


def test_it_goes_on_when_the_frontend_is_away_for_a_while(fake: Fake) -> None:
    """Of the frontend, that starts anew while a group is waited for."""
    real, away = Server.status, [0]

    class Away(Server):
        def status(self) -> dict[str, Any]:
            if len(fake.asked) == 2 and away[0] < 5:
                away[0] += 1
                raise Unreachable("away")
            return real(self)

    made = moves(fake, [])
    made._server = Away(fake.url, None, None)
    assert made.restart(0)["epoch"] == 2 and away[0] == 5


def update(state: str, **changes: Any) -> dict[str, Any]:
    groups = {"groups_done": [], "groups_left": [0, 1], "requests_left": 3, "model_path": "/new"}
    return {"state": state, "error": None, "doing": "", "seconds": 1.25, **groups} | changes


def test_weights_are_waited_for(fake: Fake) -> None:
    taken = update("running", doing="worker group 0: loads the weights")
    fake.updates = [taken, taken, update("running", doing="worker group 1: its requests end", groups_left=[1])]
    fake.updates.append(update("done"))
    said: list[str] = []
    assert moves(fake, said).roll_weights("/new", "two", None)["seconds"] == 1.25
    assert fake.bodies == [{"model_path": "/new", "weight_version": "two", "load_format": None, "deadline": 1.0}]
    assert said == [
        "worker group 0: loads the weights; groups left: 0, 1; requests on the old weights: 3",
        "worker group 1: its requests end; groups left: 1; requests on the old weights: 3",
    ]
    done = ctl(fake, "weights", "/new")
    assert (done.returncode, done.stdout) == (0, "all groups have the weights of /new, after 1.2 s\n")


def test_weights_that_are_not_taken(fake: Fake) -> None:
    fake.updates = [update("failed", error="worker group 0: not found")]
    failed = ctl(fake, "weights", "/new")
    assert failed.returncode == 1 and "no group has the weights: worker group 0: not found" in failed.stderr
    assert "group by group: failed, 1" in ctl(fake, "status").stdout
    fake.updates = [None]
    with pytest.raises(Failed, match="started anew"):
        moves(fake, []).roll_weights("/new", None, None)
    fake.updates = [update("running", doing="waits")]
    with pytest.raises(Failed, match="nothing has changed for 6 s: waits"):
        moves(fake, []).roll_weights("/new", None, None)


def test_sizing_is_shadow_sizing(tmp_path: Any) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "sglang_kevlar.ctl", "sizing", "--model-path", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert shown.returncode == 0 and "--shadow-memory is for each rank" in shown.stdout


def test_it_needs_no_engine() -> None:
    found = "import sys, sglang_kevlar.ctl.__main__; print([m for m in ('torch', 'sglang') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, timeout=50)
    assert shown.stdout.strip() == "[]", shown
