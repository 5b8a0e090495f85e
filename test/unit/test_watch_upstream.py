"""The scheduled check of new SGLang releases, against an index that is a directory of wheels."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sglang_kevlar.upstream import contract

SCRIPTS = Path(__file__).parents[2] / "scripts"
BASE = contract.installed_version()
#: of SGLang, in which seams are
PARTS = ("srt", "kernels", "lang")
MOVED = "sglang/srt/managers/communicator.py"


@pytest.fixture(scope="module")
def sources():
    """(name, content) of the installed SGLang's files, which hold what is declared for it."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    files = [package / "utils.py", *(file for part in PARTS for file in (package / part).rglob("*.py"))]
    return [(str(file.relative_to(package.parent)), file.read_bytes()) for file in files]


def make_wheel(directory: Path, version: str, files) -> Path:
    info = f"sglang-{version}.dist-info"
    wheel = directory / f"sglang-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def run(script: str, *arguments: str, index: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_each_newer_release_is_checked_and_reported(tmp_path, sources):
    make_wheel(tmp_path, "0.5.1", [])  # older than what we support: not looked at
    make_wheel(tmp_path, "91.0", sources)
    reports = tmp_path / "reports"
    done = run("watch_upstream.py", "--base", BASE, "--reports", str(reports), index=tmp_path)
    assert (done.returncode, done.stdout) == (0, "SGLang 91.0: everything holds\n"), done.stderr
    assert [file.name for file in reports.iterdir()] == ["91.0.md"]

    make_wheel(tmp_path, "91.1", [(name, content) for name, content in sources if name != MOVED])
    make_wheel(tmp_path, "91.2rc1", [])  # not a release
    done = run("watch_upstream.py", "--base", BASE, "--reports", str(reports), index=tmp_path)
    assert done.returncode == 1, done.stderr
    assert f"SGLang 91.1: something moved against {BASE}" in done.stdout
    report = (reports / "91.1.md").read_text()
    assert re.search(
        r"^\* `sglang\.srt\.managers\.communicator:FanOutCommunicator\S+`: module does not exist$", report, re.M
    )
    assert sorted(file.name for file in reports.iterdir()) == ["91.0.md", "91.1.md"]


def test_a_release_that_cannot_be_read_is_not_one_that_holds(tmp_path):
    make_wheel(tmp_path, "91.0", [("sglang/srt/managers/communicator.py", b"def (")])
    done = run("watch_upstream.py", "--reports", str(tmp_path / "reports"), index=tmp_path)
    assert done.returncode == 2
    assert "SGLang 91.0 could not be read" in done.stderr


def test_an_index_that_has_nothing_is_an_error(tmp_path):
    done = run("watch_upstream.py", "--reports", str(tmp_path / "reports"), index=tmp_path)
    assert done.returncode == 2
    assert "pip could not list the releases of sglang" in done.stderr


def test_nothing_newer_is_said(tmp_path):
    make_wheel(tmp_path, BASE, [])
    done = run("watch_upstream.py", "--base", BASE, "--reports", str(tmp_path / "reports"), index=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"no release of SGLang is newer than {BASE}\n")


def test_the_check_writes_what_it_says(tmp_path):
    wheel = make_wheel(tmp_path, "91.0", [])
    report = tmp_path / "report.md"
    done = run("check_upstream.py", "--wheel", str(wheel), "--markdown", str(report), index=tmp_path)
    assert done.returncode == 1
    text = report.read_text()
    assert text.startswith(f"# SGLang 91.0, read against what is declared for {contract.SUPPORTED[-1]}\n")
    assert str(tmp_path) not in text
    [seams] = re.findall(r"^Seams: .*$", done.stdout, re.M)
    assert f"## {seams}" in text
