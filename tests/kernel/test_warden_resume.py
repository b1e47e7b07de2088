"""KeepLink with a namespace: only the one that the link leads into; and reports until they are heard."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from warden_world import POOLS, QUIC, USER, Inhabitant, Warden, World, acme, element, plumb, poll, sh, want

from egressd.ipc import messages
from egressd.kernel import namespaces
from egressd.kernel.netlink import ROUTE, Netlink

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("resume")) as made:
        made.found()
        yield made


@pytest.fixture
def warden(world: World) -> Iterator[Warden]:
    made = world.warden()
    made.begin(acme())
    yield made
    end(world, made)


def end(world: World, warden: Warden) -> None:
    """When all its links are erased, or they would be the next one's work."""
    poll(lambda: "eg" not in world.ip("-o link").replace("egw", ""), what="its links are gone")
    warden.stop()


def keep(warden: Warden, link: int, descriptor: int | None, *, owner: int = USER) -> str:
    """Done, or why not."""
    answer = warden.ask(
        messages.KeepLink, descriptor=descriptor, link=link, workspace="acme", owner=owner
    )  # fmt: skip
    return "Done" if isinstance(answer, messages.Done) else str(answer.reason)


def test_a_link_is_kept_with_the_namespace_it_leads_into_and_no_other(world: World, warden: Warden) -> None:
    one, two, bare, roots = (
        world.inhabitant(),
        world.inhabitant(),
        world.inhabitant(),
        world.inhabitant(user=False),
    )
    for link, who in ((1, one), (2, two)):
        assert isinstance(warden.open(link, who.net), messages.Done)
    warden.reconnect()
    warden.workspaces(acme())
    refused = {
        "another sandbox's": two.net,
        "one without a link": bare.net,
        "one without a user namespace": roots.net,
        "the host's": world.host,
        "the gateway": world.gateway,
        "a mount namespace": one.open("mnt"),
        "a user namespace": one.open("user"),
        "no namespace": os.open("/dev/null", os.O_RDONLY),
    }
    assert {what: keep(warden, 1, descriptor) for what, descriptor in refused.items()} == dict.fromkeys(
        refused, "namespace"
    )
    assert keep(warden, 1, one.net, owner=USER + 1) == "namespace"
    assert keep(warden, 3, one.net) == "namespace"  # no such link
    assert keep(warden, 1, None) == "Done"
    assert keep(warden, 1, one.net) == "Done"
    assert keep(warden, 1, one.net) == "Done"  # the controller was killed again
    assert keep(warden, 2, one.net) == "namespace"
    assert keep(warden, 2, two.net) == "Done"
    for name in ("a mount namespace", "a user namespace", "no namespace"):
        os.close(refused[name])
    for link in (1, 2):
        warden.close(link)


def test_a_warden_that_starts_again_leases_no_namespace_twice(world: World) -> None:
    """It knows no identities; and whoever is root inside can call eth0 something else."""
    first = world.warden()
    first.begin(acme())
    one = world.inhabitant()
    first.open(4, one.net)
    first.stop()
    sh("ip link set eth0 name other", namespace=one.net)
    second = world.warden()
    second.workspaces(acme())
    assert keep(second, 4, None) == "Done"
    second.ask(messages.Settle)
    assert second.open(5, one.net).reason == "namespace"
    assert keep(second, 4, one.net) == "Done"
    assert second.open(5, one.net).reason == "namespace"
    second.close(4)
    poll(lambda: isinstance(second.open(6, one.net), messages.Done), what="it is free when its link is gone")
    second.close(6)
    end(world, second)


def test_the_number_of_a_namespace_is_its_own(world: World) -> None:
    one, two = world.inhabitant(), world.inhabitant()
    with namespaces.inside(world.gateway):
        route = Netlink(ROUTE)
    assert namespaces.number(route, one.net) is None
    warden = world.warden()
    warden.begin(acme())
    warden.open(7, one.net)
    warden.open(8, two.net)
    assert keep(warden, 7, one.net) == "Done" and keep(warden, 7, two.net) == "namespace"
    known = namespaces.number(route, one.net)
    assert known is not None and known != namespaces.number(route, two.net)
    route.close()
    for link in (7, 8):
        warden.close(link)
    end(world, warden)


# ---- reports


def test_what_was_counted_is_told_again_until_it_is_heard(world: World, warden: Warden) -> None:
    one = world.inhabitant()
    warden.open(11, one.net)
    plumb(one, 11)
    spend(one)
    warden.workspaces(want("acme", element(QUIC, 444, "quic.test", protocol="udp")))
    retired = warden.heard(messages.Retired)
    (number,) = warden.reports
    assert retired.elements == {"quic.test": (1, 38)} and number > 0
    closed = warden.close(11)
    assert closed.counters["ok"] == (1, 38) and closed.report > number
    assert warden.close(11).counters == closed.counters  # asked again: the same, under the same number
    assert warden.close(11).report == closed.report

    warden.reconnect()  # whoever was told is gone
    warden.ask(messages.Heard, again=True)
    assert warden.heard(messages.Retired) == retired
    lost = warden.heard(messages.LinkLost)
    assert (lost.workspace, lost.counters) == ("acme", closed.counters)
    assert warden.reports[1:] == [number, closed.report]

    warden.reconnect()
    warden.ask(messages.Heard, reports=(number,), again=True)
    assert [type(each).__name__ for each in warden.unasked] == ["LinkLost"]
    warden.unasked.clear()
    warden.ask(messages.Heard, reports=(closed.report, 1, 2, 3), again=True)
    assert warden.unasked == []


def test_the_rules_tell_whose_a_link_was_that_nobody_names(world: World) -> None:
    first = world.warden()
    first.begin(acme())
    one = world.inhabitant()
    first.open(12, one.net)
    plumb(one, 12)
    spend(one)
    first.stop()
    second = world.warden()
    second.workspaces(acme())
    second.ask(messages.Settle)
    lost = second.heard(messages.LinkLost)
    assert (lost.link, lost.workspace, lost.counters["ok"]) == (12, "acme", (1, 38))
    second.stop()


def spend(one: Inhabitant) -> None:
    """One datagram to where udp/443 of a name leads."""
    four, _ = POOLS.synthetic(QUIC)
    sh(
        f'python3 -I -c \'import socket; socket.socket(2, 2).sendto(b"x" * 10, ("{four}", 443))\'',
        namespace=one.net,
    )
