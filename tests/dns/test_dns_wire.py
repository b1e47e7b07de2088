"""The wire: everything a stranger can send gives a value, and what we send reads back elsewhere.

dnslib is the independent second reader here: `wire` reads with a cursor of its own.
"""

from __future__ import annotations

import itertools
import random
import struct
from ipaddress import ip_address
from pathlib import Path

import dnslib
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from egressd.dns import replies, wire
from egressd.dns.replies import Extended, Rcode, Reply, Type

HEADER = struct.Struct("!6H")


def question(name: str, qtype: str = "A", *, edns: int | None = 1232, number: int = 4711) -> bytes:
    record = dnslib.DNSRecord.question(name, qtype)
    record.header.id = number
    if edns is not None:
        record.add_ar(dnslib.EDNS0(udp_len=edns))
    return bytes(record.pack())


def asked(name: str = "Api.Example.COM", qtype: str = "A", *, edns: int | None = 1232) -> wire.Query:
    query = wire.read_query(question(name, qtype, edns=edns))
    assert isinstance(query, wire.Query)
    return query


def read(data: bytes) -> dnslib.DNSRecord:
    return dnslib.DNSRecord.parse(data)


def extended(record: dnslib.DNSRecord) -> tuple[int, str] | None:
    for rr in record.ar:
        for option in rr.rdata if rr.rtype == Type.OPT else ():
            if option.code == 15:
                return int.from_bytes(option.data[:2], "big"), option.data[2:].decode()
    return None


# ---- queries


def test_a_query_is_read_whole() -> None:
    query = asked()
    assert (query.id, query.name, query.labels) == (4711, "api.example.com", (b"Api", b"Example", b"COM"))
    assert (query.qtype, query.qclass, query.recursion) == (Type.A, 1, True)
    assert query.edns == wire.Edns(size=1232, version=0, dnssec_ok=False)
    assert asked(edns=None).edns is None


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ((b"api", b"example", b"com"), "api.example.com"),
        ((b"api.example", b"com"), r"api\046example.com"),  # a dot inside a label is not a separator
        ((b"api\0", b"com"), r"api\000.com"),
        ((b"API", b"Com"), "api.com"),
        ((b"\xc3\xa4", b"com"), r"\195\164.com"),
        ((b"*", b"com"), r"\042.com"),
        ((b"a\\046b",), r"a\092046b"),
        ((), ""),
    ],
)
def test_only_plain_labels_can_equal_a_listed_name(labels: wire.Labels, name: str) -> None:
    assert wire.canonical(labels) == name


@given(
    st.lists(st.binary(min_size=1, max_size=63), max_size=6),
    st.lists(st.binary(min_size=1, max_size=63), max_size=6),
)
@settings(max_examples=200)
def test_two_names_are_one_only_if_their_labels_are(one: list[bytes], other: list[bytes]) -> None:
    same = [x.lower() for x in one] == [x.lower() for x in other]
    assert (wire.canonical(tuple(one)) == wire.canonical(tuple(other))) == same


def header(
    *, number: int = 7, flags: int = 0x0100, counts: tuple[int, int, int, int] = (1, 0, 0, 0)
) -> bytes:
    return HEADER.pack(number, flags, *counts)


NAME = b"\x01a\x00"
ASK = NAME + struct.pack("!HH", 1, 1)
OPT = b"\x00" + struct.pack("!HHIH", 41, 1232, 0, 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", None),
        (b"\x00" * 11, None),
        (header(flags=0x8100) + ASK, None),  # a response: silence
        (header() + ASK, "query"),
        (header() + ASK + b"\x00", Rcode.FORMERR),  # something behind it
        (header() + ASK[:-1], Rcode.FORMERR),
        (header(counts=(0, 0, 0, 0)), Rcode.FORMERR),
        (header(counts=(2, 0, 0, 0)) + ASK + ASK, Rcode.FORMERR),
        (header(counts=(1, 1, 0, 0)) + ASK + OPT, Rcode.FORMERR),
        (header(counts=(1, 0, 1, 0)) + ASK + OPT, Rcode.FORMERR),
        (header(counts=(1, 0, 0, 1)) + ASK + OPT, "query"),
        (header(counts=(1, 0, 0, 2)) + ASK + OPT + OPT, Rcode.FORMERR),  # two OPT: RFC 6891 section 6.1.1
        (header(counts=(1, 0, 0, 3)) + ASK + OPT * 3, Rcode.FORMERR),
        (header(counts=(1, 0, 0, 1)) + ASK + b"\x01x" + OPT, Rcode.FORMERR),  # OPT not at the root
        (header(counts=(1, 0, 0, 1)) + ASK + OPT[:-2] + b"\x00\x05ab", Rcode.FORMERR),
        (header(counts=(1, 0, 0, 1)) + ASK + OPT[:-2] + b"\x00\x05\x00\x08\x00\x09x", Rcode.FORMERR),
        (header() + b"\xc0\x0c" + ASK[3:], Rcode.FORMERR),  # a pointer to itself
        (header() + b"\x40" + b"a" * 64 + ASK[2:], Rcode.FORMERR),  # a label of 64
        (header() + (b"\x3f" + b"a" * 63) * 4 + ASK[2:], Rcode.FORMERR),  # a name of 257
        (header(flags=0x2900) + ASK, Rcode.NOTIMP),  # UPDATE
        (header(flags=0x7900) + ASK, Rcode.NOTIMP),
        (header(flags=0x2000), Rcode.NOTIMP),  # NOTIFY, and nothing else
    ],
)
def test_what_arrives_is_a_query_an_error_or_silence(data: bytes, expected: object) -> None:
    found = wire.read_query(data)
    match expected:
        case None:
            assert found is None
        case "query":
            assert isinstance(found, wire.Query)
        case code:
            assert isinstance(found, wire.Malformed)
            assert found.rcode == code
            back = read(wire.malformed(found))
            assert (back.header.id, back.header.rcode, back.header.qr) == (found.id, code, 1)


def test_a_name_of_255_bytes_is_the_longest() -> None:
    longest = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"a" * 61 + b"\x00"
    assert len(longest) == 255
    query = wire.read_query(header() + longest + ASK[3:])
    assert isinstance(query, wire.Query)
    read(wire.encode(query, replies.blocked("x"), udp=True))
    longer = (b"\x3f" + b"a" * 63) * 3 + b"\x3e" + b"a" * 62 + b"\x00"
    assert isinstance(wire.read_query(header() + longer + ASK[3:]), wire.Malformed)


@given(st.binary(max_size=600))
@example(header(counts=(1, 0, 0, 1)) + ASK + OPT)
@settings(max_examples=200)
def test_any_bytes_give_a_query_an_error_or_silence(data: bytes) -> None:
    found = wire.read_query(data)
    if isinstance(found, wire.Malformed):
        assert len(wire.malformed(found)) == 12
    elif found is not None:
        read(wire.encode(found, replies.blocked(found.name), udp=True))
    response = wire.read_response(data)
    assert response is None or isinstance(response, wire.Response)


@given(st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_damaged_messages_are_no_worse(chance: random.Random) -> None:
    """Random bytes seldom pass the header; real messages with a few bytes changed do."""
    whole = bytearray(
        upstream(
            "www.example.com",
            [("www.example.com", "CNAME", "a.example.net"), ("a.example.net", "A", "192.0.2.1")],
        )
    )
    for _ in range(chance.randint(1, 6)):
        whole[chance.randrange(2, len(whole))] = chance.randrange(256)
    wire.read_response(bytes(whole))
    whole[2] &= 0x7F
    wire.read_query(bytes(whole))


# ---- answers


@pytest.mark.parametrize("qtype", ["A", "AAAA"])
@pytest.mark.parametrize("udp", [True, False])
def test_addresses_under_the_askers_spelling(qtype: str, udp: bool) -> None:
    found = tuple(
        map(ip_address, ["198.18.0.4", "198.18.0.5"] if qtype == "A" else ["fd53:e9::4", "fd53:e9::5"])
    )
    query = asked("aPi.eXample.com", qtype)
    answer = read(wire.encode(query, replies.addresses(found), udp=udp))
    assert answer.header.id == query.id
    assert (answer.header.qr, answer.header.ra, answer.header.aa, answer.header.rd) == (1, 1, 0, 1)
    assert [ip_address(str(rr.rdata)) for rr in answer.rr] == list(found)
    assert {rr.rname.label for rr in answer.rr} == {query.labels} == {answer.q.qname.label}
    assert {rr.ttl for rr in answer.rr} == {replies.ANSWER_TTL}
    assert answer.ar[0].edns_len == wire.UDP_SIZE


def test_a_denial_says_why_to_whoever_sent_edns() -> None:
    reply = replies.blocked("x.example is not on the list of workspace acme")
    answer = read(wire.encode(asked(), reply, udp=True))
    assert answer.header.rcode == Rcode.NXDOMAIN
    assert extended(answer) == (15, "x.example is not on the list of workspace acme")
    assert [(rr.rtype, str(rr.rname), rr.ttl) for rr in answer.auth] == [(6, ".", replies.DENIED_TTL)]
    assert answer.auth[0].rdata.times[4] == replies.DENIED_TTL
    plain = read(wire.encode(asked(edns=None), reply, udp=True))
    assert (plain.header.rcode, plain.ar) == (Rcode.NXDOMAIN, [])


@pytest.mark.parametrize(
    ("reply", "rcode", "code"),
    [
        (replies.failure(Extended.NO_REACHABLE_AUTHORITY, "t"), 2, 22),
        (replies.failure(Extended.NETWORK_ERROR, "t"), 2, 23),
        (replies.failure(Extended.OTHER, "t"), 2, 0),
        (replies.refused("t"), 5, 18),
        (replies.no_data(extended=21, text="t"), 0, 21),
        (replies.no_data(), 0, None),
        (replies.no_name(ttl=30), 3, None),
    ],
)
def test_codes(reply: Reply, rcode: int, code: int | None) -> None:
    answer = read(wire.encode(asked(), reply, udp=True))
    assert answer.header.rcode == rcode
    assert (extended(answer) or (None,))[0] == code
    assert bool(answer.auth) == (rcode in (0, 3))  # negative answers carry an SOA, failures do not


def test_badvers_takes_the_upper_bits() -> None:
    answer = read(wire.encode(asked(), replies.unknown_version(), udp=True))
    assert (answer.header.rcode, answer.ar[0].edns_rcode, answer.ar[0].edns_ver) == (0, 1, 0)


def test_pointers_and_any() -> None:
    answer = read(
        wire.encode(asked("4.0.18.198.in-addr.arpa", "PTR"), replies.pointer("db.example"), udp=True)
    )
    assert str(answer.a.rdata) == "db.example."
    answer = read(wire.encode(asked("db.example", "ANY"), replies.any_type(), udp=True))
    assert (answer.a.rtype, bytes(answer.a.rdata.data)) == (Type.HINFO, b"\x07RFC8482\x00")


@pytest.mark.parametrize(("edns", "limit"), [(None, 512), (100, 512), (512, 512), (900, 900), (4096, 1232)])
def test_too_much_for_udp_is_truncated_and_tcp_has_it_all(edns: int | None, limit: int) -> None:
    many = tuple(ip_address(f"2001:db8::{n:x}") for n in range(60))
    query = asked(edns=edns)
    over_udp = wire.encode(query, replies.addresses(many), udp=True)
    assert len(over_udp) <= limit
    answer = read(over_udp)
    assert (answer.header.tc, answer.rr, answer.q.qname.label) == (1, [], query.labels)
    assert len(read(wire.encode(query, replies.addresses(many), udp=False)).rr) == 60


def test_text_goes_before_the_answer_does() -> None:
    thirteen = tuple(ip_address(f"2001:db8::{n:x}") for n in range(13))
    reply = Reply(addresses=thirteen, extended=3, text="x" * 240)
    answer = read(wire.encode(asked(edns=512), reply, udp=True))
    assert (answer.header.tc, len(answer.rr), extended(answer)) == (0, 13, (3, ""))


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("4.0.18.198.in-addr.arpa", "198.18.0.4"),
        ("256.0.18.198.in-addr.arpa", None),
        ("0.18.198.in-addr.arpa", None),
        ("x.0.18.198.in-addr.arpa", None),
        ("4.0.18.198.9.in-addr.arpa", None),
        ("5." + "0." * 22 + "9.e.0.0.3.5.d.f.ip6.arpa", None),
        ("5." + "0." * 23 + "9.e.0.0.3.5.d.f.ip6.arpa", "fd53:e9::5"),
        ("g." + "0." * 23 + "9.e.0.0.3.5.d.f.ip6.arpa", None),
        ("example.com", None),
    ],
)
def test_reverse_names(name: str, address: str | None) -> None:
    assert wire.reverse_address(name) == (ip_address(address) if address else None)


# ---- by hand and by dnslib

LABELS = st.lists(st.binary(min_size=1, max_size=20), max_size=6)
REPLIES = st.builds(
    Reply,
    rcode=st.sampled_from(Rcode),
    addresses=st.lists(st.ip_addresses(), max_size=5).map(tuple),
    ttl=st.integers(0, 2**31 - 1),
    negative=st.booleans(),
    extended=st.none() | st.integers(0, 49151),
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60),
)


def by_dnslib(query: wire.Query, reply: Reply) -> bytes:
    return wire._pack_any(query, reply, text=reply.text, truncated=False)


@given(
    labels=LABELS,
    reply=REPLIES,
    edns=st.none() | st.builds(wire.Edns, size=st.just(4096), version=st.just(0), dnssec_ok=st.booleans()),
    numbers=st.tuples(*[st.integers(0, 0xFFFF)] * 3),
    flags=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=200)
def test_what_is_written_by_hand_is_what_dnslib_writes(
    labels: list[bytes],
    reply: Reply,
    edns: wire.Edns | None,
    numbers: tuple[int, int, int],
    flags: tuple[bool, bool],
) -> None:
    """Record by record; byte by byte but for the compressed names of the SOA."""
    query = wire.Query(numbers[0], tuple(labels), "", numbers[1], numbers[2], *flags, edns)
    ours = wire._pack_plain(query, reply, reply.text, truncated=False)
    theirs = by_dnslib(query, reply)
    if not reply.negative:
        assert ours == theirs
    elif b"".join(labels).isascii():  # dnslib does not read others, but the message above is written alike
        assert read(ours) == read(theirs)
        assert (ours[:4], ours[6:12]) == (theirs[:4], theirs[6:12])


@pytest.mark.parametrize("edns", [None, 1232])
def test_the_question_is_echoed_byte_for_byte(edns: int | None) -> None:
    data = question("aPi.eXample.COM", edns=edns)
    section = data[12 : 12 + len("aPi.eXample.COM") + 2 + 4]
    for reply in (replies.blocked("no"), replies.pointer("db.example"), replies.addresses(())):
        answer = wire.encode(wire.read_query(data), reply, udp=True)  # type: ignore[arg-type]
        assert answer[12 : 12 + len(section)] == section


def by_cursor(data: bytes) -> wire.Query | wire.Malformed | None:
    """The same without the way for the common form."""
    plain = wire._read_plain
    wire._read_plain = lambda *_: None
    try:
        return wire.read_query(data)
    finally:
        wire._read_plain = plain


@given(
    labels=st.lists(st.binary(min_size=1, max_size=63), max_size=6),
    flags=st.integers(0, 0x7FFF),
    edns=st.none() | st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF_FFFF)),
    damage=st.none() | st.tuples(st.integers(0, 400), st.integers(0, 255)),
    cut=st.integers(0, 12),
)
@settings(max_examples=200)
def test_the_fast_way_of_reading_finds_what_the_cursor_finds(
    labels: list[bytes],
    flags: int,
    edns: tuple[int, int] | None,
    damage: tuple[int, int] | None,
    cut: int,
) -> None:
    name = b"".join(bytes((len(label),)) + label for label in labels) + b"\x00"
    data = bytearray(header(flags=flags & 0x87FF, counts=(1, 0, 0, int(edns is not None))) + name + ASK[3:])
    if edns is not None:
        data += b"\x00" + struct.pack("!HHIH", 41, *edns, 0)
    if damage is not None:
        data[damage[0] % len(data)] = damage[1]
    for message in (bytes(data), bytes(data[: len(data) - cut])):
        assert wire.read_query(message) == by_cursor(message)


def corpus() -> list[tuple[str, bytes, str]]:
    """(what becomes of it, the message, what it is)."""
    lines = (Path(__file__).parent / "corpus" / "queries.txt").read_text().splitlines()
    found = (line.split(maxsplit=2) for line in lines if not line.startswith("#"))
    return [(verdict, bytes.fromhex(digits.strip("-")), what) for verdict, digits, what in found]


@pytest.mark.parametrize(("verdict", "data"), [pytest.param(v, d, id=what) for v, d, what in corpus()])
def test_the_corpus(verdict: str, data: bytes) -> None:
    found = wire.read_query(data)
    assert found == by_cursor(data)
    match found:
        case None:
            assert verdict == "silence"
        case wire.Malformed():
            assert verdict == found.rcode.name
            assert wire.malformed(found)[:2] == data[:2]
        case _:
            assert verdict == "answer"
            answer = wire.encode(found, replies.blocked("no"), udp=True)
            assert (answer[:2], answer[12 : 12 + len(found.echo)]) == (data[:2], found.echo)
            assert data[12:].startswith(found.echo)


# ---- upstream


def upstream(
    name: str,
    records: list[tuple[str, str, str]],
    *,
    qtype: str = "A",
    ttl: int = 300,
    rcode: int = 0,
    soa: tuple[int, int] | None = None,
    tc: bool = False,
) -> bytes:
    answer = dnslib.DNSRecord.question(name, qtype).reply()
    answer.header.id, answer.header.rcode, answer.header.tc = 99, rcode, int(tc)
    for owner, kind, data in records:
        answer.add_answer(*dnslib.RR.fromZone(f"{owner} {ttl} {kind} {data}"))
    if soa is not None:
        answer.add_auth(
            *dnslib.RR.fromZone(f"example.com {soa[0]} SOA ns.example.com h.example.com 1 2 3 4 {soa[1]}")
        )
    return bytes(answer.pack())


def test_our_question_carries_nothing_but_the_name() -> None:
    data = wire.query(id=0xBEEF, labels=(b"WWW", b"Example", b"com"), qtype=Type.AAAA)
    back = read(data)
    assert (back.header.id, back.header.rd, back.q.qtype) == (0xBEEF, 1, 28)
    assert back.q.qname.label == (b"www", b"example", b"com")
    assert [(rr.rtype, rr.edns_len, rr.rdata) for rr in back.ar] == [(41, 1232, [])]


def answer_of(data: bytes) -> wire.Answer | None:
    response = wire.read_response(data)
    assert response is not None
    assert (response.id, response.qclass) == (99, 1)
    return response.answer


def test_addresses_with_the_least_ttl_of_the_chain() -> None:
    data = upstream(
        "www.example.com",
        [
            ("a.example.net", "A", "192.0.2.1"),
            ("WWW.example.com", "CNAME", "A.example.net"),
            ("a.example.net", "A", "192.0.2.2"),
        ],
    )
    assert answer_of(data) == wire.Answer(0, (ip_address("192.0.2.1"), ip_address("192.0.2.2")), 300)


def chain(length: int) -> list[tuple[str, str, str]]:
    names = ["www.example.com", *(f"c{n}.example.net" for n in range(length))]
    return [(a, "CNAME", b) for a, b in itertools.pairwise(names)] + [(names[-1], "A", "192.0.2.9")]


def test_a_chain_is_followed_to_a_bound() -> None:
    assert answer_of(upstream("www.example.com", chain(8))) == wire.Answer(0, (ip_address("192.0.2.9"),), 300)
    assert answer_of(upstream("www.example.com", chain(9))) is None
    loop = [("www.example.com", "CNAME", "b.example.com"), ("b.example.com", "CNAME", "www.example.com")]
    assert answer_of(upstream("www.example.com", loop)) is None


def test_records_beside_the_chain_are_not_the_answer() -> None:
    stranger = [("evil.example.com", "A", "192.0.2.66"), ("www.example.com", "AAAA", "2001:db8::1")]
    assert answer_of(upstream("www.example.com", stranger)) == wire.Answer(0, (), 30)


@pytest.mark.parametrize(
    ("rcode", "soa", "ttl"),
    [(3, (900, 60), 60), (3, (20, 60), 20), (0, (900, 60), 60), (0, None, 30), (3, None, 30)],
)
def test_negative_answers_take_their_ttl_from_the_soa(
    rcode: int, soa: tuple[int, int] | None, ttl: int
) -> None:
    assert answer_of(upstream("no.example.com", [], rcode=rcode, soa=soa)) == wire.Answer(rcode, (), ttl)


def test_truncated_has_no_answer() -> None:
    response = wire.read_response(
        upstream("www.example.com", [("www.example.com", "A", "192.0.2.1")], tc=True)
    )
    assert response is not None
    assert (response.truncated, response.answer) == (True, None)


def test_upstreams_own_reason_is_read() -> None:
    answer = dnslib.DNSRecord.question("www.example.com").reply()
    answer.header.id, answer.header.rcode = 99, 2
    answer.add_ar(dnslib.EDNS0(udp_len=1232, opts=[dnslib.EDNSOption(15, b"\x00\x06bogus")]))
    assert answer_of(bytes(answer.pack())) == wire.Answer(2, (), 30, 6)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        question("www.example.com"),  # not a response
        header(flags=0x8180, counts=(0, 0, 0, 0)),
        header(flags=0x8180) + NAME,
    ],
)
def test_not_a_response(data: bytes) -> None:
    assert wire.read_response(data) is None


def test_an_address_of_the_wrong_length_spoils_the_answer() -> None:
    data = header(number=99, flags=0x8180, counts=(1, 1, 0, 0)) + ASK
    data += NAME + struct.pack("!HHIH", 1, 1, 60, 3) + b"abc"
    assert answer_of(data) is None


def test_pointers_must_lead_back() -> None:
    # A at 19: label, then a pointer into its own label, which points at the label again.
    data = header(number=99, flags=0x8180, counts=(1, 1, 0, 0)) + ASK
    at = len(data)
    data += b"\x02" + struct.pack("!H", 0xC000 | at) + struct.pack("!H", 0xC000 | at + 1)
    data += struct.pack("!HHIH", 1, 1, 60, 4) + b"abcd"
    assert answer_of(data) is None


def test_two_pointers_at_each_other_end_too() -> None:
    data = header(number=99, flags=0x8180, counts=(1, 2, 0, 0)) + ASK
    at = len(data) + 1 + 10  # where the data of the first record will lie
    both = struct.pack("!HH", 0xC000 | at + 2, 0xC000 | at)
    data += b"\x00" + struct.pack("!HHIH", 16, 1, 60, len(both)) + both
    data += struct.pack("!H", 0xC000 | at + 2) + struct.pack("!HHIH", 1, 1, 60, 4) + b"abcd"
    assert answer_of(data) is None


def test_type_names() -> None:
    assert [wire.type_name(n) for n in (1, 28, 65, 65280)] == ["A", "AAAA", "HTTPS", "TYPE65280"]
