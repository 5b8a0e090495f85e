"""The command line of launch_worker_group: bad input is refused by name, what is not given is the frontend's."""

from __future__ import annotations

import msgspec
import pytest

from sglang_kevlar import join_config
from sglang_kevlar.launcher.prepare import for_groups
from sglang_kevlar.protocol.launch import KevlarArgs, NodeArgs

AT = "127.0.0.1:1000"


def test_ours_and_theirs() -> None:
    flags, theirs = join_config.split_args(
        [
            "--join",
            f"{AT}, [::1]:2",
            "--tp-size",
            "2",
            "--name",
            "a-1",
            "--standby",
            "--hang-timeout=9",
            "--device",
            "cpu",
        ]
    )
    assert flags.frontends == [AT, "[::1]:2"] and flags.name == "a-1" and flags.standby
    assert flags.given == {"hang_timeout": 9.0} and theirs == ["--tp-size", "2", "--device", "cpu"]


def test_a_node_of_a_group_on_several_hosts() -> None:
    argv = ["--join", AT, "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "127.0.0.1:5", "--tp-size", "4"]
    flags, theirs = join_config.split_args(argv)
    assert flags.node == NodeArgs(count=2, rank=1, head="127.0.0.1:5") and theirs == ["--tp-size", "4"]
    assert join_config.split_args(["--join", AT, "--nnodes", "1"])[0].node is None


def test_settings_are_the_frontends_but_for_what_is_given_and_what_is_of_a_host() -> None:
    there = KevlarArgs(
        worker_groups=4, standby_groups=2, hang_timeout=5.0, shadow_memory=1.5, stop_grace=0.5, listen=AT,
        run_dir="/there", advertise="10.0.0.1", host_label="there", cluster_key_file="/there/key",
    )  # fmt: skip
    flags, _ = join_config.split_args(["--join", AT, "--hang-timeout", "9"])
    ours = flags.settings(msgspec.to_builtins(there))
    assert ours == KevlarArgs(worker_groups=1, standby_groups=0, hang_timeout=9.0, shadow_memory=1.5, stop_grace=0.5)
    standby, _ = join_config.split_args(["--join", AT, "--standby"])
    assert standby.settings({}).standby_groups == 1
    with pytest.raises(msgspec.ValidationError):
        flags.settings({"shadow_memory": "much"})


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--join"),
        (["--join", "nowhere"], "argument --join: must be HOST:PORT, got 'nowhere'"),
        (["--join", "h:0"], "argument --join: must be HOST:PORT"),
        (["--join", f"{AT},{AT}"], "argument --join: must be at most 16 frontends, each once"),
        (["--join", AT, "--name=-x"], "argument --name: must be 1 to 64"),
        (["--join", AT, "--host-label", "a b"], "argument --host-label: must be 1 to 64"),
        (["--join", AT, "--nnodes", "0"], "argument --nnodes: must be at least 1, got 0"),
        (["--join", AT, "--node-rank", "1"], "argument --nnodes: --node-rank and --dist-init-addr are for a group on"),
        (["--join", AT, "--nnodes", "2", "--node-rank", "1"], "argument --nnodes: 2 nodes need --node-rank and --dist"),
        (
            ["--join", AT, "--nnodes", "2", "--node-rank", "2", "--dist-init-addr", AT],
            "argument --node-rank: must be 0 to 1, got 2",
        ),
        (
            ["--join", AT, "--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "here"],
            "argument --dist-init-addr: must be HOST:PORT, got 'here'",
        ),
        (
            ["--join", AT, "--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "10.0.0.1:1000"],
            "argument --dist-init-addr: 10.0.0.1:1000 is not a loopback address, which needs a cluster key",
        ),
        (["--join", AT, "--stop-grace", "0"], "argument --stop-grace: must be a positive number"),
        (
            ["--join", "10.0.0.1:1000"],
            "argument --join: 10.0.0.1:1000 is not a loopback address, which needs a cluster key",
        ),
        (["--join", AT, "--cluster-key-file", "/none"], "argument --cluster-key-file: cannot read the cluster key"),
    ],
)
def test_bad_input_exits_2_and_is_named(argv, said, capsys, monkeypatch) -> None:
    monkeypatch.delenv("SGLANG_KEVLAR_CLUSTER_KEY", raising=False)
    with pytest.raises(SystemExit) as exit_:
        join_config.split_args(argv)
    assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_help_needs_nothing(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        join_config.split_args(["--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "--join" in out and "--standby" in out and "--worker-groups" not in out


def test_flags_of_one_host_and_secrets_are_not_told() -> None:
    argv = [
        "--model-path",
        "m",
        "--port",
        "1",
        "--api-key=secret",
        "--lora-paths",
        "a=b",
        "c=d",
        "--host",
        "h",
        "--weight-cache-socket",
        "/tmp/s",
        "--tp",
        "2",
    ]
    assert for_groups(argv) == ["--model-path", "m", "--lora-paths", "a=b", "c=d", "--tp", "2"]
