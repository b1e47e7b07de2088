"""What is read from the first bytes of a connection: tables of hellos, then laws for all bytes."""

from __future__ import annotations

import bisect
import struct
import time
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from egressd.model.verdicts import Reason
from egressd.tls.hello import MAX_MESSAGE, MAX_STREAM, HelloReader, More, Named, Objection, Reading, read
from tls.hellos import ECH, NAME, PLAIN, client_hello, extension, hello, message, records, server_name

GREASE = [0x0A0A, 0x1A1A, 0x7A7A, 0xFAFA]
POST_QUANTUM = (
    51,
    b"\x04\xe6\x11\xec\x04\xc0" + bytes(1216) + b"\x00\x1d\x00\x20" + bytes(32),
)  # X25519MLKEM768
EARLY_DATA = b"\x14\x03\x03\x00\x01\x01" + b"\x17\x03\x03\x00\x20" + bytes(32)


def fed(data: bytes, *cuts: int) -> Reading:
    """What a reader says that gets the bytes cut at these places."""
    reader = HelloReader()
    reading: Reading = More()
    for start, end in pairwise((0, *cuts, len(data))):
        reading = reader.feed(data[start:end])
    return reading


def byte_by_byte(data: bytes) -> Reading:
    return fed(data, *range(1, len(data)))


def reason(reading: Reading) -> Reason | None:
    return reading.reason if isinstance(reading, Objection) else None


# ---- hellos that name a server

GOOD = {
    "plain": hello(),
    "TLS 1.2": hello(extensions=[server_name(NAME), *PLAIN[:2]]),
    "TLS 1.0": hello(version=0x0301, extensions=[server_name(NAME)]),
    "TLS 1.1": hello(version=0x0302, record_version=0x0302),
    "record of TLS 1.2": hello(record_version=0x0303),
    "record of SSL 3.0": hello(record_version=0x0300),
    "name first": hello(extensions=[server_name(NAME), *PLAIN]),
    "name last": hello(extensions=[*PLAIN, server_name(NAME)]),
    "name between": hello(extensions=[*PLAIN[:2], server_name(NAME), *PLAIN[2:]]),
    "only a name": hello(extensions=[server_name(NAME)]),
    "no session": hello(session=b""),
    "GREASE everywhere": hello(
        suites=b"".join(struct.pack("!H", g) for g in GREASE) + b"\x13\x01",
        more=[(kind, bytes([n])) for n, kind in enumerate(GREASE)],
    ),
    "unknown extensions": hello(more=[(kind, bytes(kind % 7)) for kind in range(1000, 1100)]),
    "post-quantum, name behind it": hello(extensions=[POST_QUANTUM, server_name(NAME)]),
    "pre_shared_key not last": hello(more=[(41, bytes(60)), (21, bytes(9))]),
    "upper case": hello(NAME.upper()),
    "two records": hello(sizes=[40]),
    "name cut by a record": hello(sizes=[90, 3, 3, 3]),
    "header cut by a record": hello(sizes=[1, 1, 1, 1]),
    "records of a byte": hello(sizes=[1] * 300),
    "a large one": hello(more=[(21, bytes(60_000))], sizes=[16384] * 3),
}


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_a_hello_names_its_server(data: bytes) -> None:
    assert read(data) == Named(NAME, ech=False, length=len(data))


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_what_follows_in_records_of_its_own_is_not_judged(data: bytes) -> None:
    for following in (EARLY_DATA, b"\x00", hello("other.test"), b"GET / HTTP/1.1\r\n"):
        assert read(data + following) == Named(NAME, ech=False, length=len(data))
        assert fed(data + following, 50, len(data) - 1) == Named(NAME, ech=False, length=len(data))


@pytest.mark.parametrize("kind", [ECH, 0xFD00, 0xFFCE, 0xFE08, 0xFE0A, 0xFE0C, 0xFF02], ids=hex)
@pytest.mark.parametrize("content", [b"\x00\x00\x01\x00\x01\x05" + bytes(40), b"\x01", b"", bytes(200)])
def test_what_may_hide_a_name_is_seen_wherever_it_stands(kind: int, content: bytes) -> None:
    for extensions in (
        [(kind, content), server_name(NAME), *PLAIN],
        [server_name(NAME), *PLAIN, (kind, content)],
    ):
        data = hello(extensions=extensions)
        assert read(data) == byte_by_byte(data) == Named(NAME, ech=True, length=len(data))


def test_an_extension_that_hides_nothing_is_not_taken_for_one_that_does() -> None:
    for kind in (0xFE0E, 0xFE07, 0x0DFE, 0xFFCD, 0xFF01, 17513, 17613):
        reading = read(hello(more=[(kind, bytes(40))]))
        assert isinstance(reading, Named)
        assert not reading.ech


# ---- and those that do not

LONG = ".".join(["a" * 63] * 3 + ["b" * 61])  # 253 characters


def cut(extensions_tail: bytes) -> bytes:
    return hello(tail=extensions_tail)


SNI = extension(*server_name(NAME))
R = Reason
BAD: dict[str, tuple[bytes, Reason]] = {
    # no name
    "no extensions at all": (hello(tail=b""), R.SNI_MISSING),
    "an empty list of them": (hello(extensions=[]), R.SNI_MISSING),
    "none with a name": (hello(extensions=PLAIN), R.SNI_MISSING),
    "none, but ECH": (hello(extensions=[*PLAIN, (ECH, bytes(100))]), R.SNI_MISSING),
    # an address for a name
    "IPv4": (hello("192.0.2.7"), R.SNI_ADDRESS),
    "IPv4 with a dot behind": (hello("192.0.2.7."), R.SNI_ADDRESS),
    "IPv4, short": (hello("127.1"), R.SNI_ADDRESS),
    "IPv4, one number": (hello("2130706433"), R.SNI_ADDRESS),
    "IPv4, hexadecimal": (hello("0x7f.0x0.0x0.0x1"), R.SNI_ADDRESS),
    "IPv4, octal": (hello("0177.0.0.01"), R.SNI_ADDRESS),
    "IPv6": (hello("2001:db8::7"), R.SNI_ADDRESS),
    "IPv6, loopback": (hello("::1"), R.SNI_ADDRESS),
    "IPv6 in brackets": (hello("[2001:DB8::7]"), R.SNI_ADDRESS),
    "IPv6 with a zone": (hello("fe80::1%eth0"), R.SNI_ADDRESS),
    "IPv6 with an IPv4 in it": (hello("::ffff:192.0.2.7"), R.SNI_ADDRESS),
    # more than one name
    "two extensions": (hello(extensions=[server_name(NAME), *PLAIN, server_name("b.test")]), R.SNI_REPEATED),
    "the same twice": (hello(extensions=[server_name(NAME), server_name(NAME)]), R.SNI_REPEATED),
    "two names in the list": (hello(NAME, "other.test"), R.SNI_REPEATED),
    "the same name twice in it": (hello(NAME, NAME), R.SNI_REPEATED),
    "a second, empty name": (hello(NAME, ""), R.SNI_REPEATED),
    "a hundred names": (hello(*[NAME] * 100), R.SNI_REPEATED),
    # names that are none
    "an empty name": (hello(""), R.HELLO_MALFORMED),
    "a name of another type": (hello(extensions=[server_name(NAME, kind=1)]), R.HELLO_MALFORMED),
    "a name, then one of another type": (
        hello(extensions=[(0, b"\x00\x0a\x00\x00\x02a.\x01\x00\x02b.")]), R.HELLO_MALFORMED),
    "a dot behind": (hello(NAME + "."), R.HELLO_MALFORMED),
    "two dots behind": (hello(NAME + ".."), R.HELLO_MALFORMED),
    "a dot before": (hello("." + NAME), R.HELLO_MALFORMED),
    "only a dot": (hello("."), R.HELLO_MALFORMED),
    "an empty label": (hello("api..test"), R.HELLO_MALFORMED),
    "a NUL behind": (hello(NAME.encode() + b"\0"), R.HELLO_MALFORMED),
    "a NUL inside": (hello(NAME.encode() + b"\0.other.test"), R.HELLO_MALFORMED),
    "a line break": (hello("api\r\n.test"), R.HELLO_MALFORMED),
    "a space": (hello("api example.test"), R.HELLO_MALFORMED),
    "a slash": (hello("api.example.test/"), R.HELLO_MALFORMED),
    "a port": (hello("api.example.test:443"), R.HELLO_MALFORMED),
    "a star": (hello("*.example.test"), R.HELLO_MALFORMED),
    "UTF-8": (hello("bücher.example"), R.HELLO_MALFORMED),
    "Latin-1": (hello("bücher.example".encode("latin-1")), R.HELLO_MALFORMED),
    "a full-width dot": (hello("api\uff0eexample.test"), R.HELLO_MALFORMED),
    "a Kelvin sign": (hello("\u212aapi.test"), R.HELLO_MALFORMED),
    "254 characters": (hello("c" + LONG), R.HELLO_MALFORMED),
    "a label of 64": (hello("a" * 64 + ".test"), R.HELLO_MALFORMED),
    "60,000 characters": (hello("a" * 60_000, sizes=[16384] * 3), R.HELLO_MALFORMED),
    "a false A-label": (hello("xn--\u0061-ecp.example"), R.HELLO_MALFORMED),
    # lengths that do not agree
    "server_name without content": (hello(extensions=[(0, b"")]), R.HELLO_MALFORMED),
    "server_name with an empty list": (hello(extensions=[(0, b"\x00\x00")]), R.HELLO_MALFORMED),
    "list longer than extension": (hello(extensions=[(0, b"\x00\x06\x00\x00\x02ab")]), R.HELLO_MALFORMED),
    "list shorter than extension": (hello(extensions=[(0, b"\x00\x05\x00\x00\x02ab.")]), R.HELLO_MALFORMED),
    "name as long as its extension": (hello(extensions=[(0, b"\x00\x04\x00\x00\x02ab")]), R.HELLO_MALFORMED),
    "name longer than its list": (hello(extensions=[(0, b"\x00\x05\x00\x00\x03ab")]), R.HELLO_MALFORMED),
    "name shorter than its list": (hello(extensions=[(0, b"\x00\x05\x00\x00\x01ab")]), R.HELLO_MALFORMED),
    "extensions end early": (cut(struct.pack("!H", len(SNI) - 1) + SNI), R.HELLO_MALFORMED),
    "extensions end late": (cut(struct.pack("!H", len(SNI) + 1) + SNI), R.HELLO_MALFORMED),
    "an extension too long": (cut(struct.pack("!H", len(SNI) + 4) + SNI + b"\0\x15\0\1"), R.HELLO_MALFORMED),
    "half an extension": (cut(struct.pack("!H", len(SNI) + 3) + SNI + b"\0\x15\0"), R.HELLO_MALFORMED),
    "half a length of extensions": (cut(b"\0"), R.HELLO_MALFORMED),
    "bytes behind the extensions": (cut(struct.pack("!H", len(SNI)) + SNI + b"\0"), R.HELLO_MALFORMED),
    "a session id of 33 bytes": (hello(session=bytes(33)), R.HELLO_MALFORMED),
    "no cipher suites": (hello(suites=b""), R.HELLO_MALFORMED),
    "half a cipher suite": (hello(suites=bytes(3)), R.HELLO_MALFORMED),
    "no compression": (hello(compression=b""), R.HELLO_MALFORMED),
    "an empty message": (records(message(b"")), R.HELLO_MALFORMED),
    # what may stand once stands twice
    "supported_versions twice": (hello(more=[PLAIN[2]]), R.HELLO_MALFORMED),
    "GREASE of one value twice": (hello(more=[PLAIN[3]]), R.HELLO_MALFORMED),
    # versions
    "client_version SSL 3.0": (hello(version=0x0300), R.HELLO_MALFORMED),
    "client_version TLS 1.3": (hello(version=0x0304), R.HELLO_MALFORMED),
    "client_version SSL 2.0": (hello(version=0x0002), R.HELLO_MALFORMED),
    "client_version GREASE": (hello(version=0x0A0A), R.HELLO_MALFORMED),
    "a record of TLS 1.3": (hello(record_version=0x0304), R.HELLO_MALFORMED),
    # records
    "an empty record first": (b"\x16\x03\x01\x00\x00" + hello(), R.HELLO_MALFORMED),
    "an empty record between": (
        hello(sizes=[50])[:55] + b"\x16\x03\x01\x00\x00" + hello(sizes=[50])[55:], R.HELLO_MALFORMED),
    "an alert between": (
        hello(sizes=[50])[:55] + b"\x15\x03\x01\x00\x02\x01\x00" + hello(sizes=[50])[55:], R.HELLO_MALFORMED),
    "plain text between": (hello(sizes=[50])[:55] + b"GET / HTTP/1.1\r\n", R.HELLO_MALFORMED),
    "a record of SSL 2.0 between": (hello(sizes=[50])[:55] + b"\x80\x2e\x01\x03\x01", R.HELLO_MALFORMED),
    "a record of DTLS between": (hello(sizes=[50])[:55] + b"\x16\xfe\xfd\x00\x10", R.HELLO_MALFORMED),
    "two hellos in a record": (
        records(message(client_hello()) + message(client_hello("other.test"))), R.HELLO_MALFORMED),
    "a byte behind, in its record": (records(message(client_hello()) + b"\0"), R.HELLO_MALFORMED),
    "bytes behind one without extensions": (
        records(message(client_hello(tail=b"")) + b"\0\0"), R.HELLO_MALFORMED),
    "a byte behind, in its last record": (
        records(message(client_hello()) + b"\0", 100), R.HELLO_MALFORMED),
    "a record of 16385 bytes": (b"\x16\x03\x01\x40\x01", R.HELLO_TOO_LONG),
    "a record of 16385 bytes, whole": (
        hello(more=[(21, bytes(16_385 - len(hello(more=[(21, b"")])) + 5))]), R.HELLO_TOO_LONG),
    "a message longer than permitted": (
        b"\x16\x03\x01\x40\x00\x01" + (MAX_MESSAGE - 3).to_bytes(3, "big"), R.HELLO_TOO_LONG),
    "a message of 16 MB": (b"\x16\x03\x01\x40\x00\x01\xff\xff\xff", R.HELLO_TOO_LONG),
    "too many records": (
        records(message(client_hello(more=[(21, bytes(40_000))])), *[1] * 30_000), R.HELLO_TOO_LONG),
    # other messages
    "a server's hello": (records(message(client_hello(), kind=2)), R.HELLO_MALFORMED),
    "a hello request": (records(message(b"", kind=0)), R.HELLO_MALFORMED),
    "a certificate": (records(message(bytes(100), kind=11)), R.HELLO_MALFORMED),
    "an alert": (b"\x15\x03\x01\x00\x02\x02\x28", R.HELLO_MALFORMED),
    "a change_cipher_spec": (b"\x14\x03\x03\x00\x01\x01", R.HELLO_MALFORMED),
    "application data": (b"\x17\x03\x03\x00\x20" + bytes(32), R.HELLO_MALFORMED),
    # no TLS
    "HTTP": (b"GET / HTTP/1.1\r\nHost: api.example.test\r\n\r\n", R.NOT_TLS),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", R.NOT_TLS),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", R.NOT_TLS),
    "PROXY": (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 443\r\n", R.NOT_TLS),
    "PROXY, binary": (b"\r\n\r\n\x00\r\nQUIT\n", R.NOT_TLS),
    "SSL 2.0": (b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10" + bytes(37), R.NOT_TLS),
    "SSL 2.0, long header": (b"\x00\x2e\x00\x01\x03\x01" + bytes(37), R.NOT_TLS),
    "DTLS": (b"\x16\xfe\xfd" + bytes(30), R.NOT_TLS),
    "QUIC": (b"\xc3\x00\x00\x00\x01\x08" + bytes(30), R.NOT_TLS),
    "PostgreSQL's wish for TLS": (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", R.NOT_TLS),
    "a 22 and no TLS": (b"\x16\x16\x16\x16\x16", R.NOT_TLS),
    "a 21 and no TLS": (b"\x15\x16", R.NOT_TLS),
    "zeroes": (bytes(100), R.NOT_TLS),
}  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), BAD.values(), ids=BAD)
def test_a_hello_is_objected_to(data: bytes, expected: Reason) -> None:
    reading = read(data)
    assert reason(reading) is expected
    assert isinstance(reading, Objection)
    assert reading.detail.isascii()
    assert reading.detail.isprintable()
    assert reading.asked.isascii()
    assert reading.asked.isprintable()
    assert len(reading.asked) < 1000
    assert reason(byte_by_byte(data)) is expected


def test_what_was_asked_is_told_and_escaped() -> None:
    told = {
        "IPv4": "'192.0.2.7'",
        "a NUL inside": r"'api.example.test\x00.other.test'",
        "a line break": r"'api\r\n.test'",
        "two names in the list": "'api.example.test', 'other.test'",
        "HTTP": r"'GET / HTTP/1.1\r\nHost: api.exampl'",
        "SSH": r"'SSH-2.0-OpenSSH_9.2\r\n'",
        "Latin-1": r"'b\xfccher.example'",
        "a dot behind": "'api.example.test.'",
        "no extensions at all": "",
    }
    assert {label: read(BAD[label][0]).asked for label in told} == told  # type: ignore[union-attr]


def test_the_detail_says_what_is_wrong() -> None:
    for label, detail in {
        "254 characters": "more than 253 characters",
        "60,000 characters": "more than 253 characters",
        "Latin-1": "not ASCII",
        "UTF-8": "not ASCII",
        "SSL 2.0": "SSL 2.0",
        "an alert": "an alert record",
        "two hellos in a record": "more follows it",
        "supported_versions twice": "two extensions of type 43",
        "client_version TLS 1.3": "version is 3.4",
    }.items():
        assert detail in read(BAD[label][0]).detail  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", ["a.b", LONG, "a" * 63 + ".test", "xn--bcher-kva.example", "1.a1", "0x7g.test"]
)
def test_unusual_names_that_are_names(name: str) -> None:
    assert read(hello(name)) == Named(name, ech=False, length=len(hello(name)))


def test_nothing_is_decided_before_the_last_byte() -> None:
    for data in (hello(), hello(sizes=[3, 50]), GOOD["post-quantum, name behind it"]):
        reader = HelloReader()
        for at in range(len(data) - 1):
            assert reader.feed(data[at : at + 1]) == More(), at
            assert read(data[: at + 1]) == More(), at
        assert reader.feed(data[-1:]) == Named(NAME, ech=False, length=len(data))
    assert read(b"") == HelloReader().feed(b"") == More()


def test_a_wrong_length_is_objected_to_before_what_it_promises_has_come() -> None:
    """Otherwise a stranger makes us wait, and hold, as he pleases."""
    assert reason(read(b"\x16\x03\x01\x40\x01")) is Reason.HELLO_TOO_LONG
    assert reason(read(b"\x16\x03\x01\x40\x00\x02")) is Reason.HELLO_MALFORMED
    assert reason(read(b"G")) is Reason.NOT_TLS
    assert reason(read(b"\x15")) is None
    assert reason(read(b"\x16\x03")) is None


def test_a_body_cut_anywhere_is_no_hello_whatever_follows_its_record() -> None:
    body = client_hello()
    without_extensions = len(client_hello(tail=b""))
    for length in range(len(body)):
        data = records(message(body[:length]))
        expected = Reason.SNI_MISSING if length == without_extensions else Reason.HELLO_MALFORMED
        for following in (b"", b"\xff" * 100, bytes(100), body[length:]):
            assert reason(read(data + following)) is expected, length
        assert reason(byte_by_byte(data)) is expected, length


def test_the_longest_message_is_read_and_one_byte_more_is_not() -> None:
    room = MAX_MESSAGE - len(message(client_hello(more=[(21, b"")])))
    longest = hello(more=[(21, bytes(room))], sizes=[16384] * 3)
    assert read(longest) == Named(NAME, ech=False, length=len(longest))
    assert reason(read(hello(more=[(21, bytes(room + 1))], sizes=[16384] * 4))) is Reason.HELLO_TOO_LONG


def test_the_longest_stream_is_read_and_one_record_more_is_not() -> None:
    def stream(records_of_a_byte: int) -> bytes:
        body = client_hello(more=[(21, bytes(MAX_MESSAGE - 500))])
        return records(message(body), *[1] * records_of_a_byte, 16384, 16384, 16384)

    fits = bisect.bisect_right(range(14_000), MAX_STREAM, key=lambda count: len(stream(count))) - 1
    assert read(stream(fits)) == Named(NAME, ech=False, length=len(stream(fits)))
    assert reason(read(stream(fits + 1))) is Reason.HELLO_TOO_LONG


# ---- laws

names = st.from_regex(
    r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]([a-z0-9]{0,9})){1,20}", fullmatch=True
).filter(lambda name: "--" not in name)
others = st.lists(
    st.tuples(st.integers(1, 0xFFFF).filter(lambda kind: kind < 0xFD00), st.binary(max_size=80)),
    max_size=12,
    unique_by=lambda each: each[0],
)


@st.composite
def hellos(draw: st.DrawFn) -> tuple[bytes, Named]:
    """Any honest hello, and what must be read from it."""
    name, hidden = draw(names), draw(st.booleans())
    extensions = [
        *draw(others),
        server_name(name),
        *([(ECH, draw(st.binary(max_size=40)))] if hidden else []),
    ]
    data = hello(
        extensions=draw(st.permutations(extensions)),
        version=draw(st.sampled_from([0x0301, 0x0302, 0x0303])),
        record_version=draw(st.sampled_from([0x0301, 0x0303])),
        session=draw(st.binary(max_size=32)),
        suites=draw(st.binary(min_size=1, max_size=40)) * 2,
        compression=draw(st.binary(min_size=1, max_size=3)),
        sizes=draw(st.lists(st.integers(1, 200), max_size=20)),
    )
    return data, Named(name, ech=hidden, length=len(data))


@settings(max_examples=150, deadline=None)
@given(hellos(), st.lists(st.integers(0, 3000), max_size=6), st.binary(max_size=30))
def test_whatever_is_built_is_read(built: tuple[bytes, Named], cuts: list[int], following: bytes) -> None:
    data, named = built
    assert read(data) == read(data + following) == named
    assert fed(data + following, *sorted(cut for cut in cuts if cut <= len(data + following))) == named


mutations = st.lists(
    st.tuples(
        st.sampled_from(["set", "drop", "insert", "double"]),
        st.integers(0, 400),
        st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for what, place, new in changes:
        at = place % (len(data) + 1)
        until = at + len(new)
        replaced = {"set": new, "drop": b"", "insert": new + data[at:until], "double": data[at:until] * 2}[
            what
        ]
        data = data[:at] + replaced + data[until:]
    return data


@settings(max_examples=200, deadline=None)
@given(hellos(), mutations, st.lists(st.integers(0, 1500), max_size=4))
def test_damaged_hellos_are_read_alike_however_they_are_cut(
    built: tuple[bytes, Named], changes: list[tuple[str, int, bytes]], cuts: list[int]
) -> None:
    data = mutated(built[0], changes)
    whole = read(data)
    for reading in (byte_by_byte(data), fed(data, *sorted(cut for cut in cuts if cut <= len(data)))):
        assert type(reading) is type(whole)
        assert reason(reading) is reason(whole)
        if isinstance(whole, Named):
            assert reading == whole


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200), st.binary(max_size=200).map(lambda raw: b"\x16\x03\x01\x00\xc8\x01" + raw)
    )
)
@example(b"\x16\x03\x01\x00\x04\x01\x00\x00\x00")
@example(b"\x16\x03\x01\x00\x03\x01\x00\x00")
def test_any_bytes_give_a_reading(data: bytes) -> None:
    assert isinstance(read(data), More | Named | Objection)
    assert type(byte_by_byte(data)) is type(read(data))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_may_stand_where_the_name_stands(raw: bytes) -> None:
    for label in (raw, b"xn--" + raw[:59] + b".test", raw[:60] + b".test"):
        reading = read(hello(label))
        assert not isinstance(reading, More)
        if isinstance(reading, Named):
            assert reading.name == label.decode().lower()


@settings(max_examples=100, deadline=None)
@given(hellos(), mutations, st.lists(st.binary(max_size=600), min_size=1, max_size=4))
def test_once_decided_it_stays(
    built: tuple[bytes, Named], changes: list[tuple[str, int, bytes]], following: list[bytes]
) -> None:
    for data in (built[0], mutated(built[0], changes)):
        reader = HelloReader()
        decided = reader.feed(data)
        if isinstance(decided, More):
            continue
        for more in (*following, hello("other.test")):
            assert reader.feed(more) is decided


def test_time_is_linear_byte_by_byte() -> None:
    """Four times the bytes take four times the time; sixteen times would be the square."""

    def spent(size: int) -> float:
        data = hello(more=[(21, bytes(size))], sizes=[16384] * 4)
        began = time.process_time()
        assert isinstance(byte_by_byte(data), Named)
        return time.process_time() - began

    short = min(spent(15_000) for _ in range(3))
    long = min(spent(60_000) for _ in range(3))
    assert long < 8 * short
