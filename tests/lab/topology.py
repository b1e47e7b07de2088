"""The lab's map: who lives where, under which address.

Everything below exists only in namespaces of its own; no packet ever meets the machine's network.

     lab-host: plays the machine                            lab-net: plays the internet
    ┌───────────────────────────────────────────┐          ┌────────────────────────────────────────────────┐
    │ lo   127.0.0.1:11434  a fake Ollama       │          │ net0  10.3.0.254       2001:db8:3::fe   router │
    │      127.0.0.1:9999   secrets of the host │          │       10.3.0.2         2001:db8:3::2    DNS    │
    │      0.0.0.0:9998        (three ways in)  │   veth   │ answers for every address of                   │
    │      [::]:9997                            │          │       11.22.33.0/24    2a10:5353::/48   public │
    │                                           │          │       10.20.0.0/16     fd20:20::/48     private│
    │ up0  10.3.0.1/24      default via .254    │──────────│       10.9.9.9, 1.1.1.1, 8.8.8.8        other  │
    │      2001:db8:3::1/64 default via ::fe    │    ▲     │                  2001:db8:9::9      resolvers  │
    │                                           │    │     │       169.254.169.254  fd00:ec2::254    cloud  │
    │  (egressd, its gateway and the sandboxes  │    │     │                                     metadata   │
    │   come here: `egressd --config …`)        │    │     │ never answers: 11.22.34.0/24 2a10:5354::/48    │
    └───────────────────────────────────────────┘    │     └────────────────────────────────────────────────┘
                                          the capture listens here
                                         (on up0), and is the judge

Every address of lab-net listens on the same ports (see `internet.py`), the forbidden ones too: a byte that
gets out is answered, and the log of the servers tells as much as the capture does. "Public" addresses are
of ranges that are global unicast to Python's `ipaddress` and to egressd, because documentation
ranges are not; nobody outside this namespace is ever asked.

Neighbours on the uplink are static, so an idle uplink carries no frame at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

__all__ = ["HOST", "NET", "Records", "host_batch", "net_batch", "sysctls", "zone"]

HOST, NET = "lab-host", "lab-net"
UPLINK, FAR = "up0", "net0"
UPLINK_MAC, FAR_MAC = "02:1a:b0:00:00:01", "02:1a:b0:00:00:02"

HOST4, HOST6 = IPv4Address("10.3.0.1"), IPv6Address("2001:db8:3::1")
ROUTER4, ROUTER6 = IPv4Address("10.3.0.254"), IPv6Address("2001:db8:3::fe")
DNS4, DNS6 = IPv4Address("10.3.0.2"), IPv6Address("2001:db8:3::2")
OTHER_DNS4, OTHER_DNS6 = IPv4Address("10.9.9.9"), IPv6Address("2001:db8:9::9")
METADATA4, METADATA6 = IPv4Address("169.254.169.254"), IPv6Address("fd00:ec2::254")

OPENAI4, OPENAI6 = IPv4Address("11.22.33.10"), IPv6Address("2a10:5353::10")
CDN4, CDN6 = IPv4Address("11.22.33.20"), IPv6Address("2a10:5353::20")
PLAIN4, PLAIN6 = IPv4Address("11.22.33.30"), IPv6Address("2a10:5353::30")
EVIL4, EVIL6 = IPv4Address("11.22.33.66"), IPv6Address("2a10:5353::66")
DB4, DB6 = IPv4Address("10.20.0.5"), IPv6Address("fd20:20::5")
SILENT4, SILENT6 = IPv4Address("11.22.34.1"), IPv6Address("2a10:5354::1")

ANSWERED4 = tuple(
    map(
        IPv4Network,
        ("11.22.33.0/24", "10.20.0.0/16", "10.9.9.9/32", "1.1.1.1/32", "8.8.8.8/32", "169.254.169.254/32"),
    )
)
ANSWERED6 = tuple(
    map(IPv6Network, ("2a10:5353::/48", "fd20:20::/48", "2001:db8:9::9/128", "fd00:ec2::254/128"))
)

OLLAMA_PORT = 11434
SECRET_PORTS = (9999, 9998, 9997)  # 127.0.0.1, 0.0.0.0, [::]
SECRET = b"lab-host's secret"


@dataclass(slots=True)
class Records:
    """What the lab's DNS says about one name. `types` maps "A", "CNAME", "TXT", … to zone-file data."""

    types: dict[str, list[str]] = field(default_factory=dict)
    ttl: int = 60
    rcode: str = "NOERROR"
    delay: float = 0.0  # seconds before the answer
    drop: bool = False  # never answer
    truncate: bool = False  # over UDP: TC and nothing else


def _host(*addresses: IPv4Address | IPv6Address) -> Records:
    four = [str(address) for address in addresses if address.version == 4]
    six = [str(address) for address in addresses if address.version == 6]
    return Records({kind: data for kind, data in (("A", four), ("AAAA", six)) if data})


def zone() -> dict[str, Records]:
    """The names the lab starts with. Tests change them while the lab runs (`Internet.set`)."""
    return {
        "api.openai.test": _host(OPENAI4, OPENAI6),
        "eu.api.openai.test": _host(OPENAI4, OPENAI6),
        "one.cdn.test": _host(CDN4, CDN6),  # two names, one address
        "two.cdn.test": _host(CDN4, CDN6),
        "plain.test": _host(PLAIN4, PLAIN6),
        "four.test": _host(PLAIN4),
        "six.test": _host(PLAIN6),
        "alias.test": Records({"CNAME": ["plain.test."]}),
        "*.search.test": _host(IPv4Address("11.22.33.40"), IPv6Address("2a10:5353::40")),
        "many.test": _host(
            *(IPv4Address("11.22.33.128") + n for n in range(8)),
            *(IPv6Address("2a10:5353::80") + n for n in range(8)),
        ),
        "evil.test": _host(EVIL4, EVIL6),
        "*.evil.test": _host(EVIL4, EVIL6),
        "db.internal.test": _host(DB4, DB6),
        "rebind.test": _host(IPv4Address("127.0.0.1"), IPv6Address("::1")),
        "metadata.test": _host(METADATA4, METADATA6),
        "silent.test": _host(SILENT4, SILENT6),
        "broken.test": Records(rcode="SERVFAIL"),
        "mute.test": Records(drop=True),
        "long.test": Records({"TXT": [f'"{letter * 250}"' for letter in "abcdefgh"]}),
    }


def host_batch() -> str:
    """Lines for `ip -batch -` in lab-host. Makes the veth pair; its far end is born in lab-net."""
    return f"""
link set lo up
link add {UPLINK} address {UPLINK_MAC} type veth peer name {FAR} address {FAR_MAC} netns {NET}
addr add {HOST4}/24 dev {UPLINK}
addr add {HOST6}/64 dev {UPLINK} nodad
link set {UPLINK} addrgenmode none up
{_neighbours(UPLINK, FAR_MAC, ROUTER4, ROUTER6, DNS4, DNS6)}
route add default via {ROUTER4} dev {UPLINK}
route add default via {ROUTER6} dev {UPLINK}
"""


def net_batch() -> str:
    """Lines for `ip -batch -` in lab-net. `local` routes make it answer for whole ranges."""
    addresses = "\n".join(
        [f"addr add {address}/24 dev {FAR}" for address in (ROUTER4, DNS4)]
        + [f"addr add {address}/64 dev {FAR} nodad" for address in (ROUTER6, DNS6)]
    )
    answered = "\n".join(
        [f"route add local {network} dev lo" for network in ANSWERED4]
        + [f"route add local {network} dev lo" for network in ANSWERED6]
    )
    return f"""
link set lo up
{addresses}
link set {FAR} addrgenmode none up
{_neighbours(FAR, UPLINK_MAC, HOST4, HOST6)}
{answered}
route add default via {HOST4} dev {FAR}
route add default via {HOST6} dev {FAR}
"""


def _neighbours(device: str, mac: str, *addresses: IPv4Address | IPv6Address) -> str:
    return "\n".join(
        f"neigh replace {address} lladdr {mac} dev {device} nud permanent" for address in addresses
    )


def sysctls(*, host: bool) -> dict[str, str]:
    """Settings under /proc/sys/net before links exist: a quiet wire, and a host that forwards nothing."""
    quiet = {
        "ipv4/conf/default/rp_filter": "0",
        "ipv4/conf/all/rp_filter": "0",
        "ipv6/conf/default/accept_ra": "0",
        "ipv6/conf/default/router_solicitations": "0",
        "ipv6/conf/default/dad_transmits": "0",
        "ipv6/conf/default/mldv2_unsolicited_report_interval": "0",
        "ipv4/ip_forward": "0",
        "ipv6/conf/all/forwarding": "0",
    }
    # UDP answers leave from the address that was asked, which IPv6 allows for assigned addresses only.
    return quiet if host else quiet | {"ipv6/ip_nonlocal_bind": "1"}
