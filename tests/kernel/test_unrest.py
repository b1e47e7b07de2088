"""What is heard of the routing, and when all of it is looked at."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterator

import pytest
from warden_world import poll, sh

from egressd.kernel import namespaces, netlink
from egressd.kernel.monitor import Monitor
from egressd.kernel.netlink import Netlink, Reply, attribute
from egressd.kernel.routing import (
    DELLINK,
    DELNEIGH,
    DELROUTE,
    NEWADDR,
    NEWLINK,
    NEWNEIGH,
    NEWROUTE,
    NEWRULE,
)
from egressd.kernel.unrest import LINKS, Unrest
from egressd.ruleset import layout

UP, NOARP, RUNNING = 0x1, 0x80, 0x10040
MOMENT = 0.3
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914  # linux/sockios.h


def device(kind: int, number: int, flags: int, *, group: int = layout.LINK_GROUP, port: int = 0) -> Reply:
    body = struct.pack("=BxHiII", 0, 1, LINKS + number, flags, 0xFFFF_FFFF)
    body += attribute(3, f"eg{number}\0".encode()) + attribute(27, struct.pack("=I", group))
    return Reply(kind, port, body)


def route(kind: int, number: int, *, proto: int = 53, port: int = 0) -> Reply:
    body = struct.pack("=BBBBBBBBI", 2, 32, 0, 0, 254, proto, 253, 1, 0)
    return Reply(kind, port, body + attribute(4, struct.pack("=I", LINKS + number)))


def neighbour(kind: int, number: int) -> Reply:
    return Reply(kind, 0, struct.pack("=BxxxiHBB", 2, LINKS + number, 0x80, 0, 1))


DOWN = device(NEWLINK, 5, NOARP)
SOUND = device(NEWLINK, 5, UP | NOARP | RUNNING)
GONE = device(DELLINK, 5, NOARP)
# As the kernel told them on 6.18 of a sandbox that began, and of one that ended.
BEGUN = [DOWN, SOUND, SOUND, route(NEWROUTE, 5, proto=2), SOUND]
ENDED = [DOWN, neighbour(DELNEIGH, 5), route(DELROUTE, 5), route(DELROUTE, 5, proto=2), GONE]


@pytest.mark.parametrize("events", [BEGUN, ENDED, BEGUN + ENDED], ids=["begun", "ended", "both"])
def test_sandboxes_that_come_and_go_call_for_nothing(events: list[Reply]) -> None:
    unrest = Unrest()
    assert not any(unrest.hear(event, 1.0) for event in events)
    assert unrest.due(1.0 + MOMENT) == set()


@pytest.mark.parametrize(
    "events",
    [
        [SOUND, DOWN],
        [SOUND, device(NEWLINK, 5, UP | RUNNING)],  # with ARP
        [device(NEWLINK, 5, UP | NOARP, group=0)],
        [neighbour(DELNEIGH, 5)],
        [neighbour(NEWNEIGH, 5)],
        [route(DELROUTE, 5)],
        [route(NEWROUTE, 5, proto=3)],  # by ioctl(2)
        [neighbour(DELNEIGH, 5), SOUND],  # that it is up puts nothing back
        [GONE, DOWN],  # another of that number
    ],
    ids=["down", "arp", "group", "neighbour", "strange neighbour", "route", "strange route", "up", "anew"],
)
def test_what_stays_changed_is_looked_at_after_a_moment_and_once(events: list[Reply]) -> None:
    unrest = Unrest()
    assert not any(unrest.hear(event, 1.0) for event in events)
    assert unrest.due(1.1) == set(), "it may be about to go"
    assert unrest.due(1.0 + MOMENT) == {5}
    assert unrest.due(9.0) == set()


@pytest.mark.parametrize(
    "event",
    [
        device(NEWLINK, 5, UP | NOARP, port=77),
        device(DELLINK, 5, NOARP, port=77),
        route(DELROUTE, 5, port=77),
        device(NEWLINK, 7 - LINKS, UP),  # the uplink
        Reply(NEWROUTE, 0, struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 3, 0, 6, 0)),  # of no device
        Reply(NEWADDR, 0, struct.pack("=BBBBI", 2, 32, 0, 0, LINKS + 5)),
        Reply(NEWRULE, 0, bytes(12)),
    ],
    ids=["somebody", "somebody deletes", "somebody's route", "uplink", "blackhole", "address", "rule"],
)
def test_everything_else_is_looked_at_at_once(event: Reply) -> None:
    assert Unrest().hear(event, 1.0)


def test_one_that_goes_takes_nobody_else_s_unrest_along() -> None:
    unrest = Unrest()
    for event in (DOWN, device(NEWLINK, 6, NOARP), neighbour(DELNEIGH, 6), GONE):
        assert not unrest.hear(event, 1.0)
    assert unrest.due(1.0 + MOMENT) == {6}


# ---- as the kernel tells it


@pytest.fixture
def here() -> Iterator[tuple[Monitor, Netlink]]:
    with namespaces.throw_away():
        ours = Netlink(netlink.ROUTE)
        monitor = Monitor(ignore=(ours.port,))
        yield monitor, ours
        monitor.close()
        ours.close()


@pytest.mark.kernel
def test_a_device_set_down_by_ioctl_is_noticed_though_the_kernel_tells_it(
    here: tuple[Monitor, Netlink],
) -> None:
    monitor, _ = here
    sh(
        f"ip link add eg5 index {LINKS + 5} type veth peer name eth0; ip link set eth0 up;"
        f"ip link set eg5 arp off; ip link set eg5 group {layout.LINK_GROUP}; ip link set eg5 up"
    )
    poll(lambda: "LOWER_UP" in sh("ip link show eg5"), what="the link is up")
    monitor.news()
    monitor.unrest.due(1e9)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        asked = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16sH14x", b"eg5", 0))
        (flags,) = struct.unpack_from("=H", asked, 16)
        assert flags & UP
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"eg5", flags & ~UP))
    monitor.news()
    assert monitor.unrest.due(1e9) == {5}
