"""Does this kernel have what egressd stands on? Asked before anything is changed, in a namespace made for
the question and gone with it. Each answer that is no names the remedy."""

from __future__ import annotations

from pathlib import Path

from egressd.kernel import namespaces, sysctl
from egressd.kernel.nft import Nft
from egressd.model.errors import KernelError

__all__ = ["probe"]

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
)


def probe() -> None:
    """KernelError listing everything that is missing."""
    with namespaces.throw_away():
        missing = [f"{what}: {remedy}" for what, batch, remedy in _NEEDED if not _accepted(batch)]
        if not Path("/proc/sys/net/ipv6").exists():
            missing.append("IPv6: the kernel was started with ipv6.disable=1; start it without")
        elif sysctl.read("net/netfilter/nf_conntrack_tcp_loose") is None:
            missing.append("connection tracking: CONFIG_NF_CONNTRACK (modprobe nf_conntrack)")
    if missing:
        raise KernelError("this kernel lacks " + "; ".join(missing))


def _accepted(batch: str) -> bool:
    nft = Nft()
    try:
        nft.run([batch])
    except KernelError:
        return False
    nft.run(["flush ruleset"])
    return True
