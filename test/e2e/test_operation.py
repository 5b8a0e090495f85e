"""Operating a server: control requests, maintenance, a dead frontend, refusals, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cases import LONG_PROMPT, PROMPT, native
from leftovers import Leftovers
from measured_load import MeasuredLoad
from server import Server, free_port

import monitoring


@pytest.fixture(scope="module")
def leftovers(tmp_path_factory: pytest.TempPathFactory) -> Leftovers:
    return Leftovers(tmp_path_factory.mktemp("run") / "r")


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory, leftovers: Leftovers):
    flags = ("--enable-metrics", "--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", "all")
    # The back-off is longer than the hold time, and does not grow.
    limits = ("--hold-timeout", "2", "--hold-queue", "3", "--restart-backoff", "4", "--restart-backoff-max", "4")
    eager = ("--hang-timeout", "2", "--hang-per-ktoken", "2")
    flags = (*flags, *limits, *eager, *leftovers.flags)
    server = Server(models / "llama-f32", tmp_path_factory.mktemp("server") / "log", *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


CASE = native("steady", sampling={"max_new_tokens": 80})


def post(server: Server, path: str, **body: object) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=180)


@pytest.mark.timeout(600)
def test_status_health_and_metrics(server: Server) -> None:
    status = server.status()
    assert {"version", "upstream", "uptime_s", "groups", "failovers"} <= status.keys()
    for number, group in enumerate(status["groups"]):
        assert group["id"] == number and group["state"] == "ready" and group["role"] == "active"
        for pid in (group["pids"]["supervisor"], *group["pids"]["ranks"], group["pids"]["detokenizer"]):
            os.kill(pid, 0)
    assert httpx.get(f"{server.url}/health_generate", timeout=30).status_code == 200
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    assert 'sglang_kevlar_group_ready{group="0"} 1.0' in metrics
    assert 'worker_group="1"' in metrics, "upstream's metrics do not tell the groups apart"


@pytest.mark.timeout(600)
def test_planned_restart_moves_live_requests(server: Server) -> None:
    server.wait_ready()
    expected = CASE.run(server.url)
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(CASE.run, server.url) for _ in range(6)]
        group = server.serving_group()
        epoch = server.group(group)["epoch"]
        assert post(server, f"/kevlar/groups/{group}/restart").status_code == 202
        answers = [one.result() for one in running]
    assert [expected.difference(answer) for answer in answers] == [None] * 6
    assert any(answer.redirects for answer in answers)
    server.wait(lambda s: s["groups"][group]["epoch"] > epoch and s["groups"][group]["state"] == "ready", "restart")
    assert post(server, "/kevlar/groups/7/restart").status_code == 404


def ctl(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_kevlar.ctl", words[0], "--url", server.url, *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


@pytest.mark.timeout(600)
def test_a_drain_moves_live_requests_and_is_taken_back(server: Server) -> None:
    """By the command line, which waits until the group is empty: what it ran goes on exactly in the other."""
    server.wait_ready()
    case = native("long", sampling={"max_new_tokens": 600})
    expected = case.run(server.url)
    epochs = [group["epoch"] for group in server.status()["groups"]]
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(case.run, server.url) for _ in range(6)]
        group = server.serving_group()
        drained = ctl(server, "drain", str(group), "--grace", "0")
        assert drained.returncode == 0, drained.stderr
        assert server.group(group)["running"] == 0
        answers = [one.result() for one in running]
    assert [expected.difference(answer) for answer in answers] == [None] * 6
    assert any(answer.redirects for answer in answers)
    status = ctl(server, "status")
    assert "draining" in status.stdout and status.returncode == 0
    assert ctl(server, "undrain", str(group)).returncode == 0
    assert [g["state"] for g in server.status()["groups"]] == ["ready"] * 2
    assert [g["epoch"] for g in server.status()["groups"]] == epochs, "it was started anew"
    assert ctl(server, "drain", "7").returncode == 1
    assert "drained by an operator" in ctl(server, "failovers").stdout


@pytest.mark.timeout(600)
def test_a_drained_group_gets_nothing_new(server: Server) -> None:
    server.wait_ready()
    assert post(server, "/kevlar/groups/1/drain").status_code == 202
    assert server.group(1)["state"] == "draining"
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(CASE.run, server.url) for _ in range(4)]
        server.serving_group()
        assert server.group(1)["running"] == 0
        assert all(one.result().status == 200 for one in running)
    assert post(server, "/kevlar/groups/1/restart").status_code == 202
    server.wait(lambda s: s["groups"][1]["state"] == "ready", "restart of the drained group")


@pytest.mark.timeout(600)
def test_run_time_changes_reach_a_group_that_starts_again(server: Server, models: Path, other_weights: Path) -> None:
    """Weights from disk and an adapter are loaded into all groups, and again into one that died."""
    server.wait_ready()
    before = CASE.run(server.url)
    assert post(server, "/flush_cache?timeout=30").status_code == 200
    update = post(server, "/update_weights_from_disk", model_path=str(other_weights), weight_version="two")
    assert update.status_code == 200, update.text
    load = post(server, "/load_lora_adapter", lora_name="late", lora_path=str(models / "lora"))
    assert load.status_code == 200, load.text
    adapted = native("adapted", lora_path="late", sampling={"max_new_tokens": 40})
    with ThreadPoolExecutor(8) as pool:
        after = list(pool.map(lambda _: CASE.run(server.url), range(8)))
        with_adapter = adapted.run(server.url)
    assert {tuple(answer.token_ids[0]) for answer in after} == {tuple(after[0].token_ids[0])}, "groups differ"
    assert after[0].token_ids != before.token_ids

    # Neither a frontend nor a group that starts again may forget it.
    replace_frontend(server)
    for group in (0, 1):
        server.kill(group)
        server.wait(lambda s, group=group: s["groups"][group]["state"] != "ready", "loss")
        server.wait(lambda s, group=group: s["groups"][group]["state"] == "ready", "return")
    server.wait_ready()
    assert all(group["weight_version"] == "two" for group in server.status()["groups"])
    with ThreadPoolExecutor(8) as pool:
        again = list(pool.map(lambda _: CASE.run(server.url), range(8)))
        adapted_again = list(pool.map(lambda _: adapted.run(server.url), range(4)))
    assert [after[0].difference(answer) for answer in again] == [None] * 8
    assert [with_adapter.difference(answer) for answer in adapted_again] == [None] * 4
    undo = post(server, "/update_weights_from_disk", model_path=str(models / "llama-f32"))
    assert undo.status_code == 200, undo.text
    assert CASE.run(server.url).token_ids == before.token_ids


@pytest.mark.timeout(600)
def test_weights_go_from_group_to_group(server: Server, models: Path, other_weights: Path) -> None:
    """Under load: each answer is of one version, whole, and says which; also one that is made in several parts."""
    server.wait_ready()
    cases = [
        *(native(f"stream {i}", prompt=f"def f{i}(x):", sampling={"max_new_tokens": 300}) for i in range(3)),
        native("several", prompt="class A:", sampling={"max_new_tokens": 60, "n": 3}),
    ]

    def answers() -> list[list[list[int]]]:
        with ThreadPoolExecutor(len(cases)) as pool:
            return [answer.token_ids for answer in pool.map(lambda case: case.run(server.url), cases)]

    one = answers()
    done = ctl(server, "weights", str(other_weights), "--version", "two")
    assert done.returncode == 0, done.stderr
    two = answers()
    assert all(before != after for before, after in zip(one, two, strict=True))
    expected = [(case, {"one": a, "two": b}) for case, a, b in zip(cases, one, two, strict=True)]
    with MeasuredLoad(server, expected) as load:
        load.more(4)
        done = ctl(server, "weights", str(models / "llama-f32"), "--version", "one")
        assert done.returncode == 0, done.stderr
        load.more(4)
    assert load.versions.keys() == {"one", "two"} and load.phase.moved
    assert server.status()["weights"]["state"] == "done"

    refused = ctl(server, "weights", "/nowhere")
    assert refused.returncode == 1 and "no group has the weights" in refused.stderr, refused.stderr
    assert [group["weight_version"] for group in server.status()["groups"]] == ["one", "one"]
    assert answers() == one


@pytest.mark.timeout(600)
def test_with_no_group_requests_wait_and_then_end_clearly(server: Server) -> None:
    """Beyond the hold queue and beyond the hold time: 503 with Retry-After; after the first token no [DONE]."""
    server.wait_ready()
    streaming = native("cut", sampling={"max_new_tokens": 3000})
    with ThreadPoolExecutor(16) as pool:
        begun = pool.submit(streaming.run, server.url)
        server.serving_group()
        time.sleep(0.5)
        # Nobody comes back in time.
        server.kill_all_at_once()
        server.wait(lambda s: not any(g["state"] == "ready" for g in s["groups"]), "loss of both groups", 30)
        body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 4}}
        waiting = [pool.submit(post, server, "/generate", **body, stream=i % 2 == 0) for i in range(8)]
        refused = [one.result() for one in waiting]
        cut = begun.result()
    assert all(response.status_code == 503 for response in refused)
    assert all(int(response.headers["retry-after"]) > 0 for response in refused)
    texts = " ".join(response.text for response in refused)
    assert "hold queue is full" in texts and "waited 2 s" in texts
    assert not cut.done and "waited" in cut.error, (cut.done, cut.error)
    server.wait_ready()
    assert CASE.run(server.url).status == 200


@pytest.mark.timeout(600)
def test_bad_requests_during_a_failover(server: Server) -> None:
    """A client's mistake is the client's, whatever else is going on; nothing accepted is lost by it."""
    server.wait_ready()
    failovers = len(server.status()["failovers"])
    expected = CASE.run(server.url)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(CASE.run, server.url) for _ in range(4)]
        server.kill(server.serving_group())
        bad = [
            post(server, "/generate", text=PROMPT, sampling_params={"temperature": -1}),
            post(server, "/generate", text=PROMPT, sampling_params={"max_new_tokens": 10**9}),
            post(server, "/generate", sampling_params={}),
            # Each of these would end every scheduler it reaches, or this frontend.
            post(server, "/generate", text=PROMPT, sampling_params={"regex": 5}),
            post(server, "/generate", text=PROMPT, sampling_params={"top_k": 2**40}, stream=True),
            post(server, "/generate", text=[PROMPT, PROMPT], sampling_params={"top_k": 10**30}),
            post(server, "/generate", text=PROMPT, sampling_params={"max_new_tokens": 5.5, "n": 2}),
            post(server, "/generate", text=PROMPT, rid="HEALTH_CHECK_mine"),
            post(server, "/v1/completions", model="m", prompt=PROMPT, max_tokens="many"),
            post(server, "/generate", text=PROMPT, lora_path="never-loaded"),
            httpx.post(f"{server.url}/generate", content=b"{not json", timeout=30),
        ]
        answers = [one.result() for one in running]
    assert [response.status_code // 100 for response in bad] == [4] * len(bad), [r.text[:200] for r in bad]
    assert [expected.difference(answer) for answer in answers] == [None] * 4
    assert len(server.status()["failovers"]) == failovers + 1


@pytest.mark.timeout(600)
def test_no_false_alarm(server: Server) -> None:
    """A starved machine, long prefills, and stops shorter than the grace are no failures."""
    server.wait_ready()
    failovers, epochs = server.status()["failovers"], [group["epoch"] for group in server.status()["groups"]]
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        with ThreadPoolExecutor(8) as pool:
            cases = [
                native(f"long {i}", prompt=f"# {i}\n{LONG_PROMPT}", sampling={"max_new_tokens": 24}) for i in range(8)
            ]
            running = [pool.submit(case.run, server.url) for case in cases]
            for _ in range(4):
                for group in (0, 1):
                    pid = server.kill(group, "rank", signal.SIGSTOP)
                    time.sleep(0.05)
                    os.kill(pid, signal.SIGCONT)
            answers = [one.result() for one in running]
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert [(answer.status, len(answer.token_ids[0]), answer.redirects) for answer in answers] == [(200, 24, 0)] * 8
    status = server.status()
    assert status["failovers"] == failovers and [group["epoch"] for group in status["groups"]] == epochs


@pytest.mark.timeout(600)
def test_a_dead_frontend_finds_its_groups_running(server: Server) -> None:
    server.wait_ready()
    before = [group["pids"] for group in server.status()["groups"]]
    replace_frontend(server)
    assert [group["pids"] for group in server.status()["groups"]] == before, "groups did not outlive the frontend"
    assert CASE.run(server.url).status == 200


@pytest.mark.timeout(600)
def test_what_the_dashboard_and_the_alerts_ask_for_is_there(server: Server) -> None:
    """After all of the above: what was never counted is not exposed."""
    server.wait_ready()
    assert CASE.run(server.url).status == 200
    assert monitoring.missing(server.get("/metrics").text) == []


def replace_frontend(server: Server) -> None:
    frontend = server.frontend_pid()
    os.kill(frontend, signal.SIGKILL)
    server.wait(lambda s: s["uptime_s"] < 60 and all(g["state"] == "ready" for g in s["groups"]), "new frontend")
    server.wait_ready()


# ---- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_nothing_is_left_behind_after_ctrl_c(server: Server, leftovers: Leftovers) -> None:
    """The last test of this server. The same when the launcher is killed: test_failover.py."""
    leftovers.check_end(server, signal.SIGINT)


def launch(*flags: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_kevlar.launch_server", "--port", str(free_port()), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--worker-groups", "0"], "worker-groups"),
        (["--dp-size", "2"], "dp-size"),
    ],
)
def test_impossible_flags_are_refused_by_name(models: Path, flags: list[str], said: str) -> None:
    """One of ours, one of upstream's. All that are refused: test_config.py and test_support_matrix.py in test/unit."""
    result = launch("--model-path", str(models / "llama-f32"), *flags)
    assert result.returncode in (2, 78), result.stderr[-2000:]
    assert said in result.stderr


@pytest.mark.timeout(600)
def test_a_model_that_does_not_load_ends_the_start(models: Path, tmp_path: Path) -> None:
    """Weights cut short: the launcher says which group failed and why, and ends."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (models / "llama-f32").iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    result = launch("--model-path", str(broken), "--worker-groups", "1")
    assert result.returncode != 0
    assert "failed to start" in result.stderr and "worker group" in result.stderr
