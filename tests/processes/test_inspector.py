"""The inspector, whole: a client in a sandbox, servers at the synthetic addresses, and what lies between."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from auditor_lab import until
from inspector_lab import (
    BLOCK,
    HOST,
    INDEX,
    PORT,
    Inspector,
    World,
    hello,
    real_hello,
    records,
    server_hello,
    site,
    slot_address,
)
from relay_lab import OTHER4, OTHER6, SOURCE4, SOURCE6, UID
from test_relay import assert_reset, fill, free_descriptors, limit_descriptors, read_all, reset

from egressd.ipc import messages
from egressd.processes import flows
from egressd.ruleset.layout import dial_source
from lab.scale import scaled

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces and a process that gives up root"),
]

BOTH = pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
GOOD = hello(HOST)
ANSWER = server_hello()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture
def fresh(world: World) -> Iterator[Inspector]:
    """Nobody has told it anything yet."""
    running = Inspector(world)
    try:
        yield running.ready()
    finally:
        running.kill()


@pytest.fixture
def inspector(fresh: Inspector) -> Inspector:
    """Workspace acme may ask for HOST; link 7 belongs to it."""
    fresh.bind()
    fresh.sites(site())
    return fresh


@pytest.fixture
def server(world: World) -> Iterator[socket.socket]:
    with world.server() as listener:
        yield listener


@pytest.fixture
def servers(world: World, server: socket.socket) -> Iterator[dict[bool, socket.socket]]:
    """By family."""
    with world.server(v6=True) as listener:
        yield {False: server, True: listener}


def dial(
    inspector: Inspector, *, v6: bool = False, block: int = BLOCK, port: int = PORT, **how
) -> socket.socket:
    return inspector.network.client(block, port, v6=v6, **how)


def joined(
    inspector: Inspector, listener: socket.socket, *, v6: bool = False, said: bytes = GOOD, **how
) -> tuple[socket.socket, socket.socket]:
    """(client, server), the hello through and answered."""
    client = dial(inspector, v6=v6, **how)
    client.sendall(said)
    server = accepted(listener, said)
    server.sendall(ANSWER)
    assert read(client, len(ANSWER)) == ANSWER
    return client, server


def accepted(listener: socket.socket, said: bytes) -> socket.socket:
    """The server's side, which has received exactly this."""
    server, _ = listener.accept()
    server.settimeout(10)
    assert read(server, len(said)) == said
    return server


def read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def nothing_comes(listener: socket.socket, *, within: float = 0.1) -> bool:
    return not select.select([listener], [], [], within)[0]


def refused(inspector: Inspector, said: bytes, *, end: bool = False, **how) -> dict:
    """The connection that says this is reset; what was recorded of it."""
    before = len(inspector.events("flow-refused"))
    with contextlib.suppress(ConnectionResetError), dial(inspector, **how) as client:
        client.sendall(said)
        if end:
            client.shutdown(socket.SHUT_WR)
        assert_reset(client)
    return inspector.wait_for("flow-refused", before + 1)[before]


# ---- let through


@BOTH
@pytest.mark.parametrize(
    "said", [GOOD, real_hello(HOST), hello("API.Example.COM")], ids=["small", "openssl", "case"]
)
def test_the_host_that_was_meant_is_reached_byte_for_byte(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool, said: bytes
) -> None:
    client, server = joined(inspector, servers[v6], v6=v6, said=said)
    with client, server:
        assert server.getsockname()[0] == slot_address(0, v6=v6)
        assert server.getpeername()[0] == str(dial_source(INDEX)[v6])
        client.sendall(b"question")
        assert read(server, 8) == b"question"
    (closed,) = inspector.wait_for("flow-closed")
    assert closed.pop("seconds") > 0
    assert closed == {
        "link": "eg7", "workspace": "acme", "host": HOST, "port": PORT, "asked": HOST, "ech": False,
        "how": "finished", "source": SOURCE6 if v6 else SOURCE4, "destination": slot_address(0, v6=v6),
        "bytes_out": len(said) + 8, "bytes_in": len(ANSWER),
    }  # fmt: skip
    assert inspector.refused() == {}


@BOTH
def test_the_slot_that_was_dialed_is_dialed(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    for slot in range(4):
        client, server = joined(inspector, servers[v6], v6=v6, slot=slot)
        with client, server:
            assert server.getsockname()[0] == slot_address(slot, v6=v6)


@BOTH
def test_a_hello_may_come_in_any_two_pieces(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    said = real_hello(HOST)
    for cut in range(1, len(said), 37):
        with dial(inspector, v6=v6) as client:
            client.sendall(said[:cut])
            time.sleep(0.002)
            client.sendall(said[cut:])
            accepted(servers[v6], said).close()


@BOTH
@pytest.mark.parametrize("record", [1 << 14, 1])
def test_a_hello_may_come_byte_by_byte_in_records_of_any_size(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool, record: int
) -> None:
    said = hello(HOST, record=record)
    with dial(inspector, v6=v6) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(said)):
            client.sendall(said[at : at + 1])
        accepted(servers[v6], said).close()


def test_a_hello_of_several_segments_and_what_follows_it_arrive(
    inspector: Inspector, server: socket.socket
) -> None:
    said = hello(HOST, padding=12_000) + b"\x17\3\3\0\5early"
    client, end = joined(inspector, server, said=said)
    client.close()
    end.close()


def test_an_ech_goes_where_it_is_allowed_and_is_told(inspector: Inspector, server: socket.socket) -> None:
    inspector.sites(site(ech=True))
    client, end = joined(inspector, server, said=hello(HOST, ech=True))
    client.close()
    end.close()
    assert inspector.wait_for("flow-closed")[0]["ech"] is True


# ---- refused


REFUSED = [
    (hello("evil.example.net"), "sni-other", "'evil.example.net'"),
    (hello("sub." + HOST), "sni-other", f"'sub.{HOST}'"),
    (hello("example.com"), "sni-other", "'example.com'"),
    (real_hello("evil.example.net"), "sni-other", "'evil.example.net'"),
    (hello(), "sni-missing", ""),
    (real_hello(None), "sni-missing", ""),
    (hello("192.0.2.1"), "sni-address", "'192.0.2.1'"),
    (hello("2001:db8::1"), "sni-address", "'2001:db8::1'"),
    (hello(HOST, "evil.example.net"), "sni-repeated", f"'{HOST}', 'evil.example.net'"),
    (hello(HOST, ech=True), "ech", f"'{HOST}'"),
    (hello("evil.example.net", ech=True), "sni-other", "'evil.example.net'"),
    (b"GET / HTTP/1.1\r\nHost: api.example.com", "not-tls", "'GET / HTTP/1.1\\r\\nHost: api.exampl'"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "not-tls", "'SSH-2.0-OpenSSH_9.2\\r\\n'"),
    (hello(HOST + "."), "hello-malformed", f"'{HOST}.'"),
    (hello(HOST + "\0evil"), "hello-malformed", f"'{HOST}\\x00evil'"),
    (hello("\x1b[31m\n"), "hello-malformed", "'\\x1b[31m\\n'"),
    (records(b"\1\2\0\0" + bytes(600)), "hello-too-long", ""),
]  # fmt: skip


@BOTH
def test_what_is_refused_is_reset_counted_and_recorded_and_nothing_goes_out(
    inspector: Inspector, world: World, v6: bool
) -> None:
    """Each at a port of its own, so that each has its own record."""
    ports = range(10_000, 10_000 + len(REFUSED))
    inspector.sites(*(site(port=port) for port in ports))
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(world.server(v6=v6, port=port)) for port in ports]
        for port, (said, _, _) in zip(ports, REFUSED, strict=True):
            with contextlib.suppress(ConnectionResetError), dial(inspector, v6=v6, port=port) as client:
                client.sendall(said)
                started = time.monotonic()
                assert_reset(client)
                assert time.monotonic() - started < 1
        assert inspector.refused() == {"acme": Counter(reason for _, reason, _ in REFUSED)}
        assert not select.select(listeners, [], [], 0.05)[0]
    found = {f["port"]: f for f in inspector.wait_for("flow-refused", len(REFUSED))}
    for port, (_, reason, asked) in zip(ports, REFUSED, strict=True):
        assert found[port].pop("detail")
        assert found[port] == {
            "link": "eg7", "workspace": "acme", "host": HOST, "port": port, "reason": reason, "asked": asked,
            "source": SOURCE6 if v6 else SOURCE4, "destination": slot_address(0, v6=v6), "connections": 1,
        }  # fmt: skip
    assert not inspector.events("flow-closed")


@BOTH
def test_a_hello_that_stops_in_the_middle(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    assert refused(inspector, GOOD[:40], end=True, v6=v6)["reason"] == "hello-malformed"
    assert nothing_comes(servers[v6])


def test_a_hello_that_takes_too_long(inspector: Inspector, server: socket.socket) -> None:
    """Ten seconds for the whole, however often a byte comes."""
    silent, slow = dial(inspector), dial(inspector, v6=True)
    started = time.monotonic()
    with silent, slow:
        at = 0
        while time.monotonic() - started < 9:
            slow.sendall(GOOD[at : at + 1])
            at += 1
            time.sleep(0.3)
        for client in (silent, slow):
            assert_reset(client)
    assert 9.9 < time.monotonic() - started < 11.5
    assert inspector.refused() == {"acme": {"hello-too-slow": 2}}
    assert nothing_comes(server)


@BOTH
def test_who_says_nothing_and_leaves_is_not_refused(inspector: Inspector, v6: bool) -> None:
    dial(inspector, v6=v6).close()
    assert inspector.wait_for("flow-failed")[0]["reason"] == "unused"
    reset(dial(inspector, v6=v6))
    assert inspector.wait_for("flow-failed", 2)[1]["reason"] in ("reset", "unused")
    assert inspector.refused() == {}


@BOTH
def test_a_source_that_is_not_bound(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    record = refused(inspector, GOOD, v6=v6, source=OTHER6 if v6 else OTHER4)
    assert (record["link"], record["workspace"], record["reason"]) == (None, None, "source")
    assert nothing_comes(servers[v6])


@BOTH
def test_what_is_not_a_site_is_refused_and_says_which(inspector: Inspector, v6: bool) -> None:
    for block, port in ((BLOCK + 1, PORT), (BLOCK, PORT + 1)):
        record = refused(inspector, GOOD, block=block, port=port, v6=v6)
        assert (record["workspace"], record["reason"]) == ("acme", "unlisted")
        assert (record["destination"], record["port"]) == (slot_address(0, v6=v6, block=block), port)
    assert inspector.refused() == {"acme": {"unlisted": 2}}


@BOTH
def test_a_site_belongs_to_its_workspace(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    inspector.bind(link=8, workspace="other", source4=OTHER4, source6=OTHER6)
    record = refused(inspector, GOOD, v6=v6, source=OTHER6 if v6 else OTHER4)
    assert (record["link"], record["workspace"], record["reason"]) == ("eg8", "other", "unlisted")


def test_before_the_controller_speaks_nothing_passes(fresh: Inspector) -> None:
    assert refused(fresh, GOOD)["reason"] == "source"


def test_the_same_again_and_again_is_one_record_with_its_count(inspector: Inspector) -> None:
    for i in range(50):
        with contextlib.suppress(ConnectionResetError), dial(inspector) as client:
            client.sendall(hello(f"x{i}.example.net"))
            assert_reset(client)
    until(lambda: sum(f["connections"] for f in inspector.events("flow-refused")) == 50)
    assert len(inspector.events("flow-refused")) <= 3
    assert inspector.refused() == {"acme": {"sni-other": 50}}


def test_who_asks_what_was_refused_finds_it_on_record(inspector: Inspector) -> None:
    """A proof may be made of it: nothing waits for the end of its second."""
    with contextlib.suppress(ConnectionResetError), dial(inspector) as client:
        client.sendall(hello("x.example.net"))
        assert_reset(client)
    began = time.monotonic()
    assert inspector.refused() == {"acme": {"sni-other": 1}}
    until(lambda: inspector.events("flow-refused"))
    assert time.monotonic() - began < 0.5


# ---- a second hello


def retried(inspector: Inspector, listener: socket.socket, v6: bool) -> tuple[socket.socket, socket.socket]:
    client = dial(inspector, v6=v6)
    client.sendall(GOOD)
    server = accepted(listener, GOOD)
    server.sendall(server_hello(retry=True))
    assert client.recv(1000) == server_hello(retry=True)
    return client, server


@BOTH
def test_a_second_hello_for_the_same_host_goes_on(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    client, server = retried(inspector, servers[v6], v6)
    with client, server:
        client.sendall(b"\x14\3\3\0\1\1" + hello(HOST, padding=100))
        assert read(server, 6) == b"\x14\3\3\0\1\1"
        assert read(server, len(hello(HOST, padding=100))) == hello(HOST, padding=100)
        client.sendall(b"and more")
        assert read(server, 8) == b"and more"


@BOTH
def test_a_second_hello_for_another_host_is_not_sent(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    client, server = retried(inspector, servers[v6], v6)
    with client, server:
        client.sendall(hello("evil.example.net"))
        assert_reset(client)
        assert_reset(server)  # without a byte of it
    record = inspector.wait_for("flow-refused")[0]
    assert (record["reason"], record["asked"]) == ("sni-other", "'evil.example.net'")
    assert inspector.wait_for("flow-closed")[0]["bytes_out"] == len(GOOD)
    assert inspector.refused() == {"acme": {"sni-other": 1}}


@BOTH
def test_a_second_hello_that_nobody_asked_for_waits_for_the_answer(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    """Both in one segment, before the server can have said anything."""
    second = hello("evil.example.net")
    for answer in (server_hello(retry=True), None):
        client = dial(inspector, v6=v6)
        client.sendall(GOOD + second)
        server = accepted(servers[v6], GOOD)
        with client, server:
            assert nothing_comes(server)
            if answer is None:  # it hangs up instead
                client.shutdown(socket.SHUT_WR)
                assert nothing_comes(server)
                server.close()
                assert read_all(client) == b""
            else:
                server.sendall(answer)
                assert_reset(server)


def test_what_waited_goes_on_before_the_end_of_the_client(
    inspector: Inspector, server: socket.socket
) -> None:
    finished = records(b"\x14\0\0\0")  # a handshake record, which waits for the server's answer
    client = dial(inspector)
    client.sendall(GOOD + finished)
    client.shutdown(socket.SHUT_WR)
    end = accepted(server, GOOD)
    with client, end:
        assert nothing_comes(end)
        end.sendall(ANSWER)
        assert read_all(end) == finished
        end.close()
        assert read_all(client) == ANSWER


# ---- what TCP says


@BOTH
def test_the_end_of_either_side_is_passed_on_and_the_other_may_go_on(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    client, server = joined(inspector, servers[v6], v6=v6)
    with client, server:
        client.sendall(b"q" * 100_000)
        client.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"q" * 100_000
        answer = os.urandom(3_000_000)
        sender = threading.Thread(target=lambda: (server.sendall(answer), server.close()))
        sender.start()
        assert hashlib.sha256(read_all(client)).digest() == hashlib.sha256(answer).digest()
        sender.join()
    client, server = joined(inspector, servers[v6], v6=v6)
    with client, server:
        server.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
        client.sendall(b"late words")
        client.close()
        assert read_all(server) == b"late words"
    closed = inspector.wait_for("flow-closed", 2)
    assert [(c["bytes_out"] - len(GOOD), c["bytes_in"] - len(ANSWER), c["how"]) for c in closed] == [
        (100_000, 3_000_000, "finished"),
        (10, 0, "finished"),
    ]


@pytest.mark.parametrize("turns", range(1, 5))
@pytest.mark.parametrize("length", [0, 1, 16_384, 65_536, 65_537, 150_000])
def test_the_end_is_told_in_the_turn_that_sees_it(
    monkeypatch: pytest.MonkeyPatch, turns: int, length: int
) -> None:
    """A half that has read the end of its source, and not told, would wait for an event that never comes."""
    monkeypatch.setattr(flows, "_TURNS", turns)
    (near, source), (sink, far) = socket.socketpair(), socket.socketpair()
    with near, source, sink, far:
        near.sendall(bytes(length))
        near.shutdown(socket.SHUT_WR)
        for sock in (source, sink):
            sock.setblocking(False)
        half = flows.Half(source, sink)
        while half.reading or half.held:
            half.pump()
        half.close()
        assert (half.done, half.moved) == (True, length)
        assert len(read_all(far)) == length


@BOTH
@pytest.mark.parametrize("unread", [False, True])
def test_a_reset_is_passed_on_in_both_directions(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool, unread: bool
) -> None:
    for who in (0, 1):
        pair = joined(inspector, servers[v6], v6=v6)
        if unread:
            fill(pair[0])
        reset(pair[who])
        with pair[1 - who]:
            assert_reset(pair[1 - who])
    assert [closed["how"] for closed in inspector.wait_for("flow-closed", 2)] == ["reset", "reset"]


@BOTH
@pytest.mark.parametrize("who", [0, 1], ids=["client", "server"])
def test_who_does_not_read_stops_the_other(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool, who: int
) -> None:
    pair = joined(inspector, servers[v6], v6=v6)
    with pair[0], pair[1]:
        sent = fill(pair[1 - who])
        cpu = inspector.cpu_seconds()
        time.sleep(0.4)  # it waits, and does not spin while it does
        assert inspector.cpu_seconds() - cpu < 0.2
        assert 100_000 < sent < 64 << 20
        pair[1 - who].shutdown(socket.SHUT_WR)
        assert len(read_all(pair[who])) == sent
        # and others go on meanwhile
        for end in joined(inspector, servers[v6], v6=v6):
            end.close()


def test_many_large_streams_without_pipes_to_spare_are_still_whole(
    inspector: Inspector, server: socket.socket
) -> None:
    """More than the user's share of pipe pages (64 MiB) carries: the rest is copied."""
    pairs = [joined(inspector, server) for _ in range(80)]
    for client, _ in pairs:
        fill_some(client, 200_000)
    for client, end in pairs:
        assert len(read(end, 200_000)) == 200_000
        end.sendall(b"x" * 200_000)
        assert len(read(client, 200_000)) == 200_000
    for pair in pairs:
        for end in pair:
            end.close()


def fill_some(sock: socket.socket, count: int) -> None:
    sock.settimeout(10)
    sock.sendall(bytes(count))


def test_a_flow_that_says_nothing_is_reset(inspector: Inspector, server: socket.socket) -> None:
    inspector.sites(site(idle=1.0), site("other.example", block=6))
    quiet, kept = joined(inspector, server), joined(inspector, server)
    other = joined(inspector, server, block=6, said=hello("other.example"))
    started = time.monotonic()
    while time.monotonic() - started < 2.0:  # a byte now and then is enough
        kept[1].sendall(b".")
        kept[0].recv(1)
        time.sleep(0.2)
    for end in quiet:
        assert_reset(end, within=0.1)
    for client, end in (kept, other):
        client.sendall(b"on")
        assert read(end, 2) == b"on"
        client.close()
        end.close()
    assert [c["how"] for c in inspector.wait_for("flow-closed", 3)] == ["idle", "finished", "finished"]


# ---- dialing


@BOTH
def test_a_server_that_is_down_is_a_reset_and_a_record(inspector: Inspector, v6: bool) -> None:
    with contextlib.suppress(ConnectionResetError), dial(inspector, v6=v6) as client:
        client.sendall(GOOD)
        started = time.monotonic()
        assert_reset(client)
        assert time.monotonic() - started < 0.5
    (failed,) = inspector.wait_for("flow-failed")
    assert (failed["link"], failed["host"], failed["reason"]) == ("eg7", HOST, "econnrefused")
    assert inspector.refused() == {}


@BOTH
def test_another_slot_or_the_other_family_is_tried_at_once(
    inspector: Inspector, world: World, v6: bool
) -> None:
    for family, slot in ((v6, 3), (not v6, 2)):
        address = slot_address(slot, v6=family)
        with world.server(v6=family, address=address) as listener:
            started = time.monotonic()
            client, server = joined(inspector, listener, v6=v6)
            with client, server:
                assert time.monotonic() - started < 0.3
                assert server.getsockname()[0] == address


@BOTH
def test_an_address_that_does_not_answer_costs_a_quarter_of_a_second(
    inspector: Inspector, servers: dict[bool, socket.socket], world: World, v6: bool
) -> None:
    with world.silence(slot_address(0, v6=v6)):
        started = time.monotonic()
        client, server = joined(inspector, servers[not v6], v6=v6)
        with client, server:
            assert 0.2 < time.monotonic() - started < 0.6
            assert server.getsockname()[0] == slot_address(0, v6=not v6)


@pytest.mark.slow
def test_a_host_that_does_not_answer_at_all_is_given_up(inspector: Inspector, world: World) -> None:
    with world.silence(*(slot_address(slot, v6=v6) for v6 in (False, True) for slot in range(4))):
        before = inspector.descriptors()
        with dial(inspector) as client:
            client.sendall(GOOD)
            time.sleep(3)
            assert inspector.descriptors() - before <= 6
            assert_reset(client, within=9)
        assert inspector.wait_for("flow-failed")[0]["reason"] == "etimedout"
        assert inspector.descriptors() == before


def test_a_client_that_goes_away_while_we_dial(inspector: Inspector, world: World) -> None:
    with world.silence(slot_address(0, v6=False)):
        before = inspector.descriptors()
        client = dial(inspector)
        client.sendall(GOOD[:50])
        time.sleep(0.05)
        client.sendall(GOOD[50:])
        time.sleep(0.05)
        reset(client)
        until(lambda: inspector.descriptors() == before)


# ---- revocation


@BOTH
@pytest.mark.parametrize("way", ["set", "remove", "other-host", "other-index"])
def test_a_site_that_is_taken_away_ends_exactly_its_flows_before_done(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool, way: str
) -> None:
    second = site("second.example", block=6)
    assert inspector.add(second) == 0
    gone = joined(inspector, servers[v6], v6=v6)
    half = dial(inspector, v6=v6)
    half.sendall(GOOD[:20])
    kept = joined(inspector, servers[v6], v6=v6, block=6, said=hello("second.example"))
    until(lambda: inspector.descriptors() > 10)
    time.sleep(0.05)
    closed = {
        "set": lambda: inspector.sites(second),
        "remove": lambda: inspector.remove(site()),
        "other-host": lambda: inspector.add(site("new.example")),
        "other-index": lambda: inspector.sites(second, site(index=INDEX + 1)),
    }[way]()
    assert closed == 2
    for end in (*gone, half):
        assert_reset(end, within=0.2)
    kept[0].sendall(b"still here")
    assert read(kept[1], 10) == b"still here"
    for end in kept:
        end.close()
    assert [c["how"] for c in inspector.wait_for("flow-closed", 2)] == ["revoked", "finished"]


def test_sites_that_stay_or_change_their_terms_only_cut_nothing(
    inspector: Inspector, server: socket.socket
) -> None:
    client, end = joined(inspector, server)
    with client, end:
        for change in (site(), site(idle=60.0), site(ech=True), site()):
            assert inspector.sites(change) == 0
            assert inspector.add(change) == 0
        assert inspector.remove(site("other.example"), site(block=9)) == 0
        client.sendall(b"on")
        assert read(end, 2) == b"on"


def test_ech_that_is_no_longer_allowed_ends_the_flows_that_used_it(
    inspector: Inspector, server: socket.socket
) -> None:
    inspector.sites(site(ech=True))
    plain, hidden = joined(inspector, server), joined(inspector, server, said=hello(HOST, ech=True))
    assert inspector.sites(site()) == 1
    assert_reset(hidden[0], within=0.2)
    plain[0].sendall(b"on")
    assert read(plain[1], 2) == b"on"
    for sock in (*plain, *hidden):
        sock.close()


def test_a_sandbox_that_ends_takes_its_flows_along(inspector: Inspector, server: socket.socket) -> None:
    inspector.bind(link=8, source4=OTHER4, source6=OTHER6)
    gone, kept = joined(inspector, server), joined(inspector, server, source=OTHER4)
    inspector.unbind(7)
    for end in gone:
        assert_reset(end, within=0.2)
    kept[0].sendall(b"I stay")
    assert read(kept[1], 6) == b"I stay"
    assert refused(inspector, GOOD)["reason"] == "source"
    for sock in (*gone, *kept):
        sock.close()


@BOTH
def test_a_controller_that_comes_back_cuts_nothing_it_confirms(
    inspector: Inspector, servers: dict[bool, socket.socket], v6: bool
) -> None:
    inspector.bind(link=8, source4=OTHER4, source6=OTHER6)
    kept = joined(inspector, servers[v6], v6=v6)
    gone = joined(inspector, servers[v6], v6=v6, source=OTHER6 if v6 else OTHER4)
    inspector.controller.close()
    joined(inspector, servers[v6], v6=v6)[0].close()  # it is not needed for what was permitted
    inspector.new_controller()
    inspector.bind()
    for client, end in (kept, gone):
        client.sendall(b"on")
        assert read(end, 2) == b"on"
    assert inspector.sites(site()) == 0
    for end in gone:
        assert_reset(end, within=0.2)
    kept[0].sendall(b"on")
    assert read(kept[1], 2) == b"on"
    for sock in (*kept, *gone):
        sock.close()


@pytest.mark.parametrize("rubbish", [b"rubbish", b'{"type":"SetSites"}', b'{"type":"Done","request":1}'])
def test_a_controller_that_talks_rubbish_is_heard_no_more(inspector: Inspector, rubbish: bytes) -> None:
    inspector.controller.socket.send(rubbish)
    inspector.controller.socket.settimeout(10)
    assert inspector.controller.socket.recv(10) == b""
    assert inspector.process.poll() is None


# ---- bounds


def test_a_sandbox_has_128_hellos_open_and_another_still_gets_its_own(
    inspector: Inspector, server: socket.socket
) -> None:
    inspector.bind(link=8, source4=OTHER4, source6=OTHER6)
    with contextlib.ExitStack() as stack:
        for _ in range(128):
            stack.enter_context(dial(inspector))
        assert refused(inspector, GOOD)["reason"] == "connections"
        for end in joined(inspector, server, source=OTHER4):
            end.close()
    until(lambda: len(inspector.events("flow-failed")) > 0)
    for end in joined(inspector, server):
        end.close()


def test_no_workspace_takes_all_that_the_descriptors_carry(world: World, server: socket.socket) -> None:
    inspector = Inspector(world, descriptors=124)  # (124 - 64) // 6 = 10
    try:
        inspector.ready().bind()
        inspector.bind(link=8, workspace="other", source4=OTHER4, source6=OTHER6)
        inspector.sites(site(), site(workspace="other"))
        with contextlib.ExitStack() as stack:
            for source, room in ((SOURCE4, 5), (OTHER4, 3)):
                for _ in range(room):
                    for end in joined(inspector, server, source=source):
                        stack.enter_context(end)
                assert refused(inspector, GOOD, source=source)["reason"] == "limit"
        assert inspector.refused() == {"acme": {"limit": 1}, "other": {"limit": 1}}
    finally:
        inspector.kill()


def test_without_descriptors_callers_are_reset_and_it_recovers(
    inspector: Inspector, server: socket.socket
) -> None:
    client, end = joined(inspector, server)
    limit_descriptors(inspector, free_descriptors(inspector)[1])  # room for the client, none to dial
    for _ in range(3):
        with contextlib.suppress(ConnectionResetError), dial(inspector) as another:
            another.sendall(GOOD)
            assert_reset(another)
    limit_descriptors(inspector, free_descriptors(inspector)[0])
    with contextlib.suppress(ConnectionResetError), dial(inspector) as another:
        assert_reset(another)
    client.sendall(b"unharmed")
    assert read(end, 8) == b"unharmed"
    limit_descriptors(inspector, 1024)
    for sock in (*joined(inspector, server), client, end):
        sock.close()
    assert {f["reason"] for f in inspector.wait_for("flow-failed")} == {"emfile"}


def come_and_go(inspector: Inspector, listeners: dict[bool, socket.socket], count: int, seed: int) -> None:
    """Connections that end anywhere, in any way; afterwards not a descriptor is left."""
    before, dice = inspector.descriptors(), random.Random(seed)
    stop = threading.Event()
    serving = [threading.Thread(target=serve, args=(listeners[v6], seed, stop)) for v6 in (False, True)]
    for thread in serving:
        thread.start()
    try:
        for i in range(count):
            client = dial(inspector, v6=dice.random() < 0.5, slot=dice.randrange(4))
            said = dice.choice([GOOD, GOOD, GOOD, hello("evil.example"), real_hello(HOST), b"rubbish", b""])
            with contextlib.suppress(OSError):
                client.sendall(said[: dice.choice([len(said), dice.randrange(len(said) + 1)])])
                if dice.random() < 0.5:
                    client.settimeout(0.005)
                    client.recv(1000)
                if dice.random() < 0.2:
                    client.sendall(bytes(dice.randrange(300_000)))
            (reset if dice.random() < 0.5 else socket.socket.close)(client)
            if i % 64 == 0:
                inspector.events("flow-closed")  # somebody must read them
    finally:
        stop.set()
        for thread in serving:
            thread.join()
    until(lambda: inspector.descriptors() == before, what="all descriptors closed", seconds=15)
    assert inspector.process.poll() is None


def serve(listener: socket.socket, seed: int, stop: threading.Event) -> None:
    dice = random.Random(seed)
    held: list[socket.socket] = []
    while not stop.is_set():
        if not select.select([listener], [], [], 0.05)[0]:
            continue
        server, _ = listener.accept()
        with contextlib.suppress(OSError):
            server.settimeout(0.003)
            if dice.random() < 0.7:
                server.recv(5000)
            if dice.random() < 0.7:
                server.sendall(ANSWER + bytes(dice.randrange(2000)))
        held.append(server)
        while len(held) > dice.randrange(20):
            (reset if dice.random() < 0.5 else socket.socket.close)(held.pop(dice.randrange(len(held))))
    for server in held:
        server.close()


def test_connections_that_come_and_go_leave_nothing(
    inspector: Inspector, servers: dict[bool, socket.socket]
) -> None:
    come_and_go(inspector, servers, 150, seed=1)


@pytest.mark.slow
def test_ten_thousand_connections_that_come_and_go_leave_nothing(
    inspector: Inspector, servers: dict[bool, socket.socket]
) -> None:
    come_and_go(inspector, servers, scaled(10_000, least=500), seed=2)


# ---- the process


def test_it_has_no_right_left(inspector: Inspector) -> None:
    status = Path(f"/proc/{inspector.process.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(UID)] * 4
    assert [int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapInh")] == [0] * 4


def test_told_to_stop_it_resets_what_is_open_and_says_the_totals(
    inspector: Inspector, server: socket.socket
) -> None:
    ends = [*joined(inspector, server), *joined(inspector, server), dial(inspector)]
    inspector.process.send_signal(signal.SIGTERM)
    assert inspector.process.wait(10) == 0
    for end in ends:
        assert_reset(end)
        end.close()
    with contextlib.suppress(EOFError):
        inspector.events("flow-totals")
    totals = [
        dict(e.fields) for e in inspector.seen if isinstance(e, messages.Event) and e.event == "flow-totals"
    ]
    assert totals == [
        {
            "workspace": "acme",
            "host": HOST,
            "flows": 2,
            "bytes_out": 2 * len(GOOD),
            "bytes_in": 2 * len(ANSWER),
        }
    ]


def test_it_ends_with_the_supervisor(fresh: Inspector) -> None:
    fresh.supervisor.close()
    assert fresh.process.wait(10) == 0


def test_an_auditor_that_comes_anew_or_reads_nothing_stops_nobody(
    inspector: Inspector, server: socket.socket
) -> None:
    client, end = joined(inspector, server)
    old, inspector.audit = inspector.audit, inspector.introduce("audit", messages.TO_AUDITOR)
    inspector.bind()  # answered after the new socket was taken
    client.close()
    end.close()
    inspector.wait_for("flow-closed")
    old.close()
    for _ in range(40):
        client, end = joined(inspector, server)
        client.close()
        end.close()
    for sock in joined(inspector, server):
        sock.close()
