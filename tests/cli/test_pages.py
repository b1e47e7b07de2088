"""The pages a person reads, whole. What changes here changes in front of operators."""

from __future__ import annotations

import io
from typing import Any

from documents import COUNTERS, DIFF, STATUS, WHY, changed

from egressd.cli import counters, policy_changes, status, why
from egressd.cli.text import Paint

PLAIN = Paint(io.StringIO(), no_color=True)

STATUS_PAGE = """\
egressd 0.1.0: enforcing, books balance
since 2026-09-21 14:13:20Z (2 h 00 min), gateway egressd
ruleset: as compiled, read back 2 h 00 min ago
journal: 4711 records, last checkpoint 2 h 00 min ago at 4700, none lost

process   pid  state    restarts
warden    812  running         0
resolver  813  running         3

workspace  guard    sandboxes   names  policy               problem
acme       enforce          1  2/1024  sha256:ababababa...  -
lab        off              0       -  sha256:cdcdcdcdc...  -

sandbox  workspace   uid   pid         age  IPv4        IPv6       command
eg7      acme       4001  9120  1 h 00 min  198.19.0.7  fd53:1::7  python3 infer.py"""

COUNTERS_PAGE = """\
read 2026-09-21 14:13:20Z

acme  guard enforce

  host                  ports          packets out         bytes out  packets in           bytes in  connections
  eu.api.openai.com     443/tcp                  7  48201 (47.1 KiB)           9  3500000 (3.3 MiB)            1
  *.search.example.com  443/tcp                  0                 0           0                  0            0
  (resolver)            53/udp 53/tcp            4               244           4                512            4

  denied    packets           bytes
  unlisted       29  1745 (1.7 KiB)
  shape           2  6100 (6.0 KiB)

  link     packets: in = admitted + denied + other  bytes: in = admitted + denied + other
  eg7      40 = 9 + 29 + 2                          56068 = 48323 + 7667 + 78
  2 ended  4 = 2 + 2 + 0                            300 = 122 + 178 + 0

  the books balance
    packets  in 44 = admitted 11 + denied 31 + other 2;  admitted 11 = hosts 11
    bytes    in 56368 = admitted 48445 + denied 7845 + other 78;  admitted 48445 = hosts 48445

admitted, then lost  packets  bytes
invalid                    3    180"""  # noqa: E501 - as wide as it is

WHY_PAGE = """\
tracker.example: denied in workspace acme
  name: the name is not on the workspace's list
  nearest rule: host api.example (line 4)"""

DIFF_PAGE = """\
acme: + host db.internal.example 5432/tcp  (gives more)
acme: - host old.example 443/tcp
2 changes, nothing applied"""


def test_status() -> None:
    assert status.render(STATUS, paint=PLAIN, now=1_790_000_000 + 7200) == STATUS_PAGE


PINNED = {
    "jurisdictions": ["CH", "EEA"], "barred": 2, "addresses_refused": 3, "registry": "sha256:" + "ef" * 32,
    "tables": ["aws@sha256:11", "azure@sha256:22"], "stale": ["azure"], "broken": None,
}  # fmt: skip
RESIDENCY_PAGE = """\
workspace  residency  rules barred  addresses refused  registry             tables
acme       CH, EEA               2                  3  sha256:efefefefe...  aws, azure (STALE)
"""


def test_a_pin_shows_what_it_rests_on_and_what_of_that_is_old() -> None:
    document = changed(STATUS)
    document["workspaces"][0]["residency"] = PINNED
    page = status.render(document, paint=PLAIN, now=1_790_000_000)
    assert RESIDENCY_PAGE in page
    document["workspaces"][0]["residency"] = {**PINNED, "broken": "aws.json: it is no table of prefixes"}
    assert "BROKEN: aws.json: it is no table" in status.render(document, paint=PLAIN, now=1_790_000_000)


def test_counters() -> None:
    assert counters.render(COUNTERS, paint=PLAIN) == COUNTERS_PAGE


WILDCARD_PAGE = """\
  host                      ports    packets out         bytes out  packets in           bytes in  connections  bytes upstream
  eu.api.openai.com         443/tcp            7  48201 (47.1 KiB)           9  3500000 (3.3 MiB)            1               -
  *.search.example.com      443/tcp            3               180           0                  0            0               -
    one.search.example.com  443/tcp            5               900           4     2000 (2.0 KiB)            1             520
  (resolver)                53/udp             4               244           4                512            4               -
"""  # noqa: E501 - as wide as it is
REFUSED_PAGE = """\
  questions refused by the resolver  count
  budget-names                           3
  name                                   2

  connections refused by the inspector  count
  ech                                       1
  sni-other                                 4
"""


def test_names_of_a_wildcard_stand_below_it_and_refusals_have_their_reasons() -> None:
    document = changed(COUNTERS)
    (acme,) = document["workspaces"]
    host, pattern, resolver = acme["hosts"]
    granted = {**host, "host": "one.search.example.com", "kind": "granted", "out": [5, 900], "in": [4, 2000]}
    acme["hosts"] = [
        host,
        {**pattern, "out": [3, 180]},
        {**granted, "dialled": [4, 520]},
        {**resolver, "ports": ["53/udp"]},
    ]
    acme["names_refused_by"] = {"name": 2, "budget-names": 3, "budget-rate": 0}
    acme["flows_refused"] = {"sni-other": 4, "ech": 1}
    page = counters.render(document, paint=PLAIN)
    assert WILDCARD_PAGE in page and REFUSED_PAGE in page
    assert "budget-rate" not in page


def test_why() -> None:
    assert why.render(WHY, paint=PLAIN) == WHY_PAGE


def test_diff() -> None:
    assert policy_changes.render(DIFF, paint=PLAIN) == DIFF_PAGE


def test_an_equation_that_does_not_hold_is_not_written_with_an_equals_sign() -> None:
    document: dict[str, Any] = changed(COUNTERS, balanced=False)
    balance = document["workspaces"][0]["balance"]
    balance |= {"balanced": False, "in": [45, 56428], "difference": [1, 60]}
    page = counters.render(document, paint=PLAIN).splitlines()
    assert "  THE BOOKS DO NOT BALANCE" in page
    assert "    packets  in 45 != admitted 11 + denied 31 + other 2;  admitted 11 = hosts 11" in page
    assert "    difference 1 packets, 60 bytes" in page


def test_a_link_that_does_not_add_up_shows_it() -> None:
    document = changed(COUNTERS)
    document["workspaces"][0]["links"][0]["denied"] = [28, 7667]
    assert "  eg7      40 != 9 + 28 + 2" in counters.render(document, paint=PLAIN)


def test_nothing_yet() -> None:
    document = changed(COUNTERS, workspaces=[], late={})
    assert counters.render(document, paint=PLAIN) == "read 2026-09-21 14:13:20Z\n\nno workspaces to show"


def test_a_narrow_terminal_gets_paragraphs_that_lose_nothing() -> None:
    narrow = Paint(io.StringIO(), no_color=True, columns=60)
    page = counters.render(COUNTERS, paint=narrow)
    table = page.split("\n\n")[2].splitlines()
    assert table[-3:] == [
        "  host (resolver)",
        "    ports 53/udp 53/tcp, packets out 4, bytes out 244,",
        "    packets in 4, bytes in 512, connections 4",
    ]
    assert table[0] == "  host eu.api.openai.com"
    assert all(len(line) <= 60 for line in table)
    assert counters.render(COUNTERS, paint=Paint(io.StringIO(), no_color=True, columns=200)) == COUNTERS_PAGE
    sandbox = status.render(STATUS, paint=narrow, now=1_790_000_000 + 7200).split("\n\n")[3]
    assert sandbox.splitlines() == [
        "sandbox eg7",
        "  workspace acme, uid 4001, pid 9120, age 1 h 00 min,",
        "  IPv4 198.19.0.7, IPv6 fd53:1::7, command python3 infer.py",
    ]


def hostile(document: Any) -> Any:
    """Every string of a document with something in it that a terminal would act on."""
    if isinstance(document, dict):
        return {key: hostile(value) for key, value in document.items()}
    if isinstance(document, list):
        return [hostile(value) for value in document]
    return document + "\x1b[2J\n\u202e" if isinstance(document, str) else document


def test_no_page_passes_on_what_a_terminal_would_act_on() -> None:
    pages = (
        status.render(hostile(STATUS), paint=PLAIN, now=1_790_000_000),
        counters.render(hostile(COUNTERS), paint=PLAIN),
        why.render(hostile(WHY), paint=PLAIN),
        policy_changes.render(hostile(DIFF), paint=PLAIN),
    )
    for page in pages:
        assert r"\x1b[2J\x0a" in page
        assert all(line.isprintable() for line in page.split("\n"))
    assert pages[3].count("\n") == DIFF_PAGE.count("\n")  # no line was faked
