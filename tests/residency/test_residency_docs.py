"""docs/residency.md against the code: its examples load and do what it says, its tables are the code's."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
from builtin_catalogue import CATALOGUE, FILES, REGISTRY

from egressd.cli.residency_lookup import look_up, render
from egressd.cli.screen import paint
from egressd.policy.compiled import Policy
from egressd.policy.document import load
from egressd.policy.lint_rules import RULES
from egressd.policy.routing import selections_by_url
from egressd.residency.catalogue import Catalogue
from egressd.residency.endpoints import Endpoint
from egressd.residency.formats import Given, read
from egressd.residency.judge import Code
from egressd.residency.places import Pin, Scope
from egressd.residency.prefixes import STALE_DAYS

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "docs" / "residency.md").read_text()
README = (PROJECT / "README.md").read_text()
YAML = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
POLICIES = [text for text in YAML if text.startswith("workspace:")]
(ADDITION,) = (text for text in YAML if text.startswith("# /etc/egressd/residency/"))
(PLAIN_LIST,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def policy(text: str) -> Policy:
    return load(
        text.encode(),
        source="acme.yaml",
        expected_name=None,
        is_public_suffix=lambda _: False,
        own=(),
        registry=REGISTRY,
    )


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)
    assert table is not None
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("text", POLICIES, ids=range(len(POLICIES)))
def test_policies_load_and_bar_what_they_say(text: str) -> None:
    made = policy(text)
    assert made.pin
    assert {one.rule.key for one in made.barred} == set(re.findall(r"host: (\S+) +# barred", text))


def test_the_routes_of_the_example_are_served_as_the_page_says() -> None:
    (made,) = (found for text in POLICIES if (found := policy(text)).routes)
    routes = selections_by_url(made)
    assert (chosen := routes["default"].selected) and chosen.provider == "frankfurt"
    assert routes["overflow"].selected is None


def code_said(verdict: str) -> set[Code]:
    """What a cell of the table of verdicts means."""
    for word, codes in (
        ("inside", {Code.INSIDE}),
        ("outside", {Code.OUTSIDE}),
        ("refused: nothing in the URL", {Code.GLOBAL}),
        ("refused without a profile", {Code.UNPLACED}),
        ("by its addresses", {Code.BY_ADDRESS}),
    ):
        if verdict.startswith(word):
            return codes
    raise AssertionError(verdict)


def test_each_endpoint_is_judged_as_the_page_says() -> None:
    said: set[Code] = set()
    for endpoints, _, verdict in rows("Jurisdictions are sets of countries"):
        said = said if verdict == "the same" else code_said(verdict)
        for host in re.findall(r"`([^`]+)`", endpoints):
            assert {REGISTRY.judge_name(host, pin=Pin(("EU",))).code} == said, host
    assert REGISTRY.judge_name("eu.api.openai.com", pin=Pin(("CH", "EEA"))).code is Code.INSIDE


def test_the_table_of_providers_is_the_catalogue() -> None:
    scopes: dict[str, set[str]] = defaultdict(set)
    declarable = set()
    for provider in CATALOGUE._entries.providers.values():
        scopes[provider.key] |= {str(shape.scope) for shape in provider.shapes}
        if any(shape.declarable for shape in provider.shapes):
            declarable.add(provider.key)
    table = rows("What the catalogue knows")
    assert {row[0].strip("`"): row[1] for row in table} == {
        key: ", ".join(sorted(found)) for key, found in scopes.items()
    }
    assert {row[0].strip("`") for row in table if "declarable" in row[2]} == declarable


@pytest.mark.parametrize(
    ("host", "scope", "countries"),
    [
        ("bonn.ai.acme.example", Scope.REGION, ("DE",)),
        ("basel.ai.acme.example", Scope.REGION, ("CH",)),
        ("anywhere.ai.acme.example", Scope.GLOBAL, ()),
        ("rome.ai.acme.example", Scope.UNPLACED, ()),
        ("x.y.ai.acme.example", Scope.UNPLACED, ()),
        ("api.nordic-models.example", Scope.MULTI_REGION, ("NO", "SE")),
        ("ours.cloud.nordic-models.example", Scope.UNPLACED, ()),
        ("bedrock-runtime.eu-central-1.amazonaws.com", Scope.REGION, ("DE",)),
    ],
)
def test_the_addition_to_the_catalogue_loads(host: str, scope: Scope, countries: tuple[str, ...]) -> None:
    catalogue = Catalogue.load((*FILES, ("ours.yaml", ADDITION.encode())))
    found = catalogue.place(Endpoint.of_host(host))
    assert (found.scope, found.countries) == (scope, countries)
    assert found.declarable == (host == "ours.cloud.nordic-models.example")
    assert catalogue.host_of("acme-gateway", "bonn") == "bonn.ai.acme.example"


def test_the_plain_list_is_read() -> None:
    listing = read(PLAIN_LIST.encode(), name="own.txt", given=Given(provider="ours"))
    assert [(entry.prefix, entry.countries) for entry in listing.entries] == [
        ("51.68.0.0/16", ("FR",)),
        ("2001:41d0::/32", ("FR",)),
        ("198.244.0.0/16", ("UK",)),
    ]


@pytest.mark.parametrize(
    ("host", "page"),
    [("eu.api.openai.com", PAGE), ("bedrock-runtime.eu-central-2.amazonaws.com", README)],
    ids=["docs/residency.md", "README.md"],
)
def test_what_lookup_prints_is_on_the_page(host: str, page: str) -> None:
    told = look_up(Endpoint.of_host(host), pin=Pin(("EU",)), registry=REGISTRY)
    assert render(told, paint=paint()) in page


def test_the_readme_counts_the_providers() -> None:
    found = [one for one in CATALOGUE._entries.providers.values() if one.shapes]
    assert f"a catalogue of {len(found)} providers" in README


def test_rules_and_bounds_are_those_of_the_code() -> None:
    assert "`sandbox-can-choose-model`" in PAGE and "sandbox-can-choose-model" in RULES
    assert f"older than {STALE_DAYS} days" in PAGE
