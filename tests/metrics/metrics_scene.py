"""A controller's document for metrics, and the metrics that come of one."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from egressd.processes.exporter import rendered
from egressd.processes.metric_families import Families, Rows, read, tell

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = ROOT / ".lab" / "prometheus" / "usr" / "bin"
NOW = 1_800_000_000.0

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def program(name: str) -> str:
    """promtool or prometheus. Missing, it is a failure: what it would have found is not known."""
    path = UNPACKED / name
    assert path.exists(), f"{path} is missing: make .lab/prometheus/usr/bin/prometheus"
    return str(path)


def promtool(*words: str | Path, stdin: str = "") -> None:
    done = subprocess.run(
        [program("promtool"), *words], input=stdin, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def row(host: str, **more: Any) -> dict[str, Any]:
    return {"host": host, "kind": "host", "ports": ["443/tcp"], "addresses": [], "dialled": None} | {
        "out": [1, 100],
        "in": [2, 200],
        "connections": 1,
        **more,
    }


def account(workspace: str = "acme", *, hosts: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "workspace": workspace,
        "guard": "enforce",
        "hosts": [row("api.example"), row("db.example", dialled=[3, 300])] if hosts is None else hosts,
        "denied": {"unlisted": [4, 400], "shape": [0, 0]},
        "links": [],
        "ended": {"links": 5, "in": [0, 0], "ok": [0, 0], "denied": [0, 0], "other": [0, 0]},
        "balance": {
            "balanced": True,
            "in": [10, 1000],
            "admitted": [5, 550],
            "denied": [4, 400],
            "other": [1, 50],
            "elements": [5, 550],
            "difference": [0, 0],
        },
        "names_refused": 3,
        "names_refused_by": {"name": 2, "budget-names": 1},
        "flows_refused": {"sni-other": 6},
    }


def document(*accounts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "status": {
            "version": "0.1.0",
            "enforcing": True,
            "since": NOW - 60,
            "gateway": "egressd",
            "processes": [
                {"name": "warden", "pid": 7, "state": "running", "restarts": 0},
                {"name": "resolver", "pid": 0, "state": "down", "restarts": 2},
            ],
            "workspaces": [
                {
                    "workspace": "acme",
                    "guard": "enforce",
                    "policy": "sha256:ab",
                    "sandboxes": 3,
                    "names": {"granted": 1, "budget": 64},
                    "problem": None,
                },
                {
                    "workspace": "torn",
                    "guard": None,
                    "policy": None,
                    "sandboxes": 0,
                    "names": None,
                    "problem": "broken",
                },
            ],
            "sandboxes": [],
            "alarms": [],
            "balanced": True,
        },
        "counters": {
            "time": NOW,
            "balanced": True,
            "differences": [],
            "workspaces": list(accounts) or [account()],
            "late": {"unresolved": [1, 60]},
        },
        "journal": {
            "type": "JournalState",
            "records": 1000,
            "octets": 250_000,
            "segments": 1,
            "queued": 3,
            "lag": 0.25,
            "lost": {"queue": 2},
            "failing": "",
            "checkpoint_size": 990,
            "checkpoint_time": NOW - 30,
        },
        "drift": [],
    } | more


def samples(text: str) -> Samples:
    """Name and labels -> value; a sample told twice is refused, as Prometheus does."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def told(document: Mapping[str, Any], rows: Rows | None = None) -> Samples:
    """By way of the text that Prometheus would read."""
    families = Families()
    tell(read(document), rows or Rows(), families, now=NOW)
    return samples(rendered(families, as_openmetrics=False, compressed=False).decode())


def one(found: Samples, name: str, **labels: str) -> float:
    return found[f"egressd_{name}", tuple(sorted(labels.items()))]


def labels_of(found: Samples, name: str, label: str) -> set[str]:
    return {dict(labels)[label] for metric, labels in found if metric == f"egressd_{name}"}
