#!/usr/bin/env python3
"""Which of the seams and patches we rely on still hold in another SGLang version, and which moved.

    scripts/check_upstream.py 0.5.23              download that wheel (without its dependencies) and read it
    scripts/check_upstream.py --wheel FILE        read this wheel
    scripts/check_upstream.py --installed         read what is installed

Reads source only, imports nothing of SGLang. Exit status 1 when something moved.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from sglang_kevlar.support_matrix import fields_of, option
from sglang_kevlar.support_table import REFUSED, REMARKS
from sglang_kevlar.upstream import patches
from sglang_kevlar.upstream.contract import SUPPORTED, UpstreamMismatch, declarations, declared_patches, judge
from sglang_kevlar.upstream.source_tree import SourceTree


def download(version: str, directory: Path) -> Path:
    """The wheel of ``version`` from the package index pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(directory), f"sglang=={version}"], check=True)
    return next(directory.glob("sglang-*.whl"))


def unpack(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory, [name for name in archive.namelist() if name.endswith(".py")])
    return directory


def installed_root() -> Path:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise SystemExit("SGLang is not installed here")
    return Path(spec.origin).parents[1]


def report(root: Path, base: str) -> bool:
    """Print what moved in ``root`` (which contains ``sglang/``) against what ``base`` declares. True: all holds."""
    tree = SourceTree(root)
    seams = declarations(base)
    moved = [problem for seam in seams for problem in judge(seam, tree)]
    broken = {problem.partition(": ")[0] for problem in moved}
    held = sum(seam.target not in broken for seam in seams)
    _section(f"Seams: {held} of {len(seams)} hold", moved)

    files = patches.load(patches.default_directory(), base, declared_patches(base))
    stale = [problem for file in files if (problem := _patch_problem(root, file))]
    _section(f"Patched files: {len(files) - len(stale)} of {len(files)} apply", stale)

    added = tree.server_args_fields - fields_of(base)
    removed = fields_of(base) - tree.server_args_fields
    notable = {row.field for row in REFUSED} | REMARKS.keys()
    _section(f"Flags added: {len(added)}", sorted(map(option, added)))
    _section(
        f"Flags removed: {len(removed)}",
        sorted(option(name) + (" (named in our support matrix)" if name in notable else "") for name in removed),
    )
    return not (moved or stale or added or removed)


def _patch_problem(root: Path, file: patches.FilePatch) -> str | None:
    source = root / file.path
    try:
        file.apply(source.read_bytes() if source.is_file() else b"")
    except UpstreamMismatch as mismatch:
        return str(mismatch)
    return None


def _section(title: str, lines: Iterable[str]) -> None:
    print(title)
    for line in lines:
        print(f"  {line}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("version", nargs="?", help="an SGLang version, downloaded with pip")
    what.add_argument("--wheel", type=Path, help="a wheel of SGLang")
    what.add_argument("--installed", action="store_true", help="the installed SGLang")
    parser.add_argument("--base", default=SUPPORTED[-1], choices=SUPPORTED, help="declarations to check against")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "unpacked"
        if args.installed:
            root = installed_root()
        else:
            unpack(args.wheel or download(args.version, Path(temporary)), root)
        holds = report(root, args.base)
    print("everything holds" if holds else f"something moved against {args.base}")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
