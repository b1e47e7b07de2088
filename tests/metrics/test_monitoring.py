"""The alert rules and the dashboard: sound by themselves, and about metrics that there are."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from egressd.processes.metric_families import TABLE
from metrics.metrics_scene import ROOT, promtool

MONITORING = ROOT / "docs" / "monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((MONITORING / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def metrics_in(expression: str) -> set[str]:
    return {name.removeprefix("egressd_") for name in re.findall(r"\begressd_\w+", expression)}


def labels_in(expression: str) -> set[str]:
    found = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expression))
    for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        found |= {label.strip() for label in group.split(",")}
    return found


# ---- alerts


def test_the_rules_are_sound_and_raise_what_they_should() -> None:
    promtool("check", "rules", MONITORING / "alerts.yaml")
    promtool("test", "rules", MONITORING / "alerts_test.yaml")


def test_a_rule_that_is_wrong_is_found(tmp_path: Path) -> None:
    shutil.copy(MONITORING / "alerts_test.yaml", tmp_path)
    text = (MONITORING / "alerts.yaml").read_text()
    (tmp_path / "alerts.yaml").write_text(
        text.replace("egressd_ruleset_drift > 0", "egressd_ruleset_drift > 9")
    )
    with pytest.raises(AssertionError, match="EgressdRulesetDrift"):
        promtool("test", "rules", tmp_path / "alerts_test.yaml")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_rule_is_about_metrics_there_are_and_is_tested(rule: dict[str, Any]) -> None:
    assert metrics_in(rule["expr"]) <= TABLE.keys()
    known = {"job", "instance"} | {label for told in TABLE.values() for label in told.labels}
    assert labels_in(rule["expr"]) <= known
    assert set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))) <= known
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description"}
    raised = re.findall(r'alertname="(\w+)"', (MONITORING / "alerts_test.yaml").read_text())
    assert rule["alert"] in raised


# ---- the dashboard


def test_the_dashboard_is_what_grafana_takes() -> None:
    """Its schema as far as it can be said without Grafana: version 39 is that of Grafana 11."""
    assert (DASHBOARD["schemaVersion"], DASHBOARD["title"], DASHBOARD["uid"]) == (39, "egressd", "egressd")
    assert "id" not in DASHBOARD and "__inputs" not in DASHBOARD, "as exported for nobody in particular"
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "job", "instance", "workspace"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_no_panel_covers_another() -> None:
    for one, other in itertools.combinations((panel["gridPos"] for panel in DASHBOARD["panels"]), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
        assert one["x"] >= 0 and one["x"] + one["w"] <= 24


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_has_what_it_needs(panel: dict[str, Any]) -> None:
    assert panel["type"] in ("stat", "timeseries")
    assert panel["description"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        named = metrics_in(target["expr"])
        assert named and named <= TABLE.keys()
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        has = {"job", "instance"} | {label for name in named for label in TABLE[name].labels}
        assert labels_in(target["expr"]) | shown <= has
        grouped = re.search(r"\bby \(([^)]*)\)", target["expr"])
        if grouped:
            assert shown <= {label.strip() for label in grouped[1].split(",")}, "a label that is summed away"


@pytest.mark.parametrize("variable", DASHBOARD["templating"]["list"][1:], ids=lambda v: v["name"])
def test_each_variable_asks_for_a_label_of_its_metric(variable: dict[str, Any]) -> None:
    found = re.fullmatch(r"label_values\(egressd_(\w+)(?:{.*})?, (\w+)\)", variable["definition"])
    assert found and found[2] == variable["name"]
    assert found[2] in {"job", "instance", *TABLE[found[1]].labels}
    assert variable["query"]["query"] == variable["definition"]
