"""The gateway and its connection to the host, as tables of values; read back, compared, put right.

Everything the gateway needs besides its ruleset stands in this file: RULES is the second key, a list of
what is permitted (a packet with no admitted mark that came in by a sandbox's link matches nothing but the
last rule). `missing_and_foreign` compares the kernel with the tables and returns steps; a step says what
it mends. Nothing is ever done that was not found to be needed, so doing it twice does nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface

from egressd.kernel import routing, sysctl
from egressd.kernel.links import Links
from egressd.kernel.netlink import CREATE, EXCLUSIVE, Netlink, Request, encode
from egressd.kernel.routing import (
    IFF_NOARP,
    LOCAL,
    MAIN,
    Address,
    AnyAddress,
    Device,
    Neighbour,
    Route,
    Rule,
    Tables,
    Thing,
    change_link,
)  # fmt: skip
from egressd.kernel.rtmessages import ifinfmsg
from egressd.kernel.sysctl import Setting
from egressd.model.identities import Link
from egressd.ruleset import layout
from egressd.ruleset.layout import HOST_LINK, UPLINK, Kind, Pools

__all__ = [
    "GATEWAY_SETTINGS", "RULES", "Step", "backstops", "gateway_steps", "gateway_things", "host_settings",
    "host_steps", "make_pair", "run",
]  # fmt: skip

# The two ends of the pair between gateway and host.
UPLINK_MAC, HOST_MAC = "02:53:00:00:00:03", "02:53:00:00:00:04"

_ANY4, _ANY6 = IPv4Network("0.0.0.0/0"), IPv6Network("::/0")
# What the inspector dials is synthetic: unmarked, it is for the gateway itself, where nobody listens.
_DIAL: dict[int, str] = {socket.AF_INET: str(layout.DIAL4), socket.AF_INET6: str(layout.DIAL6)}


def _rules(family: int) -> tuple[Rule, ...]:
    steered, resolve, forward = int(Kind.RELAY), int(Kind.RESOLVE), int(Kind.FORWARD)
    return (
        Rule(family, 10, None, mark=steered, device=UPLINK),
        Rule(family, 11, layout.ROUTES_STEERED, mark=steered),
        Rule(family, 12, LOCAL, mark=resolve),
        Rule(family, 13, layout.ROUTES_FORWARD, mark=forward),
        Rule(family, 14, layout.ROUTES_DIALLED, device="lo", source=_DIAL[family]),
        Rule(family, 15, None, device="lo", source=_DIAL[family]),
        Rule(family, 20, LOCAL, device="lo"),
        Rule(family, 21, MAIN, device="lo"),
        Rule(family, 22, LOCAL, device=UPLINK),
        Rule(family, 23, MAIN, device=UPLINK),
        Rule(family, 32767, None),
    )


RULES: tuple[Rule, ...] = _rules(socket.AF_INET) + _rules(socket.AF_INET6)

_EARLY = "an open connection would be found before routing is asked, and survive both keys"
_LOOSE = "a packet in the middle of no connection would be forwarded"
_CLOSED = "who opens and closes connections without end would fill the table"
_FLOWS = "flow records: who talked to whom, how much, how long (CONFIG_NF_CONNTRACK_TIMESTAMP, _EVENTS)"
_STATIC = "neighbours are static: no discovery, no advertisement, no automatic address"

GATEWAY_SETTINGS: tuple[Setting, ...] = (
    # Forwarding first: switching it resets other settings of the namespace (inet_forward_change).
    Setting("net/ipv4/ip_forward", "1"),
    Setting("net/ipv6/conf/all/disable_ipv6", "0"),
    Setting("net/ipv6/conf/default/disable_ipv6", "0"),
    Setting("net/ipv6/conf/all/forwarding", "1"),
    Setting("net/ipv4/ip_early_demux", "0", _EARLY),
    Setting("net/ipv4/tcp_early_demux", "0", _EARLY),
    Setting("net/ipv4/udp_early_demux", "0", _EARLY),
    # What the inspector dials for one workspace comes from one address: at 28,000 ports and a minute of
    # TIME_WAIT, 470 connections a second to one host would be the end of it.
    Setting("net/ipv4/ip_local_port_range", "1024 65535"),
    Setting("net/ipv4/tcp_tw_reuse", "1"),
    # The warden stands in a host's place for a moment (kernel/nudge.py), and hosts have low ports. It has no
    # CAP_NET_BIND_SERVICE. What the gateway's own has bound low, the resolver's, was bound at the start.
    Setting("net/ipv4/ip_unprivileged_port_start", "0"),
    Setting("net/netfilter/nf_conntrack_tcp_loose", "0", _LOOSE),
    Setting("net/netfilter/nf_conntrack_tcp_timeout_time_wait", str(layout.CLOSED_FOR), _CLOSED),
    # An entry gets what it needs to count, to note times and to tell of its end when it is made, or never.
    Setting("net/netfilter/nf_conntrack_acct", "1", _FLOWS),
    Setting("net/netfilter/nf_conntrack_timestamp", "1", _FLOWS),
    Setting("net/netfilter/nf_conntrack_events", "1", _FLOWS),
    Setting("net/ipv4/conf/all/rp_filter", "0", "the largest of all and the device's own counts"),
    Setting("net/ipv4/conf/default/rp_filter", "1", "links that come later"),
    Setting("net/ipv4/conf/all/accept_source_route", "0"),
    Setting("net/ipv4/conf/default/accept_source_route", "0"),
    Setting("net/ipv4/conf/all/send_redirects", "0"),
    Setting("net/ipv4/conf/default/send_redirects", "0"),
    Setting("net/ipv4/conf/all/accept_redirects", "0"),
    Setting("net/ipv4/conf/default/accept_redirects", "0"),
    Setting("net/ipv4/conf/all/route_localnet", "0"),
    Setting("net/ipv6/conf/all/accept_source_route", "-1"),
    Setting("net/ipv6/conf/default/accept_source_route", "-1"),
    Setting("net/ipv6/conf/all/accept_redirects", "0"),
    Setting("net/ipv6/conf/default/accept_redirects", "0"),
    Setting("net/ipv6/conf/default/accept_ra", "0", _STATIC),
    Setting("net/ipv6/conf/default/addr_gen_mode", "1", _STATIC),
    Setting("net/ipv6/conf/default/accept_dad", "0", _STATIC),
    Setting("net/ipv6/conf/default/dad_transmits", "0", _STATIC),
)
# For the one device that is there before, or by adoption.
UPLINK_SETTINGS: tuple[Setting, ...] = (
    Setting(
        f"net/ipv4/conf/{UPLINK}/rp_filter", "0", "the way back to the internet has a mark, the check none"
    ),
    Setting(f"net/ipv6/conf/{UPLINK}/addr_gen_mode", "1", _STATIC),
    Setting(f"net/ipv6/conf/{UPLINK}/accept_ra", "0", _STATIC),
    Setting(f"net/ipv6/conf/{UPLINK}/dad_transmits", "0", _STATIC),
)


def _pair_end(
    device: str, peer_mac: str, mine: Iterable[AnyAddress], theirs: Iterable[AnyAddress]
) -> Iterator[Thing]:
    """One end of the pair: its addresses, the routes of their prefixes, the other end's neighbours."""
    for address in mine:
        length = layout.UPLINK_PREFIX4 if address.version == 4 else layout.UPLINK_PREFIX6
        yield Address(device, address, length)
        yield Route(network=ip_interface((address, length)).network, device=device)
    for address in theirs:
        yield Neighbour(device, address, peer_mac)


_GATEWAY_END = (layout.UPLINK_GATEWAY4, layout.UPLINK_GATEWAY6)
_HOST_END = (layout.UPLINK_HOST4, layout.UPLINK_HOST6)


def gateway_things(pools: Pools) -> list[Thing]:
    """Addresses, neighbours and routes of the gateway, sandboxes' links aside."""
    things: list[Thing] = [
        Address("lo", IPv4Address("127.0.0.1"), 8),
        Address("lo", IPv6Address("::1"), 128),
        Address("lo", layout.RESOLVER4, 32),
        Address("lo", layout.RESOLVER6, 128),
        *_pair_end(UPLINK, HOST_MAC, _GATEWAY_END, _HOST_END),
        Route(network=_ANY4, device=UPLINK, table=layout.ROUTES_FORWARD, via=layout.UPLINK_HOST4),
        Route(network=_ANY6, device=UPLINK, table=layout.ROUTES_FORWARD, via=layout.UPLINK_HOST6),
    ]
    for network in (_ANY4, _ANY6):
        things.append(Route(network=network, device="lo", table=layout.ROUTES_STEERED, kind="local"))
    for network in (layout.DIAL4, layout.DIAL6):
        things.append(Route(network=network, device="lo", table=LOCAL, kind="local"))
    for network in (pools.synthetic4, pools.synthetic6):
        # `local`: what no rule marks is for the gateway itself, where nobody listens, and refused at once
        things.append(
            Route(
                network=network,
                device="lo",
                table=layout.ROUTES_DIALLED,
                kind="local",
                mtu=layout.UPLINK_MTU,
            )
        )
    # An admitted packet that was not translated (somebody flushed `table inet`) ends here, unsent.
    return things + [replace(route, table=layout.ROUTES_FORWARD) for route in backstops(pools)]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is not as it should be, and the requests that put it right."""

    what: str
    requests: tuple[Request, ...]

    def describe(self) -> str:
        return self.what


def run(route: Netlink, steps: Iterable[Step]) -> list[str]:
    """Do all of it in order; returns what was done."""
    done = []
    for step in steps:
        route.run(step.requests)
        done.append(step.what)
    return done


# ---- the gateway


def gateway_steps(route: Netlink, *, links: Links, live: Iterable[Link] = ()) -> list[Step]:
    """What the gateway lacks and what does not belong there. `live`: links that should stand.

    Devices come first, since addresses and routes need them; rules next, missing ones before foreign ones
    go, so that there is no moment with less of the second key.
    """
    tables = Tables(route)
    devices = tables.devices()
    standing = [link for link in live if link.device in devices]
    steps = rule_steps(tables)
    steps += _device_steps(devices, ("lo", UPLINK))
    steps += [
        Step(
            f"{link.device} was down, with ARP, or out of its group",
            (links.raise_device(devices[link.device]),),
        )
        for link in standing
        if not links.sound(devices[link.device])
    ]
    wanted: list[Thing] = [
        thing for thing in gateway_things(links.pools) if _device_of(thing) in ("", *devices)
    ]
    for link in standing:
        wanted += links.things(link)
    return steps + thing_steps(tables, devices, wanted, foreign_routes=True)


def rule_steps(tables: Tables) -> list[Step]:
    have = tables.rules()
    steps = [_missing(rule, {}) for rule in RULES if rule not in have]
    return steps + [_foreign(rule, {}) for rule in have if rule not in RULES]


def _device_steps(devices: dict[str, Device], names: Iterable[str]) -> list[Step]:
    steps = []
    for name in names:
        device = devices.get(name)
        if device is not None and not (device.up and (name == "lo" or not device.arp)):
            request = change_link(device.index, f"set {name} up", up=True, arp=name == "lo")
            steps.append(Step(f"{name} was down, or with ARP", (request,)))
    return steps


def thing_steps(
    tables: Tables, devices: dict[str, Device], wanted: Iterable[Thing], *, foreign_routes: bool
) -> list[Step]:
    """Missing addresses, neighbours and routes; and routes that are none of ours."""
    wanted = list(wanted)
    names = {device.index: device.name for device in devices.values()}
    indexes = {device.name: device.index for device in devices.values()}
    routes = tables.routes(names)
    have = {_key(thing) for thing in (*tables.addresses(names), *tables.neighbours(names), *routes)}
    steps = [_missing(thing, indexes) for thing in wanted if _key(thing) not in have]
    steps += _undelivered(tables, wanted, have, indexes)
    if foreign_routes:
        ours = {thing.place for thing in wanted if isinstance(thing, Route)}
        steps += [_foreign(route, indexes) for route in routes if route.place not in ours]
    return steps


def _undelivered(
    tables: Tables, wanted: list[Thing], have: set[object], indexes: routing.Indexes
) -> Iterator[Step]:
    """Addresses that are there, but whose entry in table local somebody took away: set anew."""
    delivered = tables.locals()
    for thing in wanted:
        if isinstance(thing, Address) and _key(thing) in have and thing.address not in delivered:
            requests = (thing.remove(indexes), thing.make(indexes))
            yield Step(f"table local did not deliver {thing.address}", requests)


def _missing(thing: Thing, indexes: routing.Indexes) -> Step:
    return Step(f"{thing.describe()} was missing", (thing.make(indexes),))


def _foreign(thing: Thing, indexes: routing.Indexes) -> Step:
    return Step(f"{thing.describe()} was foreign", (thing.remove(indexes),))


def _key(thing: object) -> object:
    return thing.key if isinstance(thing, Route) else thing


def _device_of(thing: Thing) -> str:
    return getattr(thing, "device", "")


def make_pair(route: Netlink, gateway: int) -> None:
    """From the host: the veth pair with one end born in the gateway (a descriptor)."""
    peer = {
        "attrs": [("IFLA_IFNAME", UPLINK), ("IFLA_NET_NS_FD", gateway), ("IFLA_ADDRESS", UPLINK_MAC)],
        "flags": IFF_NOARP,
        "change": IFF_NOARP,
    }
    info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]})]}
    attrs = [("IFLA_IFNAME", HOST_LINK), ("IFLA_ADDRESS", HOST_MAC), ("IFLA_LINKINFO", info)]
    body = encode(ifinfmsg, attrs, flags=IFF_NOARP, change=IFF_NOARP)
    route.run([Request(routing.NEWLINK, body, f"make {HOST_LINK} and {UPLINK}", CREATE | EXCLUSIVE)])


# ---- the host's side


def backstops(pools: Pools) -> tuple[Route, ...]:
    """Whatever should ever reach the host with one of our addresses as its destination ends there."""
    networks = (pools.synthetic4, pools.sandbox4, pools.synthetic6, pools.sandbox6)
    return tuple(Route(network=network, kind="unreachable") for network in networks)


def host_things(pools: Pools) -> list[Thing]:
    return [*_pair_end(HOST_LINK, UPLINK_MAC, _HOST_END, _GATEWAY_END), *backstops(pools)]


def host_steps(route: Netlink, pools: Pools) -> list[Step]:
    """What the host's end lacks. Nothing of the host that is not ours is looked at as foreign."""
    tables = Tables(route)
    devices = tables.devices()
    steps = _device_steps(devices, (HOST_LINK,))
    return steps + thing_steps(tables, devices, host_things(pools), foreign_routes=False)


def host_settings(uplinks: Iterable[str]) -> list[Setting]:
    """Forwarding for our link and the uplinks, for nothing else where the kernel can tell them apart."""
    devices = (HOST_LINK, *uplinks)
    settings = [
        Setting(f"net/ipv6/conf/{HOST_LINK}/disable_ipv6", "0", optional=True),
        Setting(f"net/ipv6/conf/{HOST_LINK}/addr_gen_mode", "1", _STATIC, optional=True),
        Setting(f"net/ipv6/conf/{HOST_LINK}/accept_ra", "0", _STATIC, optional=True),
    ]
    settings += [Setting(f"net/ipv4/conf/{device}/forwarding", "1") for device in devices]
    if sysctl.read("net/ipv6/conf/all/force_forwarding") is not None:  # Linux 6.17
        settings += [
            Setting(f"net/ipv6/conf/{device}/force_forwarding", "1", optional=True) for device in devices
        ]
        return settings
    # Older kernels forward IPv6 for all devices or none, and a forwarding host ignores router
    # advertisements unless accept_ra is 2 (Documentation/networking/ip-sysctl.rst).
    for device in uplinks:
        if sysctl.read(f"net/ipv6/conf/{device}/accept_ra") == "1":
            settings.append(Setting(f"net/ipv6/conf/{device}/accept_ra", "2"))
    settings.append(Setting("net/ipv6/conf/all/forwarding", "1", optional=True))
    return settings
