"""Answers of a daemon, as it would give them; the numbers are those of a run of 44 raw frames."""

# ruff: noqa: E501 - one row of a table per line

from __future__ import annotations

import copy
from typing import Any

STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "enforcing": True,
    "since": 1_790_000_000,
    "gateway": "egressd",
    "processes": [
        {"name": "warden", "pid": 812, "state": "running", "restarts": 0},
        {"name": "resolver", "pid": 813, "state": "running", "restarts": 3},
    ],
    "workspaces": [
        {
            "workspace": "acme",
            "guard": "enforce",
            "policy": "sha256:" + "ab" * 32,
            "sandboxes": 1,
            "names": {"granted": 2, "budget": 1024},
            "problem": None,
        },
        {
            "workspace": "lab",
            "guard": "off",
            "policy": "sha256:" + "cd" * 32,
            "sandboxes": 0,
            "names": None,
            "problem": None,
        },
    ],
    "sandboxes": [
        {
            "link": 7,
            "workspace": "acme",
            "uid": 4001,
            "pid": 9120,
            "since": 1_790_000_000 + 3600,
            "address4": "198.19.0.7",
            "address6": "fd53:1::7",
            "command": "python3 infer.py",
        }
    ],
    "alarms": [],
    "balanced": True,
    "drift": [],
    "drift_read": 1_790_000_000,
    "journal": {
        "records": 4711,
        "octets": 1_000_000,
        "segments": 2,
        "queued": 0,
        "lag": 0.0,
        "lost": {},
        "failing": "",
        "origin": "host.example/egressd/0a1b2c3d",
        "key": "",
        "checkpoint_size": 4700,
        "checkpoint_time": 1_790_000_000,
    },
    "journal_error": None,
}

COUNTERS: dict[str, Any] = {
    "time": 1_790_000_000,
    "balanced": True,
    "workspaces": [
        {
            "workspace": "acme",
            "guard": "enforce",
            "hosts": [
                {"host": "eu.api.openai.com", "kind": "host", "ports": ["443/tcp"], "out": [7, 48201], "in": [9, 3_500_000], "connections": 1, "dialled": None},
                {"host": "*.search.example.com", "kind": "wildcard", "ports": ["443/tcp"], "out": [0, 0], "in": [0, 0], "connections": 0, "dialled": None},
                {"host": "(resolver)", "kind": "resolver", "ports": ["53/udp", "53/tcp"], "out": [4, 244], "in": [4, 512], "connections": 4, "dialled": None},
            ],
            "denied": {"unlisted": [29, 1745], "shape": [2, 6100], "quota": [0, 0]},
            "names_refused": 0,
            "names_refused_by": {},
            "flows_refused": {},
            "links": [{"link": 7, "in": [40, 56068], "ok": [9, 48323], "denied": [29, 7667], "other": [2, 78]}],
            "ended": {"links": 2, "in": [4, 300], "ok": [2, 122], "denied": [2, 178], "other": [0, 0]},
            "balance": {
                "balanced": True,
                "in": [44, 56368],
                "admitted": [11, 48445],
                "denied": [31, 7845],
                "other": [2, 78],
                "elements": [11, 48445],
                "difference": [0, 0],
            },
        }
    ],
    "late": {"invalid": [3, 180], "unresolved": [0, 0]},
}  # fmt: skip

DIFF: dict[str, Any] = {
    "changes": [
        {"workspace": "acme", "text": "+ host db.internal.example 5432/tcp", "widens": True},
        {"workspace": "acme", "text": "- host old.example 443/tcp", "widens": False},
    ],
    "problems": [],
    "applied": False,
    "milliseconds": 1.25,
}

WHY: dict[str, Any] = {
    "subject": "tracker.example",
    "workspace": "acme",
    "verdict": "denied",
    "reason": "name",
    "text": "the name is not on the workspace's list",
    "details": ["nearest rule: host api.example (line 4)"],
}


def changed(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A deep copy with some top-level fields replaced."""
    return {**copy.deepcopy(document), **changes}
