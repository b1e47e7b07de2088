"""The host has no route to where something approved goes: it is refused at once, and counted. What has a
route, if only by the host's own rules, goes on."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from guard_topology import ACME, HOST4, HOST6, SERVER4, SERVER6, Topology, policy, sh, topology

pytestmark = pytest.mark.kernel
AT_ONCE = 500.0  # milliseconds; unanswered it takes a second, for the second SYN
FAMILIES = pytest.mark.parametrize("family", [4, 6])
SERVER = {4: SERVER4, 6: SERVER6}
NETWORK = {4: "10.3.0.0/24", 6: "2001:db8:3::/64"}


@pytest.fixture
def there() -> Iterator[Topology]:
    with topology("way") as made:
        made.apply(policy(*ACME))
        made.resolve("plain.test", SERVER4, SERVER6)
        made.resolve("quic.test", SERVER4, SERVER6)
        made.connect(1)
        yield made


def wayless(there: Topology) -> int:
    listing = there.host_nft.list_text().partition("counter wayless")[2]
    return int(listing.partition("packets ")[2].split()[0])


def tried(there: Topology, name: str, family: int, kind: int = socket.SOCK_STREAM) -> str:
    port = 80 if kind == socket.SOCK_STREAM else 443
    outcome, milliseconds = there.timed(1, there.address(name, family), port, kind=kind, seconds=5)
    assert milliseconds < AT_ONCE, outcome
    return outcome


@FAMILIES
def test_without_a_route_it_is_refused_at_once(there: Topology, family: int) -> None:
    listener = there.server(there.internet, SERVER[family], 80)
    assert tried(there, "plain.test", family) == "ok"
    sh(f"ip -n {there.host} -{family} route del default")
    assert tried(there, "plain.test", family) == "ok", "its network is there"
    assert wayless(there) == 0
    sh(f"ip -n {there.host} -{family} route del {NETWORK[family]}")
    assert tried(there, "plain.test", family) == "ConnectionRefusedError"
    assert wayless(there) == 1
    listener.close()


@FAMILIES
def test_so_are_datagrams(there: Topology, family: int) -> None:
    sh(f"ip -n {there.host} -{family} route del default")
    sh(f"ip -n {there.host} -{family} route del {NETWORK[family]}")
    assert tried(there, "quic.test", family, socket.SOCK_DGRAM) == "ConnectionRefusedError"
    assert wayless(there) == 1


@FAMILIES
def test_a_route_that_hangs_on_a_mark_is_one(there: Topology, family: int) -> None:
    """As of a VPN's."""
    sh(f"ip -n {there.host} -{family} route del default")
    sh(f"ip -n {there.host} -{family} route del {NETWORK[family]}")
    sh(f"ip -n {there.host} -{family} route add {NETWORK[family]} dev wan table 77")
    sh(f"ip -n {there.host} -{family} rule add fwmark 7 lookup 77")
    there.host_nft.run([
        "add table inet vpn", "add chain inet vpn c { type filter hook prerouting priority mangle; }",
        "add rule inet vpn c iifname egw meta mark set 7",
    ])  # fmt: skip
    listener = there.server(there.internet, SERVER[family], 80)
    assert tried(there, "plain.test", family) == "ok"
    assert wayless(there) == 0
    listener.close()


@FAMILIES
def test_what_is_for_the_host_itself_is_refused_for_that(there: Topology, family: int) -> None:
    there.resolve("plain.test", HOST4, HOST6)
    assert tried(there, "plain.test", family) == "ConnectionRefusedError"
    assert wayless(there) == 0
