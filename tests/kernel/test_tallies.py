"""Counters read by netlink are the ones that libnftables lists: each of them, to the byte."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import msgspec
import pytest
from guard_topology import (
    ACME,
    POOLS,
    SERVER4,
    SERVER6,
    CidrRule,
    Guard,
    Topology,
    echo,
    inside,
    inspected,
    named,
    policy,
    tcp,
    topology,
    udp,
)

from egressd.kernel import namespaces
from egressd.kernel.dumps import Dumps
from egressd.kernel.netlink import NetlinkError
from egressd.kernel.nft import Nft
from egressd.kernel.tallies import Tallies
from egressd.model.errors import KernelError
from egressd.model.identities import Link
from egressd.ruleset import build, observe
from egressd.ruleset.build import LinkWant
from egressd.ruleset.observe import Counters

pytestmark = pytest.mark.kernel

MANY = 50  # links, four of which somebody uses


def networks() -> Iterator[CidrRule]:
    for text in ("10.9.0.0/16", f"{SERVER4}/32", f"{SERVER6}/128", "2001:db8:9::/48"):
        yield CidrRule(network=ip_network(text), ports=(tcp(5), udp(5)), line=1)


@pytest.fixture(scope="module")
def there() -> Iterator[Topology]:
    with topology("tally") as made:
        made.apply(
            policy(*ACME, inspected("read.test", tcp(443), plain=(tcp(80),)), *networks()),
            policy(named("plain.test", tcp(80)), workspace="blue", guard=Guard.OBSERVE),
        )
        made.connect(1, quota=1_000_000)
        made.connect(2, connections=3)
        made.connect(3, closed=True)
        made.connect(4, "blue", quota=400, connections=9)
        for workspace in ("acme", "blue"):
            made.resolve("plain.test", SERVER4, SERVER6, workspace=workspace)
        made.nft.run([line for number in range(5, MANY + 1) for line in idle(made, number)])
        yield made


def idle(made: Topology, number: int) -> list[str]:
    """A link that nobody uses."""
    lease = LinkWant(Link(number), "acme", quota=number or None, closed=number % 7 == 0)
    return build.link(lease, made.wants["acme"], POOLS)


def traffic(made: Topology) -> None:
    """Some of everything: admitted, answered, denied, over each budget, dialled."""
    listener = made.server(made.internet, SERVER4, 80)
    echo(listener)
    with contextlib.suppress(OSError):
        sock = made.client(1, made.address("plain.test"), 80)
        sock.sendall(b"x" * 3000)
        sock.recv(100)
    for number, workspace in ((1, "acme"), (2, "acme"), (3, "acme"), (4, "blue")):
        plain = made.address("plain.test", workspace=workspace)
        for address, port in ((plain, 80), (plain, 81), ("192.0.2.9", 7), (SERVER4, 5)):
            made.timed(number, address, port, seconds=0.1)
            made.timed(number, address, port, kind=socket.SOCK_DGRAM, seconds=0.05)
    made.dialled(made.source(4), made.address("read.test"), 443)
    listener.close()


def in_order(counters: Counters) -> Counters:
    """Elements in no particular order: neither promises one."""
    return msgspec.structs.replace(
        counters,
        elements=tuple(sorted(counters.elements, key=lambda e: (e.workspace, e.address, e.protocol, e.port))),
        dialled=tuple(sorted(counters.dialled, key=lambda e: (e.workspace, e.address, e.port))),
    )


def both(made: Topology, tallies: Tallies) -> tuple[Counters, Counters]:
    """By netlink between two listings of libnftables that say the same: nothing moved meanwhile."""
    for _ in range(50):
        before, found, after = made.counters(), tallies.read(), made.counters()
        if before == after:
            return in_order(found), in_order(before)
    pytest.fail("it never came to rest")


def test_they_are_those_of_libnftables(there: Topology) -> None:
    with inside(there.gateway):
        tallies = Tallies(Dumps())
    traffic(there)
    found, wanted = both(there, tallies)
    assert found == wanted
    assert len(found.links) == MANY
    assert found.links["eg1"].ok.bytes > 3000, "and something was counted"
    assert found.links["eg2"].connections_used and found.links["eg4"].quota_used
    assert found.denied["acme"]["unlisted"].packets and found.denied["acme"]["closed"].packets
    assert found.unlisted["blue"].packets and found.replies and found.opened
    assert any(each.packets and "." in each.address for each in found.elements)
    assert any(each.packets and each.workspace == "acme" for each in found.dialled)
    assert {"10.9.0.0/16", f"{SERVER4}/32", "2001:db8:9::/48"} <= {each.address for each in found.elements}


# ---- what does not look as it should


@pytest.fixture
def session() -> Iterator[Nft]:
    with namespaces.throw_away():
        made = Nft()
        made.run(build.base(POOLS))
        yield made


def test_where_no_table_is_nothing_is_counted() -> None:
    with namespaces.throw_away():
        assert Tallies(Dumps()).read() == observe.counters({"nftables": []})


def test_a_set_of_another_type_is_an_error_and_not_left_out(session: Nft) -> None:
    tallies = Tallies(Dumps())
    assert tallies.read().late
    session.run([
        "add map netdev egressd acme_out4 { type ipv4_addr : mark; counter; }",
        "add element netdev egressd acme_out4 { 192.0.2.1 : 7 }",
    ])  # fmt: skip
    with pytest.raises(KernelError, match="an element of 4 bytes where ours have 12"):
        tallies.read()


class Changing(Dumps):
    """Somebody changes the ruleset while it is read, `times` times."""

    def __init__(self, nft: Nft, times: int) -> None:
        super().__init__()
        self.nft, self.times, self.listed = nft, times, 0

    def objects(self, family: Any) -> Any:
        yield from super().objects(family)
        self.listed += 1
        if self.times > 0:
            self.times -= 1
            self.nft.run([f"add counter inet egressd more{self.times}"])


def test_a_reading_of_two_rulesets_is_thrown_away(session: Nft) -> None:
    dumps = Changing(session, 2)
    assert Tallies(dumps).read() == observe.counters(session.list_json())
    assert dumps.listed == 4, "both families, once in vain"


def test_one_that_never_comes_to_rest_is_no_reading(session: Nft) -> None:
    with pytest.raises(NetlinkError) as caught:
        Tallies(Changing(session, 1000)).read()
    assert caught.value.number == errno.EINTR
