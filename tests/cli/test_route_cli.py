"""egressctl route: for scripts, the first line and the exit status; for people, why."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest

from egressd.ipc import messages

NEAR: dict[str, Any] = {
    "provider": "azure-frc", "complies": True, "code": "inside",
    "reason": "20.43.0.1 is in 20.43.0.0/16 of azure, francecentral (FR)", "remedy": "",
    "type": "azure-openai", "base_url": "https://acme.openai.azure.com/openai",
    "host": "acme.openai.azure.com", "port": 443, "region": "francecentral", "jurisdiction": "FR",
    "source_url": "https://learn.microsoft.com/azure", "addresses": ["20.43.0.1", "2603:1020::1"],
    "prefixes": ["20.43.0.0/16", ""], "tables": ["azure@sha256:ab"], "refused": {},
}  # fmt: skip
FAR: dict[str, Any] = {
    **NEAR, "provider": "openai", "complies": False, "code": "global-endpoint",
    "reason": "api.openai.com is a global endpoint", "remedy": "use a regional endpoint of the provider",
    "addresses": [], "prefixes": [], "tables": [],
}  # fmt: skip
SELECTED: dict[str, Any] = {
    "workspace": "acme", "route": "default", "policy": "sha256:1", "pin": ["EU"], "registry": "sha256:2",
    "selected": {**NEAR, "api_key": "secret://env/AZURE_KEY"}, "code": "inside", "reason": NEAR["reason"],
    "remedy": "", "candidates": [FAR, NEAR],
}  # fmt: skip
NONE: dict[str, Any] = {
    **SELECTED, "selected": None, "code": "none-complies",
    "reason": "no provider of route default complies: openai: ...", "candidates": [FAR],
}  # fmt: skip
WORDS = ("route", "-w", "acme", "default")


def test_the_first_line_is_provider_and_url_and_why_follows(egressctl: Any, daemon: Any) -> None:
    daemon.document = SELECTED
    told = egressctl("--run-dir", daemon.run_dir, *WORDS)
    assert (told.status, told.err) == (0, "")
    assert told.out.splitlines() == [
        "azure-frc https://acme.openai.azure.com/openai",
        "  20.43.0.1 is in 20.43.0.0/16 of azure, francecentral (FR)",
        "  region: francecentral (FR)",
        "  source: https://learn.microsoft.com/azure",
        "  key: secret://env/AZURE_KEY",
        "  address: 20.43.0.1 in 20.43.0.0/16",
        "  address: 2603:1020::1",
        "  passed over: openai: api.openai.com is a global endpoint"
        " (use a regional endpoint of the provider) [global-endpoint]",
    ]
    assert daemon.asked == [messages.SelectRoute(workspace="acme", route="default")]


def test_a_shell_reads_it(daemon: Any) -> None:
    daemon.document = SELECTED
    program = [sys.executable, "-m", "egressd.cli.main", "--run-dir", daemon.run_dir, *WORDS]
    script = '"$@" | { read -r name url; echo "$url"; }'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "https://acme.openai.azure.com/openai\n"


def test_those_behind_the_selected_one_were_not_in_question(egressctl: Any, daemon: Any) -> None:
    daemon.document = {**SELECTED, "candidates": [NEAR, FAR]}
    assert "passed over" not in egressctl("--run-dir", daemon.run_dir, *WORDS).out


def test_what_is_not_known_is_not_shown(egressctl: Any, daemon: Any) -> None:
    bare = {**SELECTED["selected"], "region": "", "jurisdiction": "", "source_url": "", "api_key": ""}
    daemon.document = {
        **SELECTED,
        "selected": {**bare, "addresses": [], "prefixes": []},
        "candidates": [NEAR],
    }
    assert egressctl("--run-dir", daemon.run_dir, *WORDS).out.splitlines() == [
        "azure-frc https://acme.openai.azure.com/openai",
        "  20.43.0.1 is in 20.43.0.0/16 of azure, francecentral (FR)",
    ]


def test_none_is_another_status_and_nothing_on_standard_output(egressctl: Any, daemon: Any) -> None:
    daemon.document = NONE
    told = egressctl("--run-dir", daemon.run_dir, *WORDS)
    assert (told.status, told.out) == (1, "")
    assert told.err.splitlines() == [
        "route default of acme: no provider complies",
        "  openai: api.openai.com is a global endpoint (use a regional endpoint of the provider)"
        " [global-endpoint]",
    ]


@pytest.mark.parametrize(("document", "status"), [(SELECTED, 0), (NONE, 1)])
def test_the_document_is_the_daemons(egressctl: Any, daemon: Any, document: Any, status: int) -> None:
    daemon.document = document
    told = egressctl("--run-dir", daemon.run_dir, "--json", *WORDS)
    assert (told.status, told.json, told.err) == (status, document, "")


def test_an_unknown_route_is_refused_with_the_daemons_words(egressctl: Any, daemon: Any) -> None:
    text = "workspace acme has no route 'x'; its routes are default"
    daemon.refusal = messages.Refusal(reason="unlisted", text=text)
    told = egressctl("--run-dir", daemon.run_dir, "route", "-w", "acme", "x")
    assert (told.status, told.out, told.err) == (125, "", f"egressctl: {text}\n")


def test_foreign_text_is_shown_harmlessly(egressctl: Any, daemon: Any) -> None:
    document = copy.deepcopy(SELECTED)
    document["selected"] |= {"base_url": "https://x/\x1b[2J", "source_url": "a\nb"}
    document["reason"] = document["candidates"][0]["reason"] = "\u202eevil"
    daemon.document = document
    out = egressctl("--run-dir", daemon.run_dir, *WORDS).out
    assert "\x1b" not in out and "\u202e" not in out and len(out.splitlines()) == 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("route", "default"), "required: -w/--workspace"),
        (("route", "-w", "acme"), "required: ROUTE"),
        (("route", "-w", "acme", "a", "b"), "unrecognized arguments: b"),
    ],
)
def test_a_wrong_command_line_is_status_2(egressctl: Any, words: tuple[str, ...], says: str) -> None:
    told = egressctl(*words)
    assert (told.status, told.out) == (2, "")
    assert says in told.err
