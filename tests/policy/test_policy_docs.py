"""docs/policy.md against the code: its examples load, and its tables list every message, and no other."""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path

import pytest
from policy_texts import allowing, policy, problems
from test_policy_document import REFUSED as BAD_DOCUMENTS
from test_policy_tree import REFUSED as BAD_FILES

from egressd.policy import document, values
from egressd.policy.compile import MAX_RULES
from egressd.policy.compiled import Limits, Policy
from egressd.policy.remarks import remarks
from egressd.policy.tree import read

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
    assert isinstance(policy(text, name=None), Policy)


def test_every_message_is_on_the_page_and_every_row_is_a_message() -> None:
    table = rows("What is refused, and what to do")
    found = [problem for text, *_ in BAD_DOCUMENTS for problem in problems(text)]
    found += [problem for data, *_ in BAD_FILES for problem in read(data, source="f").problems]
    found += [problem for text in MORE for problem in problems(text)]
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
    )
    texts = {remark.text for text in documents for remark in remarks(policy(text))}
    assert not [text for text in texts if not any(row.fullmatch(text) for row in table.values())]
    assert not [cell for cell, row in table.items() if not any(row.fullmatch(text) for text in texts)]


def test_every_key_and_bound_is_on_the_page() -> None:
    for part in (document._RootPart, document._HostPart, document._CidrPart, document._LocalPart):
        assert all(f"`{key}`" in PAGE for key in part.model_fields)
    assert all(f"| `{name}` |" in PAGE for name in Limits.__slots__)
    for bound in (f"{MAX_RULES:,}", document.MAX_PORTS, document.MAX_MEMBERS, values.MAX_PROCESSES):
        assert str(bound) in PAGE
