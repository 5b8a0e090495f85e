"""launcher.prepare: decided once, for all processes; what cannot work is refused before anything starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from sglang_kevlar.cluster import keys
from sglang_kevlar.launcher import prepare
from sglang_kevlar.protocol.launch import EXIT_CONFIG, KevlarArgs, LaunchPlan, Paths

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}

#: what every process of a launch does with the record
LOAD = """
import os, sys
from sglang_kevlar.platform import torchvision_shim
from sglang_kevlar.upstream import saved_args
torchvision_shim.install()
record = saved_args.load(sys.argv[1])
from sglang.srt.runtime_context import SpawnRanks, assert_published, get_device, get_exec, get_lora, publish
publish(record, role="scheduler", ranks=SpawnRanks(world_rank=1, gpu_id=0))
assert_published(record, role="scheduler")
print(get_device().random_seed, [(ref.lora_name, ref.lora_id) for ref in get_lora().lora_paths],
      get_exec().deterministic.enable_deterministic_inference, record._model_config.hf_config.hidden_size,
      os.environ["SGLANG_ENABLE_DETERMINISTIC_INFERENCE"])
"""


#: runs every case in a fork of one process that has imported SGLang: imports are most of the time
FORKS = """
import importlib, json, os, sys
from sglang_kevlar.launcher import prepare
from sglang_kevlar.platform import torchvision_shim
torchvision_shim.install()
for name in ("sglang.srt.server_args", "sglang.srt.entrypoints.engine"):
    importlib.import_module(name)
for run_dir, argv in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        os.dup2(os.open(f"{run_dir}/stderr", os.O_WRONLY | os.O_CREAT), 2)
        status = 1
        try:
            status = prepare.main(argv)
        except SystemExit as exit_:
            status = exit_.code
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    directory: Path
    status: int
    stderr: str


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict[str, Done]:
    """The outcome of every case, by name."""
    top = tmp_path_factory.mktemp("prepare")
    for model, config in (("model", json.dumps(CONFIG)), ("broken", "{")):
        (top / model).mkdir()
        (top / model / "config.json").write_text(config)
    model = ["--model-path", str(top / "model"), "--device", "cpu"]
    lora = ["--enable-lora", "--lora-paths", "a=/nowhere/a", "--max-lora-rank", "8", "--lora-target-modules", "q_proj"]
    exact = ["--enable-deterministic-inference", "--attention-backend", "torch_native"]
    busy = socket.create_server(("127.0.0.1", 0))
    cases = {
        "good": [*model, "--tp-size", "2", "--port", "35123", *lora, *exact],
        "unsupported": [*model, "--dp-size", "2", "--enable-streaming-session"],
        "broken model": ["--model-path", str(top / "broken"), "--device", "cpu"],
        "unknown flag": ["--model-path", "m", "--no-such-flag"],
        "no ranks": [*model, "--tp-size", "0"],
        "one daemon": [*model, "--tp-size", "2", "--weight-cache-mode", "client", "--weight-cache-socket", "/tmp/s"],
        "daemons": [*model, "--tp-size", "2", "--weight-cache-mode", "client"],
        "offline": [*model, "--port", str(busy.getsockname()[1])],
        "port in use": [*model, "--port", str(busy.getsockname()[1])],
    }
    kevlar = msgspec.json.encode(KevlarArgs(worker_groups=3)).decode()
    calls = []
    for name, argv in cases.items():
        (top / name).mkdir()
        own = ["--run-dir", str(top / name), "--launch-id", "abc", "--kevlar", kevlar]
        own += ["--no-http"] if name == "offline" else []
        calls.append((str(top / name), [*own, "--", *argv]))
    forks = subprocess.run([sys.executable, "-c", FORKS], input=json.dumps(calls), capture_output=True, text=True)
    busy.close()
    statuses = [int(line) for line in forks.stdout.split()]
    assert len(statuses) == len(cases), forks.stderr
    return {
        name: Done(top / name, status, (top / name / "stderr").read_text())
        for name, status in zip(cases, statuses, strict=True)
    }


def test_the_record_and_the_plan(done):
    assert done["good"].status == 0, done["good"].stderr
    with open(Paths(str(done["good"].directory)).plan, "rb") as file:
        plan = msgspec.json.decode(file.read(), type=LaunchPlan)
    assert (plan.tp_size, plan.pp_size, plan.port, plan.launch_id) == (2, 1, 35123, "abc")
    assert plan.kevlar.worker_groups == 3
    assert plan.gpu_ids == [[0, 0]] * 3
    assert (done["good"].directory / "server_args.pickle").stat().st_mode & 0o77 == 0

    loads = [
        subprocess.Popen([sys.executable, "-c", LOAD, plan.server_args_file], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    first, second = (process.communicate()[0].splitlines()[-1] for process in loads)
    assert [process.returncode for process in loads] == [0, 0]
    assert first == second
    assert first.endswith("True 64 1") and "('a', '" in first


def test_everything_unsupported_is_named(done):
    refused = done["unsupported"]
    assert refused.status == EXIT_CONFIG
    assert "--dp-size 2:" in refused.stderr and "--enable-streaming-session:" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (refused.directory / "plan.json").exists()


def test_a_model_that_does_not_load(done):
    refused = done["broken model"]
    assert refused.status == EXIT_CONFIG
    assert refused.stderr.splitlines()[-1].startswith("sglang-kevlar: error: cannot load the model '")


def test_a_command_line_that_sglang_cannot_parse_exits_2_in_one_line(done):
    refused = done["unknown flag"]
    assert refused.status == 2
    assert "unrecognized arguments: --no-such-flag" in refused.stderr.splitlines()[-1]
    assert "usage:" not in refused.stderr


def test_a_group_without_ranks(done):
    assert done["no ranks"].status == EXIT_CONFIG
    assert "--tp-size 0: must be at least 1" in done["no ranks"].stderr


def test_one_weight_cache_daemon_is_not_that_of_several_ranks(done):
    assert done["one daemon"].status == EXIT_CONFIG
    assert "--weight-cache-socket /tmp/s: is one daemon's" in done["one daemon"].stderr
    assert done["daemons"].status == 0, done["daemons"].stderr


def test_an_offline_engine_needs_no_port(done):
    assert done["offline"].status == 0, done["offline"].stderr
    assert done["port in use"].status == EXIT_CONFIG


def test_a_port_in_use_is_found_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(prepare.LaunchRefused, match=f"--host 127.0.0.1 --port {port}"):
            prepare._check_port("127.0.0.1", port, "--host", "--port")
    prepare._check_port("127.0.0.1", port, "--host", "--port")


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_cannot_be(port):
    with pytest.raises(prepare.LaunchRefused, match=f"--port {port}"):
        prepare._check_port("127.0.0.1", port, "--host", "--port")


def test_an_address_for_others_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.ENVIRONMENT, raising=False)
    for args in (KevlarArgs(), KevlarArgs(advertise="127.0.0.1")):
        prepare._check_shadow(args)
    with pytest.raises(prepare.LaunchRefused, match=r"--advertise 10\.0\.0\.1: .*--cluster-key-file"):
        prepare._check_shadow(KevlarArgs(advertise="10.0.0.1"))
    file = tmp_path / "key"
    with pytest.raises(prepare.LaunchRefused, match="cannot read the cluster key"):
        prepare._check_shadow(KevlarArgs(cluster_key_file=str(file)))
    file.touch(0o600)
    file.write_text(keys.generate())
    prepare._check_shadow(KevlarArgs(advertise="10.0.0.1", cluster_key_file=str(file)))
    monkeypatch.setenv(keys.ENVIRONMENT, file.read_text())
    prepare._check_shadow(KevlarArgs(advertise="10.0.0.1"))


def test_events_that_another_frontend_would_not_make_again() -> None:
    peers = KevlarArgs(peers="a=127.0.0.1:7000,b=127.0.0.1:7001", frontend_name="a")
    for size in (0, 1):
        with pytest.raises(prepare.LaunchRefused, match=rf"--batch-notify-size {size}: with --peers"):
            prepare._check_peers(peers, size)
        prepare._check_peers(KevlarArgs(), size)
    prepare._check_peers(peers, 2)


def assign(groups, ranks, base=0, step=1, available=8):
    return prepare.assign_devices(groups, ranks, base=base, step=step, available=available)


def test_devices():
    assert assign(2, 2) == [[0, 1], [2, 3]]
    assert assign(2, 2, base=4) == [[4, 5], [6, 7]]
    assert assign(2, 2, step=2) == [[0, 2], [4, 6]]
    assert assign(3, 1, available=None) == [[0], [0], [0]]


def test_too_few_devices_are_refused_with_the_numbers():
    with pytest.raises(prepare.LaunchRefused, match=r"--worker-groups 3 .*needs 12 GPU\(s\).*torch sees 8; one group"):
        assign(3, 4)
    with pytest.raises(prepare.LaunchRefused, match=r"needs 32 GPU\(s\), but torch sees 8$"):
        assign(2, 16)
    with pytest.raises(prepare.LaunchRefused, match=r"up to index 8 .*--base-gpu-id 5.*torch sees 8"):
        assign(2, 2, base=5)
