"""docs/policy.md against the code: its examples load, and its tables list every message, and no other."""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path

import pytest
from policy_texts import BROKEN, KNOWN, NO_TABLES, allowing, pinned, policy, problems
from test_policy_barring import ROUTED
from test_policy_document import REFUSED as BAD_DOCUMENTS
from test_policy_document import hosts as many_hosts
from test_policy_profiles import CONTRADICTED, TOGETHER, TWO
from test_policy_profiles import REFUSED as BAD_PROFILES
from test_policy_tree import REFUSED as BAD_FILES

from egressd.model.tree import read
from egressd.policy import document, profiles, values
from egressd.policy.compile import MAX_RULES
from egressd.policy.compiled import Budgets, Limits, Policy
from egressd.policy.decide import rule_for
from egressd.policy.remarks import remarks
from egressd.policy.units import duration_text, size_text
from egressd.processes.inspector import IDLE

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# Rarer mistakes, to have every row of the page seen once.
MORE = [
    allowing(f"host: {name}")
    for name in (
        "-a.example", "a..b", "'.'", "10.0.0.0/8", ".".join(["a" * 60] * 5),
    )
]  # fmt: skip


def rows(heading: str) -> dict[str, re.Pattern[str]]:
    """The first cells of the tables under a heading, with `…` for anything."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
    return {
        cell: re.compile(".+".join(re.escape(part) for part in cell.split("…")))
        for cell in cells
        if cell not in ("message", "remark")
    }


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("text", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_load(text: str) -> None:
    assert isinstance(policy(text, name=None, registry=KNOWN), Policy)


def test_what_an_example_says_is_barred_is_barred_and_nothing_else() -> None:
    said = 0
    for text in EXAMPLES:
        barred = {one.rule.key for one in policy(text, name=None, registry=KNOWN).barred}
        assert barred == set(re.findall(r"host: (\S+) +# barred", text))
        said += len(barred)
    assert said == 3


def test_every_message_is_on_the_page_and_every_row_is_a_message() -> None:
    table = rows("What is refused, and what to do")
    found = [problem for text, *_ in BAD_DOCUMENTS for problem in problems(text)]
    found += [problem for text, *_ in BAD_PROFILES for problem in problems(text, registry=KNOWN)]
    found += [problem for text, *_ in TOGETHER for problem in problems(TWO + text)]
    found += problems(CONTRADICTED, registry=KNOWN)
    found += [problem for data, *_ in BAD_FILES for problem in read(data, source="f").problems]
    found += [problem for text in MORE for problem in problems(text)]
    found += problems(many_hosts(15_358) + b"- host: '*.a.example'\n")
    found += problems(allowing("{cidr: 10.0.0.0/8, ports: [1]}"), own=(ip_network("10.0.0.0/16"),))
    texts = {problem.text for problem in found}
    unlisted = [text for text in texts if not any(row.fullmatch(text) for row in table.values())]
    assert not unlisted
    unseen = [cell for cell, row in table.items() if not any(row.fullmatch(text) for text in texts)]
    assert not unseen


def test_every_remark_is_on_the_page_and_every_row_is_a_remark() -> None:
    table = rows("What is accepted with a remark")
    documents = (
        "workspace: acme",
        EXAMPLES[0],
        allowing(),
        allowing("{cidr: 8.0.0.0/8, ports: [1]}"),
        allowing(
            "{host: a.example, ports: [443, 443/udp], verify: address}",
            more="wildcards: {sandbox: {rate: 1}}",
        ),
        allowing("{host: '**.a.example', ech: allow}", "{host: b.a.example, ports: [22]}"),
        allowing("host: '*.storage.googleapis.com'"),
        allowing("{host: a.example, vouch: contract 4711}", more="local_only: true\n"),
        allowing("{host: a.example, vouch: contract 4711}", more=ROUTED.replace("https", "http")),
        pinned("{host: a.example, vouch: contract 4711}", "host: api.openai.com", "host: b.example"),
        pinned("host: '*.a.example'", guard="off"),
    )
    texts = {
        remark.text
        for text in documents
        for registry in (KNOWN, NO_TABLES, BROKEN)
        for remark in remarks(policy(text, registry=registry), registry=registry)
    }
    assert not [text for text in texts if not any(row.fullmatch(text) for row in table.values())]
    assert not [cell for cell, row in table.items() if not any(row.fullmatch(text) for text in texts)]


def test_every_key_and_bound_is_on_the_page() -> None:
    parts = (
        document._RootPart, document._HostPart, document._CidrPart, document._LocalPart,
        document._ProviderRulePart, document._WildcardsPart, document._BudgetPart,
        profiles.ProviderPart, profiles.DeclaredPart, profiles.RoutePart,
    )  # fmt: skip
    for part in parts:
        assert all(f"`{key}`" in PAGE for key in part.model_fields)
    assert all(f"| `{name}` |" in PAGE for name in Limits.__slots__)
    for bound in (f"{MAX_RULES:,}", document.MAX_PORTS, document.MAX_MEMBERS, values.MAX_PROCESSES,
                  profiles.MAX_PROVIDERS, profiles.MAX_ROUTES, profiles.MAX_MODELS,
                  f"{values.MIN_REASON} to {values.MAX_REASON} characters",
                  values.MAX_NAMES, values.MAX_RATE, duration_text(values.MAX_IDLE)):  # fmt: skip
        assert str(bound) in PAGE


def test_the_usual_budgets_are_on_the_page() -> None:
    sandbox, workspace = Budgets().sandbox, Budgets().workspace
    for name, spell in (("names", str), ("bytes", size_text), ("rate", "{:g}".format)):
        usual = f"{spell(getattr(sandbox, name))}; {spell(getattr(workspace, name))}"  # type: ignore[operator]
        assert re.search(rf"^\| `{name}` \|.*\| {usual} \|$", PAGE, re.MULTILINE)


def test_the_idle_time_without_a_limit_is_on_the_page() -> None:
    assert f"; {duration_text(IDLE)} if nothing is said" in PAGE


# ---- the tables of verification and of wildcards are what the code does


def table(heading: str) -> list[list[str]]:
    section = PAGE.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\|.*\|$", section, re.M)
    ]


PORT_ROWS = [("443/tcp",), ("443/tls", "993/tls"), ("80", "8443/tcp"), ("443/udp",), ("53/udp",)]


@pytest.mark.parametrize("number", range(len(PORT_ROWS)))
@pytest.mark.parametrize(("column", "verify"), [(1, ""), (2, ", verify: sni"), (3, ", verify: address")])
def test_how_each_port_is_verified(number: int, column: int, verify: str) -> None:
    said = table("verify")[2:][number][column]
    for port in PORT_ROWS[number]:
        text = allowing(f"{{host: a.example, ports: [{port}]{verify}}}")
        if said.startswith("refused"):
            assert problems(text)
        else:
            (rule,) = policy(text).hosts
            assert said.lower() == rule.verify_on(rule.ports[0])


WILDCARD_ROWS = table("Wildcards")


@pytest.mark.parametrize("row", WILDCARD_ROWS[2:], ids=range(len(WILDCARD_ROWS) - 2))
def test_which_rule_a_name_has(row: list[str]) -> None:
    rules = re.findall(r"`([^`]+)` on (\d+)", row[0])
    made = policy(allowing(*(f"{{host: '{host}', ports: [{port}]}}" for host, port in rules)))
    for name, port in zip(WILDCARD_ROWS[0][1:], row[1:], strict=True):
        rule = rule_for(made, name.strip("`"))
        assert (str(rule.ports[0].number) if rule else "") == port
