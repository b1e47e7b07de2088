"""What is open to real addresses, read and cut through the real warden."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from warden_world import (
    PLAIN,
    POOLS,
    QUIC,
    Warden,
    World,
    acme,
    element,
    mark,
    nothing_left,
    plumb,
    poll,
    sh,
    want,
)  # fmt: skip

from egressd.ipc import messages
from egressd.kernel import namespaces
from egressd.kernel.conntrack import Conntrack
from egressd.ruleset.layout import Kind, dial_source
from egressd.ruleset.wants import NatEntry

pytestmark = pytest.mark.kernel
FAMILIES = pytest.mark.parametrize("six", [False, True], ids=["4", "6"])
READ = 3  # the block of a host whose connections are read
FORBIDDEN, ALLOWED = ("10.3.0.66", "2001:db8:3::66"), ("10.3.0.2", "2001:db8:3::2")
ACME = acme(element(READ, 443, "read.test", kind=Kind.INSPECT))
OTHER = want("other", element(PLAIN, 80, "plain.test", index=2), index=2)


def both(block: int, *, index: int = 1) -> tuple[NatEntry, ...]:
    """Slot 0 leads to what will be forbidden, the others do not."""
    return tuple(
        NatEntry(
            mark(Kind.FORWARD, block, index=index),
            str(POOLS.synthetic(block, slot)[six]),
            (ALLOWED if slot else FORBIDDEN)[six],
            "plain.test",
        )
        for slot in range(4)
        for six in (0, 1)
    )


@dataclass
class Scene:
    world: World
    warden: Warden
    internet: int
    sandboxes: dict[str, int] = field(default_factory=dict)  # workspace -> network namespace
    open: list[socket.socket] = field(default_factory=list)

    def listen(self, address: str, port: int) -> socket.socket:
        with namespaces.inside(self.internet):
            sock = socket.create_server((address, port), family=_family(address))
        sock.settimeout(3)
        self.open.append(sock)
        return sock

    def connect(
        self, block: int, six: bool, *, slot: int = 0, workspace: str = "acme"
    ) -> tuple[socket.socket, socket.socket]:
        """(the client's end, the host's). Block READ is dialled by what stands for the inspector."""
        real = (ALLOWED if slot else FORBIDDEN)[six]
        port = 443 if block == READ else 80
        there = self.world.gateway if block == READ else self.sandboxes[workspace]
        with namespaces.inside(there):
            sock = socket.socket(_family(real))
        sock.settimeout(3)
        if block == READ:
            if six:
                sock.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
            sock.bind((str(dial_source(1)[six]), 0))
        self.open.append(sock)
        with self.listen(real, port) as listener:
            sock.connect((str(POOLS.synthetic(block, slot)[six]), port))
            peer, _ = listener.accept()
        self.open.append(peer)
        peer.settimeout(3)
        assert heard(sock, peer, b"before")
        return sock, peer

    def flows(self, workspace: str = "acme") -> list[list[Any]]:
        found = msgspec.json.decode(self.warden.ask(messages.ReadFlows, workspace=workspace))
        assert isinstance(found, list)
        return found

    def cut(self, *flows: tuple[int, str], workspace: str = "acme") -> Any:
        return self.warden.ask(messages.CutFlows, workspace=workspace, flows=flows)

    def drift(self) -> Any:
        return msgspec.json.decode(self.warden.ask(messages.ReadDrift))


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def heard(one: socket.socket, other: socket.socket, data: bytes) -> bool:
    one.sendall(data)
    other.sendall(data)
    return one.recv(100) == other.recv(100) == data


def until_reset(sock: socket.socket) -> float:
    """Seconds until the end of this connection is told; it must be a reset."""
    began = time.perf_counter()
    waiting = select.poll()
    waiting.register(sock, 0)
    assert waiting.poll(1000), "nothing was heard"
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 104
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with nothing_left(), World(tmp_path_factory.mktemp("flows")) as world:
        world.found()
        yield world


@pytest.fixture
def scene(world: World) -> Iterator[Scene]:
    warden = world.warden()
    warden.begin(ACME, OTHER)
    warden.nat(*both(PLAIN), *both(QUIC), *both(READ), *both(PLAIN, index=2))
    internet, _ = namespaces.pin(f"kn-i{world.name}")
    _wire(world, internet)
    scene = Scene(world, warden, internet)
    for number, workspace in ((1, "acme"), (2, "other")):
        one = world.inhabitant()
        assert isinstance(warden.open(number, one.net, workspace=workspace), messages.Done)
        plumb(one, number)
        scene.sandboxes[workspace] = one.net
    yield scene
    for sock in scene.open:
        sock.close()
    for number in (1, 2):
        scene.warden.close(number)
    poll(lambda: "eg1" not in world.ip("link") and "eg2" not in world.ip("link"), what="the links to go")
    with namespaces.inside(world.gateway):
        conntrack = Conntrack()
    conntrack.forget_all()
    conntrack.close()
    scene.warden.stop()
    while world.inhabitants:
        world.inhabitants.pop().close()
    os.close(internet)
    namespaces.unpin(f"kn-i{world.name}")
    poll(lambda: "net0" not in sh("ip link", namespace=world.host), what="the wire to go")


def _wire(world: World, internet: int) -> None:
    sh(f"ip link add net0 type veth peer name inet0 netns kn-i{world.name};"
       "ip link set net0 addrgenmode none; ip link set net0 up; ip addr add 10.3.0.1/24 dev net0;"
       "ip -6 addr add 2001:db8:3::1/64 dev net0 nodad", namespace=world.host)  # fmt: skip
    addresses = "".join(
        f"ip addr add {four}/24 dev inet0; ip -6 addr add {six}/64 dev inet0 nodad;"
        for four, six in (FORBIDDEN, ALLOWED)
    )
    sh(
        f"ip link set lo up; ip link set inet0 addrgenmode none; ip link set inet0 up; {addresses}",
        namespace=internet,
    )
    sh(
        "sysctl -qw net.ipv4.conf.net0.forwarding=1 net.ipv6.conf.net0.force_forwarding=1",
        namespace=world.host,
    )


# ---- allowed


@FAMILIES
@pytest.mark.parametrize("block", [PLAIN, READ], ids=["forwarded", "inspected"])
def test_what_leads_to_a_forbidden_address_ends_and_the_rest_stays(
    scene: Scene, block: int, six: bool
) -> None:
    client, peer = scene.connect(block, six)
    stay = [
        scene.connect(block, six, slot=1),
        scene.connect(block, not six),
        scene.connect(READ if block == PLAIN else PLAIN, six),
        scene.connect(PLAIN, six, workspace="other"),
    ]
    forward = mark(Kind.FORWARD, block)
    assert [forward, FORBIDDEN[six]] in scene.flows()
    assert scene.flows("other") == [[mark(Kind.FORWARD, PLAIN, index=2), FORBIDDEN[six]]]
    gone = [entry for entry in both(block) if entry.real == FORBIDDEN[six]]
    scene.warden.nat(*(msgspec.structs.replace(entry, real=None) for entry in gone))
    done = scene.cut((forward, FORBIDDEN[six]))
    told = until_reset(client), until_reset(peer)
    print(f"CutFlows {done.microseconds / 1e3:.1f} ms; told {[f'{t * 1e3:.2f}' for t in told]} ms later")
    assert isinstance(done, messages.Done) and done.changes == 1
    assert max(told) < 0.05
    for one, other in stay:
        assert heard(one, other, b"after")
    assert [forward, FORBIDDEN[six]] not in scene.flows()
    assert [forward, ALLOWED[six]] in scene.flows()
    assert scene.cut((forward, FORBIDDEN[six])).changes == 0
    assert scene.drift() == []


@FAMILIES
def test_a_way_that_still_leads_there_goes_with_it(scene: Scene, six: bool) -> None:
    """Or the next connection would go there again, while this was answered."""
    client, _ = scene.connect(PLAIN, six)
    assert scene.cut((mark(Kind.FORWARD, PLAIN), FORBIDDEN[six])).changes == 1
    until_reset(client)
    with pytest.raises(ConnectionRefusedError):
        scene.connect(PLAIN, six)
    assert heard(*scene.connect(PLAIN, six, slot=1), b"the other slot")
    assert heard(*scene.connect(PLAIN, six, workspace="other"), b"the other workspace")
    assert scene.drift() == []


@FAMILIES
def test_datagrams_are_refused(scene: Scene, six: bool) -> None:
    """Though a socket that sends them is not told of every kind of refusal."""
    with namespaces.inside(scene.internet):
        server = socket.socket(_family(FORBIDDEN[six]), socket.SOCK_DGRAM)
    with namespaces.inside(scene.sandboxes["acme"]):
        client = socket.socket(_family(FORBIDDEN[six]), socket.SOCK_DGRAM)
    scene.open += [server, client]
    server.bind((FORBIDDEN[six], 443))
    for sock in (server, client):
        sock.settimeout(2)
    client.connect((str(POOLS.synthetic(QUIC, 0)[six]), 443))
    client.send(b"before")
    data, back = server.recvfrom(100)
    server.sendto(data, back)
    assert client.recv(100) == b"before"
    assert scene.flows() == [[mark(Kind.FORWARD, QUIC), FORBIDDEN[six]]]
    assert scene.cut((mark(Kind.FORWARD, QUIC), FORBIDDEN[six])).changes == 1
    server.sendto(b"late", back)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            client.send(b"after")
            client.recv(100)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(100)


def test_a_host_without_connections_has_none_to_cut(scene: Scene) -> None:
    assert scene.flows() == scene.flows("other") == []
    done = scene.cut((mark(Kind.FORWARD, PLAIN), FORBIDDEN[0]), (mark(Kind.FORWARD, READ), FORBIDDEN[1]))
    assert (type(done), done.changes) == (messages.Done, 0)


def test_a_warden_that_was_killed_reads_and_cuts_what_it_finds(scene: Scene) -> None:
    """Nothing is remembered but by the kernel."""
    first, _ = scene.connect(PLAIN, False)
    second, peer = scene.connect(READ, True)
    assert scene.cut((mark(Kind.FORWARD, PLAIN), FORBIDDEN[0])).changes == 1
    until_reset(first)
    scene.warden.process.send_signal(signal.SIGKILL)
    scene.warden.process.wait()
    scene.warden = scene.world.warden()
    assert isinstance(scene.warden.workspaces(ACME, OTHER), messages.Done)
    assert scene.flows() == [[mark(Kind.FORWARD, READ), FORBIDDEN[1]]], "before it has settled"
    assert scene.cut((mark(Kind.FORWARD, READ), FORBIDDEN[1])).changes == 1
    until_reset(second)
    until_reset(peer)
    assert scene.flows() == []
    with pytest.raises(ConnectionRefusedError):
        scene.connect(READ, True)


# ---- refused

HOSTILE: dict[str, tuple[str, tuple[int, str], str]] = {
    "another workspace's mark": ("acme", (mark(Kind.FORWARD, PLAIN, index=2), FORBIDDEN[0]), "protocol"),
    "a workspace that is not there": ("nobody", (mark(Kind.FORWARD, PLAIN), FORBIDDEN[0]), "workspace"),
    "what goes out as addressed": ("acme", (mark(Kind.DIRECT, PLAIN), FORBIDDEN[0]), "protocol"),
    "a local service": ("acme", (mark(Kind.RELAY, PLAIN), FORBIDDEN[0]), "protocol"),
    "the sandbox's half": ("acme", (mark(Kind.INSPECT, READ), FORBIDDEN[0]), "protocol"),
    "a question to the resolver": ("acme", (mark(Kind.RESOLVE, 0), "169.254.53.53"), "protocol"),
    "no mark": ("acme", (0x1000_4001, FORBIDDEN[0]), "protocol"),
    "no address": ("acme", (mark(Kind.FORWARD, PLAIN), "10.3.0.66.1"), "protocol"),
    "half an address": ("acme", (mark(Kind.FORWARD, PLAIN), "10.3"), "protocol"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_controller_of_ours_says_is_refused_and_changes_nothing(scene: Scene, what: str) -> None:
    workspace, flow, reason = HOSTILE[what]
    pairs = [scene.connect(PLAIN, False), scene.connect(PLAIN, False, workspace="other")]
    before = scene.world.nft("-s list ruleset")
    good = (mark(Kind.FORWARD, PLAIN), FORBIDDEN[0])
    answer = scene.cut(good, flow, workspace=workspace)
    assert (type(answer), getattr(answer, "reason", "")) == (messages.Failed, reason)
    assert scene.world.nft("-s list ruleset") == before
    for one, other in pairs:
        assert heard(one, other, b"still"), "not even what was meant rightly"


def test_flows_of_a_workspace_that_is_not_there_are_not_read(scene: Scene) -> None:
    answer = scene.warden.ask(messages.ReadFlows, workspace="nobody")
    assert (type(answer), answer.reason) == (messages.Failed, "workspace")
