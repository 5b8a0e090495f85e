#!/usr/bin/env python3
"""Which of the seams and patches we rely on still hold in another SGLang version, and which moved.

    scripts/check_upstream.py 0.5.24              download that wheel (without its dependencies) and read it
    scripts/check_upstream.py --wheel FILE        read this wheel
    scripts/check_upstream.py --installed         read what is installed
    ... --base 0.5.21                             against the declarations of another supported version
    ... --markdown FILE                           write the report too, as docs/upstream has it

Reads source only, imports nothing of SGLang. Exit status 1 when something moved.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version as installed_distribution
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from sglang_kevlar.support_matrix import fields_of, option
from sglang_kevlar.support_table import REFUSED, REMARKS
from sglang_kevlar.upstream import patches
from sglang_kevlar.upstream.contract import SUPPORTED, UpstreamMismatch, declarations, declared_patches, judge
from sglang_kevlar.upstream.source_tree import SourceTree

#: An index that does not answer is an error, not a wait.
PIP_TIMEOUT = 600


class Section(NamedTuple):
    title: str
    lines: list[str]


class Report(NamedTuple):
    version: str
    base: str
    sections: list[Section]
    #: nothing moved; flags that came or went need a judgement all the same, so they count
    holds: bool

    @property
    def conclusion(self) -> str:
        return "everything holds" if self.holds else f"something moved against {self.base}"

    def text(self) -> str:
        lines = [line for title, found in self.sections for line in (title, *(f"  {each}" for each in found))]
        return "\n".join([*lines, self.conclusion])

    def markdown(self, today: datetime.date) -> str:
        """The same for ``docs/upstream``."""
        command = f"scripts/check_upstream.py {self.version} --base {self.base}"
        lines = [f"# SGLang {self.version}, read against what is declared for {self.base}", ""]
        lines += [f"{today.isoformat()}, by `{command}`: {self.conclusion}."]
        for title, found in self.sections:
            lines += ["", f"## {title}", ""] if found else ["", f"## {title}"]
            lines += [
                f"* `{subject}`{colon}{rest}" for subject, colon, rest in (each.partition(": ") for each in found)
            ]
        return "\n".join(lines) + "\n"


def download(version: str, directory: Path) -> Path:
    """The wheel of ``version`` from the package index pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(directory), f"sglang=={version}"], check=True, timeout=PIP_TIMEOUT)
    return next(directory.glob("sglang-*.whl"))


def unpack(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory, [name for name in archive.namelist() if name.endswith(".py")])
    return directory


def check_wheel(wheel: Path, base: str | None) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        # sglang-VERSION-TAGS.whl
        return compare(unpack(wheel, Path(temporary)), wheel.name.split("-")[1], base)


def check_release(version: str, base: str | None) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        return check_wheel(download(version, Path(temporary)), base)


def check_installed(base: str | None) -> Report:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise SystemExit("SGLang is not installed here")
    return compare(Path(spec.origin).parents[1], installed_distribution("sglang"), base)


def compare(root: Path, version: str, base: str | None) -> Report:
    """What moved in ``root`` (which contains ``sglang/``) against what ``base`` declares.

    None: its own declarations, and those of the newest supported version for one that has none.
    """
    base = base or (version if version in SUPPORTED else SUPPORTED[-1])
    tree = SourceTree(root)
    seams = declarations(base)
    moved = [problem for seam in seams for problem in judge(seam, tree)]
    broken = {problem.partition(": ")[0] for problem in moved}
    held = sum(seam.target not in broken for seam in seams)

    files = patches.load(patches.default_directory(), base, declared_patches(base))
    stale = [problem for file in files if (problem := _patch_problem(root, file))]

    added = sorted(map(option, tree.server_args_fields - fields_of(base)))
    removed = sorted(fields_of(base) - tree.server_args_fields)
    notable = {row.field for row in REFUSED} | REMARKS.keys()
    gone = [option(name) + (": named in our support matrix" if name in notable else "") for name in removed]
    sections = [
        Section(f"Seams: {held} of {len(seams)} hold", moved),
        Section(f"Patched files: {len(files) - len(stale)} of {len(files)} apply", stale),
        Section(f"Flags added: {len(added)}", added),
        Section(f"Flags removed: {len(gone)}", gone),
    ]
    return Report(version, base, sections, holds=not (moved or stale or added or gone))


def _patch_problem(root: Path, file: patches.FilePatch) -> str | None:
    source = root / file.path
    try:
        file.apply(source.read_bytes() if source.is_file() else b"")
    except UpstreamMismatch as mismatch:
        return str(mismatch)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("version", nargs="?", help="an SGLang version, downloaded with pip")
    what.add_argument("--wheel", type=Path, help="a wheel of SGLang")
    what.add_argument("--installed", action="store_true", help="the installed SGLang")
    parser.add_argument("--base", choices=SUPPORTED, help="whose declarations (default: its own, else the newest)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report here too")
    args = parser.parse_args()
    if args.installed:
        found = check_installed(args.base)
    elif args.wheel:
        found = check_wheel(args.wheel, args.base)
    else:
        found = check_release(args.version, args.base)
    print(found.text())
    if args.markdown:
        args.markdown.write_text(found.markdown(datetime.date.today()))
    return 0 if found.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
