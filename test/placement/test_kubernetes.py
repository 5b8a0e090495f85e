"""The manifests, without a cluster: that they fit each other, our command line, and Kubernetes' own schema."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_kevlar import config
from sglang_kevlar.cluster import keys
from sglang_kevlar.launcher.main import DRAIN_TIMEOUT, STOP_TIMEOUT

DIRECTORY = Path(__file__).parents[2] / "docker/kubernetes"
Manifest = dict[str, Any]
MANIFESTS: list[Manifest] = [
    manifest for path in sorted(DIRECTORY.glob("*.yaml")) for manifest in yaml.safe_load_all(path.read_text())
]
WORKLOADS = {m["metadata"]["name"]: m for m in MANIFESTS if m["kind"] in ("StatefulSet", "Deployment")}
FRONTENDS, GROUPS = WORKLOADS["kevlar-frontend"], WORKLOADS["kevlar-group"]


def identity(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def container(workload: Manifest) -> Manifest:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    return only


def flags(workload: Manifest) -> dict[str, str]:
    return dict(argument.removeprefix("--").partition("=")[::2] for argument in container(workload)["args"])


def labels(workload: Manifest) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def selected(selector: dict[str, str]) -> list[Manifest]:
    return [w for w in WORKLOADS.values() if selector.items() <= labels(w).items()]


def frontend_addresses(port: str) -> list[str]:
    """As DNS knows the pods of a stateful set."""
    name, service = FRONTENDS["metadata"]["name"], FRONTENDS["spec"]["serviceName"]
    number = next(p["containerPort"] for p in container(FRONTENDS)["ports"] if p["name"] == port)
    return [f"{name}-{ordinal}.{service}:{number}" for ordinal in range(FRONTENDS["spec"]["replicas"])]


# ---- our command line


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_flags_are_those_that_the_command_takes(workload: Manifest) -> None:
    python, m, module = container(workload)["command"]
    assert (python, m) == ("python", "-m")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module} yet")
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    known = set(re.findall(r"(?<![\w-])--([a-z0-9-]+)", done.stdout))
    if "listen" in flags(workload) and "listen" not in known:
        pytest.skip("this launch_server has no --listen yet")
    assert flags(workload).keys() <= known


def test_groups_join_every_frontend_and_ask_every_frontend() -> None:
    assert flags(GROUPS)["join"].split(",") == frontend_addresses("cluster")
    probe = container(GROUPS)["readinessProbe"]["exec"]["command"]
    assert re.findall(r"http://([^,\s]+)", probe[-1]) == frontend_addresses("http")
    assert "$(" not in " ".join(probe), "the kubelet expands this in args only"
    module = re.search(r"python -m (\S+)", probe[-1])
    assert module is not None and importlib.util.find_spec(module[1]) is not None


def test_each_frontend_knows_all_of_them() -> None:
    peers = config.peer_addresses(flags(FRONTENDS)["peers"])
    assert list(peers.values()) == frontend_addresses("cluster")
    assert list(peers) == [address.partition(".")[0] for address in peers.values()], "the names of the pods"
    assert flags(FRONTENDS)["frontend-name"] == "$(POD_NAME)"


def test_frontends_listen_where_their_ports_say() -> None:
    ports = {port["name"]: port["containerPort"] for port in container(FRONTENDS)["ports"]}
    assert flags(FRONTENDS)["port"] == str(ports["http"])
    assert flags(FRONTENDS)["listen"] == f"0.0.0.0:{ports['cluster']}"
    assert flags(FRONTENDS)["worker-groups"] == "0"


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_variables_that_arguments_name_are_defined(workload: Manifest) -> None:
    defined = {variable["name"] for variable in container(workload)["env"]}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container(workload)["args"]))) <= defined
    assert keys.ENVIRONMENT in defined, "addresses beyond this host need the key"


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_there_is_time_to_end(workload: Manifest) -> None:
    grace = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    before = container(workload).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    has_frontend = workload is FRONTENDS
    assert grace > float(before[1]) + (DRAIN_TIMEOUT if has_frontend else STOP_TIMEOUT)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_pods_are_the_user_of_the_image_and_may_do_nothing_else(workload: Manifest) -> None:
    dockerfile = (DIRECTORY.parent / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):0$", dockerfile, re.MULTILINE)
    pod = workload["spec"]["template"]["spec"]["securityContext"]
    assert pod["runAsNonRoot"] and pod["runAsUser"] == int(user)
    own = container(workload)["securityContext"]
    assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}


def test_nothing_kills_a_frontend_for_want_of_groups() -> None:
    assert "livenessProbe" not in container(FRONTENDS)
    headless = next(m for m in MANIFESTS if m["metadata"]["name"] == FRONTENDS["spec"]["serviceName"])
    assert headless["spec"]["clusterIP"] == "None" and headless["spec"]["publishNotReadyAddresses"]
    assert FRONTENDS["spec"]["podManagementPolicy"] == "Parallel"


# ---- each other


@pytest.mark.parametrize("manifest", MANIFESTS, ids=identity)
def test_selectors_select_what_they_mean(manifest: Manifest) -> None:
    spec = manifest["spec"]
    if manifest["kind"] == "Service":
        (workload,) = selected(spec["selector"])
        names = {port["name"] for port in container(workload)["ports"]}
        assert {port["targetPort"] for port in spec["ports"]} <= names
        return
    selector = spec.get("selector") or spec["podSelector"]
    assert [w["metadata"]["name"] for w in selected(selector["matchLabels"])] == [manifest["metadata"]["name"]]


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_volumes_and_probes_are_there(workload: Manifest) -> None:
    pod = workload["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container(workload)["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert mounts["shm"] == "/dev/shm", "the default is 64 MiB"
    assert "readinessProbe" in container(workload), "a rollout would take the next before this one serves"


# ---- Kubernetes


def check(manifest: Manifest) -> None:
    """Against the models of Kubernetes' client. Raises ValueError, with unknown, missing and mistyped fields."""
    models = pytest.importorskip("kubernetes.client.models", reason="pip install 'kubernetes>=37'")
    version = manifest["apiVersion"].rpartition("/")[2].capitalize()
    read = getattr(models, version + manifest["kind"]).model_validate(manifest)
    if read.model_dump(mode="json", by_alias=True, exclude_unset=True) != manifest:
        raise ValueError("the client reads names of Python's style, too, which Kubernetes does not")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=identity)
def test_fields_are_those_of_kubernetes(manifest: Manifest) -> None:
    check(manifest)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"terminationGracePeriod": 5}, "terminationGracePeriod"),
        ({"dns_policy": "Default"}, "Python's style"),
        ({"containers": [{"image": "x"}]}, "name"),
        ({"containers": [{"name": "x", "args": "--join=x"}]}, "args"),
    ],
)
def test_a_wrong_field_is_found(wrong: Manifest, said: str) -> None:
    manifest = yaml.safe_load(yaml.safe_dump(GROUPS))
    manifest["spec"]["template"]["spec"] |= wrong
    with pytest.raises(ValueError, match=said):
        check(manifest)
