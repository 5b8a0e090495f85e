"""The patch loader, on a package of its own."""

from __future__ import annotations

import hashlib
import importlib
import py_compile
import subprocess
import sys

import pytest

from sglang_kevlar.upstream import patches
from sglang_kevlar.upstream.contract import UpstreamMismatch

BEFORE = "import os\n\n\ndef answer():\n    value = 41\n    return value\n\n\ndef other():\n    return 'old'\n"
AFTER = "import os\n# ours\n\n\ndef answer():\n    value = 42\n    return value\n\n\ndef other():\n    pass\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Directory with ``patched_pkg/mod.py``, importable."""
    (tmp_path / "patched_pkg").mkdir()
    (tmp_path / "patched_pkg/__init__.py").write_text("")
    (tmp_path / "patched_pkg/mod.py").write_text(BEFORE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, patches.PatchFinder)]
    for name in [name for name in sys.modules if name.startswith("patched_pkg")]:
        del sys.modules[name]


@pytest.fixture
def diff(tmp_path):
    """The patch as `diff -U0` writes it."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text(BEFORE)
    new.write_text(AFTER)
    labels = ["--label", "a/patched_pkg/mod.py", "--label", "b/patched_pkg/mod.py"]
    body = subprocess.run(["diff", "-U0", *labels, old, new], capture_output=True, text=True).stdout
    sha = hashlib.sha256(BEFORE.encode()).hexdigest()
    return f"Why: the answer\nUpstream: 1.0\nSHA256: patched_pkg/mod.py {sha}\n{body}".encode()


def parsed(diff):
    return patches.parse("0001-answer.patch", diff, "1.0")


def test_apply_gives_what_diff_was_made_from(diff):
    [patch] = parsed(diff)
    assert patch.apply(BEFORE.encode()) == AFTER.encode()
    assert patch.module == "patched_pkg.mod"


def test_applying_twice_changes_nothing_more(diff):
    [patch] = parsed(diff)
    assert patch.apply(AFTER.encode()) == AFTER.encode()


@pytest.mark.parametrize("content", [BEFORE + "\n", BEFORE.replace("41", "40"), AFTER + "\n", ""])
def test_another_file_is_refused_by_name(diff, content):
    [patch] = parsed(diff)
    with pytest.raises(UpstreamMismatch, match=r"0001-answer.patch: patched_pkg/mod.py"):
        patch.apply(content.encode())


def test_in_memory_at_import_whatever_byte_code_is_cached(package, diff):
    py_compile.compile(str(package / "patched_pkg/mod.py"))
    patches.install_patches(parsed(diff))
    module = importlib.import_module("patched_pkg.mod")
    assert module.answer() == 42
    assert (package / "patched_pkg/mod.py").read_text() == BEFORE


def test_import_of_a_file_that_moved_fails(package, diff):
    (package / "patched_pkg/mod.py").write_text(BEFORE + "# moved\n")
    patches.install_patches(parsed(diff))
    with pytest.raises(UpstreamMismatch, match="SHA-256 differs"):
        importlib.import_module("patched_pkg.mod")


def test_too_late_to_patch_is_an_error(package, diff):
    importlib.import_module("patched_pkg.mod")
    with pytest.raises(UpstreamMismatch, match="imported before"):
        patches.install_patches(parsed(diff))


def test_in_effect_before_and_after_the_import(package, diff):
    [patch] = parsed(diff)
    assert not patches.in_effect(patch)
    patches.install_patches([patch])
    assert patches.in_effect(patch)
    importlib.import_module("patched_pkg.mod")
    assert patches.in_effect(patch)


def test_a_module_imported_without_its_patch_is_not_patched(package, diff):
    [patch] = parsed(diff)
    importlib.import_module("patched_pkg.mod")
    sys.meta_path.insert(0, patches.PatchFinder([patch]))
    assert not patches.in_effect(patch)


def test_on_disk_then_in_memory(package, diff):
    assert patches.apply_to(package, parsed(diff)) == ["patched_pkg/mod.py"]
    assert (package / "patched_pkg/mod.py").read_text() == AFTER
    assert patches.apply_to(package, parsed(diff)) == []
    patches.install_patches(parsed(diff))
    assert importlib.import_module("patched_pkg.mod").answer() == 42


def test_on_disk_is_all_or_nothing(package, diff):
    (package / "patched_pkg/second.py").write_text("a = 1\n")
    stale = patches.FilePatch("0002.patch", "patched_pkg/second.py", "0" * 64, [])
    with pytest.raises(UpstreamMismatch, match=r"0002.patch"):
        patches.apply_to(package, [*parsed(diff), stale])
    assert (package / "patched_pkg/mod.py").read_text() == BEFORE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((b"Why: the answer\n", b""), "must say Why"),
        ((b"Upstream: 1.0", b"Upstream: 1.1"), "Upstream: 1.0"),
        ((b"SHA256: patched_pkg/mod.py", b"SHA256: patched_pkg/other.py"), "no SHA256 line for patched_pkg/mod.py"),
        ((b"+# ours", b" # ours"), "context"),
    ],
)
def test_a_malformed_patch_is_refused(diff, change, said):
    with pytest.raises(ValueError, match=said):
        parsed(diff.replace(*change))


def test_exactly_the_declared_patches(tmp_path, diff):
    (tmp_path / "1.0").mkdir()
    (tmp_path / "1.0/0001-answer.patch").write_bytes(diff)
    assert len(patches.load(tmp_path, "1.0", ["0001-answer.patch"])) == 1
    with pytest.raises(UpstreamMismatch):
        patches.load(tmp_path, "1.0", [])
    with pytest.raises(UpstreamMismatch):
        patches.load(tmp_path, "1.0", ["0001-answer.patch", "0002.patch"])
    (tmp_path / "1.0/0002.patch").write_bytes(diff)
    with pytest.raises(ValueError, match="two patches for one file"):
        patches.load(tmp_path, "1.0", ["0001-answer.patch", "0002.patch"])


def test_the_patches_in_the_repository_are_those_declared():
    from sglang_kevlar.upstream.contract import SUPPORTED, declared_patches

    for version in SUPPORTED:
        patches.load(patches.default_directory(), version, declared_patches(version))
