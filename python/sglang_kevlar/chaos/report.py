"""What a run says: a line for each event in a file, some of them on standard output, and the verdict at the end."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_kevlar.chaos.verdict import Finding

TIMELINE = "timeline.jsonl"
VERDICT = "verdict.json"
#: events that are of interest while it runs
_SHOWN = ("fault", "missed", "no bite", "stuck", "unreachable", "reachable", "new frontend", "frames")
_WORDS = {True: "held", False: "VIOLATED", None: "not judged"}


class Report:
    """A context manager, for the file."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._began = time.monotonic()
        (directory / VERDICT).unlink(missing_ok=True)
        self._file = (directory / TIMELINE).open("w", buffering=1)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def record(self, event: str, **values: Any) -> None:
        """One event of the timeline, at this moment."""
        seconds = time.monotonic() - self._began
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"t": round(seconds, 3), "at": at, "event": event, **values}) + "\n")
        if event in _SHOWN or (event == "answer" and values["end"] != "tie"):
            self.say(f"{event}: " + " ".join(f"{name}={value}" for name, value in values.items()))

    def say(self, text: str) -> None:
        """A line with the time since the beginning, for who watches."""
        print(f"[{time.monotonic() - self._began:8.1f} s] {text}", flush=True)

    def finish(self, result: dict[str, Any], findings: list[Finding]) -> None:
        """The verdict, as JSON beside the timeline and as a table."""
        (self._directory / VERDICT).write_text(json.dumps(result, indent=2) + "\n")
        rows = [("check", "demanded", "found", "")]
        rows += [(one.check, one.demanded, one.found, _WORDS[one.held]) for one in findings]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        print()
        for number, row in enumerate(rows):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            note = findings[number - 1].note if number else ""
            print("  ".join([*cells, row[3]]) + (f" ({note})" if note else ""))
        ends = ", ".join(f"{count} {end}" for end, count in result["requests"].items())
        faults = ", ".join(f"{count} {fault}" for fault, count in result["faults"].items())
        print(f"\n{faults or 'no faults'}; {result['failovers']['count']} failovers\n{ends or 'no requests'}")
        print(f"{result['verdict']}; seed {result['seed']}; {self._directory / TIMELINE}, {VERDICT}")
        sys.stdout.flush()
