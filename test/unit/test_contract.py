"""The contract with SGLang: it holds for the installed version, and names what moved when it does not."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from sglang_kevlar.platform import torchvision_shim
from sglang_kevlar.upstream import contract, differences
from sglang_kevlar.upstream.contract import InstalledSource, Seam, UpstreamMismatch, judge
from sglang_kevlar.upstream.source_tree import SourceTree

torchvision_shim.install()

PACKAGE = Path(__file__).parents[2] / "python" / "sglang_kevlar"
SEAMS = contract.declarations(contract.installed_version())

MOVED = textwrap.dedent(
    """
    import dataclasses
    LIMIT = 7
    def call(a, b, *, c=1): ...
    def anything(a, **rest): ...
    @dataclasses.dataclass
    class Record:
        rid: str
        tokens: list
    class Base:
        def step(self, batch): self.inherited = 1
    class Worker(Base):
        def __init__(self, model, port):
            self.queue = []
        def run(self, batch, proxy=None): return self.queue
    """
)


@pytest.fixture(params=["installed", "source"])
def source(request, tmp_path, monkeypatch):
    """The same small package, seen by both readers."""
    if request.param == "source":
        (tmp_path / "moved").mkdir()
        (tmp_path / "moved/inner.py").write_text(MOVED)
        (tmp_path / "moved/__init__.py").write_text("from .inner import *\nfrom moved.inner import call as renamed\n")
        return SourceTree(tmp_path)
    package, inner = types.ModuleType("moved"), types.ModuleType("moved.inner")
    monkeypatch.setitem(sys.modules, "moved", package)
    monkeypatch.setitem(sys.modules, "moved.inner", inner)
    exec(compile(MOVED, "inner.py", "exec"), inner.__dict__)
    package.__dict__.update({k: v for k, v in vars(inner).items() if not k.startswith("__")}, renamed=inner.call)
    return InstalledSource()


def problems(source, target, **expected):
    return list(judge(Seam(target=target, roles=("rank",), **expected), source))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("moved:call", {"signature": ("a", "b", "c")}),
        ("moved:renamed", {"passes": ("c",)}),
        ("moved:anything", {"passes": ("whatever",)}),
        ("moved.inner:Record", {"fields": ("rid", "tokens"), "passes": ("tokens",)}),
        ("moved:Worker", {"fields": ("queue", "inherited", "run", "step"), "signature": ("model", "port")}),
        ("moved:Worker.step", {"signature": ("self", "batch")}),
        ("moved.inner:LIMIT", {"equals": 7}),
        ("moved:", {}),
    ],
)
def test_what_holds(source, target, expected):
    assert problems(source, target, **expected) == []


@pytest.mark.parametrize(
    ("target", "expected", "said"),
    [
        ("moved.gone:call", {}, "moved.gone:call: module does not"),
        ("moved:gone", {}, "moved:gone: does not exist"),
        ("moved:Worker.gone", {}, "moved:Worker.gone: does not exist"),
        ("moved:call", {"signature": ("a", "b")}, "moved:call: parameters are (a, b, c), expected (a, b)"),
        ("moved:call", {"passes": ("a", "d")}, "moved:call: takes no parameter (d)"),
        ("moved:Record", {"fields": ("rid", "lora_id")}, "moved:Record: has no field (lora_id)"),
        ("moved:Worker", {"fields": ("waiting",)}, "moved:Worker: has no field (waiting)"),
        ("moved.inner:LIMIT", {"equals": 8}, "moved.inner:LIMIT: is 7, expected 8"),
        ("moved.inner:LIMIT", {"passes": ("a",)}, "moved.inner:LIMIT: is no longer a function"),
    ],
)
def test_what_moved_is_named(source, target, expected, said):
    [problem] = problems(source, target, **expected)
    assert problem.startswith(said)


@pytest.mark.parametrize("role", ["prepare", "frontend", "rank", "detokenizer"])
def test_the_installed_version_holds(role):
    contract.check(role)


def test_the_installed_version_holds_for_the_cpu_platform():
    """In a process of its own: importing what the others use applies what that platform changes."""
    code = (
        "from sglang_kevlar.platform import torchvision_shim; torchvision_shim.install()\n"
        "from sglang_kevlar.upstream import contract; contract.check('cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_both_readers_agree_on_the_installed_version():
    import sglang

    tree = SourceTree(Path(sglang.__file__).parents[1])
    assert [problem for seam in SEAMS for problem in judge(seam, tree)] == []


def test_a_mismatch_stops_with_every_finding(monkeypatch):
    seams = tuple(Seam(target=f"sglang.srt.server_args:Gone{i}", roles=("rank",)) for i in range(2))
    monkeypatch.setattr(contract, "declarations", lambda version: seams)
    with pytest.raises(UpstreamMismatch, match=r"(?s)Gone0: does not exist.*Gone1: does not exist"):
        contract.check("rank")
    contract.check("frontend")  # nothing of it is this role's


@pytest.mark.parametrize("found", ["0.5.20", "0.5.22", "0.6.0", "0.5.21.post1"])
def test_another_version_is_refused_by_name(monkeypatch, found):
    monkeypatch.setattr(contract, "version", lambda name: found)
    with pytest.raises(UpstreamMismatch, match=f"SGLang {found} is installed"):
        contract.check("rank")


SEAM = Seam(target="sglang.a:B", roles=("rank",), fields=("old", "kept"))
CALLED = Seam(target="sglang.a:B.call", roles=("rank",), signature=("self",))


def test_a_version_is_declared_by_what_differs():
    revised = contract.revised(
        (SEAM, CALLED),
        signatures={"sglang.a:B.call": "self more"},
        fields={"sglang.a:B": {"old": "new"}},
        added=(Seam(target="sglang.a:C", roles=("cpu",)),),
    )
    assert [(seam.target, seam.fields, seam.signature) for seam in revised] == [
        ("sglang.a:B", ("new", "kept"), None),
        ("sglang.a:B.call", (), ("self", "more")),
        ("sglang.a:C", (), None),
    ]


@pytest.mark.parametrize(
    ("signatures", "fields"),
    [
        ({"sglang.a:B": "self"}, {}),  # declared, but not by its parameters
        ({"sglang.a:Gone": "self"}, {}),
        ({}, {"sglang.a:B": {"gone": "new"}}),
    ],
)
def test_a_difference_to_nothing_is_an_error(signatures, fields):
    with pytest.raises(ValueError, match=r"not declared: sglang\.a:"):
        contract.revised((SEAM, CALLED), signatures=signatures, fields=fields)


def test_every_supported_version_is_declared_and_has_its_differences():
    assert all(contract.declarations(version) for version in contract.SUPPORTED)
    assert differences.CARRIES_PREFIX_SLOTS.keys() == set(contract.SUPPORTED)


def imports_of_sglang():
    """(file, module, name) of every import of SGLang in our package, wherever it stands."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "sglang":
                yield from ((file.name, node.module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((file.name, alias.name, "") for alias in node.names if alias.name.split(".")[0] == "sglang")


def test_every_import_of_sglang_is_declared():
    modules = {seam.module for seam in SEAMS}
    targets = {seam.target for seam in SEAMS} | {seam.target.rpartition(".")[0] for seam in SEAMS}
    undeclared = [
        f"{file}: from {module} import {name}"
        for file, module, name in imports_of_sglang()
        if f"{module}:{name}" not in targets and f"{module}.{name}" not in modules and (name or module not in modules)
    ]
    assert undeclared == []
