"""The books balance to the byte, or say where they do not."""

from __future__ import annotations

import msgspec

from egressd.ruleset.books import Books, books
from egressd.ruleset.observe import Counters, ElementCount, LinkCounts, Tally, counters

NOTHING = Tally()
NONE: dict[str, Tally] = {}


def element(packets: int, size: int, workspace: str = "acme") -> ElementCount:
    return ElementCount(
        workspace=workspace,
        address="198.18.0.4",
        protocol="tcp",
        port=80,
        mark=0x8000_4001,
        comment="a.test",
        packets=packets,
        bytes=size,
    )


def link(ok: Tally, denied: Tally = NOTHING, other: Tally = NOTHING) -> LinkCounts:
    return LinkCounts(in_=ok + denied + other, ok=ok, denied=denied, other=other)


def count(**fields: object) -> Counters:
    empty = {
        "links": {},
        "denied": {},
        "unlisted": {},
        "elements": (),
        "replies": {},
        "opened": {},
        "late": {},
    }
    return Counters(**{**empty, **fields})  # type: ignore[arg-type]


FAIR = count(
    links={"eg1": link(Tally(5, 500), Tally(2, 80), Tally(1, 28))},
    denied={"acme": {"unlisted": Tally(1, 40), "shape": Tally(1, 40)}},
    elements=(element(3, 300), element(2, 200)),
)


def check(counts: Counters, **fields: object) -> Books:
    given = {"retired": NONE, "ended": {}, "workspace_of": {"eg1": "acme"}, **fields}
    return books(counts, given.pop("retired"), given.pop("ended"), **given)  # type: ignore[arg-type]


def test_fair_books_balance() -> None:
    assert check(FAIR) == Books(balanced=True, differences=(), equations=3)


def test_nothing_checked_is_not_balanced() -> None:
    assert not check(count()).balanced


def test_one_byte_too_few_is_told() -> None:
    short = msgspec.structs.replace(FAIR, elements=(element(3, 299), element(2, 200)))
    [difference] = check(short).differences
    assert difference.what.startswith("acme: ok = elements")
    assert (difference.packets, difference.bytes) == (0, 1)


def test_a_denial_without_a_reason_is_told() -> None:
    [difference] = check(
        msgspec.structs.replace(FAIR, denied={"acme": {"unlisted": Tally(1, 40)}})
    ).differences
    assert (difference.what, difference.packets, difference.bytes) == ("acme: denied = its reasons", 1, 40)


def test_a_link_that_loses_a_packet_is_told() -> None:
    bad = msgspec.structs.replace(FAIR.links["eg1"], in_=Tally(9, 608))
    [difference] = check(msgspec.structs.replace(FAIR, links={"eg1": bad})).differences
    assert (difference.what, difference.packets) == ("eg1: in = ok + denied + other", 1)


def test_what_is_gone_still_counts() -> None:
    after = msgspec.structs.replace(FAIR, elements=(element(3, 300),))
    assert not check(after).balanced
    assert check(after, retired={"acme": Tally(2, 200)}).balanced
    without = msgspec.structs.replace(FAIR, links={})
    assert not check(without).balanced
    assert check(without, ended={"acme": (FAIR.links["eg1"],)}).balanced


def test_what_is_on_no_list_counts_when_the_guard_is_off() -> None:
    counts = msgspec.structs.replace(FAIR, elements=(), unlisted={"acme": Tally(5, 500)})
    assert check(counts).balanced


def test_a_link_of_nobody_is_a_difference() -> None:
    assert not check(FAIR, workspace_of={}).balanced


def test_books_and_counters_travel_as_json() -> None:
    for value in (FAIR, check(FAIR), msgspec.structs.replace(FAIR, replies={7: Tally(1, 2)})):
        assert msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value


def test_a_listing_without_our_tables_counts_nothing() -> None:
    assert counters({"nftables": [{"metainfo": {}}]}) == count()
