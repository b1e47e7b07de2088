"""docs/request.md: its tables are the program's, and what it shows can be used as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from egressd.access import acl_file, front_matter
from egressd.access.documents import LEVELS
from egressd.access.roles import LEAST
from egressd.broker import config
from egressd.broker.identity.tokens import Unauthenticated, Verifier
from egressd.broker.web.requests import LIMITS
from egressd.policy import document
from egressd.policy.compiled import Guard

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "request.md").read_text()


def first_cells(heading: str) -> list[list[str]]:
    """The words in backquotes of each row's first two cells, in the first table below a heading."""
    table = re.search(r"(?:^\|.*\n)+", PAGE.split(f"\n## {heading}\n")[1], re.MULTILINE)
    assert table
    cells = [line.split("|")[1:3] for line in table[0].splitlines()[2:]]
    return [re.findall(r"`([\w-]+)`", "".join(row)) for row in cells]


def blocks(language: str, beginning: str = "") -> list[str]:
    return [
        text
        for text in re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        if text.startswith(beginning)
    ]


def test_the_table_of_rights_is_the_one_that_decides() -> None:
    documented = first_cells("Roles and rights")
    assert sorted(documented) == sorted([str(right), str(role)] for right, role in LEAST.items())
    assert [role for _, role in documented] == [str(role) for role in sorted(LEAST.values())]


def test_the_table_of_limits_has_all_of_them() -> None:
    listed = [name for row in first_cells("Limits") for name in row]
    assert sorted(listed) == sorted(LIMITS)


def test_the_levels_are_the_default_ones() -> None:
    assert f"`levels`; {', '.join(LEVELS)} unless" in PAGE


def test_the_configurations_are_sound() -> None:
    (whole,) = blocks("yaml", "# /etc/egressd/broker.yaml")
    found = config.parse(whole.encode(), source="broker.yaml")
    assert found.workspaces["acme"].commands
    assert found.workspaces["acme"].inferences["default"].limits.egress == 5 << 20
    (providers,) = blocks("yaml", "issuers:")
    named = config.parse(providers.encode(), source="broker.yaml").issuers
    assert [issuer.name for issuer in named] == ["okta", "entra", "google", "plant"]


def test_what_documents_and_lists_say_is_read() -> None:
    (head,) = blocks("yaml", "---")
    said = front_matter.read(f"{head}Thirty days a year.\n".encode())
    assert said is not None
    assert (said.readers, said.clearance) == (frozenset({"group:idp:staff"}), "internal")
    (listed,) = blocks("yaml", "# /srv/crm.acl.yaml")
    rules = acl_file.load(listed.encode(), source="crm.acl.yaml", levels=LEVELS)
    assert rules.of(b"deals/2026/alpha.txt") is not None
    assert rules.of(b"secrets.txt") is None


def test_the_policy_is_sound() -> None:
    (policy,) = blocks("yaml", "# /etc/egressd/workspaces/acme.yaml")
    found = document.load(
        policy.encode(), source="acme.yaml", expected_name="acme", is_public_suffix=lambda _: False
    )
    assert found.guard == Guard.ENFORCE


def test_the_token_that_is_made_is_believed(tmp_path: Path) -> None:
    (script,) = blocks("python", "import json, sys, time")
    (tmp_path / "make_token.py").write_text(script)
    argv = [sys.executable, "make_token.py", "ann", "staff"]
    token = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert (tmp_path / "idp.key").stat().st_mode & 0o077 == 0
    (whole,) = blocks("yaml", "# /etc/egressd/broker.yaml")
    text = whole.replace("/etc/egressd/idp.jwks.json", str(tmp_path / "idp.jwks.json"))
    verifier = Verifier(config.parse(text.encode(), source="broker.yaml").issuers)
    asker = verifier.verify(token)
    assert (asker.user, asker.groups) == ("user:idp:ann", frozenset({"group:idp:staff"}))
    with pytest.raises(Unauthenticated):
        verifier.verify(f"{token[:-6]}AAAAAA")
