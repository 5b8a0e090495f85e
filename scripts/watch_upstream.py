#!/usr/bin/env python3
"""For a scheduled job: check the SGLang releases that are newer than those we support, and write a report of each.

    .venv/bin/python scripts/watch_upstream.py [--reports DIR]     DIR/VERSION.md of each; default: docs/upstream
    ... --base 0.5.21                             those that are newer than this one, against its declarations

Releases are those of the package index that pip is set up for (pip.conf, PIP_INDEX_URL, PIP_FIND_LINKS, proxies).
Exit status 0: there is none, or nothing moved in any. 1: something moved. 2: a release could not be looked at, of which
nothing is known then.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    from packaging.version import Version

    from check_upstream import PIP_TIMEOUT, SUPPORTED, check_release
except ImportError as missing:
    print(f"{missing}: run it with .venv/bin/python, which scripts/setup makes", file=sys.stderr)
    raise SystemExit(2) from None

#: The newest ones, when there are more: a job that was off for a year is not to load every wheel of it.
MOST = 5


class Unreachable(Exception):
    """The index could not be asked. The message says why."""


def releases() -> list[Version]:
    """All final releases that the index has for this Python and platform."""
    command = [sys.executable, "-m", "pip", "index", "versions", "sglang", "--only-binary=:all:"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"no answer from the index in {PIP_TIMEOUT} s") from None
    label = "Available versions: "
    listed = next((line for line in done.stdout.splitlines() if line.startswith(label)), None)
    if done.returncode or listed is None:
        raise Unreachable(f"pip could not list the releases of sglang:\n{done.stderr.strip()}")
    return sorted(Version(each) for each in listed.removeprefix(label).split(", "))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "upstream")
    parser.add_argument("--base", choices=SUPPORTED, default=SUPPORTED[-1])
    args = parser.parse_args()
    try:
        found = [each for each in releases() if each > Version(args.base)][-MOST:]
    except Unreachable as error:
        print(error, file=sys.stderr)
        return 2
    if not found:
        print(f"no release of SGLang is newer than {args.base}")
    args.reports.mkdir(parents=True, exist_ok=True)
    status = 0
    for version in map(str, found):
        try:
            report = check_release(version, args.base)
        except Exception as error:  # whatever it is, nothing is known of this release
            print(f"SGLang {version} could not be read: {type(error).__name__}: {error}", file=sys.stderr)
            status = 2
            continue
        (args.reports / f"{version}.md").write_text(report.markdown(datetime.date.today()))
        print(f"SGLang {version}: {report.conclusion}")
        if not report.holds:
            status = max(status, 1)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
