"""The documentation says what the tree says."""

from __future__ import annotations

import re
import tomllib
import typing
from pathlib import Path

import pytest

from egressd.ipc import messages
from egressd.model import errors
from egressd.processes.cards import CARDS, Capability
from egressd.ruleset import layout

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "man").iterdir()),
]
NOT_EVENTS = {"auditor", "resolver", "controller", "warden", "inspector", "supervisor"} | {
    "policy-changes",  # a check of verify
    "sandbox-can-choose-model", "route-without-compliant-provider",  # rules of lint
}  # fmt: skip
OURS = ("src/", "tests/", "docs/", "systemd/", "completions/", "bench/", "demo/")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def rows(text: str, heading: str) -> list[list[str]]:
    """The first table after `heading`, without its two head lines."""
    table = re.search(r"(?:^\|.*\n)+", f"\n{text}".split(f"\n{heading}\n")[1], re.MULTILINE)
    assert table
    lines = table[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_path_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    named = set(re.findall(r"`([\w./-]+)`", text)) | set(re.findall(r"^\.Pa ([\w./-]+)", text, re.MULTILINE))
    named |= set(re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text))
    missing = [name for name in named if name.startswith(OURS) and not (ROOT / name).exists()]
    assert not missing


def test_the_process_table_is_the_cards() -> None:
    documented = rows(page("architecture.md"), "## Processes")
    expected = [
        [
            card.name,
            card.user,
            str(card.namespace),
            " ".join(c.name for c in sorted(card.capabilities)) or "none",
            card.reads,
            card.does,
        ]
        for card in CARDS.values()
    ]
    assert documented == expected


def test_the_message_table_is_the_closed_set() -> None:
    documented = {
        (sender, receiver): set(re.findall(r"\w+", said))
        for sender, receiver, said in rows(page("architecture.md"), "## Messages")
    }

    def names(union: object) -> set[str]:
        return {kind.__name__ for kind in typing.get_args(union)}

    assert documented == {
        ("controller", "warden"): names(messages.TO_WARDEN),
        ("warden", "controller"): names(messages.FROM_WARDEN),
        ("controller", "resolver"): names(messages.TO_RESOLVER),
        ("resolver", "controller"): names(messages.FROM_RESOLVER),
        ("controller", "inspector"): names(messages.TO_INSPECTOR),
        ("inspector", "controller"): names(messages.FROM_INSPECTOR),
        ("controller", "relay"): names(messages.TO_RELAY),
        ("relay", "controller"): names(messages.FROM_RELAY),
        ("custodian", "controller"): {"HostMended"},
        ("client", "controller"): names(messages.FROM_CLIENT),
        ("controller", "client"): names(messages.TO_CLIENT),
        ("anybody", "auditor"): names(messages.TO_AUDITOR),
        ("controller", "auditor"): names(messages.TO_EVIDENCE),
        ("auditor", "controller"): names(messages.FROM_EVIDENCE),
        ("child", "supervisor"): names(messages.FROM_CHILD),
        ("supervisor", "child"): names(messages.TO_CHILD),
    }


def test_the_tree_has_every_package() -> None:
    documented = [row[0] for row in rows(page("architecture.md"), "## The tree")]
    packages = {
        f"src/egressd/{path.parent.name}" for path in (ROOT / "src" / "egressd").glob("*/__init__.py")
    }
    assert set(documented) == packages


def test_addresses_and_numbers_are_those_of_the_layout() -> None:
    text = page("architecture.md")
    for value in (layout.RESOLVER4, layout.RESOLVER6, layout.UPLINK, layout.HOST_LINK, layout.HOST_TABLE):
        assert str(value) in text
    for phrase in (
        f"logged at a\n   bounded rate to group {layout.NFLOG_GROUP}",
        f"table {layout.ROUTES_STEERED}: to the inspector",
        f"table {layout.ROUTES_FORWARD}: the default route",
    ):
        assert phrase in text


def test_the_table_of_journal_events_is_what_the_processes_record() -> None:
    documented = {
        event
        for row in rows(page("operations.md"), "## Logs and journal")
        for event in re.findall(r"[a-z-]+", row[0].replace("`", " "))
    }
    source = "\n".join(path.read_text() for path in (ROOT / "src" / "egressd").rglob("*.py"))
    said = set(re.findall(r'"([a-z]+(?:-[a-z]+)*)"', source))
    assert documented <= said
    recorded = re.findall(r'(?:\brecord|\b_count|\b_Denied|\balarm)\(\s*"([a-z-]+)"', source)
    prefixes = (
        "dns-", "flow-", "name-", "relay-", "sandbox-", "policy-", "process-", "journal-", "books-",
    )  # fmt: skip
    started = {word for word in said if word.startswith(prefixes)} - {"dns-port"}
    assert set(recorded) | started <= documented | NOT_EVENTS


def test_every_fact_about_nftables_stands_beside_its_test() -> None:
    proofs = (ROOT / "tests" / "kernel_facts" / "test_nftables.py").read_text()
    documented = [row[-1] for row in rows(page("kernel-facts.md"), "## nftables")]
    assert documented == re.findall(r"^def (test_\w+)", proofs, re.MULTILINE)


def test_every_error_of_ours_is_explained() -> None:
    documented = {row[0] for row in rows(page("errors.md"), "# Errors")}
    ours = {
        name
        for name, thing in vars(errors).items()
        if isinstance(thing, type)
        and issubclass(thing, errors.EgressdError)
        and thing is not errors.EgressdError
    }
    assert documented == ours


@pytest.mark.parametrize(
    ("heading", "group"),
    [
        ("## To run", None),
        ("## To test", "test"),
        ("## For the demonstration", "demo"),
        ("## For benchmarks", "bench"),
    ],
)
def test_every_dependency_has_its_reason_and_its_bound(heading: str, group: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] if group is None else project["optional-dependencies"][group]
    declared = [(name, bound) for name, _, bound in (entry.partition(">=") for entry in wanted)]
    table = rows(page("dependencies.md"), heading)
    assert [(name, bound) for name, bound, _ in table] == declared
    assert all(reason for *_, reason in table)


def test_the_unit_keeps_every_capability_of_the_supervisor() -> None:
    unit = (ROOT / "systemd" / "egressd.service").read_text()
    kept = set(
        re.findall(r"CAP_(\w+)", "\n".join(re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)))
    )
    assert {capability.name for capability in CARDS["supervisor"].capabilities} <= kept
    assert {capability.name for card in CARDS.values() for capability in card.capabilities} <= kept
    explained = set(re.findall(r"^#   (.*?)  ", unit, re.MULTILINE))
    assert kept == {name for names in explained for name in re.split(r", ", names)}
    assert Capability.NET_ADMIN.name in kept
