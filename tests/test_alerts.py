"""The alerting rules: Prometheus' own tool reads them, and fires them for series that our metrics make."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from ptuning.serving.metrics import DEFINITIONS
from ptuning.training.run_metrics import PROGRESS

ALERTS = REPOSITORY / "cluster" / "alerts.yaml"
RULES = {rule["alert"]: rule for rule in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]}

promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")

QUEUE = 'ptuning_request_queue_time_seconds_bucket{replica="a",model="m",le="%s"}'
CASES: dict[str, tuple[dict[str, str], dict[str, str], bool]] = {
    # Series by minute that fire, series that do not; whether the alert keeps a label.
    "PtuningRunStuck": (
        {f'ray_{PROGRESS}{{pid="1"}}': "0x60"},
        {f'ray_{PROGRESS}{{pid="1"}}': "0+60x60"},
        True,
    ),
    "PtuningNothingServed": ({"ptuning_served_versions": "0x60"}, {"ptuning_served_versions": "1x60"}, False),
    "PtuningErrors": (
        {
            'ptuning_requests_total{status="200",route="chat"}': "0+90x60",
            'ptuning_requests_total{status="503",route="chat"}': "0+10x60",
        },
        {'ptuning_requests_total{status="200",route="chat"}': "0+90x60", 'ptuning_requests_total{status="429"}': "0+90x60"},
        False,
    ),
    "PtuningQueue": (
        {QUEUE % "1": "0+5x60", QUEUE % "5": "0+10x60", QUEUE % "+Inf": "0+10x60"},
        {QUEUE % "1": "0+10x60", QUEUE % "5": "0+10x60", QUEUE % "+Inf": "0+10x60"},
        False,
    ),
    "PtuningCache": (
        {'ptuning_kv_cache_usage_ratio{replica="a"}': "1x60"},
        {'ptuning_kv_cache_usage_ratio{replica="a"}': "0.5x60"},
        True,
    ),
}


@pytest.mark.fast
def test_the_rules_read_what_is_exported() -> None:
    assert set(RULES) == set(CASES)
    series = {name: each for each in DEFINITIONS for name in each.series}
    for rule in RULES.values():
        names = set(re.findall(r"\b(?:ray_)?ptuning_\w+", rule["expr"]))
        assert names and names <= {*series, f"ray_{PROGRESS}"}, rule
        labels = {label for name in names & set(series) for label in ("replica", "le", *series[name].labels)}
        asked = re.findall(r"(\w+)=~", rule["expr"]) + re.findall(r"by \((\w+)\)", rule["expr"])
        assert set(asked) <= labels, rule
        assert set(rule["annotations"]) == {"summary", "description"}


@promtool
@pytest.mark.fast
@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_an_alert_fires_and_is_silent(name: str, fires: bool, tmp_path: Path) -> None:
    bad, good, labelled = CASES[name]
    checked = subprocess.run(["promtool", "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert checked.returncode == 0 and "5 rules found" in checked.stdout, checked.stderr
    series = bad if fires else good
    label = {"replica": "a"} if name == "PtuningCache" else {"pid": "1"} if labelled else {}
    told: list[dict[str, Any]] = [
        {"exp_labels": RULES[name]["labels"] | label, "exp_annotations": RULES[name]["annotations"]} for _ in range(fires)
    ]
    test = {
        "interval": "1m",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "alert_rule_test": [{"eval_time": "50m", "alertname": name, "exp_alerts": told}],
    }
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}), encoding="utf-8")
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
