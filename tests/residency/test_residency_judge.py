"""Judging: what the URL says, what its author declares, what the addresses show, against the pin."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from builtin_catalogue import CATALOGUE
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.errors import Unfit
from egressd.residency.endpoints import Endpoint
from egressd.residency.judge import Code, Finding, contradiction, judge_address, judge_endpoint
from egressd.residency.jurisdictions import CODES, EEA, EU, countries, jurisdiction, named
from egressd.residency.places import Declared, Observation, Pin, Placement, Scope
from egressd.residency.registry import Registry

NO_PIN, EU_PIN, EEA_CH, US_PIN = Pin(), Pin(("EU",)), Pin(("CH", "EEA")), Pin(("US",))
UNKNOWN = Placement()
GERMANY = Placement(Scope.REGION, "acme", "de-1", ("DE",))
LONDON = Placement(Scope.REGION, "acme", "uk-1", ("UK",))
NOWHERE = Placement(Scope.REGION, "acme", "x-1", ())
EUROPE = Placement(Scope.MULTI_REGION, "acme", "eu", tuple(sorted(countries(["EEA", "CH"]))))
GLOBAL = Placement(Scope.GLOBAL, "acme", "global")
SILENT = Placement(Scope.UNPLACED, "acme", note="the URL does not say", declarable=True)
STRANGE = Placement(Scope.UNPLACED, "acme", note="the shape is not known")
LOOPBACK = Placement(Scope.LOOPBACK)
DE, UK = Declared("de-1", "DE", ""), Declared("uk-1", "UK", "")

ROWS = [
    # the URL, the declaration, the pin, the code
    (UNKNOWN, None, NO_PIN, Code.UNPINNED),
    (GLOBAL, None, NO_PIN, Code.UNPINNED),
    (STRANGE, None, NO_PIN, Code.UNPINNED),
    (LOOPBACK, None, EU_PIN, Code.LOOPBACK),
    (LOOPBACK, UK, EU_PIN, Code.LOOPBACK),
    (GERMANY, None, EU_PIN, Code.INSIDE),
    (GERMANY, None, EEA_CH, Code.INSIDE),
    (GERMANY, None, Pin(("DE",)), Code.INSIDE),
    (GERMANY, None, US_PIN, Code.OUTSIDE),
    (GERMANY, None, Pin(("FR",)), Code.OUTSIDE),
    (GERMANY, DE, EU_PIN, Code.INSIDE),
    (GERMANY, UK, EU_PIN, Code.CONTRADICTED),
    (GERMANY, Declared("de-1", "FR", ""), EU_PIN, Code.CONTRADICTED),
    (GERMANY, Declared("de-1", "EU", ""), EU_PIN, Code.INSIDE),
    (LONDON, None, EU_PIN, Code.OUTSIDE),
    (LONDON, None, EEA_CH, Code.OUTSIDE),
    (LONDON, None, Pin(("EU", "UK")), Code.INSIDE),
    (LONDON, DE, EU_PIN, Code.CONTRADICTED),
    (NOWHERE, None, EU_PIN, Code.UNPLACED),
    (NOWHERE, Declared("x-1", "DE", ""), EU_PIN, Code.UNPLACED),
    (EUROPE, None, EU_PIN, Code.OUTSIDE),
    (EUROPE, None, EEA_CH, Code.INSIDE),
    (EUROPE, None, US_PIN, Code.OUTSIDE),
    (EUROPE, Declared("eu", "EEA", ""), EEA_CH, Code.CONTRADICTED),
    (EUROPE, Declared("eu", "EEA, CH", ""), EEA_CH, Code.INSIDE),
    (EUROPE, Declared("eu", "EEA, CH", ""), EU_PIN, Code.OUTSIDE),
    (GLOBAL, None, EU_PIN, Code.GLOBAL),
    (GLOBAL, None, US_PIN, Code.GLOBAL),
    (GLOBAL, DE, EU_PIN, Code.CONTRADICTED),
    (GLOBAL, Declared("global", "DE", ""), EU_PIN, Code.GLOBAL),
    (SILENT, None, EU_PIN, Code.UNPLACED),
    (SILENT, DE, EU_PIN, Code.BY_ADDRESS),
    (SILENT, UK, EU_PIN, Code.OUTSIDE),
    (SILENT, Declared("eu", "EEA, CH", ""), EU_PIN, Code.OUTSIDE),
    (SILENT, Declared("eu", "EEA, CH", ""), EEA_CH, Code.BY_ADDRESS),
    (STRANGE, None, EU_PIN, Code.UNPLACED),
    (STRANGE, DE, EU_PIN, Code.UNPLACED),
    (UNKNOWN, None, EU_PIN, Code.BY_ADDRESS),
    (UNKNOWN, DE, EU_PIN, Code.BY_ADDRESS),
    (UNKNOWN, UK, EU_PIN, Code.OUTSIDE),
    (UNKNOWN, Declared("somewhere", "EEA", ""), EU_PIN, Code.OUTSIDE),
]
COMPLIANT = {Code.INSIDE, Code.UNPINNED, Code.LOOPBACK, Code.BY_ADDRESS, Code.VOUCHED}


@pytest.mark.parametrize("placement, declared, pin, code", ROWS)
def test_an_endpoint(placement: Placement, declared: Declared | None, pin: Pin, code: Code) -> None:
    finding = judge_endpoint(placement, declared=declared, pin=pin, name="llm.example")

    assert finding.code is code
    assert finding.compliant is (code in COMPLIANT)
    assert finding.text


def test_what_was_not_judged_is_refused() -> None:
    assert not Finding().compliant and Finding().code is Code.UNJUDGED


def test_the_words() -> None:
    def says(placement: Placement, pin: Pin, declared: Declared | None = None) -> str:
        return judge_endpoint(placement, declared=declared, pin=pin, name="llm.example").text

    assert says(LONDON, EU_PIN) == "llm.example is in uk-1 (UK), and UK is not in EU"
    assert says(EUROPE, EU_PIN) == "llm.example is in eu (CH, EEA), and CH, IS, LI, NO are not in EU"
    assert says(EUROPE, US_PIN) == "llm.example is in eu (CH, EEA), and CH, EEA are not in US"
    assert says(replace(LONDON, note="that is London"), EU_PIN).startswith(
        "llm.example is in uk-1 (UK): that is London"
    )
    assert says(GLOBAL, EU_PIN).startswith("llm.example is a global endpoint")
    assert says(SILENT, EU_PIN) == "the URL does not say"
    assert says(SILENT, EU_PIN, UK) == "llm.example is declared to be in UK (uk-1), and the pin is EU"
    assert says(GERMANY, EU_PIN, UK) == "it declares uk-1, and its URL says de-1"


def test_what_contradicts_a_url_does_so_without_a_pin() -> None:
    assert contradiction(GERMANY, DE) is None
    assert contradiction(UNKNOWN, DE) is None and contradiction(SILENT, UK) is None
    assert contradiction(GERMANY, UK) == "it declares uk-1, and its URL says de-1"
    assert contradiction(LONDON, Declared("uk-1", "EU", "")) == "it declares EU, and uk-1 is in UK"
    assert contradiction(GLOBAL, DE) == "it declares de-1, and its URL is of a global endpoint"


# ---- by address

HERE = ip_address("192.0.2.1")
IN_DE = Observation(HERE, "192.0.2.0/24", "acme", "de-1", ("DE",))
IN_US = Observation(HERE, "192.0.2.0/24", "acme", "us-1", ("US",))
NOBODYS = Observation(HERE)
EVERYWHERE = Observation(HERE, "192.0.2.0/24", "acme", "global", (), anycast=True)
UNCLEAR = Observation(HERE, "192.0.2.0/24", "acme", "xx-1")
TORN = Observation(HERE, "192.0.2.0/24", "acme", "de-1", ("DE",), conflict="us-1 has it, too")

SEEN = [
    # what the tables say, the code without and with a voucher
    (IN_DE, Code.INSIDE, Code.INSIDE),
    (IN_US, Code.OUTSIDE, Code.OUTSIDE),
    (NOBODYS, Code.UNPUBLISHED, Code.VOUCHED),
    (EVERYWHERE, Code.ANYCAST, Code.VOUCHED),
    (UNCLEAR, Code.CONFLICT, Code.CONFLICT),
    (TORN, Code.CONFLICT, Code.CONFLICT),
    (replace(IN_DE, others=(IN_US,)), Code.OUTSIDE, Code.OUTSIDE),
    (replace(IN_US, others=(IN_DE,)), Code.OUTSIDE, Code.OUTSIDE),
    (replace(IN_DE, others=(IN_DE,)), Code.INSIDE, Code.INSIDE),
    (replace(IN_DE, others=(EVERYWHERE,)), Code.ANYCAST, Code.VOUCHED),
    (replace(EVERYWHERE, others=(IN_US,)), Code.OUTSIDE, Code.OUTSIDE),
    (replace(EVERYWHERE, others=(UNCLEAR,)), Code.CONFLICT, Code.CONFLICT),
]


@pytest.mark.parametrize("seen, alone, vouched", SEEN)
def test_an_address(seen: Observation, alone: Code, vouched: Code) -> None:
    plain = judge_address(seen, pin=EU_PIN, vouched=False)
    answered_for = judge_address(seen, pin=EU_PIN, vouched=True)

    # where several things are wrong, that which nobody can vouch for is told
    assert plain.compliant is (alone in COMPLIANT)
    assert plain.code is alone
    assert answered_for.code is vouched
    assert judge_address(seen, pin=NO_PIN, vouched=False).code is Code.UNPINNED


# ---- jurisdictions


def test_blocs_are_the_sets_they_are() -> None:
    assert len(EU) == 27 and len(EEA) == 30
    assert {"IS", "LI", "NO"} == EEA - EU
    assert not {"UK", "CH", "GB", "TR"} & EEA
    assert countries(["EEA", "CH"]) == EEA | {"CH"}
    with pytest.raises(KeyError):
        countries(["GB"])


@pytest.mark.parametrize(
    "text, remedy",
    [("GB", "UK"), ("eu", "EU"), ("Eea", "EEA"), ("USA", "US"), ("EL", "GR"), ("XX", "such as CH"),
     ("", "such as CH"), ("EU ", "EU"), ("EU, CH", "such as CH")],
)  # fmt: skip
def test_a_jurisdiction_has_one_spelling(text: str, remedy: str) -> None:
    with pytest.raises(Unfit) as refused:
        jurisdiction(text)
    assert remedy in refused.value.remedy


@given(st.sets(st.sampled_from(sorted(CODES - {"EU", "EEA"}))))
def test_names_of_sets_stand_for_the_very_set(found: set[str]) -> None:
    assert countries(named(found).split(", ")) == found if found else named(found) == ""
    assert countries(named(found | EU).split(", ")) == found | EU
    assert countries(named(found | EEA).split(", ")) == found | EEA


# ---- all of it


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([row[0] for row in ROWS]),
    st.sampled_from([DE, UK, None, Declared("eu", "EEA, CH", "")]),
    st.sets(st.sampled_from(["EU", "EEA", "CH", "UK", "US", "DE"]), min_size=1),
    st.sampled_from(["EU", "EEA", "CH", "UK", "US", "DE"]),
)
def test_a_wider_pin_never_refuses_what_a_narrower_one_lets_be(
    placement: Placement, declared: Declared | None, codes: set[str], more: str
) -> None:
    narrow = judge_endpoint(placement, declared=declared, pin=Pin(tuple(sorted(codes))), name="x")
    wide = judge_endpoint(placement, declared=declared, pin=Pin(tuple(sorted(codes | {more}))), name="x")

    assert wide.compliant or not narrow.compliant


def test_a_broken_registry_refuses_everything_under_a_pin() -> None:
    broken = Registry(catalogue=CATALOGUE, broken="acme.yaml:1: it is torn")
    endpoint = Endpoint.of("https://bedrock-runtime.eu-central-1.amazonaws.com")

    assert broken.judge_endpoint(endpoint, declared=None, pin=EU_PIN).code is Code.BROKEN
    assert broken.judge_name("localhost", pin=EU_PIN).code is Code.BROKEN
    assert broken.judge_address(HERE, pin=EU_PIN, vouched=True)[0].code is Code.BROKEN
    assert broken.judge_endpoint(endpoint, declared=None, pin=NO_PIN).code is Code.UNPINNED
    assert broken.digest != Registry(catalogue=CATALOGUE).digest
