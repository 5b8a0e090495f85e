"""What a status says, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]
#: from which nobody can send escape sequences to the terminal
_WIDTH = 60


def of_groups(status: Json) -> str:
    head = ["GROUP", "ROLE", "STATE", "EPOCH", "PIDS", "RUN", "WAIT", "SHADOW TO", "LAG", "WEIGHTS", "HOST", "LINK"]
    rows = [_group(group) for group in status["groups"]]
    lines = [
        f"SGLang-Kevlar {_cell(status.get('version'))} over SGLang {_cell(status.get('upstream'))}, up "
        f"{_seconds(status.get('uptime_s'))}, {_cell(status.get('held', 0))} requests held",
        "",
        _table(head, rows),
    ]
    if len({group.get("version") for group in status["groups"]} - {None}) > 1:
        lines += ["", "groups of several versions: " + ", ".join(_version(group) for group in status["groups"])]
    if (update := status.get("weights")) is not None:
        lines += ["", _update(update)]
    lines += [
        f"group {_cell(group.get('id'))}: {_cell(group['cause'], 400)}"
        for group in status["groups"]
        if group.get("cause")
    ]
    return "\n".join(lines)


def _update(update: Json) -> str:
    how = f"{_cell(update['state'])}, {_seconds(update['seconds'])}"
    if update["state"] == "running":
        how += f"; {_cell(update['doing'], 200)}; {progress(update)}"
    elif update["error"]:
        how += f": {_cell(update['error'], 400)}"
    return f"weights of {_cell(update['model_path'], 200)}, group by group: {how}"


def progress(update: Json) -> str:
    """Of a weight update that goes from group to group."""
    left = ", ".join(map(str, update["groups_left"])) or "none"
    return f"groups left: {left}; requests on the old weights: {update['requests_left']}"


def _group(group: Json) -> list[str]:
    pids, shadow = group.get("pids") or {}, group.get("shadow") or {}
    processes = [pids.get("supervisor"), *(pids.get("ranks") or []), pids.get("detokenizer")]
    state = _cell(group.get("state"))
    if (moves_in := group.get("moves_in_s")) is not None:
        state += f" (moves in {_seconds(moves_in)})" if moves_in else " (moves)"
    lag = f"{_cell(shadow['lag_tokens'])} tok" if shadow.get("lag_tokens") is not None else "-"
    name = _cell(group.get("id"))
    if group.get("name") not in (None, str(group.get("id"))):
        name += f" {_cell(group['name'])}"
    return [
        name,
        _cell(group.get("role")),
        state,
        _cell(group.get("epoch")),
        " ".join(str(pid) for pid in processes if pid) or "-",
        _cell(group.get("running")),
        _cell(group.get("queued")),
        _cell(shadow.get("to")),
        lag,
        _cell(group.get("weight_version")),
        _cell(group.get("host")),
        _cell(group.get("link")),
    ]


def _version(group: Json) -> str:
    return f"{_cell(group.get('id'))} has {_cell(group.get('version'))}"


def of_failovers(failovers: Sequence[Json]) -> str:
    if not failovers:
        return "none"
    head = ["AT", "GROUP", "CAUSE", "DETECT", "REDIRECTED", "RECOMPUTED", "RESTORED", "STALL P50", "MAX"]
    rows = []
    for each in failovers:
        stall = each.get("stall_ms") or {}
        rows.append(
            [
                _cell(each.get("at")),
                _cell(each.get("group")),
                _cell(each.get("cause")),
                _milliseconds(each.get("detect_ms")),
                _cell(each.get("redirected")),
                _cell(each.get("recomputed_tokens")),
                _cell(each.get("restored_tokens")),
                _milliseconds(stall.get("p50")),
                _milliseconds(stall.get("max")),
            ]
        )
    return _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any, width: int = _WIDTH) -> str:
    """One line of what can be printed: names and causes come from other hosts."""
    if value is None or value == "":
        return "-"
    text = "".join(char if char.isprintable() else "?" for char in str(value))
    return text if len(text) <= width else text[: width - 3] + "..."


def _milliseconds(value: Any) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _seconds(value: Any) -> str:
    if value is None:
        return "-"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
