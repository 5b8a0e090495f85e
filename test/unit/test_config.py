"""Our own flags: what is ours, what is SGLang's, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest

from sglang_kevlar import config
from sglang_kevlar.protocol.launch import KevlarArgs
from sglang_kevlar.support_matrix import fields_of
from sglang_kevlar.upstream.contract import SUPPORTED


def test_flags_of_sglang_pass_through_in_order_and_ours_are_taken_out():
    args, rest = config.split_args(
        [
            "--model-path",
            "m",
            "--worker-groups",
            "3",
            "--lora-paths",
            "a=x",
            "b=y",
            "--hang-timeout=5",
            "--tp-size",
            "2",
        ]
    )
    assert (args.worker_groups, args.hang_timeout) == (3, 5.0)
    assert rest == ["--model-path", "m", "--lora-paths", "a=x", "b=y", "--tp-size", "2"]


def test_a_switch_takes_no_value():
    args, rest = config.split_args(["--allow-chaos", "--worker-groups", "3", "m"])
    assert args == KevlarArgs(allow_chaos=True, worker_groups=3) and rest == ["m"]


def test_defaults_are_those_of_the_protocol():
    assert config.split_args([]) == (KevlarArgs(), [])


@pytest.mark.parametrize("token", ["--worker-group", "--hang", "--hold", "-w"])
def test_no_abbreviation_of_ours_swallows_a_flag_of_sglang(token):
    args, rest = config.split_args([token, "7"])
    assert args == KevlarArgs()
    assert rest == [token, "7"]


def test_nothing_behind_a_double_dash_is_ours():
    assert config.split_args(["--", "--worker-groups", "9"]) == (KevlarArgs(), ["--", "--worker-groups", "9"])


def test_no_flag_of_ours_has_the_name_of_one_of_sglang():
    for version in SUPPORTED:
        assert not set(KevlarArgs.__struct_fields__) & fields_of(version)


def test_every_setting_has_a_flag_with_help_and_survives_json():
    args, _ = config.split_args(["--run-dir", "/tmp/x"])
    assert msgspec.json.decode(msgspec.json.encode(args), type=KevlarArgs) == args
    for field in KevlarArgs.__struct_fields__:
        assert config._FLAGS[field].help


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--worker-groups", "0"], "--worker-groups"),
        (["--worker-groups", "two"], "--worker-groups"),
        (["--worker-groups"], "--worker-groups"),
        (["--standby-groups", "2"], "--standby-groups"),
        (["--standby-groups", "-1"], "--standby-groups"),
        (["--spare-ranks", "-1"], "--spare-ranks"),
        (["--spare-ranks", "1", "--reform", "off"], "--spare-ranks"),
        (["--reform", "maybe"], "--reform"),
        (["--hold-queue", "-1"], "--hold-queue"),
        (["--stream-retention", "0"], "--stream-retention"),
        (["--stream-retention", "inf"], "--stream-retention"),
        (["--stream-memory", "0"], "--stream-memory"),
        (["--stream-memory", "1.5"], "--stream-memory"),
        (["--hang-timeout", "0"], "--hang-timeout"),
        (["--hang-timeout", "nan"], "--hang-timeout"),
        (["--start-timeout", "inf"], "--start-timeout"),
        (["--error-budget", "0"], "--error-budget"),
        (["--poison-deaths", "0"], "--poison-deaths"),
        (["--journal-interval", "0"], "--journal-interval"),
        (["--restart-backoff", "5", "--restart-backoff-max", "1"], "--restart-backoff-max"),
        (["--run-dir", "/" + "x" * 100], "--run-dir"),
        (["--run-dir", ""], "--run-dir"),
        (["--shadow-transport", "pigeon"], "--shadow-transport"),
        (["--listen", "nowhere"], "--listen"),
        (["--listen", "10.0.0.1:1000"], "--listen"),
        (["--listen", "127.0.0.1:1000", "--cluster-key-file", "/none"], "--cluster-key-file"),
        (["--lease", "0.1"], "--lease"),
        (["--host-label", "a/b"], "--host-label"),
        (["--listen", "127.0.0.1:1000", "--worker-groups", "0", "--standby-groups", "1"], "--standby-groups"),
    ],
)
def test_a_bad_value_exits_2_and_names_the_flag(argv, flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        config.split_args(argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flag}:" in error


def test_all_groups_may_be_on_other_hosts_where_they_can_join():
    args, _ = config.split_args(["--worker-groups", "0", "--listen", "[::1]:1000"])
    assert (args.worker_groups, args.listen) == (0, "[::1]:1000")


def test_config_imports_nothing_heavy():
    code = "import sys, sglang_kevlar.config; print(sorted({'torch', 'sglang', 'zmq'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_stock_becomes_sglangs_own_server_with_the_remaining_flags(monkeypatch):
    became = []
    monkeypatch.setattr(os, "execv", lambda path, argv: became.append(argv))
    with pytest.raises(SystemExit):  # execv does not return; what follows it here does not matter
        config.split_args(["--stock", "--model-path", "m", "--worker-groups", "0"])
    assert became == [[sys.executable, "-m", "sglang_kevlar.stock", "--model-path", "m"]]


def test_help_shows_both_ours_and_sglangs(capfd):
    done = subprocess.run(
        [sys.executable, "-c", "from sglang_kevlar import config; config.split_args(['--help'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours, _, theirs = done.stdout.partition("\nSGLang\n")
    assert "SGLang-Kevlar:" in ours and "--worker-groups" in ours and "--stock" in ours
    assert "--tensor-parallel-size" in theirs and "--mem-fraction-static" in theirs
