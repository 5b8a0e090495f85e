"""The dashboard and the alerts: well-formed, and the check of their metrics finds what is not there.

Against the metrics of a real server they are checked in `test/e2e/test_operation.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import monitoring


def test_every_alert_says_what_and_how_bad() -> None:
    rules = monitoring.alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_legends_name_labels_that_are_left() -> None:
    for panel in monitoring.dashboard()["panels"]:
        for expression, labels in monitoring.legend_labels(panel):
            if " by (" in expression or expression.startswith(("sum (", "histogram_quantile")):
                kept = set().union(*(one for _, one in monitoring.used(expression)))
                assert labels <= kept, (panel["title"], expression)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in monitoring.dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_what_is_not_exposed_is_found() -> None:
    """The check itself: with a metric or a label less, it says so."""
    lines = []
    for _, expression in monitoring.expressions():
        for metric, labels in monitoring.used(expression):
            pairs = ",".join(f'{label}="x"' for label in sorted(labels - monitoring.SCRAPED))
            lines.append(f"{metric}{{{pairs}}} 1.0")
    assert monitoring.missing("\n".join(lines)) == []
    renamed = "\n".join(lines).replace("sglang_kevlar_held_requests", "sglang_kevlar_waiting_requests")
    assert any("no metric sglang_kevlar_held_requests" in one for one in monitoring.missing(renamed))
    unlabelled = "\n".join(lines).replace('kind="x"', 'sort="x"')
    assert any("has no label kind" in one for one in monitoring.missing(unlabelled))


def test_prometheus_takes_the_files(tmp_path: Path) -> None:
    """Also the dashboard's expressions, as rules."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool (Debian: apt-get install prometheus)")
    rules = [{"record": f"panel:{i}", "expr": expression} for i, (_, expression) in enumerate(monitoring.expressions())]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    for command in (
        ["check", "rules", str(monitoring.DIRECTORY / "alerts.yml"), str(tmp_path / "panels.yml")],
        ["check", "config", str(monitoring.DIRECTORY / "prometheus.yml")],
    ):
        result = subprocess.run([promtool, *command], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout + result.stderr


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Groups 0 and 1 serve, 2 stands by. Then 2 takes the place of 0; then 1 is lost too; then all are."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool (Debian: apt-get install prometheus)")

    def group(number: int, values: str) -> dict[str, str]:
        return {"series": f'sglang_kevlar_group_ready{{instance="a",group="{number}"}}', "values": values}

    def at(time: str, alert: str, fires: bool) -> dict[str, object]:
        expected = [{"exp_labels": {"instance": "a", "severity": severity[alert]}}] if fires else []
        return {"eval_time": time, "alertname": alert, "exp_alerts": expected}

    rules = {rule["alert"]: rule for rule in monitoring.alerts()}
    severity = {name: rule["labels"]["severity"] for name, rule in rules.items()}
    # Without annotations, which the tool would compare as well.
    bare = [{key: value for key, value in rule.items() if key != "annotations"} for rule in rules.values()]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "g", "rules": bare}]}))
    series = [
        group(0, "1x20 0x80"),
        group(1, "1x40 0x60"),
        group(2, "0x20 1x40 0x40"),
        {"series": 'sglang_kevlar_failovers_total{instance="a",group="0",cause="exit"}', "values": "0x20 5x80"},
        {"series": 'sglang_kevlar_failovers_total{instance="a",group="1",cause="operator"}', "values": "0x20 9x80"},
    ]
    dying = {"eval_time": "24m", "alertname": "KevlarGroupsKeepDying"}
    dying["exp_alerts"] = [{"exp_labels": {"instance": "a", "group": "0", "severity": "warning"}}]
    cases = [
        at("35m", "KevlarCapacityLost", False),
        at("40m", "KevlarNoGroupServes", False),
        at("55m", "KevlarCapacityLost", True),
        at("55m", "KevlarNoGroupServes", False),
        at("70m", "KevlarNoGroupServes", True),
        dying,
    ]
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "1m"}
    test["tests"] = [{"interval": "1m", "input_series": series, "alert_rule_test": cases}]
    (tmp_path / "test.yml").write_text(json.dumps(test))
    command = [promtool, "test", "rules", str(tmp_path / "test.yml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_job_is_the_one_of_the_alerts() -> None:
    config = yaml.safe_load((monitoring.DIRECTORY / "prometheus.yml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["sglang-kevlar"]
