"""Answers from memory: the same bytes, counted as exactly, bounded, and each workspace for itself."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.dns.hot import SLOT, Cache, Denial, Lane, shed, sweep

ONE, TWO, SIX = b"\xc6\x13\x00\x01", b"\xc6\x13\x00\x02", bytes(15) + b"\x01"


def lane(cache: Cache, source: bytes = ONE, *, link: int = 1, workspace: str = "acme") -> Lane:
    return cache.lane(source, link=link, workspace=workspace)


def denial(name: str = "evil.example") -> Denial:
    return Denial(b"no, " + name.encode(), name, "A", "name")


def counted(cache: Cache) -> Counter[tuple[int, str, str]]:
    found: Counter[tuple[int, str, str]] = Counter()
    for folded in cache.fold():
        name = folded.denial.name if folded.denial else "(dropped)"
        found[folded.link, folded.workspace, name] += folded.count
    return found


def swept(cache: Cache, *asked: tuple[bytes, bytes]) -> tuple[list[bytes], list[int]]:
    """Each (message, source) put through `sweep`: the answers by place, and who is left."""
    batch = b"".join(message[:SLOT].ljust(SLOT, b"\0") for message, _ in asked)
    out, lengths = bytearray(batch), memoryview(bytearray(8 * len(asked))).cast("L")
    senders = [(len(message), source) for message, source in asked]
    others = sweep(batch, senders, cache.lanes, out=out, lengths=lengths)
    assert len(out) == len(batch)
    found = [bytes(out[SLOT * n : SLOT * n + lengths[n]]) for n in range(len(asked)) if n not in others]
    return found, others


def test_what_was_answered_is_answered_again_under_the_new_id() -> None:
    cache = Cache()
    lane(cache).keep(b"question", b"answer")
    assert swept(cache, (b"\x12\x34question", ONE), (b"\xab\xcdquestion", ONE)) == (
        [b"\x12\x34answer", b"\xab\xcdanswer"],
        [],
    )
    assert lane(cache).answer(b"question") == b"answer"
    assert cache.fold() == []  # an answer is no denial


def test_a_byte_more_or_less_another_spelling_or_another_source_is_another_question() -> None:
    cache = Cache()
    lane(cache).keep(b"question", b"answer")
    asked = [(b"..questio", ONE), (b"..question!", ONE), (b"..Question", ONE), (b"..question", TWO)]
    assert swept(cache, *asked) == ([], [0, 1, 2, 3])


@pytest.mark.parametrize("size", [0, 1, 2, SLOT, SLOT + 1, 4096])
def test_no_length_is_out_of_bounds(size: int) -> None:
    cache = Cache()
    lane(cache).keep(b"question", b"answer")
    for first in (True, False):
        asked = [(bytes(size), ONE), (b"..question", ONE)]
        found, others = swept(cache, *(asked if first else asked[::-1]))
        assert (found, others) == ([b"..answer"], [0 if first else 1])


def test_denials_from_memory_are_counted_for_the_link_that_asked() -> None:
    cache = Cache()
    lane(cache).keep_denial(b"evil", denial())
    lane(cache, TWO, link=2)
    found, others = swept(cache, *[(b"..evil", ONE)] * 5, *[(b"..evil", TWO)] * 3)
    assert (set(found), others) == ({b"..no, evil.example"}, [])
    assert lane(cache).answer(b"evil") is not None
    assert counted(cache) == {(1, "acme", "evil.example"): 6, (2, "acme", "evil.example"): 3}
    assert counted(cache) == {}


def test_what_is_counted_survives_that_lists_and_sources_change() -> None:
    cache = Cache()
    lane(cache).keep_denial(b"evil", denial())
    swept(cache, (b"..evil", ONE))
    cache.unbind()
    assert swept(cache, (b"..evil", ONE)) == ([], [0])
    cache.forget()
    assert lane(cache).answer(b"evil") is None
    assert counted(cache) == {(1, "acme", "evil.example"): 1}


def test_void_takes_answers_and_leaves_denials_and_the_neighbours() -> None:
    cache = Cache()
    lane(cache).keep(b"question", b"answer")
    lane(cache).keep_denial(b"evil", denial())
    lane(cache, TWO, link=2, workspace="other").keep(b"question", b"theirs")
    cache.void("acme")
    assert lane(cache).answer(b"question") is None
    assert lane(cache).answer(b"evil") is not None
    assert lane(cache, TWO, link=2, workspace="other").answer(b"question") == b"theirs"


def test_a_source_that_belongs_to_another_link_now_has_another_lane() -> None:
    cache = Cache()
    lane(cache).keep(b"question", b"answer")
    assert lane(cache, link=7, workspace="other").answer(b"question") is None
    assert swept(cache, (b"..question", ONE)) == ([], [0])
    assert lane(cache, SIX, link=1).answer(b"question") == b"answer"


def test_fresh_names_without_end_cost_their_own_workspace_alone_and_no_memory() -> None:
    cache = Cache()
    lane(cache, TWO, link=2, workspace="other").keep_denial(b"quiet", denial("quiet"))
    lane(cache, TWO, link=2, workspace="other").keep(b"good", b"answer")
    flooder = lane(cache)
    flooder.keep(b"good", b"answer")
    for number in range(20_000):
        flooder.keep_denial(b"%d" % number, denial())
        flooder.keep(b"spelt %d" % number, b"answer")
        assert len(flooder.denials) <= 2048 and len(flooder.answers) <= 4096
    quiet = lane(cache, TWO, link=2, workspace="other")
    assert quiet.answer(b"quiet") and quiet.answer(b"good")


def test_what_is_too_long_for_its_place_is_not_kept() -> None:
    cache = Cache()
    lane(cache).keep(b"q", bytes(SLOT - 1))
    lane(cache).keep(bytes(321), b"a")
    lane(cache).keep_denial(b"d", Denial(bytes(SLOT - 1), "x", "A", "name"))
    assert (lane(cache).answers, lane(cache).denials) == ({}, {})


def test_shares_leave_out_the_greedy_only() -> None:
    shares: dict[bytes, int] = {}
    senders = [(40, ONE)] * 5 + [(40, TWO)] * 2
    assert shed(senders, shares, 3) == ([(40, ONE)] * 3 + [(0, ONE)] * 2 + [(40, TWO)] * 2, {ONE: 2})
    assert shed(senders, shares, 3) == ([(0, ONE)] * 5 + [(40, TWO)] + [(0, TWO)], {ONE: 5, TWO: 1})


def test_what_nobody_looked_at_is_counted_as_that() -> None:
    cache = Cache()
    lane(cache).drop(5)
    lane(cache).drop(2)
    lane(cache).count(denial())
    assert counted(cache) == {(1, "acme", "(dropped)"): 7, (1, "acme", "evil.example"): 1}


@given(
    st.lists(
        st.tuples(st.sampled_from([b"a", b"bc", b"d", b"x"]), st.sampled_from([ONE, TWO, SIX])), max_size=64
    )
)
@settings(max_examples=100)
def test_a_batch_is_answered_like_one_after_the_other(asked: list[tuple[bytes, bytes]]) -> None:
    def made() -> Cache:
        cache = Cache()
        lane(cache).keep(b"a", b"first")
        lane(cache, TWO, link=2, workspace="other").keep(b"a", b"second")
        lane(cache, TWO, link=2, workspace="other").keep_denial(b"bc", denial("bc"))
        lane(cache).keep_denial(b"d", denial("d"))
        return cache

    batch, single = made(), made()
    found, others = swept(batch, *((b"id" + question, source) for question, source in asked))
    one = [single.lanes[source].answer(q) if source in single.lanes else None for q, source in asked]
    assert found == [b"id" + answer for answer in one if answer is not None]
    assert others == [number for number, answer in enumerate(one) if answer is None]
    assert counted(batch) == counted(single)
