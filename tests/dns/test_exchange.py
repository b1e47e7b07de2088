"""Dialogues with one exchange: which server is asked when, and which answer counts."""

from __future__ import annotations

from ipaddress import ip_address

import dnslib
import pytest

from egressd.dns.exchange import LIMIT, Exchange, Finish, Question, Send, Server, Transport
from egressd.dns.replies import Failure
from egressd.dns.wire import Answer

ONE, TWO = Server.parse("udp://192.0.2.53"), Server.parse("udp://[2001:db8::53]:5353")
STREAM, SECURE = Server.parse("tcp://192.0.2.54"), Server.parse("tls://dns.example@192.0.2.55")
QUESTION = Question((b"WWW", b"example", b"com"), 1)


def say(
    command: object, *, number: int | None = None, name: str = "www.example.com", qtype: str = "A",
    qclass: int = 1, rcode: int = 0, tc: int = 0, ede: int | None = None, address: str = "93.184.215.14",
) -> bytes:  # fmt: skip
    """An answer to what was sent, right in everything not said otherwise."""
    assert isinstance(command, Send)
    record = dnslib.DNSRecord.question(name, qtype).reply()
    record.q.qclass = qclass
    record.header.id = int.from_bytes(command.message[:2], "big") if number is None else number
    record.header.rcode, record.header.tc = rcode, tc
    if not rcode and not tc:
        record.add_answer(dnslib.RR("www.example.com", 1, rdata=dnslib.A(address), ttl=60))
    if ede is not None:
        record.add_ar(dnslib.EDNS0(opts=[dnslib.EDNSOption(15, ede.to_bytes(2, "big"))]))
    return bytes(record.pack())


class Ids:
    """Not random, so that the test can see that each attempt has its own."""

    def __init__(self) -> None:
        self.last = 0x0FFF

    def __call__(self) -> int:
        self.last += 1
        return self.last


def begin(*servers: Server) -> tuple[Exchange, Send]:
    exchange = Exchange(QUESTION, servers, draw=Ids())
    command = exchange.start(now=0)
    assert isinstance(command, Send)
    return exchange, command


def receive(
    exchange: Exchange, send: object, data: bytes, *, source: Server | None = None, now: float = 0.1
) -> object:
    assert isinstance(send, Send)
    server = source or send.server
    return exchange.received(send.attempt, data, source=(server.address, server.port), now=now)


GOOD = Answer(0, (ip_address("93.184.215.14"),), 60)


@pytest.mark.parametrize("server", [ONE, TWO, STREAM, SECURE])
def test_asked_and_answered(server: Server) -> None:
    exchange, send = begin(server)
    assert (send.server, send.transport, send.attempt) == (server, server.transport, 1)
    asked = dnslib.DNSRecord.parse(send.message)
    assert (asked.header.id, asked.q.qname.label, asked.q.qtype) == (0x1000, (b"www", b"example", b"com"), 1)
    assert receive(exchange, send, say(send)) == Finish(GOOD, server)
    assert receive(exchange, send, say(send)) is None  # the second one is too late


@pytest.mark.parametrize(
    "forged",
    [
        {"number": 0x1001},
        {"name": "ww.example.com"},
        {"qtype": "AAAA"},
        {"qclass": 3},
        {"number": 0x0FFF, "rcode": 3},
    ],
    ids=str,
)
def test_a_forgers_answer_is_not_even_an_event(forged: dict[str, int | str]) -> None:
    exchange, send = begin(ONE)
    forgery = say(send, address="203.0.113.66", **forged)  # type: ignore[arg-type]
    assert receive(exchange, send, forgery) is None
    assert receive(exchange, send, say(send)) == Finish(GOOD, ONE)


@pytest.mark.parametrize("place", ["udp://192.0.2.99", "udp://192.0.2.53:54", "udp://[2001:db8::53]"])
def test_nor_is_one_from_another_place(place: str) -> None:
    exchange, send = begin(ONE)
    assert receive(exchange, send, say(send), source=Server.parse(place)) is None
    assert receive(exchange, send, say(send)) == Finish(GOOD, ONE)


@pytest.mark.parametrize("data", [b"", b"\x10\x00", b"\x10\x00\x81\x80" + b"\xff" * 40])
def test_nor_is_garbage(data: bytes) -> None:
    exchange, send = begin(ONE)
    assert receive(exchange, send, data) is None
    assert receive(exchange, send, say(send)) == Finish(GOOD, ONE)


def test_a_query_sent_back_is_no_answer() -> None:
    exchange, send = begin(ONE)
    assert receive(exchange, send, send.message) is None


def test_silence_goes_round_the_servers_twice_with_fresh_ids() -> None:
    exchange, command = begin(ONE, TWO)
    heard = []
    now = 0.0
    while isinstance(command, Send):
        heard.append((command.server, command.message[:2].hex(), command.deadline - now))
        now = command.deadline
        command = exchange.expired(command.attempt, now=now)  # type: ignore[assignment]
    assert heard == [(ONE, "1000", 1), (TWO, "1001", 1), (ONE, "1002", 2), (TWO, "1003", 2)]
    assert command == Finish(Failure(22, "www.example.com: udp://[2001:db8::53]:5353 did not answer in time"))


def test_all_of_it_is_bounded() -> None:
    exchange, command = begin(STREAM, SECURE, STREAM, SECURE)
    now, sends = 0.0, 0
    while isinstance(command, Send):
        assert command.deadline <= LIMIT
        sends, now = sends + 1, command.deadline
        command = exchange.expired(command.attempt, now=now)  # type: ignore[assignment]
    assert (sends, now) == (3, LIMIT)


def test_a_late_answer_to_an_earlier_attempt_does_not_count() -> None:
    exchange, first = begin(ONE, TWO)
    second = exchange.expired(1, now=1)
    assert receive(exchange, first, say(first)) is None
    assert receive(exchange, second, say(second)) == Finish(GOOD, TWO)


def test_an_earlier_attempts_timer_does_not_count() -> None:
    exchange, _ = begin(ONE, TWO)
    exchange.expired(1, now=1)
    assert exchange.expired(1, now=1) is None
    assert exchange.broken(1, "late", now=1) is None


@pytest.mark.parametrize("rcode", [1, 2, 4, 5])
def test_a_server_that_will_not_is_passed_over(rcode: int) -> None:
    exchange, first = begin(ONE, TWO)
    second = receive(exchange, first, say(first, rcode=rcode))
    assert isinstance(second, Send)
    assert second.server == TWO
    assert receive(exchange, second, say(second)) == Finish(GOOD, TWO)


def test_no_such_name_is_an_answer() -> None:
    exchange, send = begin(ONE, TWO)
    assert receive(exchange, send, say(send, rcode=3)) == Finish(Answer(3, (), 30), ONE)


@pytest.mark.parametrize(("ede", "code"), [(None, 0), (6, 6)])
def test_the_last_reason_is_told(ede: int | None, code: int) -> None:
    exchange, send = begin(ONE)
    send = receive(exchange, send, say(send, rcode=2))  # type: ignore[assignment]
    end = receive(exchange, send, say(send, rcode=2, ede=ede))
    assert end == Finish(Failure(code, "www.example.com: udp://192.0.2.53:53 answered SERVFAIL"))


def test_the_network_says_no() -> None:
    exchange, send = begin(ONE)
    send = exchange.broken(send.attempt, "Connection refused", now=0)  # type: ignore[assignment]
    end = exchange.broken(send.attempt, "Connection refused", now=0)
    assert end == Finish(
        Failure(23, "www.example.com: udp://192.0.2.53:53 cannot be reached (Connection refused)")
    )


def test_truncated_is_asked_again_over_tcp() -> None:
    exchange, first = begin(ONE, TWO)
    second = receive(exchange, first, say(first, tc=1))
    assert isinstance(second, Send)
    assert (second.server, second.transport, second.attempt) == (ONE, Transport.TCP, 2)
    assert second.message[:2] != first.message[:2]
    assert receive(exchange, second, say(second)) == Finish(GOOD, ONE)


def test_truncated_over_tcp_is_nonsense() -> None:
    exchange, first = begin(STREAM)
    second = receive(exchange, first, say(first, tc=1))
    end = receive(exchange, second, say(second, tc=1))
    assert end == Finish(Failure(0, "www.example.com: tcp://192.0.2.54:53 sent nonsense"))


class Bits:
    """Ids of their own, and letters by turns: every second bit is set."""

    def __call__(self) -> int:
        return 0xAAAA


def mixed(*servers: Server) -> tuple[Exchange, Send]:
    exchange = Exchange(QUESTION, servers, draw=Bits(), mixed_case=True)
    command = exchange.start(now=0)
    assert isinstance(command, Send)
    return exchange, command


def test_mixed_case_is_in_the_question_and_nowhere_else() -> None:
    _, send = mixed(ONE)
    plain = begin(ONE)[1].message
    assert send.message[12:29] == b"\x03WwW\x07ExAmPlE\x03CoM\x00"
    assert send.message[2:].lower() == plain[2:].lower()
    assert send.message[29:] == plain[29:]


@pytest.mark.parametrize("name", ["www.example.com", "WWW.EXAMPLE.COM", "wWw.eXaMpLe.cOm", "WwW.ExAmPlE.Com"])
def test_mixed_case_that_comes_back_otherwise_is_a_forgers(name: str) -> None:
    exchange, send = mixed(ONE)
    assert receive(exchange, send, say(send, name=name)) is None
    assert receive(exchange, send, say(send, name="WwW.ExAmPlE.CoM")) == Finish(GOOD, ONE)


@pytest.mark.parametrize("server", [STREAM, SECURE])
def test_streams_need_no_mixed_case(server: Server) -> None:
    exchange, send = mixed(server)
    assert b"example" in send.message
    assert receive(exchange, send, say(send, name="WWW.example.com")) == Finish(GOOD, server)


def test_mixed_case_of_long_names_has_a_bit_for_each_letter() -> None:
    labels = (b"a" * 63, b"b" * 63, b"c" * 63, b"d" * 61)
    command = Exchange(Question(labels, 1), [ONE], draw=lambda: 0xFFFF, mixed_case=True).start(now=0)
    assert isinstance(command, Send)
    assert dnslib.DNSRecord.parse(command.message).q.qname.label == tuple(x.upper() for x in labels)


def test_nobody_to_ask() -> None:
    assert Exchange(QUESTION, [], draw=Ids()).start(now=0) == Finish(
        Failure(22, "no upstream server is configured")
    )


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("udp://192.0.2.1", Server(Transport.UDP, ip_address("192.0.2.1"), 53)),
        ("udp://192.0.2.1:5300", Server(Transport.UDP, ip_address("192.0.2.1"), 5300)),
        ("tcp://[2001:db8::1]", Server(Transport.TCP, ip_address("2001:db8::1"), 53)),
        ("tcp://[2001:db8::1]:54", Server(Transport.TCP, ip_address("2001:db8::1"), 54)),
        ("udp://2001:db8::1", Server(Transport.UDP, ip_address("2001:db8::1"), 53)),
        ("tls://dns.example@192.0.2.1", Server(Transport.TLS, ip_address("192.0.2.1"), 853, "dns.example")),
        (
            "tls://dns.example@[2001:db8::1]:8853",
            Server(Transport.TLS, ip_address("2001:db8::1"), 8853, "dns.example"),
        ),
    ],
)
def test_servers_as_text(text: str, server: Server) -> None:
    assert Server.parse(text) == server
    assert Server.parse(str(server)) == server


@pytest.mark.parametrize(
    "text",
    [
        "", "192.0.2.1", "udp://", "udp://dns.example", "udp://dns.example@192.0.2.1", "tls://192.0.2.1",
        "https://192.0.2.1", "udp://192.0.2.1:0", "udp://192.0.2.1:65536", "udp://192.0.2.1:x", "udp://[192.0.2.1]x",
        "udp://999.0.2.1", "udp://192.0.2.1\n", "tls://@192.0.2.1", "udp://[2001:db8::1", "udp://2001:db8::1::2",
    ],
)  # fmt: skip
def test_what_is_no_server(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Server.parse(text)
