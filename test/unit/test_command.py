"""Upstream's commands in an image of ours: which processes they are, and what becomes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_kevlar.upstream.command import REPLACE, flags

REPOSITORY = Path(__file__).parents[2]
FAKES = {
    "sglang/__init__.py": "",
    "sglang/launch_server.py": "import sys; print('upstream', sys.argv[1:])",
    # In place of the real package, which would start a server.
    "sglang_kevlar/__init__.py": "",
    "sglang_kevlar/launch_server.py": "import sys; print('ours', sys.argv[1:])",
    "sglang_kevlar/upstream/__init__.py": "",
}


@pytest.mark.parametrize(
    ("argv", "original", "given"),
    [
        (["-m", "--port", "1"], ["python3", "-m", "sglang.launch_server", "--port", "1"], ["--port", "1"]),
        (["-m", "-m"], ["python3", "-u", "-X", "dev", "-m", "sglang.launch_server", "-m"], ["-m"]),
        (["-m", "a"], ["python3", "-msglang.launch_server", "a"], ["a"]),
        (["-m"], ["python3", "-m", "sglang.launch_server"], []),
        (["-m", "sglang.launch_server"], ["python3", "-m", "pytest", "sglang.launch_server"], None),
        (["-m", "--help"], ["python3", "-m", "sglang_kevlar.launch_server", "--help"], None),
        (["/bin/sglang", "serve", "--port", "1"], ["python3", "/bin/sglang", "serve", "--port", "1"], ["--port", "1"]),
        (
            ["sglang", "serve", "M", "--tp", "2"],
            ["python3", "sglang", "serve", "M"],
            ["--model-path", "M", "--tp", "2"],
        ),
        (["/bin/sglang", "serve"], ["python3", "/bin/sglang", "serve"], []),
        (["/bin/sglang", "version"], ["python3", "/bin/sglang", "version"], None),
        (["-c"], ["python3", "-c", "import sglang.launch_server"], None),
        ([""], ["python3"], None),
        ([], [], None),
    ],
)
def test_which_process_is_a_server_of_upstreams(argv: list[str], original: list[str], given: list[str] | None) -> None:
    assert flags(argv, original) == given


@pytest.fixture
def run(tmp_path: Path):
    """Python with a ``.pth`` file as of an image, beside packages that only say which of them was started."""
    site = tmp_path / "site"
    command = REPOSITORY / "python/sglang_kevlar/upstream/command.py"
    for name, text in {**FAKES, "sglang_kevlar/upstream/command.py": command.read_text()}.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    # Only those of site-packages are run by themselves.
    (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})")
    line = re.search(r"echo '(.*)' >\S*_command\.pth", (REPOSITORY / "docker/install.sh").read_text())
    assert line is not None
    (site / "image.pth").write_text(line[1])

    def run(*arguments: str, replace: str | None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site)} | ({} if replace is None else {REPLACE: replace})
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.mark.parametrize("replace", [None, "", "0"])
def test_upstreams_command_starts_upstreams_server(run, replace: str | None) -> None:
    assert run("-m", "sglang.launch_server", "--tp", "2", replace=replace).stdout == "upstream ['--tp', '2']\n"


def test_and_ours_where_the_variable_says_so(run) -> None:
    assert run("-u", "-m", "sglang.launch_server", "--tp", "2", replace="1").stdout == "ours ['--tp', '2']\n"
    assert run("-c", "import sglang.launch_server", replace="1").stdout == "upstream []\n", "a process of --stock"


def test_a_variable_that_says_neither_starts_nothing(run) -> None:
    done = run("-m", "sglang.launch_server", replace="yes")
    assert done.returncode == 78 and done.stdout == "" and "SGLANG_KEVLAR_REPLACE is 1" in done.stderr
    assert run("-c", "print('other')", replace="yes").stdout == "other\n"
