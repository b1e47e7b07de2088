"""The way to upstream servers, on the loopback: forgers, servers that are down, streams that end.

The servers are coroutines beside the client, so that a test can be exact about who sends what when.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import ssl
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dnslib
import pytest
from test_resolver import make_certificates

from egressd.dns.exchange import Server, Transport
from egressd.dns.replies import Failure
from egressd.dns.wire import Answer, Labels, labels_of
from egressd.processes import upstream
from egressd.processes.upstream import Upstream

NAME: Labels = labels_of("www.example.com")
GOOD, BAD = ip_address("93.184.215.14"), ip_address("203.0.113.66")
LOOPBACKS = ["127.0.0.1", "::1"]


def reply_to(data: bytes, address: str = str(GOOD)) -> bytes:
    record = dnslib.DNSRecord.parse(data).reply()
    record.add_answer(dnslib.RR(record.q.qname, 1, rdata=dnslib.A(address), ttl=60))
    return bytes(record.pack())


@dataclass
class Udp(asyncio.DatagramProtocol):
    """A server; `answers` says which datagrams a question gets, besides sending its own."""

    answers: Callable[[bytes, Any], list[bytes]] = lambda data, _: [reply_to(data)]
    asked: list[tuple[bytes, Any]] = field(default_factory=list)
    transport: Any = None
    port: int = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.asked.append((data, addr))
        for answer in self.answers(data, addr):
            self.transport.sendto(answer, addr)


@contextlib.asynccontextmanager
async def udp(address: str = "127.0.0.1", **options: Any) -> AsyncIterator[Udp]:
    protocol = Udp(**options)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: protocol, local_addr=(address, 0)
    )
    try:
        yield protocol
    finally:
        transport.close()


def at(server: Any, *, address: str = "127.0.0.1", transport: Transport = Transport.UDP) -> Server:
    return Server(transport, ip_address(address), server.port)


def run(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(15):
            await test

    asyncio.run(bounded())


def other_case(data: bytes) -> bytes:
    return data.replace(b"\x03www", b"\x03Www") if b"\x03www" in data else data.lower()


FORGERIES: dict[str, Callable[[bytes], bytes]] = {
    "id": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "question": lambda data: data.replace(b"\x07example", b"\x07fxample"),
    "type": lambda data: data[:12] + data[12:].replace(b"\x03com\x00\x00\x01", b"\x03com\x00\x00\x1c", 1),
    "class": lambda data: data[:12] + data[12:].replace(b"\x00\x01\x00\x01", b"\x00\x01\x00\x03", 1),
    "no response": lambda data: data[:2] + bytes([data[2] & 0x7F]) + data[3:],
    "two questions": lambda data: data[:4] + b"\x00\x02" + data[6:],
    "cut": lambda data: data[:20],
    "empty": lambda _: b"",
    "noise": lambda _: os.urandom(64),
}


@pytest.mark.parametrize("address", LOOPBACKS, ids=["v4", "v6"])
@pytest.mark.parametrize("wrong", FORGERIES)
def test_a_forged_answer_does_not_end_the_wait(wrong: str, address: str) -> None:
    async def test() -> None:
        def answers(data: bytes, _: Any) -> list[bytes]:
            forged = FORGERIES[wrong](reply_to(data, str(BAD)))
            return [forged, forged, reply_to(data)]

        async with udp(address, answers=answers) as server:
            up = Upstream((at(server, address=address),))
            assert await up.ask(NAME, 1) == Answer(0, (GOOD,), 60)
            assert len(server.asked) == 1

    run(test())


@pytest.mark.parametrize("address", LOOPBACKS, ids=["v4", "v6"])
def test_nor_does_a_perfect_one_from_another_port(address: str) -> None:
    async def test() -> None:
        async with udp(address) as forger:

            def answers(data: bytes, place: Any) -> list[bytes]:
                forger.transport.sendto(reply_to(data, str(BAD)), place)
                return []

            async with udp(address, answers=answers) as server:
                up = Upstream((at(server, address=address),))

                async def late() -> None:
                    while not server.asked:
                        await asyncio.sleep(0.01)
                    await asyncio.sleep(0.2)
                    data, place = server.asked[0]
                    server.transport.sendto(reply_to(data), place)

                answer, _ = await asyncio.gather(up.ask(NAME, 1), late())
                assert answer == Answer(0, (GOOD,), 60)

    run(test())


def test_only_forgeries_are_no_answer() -> None:
    async def test() -> None:
        def answers(data: bytes, _: Any) -> list[bytes]:
            return [FORGERIES[wrong](reply_to(data, str(BAD))) for wrong in FORGERIES]

        async with udp(answers=answers) as server:
            result = await Upstream((at(server),)).ask(NAME, 1)
            assert isinstance(result, Failure)
            assert result.code == 22
            assert len(server.asked) == 2  # the next attempt has another id
            assert (
                server.asked[0][0][:2] != server.asked[1][0][:2] or server.asked[0][1] != server.asked[1][1]
            )

    run(test())


def test_mixed_case_is_drawn_anew_and_must_come_back_so() -> None:
    async def test() -> None:
        def answers(data: bytes, _: Any) -> list[bytes]:
            good = reply_to(data)
            forged = good[:12] + data[12:29].swapcase() + good[29:]
            return [forged.replace(GOOD.packed, BAD.packed), good]

        async with udp(answers=answers) as server:
            up = Upstream((at(server),), mixed_case=True)
            for _ in range(8):
                assert await up.ask(NAME, 1) == Answer(0, (GOOD,), 60)
            spelt = {data[12:29] for data, _ in server.asked}
            assert len(server.asked) == 8
            assert len(spelt) > 4
            assert {s.lower() for s in spelt} == {b"\x03www\x07example\x03com\x00"}

    run(test())


def test_without_it_a_server_may_spell_as_it_likes() -> None:
    async def test() -> None:
        def answers(data: bytes, _: Any) -> list[bytes]:
            return [reply_to(data).replace(b"\x07example", b"\x07EXAMPLE")]

        async with udp(answers=answers) as server:
            assert await Upstream((at(server),)).ask(NAME, 1) == Answer(0, (GOOD,), 60)
            assert server.asked[0][0][12:29] == b"\x03www\x07example\x03com\x00"

    run(test())


# ---- health


def test_a_server_that_is_down_costs_its_timeout_once_and_is_back_when_it_answers() -> None:
    async def test() -> None:
        async with udp(answers=lambda *_: []) as first, udp() as second:
            up = Upstream((at(first), at(second)))
            loop = asyncio.get_running_loop()
            begun = loop.time()
            assert isinstance(await up.ask(NAME, 1), Answer)
            assert 0.9 < loop.time() - begun < 2
            begun = loop.time()
            for _ in range(20):
                assert isinstance(await up.ask(NAME, 1), Answer)
            assert loop.time() - begun < 0.5
            assert len(first.asked) == 1
            first.answers = lambda data, _: [reply_to(data)]
            while up.health.is_down(at(first)):  # a probe comes beside somebody's question
                assert isinstance(await up.ask(NAME, 1), Answer)
                await asyncio.sleep(0.05)
            before = len(second.asked)
            assert isinstance(await up.ask(NAME, 1), Answer)
            assert len(second.asked) == before
            await up.close()

    run(test())


def test_refused_by_the_network_is_known_at_once() -> None:
    async def test() -> None:
        async with udp() as gone:
            nobody = at(gone)
        async with udp() as second:
            up = Upstream((nobody, at(second)))
            begun = asyncio.get_running_loop().time()
            assert isinstance(await up.ask(NAME, 1), Answer)
            assert asyncio.get_running_loop().time() - begun < 0.5
            assert up.health.order(now=begun) == (at(second), nobody)

    run(test())


def test_a_server_that_refuses_a_name_is_not_down() -> None:
    async def test() -> None:
        def refuse(data: bytes, _: Any) -> list[bytes]:
            record = dnslib.DNSRecord.parse(data).reply()
            record.header.rcode = 5
            return [bytes(record.pack())]

        async with udp(answers=refuse) as first, udp() as second:
            up = Upstream((at(first), at(second)))
            assert isinstance(await up.ask(NAME, 1), Answer)
            assert not up.health.is_down(at(first))

    run(test())


def test_a_workspace_with_silent_names_holds_up_nobody_else() -> None:
    async def test() -> None:
        def answers(data: bytes, _: Any) -> list[bytes]:
            return [] if b"silent" in data else [reply_to(data)]

        async with udp(answers=answers) as server:
            up = Upstream((at(server),))
            silent = [
                asyncio.create_task(up.ask(labels_of(f"n{n}.silent.example"), 1, workspace="acme"))
                for n in range(200)
            ]
            await asyncio.sleep(0.1)
            assert len(server.asked) == 16
            async with asyncio.timeout(0.5):
                assert isinstance(await up.ask(NAME, 1, workspace="zeta"), Answer)
                assert isinstance(await up.ask(NAME, 1), Answer)
            for task in silent:
                task.cancel()

    run(test())


# ---- streams


@dataclass
class Tcp:
    """A server of streams. `after` questions a connection ends without an answer; 0 is never."""

    answer: Callable[[bytes], list[bytes]] = lambda data: [reply_to(data)]
    after: int = 0
    hold: int = 0  # answer only when so many questions are there, the last one first
    asked: list[bytes] = field(default_factory=list)
    connections: int = 0
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        held: list[bytes] = []
        with contextlib.suppress(OSError, EOFError):
            for number in range(1, 1000):
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                data = await reader.readexactly(length)
                if number == self.after:
                    break
                self.asked.append(data)
                held.append(data)
                if len(held) >= self.hold:
                    for each in reversed(held):
                        for answer in self.answer(each):
                            writer.write(struct.pack("!H", len(answer)) + answer)
                    held.clear()
        writer.close()


@contextlib.asynccontextmanager
async def tcp(
    address: str = "127.0.0.1", tls: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[Tcp]:
    made = Tcp(**options)
    server = await asyncio.start_server(made.serve, address, 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()


@pytest.mark.parametrize("address", LOOPBACKS, ids=["v4", "v6"])
def test_questions_share_a_connection_and_answers_come_in_any_order(address: str) -> None:
    async def test() -> None:
        async with tcp(address, hold=20) as server:
            up = Upstream((at(server, address=address, transport=Transport.TCP),))
            names = [labels_of(f"n{number}.example.com") for number in range(20)]
            answers = await asyncio.gather(*(up.ask(name, 1) for name in names))
            assert answers == [Answer(0, (GOOD,), 60)] * 20
            assert (server.connections, len(server.asked)) == (1, 20)
            await up.close()

    run(test())


def test_a_kept_connection_that_ended_costs_a_new_one_not_the_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with tcp(after=2) as server:
            up = Upstream((at(server, transport=Transport.TCP),))
            failures: list[Server] = []
            monkeypatch.setattr(up.health, "failed", lambda failed, **_: failures.append(failed))
            for _ in range(3):
                assert await up.ask(NAME, 1) == Answer(0, (GOOD,), 60)
            assert (server.connections, failures) == (3, [])
            await up.close()

    run(test())


def test_a_new_connection_that_ends_at_once_is_a_failure() -> None:
    async def test() -> None:
        async with tcp(after=1) as server:
            up = Upstream((at(server, transport=Transport.TCP),))
            result = await up.ask(NAME, 1)
            assert isinstance(result, Failure)
            assert (result.code, "closed the connection" in result.text) == (23, True)
            assert server.connections == 2
            await up.close()

    run(test())


def test_an_unused_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_IDLE", 0.2)

    async def test() -> None:
        async with tcp() as server:
            up = Upstream((at(server, transport=Transport.TCP),))
            await up.ask(NAME, 1)
            descriptors = _descriptors()
            while _descriptors() >= descriptors:
                await asyncio.sleep(0.02)
            assert await up.ask(NAME, 1) == Answer(0, (GOOD,), 60)
            assert server.connections == 2
            await up.close()

    run(test())


def _descriptors() -> int:
    gc.collect()  # what an earlier test let go of is not closed in the middle of this one
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("wrong", ["question", "no response", "two questions", "cut"])
def test_nonsense_over_a_stream_ends_it(wrong: str) -> None:
    async def test() -> None:
        async with (
            tcp(answer=lambda data: [FORGERIES[wrong](reply_to(data, str(BAD)))]) as bad,
            udp() as good,
        ):
            up = Upstream((at(bad, transport=Transport.TCP), at(good)))
            assert await up.ask(NAME, 1) == Answer(0, (GOOD,), 60)
            assert len(bad.asked) == 1
            await up.close()

    run(test())


def test_answers_to_ids_nobody_asked_with_are_passed_over() -> None:
    async def test() -> None:
        def answer(data: bytes) -> list[bytes]:
            return [FORGERIES["id"](reply_to(data, str(BAD))), b"", b"\0", reply_to(data)]

        async with tcp(answer=answer) as server:
            up = Upstream((at(server, transport=Transport.TCP),))
            assert await up.ask(NAME, 1) == Answer(0, (GOOD,), 60)
            await up.close()

    run(test())


@pytest.fixture(scope="module")
def certificates() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="egressd-upstream-") as made:
        yield make_certificates(Path(made), "dns.example")


def tls_server(leaf: Path, *, newest: bool = True) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf)
    if not newest:
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def secure(server: Tcp, name: str = "dns.example") -> Server:
    return Server(Transport.TLS, ip_address("127.0.0.1"), server.port, name)


def test_tls_carries_many_questions_over_one_connection(certificates: tuple[Path, Path]) -> None:
    ca, leaf = certificates

    async def test() -> None:
        async with tcp(tls=tls_server(leaf), hold=10) as server:
            up = Upstream((secure(server),), ca_file=str(ca))
            names = [labels_of(f"n{number}.example.com") for number in range(10)]
            assert await asyncio.gather(*(up.ask(n, 1) for n in names)) == [Answer(0, (GOOD,), 60)] * 10
            assert server.connections == 1
            await up.close()

    run(test())


@pytest.mark.parametrize(
    ("name", "trusted", "says"),
    [
        ("other.example", True, "its certificate is not accepted: Hostname mismatch"),
        ("dns.example", False, "its certificate is not accepted: unable to get local issuer certificate"),
    ],
)
def test_a_certificate_that_does_not_fit_is_said(
    certificates: tuple[Path, Path], name: str, trusted: bool, says: str
) -> None:
    ca, leaf = certificates

    async def test() -> None:
        async with tcp(tls=tls_server(leaf)) as server:
            up = Upstream((secure(server, name),), ca_file=str(ca) if trusted else None)
            result = await up.ask(NAME, 1)
            assert isinstance(result, Failure)
            assert (result.code, says in result.text) == (23, True), result.text
            assert server.asked == []
            await up.close()

    run(test())


def test_a_server_that_speaks_no_tls_or_an_old_one_is_said(certificates: tuple[Path, Path]) -> None:
    ca, _ = certificates

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await writer.drain()
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(plain, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        up = Upstream((Server(Transport.TLS, ip_address("127.0.0.1"), port, "dns.example"),), ca_file=str(ca))
        result = await up.ask(NAME, 1)
        assert isinstance(result, Failure)
        assert "(TLS: " in result.text, result.text
        await up.close()
        server.close()

    run(test())


def test_truncated_is_asked_again_over_a_stream_of_the_same_server() -> None:
    async def test() -> None:
        async with tcp() as stream:

            def cut(data: bytes, _: Any) -> list[bytes]:
                record = dnslib.DNSRecord.parse(data).reply()
                record.header.tc = 1
                return [bytes(record.pack())]

            loop = asyncio.get_running_loop()
            datagrams = Udp(answers=cut)
            transport, _ = await loop.create_datagram_endpoint(
                lambda: datagrams, local_addr=("127.0.0.1", stream.port)
            )
            up = Upstream((at(stream),), mixed_case=True)
            for _ in range(3):
                assert await up.ask(NAME, 1) == Answer(0, (GOOD,), 60)
            assert (len(datagrams.asked), len(stream.asked), stream.connections) == (3, 3, 1)
            transport.close()
            await up.close()

    run(test())


def test_with_nobody_to_ask_no_socket_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket")

    async def test() -> None:
        monkeypatch.setattr(upstream.socket, "socket", forbidden)
        monkeypatch.setattr(asyncio, "open_connection", forbidden)
        up = Upstream(())
        assert await up.ask(NAME, 1) == Failure(22, "no upstream server is configured")
        await up.close()

    run(test())
