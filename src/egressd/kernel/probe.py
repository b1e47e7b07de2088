"""Does this kernel have what egressd stands on? Asked before anything is changed, in a namespace made for
the question and gone with it. Each answer that is no names the remedy. `egressctl doctor` shows them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from egressd.kernel import namespaces, netlink, routing, sockets
from egressd.kernel.conntrack import Conntrack
from egressd.kernel.netlink import CREATE, EXCLUSIVE, Netlink, Request, encode
from egressd.kernel.nft import Nft
from egressd.kernel.rtmessages import ifinfmsg
from egressd.model.errors import KernelError
from egressd.ruleset import build
from egressd.ruleset.layout import Pools

__all__ = ["Answer", "answers", "probe"]

_NEEDED: tuple[tuple[str, str, str], ...] = (
    # (what, an nft batch that needs it, what to do without it)
    (
        "nftables with named counters at netdev ingress",
        "add table netdev probe;"
        ' add chain netdev probe c { type filter hook ingress device "lo" priority 0; }',
        "CONFIG_NF_TABLES_NETDEV, CONFIG_NETFILTER_INGRESS (modprobe nf_tables)",
    ),
    (
        "rejecting at netdev ingress",
        "add table netdev probe; add chain netdev probe c; add rule netdev probe c reject with icmpx type"
        " port-unreachable",
        "CONFIG_NFT_REJECT_NETDEV, Linux 5.15 or later (modprobe nft_reject_netdev)",
    ),
    (
        "maps with a counter in each element",
        "add table inet probe;"
        " add map inet probe m { type ipv4_addr . inet_proto . inet_service : mark; counter; }",
        "Linux 5.7 and nft 0.9.5 or later",
    ),
    (
        "transparent proxying",
        "add table inet probe; add chain inet probe c { type filter hook prerouting priority mangle; };"
        " add rule inet probe c meta l4proto tcp tproxy ip to 127.0.0.1:1 accept",
        "CONFIG_NFT_TPROXY (modprobe nft_tproxy)",
    ),
    (
        "address translation with a map",
        "add table inet probe; add map inet probe m { type mark . ipv6_addr : ipv6_addr; };"
        " add chain inet probe c { type nat hook prerouting priority dstnat; };"
        " add rule inet probe c dnat ip6 to meta mark . ip6 daddr map @m",
        "CONFIG_NFT_NAT, CONFIG_NF_NAT (modprobe nft_nat)",
    ),
    (
        "limiting concurrent connections",
        "add table inet probe; add chain inet probe c; add rule inet probe c ct count over 1 drop",
        "CONFIG_NFT_CONNLIMIT (modprobe nft_connlimit)",
    ),
    (
        "asking for a route in a rule",
        "add table inet probe; add chain inet probe c { type filter hook prerouting priority 0; };"
        " add rule inet probe c fib daddr . mark oif missing drop",
        "CONFIG_NFT_FIB_INET, CONFIG_NFT_FIB_IPV6 (modprobe nft_fib_inet)",
    ),
)


_MODULES = "is the kernel that runs the one whose modules are installed? (uname -r; ls /lib/modules)"


@dataclass(frozen=True, slots=True)
class Answer:
    """`how` it was asked; `said`: the kernel's word, where there is one; `remedy`: if it is not there."""

    need: str
    how: str
    there: bool
    remedy: str
    said: str = ""


def probe() -> None:
    """KernelError listing everything that is missing."""
    missing = [answer for answer in answers() if not answer.there]
    if missing:
        listed = "; ".join(f"{answer.need}: {answer.remedy}" for answer in missing)
        raise KernelError(f"this kernel lacks {listed}")


def answers() -> list[Answer]:
    """Each tried in a namespace that ends with this call. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN."""
    with namespaces.throw_away():
        found = [_batch(what, batch, remedy) for what, batch, remedy in _NEEDED]
        found += _settings()
        found += [_tried(*trial) for trial in _TRIALS]
        if all(answer.there for answer in found):  # else it fails for a reason that has been named
            found.append(_tried(*_WHOLE))
    return found


def _batch(what: str, batch: str, remedy: str) -> Answer:
    return _tried(what, "a rule that needs it, in a namespace made for it", remedy, lambda: _accept(batch))


def _accept(batch: str) -> None:
    nft = Nft()
    nft.run([batch])
    nft.run(["flush ruleset"])


def _tried(need: str, how: str, remedy: str, trial: Callable[[], None]) -> Answer:
    try:
        trial()
    except (KernelError, OSError) as error:
        return Answer(need, how, False, remedy, str(error))
    return Answer(need, how, True, remedy)


def _settings() -> Iterator[Answer]:
    """What shows as a setting of a namespace, once connection tracking is loaded: the rules above do."""
    for need, key, remedy in (
        ("IPv6", "net/ipv6", "the kernel was started with ipv6.disable=1; start it without"),
        (
            "connection tracking",
            "net/netfilter/nf_conntrack_tcp_loose",
            "CONFIG_NF_CONNTRACK (modprobe nf_conntrack)",
        ),
        (
            "connection tracking that counts",
            "net/netfilter/nf_conntrack_acct",
            "CONFIG_NF_CONNTRACK (modprobe nf_conntrack)",
        ),
        (
            "connection tracking that notes times",
            "net/netfilter/nf_conntrack_timestamp",
            "CONFIG_NF_CONNTRACK_TIMESTAMP: another kernel",
        ),
        (
            "connection tracking that tells of ends",
            "net/netfilter/nf_conntrack_events",
            "CONFIG_NF_CONNTRACK_EVENTS: another kernel",
        ),
    ):
        there = Path("/proc/sys", key).exists()
        yield Answer(need, f"is there /proc/sys/{key}?", there, remedy)


def _make_pair() -> None:
    info = {"attrs": [("IFLA_INFO_KIND", "veth")]}
    body = encode(ifinfmsg, [("IFLA_IFNAME", "probe0"), ("IFLA_LINKINFO", info)])
    route = Netlink(netlink.ROUTE)
    try:
        route.run([Request(routing.NEWLINK, body, "make a veth pair", CREATE | EXCLUSIVE)])
    finally:
        route.close()


def _log() -> None:
    sockets.open_log().close()


def _ask_conntrack() -> None:
    conntrack = Conntrack()
    try:
        conntrack.forget_all()
    finally:
        conntrack.close()
    sockets.open_flows().close()


def _whole_ruleset() -> None:
    _accept("\n".join(build.base(Pools())))


_TRIALS: tuple[tuple[str, str, str, Callable[[], None]], ...] = (
    # (what, how, what to do without it, the trial)
    ("pairs of virtual devices", "one made", "CONFIG_VETH (modprobe veth)", _make_pair),
    (
        "a log of packets (NFLOG)",
        "a group bound",
        "CONFIG_NETFILTER_NETLINK_LOG (modprobe nfnetlink_log)",
        _log,
    ),
    (
        "reading connections and hearing of their end",
        "asked, and a group joined",
        "CONFIG_NF_CT_NETLINK, CONFIG_NF_CONNTRACK_EVENTS (modprobe nf_conntrack_netlink)",
        _ask_conntrack,
    ),
)
_WHOLE = (
    "the gateway's ruleset as a whole",
    "put in force in a namespace made for it",
    f"nft 1.0.6 or later; {_MODULES}",
    _whole_ruleset,
)
