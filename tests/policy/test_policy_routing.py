"""Which provider serves a route: the first that complies, or none, and every reason."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_texts import AWS, AZURE, KNOWN, policy

from egressd.policy.compiled import Policy
from egressd.policy.routing import NONE, Candidate, Evidence, Seen, Selection, select, selections_by_url

DOCUMENT = """\
workspace: acme
guard: enforce
residency: {jurisdictions: [EU]}
providers:
  frc:
    type: azure-openai
    base_url: https://acme.openai.azure.com/openai
    api_key: secret://env/AZURE_KEY
    residency: {region: francecentral, jurisdiction: FR, source_url: "https://learn.microsoft.com/azure"}
  fra: {type: aws-bedrock, base_url: "https://bedrock-runtime.eu-central-1.amazonaws.com"}
  us: {type: aws-bedrock, base_url: "https://bedrock-runtime.us-east-1.amazonaws.com"}
  world: {type: openai, base_url: "https://api.openai.com/v1"}
  gate: {type: openai-compatible, base_url: "https://llm.example.com:8443/v1"}
  rack: {type: openai-compatible, base_url: "https://10.1.2.3/v1"}
  here: {type: ollama, base_url: "http://localhost:11434"}
routes:
  default: {providers: [world, frc, fra]}
  frankfurt: {provider: fra}
  gate: {provider: gate}
  rack: {provider: rack}
  here: {provider: here}
  us: {provider: us}
allow:
  - provider: frc
  - provider: fra
  - provider: us
  - provider: world
  - {provider: rack, vouch: our own racks}
  - provider: here
"""
POLICY = policy(DOCUMENT, registry=KNOWN)
FRANCE, VIRGINIA, FRANKFURT, NOWHERE = "20.19.1.1", "3.80.1.1", "3.64.1.1", "192.0.2.1"
FRANKFURT6 = "2a05:d014::1"
CLOUDFRONT = "13.32.0.1"


def seen(*addresses: str, made: Policy = POLICY, vouched: bool = False) -> Evidence:
    """What a controller has found out about these addresses."""
    judged = (
        (ip_address(text), *KNOWN.judge_address(ip_address(text), pin=made.pin, vouched=vouched))
        for text in addresses
    )
    return Evidence(tuple(Seen(address, finding, found) for address, finding, found in judged))


def chosen(selection: Selection) -> Candidate:
    assert selection.selected is not None
    return selection.selected


def provider(selection: Selection) -> str:
    return "" if selection.selected is None else selection.selected.provider


def why(selection: Selection) -> dict[str, str]:
    return {one.provider: one.code for one in selection.candidates}


def test_the_first_that_complies_is_selected() -> None:
    found = select(POLICY, "default", {"frc": seen(FRANCE), "fra": seen(FRANKFURT)})
    assert (provider(found), found.code) == ("frc", "inside")
    assert why(found) == {"world": "global-endpoint", "frc": "inside", "fra": "inside"}
    assert (chosen(found).host, chosen(found).port) == ("acme.openai.azure.com", 443)
    assert (chosen(found).base_url, chosen(found).api_key) == (
        "https://acme.openai.azure.com/openai",
        "secret://env/AZURE_KEY",
    )
    assert (chosen(found).declared_region, chosen(found).jurisdiction) == ("francecentral", "FR")
    assert (chosen(found).addresses, chosen(found).prefixes) == ((FRANCE,), ("20.19.0.0/16",))
    assert chosen(found).tables == (f"azure@{AZURE.source.digest}",)
    assert (found.workspace, found.route, found.pin, found.policy) == (
        "acme",
        "default",
        ("EU",),
        POLICY.digest,
    )


def test_the_order_of_the_route_is_the_only_order() -> None:
    both = {"frc": seen(FRANCE), "fra": seen(FRANKFURT)}
    other = policy(DOCUMENT.replace("[world, frc, fra]", "[fra, world, frc]"), registry=KNOWN)
    assert provider(select(POLICY, "default", both)) == "frc"
    assert provider(select(other, "default", both)) == "fra"


def test_what_a_url_says_is_told_where_the_catalogue_knows_it() -> None:
    found = select(POLICY, "frankfurt", {"fra": seen(FRANKFURT, FRANKFURT6)})
    assert (chosen(found).declared_region, chosen(found).jurisdiction, chosen(found).api_key) == (
        "eu-central-1",
        "DE",
        "",
    )
    assert (chosen(found).addresses, chosen(found).prefixes) == (
        (FRANKFURT, FRANKFURT6),
        ("3.64.0.0/12", "2a05:d014::/36"),
    )
    assert chosen(found).tables == (f"aws@{AWS.source.digest}",)


EVIDENCE = [
    # of frc, of fra; who is selected, and the codes
    ((FRANCE,), (FRANKFURT,), "frc", "inside", "inside"),
    ((), (FRANKFURT,), "fra", "unresolved", "inside"),
    ((VIRGINIA,), (FRANKFURT,), "fra", "outside", "inside"),
    ((NOWHERE,), (FRANKFURT,), "fra", "no-prefix", "inside"),
    ((CLOUDFRONT,), (FRANKFURT6,), "fra", "anycast", "inside"),
    ((VIRGINIA, FRANCE), (), "frc", "inside", "unresolved"),  # the one that may be reached
    ((), (), "", "unresolved", "unresolved"),
    ((VIRGINIA,), (NOWHERE,), "", "outside", "no-prefix"),
    ((VIRGINIA, NOWHERE), (), "", "outside", "unresolved"),
]


@pytest.mark.parametrize(("frc", "fra", "selected", "why_frc", "why_fra"), EVIDENCE, ids=range(len(EVIDENCE)))
def test_addresses_decide(
    frc: tuple[str, ...], fra: tuple[str, ...], selected: str, why_frc: str, why_fra: str
) -> None:
    found = select(POLICY, "default", {"frc": seen(*frc), "fra": seen(*fra)})
    assert provider(found) == selected
    assert why(found) == {"world": "global-endpoint", "frc": why_frc, "fra": why_fra}


def test_an_address_that_may_not_be_reached_is_told_and_not_counted() -> None:
    found = select(POLICY, "default", {"frc": seen(VIRGINIA, FRANCE)})
    one = found.candidates[1]
    assert one.selectable and one.addresses == (FRANCE,)
    assert one.refused == (
        (VIRGINIA, "3.80.1.1 is in 3.80.0.0/12 of aws, us-east-1 (US), and US is not in EU"),
    )


def test_when_none_complies_nothing_stands_in_its_place() -> None:
    found = select(POLICY, "default", {"frc": seen(VIRGINIA)})
    assert (found.selected, found.code) == (None, NONE)
    assert found.text.startswith("no provider of route default complies: world: ")
    assert "frc: 3.80.1.1 is in 3.80.0.0/12 of aws" in found.text
    assert "fra: bedrock-runtime.eu-central-1.amazonaws.com has not resolved" in found.text
    assert found.remedy == "use a regional endpoint of the provider"


def test_evidence_for_others_is_none() -> None:
    assert not select(POLICY, "frankfurt", {"frc": seen(FRANKFURT), "us": seen(FRANKFURT)}).selected
    assert select(POLICY, "us", {"us": seen(FRANKFURT)}).code == "outside", "its URL says Virginia"


def test_a_profile_that_no_rule_allows() -> None:
    found = select(POLICY, "gate", {"gate": seen(FRANKFURT)})
    assert (provider(found), found.code) == ("", "unlisted")
    assert "no rule of acme allows llm.example.com" in found.text
    assert found.remedy == "add - provider: gate under allow:"


def test_a_profile_whose_host_is_allowed_on_another_port() -> None:
    made = policy(DOCUMENT + "  - host: llm.example.com\n", registry=KNOWN)
    assert select(made, "gate", {"gate": seen(FRANKFURT)}).code == "port"
    made = policy(DOCUMENT + "  - {host: llm.example.com, ports: [8443/tls]}\n", registry=KNOWN)
    assert provider(select(made, "gate", {"gate": seen(FRANKFURT)})) == "gate"
    made = policy(DOCUMENT + "  - {host: '*.example.com', ports: [8443/tls]}\n", registry=KNOWN)
    assert provider(select(made, "gate", {"gate": seen(FRANKFURT)})) == "gate"


def test_a_profile_whose_host_is_barred_for_another_ones_sake() -> None:
    other = "  bad: {type: openai-compatible, base_url: 'https://llm.example.com:8443/v2', residency: OUT}\n"
    other = other.replace("OUT", "{region: x, jurisdiction: US}")
    text = DOCUMENT.replace("providers:\n  frc", f"providers:\n{other}  frc")
    made = policy(text + "  - provider: gate\n  - provider: bad\n", registry=KNOWN)
    found = select(made, "gate", {"gate": seen(FRANKFURT)})
    assert (provider(found), found.code) == ("", "outside")
    assert "provider bad: llm.example.com is declared to be in US" in found.text


def test_this_machine_needs_no_evidence() -> None:
    found = select(POLICY, "here", {})
    assert (provider(found), found.code, chosen(found).addresses, chosen(found).prefixes) == (
        "here",
        "loopback",
        ("127.0.0.1",),
        ("",),
    )


def test_an_address_that_is_written_was_judged_with_its_rule() -> None:
    found = select(POLICY, "rack", {})
    assert (provider(found), chosen(found).addresses) == ("rack", ("10.1.2.3",))
    made = policy(
        DOCUMENT.replace("{provider: rack, vouch: our own racks}", "provider: rack"), registry=KNOWN
    )
    assert select(made, "rack", {}).code == "no-prefix"


def test_while_external_routing_is_off_only_local_ones_are_selected() -> None:
    made = policy(DOCUMENT + "local_only: true\n", registry=KNOWN)
    found = select(made, "default", {"frc": seen(FRANCE), "fra": seen(FRANKFURT)})
    assert found.selected is None
    assert set(why(found).values()) == {"local-only"}
    assert found.remedy == "egressctl local-only acme off"
    assert provider(select(made, "here", {})) == "here"
    assert provider(select(made, "rack", {})) == "rack"


def test_without_a_pin_the_first_that_can_be_reached() -> None:
    made = policy(DOCUMENT.replace("residency: {jurisdictions: [EU]}\n", ""), registry=KNOWN)
    found = select(made, "default", {"world": seen(VIRGINIA, made=made)})
    assert (provider(found), found.code, found.pin) == ("world", "unpinned", ())
    found = select(made, "default", {"fra": seen(VIRGINIA, made=made)})
    assert provider(found) == "fra"
    assert why(found) == {"world": "unresolved", "frc": "unresolved", "fra": "unpinned"}


def test_by_url_alone() -> None:
    by_url = selections_by_url(POLICY)
    assert set(by_url) == {"default", "frankfurt", "gate", "rack", "here", "us"}
    found = by_url["default"]
    assert (provider(found), found.code, chosen(found).addresses) == ("frc", "by-address", ())
    assert by_url["us"].code == "outside"
    assert by_url["gate"].code == "unlisted"


@pytest.mark.parametrize("route", ["", "nothing", "Default", "default ", "\x1b[2J"])
def test_a_route_that_is_not_there(route: str) -> None:
    with pytest.raises(KeyError):
        select(POLICY, route, {})


ADDRESSES = st.lists(
    st.sampled_from([FRANCE, VIRGINIA, FRANKFURT, FRANKFURT6, NOWHERE, CLOUDFRONT]), max_size=3
)


@settings(max_examples=100)
@given(
    st.permutations(["world", "frc", "fra", "us", "gate"]),
    st.dictionaries(st.sampled_from(["world", "frc", "fra", "us", "gate"]), ADDRESSES),
)
def test_nothing_outside_is_ever_selected(order: list[str], addresses: dict[str, list[str]]) -> None:
    made = policy(DOCUMENT.replace("[world, frc, fra]", f"[{', '.join(order)}]"), registry=KNOWN)
    found = select(made, "default", {name: seen(*texts) for name, texts in addresses.items()})
    within = {FRANCE, FRANKFURT, FRANKFURT6}
    able = [name for name in order if name in ("frc", "fra") and within & set(addresses.get(name, ()))]
    assert provider(found) == (able[0] if able else "")
    assert found.selected is None or set(found.selected.addresses) <= within
