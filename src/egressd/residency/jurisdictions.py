"""Jurisdictions: EU and EEA as blocs, UK, and ISO 3166-1 alpha-2 countries, each with one spelling.

A jurisdiction is a set of countries, and nothing else: what is compared is sets. That Switzerland is not in
the EEA, and Great Britain no longer in either, is the point of writing them down.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from egressd.model.errors import Unfit
from egressd.model.names import quoted

__all__ = ["CODES", "EEA", "EU", "codes", "countries", "jurisdiction", "named"]

_COUNTRIES = """
AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY
BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK
FM FO FR GA GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS
IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML
MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN
PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG
TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW
"""
# The member states (Article 52 of the Treaty on European Union; without the United Kingdom since 2020).
_MEMBERS = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK"
EU = frozenset(_MEMBERS.split())
EEA = EU | {"IS", "LI", "NO"}  # Agreement on the European Economic Area
CODES = frozenset({"EU", "EEA", "UK", *_COUNTRIES.split()})
_BLOCS = {"EU": EU, "EEA": EEA}
_OTHERWISE_SPELT = {"GB": "UK", "EL": "GR", "USA": "US"}  # one spelling each, so that sets compare


def countries(codes: Iterable[str]) -> frozenset[str]:
    """The countries of these jurisdictions together. KeyError for what is none of `CODES`."""
    found: set[str] = set()
    for code in codes:
        if code not in CODES:
            raise KeyError(code)
        found |= _BLOCS.get(code, {code})
    return frozenset(found)


def named(found: Iterable[str]) -> str:
    """Countries for a person, whole blocs by their names: "CH, EEA"."""
    there = set(found)
    for whole in ("EEA", "EU"):
        if there >= _BLOCS[whole]:
            return ", ".join(sorted(there - _BLOCS[whole] | {whole}))
    return ", ".join(sorted(there))


def jurisdiction(text: str) -> str:
    """`text` if it is one of `CODES`, else `Unfit`."""
    if text in CODES:
        return text
    upper = text.upper()
    meant = _OTHERWISE_SPELT.get(upper) or (upper if upper in CODES else None)
    if meant is None:
        close = difflib.get_close_matches(upper[:8], sorted(CODES), n=1, cutoff=0.7)
        meant = close[0] if close else None
    remedy = f"did you mean {meant}?" if meant else "use EU, EEA, UK or a country's two letters, such as CH"
    raise Unfit(f"{quoted(text)} is not a jurisdiction", remedy)


def codes(text: str) -> tuple[str, ...]:
    """Of `EU`, `EEA,CH` or `EEA CH`, as somebody types it: each once, in the order said. `Unfit` for what is
    no jurisdiction, and where none is named."""
    words = [word for word in re.split(r"[,/\s]+", text) if word]
    if not words:
        raise Unfit("no jurisdiction is named", "say EU, or EEA,CH")
    return tuple(dict.fromkeys(map(jurisdiction, words)))
