"""What neighbourhood tests share: a sandbox that tries what is allowed and what is not, and the doctor.

Not a test. The policy allows plain.test; everything else of the lab's internet is evil.
"""

from __future__ import annotations

import json
from typing import Any

from integration.probe import Outcome, Resident
from lab import topology as t
from lab.machine import poll

POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp, 443/udp], verify: address}
  - {host: eu.api.openai.test}
"""
MARKER = "egressd-marker-9c41"
ALLOWED: tuple[tuple[Any, ...], ...] = tuple(("tcp", name, 7, "allowed") for name in ("plain.test",))
DENIED: tuple[tuple[Any, ...], ...] = (
    ("tcp", str(t.EVIL4), 443, MARKER),
    ("tcp", str(t.EVIL6), 443, MARKER),
    ("udp", str(t.EVIL4), 443, MARKER),
    ("tcp", str(t.HOST4), 9998, MARKER),
    ("tcp", "plain.test", 8080, MARKER),
    ("tcp", "evil.test", 443, MARKER),
)
REFUSALS = ["ECONNREFUSED"] * 5 + ["EAI_NONAME"]


def works(resident: Resident) -> bool:
    return [one.result for one in resident.tries(*ALLOWED)] == ["ok"] * len(ALLOWED)


def refused(resident: Resident) -> None:
    """Everything that is not allowed, at once."""
    found: list[Outcome] = resident.tries(*DENIED)
    assert [one.result for one in found] == REFUSALS, found
    assert max(one.milliseconds for one in found) < 500, found


def works_again(resident: Resident, *, within: float = 10.0) -> None:
    poll(lambda: works(resident), timeout=within, what="approved traffic flows again")
    refused(resident)


def doctor(daemon: Any) -> dict[str, list[dict[str, str]]]:
    """Findings that are not ok, by their needs."""
    result = daemon.ctl("--json", "doctor", "--config", daemon.config_file)
    assert result.status in (0, 1), result.err
    found: dict[str, list[dict[str, str]]] = {}
    for row in json.loads(result.out)["findings"]:
        if row["result"] != "ok":
            found.setdefault(row["need"], []).append(row)
    return found


def mended(daemon: Any) -> list[dict[str, Any]]:
    """What the custodian put right, as it is on record."""
    return [
        record["fields"]
        for path in sorted(daemon.lab.path(f"{daemon.directory}/state/journal").glob("*.jsonl"))
        for line in path.read_text().splitlines()
        if '"host-mended"' in line
        for record in [json.loads(line)]
    ]
