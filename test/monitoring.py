"""What the files in `docker/monitoring` ask of Prometheus: their expressions, and the metrics and labels in these."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).parents[1] / "docker" / "monitoring"
#: added by Prometheus to whatever it scrapes
SCRAPED = {"job", "instance"}

_METRIC = re.compile(r"\b(sglang[_:][a-z0-9_:]+|up)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)\s*\"[^\"]*\"")
_GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
_SAMPLE = re.compile(r"([a-z_:][a-z0-9_:]*)(?:\{(.*)\})? \S+")
_LABEL = re.compile(r"([a-z_]+)=\"(?:[^\"\\]|\\.)*\"")


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DIRECTORY / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((DIRECTORY / "dashboard.json").read_text())


def expressions() -> list[tuple[str, str]]:
    """Of alerts and panels: where, and PromQL without Grafana's variables."""
    found = [(rule["alert"], rule["expr"]) for rule in alerts()]
    board = dashboard()
    for panel in board["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", [])]
    found += [(one["name"], one["expr"]) for one in board["annotations"]["list"]]
    for name, value in (("$__rate_interval", "1m"), ("$__interval", "1m"), ("$__range", "15m")):
        found = [(where, expression.replace(name, value)) for where, expression in found]
    return found


def used(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric in it, with the labels by which it is selected or grouped."""
    grouping = {label.strip() for labels in _GROUPING.findall(expression) for label in labels.split(",")}
    for name, matchers in _METRIC.findall(expression):
        yield name, grouping | set(_MATCHER.findall(matchers))


def legend_labels(panel: dict[str, Any]) -> Iterator[tuple[str, set[str]]]:
    for target in panel.get("targets", []):
        yield target["expr"], set(re.findall(r"\{\{\s*([a-z_]+)\s*\}\}", target["legendFormat"]))


def exposed(text: str) -> dict[str, set[str]]:
    """All that a /metrics has: name of the samples, and the labels of any of them."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in text.splitlines():
        if match := _SAMPLE.fullmatch(line):
            found[match[1]] |= set(_LABEL.findall(match[2] or ""))
    return found


def missing(text: str) -> list[str]:
    """What the files ask for and a server with that /metrics does not have."""
    have = exposed(text)
    problems = []
    for where, expression in expressions():
        for metric, labels in used(expression):
            if metric == "up":
                continue
            if metric not in have:
                problems.append(f"{where}: no metric {metric}")
            elif strange := labels - have[metric] - SCRAPED:
                problems.append(f"{where}: {metric} has no label {', '.join(sorted(strange))}")
    return problems
