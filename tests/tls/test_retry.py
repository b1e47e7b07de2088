"""The second ClientHello: what a server does with another name in it, and what the watch lets through."""

from __future__ import annotations

import datetime
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.verdicts import Reason
from egressd.tls.hello import MAX_STREAM, Named, Objection, read
from egressd.tls.retry import RETRY_RANDOM, Ruling, Watch
from tls.hellos import ECH, NAME, hello, message, records

FIRST = Named(NAME, ech=False, length=100)
HELD, PASSED = Ruling(b"", over=False), Ruling(b"", over=True)
CHANGE = b"\x14\x03\x03\x00\x01\x01"
EARLY = b"\x17\x03\x03\x00\x20" + bytes(32)
EARLY_22 = (
    b"\x17\x03\x16\x00\x16" + b"\x16" * 22
)  # each byte might be taken for the type of a handshake record
ALERT = b"\x15\x03\x01\x00\x02\x01\x70"  # warning: unrecognized_name


def answer(random: bytes, *, kind: int = 2, more: int = 0) -> bytes:
    body = b"\x03\x03" + random + b"\x20" + bytes(32) + b"\x13\x01\x00" + b"\x00\x06\x00\x2b\x00\x02\x03\x04"
    body += bytes(more)
    return records(message(body, kind=kind), version=0x0303)


RETRY, ACCEPT = answer(RETRY_RANDOM), answer(bytes(32))
KEY_EXCHANGE = records(message(bytes(66), kind=16), version=0x0303)


# ---- the dialogues


def test_a_server_that_accepts_ends_the_watch() -> None:
    watch = Watch(FIRST)
    assert watch.server(ACCEPT + CHANGE) == PASSED


def test_early_data_passes_at_once_and_the_watch_goes_on() -> None:
    watch = Watch(FIRST)
    assert watch.client(CHANGE + EARLY) == Ruling(CHANGE + EARLY, over=False)
    assert watch.client(EARLY[:3]) == HELD
    assert watch.client(EARLY[3:7]) == Ruling(EARLY[:7], over=False)
    assert watch.client(EARLY[7:]) == Ruling(EARLY[7:], over=False)
    assert watch.server(RETRY) == HELD
    assert watch.client(EARLY + hello()) == Ruling(EARLY + hello(), over=True)


def test_the_same_hello_again_is_let_through() -> None:
    watch = Watch(FIRST)
    assert watch.server(RETRY + CHANGE) == HELD
    assert watch.client(CHANGE + hello()[:50]) == Ruling(CHANGE, over=False)
    assert watch.client(hello()[50:] + EARLY) == Ruling(hello() + EARLY, over=True)


@pytest.mark.parametrize("late", [False, True], ids=["after the retry", "before the retry"])
def test_another_name_is_refused(late: bool) -> None:
    watch = Watch(FIRST)
    bad = CHANGE + hello("evil.test")
    if late:
        assert watch.client(bad) == Ruling(CHANGE, over=False)
        ruling = watch.server(RETRY)
    else:
        assert watch.server(RETRY) == HELD
        ruling = watch.client(bad)
    assert isinstance(ruling, Objection)
    assert (ruling.reason, ruling.asked) == (Reason.SNI_OTHER, "'evil.test'")


def test_a_hello_nobody_asked_for_is_held_and_the_server_sees_it_only_if_it_cannot_count() -> None:
    watch = Watch(FIRST)
    assert watch.client(hello("evil.test")) == HELD
    assert watch.client(EARLY) == HELD
    assert watch.server(ACCEPT) == Ruling(hello("evil.test") + EARLY, over=True)


REFUSED = {
    "no name": (hello(extensions=[(43, b"\x02\x03\x04")]), Reason.SNI_MISSING),
    "an address": (hello("192.0.2.1"), Reason.SNI_ADDRESS),
    "two names": (hello(NAME, "evil.test"), Reason.SNI_REPEATED),
    "a hidden name": (hello(more=[(ECH, bytes(40))]), Reason.ECH),
    "another message": (KEY_EXCHANGE, Reason.HELLO_MALFORMED),
    "an endless one": (b"\x16\x03\x03\x40\x00\x01\xff\xff\xff", Reason.HELLO_TOO_LONG),
    "a hello with another behind it": (
        records(message(b"\0") + message(b"\0")), Reason.HELLO_MALFORMED),
}  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), REFUSED.values(), ids=REFUSED)
def test_a_second_hello_is_judged_like_the_first(data: bytes, expected: Reason) -> None:
    watch = Watch(FIRST)
    assert watch.server(RETRY) == HELD
    ruling = watch.client(data)
    assert isinstance(ruling, Objection)
    assert ruling.reason is expected
    assert ruling.detail.startswith("the second hello")


def test_a_name_may_stay_hidden_where_it_was_allowed_to_be() -> None:
    watch = Watch(Named(NAME, ech=True, length=100))
    assert watch.server(RETRY) == HELD
    assert watch.client(hello(more=[(ECH, bytes(40))])).over  # type: ignore[union-attr]


def test_alerts_and_odd_records_of_the_server() -> None:
    cut = records(RETRY[5:], 3, 20, version=0x0303)
    for data, expected in {
        ALERT + ACCEPT: PASSED,
        ALERT * 3 + RETRY: HELD,
        cut: HELD,
        ALERT + cut: HELD,
        records(ACCEPT[5:], 1, 1, 30): PASSED,
        answer(bytes(32), more=256 - len(ACCEPT) + 5): PASSED,  # a record of 256 bytes
        answer(RETRY_RANDOM, more=256 - len(ACCEPT) + 5): HELD,
        b"HTTP/1.1 400 Bad Request\r\n": PASSED,
        answer(RETRY_RANDOM, kind=11): PASSED,
        EARLY: PASSED,
        ALERT * 30: HELD,
        b"": HELD,
    }.items():
        for size in (1, 7, 100_000):
            watch = Watch(FIRST)
            rulings = [watch.server(data[at : at + size]) for at in range(0, len(data), size) or [0]]
            assert (PASSED in rulings) == (expected == PASSED), data[:20]


def test_a_server_that_only_ever_alerts_ends_nothing() -> None:
    """More than is looked at: then a client may only say the same hello again."""
    watch = Watch(FIRST)
    assert watch.server(ALERT * 3000 + ACCEPT) == HELD
    assert isinstance(watch.client(hello("evil.test")), Objection)


def test_what_is_held_is_bounded() -> None:
    watch = Watch(FIRST)
    piece = bytes(1 << 14)
    assert watch.client(b"\x16") == HELD
    rulings = [watch.client(piece) for _ in range(MAX_STREAM // len(piece))]
    assert rulings[:-1] == [HELD] * (len(rulings) - 1)
    assert isinstance(rulings[-1], Objection)
    assert rulings[-1].reason is Reason.HELLO_TOO_LONG


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "odd",
    [b"\x18\x03\x03\x00\x03\x01\x00\x00", bytes(5), b"\x63" + hello("evil.test")[1:],
     b"\x14\x03\x03\x00\x02\x01\x01", b"\x14" + hello("evil.test")[1:], b"\x15" + hello("evil.test")[1:],
     b"\x80\x40\x01\x03\x03" + bytes(60), b"\x17\x03\x03\x41\x01" + bytes(300)],
    ids=["heartbeat", "nothing", "no type", "long change", "hello as change", "hello as alert", "SSL 2.0",
         "longer than a record"],
)  # fmt: skip
def test_what_no_client_sends_unasked_is_held_and_is_no_second_hello(odd: bytes, late: bool) -> None:
    """Servers differ in what they make of it."""
    watch = Watch(FIRST)
    rulings = [] if late else [watch.server(RETRY)]
    rulings += [watch.client((CHANGE + odd + hello())[at : at + 4]) for at in range(0, len(CHANGE + odd), 4)]
    rulings += [watch.server(RETRY)] if late else []
    assert b"".join(r.forward for r in rulings if isinstance(r, Ruling)) == CHANGE
    assert isinstance(rulings[-1], Objection)
    watch = Watch(FIRST)
    watch.client(CHANGE + odd)
    assert watch.server(ACCEPT) == Ruling(odd, over=True), "where it cannot count it is the server's business"


chunks = st.lists(st.sampled_from([CHANGE, EARLY, EARLY_22, ALERT]), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    chunks,
    st.sampled_from([NAME, "evil.test"]),
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.booleans(),
)
def test_no_byte_is_lost_or_let_through_early(
    before: list[bytes], name: str, sizes: list[int], late: bool
) -> None:
    """However they are cut: up to the second hello bytes pass; the hello passes if it names the same."""
    passing, stream = b"".join(before), b"".join(before) + hello(name)
    watch = Watch(FIRST)
    if not late:
        assert watch.server(RETRY) == HELD
    sent, at, rulings = b"", 0, []
    while at < len(stream) and not (rulings and isinstance(rulings[-1], Objection)):
        size = sizes[len(rulings) % len(sizes)]
        rulings.append(watch.client(stream[at : at + size]))
        at += size
    if late:
        rulings.append(watch.server(RETRY))
    for ruling in rulings:
        sent += ruling.forward if isinstance(ruling, Ruling) else b""
    assert sent == (stream if name == NAME else passing)
    assert isinstance(rulings[-1], Objection) == (name != NAME)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=60)), max_size=20), st.booleans())
def test_any_bytes_of_either_side_give_a_ruling(spoken: list[tuple[bool, bytes]], retried: bool) -> None:
    watch, said, sent = Watch(FIRST), b"", b""
    ruling: Ruling | Objection = watch.server(RETRY) if retried else HELD
    for client, data in spoken:
        if isinstance(ruling, Objection) or ruling.over:
            break
        ruling = watch.client(data) if client else watch.server(data)
        said += data if client else b""
        sent += ruling.forward if isinstance(ruling, Ruling) else b""
    assert said.startswith(sent)


# ---- a real server, OpenSSL's, in memory


@pytest.fixture(scope="module")
def server_context(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path: Path = tmp_path_factory.mktemp("server") / "server.pem"
    encoding = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(encoding)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


class Side:
    """One end of TLS, in memory."""

    def __init__(self, context: ssl.SSLContext, **words: object) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, **words)  # type: ignore[arg-type]
        self.done = False

    def says(self, heard: bytes = b"") -> bytes:
        self._in.write(heard)
        try:
            self._tls.do_handshake()
            self.done = True
        except ssl.SSLWantReadError:
            pass
        return self._out.read()


@pytest.fixture
def names(server_context: ssl.SSLContext) -> Iterator[list[str | None]]:
    """What the server was asked for. It wants P-384, of which clients send no share: so they must retry."""
    asked: list[str | None] = []
    server_context.set_ecdh_curve("secp384r1")
    server_context.sni_callback = lambda _side, name, _context: asked.append(name)
    yield asked
    server_context.sni_callback = None


def share(name: str, *, with_key: bool) -> bytes:
    """A hello for P-384 with a share of it, or with none."""
    point = ec.generate_private_key(ec.SECP384R1()).public_key()
    raw = point.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    listed = struct.pack("!HH", 0x18, len(raw)) + raw if with_key else b""
    return hello(
        extensions=[
            (0, struct.pack("!HBH", len(name) + 3, 0, len(name)) + name.encode()),
            (10, b"\x00\x02\x00\x18"), (13, b"\x00\x04\x05\x03\x08\x04"), (43, b"\x02\x03\x04"),
            (51, struct.pack("!H", len(listed)) + listed),
        ]
    )  # fmt: skip


def test_openssl_obeys_the_second_name(server_context: ssl.SSLContext, names: list[str | None]) -> None:
    """The reason for all of this. Should it fail one day, OpenSSL has begun to compare."""
    server = Side(server_context, server_side=True)
    assert RETRY_RANDOM in server.says(share(NAME, with_key=False))
    flight = server.says(CHANGE + share("evil.test", with_key=True))
    assert names == [NAME, "evil.test"]
    assert flight[:3] == b"\x16\x03\x03"  # ServerHello, and in the records behind it the certificate
    assert len(flight) > 500


def test_the_watch_stops_it(server_context: ssl.SSLContext, names: list[str | None]) -> None:
    first = share(NAME, with_key=False)
    named = read(first)
    assert isinstance(named, Named)
    server, watch = Side(server_context, server_side=True), Watch(named)
    assert watch.server(server.says(first)) == HELD
    ruling = watch.client(CHANGE + share("evil.test", with_key=True))
    assert isinstance(ruling, Objection)
    assert ruling.reason is Reason.SNI_OTHER
    assert names == [NAME]


@pytest.mark.parametrize("shares", ["x25519", "secp384r1"], ids=["with a retry", "without one"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2], ids=str)
@pytest.mark.parametrize("size", [1, 100, 100_000], ids="pieces of {}".format)
def test_a_real_handshake_passes(
    server_context: ssl.SSLContext, names: list[str | None], shares: str, version: ssl.TLSVersion, size: int
) -> None:
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    client_context.maximum_version = version
    if shares == "secp384r1":
        client_context.set_ecdh_curve(shares)
    client = Side(client_context, server_hostname=NAME)
    server = Side(server_context, server_side=True)
    first = client.says()
    named = read(first)
    assert named == Named(NAME, ech=False, length=len(first))
    watch, to_server, over = Watch(named), first, False

    def ruled(side: Callable[[bytes], Ruling | Objection], data: bytes) -> bytes:
        nonlocal over
        passed = b""
        for at in range(0, len(data), size):
            if over:
                passed += data[at:] if side == watch.client else b""
                break
            ruling = side(data[at : at + size])
            assert isinstance(ruling, Ruling)
            passed, over = passed + ruling.forward, ruling.over
        return passed

    for _ in range(6):
        said = server.says(to_server)
        to_server = ruled(watch.server, said)
        to_server += ruled(watch.client, client.says(said))
    assert client.done
    assert server.done
    assert over
    retried = shares != "secp384r1" and version is ssl.TLSVersion.TLSv1_3
    assert names == [NAME] * (2 if retried else 1)
