"""What was found on a machine, without any judgement. One document, so that it can be kept and judged again.

None everywhere means: not found out, since it could not be tried with the rights at hand.
"""

from __future__ import annotations

from msgspec import Struct

__all__ = [
    "Account", "Clock", "Daemon", "Facts", "Feature", "Network", "Obstacle", "Place", "Software", "Spawning",
    "Trial", "Uplink",
]  # fmt: skip


class _Facts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of them all."""


class Trial(Struct, frozen=True, forbid_unknown_fields=True):
    """Something that was tried. `ok` None: it could not be, and `said` tells why."""

    ok: bool | None
    said: str = ""


class Feature(_Facts, frozen=True):
    """One thing of the kernel, as kernel/probe.py answers."""

    need: str
    how: str
    there: bool | None  # None: could not be tried
    remedy: str
    said: str = ""


class Software(_Facts, frozen=True):
    os: str = ""  # PRETTY_NAME of os-release(5)
    kernel: str = ""  # as `uname -r`
    features: tuple[Feature, ...] | None = None
    nftables: Trial = Trial(None)  # libnftables' binding
    systemd: Trial = Trial(None)  # python3-systemd
    seccomp: Trial = Trial(None)  # the filter compiles
    by_systemd: bool = False  # systemd is this machine's first process


class Spawning(_Facts, frozen=True):
    """What a caller of `egressctl run` meets. `uid`: as whom it was tried."""

    uid: int = 0
    bwrap: str | None = None  # its path; None: not found
    version: str = ""  # what `bwrap --version` says
    setuid: bool = False
    namespaces: Trial = Trial(None)  # bubblewrap with every namespace, without a new /proc
    proc: Trial = Trial(None)  # the same with one
    queue: Trial = Trial(None)  # packets can be held in a namespace of one's own
    cgroup: Trial = Trial(None)  # a group with limits can be made
    cgroup2: bool = False  # the machine has cgroup v2 mounted
    profiled: bool | None = None  # AppArmor has a profile for bubblewrap


class Account(_Facts, frozen=True):
    uid: int
    gid: int


class Place(_Facts, frozen=True):
    """A file or directory. `present` None: it cannot be seen."""

    path: str
    what: str
    present: bool | None = None
    mode: int = 0  # permission bits
    uid: int = 0
    gid: int = 0
    owner: int | None = None  # who it should belong to; None: nobody in particular
    forbidden: int = 0o022  # bits that it must not have
    reader: Account | None = None  # who must be able to read it
    made: bool = False  # egressd makes it itself


class Clock(_Facts, frozen=True):
    synchronised: bool | None = None  # adjtimex(2)
    stepped: float | None = None  # seconds by which it was set since egressd started
    ahead: float = 0.0  # seconds by which the newest record lies in the future


class Daemon(_Facts, frozen=True):
    config: Trial = Trial(None)
    config_file: str = ""
    accounts: Trial = Trial(None)
    places: tuple[Place, ...] = ()
    control: Trial = Trial(None)  # the socket answers
    broken: tuple[str, ...] = ()  # workspaces whose policy is
    local_only: bool | None = None  # every workspace is
    upstreams: tuple[str, ...] = ()  # addresses
    broker: Trial | None = None  # its configuration; None: not set up
    broker_account: bool = False


class Uplink(_Facts, frozen=True):
    name: str
    there: bool
    forwards4: bool | None = None
    forwards6: bool | None = None  # None: this kernel has one switch for all
    disabled6: bool = False


class Obstacle(_Facts, frozen=True):
    """A chain of somebody else's firewall in which what comes from egressd's device ends. See firewall.py."""

    family: str
    table: str
    chain: str
    owner: str  # docker, ufw, firewalld, or empty
    direction: str  # out, back
    packet: str  # ip, ip6
    why: str
    certain: bool


class Network(_Facts, frozen=True):
    link: bool = False  # egressd's device is there
    host_table: bool | None = None  # `table inet egressd_host` is
    uplinks: tuple[Uplink, ...] = ()
    default4: bool = False
    default6: bool = False
    ipv6: bool = True  # the kernel has it
    disabled6: bool = False  # net.ipv6.conf.all.disable_ipv6
    obstacles: tuple[Obstacle, ...] | None = None
    legacy: tuple[str, ...] = ()  # tables of iptables-legacy, which nft does not show
    overlaps: tuple[str, ...] = ()  # "198.18.0.0/16 and the route 198.18.0.0/24 on eth0"
    nameservers: tuple[str, ...] = ()  # of /etc/resolv.conf
    managers: tuple[str, ...] = ()  # who manages egressd's device: NetworkManager, systemd-networkd


class Facts(_Facts, frozen=True):
    uid: int = 0
    software: Software = Software()
    spawning: Spawning = Spawning()
    daemon: Daemon = Daemon()
    network: Network = Network()
    clock: Clock = Clock()
    sysctls: dict[str, str] = {}  # of SYSCTLS, those that there are
    descriptors: int | None = None  # the most that the running daemon may open
