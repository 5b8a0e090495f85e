"""The supervisors of a group on two hosts, as real processes with light members: what ends on one ends on the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from supervised_group import LAUNCH_ID, MEMBER, alive, eventually, pid_of

from sglang_kevlar.protocol.cluster import Configuration
from sglang_kevlar.protocol.group import GroupReport, KillGroup
from sglang_kevlar.protocol.launch import (
    EXIT_CONFIG,
    EXIT_FAILED_START,
    JoinArgs,
    KevlarArgs,
    LaunchPlan,
    NodeArgs,
    Paths,
)

LEASE = 0.6

SUPERVISOR = """
import sys, msgspec
from sglang_kevlar.launcher.process import die_with_parent
die_with_parent()
from sglang_kevlar.launcher.status import StatusWriter
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.worker import follower, head, nodes
run_dir, status = sys.argv[1], StatusWriter(int(sys.argv[2]))
plan = msgspec.json.decode(open(Paths(run_dir).plan, "rb").read(), type=LaunchPlan)

def members(paths, plan, group):
    names = [f"rank{rank}" for rank in plan.ranks] + ["detokenizer"] * (0 in plan.ranks)
    return {name: [sys.executable, "-m", "fake_member", run_dir, "0", name] for name in names}

def noted(meet):
    def meeting(self):
        where = meet(self)
        with open(f"{run_dir}/meetings", "a") as file:
            file.write(f"--dist-host {where.host} --dist-port {where.port}\\n")
        return where
    return meeting

for each in (head.Head, follower.Follower):
    each._meeting = noted(each._meeting)
follower.engine_commands = head.engine_commands = members
sys.exit(nodes.run(Paths(run_dir), plan, 0, status, {"exit_on_failed_start": sys.argv[3] == "1"}))
"""


class Node:
    def __init__(
        self, run_dir: Path, rank: int, head: str, flags: dict[str, str], code: str = "", fail_fast: bool = False
    ) -> None:
        run_dir.mkdir()
        self.run_dir = run_dir
        self.paths = Paths(str(run_dir))
        self.rank = rank
        self.status = b""
        same = Configuration(
            version="1", upstream="1", model="m", model_digest="d", tp=2, pp=1, dtype="float32", kv_cache_dtype="auto",
            page_size=1, context_length=10, other=flags,
        )  # fmt: skip
        plan = LaunchPlan(
            version=1, upstream="", launch_id=f"{LAUNCH_ID[:-1]}{rank}", tp_size=2, pp_size=1, gpu_ids=[[0, 0]],
            kevlar=KevlarArgs(worker_groups=1, restart_backoff=0.05, restart_backoff_max=0.4, lease=LEASE), host="",
            port=0, server_args_file="", node_configuration=same,
            join=JoinArgs(frontends=[], name="g", host=f"h{rank}", node=NodeArgs(count=2, rank=rank, head=head)),
        )  # fmt: skip
        Path(self.paths.plan).write_bytes(msgspec.json.encode(plan))
        os.mkdir(self.paths.processes)
        (run_dir / "fake_member.py").write_text(MEMBER.replace(LAUNCH_ID, plan.launch_id))
        for name in ("rank0", "rank1", "detokenizer"):
            (run_dir / f"{name}.py").write_text(textwrap.dedent(code) if name == f"rank{rank}" else "")
            for step in ("load", "serve"):
                (run_dir / f"{name}.{step}.py").write_text("")
        self.process: subprocess.Popen[bytes] | None = None
        self.start(fail_fast)

    def start(self, fail_fast: bool = False) -> None:
        self._status, writer = os.pipe()
        search = os.pathsep.join([str(self.run_dir), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", SUPERVISOR, str(self.run_dir), str(writer), str(int(fail_fast))]
        environment = {**os.environ, "PYTHONPATH": search}
        self.process = subprocess.Popen(command, pass_fds=[writer], env=environment, stderr=subprocess.DEVNULL)
        os.close(writer)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(20)

    def said(self) -> bytes:
        return os.read(self._status, 65536)

    def pid(self, name: str) -> int:
        records = sorted(Path(self.paths.processes).glob(f"g0.{name}.*"), key=lambda path: path.stat().st_mtime_ns)
        return int(records[-1].read_text().split()[0])

    def has(self, name: str) -> bool:
        return bool(list(Path(self.paths.processes).glob(f"g0.{name}.*"))) and alive(self.pid(name))

    @property
    def meetings(self) -> list[str]:
        return (self.run_dir / "meetings").read_text().splitlines()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        os.close(self._status)
        for name in os.listdir("/dev/shm"):
            if f"{LAUNCH_ID[:-1]}{self.rank}" in name:
                os.unlink(f"/dev/shm/{name}")


class Group:
    """Both nodes, and the gateway's end of the first one's socket."""

    def __init__(self, directory: Path, flags: tuple[dict[str, str], dict[str, str]] = ({}, {})) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as probe:
            head = f"127.0.0.1:{probe.bind_to_random_port('tcp://127.0.0.1')}"
        self._directory, self.at, self._flags = directory, head, flags
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self._context.socket(zmq.ROUTER)
        self.nodes: list[Node] = []

    def start(self, rank: int, code: str = "", fail_fast: bool = False) -> Node:
        """``code``: what its rank does before it is ready."""
        node = Node(self._directory / f"n{rank}", rank, self.at, self._flags[rank], code, fail_fast)
        self.nodes.append(node)
        if rank == 0:
            self.router.bind(node.paths.control)
        return node

    def report(self, phase: str, after: int = -1, cause: str = "", timeout: float = 20) -> GroupReport:
        """The first node's next report of this phase, of an epoch behind ``after``."""
        seen = []
        while self.router.poll(timeout * 1000):
            self.identity, data = self.router.recv_multipart()
            report = msgspec.msgpack.decode(data, type=GroupReport)
            seen.append((report.phase, report.epoch, report.cause))
            if report.phase == phase and report.epoch > after and cause in report.cause:
                return report
            if len(seen) > 40 * timeout:
                break
        raise AssertionError(f"no such report in {seen[-20:]}")

    def kill(self, epoch: int) -> None:
        message = KillGroup(group=0, epoch=epoch, cause="fenced by the test")
        self.router.send_multipart([self.identity, msgspec.msgpack.encode(message)])

    def end(self) -> None:
        for node in self.nodes:
            node.end()
        self.router.close(linger=0)
        self._context.term()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    group = Group(tmp_path)
    yield group
    group.end()


@pytest.fixture
def both(group: Group) -> Group:
    group.start(0)
    group.start(1)
    return group


def gone(*pids: int) -> bool:
    return not any(map(alive, pids))


def test_ranks_start_together_and_the_group_is_ready_when_all_are(group: Group) -> None:
    first = group.start(0)
    assert group.report("down", cause="node 1: it has not joined").epoch == 0
    assert not first.has("rank0")
    second = group.start(1)
    report = group.report("ready")
    assert [member.name for member in report.members] == ["rank0", "detokenizer"]
    assert second.has("rank1") and not second.has("detokenizer")
    assert first.meetings == second.meetings and "--dist-host 127.0.0.1" in first.meetings[0]


def test_a_group_is_not_ready_before_all_of_its_ranks_are(group: Group) -> None:
    group.start(0)
    second = group.start(1, """
        while not os.path.exists(f"{run_dir}/go"):
            time.sleep(0.01)
        """)  # fmt: skip
    for _ in range(4):
        assert group.report("starting", after=0).epoch == 1
    (second.run_dir / "go").write_text("")
    assert group.report("ready").epoch == 1


@pytest.mark.parametrize("victim", [(0, "rank0"), (0, "detokenizer"), (1, "rank1")])
def test_a_process_that_dies_on_one_node_ends_the_epoch_on_both(both: Group, victim: tuple[int, str]) -> None:
    rank, name = victim
    before = group_ready = both.report("ready")
    pids = [pid_of(group_ready, "rank0"), pid_of(group_ready, "detokenizer"), both.nodes[1].pid("rank1")]
    os.kill(both.nodes[rank].pid(name), signal.SIGKILL)
    down = both.report("down")
    assert f"{name} (pid" in down.cause and ("node 1 (h1)" in down.cause) is (rank == 1)
    assert both.report("ready").epoch > before.epoch
    assert gone(*pids)
    assert both.nodes[0].meetings == both.nodes[1].meetings
    assert len(set(both.nodes[0].meetings)) == 2


def test_a_fenced_epoch_ends_on_both(both: Group) -> None:
    before = both.report("ready")
    pids = [pid_of(before, "rank0"), both.nodes[1].pid("rank1")]
    both.kill(before.epoch)
    assert both.report("ready", after=before.epoch)
    assert gone(*pids)


def test_a_stopped_rank_of_the_second_node_is_found_there(both: Group) -> None:
    both.report("ready")
    os.kill(both.nodes[1].pid("rank1"), signal.SIGSTOP)
    down = both.report("down")
    assert "node 1 (h1): rank1 stopped" in down.cause and down.kind == "stopped"
    both.report("ready")


def test_a_second_node_that_dies_is_waited_for(both: Group) -> None:
    before = both.report("ready")
    pids = [pid_of(before, "rank0"), both.nodes[1].pid("rank1")]
    both.nodes[1].signal(signal.SIGKILL)
    both.nodes[1].wait()
    down = both.report("down")
    assert "node 1 (h1)" in down.cause and down.kind == "network"
    eventually(lambda: gone(*pids))
    assert both.report("down", cause="its connection ended; node 1: its connection ended")
    both.nodes[1].start()
    assert both.report("ready").epoch > before.epoch


def test_a_first_node_that_dies_ends_the_ranks_of_the_second(both: Group) -> None:
    before = both.report("ready")
    rank = both.nodes[1].pid("rank1")
    both.nodes[0].signal(signal.SIGKILL)
    both.nodes[0].wait()
    eventually(lambda: gone(rank))
    both.nodes[0].start()
    assert both.report("ready", after=before.epoch)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_is_silent_for_a_lease_is_lost_on_the_other(both: Group, rank: int) -> None:
    before = both.report("ready")
    pids = {0: pid_of(before, "rank0"), 1: both.nodes[1].pid("rank1")}
    both.nodes[rank].signal(signal.SIGSTOP)
    eventually(lambda: gone(pids[1 - rank]))
    both.nodes[rank].signal(signal.SIGCONT)
    assert both.report("ready", after=before.epoch)
    assert gone(*pids.values())


def test_a_second_node_that_is_stopped_on_purpose_leaves(both: Group) -> None:
    before = both.report("ready")
    pids = [pid_of(before, "rank0"), both.nodes[1].pid("rank1")]
    both.nodes[1].signal(signal.SIGTERM)
    down = both.report("down")
    assert down.kind == "left" and "this node shuts down" in down.cause
    assert both.nodes[1].wait() == 0
    eventually(lambda: gone(*pids))


def test_a_first_node_that_is_stopped_ends_the_ranks_of_the_second_which_waits_for_it(both: Group) -> None:
    both.report("ready")
    rank = both.nodes[1].pid("rank1")
    both.nodes[0].signal(signal.SIGTERM)
    assert both.nodes[0].wait() == 0
    eventually(lambda: gone(rank))
    assert both.nodes[1].process is not None and both.nodes[1].process.poll() is None
    both.nodes[0].start()
    both.report("ready")
    both.nodes[1].signal(signal.SIGTERM)
    assert both.nodes[1].wait() == 0


def test_a_rank_that_does_not_start_on_the_second_node_is_said_and_tried_again(group: Group) -> None:
    group.start(0)
    second = group.start(1, 'say(status="error", error="no room"); sys.exit(1)')
    down = group.report("down", cause="rank1 failed to start: no room")
    assert "node 1 (h1)" in down.cause
    (second.run_dir / "rank1.py").write_text("")
    group.report("ready", after=down.epoch)


def test_a_first_start_that_fails_by_itself_ends_the_first_node_and_one_that_lost_a_node_does_not(group: Group) -> None:
    first = group.start(0, fail_fast=True)
    second = group.start(1, "time.sleep(1000)")
    group.report("starting", after=0)
    second.signal(signal.SIGKILL)
    second.wait()
    group.report("down", after=0, cause="node 1 (h1)")
    (second.run_dir / "rank1.py").write_text('say(status="error", error="no room"); sys.exit(1)')
    second.start(fail_fast=True)
    assert first.wait() == EXIT_FAILED_START
    assert "rank1 failed to start: no room" in first.said().decode()
    assert second.process is not None and second.process.poll() is None


def test_other_flags_are_refused_by_name(tmp_path: Path) -> None:
    group = Group(tmp_path, ({"nnodes": "2", "max_running_requests": "4"}, {"nnodes": "3"}))
    try:
        group.start(0)
        second = group.start(1)
        assert second.wait() == EXIT_CONFIG
        said = second.said().decode()
        assert "nnodes: '2' here, '3' there" in said and "max_running_requests: '4' here, not set there" in said
        assert group.report("down", cause="node 1: it has not joined")
    finally:
        group.end()


def test_a_second_process_of_one_node_does_not_get_in(both: Group, tmp_path: Path) -> None:
    before = both.report("ready")
    twin = Node(tmp_path / "twin", 1, both.at, {})
    try:
        eventually(lambda: (tmp_path / "twin").exists())
        for _ in range(4):
            report = both.report("ready")
        assert report.epoch == before.epoch
        assert not twin.has("rank1")
    finally:
        twin.end()


def test_an_address_that_is_taken_is_said(group: Group, tmp_path: Path) -> None:
    group.start(0)
    group.report("down")
    other = Node(tmp_path / "other", 0, group.at, {})
    try:
        assert other.wait() == EXIT_CONFIG
        assert "--dist-init-addr" in other.said().decode()
    finally:
        other.end()
