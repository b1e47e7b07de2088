"""The codes a `residency` section may name: EU and EEA as blocs, UK, and ISO 3166-1 alpha-2 countries."""

from __future__ import annotations

import difflib

from egressd.model.errors import Unfit
from egressd.model.names import quoted

__all__ = ["CODES", "jurisdiction"]

_COUNTRIES = """
AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY
BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK
FM FO FR GA GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS
IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML
MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN
PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG
TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW
"""
CODES = frozenset({"EU", "EEA", "UK", *_COUNTRIES.split()})
_OTHERWISE_SPELT = {"GB": "UK", "EL": "GR", "USA": "US"}  # one spelling each, so that sets compare


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
