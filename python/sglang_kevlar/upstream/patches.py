"""The few changes for which SGLang has no seam: ``sglang_kevlar/patches/VERSION/*.patch``.

A patch is a unified diff without context (``diff -U0``) under a header::

    Why: one line
    Upstream: 0.5.21
    SHA256: sglang/srt/some_file.py 0123...

The same files serve two uses: ``install`` changes the source in memory when a process imports it, and
``python -m sglang_kevlar.upstream.patches apply DIR`` changes the files under ``DIR`` (which contains ``sglang/``)
when an image is built. Both refuse a file that is neither the upstream file nor the already patched one.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

import msgspec

from sglang_kevlar.upstream.contract import UpstreamMismatch, declared_patches, installed_version

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class Hunk(msgspec.Struct, frozen=True):
    """Lines ``old`` at 1-based line ``old_start`` become ``new`` at ``new_start``."""

    old_start: int
    old: list[bytes]
    new_start: int
    new: list[bytes]


class FilePatch(msgspec.Struct, frozen=True):
    """The hunks of one patch for one file. ``path`` is relative to the directory that contains ``sglang/``."""

    patch: str
    path: str
    sha256: str
    hunks: list[Hunk]

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def apply(self, content: bytes) -> bytes:
        """The patched content. Raises ``UpstreamMismatch`` unless ``content`` is upstream's, or already patched."""
        if hashlib.sha256(content).hexdigest() == self.sha256:
            return self._replace(content, [(h.old_start, h.old, h.new) for h in self.hunks])
        try:
            before = self._replace(content, [(h.new_start, h.new, h.old) for h in self.hunks])
        except UpstreamMismatch:
            before = b""
        if hashlib.sha256(before).hexdigest() == self.sha256:
            return content
        raise UpstreamMismatch(f"patch {self.patch}: {self.path} is not the file it was made for (SHA-256 differs)")

    def _replace(self, content: bytes, hunks: Sequence[tuple[int, list[bytes], list[bytes]]]) -> bytes:
        lines = content.splitlines(keepends=True)
        for start, old, new in reversed(hunks):
            # A hunk that removes nothing inserts behind its line; otherwise it begins at it.
            first = start - 1 if old else start
            if lines[first : first + len(old)] != old:
                raise UpstreamMismatch(f"patch {self.patch}: line {start} of {self.path} is not what it replaces")
            lines[first : first + len(old)] = new
        return b"".join(lines)


def parse(name: str, text: bytes, version: str) -> list[FilePatch]:
    """Raises ``ValueError`` when the patch is malformed or for another version."""
    header: dict[bytes, list[bytes]] = {}
    files: list[FilePatch] = []
    lines = text.splitlines(keepends=True)
    index = 0
    while index < len(lines) and not lines[index].startswith(b"--- "):
        key, separator, value = lines[index].strip().partition(b": ")
        if separator:
            header.setdefault(key, []).append(value)
        index += 1
    if not header.get(b"Why") or header.get(b"Upstream") != [version.encode()]:
        raise ValueError(f"patch {name}: the header must say Why, and Upstream: {version}")
    hashes = dict(value.decode().split() for value in header.get(b"SHA256", []))
    while index < len(lines):
        path = lines[index + 1].split()[1].decode().removeprefix("b/")
        if path not in hashes:
            raise ValueError(f"patch {name}: no SHA256 line for {path}")
        hunks: list[Hunk] = []
        index += 2
        while index < len(lines) and not lines[index].startswith(b"--- "):
            match = _HUNK.match(lines[index])
            if match is None:
                raise ValueError(f"patch {name}: line {index + 1} is not the start of a hunk without context")
            removed, added = (int(count or 1) for count in (match[2], match[4]))
            body = lines[index + 1 : index + 1 + removed + added]
            if [line[:1] for line in body] != [b"-"] * removed + [b"+"] * added:
                raise ValueError(f"patch {name}: the hunk at line {index + 1} has context or is cut short")
            old, new = [line[1:] for line in body[:removed]], [line[1:] for line in body[removed:]]
            hunks.append(Hunk(int(match[1]), old, int(match[3]), new))
            index += 1 + len(body)
        files.append(FilePatch(name, path, hashes[path], hunks))
    return files


def load(directory: Path, version: str, expected: Sequence[str]) -> list[FilePatch]:
    """All patches of ``version`` under ``directory``, which must be exactly those ``expected`` by name."""
    found = sorted(path.name for path in (directory / version).glob("*.patch"))
    if found != sorted(expected):
        raise UpstreamMismatch(f"patches in {directory / version} are {found}, expected {sorted(expected)}")
    files = [file for name in found for file in parse(name, (directory / version / name).read_bytes(), version)]
    paths = [file.path for file in files]
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise ValueError(f"two patches for one file: {', '.join(sorted(twice))}")
    return files


def default_directory() -> Path:
    return Path(__file__).resolve().parents[1] / "patches"


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, patch: FilePatch) -> None:
        super().__init__(fullname, path)
        self.patch = patch

    def get_code(self, fullname: str) -> CodeType:
        # Not through super(): the byte code cached on disk is that of the unpatched file.
        return self.source_to_code(self.patch.apply(self.get_data(self.path)), self.path)


class PatchFinder(importlib.abc.MetaPathFinder):
    """Finds the patched modules as everyone else would, and puts our loader in front."""

    def __init__(self, patches: Sequence[FilePatch]) -> None:
        self._patches = {patch.module: patch for patch in patches}

    def will_apply(self, patch: FilePatch) -> bool:
        return self._patches.get(patch.module) == patch

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self._patches.get(fullname)
        if patch is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.origin is not None:
                spec.loader = _Loader(fullname, spec.origin, patch)
                return spec
        return None


def install() -> None:
    """Patch SGLang in this process, from now on. Call it before anything imports sglang; a second call does nothing.

    Raises ``UpstreamMismatch`` when a file to be patched is already imported; the import of a file that is not
    what its patch was made for raises it then.
    """
    install_patches([patch for patch in _declared() if not in_effect(patch)])


def verify() -> None:
    """Raise ``UpstreamMismatch`` naming every patch that is not in effect in this process."""
    if missing := [patch for patch in _declared() if not in_effect(patch)]:
        names = ", ".join(f"{patch.patch} ({patch.module})" for patch in missing)
        raise UpstreamMismatch(f"SGLang patches that are not in effect: {names}")


def _declared() -> list[FilePatch]:
    version = installed_version()
    return load(default_directory(), version, declared_patches(version))


def in_effect(patch: FilePatch) -> bool:
    """Whether the module was imported through this patch or, if it was not imported yet, would be."""
    module = sys.modules.get(patch.module)
    if module is None:
        return any(isinstance(finder, PatchFinder) and finder.will_apply(patch) for finder in sys.meta_path)
    loader = getattr(module.__spec__, "loader", None)
    return isinstance(loader, _Loader) and loader.patch == patch


def install_patches(patches: Sequence[FilePatch]) -> None:
    if late := [patch.path for patch in patches if patch.module in sys.modules]:
        raise UpstreamMismatch(f"imported before it could be patched: {', '.join(late)}")
    if patches:
        sys.meta_path.insert(0, PatchFinder(patches))


def apply_to(directory: Path, patches: Sequence[FilePatch]) -> list[str]:
    """Patch files on disk, all or none. Returns the paths that changed; already patched files are left alone."""
    changed: list[tuple[Path, bytes]] = []
    for patch in patches:
        file = directory / patch.path
        if not file.is_file():
            raise UpstreamMismatch(f"patch {patch.patch}: {file} does not exist")
        before = file.read_bytes()
        if (after := patch.apply(before)) != before:
            changed.append((file, after))
    for file, after in changed:
        temporary = file.with_name(file.name + ".patched")
        temporary.write_bytes(after)
        os.replace(temporary, file)
    return [str(file.relative_to(directory)) for file, _ in changed]


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2 or argv[0] != "apply":
        raise SystemExit("usage: python -m sglang_kevlar.upstream.patches apply DIR   (DIR contains sglang/)")
    try:
        changed = apply_to(Path(argv[1]), _declared())
    except UpstreamMismatch as mismatch:
        print(f"error: {mismatch}", file=sys.stderr)
        return 1
    print("\n".join(changed) if changed else "nothing to change")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
