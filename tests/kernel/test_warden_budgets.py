"""The warden on what a link alone is held to: kept over its own end, put back without being given back, and
told exactly when a sandbox has ended."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from warden_world import PLAIN, POOLS, USER, Inhabitant, Warden, World, acme, nat, nothing_left, plumb, poll

from egressd.ipc import messages
from egressd.kernel import links, namespaces, netlink
from egressd.kernel.netlink import Netlink
from egressd.kernel.routing import received
from egressd.model.identities import Link
from egressd.ruleset import layout
from egressd.ruleset.layout import GATEWAY_MAC, SANDBOX_MAC

pytestmark = pytest.mark.kernel
LEADS = (*nat(PLAIN, "192.0.2.80"), *nat(PLAIN, "2001:db8::80"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with nothing_left(), World(tmp_path_factory.mktemp("world")) as made:
        made.found()
        yield made


@pytest.fixture(scope="module")
def warden(world: World) -> Warden:
    one = world.warden()
    one.begin(acme())
    one.nat(*LEADS)
    return one


@pytest.fixture
def another(tmp_path: Path) -> Iterator[World]:
    with nothing_left(), World(tmp_path) as made:
        made.found()
        yield made


def opened(world: World, warden: Warden, number: int, **bounds: Any) -> Inhabitant:
    one = world.inhabitant()
    assert isinstance(warden.open(number, one.net, **bounds), messages.Done)
    plumb(one, number)
    return one


def send(one: Inhabitant, *every: bytes) -> None:
    with namespaces.inside(one.net), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind(("eth0", 0))
        for frame in every:
            wire.send(frame)


def syns(number: int, count: int, *, family: int = 4, first: int = 2000) -> list[bytes]:
    """Beginnings of connections to a host that is allowed."""
    six = family == 6
    source, address = str(POOLS.sandbox(Link(number))[six]), str(POOLS.synthetic(PLAIN)[six])
    ip = IPv6(src=source, dst=address) if six else IP(src=source, dst=address)
    ether = Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC) / ip
    return [bytes(ether / TCP(sport=first + n, dport=80, flags="S")) for n in range(count)]


def datagram(number: int, size: int) -> bytes:
    """To nobody: denied. As long on the link."""
    source = str(POOLS.sandbox(Link(number))[0])
    packet = IP(src=source, dst="203.0.113.9") / UDP(sport=9, dport=9) / (b"x" * (size - 28))
    return bytes(Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC) / packet)


def spent(warden: Warden, number: int) -> messages.LinkSpent:
    answer = warden.ask(messages.ReadLink, link=number)
    assert isinstance(answer, messages.LinkSpent), answer
    counts = answer.counters
    summed = [sum(counts[part][n] for part in ("ok", "denied", "other")) for n in (0, 1)]
    assert list(counts["in"]) == summed, "the books"
    return answer


def lost_here(world: World, number: int) -> int:
    """How many frames the budget of connections has refused."""
    words = world.nft(f"list counter netdev egressd eg{number}_over_budget").split()
    return int(words[words.index("packets") + 1])


# ---- told exactly


def test_what_was_sent_is_counted_when_it_is_asked(world: World, warden: Warden) -> None:
    """At once, ten times: what still waits in a processor's backlog is waited for."""
    one = opened(world, warden, 1)
    before = spent(warden, 1).counters["in"][0]
    for turn in range(1, 11):
        send(one, *[datagram(1, 100)] * 400)
        assert spent(warden, 1).counters["in"][0] == before + turn * 400
    warden.close(1)


def test_the_device_tells_what_was_sent_over_it(world: World, warden: Warden) -> None:
    one, index = opened(world, warden, 9), layout.LINK_INDEX + 9
    with namespaces.inside(world.gateway):
        route = Netlink(netlink.ROUTE)
    before = received(route, index)
    send(one, *[datagram(9, 100)] * 70)
    assert received(route, index) - before == 70
    assert spent(warden, 9).counters["in"][0] == before + 70
    warden.close(9)
    poll(lambda: received(route, index) == 0, what="the device to go")
    route.close()


class Late:
    """A guard that judges one more frame each time it is asked how many it has judged."""

    def __init__(self, judged: int) -> None:
        self.judged = judged

    def count(self, name: str) -> tuple[int, int] | None:
        self.judged += name == "eg1_in"
        return (self.judged, 0) if name.rpartition("_")[2] in ("in", "ok", "denied", "other") else None


@pytest.mark.parametrize(("sent", "told"), [(0, 2), (1, 2), (3, 4), (9, 10), (1000, 21)])
def test_what_was_sent_is_waited_for_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, sent: int, told: int
) -> None:
    monkeypatch.setattr(links, "received", lambda _, index: sent if index == (1 << 20) + 1 else 0)
    made = links.Links(None, Late(0), POOLS)  # type: ignore[arg-type]
    counters, spent = made.spent(Link(1))
    assert (counters["in"][0], spent) == (told, ())


def test_it_is_final_when_the_last_process_is_gone(world: World, warden: Warden) -> None:
    """Whether the device is still there or not: the kernel takes it away a moment later."""
    for number in range(2, 8):
        one = opened(world, warden, number)
        before = spent(warden, number).counters["denied"][0]
        send(one, *[datagram(number, 100)] * 300)
        world.inhabitants.remove(one)
        one.close()
        told = spent(warden, number)
        assert told.counters["denied"][0] == before + 300
        poll(lambda number=number: f"eg{number}:" not in world.ip("link"), what="the device to go")  # type: ignore[misc]
        assert spent(warden, number).counters == told.counters
        assert warden.close(number).counters == told.counters


def test_a_frame_that_never_reaches_the_guard_is_not_waited_for(world: World, warden: Warden) -> None:
    """Its VLAN tag is cut short (skb_vlan_untag drops it): counted by the device, judged by nobody."""
    one = opened(world, warden, 10)
    before = spent(warden, 10).counters
    cut = bytes.fromhex("025300000002025300000001") + b"\x81\0\0"
    send(one, *[cut] * 50, datagram(10, 100))
    began = time.monotonic()
    told = spent(warden, 10).counters
    assert time.monotonic() - began < 2
    assert told["denied"][0] == before["denied"][0] + 1
    warden.close(10)


@pytest.mark.parametrize("number", [99, 1])
def test_of_a_link_that_nobody_holds_nothing_is_told(warden: Warden, number: int) -> None:
    answer = warden.ask(messages.ReadLink, link=number)
    assert isinstance(answer, messages.Failed) and answer.reason == "namespace"


def test_which_budget_has_refused_something(world: World, warden: Warden) -> None:
    """One that is just used up has refused nothing."""
    bounds = {"quota": 1000, "connections": 2}
    one = opened(world, warden, 20, **bounds)
    assert spent(warden, 20).spent == ()
    send(one, *syns(20, 2))
    assert spent(warden, 20).spent == ()
    send(one, *syns(20, 1))
    assert spent(warden, 20).spent == ("connections",)
    used = spent(warden, 20).counters["in"][1]
    send(one, datagram(20, 1000 - used))
    assert spent(warden, 20).spent == ("connections",), "to the byte"
    send(one, datagram(20, 28))
    assert spent(warden, 20).spent == ("quota", "connections")
    warden.close(20)

    two = opened(world, warden, 21, quota=50)
    send(two, *syns(21, 3))
    assert spent(warden, 21).spent == ("quota",)
    warden.close(21)


def test_of_a_closed_link_all_is_told_and_no_budget_is_spent(world: World, warden: Warden) -> None:
    one = opened(world, warden, 22, closed=True, quota=1, connections=1)
    send(one, *syns(22, 5), *syns(22, 5, family=6), datagram(22, 500))
    told = spent(warden, 22)
    assert told.counters["ok"] == (0, 0) and told.counters["denied"][0] >= 11
    assert told.spent == ()
    warden.close(22)


def test_nothing_of_a_budget_stays_behind(world: World, warden: Warden) -> None:
    before = world.nft("-t list ruleset")
    for number, bounds in enumerate(({"quota": 9, "connections": 9}, {"closed": True}, {}), 30):
        one = world.inhabitant()
        assert isinstance(warden.open(number, one.net, **bounds), messages.Done)
        assert f"chain eg{number} " in world.nft("-t list ruleset")
        warden.close(number)
    assert world.nft("-t list ruleset") == before


# ---- kept


def crash(world: World, warden: Warden) -> None:
    os.kill(warden.process.pid, 9)
    warden.stop()
    world.children.remove(warden)


@pytest.mark.parametrize("family", [4, 6])
def test_a_warden_that_dies_gives_no_connection_back(another: World, family: int) -> None:
    first = another.warden()
    first.begin(acme())
    first.nat(*LEADS)
    one = opened(another, first, 40, connections=7)
    send(one, *syns(40, 3, family=family))
    assert spent(first, 40).spent == ()
    crash(another, first)
    send(one, *syns(40, 1, family=family, first=2500))  # the kernel holds it, whoever is there

    second = another.warden()
    assert isinstance(second.workspaces(acme()), messages.Done)
    kept = second.ask(messages.KeepLink, link=40, workspace="acme", owner=USER, connections=7)
    assert isinstance(kept, messages.Done)
    assert second.nat(*LEADS).changes == 0
    assert second.ask(messages.Settle).changes == 0, "as it stands"
    before = another.left()
    send(one, *syns(40, 3, family=family, first=3000))
    assert spent(second, 40).spent == () and lost_here(another, 40) == 0
    send(one, *syns(40, 5, family=family, first=4000))
    assert spent(second, 40).spent == ("connections",) and lost_here(another, 40) == 5
    poll(lambda: another.left() - before >= 3)
    assert another.left() - before == 3


@pytest.mark.parametrize("guard", ["off", "enforce"])
def test_a_closed_link_is_closed_without_a_warden_and_under_the_next(another: World, guard: str) -> None:
    def policy() -> Any:
        plain = acme()
        return type(plain)(
            workspace="acme", index=plain.index, guard=guard, elements=plain.elements, connections=None
        )

    first = another.warden()
    first.begin(policy())
    first.nat(*LEADS)
    one = opened(another, first, 41, closed=True)
    before = another.left()
    send(one, *syns(41, 3))
    crash(another, first)
    send(one, *syns(41, 3, first=2500))
    second = another.warden()
    second.workspaces(policy())
    second.ask(messages.KeepLink, link=41, workspace="acme", owner=USER, closed=True)
    second.nat(*LEADS)
    assert second.ask(messages.Settle).changes == 0
    send(one, *syns(41, 3, first=3000))
    assert spent(second, 41).counters["ok"] == (0, 0)
    second.workspaces(acme())
    send(one, *syns(41, 3, first=3500))
    told = spent(second, 41).counters
    assert told["ok"] == (0, 0) and told["denied"][0] >= 12
    assert another.left() == before


def test_what_others_take_away_is_put_back_and_what_was_spent_stays_spent(
    world: World, warden: Warden
) -> None:
    one = opened(world, warden, 50, connections=5)
    send(one, *syns(50, 2))
    warden.quiet()
    world.nft("flush chain netdev egressd eg50")
    tampered = warden.heard(messages.Tampered)
    assert tampered.restored and "eg50" in tampered.what
    send(one, *syns(50, 3, first=3000))
    assert spent(warden, 50).spent == ()
    send(one, *syns(50, 1, first=4000))
    assert spent(warden, 50).spent == ("connections",)
    warden.close(50)
