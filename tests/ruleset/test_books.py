"""The books balance to the byte, or say where they do not."""

from __future__ import annotations

import msgspec

from egressd.ruleset.books import Books, books, contradictions, equations
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
    return books(equations(counts, given.pop("retired"), given.pop("ended"), **given))  # type: ignore[arg-type]


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


def in_motion(first: Counters, second: Counters) -> Books:
    readings = [equations(each, NONE, {}, workspace_of={"eg1": "acme"}) for each in (first, second)]
    return contradictions(*readings)


def read_at(*, in_: int, ok: int, listed: int) -> Counters:
    """One reading: packets of 100 bytes, each counter read at its own moment."""
    counts = LinkCounts(in_=Tally(in_, in_ * 100), ok=Tally(ok, ok * 100))
    return count(links={"eg1": counts}, elements=(element(listed, listed * 100),))


def test_a_reading_under_traffic_is_not_exact_and_not_wrong() -> None:
    first, second = read_at(in_=10, ok=12, listed=15), read_at(in_=20, ok=22, listed=25)
    assert not check(first).balanced and not check(second).balanced
    assert in_motion(first, second).balanced


def test_what_cannot_have_been_equal_is_wrong_whatever_flowed() -> None:
    first, second = read_at(in_=10, ok=12, listed=100), read_at(in_=20, ok=22, listed=125)
    found = in_motion(first, second)
    assert [each.what for each in found.differences] == ["acme: ok = elements + unlisted + retired"]
    missing = in_motion(read_at(in_=50, ok=12, listed=12), read_at(in_=60, ok=22, listed=22))
    assert [each.what for each in missing.differences] == ["eg1: in = ok + denied + other"]


def test_while_nothing_flows_two_readings_are_as_strict_as_one() -> None:
    still = read_at(in_=10, ok=10, listed=10)
    assert in_motion(still, still).balanced
    assert not in_motion(read_at(in_=10, ok=10, listed=9), read_at(in_=10, ok=10, listed=9)).balanced


def test_a_link_that_came_or_went_between_readings_is_not_judged() -> None:
    assert in_motion(FAIR, count(denied=FAIR.denied, elements=FAIR.elements)).equations == 2
