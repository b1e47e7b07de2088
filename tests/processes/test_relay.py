"""The relay, whole: a client in a sandbox, a service on the host's loopback, and what lies between."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from auditor_lab import until
from relay_lab import OTHER4, OTHER6, POOLS, SOURCE4, SOURCE6, UID, Network, Relay, announced

from egressd.ipc import messages
from egressd.processes.closings import EACH

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces and a process that gives up root"),
]

PORT = 11434
BOTH = pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    made = Network()
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture
def relay(network: Network) -> Iterator[Relay]:
    running = Relay(network)
    try:
        yield running.ready()
    finally:
        running.kill()


@pytest.fixture
def service(network: Network) -> Iterator[socket.socket]:
    with network.service(PORT) as listener:
        yield listener


@pytest.fixture
def ollama(relay: Relay, service: socket.socket) -> Relay:
    """Workspace acme may reach its service `ollama`; link 7 belongs to it."""
    relay.bind()
    relay.relays(announced())
    return relay


def connect(
    ollama: Relay, service: socket.socket, *, v6: bool = False, **how
) -> tuple[socket.socket, socket.socket]:
    """(client, server), joined by the relay."""
    client = ollama.network.client(5, PORT, v6=v6, **how)
    server, peer = service.accept()
    server.settimeout(10)
    assert peer[0] == "127.0.0.1"
    return client, server


def say(said: bytes, client: socket.socket, server: socket.socket) -> None:
    """Once this has arrived, the relay has seen both connections stand."""
    client.sendall(said)
    assert server.recv(len(said)) == said


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def assert_reset(sock: socket.socket, *, within: float = 5.0) -> None:
    """The other end has reset this connection: an error, not an end of file."""
    sock.settimeout(within)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            if sock.recv(1 << 16) == b"":
                raise AssertionError("it ended like a finished connection")


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    while chunk := sock.recv(1 << 16):
        data += chunk
    return bytes(data)


# ---- relaying


@BOTH
def test_bytes_go_both_ways_and_are_counted(ollama: Relay, service: socket.socket, v6: bool) -> None:
    client, server = connect(ollama, service, v6=v6)
    with client, server:
        say(b"question", client, server)
        server.sendall(b"the answer")
        assert client.recv(100) == b"the answer"
    (closed,) = ollama.wait_for("relay-closed")
    assert closed.pop("seconds") > 0
    assert closed == {
        "link": "eg7", "workspace": "acme", "service": "ollama", "port": PORT, "how": "finished",
        "source": SOURCE6 if v6 else SOURCE4, "destination": "fd53:e9::14" if v6 else "198.18.0.20",
        "bytes_out": 8, "bytes_in": 10,
    }  # fmt: skip
    assert not ollama.events("relay-denied")


def test_every_slot_of_the_block_leads_to_the_service(ollama: Relay, service: socket.socket) -> None:
    for slot in range(4):
        client, server = connect(ollama, service, slot=slot)
        with client, server:
            server.sendall(b"hello")
            assert client.recv(10) == b"hello"


@BOTH
def test_the_clients_end_is_passed_on_and_the_answer_still_comes(
    ollama: Relay, service: socket.socket, v6: bool
) -> None:
    client, server = connect(ollama, service, v6=v6)
    with client, server:
        client.sendall(b"q" * 100_000)
        client.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"q" * 100_000
        answer = os.urandom(3_000_000)
        sender = threading.Thread(target=lambda: (server.sendall(answer), server.close()))
        sender.start()
        assert hashlib.sha256(read_all(client)).digest() == hashlib.sha256(answer).digest()
        sender.join()
    (closed,) = ollama.wait_for("relay-closed")
    assert (closed["bytes_out"], closed["bytes_in"], closed["how"]) == (100_000, 3_000_000, "finished")


@BOTH
def test_the_services_end_is_passed_on_and_the_client_may_go_on(
    ollama: Relay, service: socket.socket, v6: bool
) -> None:
    client, server = connect(ollama, service, v6=v6)
    with client, server:
        server.sendall(b"bye")
        server.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"bye"
        client.sendall(b"late words")
        client.close()
        assert read_all(server) == b"late words"
    assert ollama.wait_for("relay-closed")[0]["bytes_out"] == 10


@BOTH
def test_a_reset_is_passed_on_in_both_directions(ollama: Relay, service: socket.socket, v6: bool) -> None:
    client, server = connect(ollama, service, v6=v6)
    say(b"?", client, server)
    with server:
        reset(client)
        assert_reset(server)
    client, server = connect(ollama, service, v6=v6)
    say(b"?", client, server)
    with client:
        reset(server)
        assert_reset(client)
    assert [closed["how"] for closed in ollama.wait_for("relay-closed", 2)] == ["reset", "reset"]


def test_a_service_that_does_not_read_stops_the_client(ollama: Relay, service: socket.socket) -> None:
    client, server = connect(ollama, service)
    with client, server:
        sent = fill(client)
        cpu = ollama.cpu_seconds()
        time.sleep(0.5)  # it waits, and does not spin while it does
        assert ollama.cpu_seconds() - cpu < 0.2
        assert 100_000 < sent < 64 << 20
        client.shutdown(socket.SHUT_WR)
        assert len(read_all(server)) == sent
    assert ollama.wait_for("relay-closed")[0]["bytes_out"] == sent


def fill(sock: socket.socket) -> int:
    """Send until nothing more fits for a quarter of a second."""
    sock.setblocking(False)
    sent = 0
    while select.select([], [sock], [], 0.25)[1]:
        with contextlib.suppress(BlockingIOError):
            sent += sock.send(bytes(1 << 16))
    sock.settimeout(10)
    return sent


@pytest.mark.parametrize("who", ["client", "service"])
def test_a_reset_is_passed_on_though_nobody_reads(ollama: Relay, service: socket.socket, who: str) -> None:
    client, server = connect(ollama, service)
    fill(client)
    gone, other = (client, server) if who == "client" else (server, client)
    reset(gone)
    with other:
        assert_reset(other)
    assert ollama.wait_for("relay-closed")[0]["how"] == "reset"


def test_both_ends_shut_while_the_last_bytes_wait_does_not_spin(
    ollama: Relay, service: socket.socket
) -> None:
    service.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)  # inherited, and no longer grown
    client, server = connect(ollama, service)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    with client, server:
        sent = fill(client)
        server.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
        client.shutdown(socket.SHUT_WR)
        read = 0
        while unacknowledged(client):  # the client's end waits behind its bytes: make room for it
            read += len(server.recv(4096))
        # The relay's socket to the client is now shut both ways, and bytes for the service still wait.
        cpu = ollama.cpu_seconds()
        time.sleep(0.5)
        assert ollama.cpu_seconds() - cpu < 0.2
        rest = len(read_all(server))
        assert rest > 100_000
        assert read + rest == sent
    assert ollama.wait_for("relay-closed")[0]["bytes_out"] == sent


def unacknowledged(sock: socket.socket) -> int:
    """SIOCOUTQ (tcp(7)): bytes, the end included, that the other side has not acknowledged."""
    return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]


def test_urgent_data_neither_spins_nor_stops_the_stream(ollama: Relay, service: socket.socket) -> None:
    client, server = connect(ollama, service)
    with client, server:
        client.sendall(b"before ")
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b" after")
        cpu = ollama.cpu_seconds()
        time.sleep(0.5)
        assert ollama.cpu_seconds() - cpu < 0.2
        client.shutdown(socket.SHUT_WR)
        assert read_all(server) == b"before ! after"


def test_a_slow_flow_does_not_stop_the_others(ollama: Relay, service: socket.socket) -> None:
    slow, stuck = connect(ollama, service)
    fill(slow)
    client, server = connect(ollama, service, v6=True)
    with slow, stuck, client, server:
        say(b"quick", client, server)


def test_connections_that_come_and_go_leave_nothing(ollama: Relay, service: socket.socket) -> None:
    before = ollama.descriptors()
    for i in range(200):
        client, server = connect(ollama, service, v6=bool(i % 2))
        client.sendall(b"x" * i)
        if i % 4 < 2:
            reset(client)
            server.close()
        else:
            server.close()
            client.close()
        ollama.events("relay-closed")  # somebody must read them
    until(lambda: ollama.descriptors() == before, what="all descriptors closed")
    # the kernel may take the service's side, and we reset ours, before the relay has looked
    until(
        lambda: sum(f.get("connections", 1) for f in ended_or_failed(ollama)) == 200, what="each of them told"
    )


def ended_or_failed(relay: Relay) -> list[dict]:
    return relay.events("relay-closed") + relay.events("relay-failed")


def test_many_that_end_alike_are_few_records_and_exact_sums(ollama: Relay, service: socket.socket) -> None:
    many = 8 * EACH
    for size in range(many):
        client, server = connect(ollama, service)
        with client, server:
            client.sendall(b"x" * size)
            client.shutdown(socket.SHUT_WR)
            assert read_all(server) == b"x" * size
            server.sendall(b"yes")
    counted = until(
        lambda: (f := ollama.events("relay-closed")) and sum(e.get("connections", 1) for e in f) == many and f
    )
    single, summed = ([e for e in counted if ("connections" in e) is so] for so in (False, True))
    assert len(counted) < many and all("source" in e for e in single)
    assert all(e.keys() == single[0].keys() - {"source", "destination"} | {"connections"} for e in summed)
    assert sum(e["bytes_out"] for e in counted) == sum(range(many))
    assert sum(e["bytes_in"] for e in counted) == 3 * many


def test_of_a_sandbox_that_ends_no_connection_is_told_later(ollama: Relay, service: socket.socket) -> None:
    pairs = [connect(ollama, service) for _ in range(3 * EACH)]
    for client, server in pairs:
        say(b"four", client, server)
    ollama.unbind(link=7)
    told = ollama.events("relay-closed")
    assert sum(e.get("connections", 1) for e in told) == len(pairs)
    assert [e["bytes_out"] for e in told] == [4] * EACH + [8 * EACH]
    for each in pairs:
        for sock in each:
            sock.close()


# ---- what is denied


def reset_at_once(network: Network, block: int, port: int, **how) -> None:
    """The connection is reset: while it is being made, or right after."""
    started = time.monotonic()
    with contextlib.suppress(ConnectionResetError), network.client(block, port, **how) as client:
        assert_reset(client)
    assert time.monotonic() - started < 0.5


def denied(relay: Relay, block: int, port: int, /, how: dict | None = None, **expected) -> None:
    reset_at_once(relay.network, block, port, **(how or {}))
    count = len(relay.events("relay-denied"))
    found = relay.wait_for("relay-denied", max(1, count))
    assert expected in [{key: f[key] for key in expected} for f in found]


@BOTH
def test_who_is_not_bound_is_reset(ollama: Relay, network: Network, v6: bool) -> None:
    source = OTHER6 if v6 else OTHER4
    denied(
        ollama, 5, PORT, how={"v6": v6, "source": source},
        link=None, workspace=None, source=source, port=PORT, reason="source", connections=1,
    )  # fmt: skip
    assert not ollama.events("relay-closed")


@BOTH
def test_what_is_not_announced_is_reset(ollama: Relay, network: Network, v6: bool) -> None:
    tried = [(5, PORT + 1), (6, PORT), (4, PORT), (5, 22)]
    with network.service(PORT + 1), network.service(22):  # running, but nobody's
        for block, port in tried:
            reset_at_once(network, block, port, v6=v6)
    found = ollama.wait_for("relay-denied", len(tried))
    assert {(f["destination"], f["port"]) for f in found} == {
        (str(POOLS.synthetic(block)[v6]), port) for block, port in tried
    }
    assert {(f["link"], f["workspace"], f["reason"]) for f in found} == {("eg7", "acme", "unlisted")}


@BOTH
def test_a_service_belongs_to_its_workspace(ollama: Relay, network: Network, v6: bool) -> None:
    ollama.bind(link=8, workspace="other", source4=OTHER4, source6=OTHER6)
    how = {"v6": v6, "source": OTHER6 if v6 else OTHER4}
    denied(ollama, 5, PORT, how=how, link="eg8", workspace="other", reason="unlisted")


def test_an_address_that_is_not_synthetic_is_reset(ollama: Relay, network: Network) -> None:
    targets = {"203.0.113.1", "198.19.0.99", "2001:db8::1", "fd53:e9::1:0"}
    for target in targets:
        with contextlib.suppress(ConnectionResetError):
            assert_reset(network.sandbox.do(socket.create_connection, (target, PORT), 5))
    found = ollama.wait_for("relay-denied", len(targets))
    assert {(f["destination"], f["reason"]) for f in found} == {(target, "unlisted") for target in targets}


def test_before_the_controller_speaks_nothing_passes(relay: Relay, service: socket.socket) -> None:
    denied(relay, 5, PORT, reason="source")


@BOTH
def test_a_service_that_is_down_is_a_reset_and_a_record(relay: Relay, network: Network, v6: bool) -> None:
    relay.bind()
    relay.relays(announced())
    reset_at_once(network, 5, PORT, v6=v6)
    (failed,) = relay.wait_for("relay-failed")
    assert (failed["link"], failed["reason"], failed["connections"]) == ("eg7", "econnrefused", 1)


def test_many_denials_are_one_record_with_their_count(relay: Relay, network: Network) -> None:
    for _ in range(50):
        reset_at_once(network, 5, PORT)
    until(lambda: sum(f["connections"] for f in relay.events("relay-denied")) == 50)
    assert len(relay.events("relay-denied")) <= 3


def test_a_service_that_accepts_nothing_is_given_up(relay: Relay, network: Network) -> None:
    relay.bind()
    relay.relays(announced())
    with network.service(PORT, backlog=0), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(network.client(5, PORT)) for _ in range(4)]
        given_up = select.select(clients, [], [], 8)[0]
        with pytest.raises(ConnectionResetError):
            given_up[0].recv(1)
    assert relay.wait_for("relay-failed")[0]["reason"] == "etimedout"


# ---- revocation


@BOTH
def test_a_relay_that_is_taken_away_ends_its_flows_before_done(
    ollama: Relay, service: socket.socket, v6: bool
) -> None:
    ollama.relays(announced(), announced(6, PORT, service="second"))
    client, server = connect(ollama, service, v6=v6)
    other = ollama.network.client(6, PORT, v6=v6)
    kept, _ = service.accept()
    with client, server, other, kept:
        say(b"?", client, server)
        assert ollama.relays(announced(6, PORT, service="second")) == 1
        assert_reset(client, within=0.2)
        assert_reset(server, within=0.2)
        say(b"still here", other, kept)
        denied(ollama, 5, PORT, how={"v6": v6}, reason="unlisted")
    assert ollama.events("relay-closed")[0]["how"] == "revoked"


def test_the_same_relays_again_change_nothing(ollama: Relay, service: socket.socket) -> None:
    client, server = connect(ollama, service)
    with client, server:
        assert ollama.relays(announced()) == 0
        say(b"on", client, server)


def test_a_port_that_now_means_another_service_ends_the_old_flows(
    ollama: Relay, service: socket.socket
) -> None:
    client, server = connect(ollama, service)
    with client, server:
        assert ollama.relays(announced(service="other")) == 1
        assert_reset(client)


def test_a_sandbox_that_ends_takes_its_flows_along(ollama: Relay, service: socket.socket) -> None:
    ollama.bind(link=8, source4=OTHER4, source6=OTHER6)
    client, server = connect(ollama, service)
    client8, server8 = connect(ollama, service, source=OTHER4)
    with client, server, client8, server8:
        say(b"?", client, server)
        ollama.unbind(7)
        assert_reset(client, within=0.2)
        assert_reset(server, within=0.2)
        say(b"I stay", client8, server8)
        denied(ollama, 5, PORT, reason="source")
    assert ollama.wait_for("relay-closed")[0]["link"] == "eg7"


def test_an_address_given_to_another_sandbox_ends_the_flows_of_the_first(
    ollama: Relay, service: socket.socket
) -> None:
    client, server = connect(ollama, service)
    with client, server:
        say(b"?", client, server)
        ollama.bind(link=9)
        assert_reset(client)
    assert ollama.wait_for("relay-closed")[0]["link"] == "eg7"


@BOTH
def test_a_new_controller_that_says_the_same_cuts_nothing(
    ollama: Relay, service: socket.socket, v6: bool
) -> None:
    client, server = connect(ollama, service, v6=v6)
    with client, server:
        ollama.new_controller()
        say(b"not yet told", client, server)
        again, anew = connect(ollama, service, v6=v6)
        again.close()
        anew.close()
        ollama.bind()
        assert ollama.relays(announced()) == 0
        say(b"on", client, server)


def test_what_a_new_controller_does_not_name_goes_when_it_has_said_all(
    ollama: Relay, service: socket.socket
) -> None:
    ollama.bind(link=8, source4=OTHER4, source6=OTHER6)
    client, server = connect(ollama, service)
    client8, server8 = connect(ollama, service, source=OTHER4)
    with client, server, client8, server8:
        say(b"?", client, server)
        say(b"?", client8, server8)
        ollama.new_controller()
        ollama.bind(link=8, source4=OTHER4, source6=OTHER6)
        say(b"still", client, server)
        ollama.relays(announced())
        assert_reset(client, within=0.2)
        assert_reset(server, within=0.2)
        say(b"on", client8, server8)
        denied(ollama, 5, PORT, reason="source")
    assert ollama.wait_for("relay-closed")[0]["how"] == "unbound"


def test_a_link_that_becomes_another_workspaces_begins_anew(ollama: Relay, service: socket.socket) -> None:
    client, server = connect(ollama, service)
    with client, server:
        say(b"?", client, server)
        ollama.bind(workspace="other")
        assert_reset(client, within=0.2)
        denied(ollama, 5, PORT, workspace="other", reason="unlisted")


def test_while_the_controller_is_gone_what_was_permitted_stays_so(
    ollama: Relay, service: socket.socket
) -> None:
    ollama.controller.close()
    client, server = connect(ollama, service)
    with client, server:
        say(b"on", client, server)


@pytest.mark.parametrize("rubbish", [b"rubbish", b'{"type":"SetRelays"}', b'{"type":"Done","request":1}'])
def test_a_controller_that_talks_rubbish_is_heard_no_more(ollama: Relay, rubbish: bytes) -> None:
    ollama.controller.socket.send(rubbish)
    ollama.controller.socket.settimeout(10)
    assert ollama.controller.socket.recv(10) == b""
    assert ollama.process.poll() is None


# ---- bounds


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_sandbox_has_512_flows_and_another_still_gets_its_own(
    ollama: Relay, service: socket.socket, many_files: None
) -> None:
    ollama.bind(link=8, source4=OTHER4, source6=OTHER6)
    before = ollama.descriptors()
    with contextlib.ExitStack() as stack:
        for _ in range(512):
            for end in connect(ollama, service):
                stack.enter_context(end)
        denied(ollama, 5, PORT, link="eg7", reason="connections")
        client, server = connect(ollama, service, source=OTHER4)
        with client, server:
            client.sendall(b"mine")
            assert server.recv(10) == b"mine"
    until(lambda: ollama.descriptors() == before)
    client, server = connect(ollama, service)
    client.close()
    server.close()


def test_no_workspace_takes_all_that_the_descriptors_carry(network: Network, service: socket.socket) -> None:
    relay = Relay(network, descriptors=124)  # (124 - 64) // 6 = 10
    try:
        relay.ready().bind()
        relay.bind(link=8, workspace="other", source4=OTHER4, source6=OTHER6)
        relay.relays(announced(), announced(workspace="other"))
        with contextlib.ExitStack() as stack:
            for source, room in ((SOURCE4, 5), (OTHER4, 3)):
                for _ in range(room):
                    for end in connect(relay, service, source=source):
                        stack.enter_context(end)
                reset_at_once(network, 5, PORT, source=source)
            found = relay.wait_for("relay-denied", 2)
            assert [(f["workspace"], f["reason"]) for f in found] == [("acme", "limit"), ("other", "limit")]
    finally:
        relay.kill()


def test_without_descriptors_callers_are_reset_and_it_recovers(ollama: Relay, service: socket.socket) -> None:
    client, server = connect(ollama, service)
    limit_descriptors(ollama, free_descriptors(ollama)[1])  # room for the client, none for the service
    for _ in range(3):
        reset_at_once(ollama.network, 5, PORT)
    client.sendall(b"unharmed")
    assert server.recv(10) == b"unharmed"
    cpu = ollama.cpu_seconds()
    time.sleep(0.3)
    assert ollama.cpu_seconds() - cpu < 0.2
    limit_descriptors(ollama, 1024)
    with client, server:
        again, anew = connect(ollama, service)
        again.close()
        anew.close()


def free_descriptors(relay: Relay) -> list[int]:
    taken = {int(entry.name) for entry in Path(f"/proc/{relay.process.pid}/fd").iterdir()}
    return [number for number in range(100) if number not in taken]


def limit_descriptors(relay: Relay, number: int) -> None:
    user = ("setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups")
    command = (*user, "prlimit", "--pid", str(relay.process.pid), f"--nofile={number}:")
    subprocess.run(command, check=True)


# ---- the process


def test_it_has_no_right_left(relay: Relay) -> None:
    status = Path(f"/proc/{relay.process.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(UID)] * 4
    assert [int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapInh")] == [0] * 4


def test_told_to_stop_it_resets_what_is_open_and_says_the_totals(
    ollama: Relay, service: socket.socket
) -> None:
    first, second = connect(ollama, service), connect(ollama, service)
    for (client, server), said in ((first, b"12345"), (second, b"678")):
        say(said, client, server)
    ollama.process.send_signal(signal.SIGTERM)
    assert ollama.process.wait(10) == 0
    for end in (*first, *second):
        assert_reset(end)
        end.close()
    with contextlib.suppress(EOFError):
        ollama.events("relay-totals")
    totals = [
        dict(e.fields) for e in ollama.seen if isinstance(e, messages.Event) and e.event == "relay-totals"
    ]
    assert totals == [{"workspace": "acme", "service": "ollama", "flows": 2, "bytes_out": 8, "bytes_in": 0}]


def test_it_ends_with_the_supervisor(relay: Relay) -> None:
    relay.supervisor.close()
    assert relay.process.wait(10) == 0


def test_a_new_auditor_hears_the_rest(ollama: Relay, service: socket.socket) -> None:
    new = ollama.introduce("audit", messages.TO_AUDITOR)
    old, ollama.audit = ollama.audit, new
    ollama.bind()  # answered after the new socket was taken
    old.socket.settimeout(10)
    assert old.socket.recv(10) == b""
    client, server = connect(ollama, service)
    say(b"?", client, server)
    client.close()
    server.close()
    ollama.wait_for("relay-closed")
    old.close()


def test_an_auditor_that_reads_nothing_stops_nobody(ollama: Relay, service: socket.socket) -> None:
    for _ in range(40):
        client, server = connect(ollama, service)
        client.close()
        server.close()
    ollama.audit.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client, server = connect(ollama, service)
    with client, server:
        say(b"on", client, server)
