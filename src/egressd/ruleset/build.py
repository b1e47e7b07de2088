"""The firewall as data, and as nft commands. Pure: the same arguments give the same text.

A frame that leaves a sandbox takes this way; each `late` counter is for what was admitted and then lost.

    netdev ingress, chain egN        in; not plain IP -> other; quota; source exact;
        acme_4 / acme_6              shape; the one lookup: destination, protocol, port -> mark
        acme_unlisted, _source, ...  denied: counted by reason, logged, refused at once
        acme_closed                  the same for everything, where the link is closed
        late_budget-connections      a connection too many: was admitted, is refused at once
    inet prerouting, chain steer     unmarked, invalid -> dropped; chain egN_connections: what one sandbox
                                     may begin, and have open; inspector (TPROXY)
    inet prerouting, chain translate (mark, synthetic address) -> real address
    inet forward / local_in          only what was marked, and translated if it had to be
    inet local_out / forward         back: only replies, only of marks in @in

What the inspector sends on begins in the gateway, from its workspace's own source address:

    inet output, chain dial          destination, source, port -> mark of what is forwarded; else refused
    inet output, chain translate_out the same translation, after which routing is asked again
    inet local_out                   only what was translated
    inet local_in, chain dialled     back: the same rule as above

A connection can be cut (kernel/conntrack.py): its entry then bears a mark of no kind, which nothing admits.

    chains cut, cut_bare             what its client still sends: one segment without data is turned into a
                                     reset and goes on to the host; then the client is refused. What its
                                     host still sends: turned into resets as well

Until the lookup gives it a mark of a kind, a packet carries a number below 16 that says how far it got:
what remains is the reason for its denial.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from egressd.model.identities import Link, check_workspace
from egressd.ruleset import objects
from egressd.ruleset.layout import (
    ADMITTED,
    CLOSED_FOR,
    CUT,
    DIAL4,
    DIAL6,
    HOST_LINK,
    HOST_TABLE,
    IDLE_FOR,
    INSPECTOR_PORT,
    LINK_GROUP,
    NFLOG_GROUP,
    NUDGE,
    RELAY_PORT,
    RESOLVER4,
    RESOLVER6,
    RESOLVER_BLOCK,
    SPENT,
    TABLE,
    TOLD,
    UNLISTED_BLOCK,
    UPLINK,
    UPLINK_GATEWAY4,
    UPLINK_GATEWAY6,
    Kind,
    Mark,
    Pools,
    dial_source,
)
from egressd.ruleset.objects import (
    FAMILIES,
    VERDICT,
    Address,
    Chain,
    Counter,
    Entry,
    Hook,
    Key,
    Limit,
    Network,
    Objects,
    Quota,
    Set,
    Timeout,
    address_text,
    identifier,
    mark_text,
    network_text,
    string,
)
from egressd.ruleset.wants import Element, NatEntry, WorkspaceWant, comment

__all__ = [
    "DENIALS", "LATE", "LINK_COUNTERS", "OWNER", "Desired", "LinkWant", "base", "desired", "drop_workspace",
    "host", "link", "link_objects", "marks", "nat", "owner", "unlink", "unreachable", "workspace",
]  # fmt: skip

# Reasons the guard itself denies for. Each has a counter `W_REASON_denied` and a chain `W_REASON`.
DENIALS = ("unlisted", "shape", "source", "quota", "closed")
# Reasons for which an admitted packet is lost later, counted as `late_REASON` over all workspaces.
LATE = {
    "unmarked": "came over a link without having passed a guard",
    "invalid": "conntrack knows no connection it belongs to; NAT would not translate it",
    "reply": "a sandbox answering: nobody may connect to one",
    "connections": "above the limit of open connections",
    "pace": "faster than one sandbox may begin connections, or ask the resolver",
    "inspector": "to be inspected, and no inspector listens",
    "dial": "dialled by the inspector, and no rule of that workspace allows it",
    "unresolved": "the name has no address in this slot",
    "cut": "of a connection that was ended: its address may not be reached any more",
    "misrouted": "its way does not lead to where its mark permits",
    SPENT: "one connection more than the sandbox may ever open",
}
_LATE_BEHIND = tuple(reason for reason in LATE if reason != SPENT)  # the rest is lost behind the guard
# What is logged, by reason and workspace (of what is late: by reason), and one sandbox's share of that, so
# that it cannot keep another's denials out of the log by its own. Counters see the rest.
_LOG_LIMIT = "limit rate 200/second burst 400 packets"
_NOISY = "limit rate over 50/second burst 200 packets"
# What one sandbox may begin, however little its policy says. Each leaves an entry in the gateway's table of
# connections and one in the host's, which are everybody's; what was closed stays there for ten seconds
# (CLOSED_FOR), what was asked of the resolver for thirty. So in each one sandbox has at most 4,096 of what is
# open and 18,000 of what was, and in the gateway 16,000 questions. Kernels in need of room take these
# away before they refuse anybody anything (nf_conntrack_core.c: early_drop, gc_worker).
_OPEN = 4096
_PACE = "limit rate over 1000/second burst 8000 packets"
# Questions, and how many of them may come from a port that has not asked before. One resolver answers all.
_QUESTIONS = "limit rate over 2000/second burst 4000 packets"
_ASKERS = "limit rate over 500/second burst 1000 packets"
# Of connections that the inspector and the relay carry; both together manage some 8,000 a second.
_CARRIED = "limit rate over 500/second burst 1000 packets"
_MARK_SHAPE, _MARK_UNLISTED = 1, 2  # a packet on its way through the guard; 0 is "source"
_FORWARD, _RELAY, _INSPECT = map(mark_text, (Kind.FORWARD, Kind.RELAY, Kind.INSPECT))
_DIRECT, _KINDS = mark_text(Kind.DIRECT), 0xF000_0000
OWNER = 0x0FFF_FFFF  # the part of a mark that says whose it is: workspace and block
_ZERO, _LEAST_ADMITTED = mark_text(0), mark_text(ADMITTED & -ADMITTED)
_BLOCK4, _BLOCK6 = "255.255.255.252", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc"
_MAP4, _MAP6 = "ipv4_addr . inet_proto . inet_service", "ipv6_addr . inet_proto . inet_service"
_DIAL_MAP4, _DIAL_MAP6 = "ipv4_addr . ipv4_addr . inet_service", "ipv6_addr . ipv6_addr . inet_service"
_MAY_DIAL = "what the inspector may dial, by workspace"


@dataclass(frozen=True, slots=True)
class LinkWant:
    """A leased link: which workspace, how many bytes it may send and how many TCP connections it may ever
    open (None: no bound). Over one that is `closed` nothing is admitted, whatever the workspace's guard."""

    link: Link
    workspace: str
    quota: int | None = None
    connections: int | None = None
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Desired:
    """Everything the gateway's two tables are to hold. `nat`: (mark, synthetic address) -> entry."""

    pools: Pools
    wants: Mapping[str, WorkspaceWant]  # by workspace name
    links: tuple[LinkWant, ...] = ()
    nat: Mapping[tuple[int, str], NatEntry] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# commands


def base(pools: Pools) -> list[str]:
    """Commands that make both tables of the gateway with everything static in them.

    For a gateway without them: on one that has them the rules would be there twice (`diff.plan` adopts).
    """
    return [*tables(), *_commands(_static(pools), TABLE)]


def workspace(want: WorkspaceWant, pools: Pools) -> list[str]:
    """Commands that make a workspace that is not there yet. ValueError for an element that cannot be its."""
    return _commands(fragment(want, pools), TABLE)


def link(lease: LinkWant, want: WorkspaceWant, pools: Pools) -> list[str]:
    """Commands that make a link's counters, budgets, connection limit and guard chain.

    Before its device is up, so that no packet ever passes unjudged. The workspace must be there.
    """
    if lease.workspace != want.workspace:
        raise ValueError(f"{lease.link.device} is of workspace {lease.workspace}, not {want.workspace}")
    return _commands(link_objects(lease, want, pools), TABLE)


def unlink(link: Link) -> list[str]:
    """Commands that remove all of a link's objects; what is gone already does not matter.

    nft 1.0.6 has no `destroy`; `add` without a definition is accepted whether the object is there or not,
    and what is certainly there can be deleted. Read the counters before.
    """
    name = identifier(link.device)
    chain, device = f"netdev {TABLE} {name}", string(link.device)
    limit = f"inet {TABLE} {name}_connections"
    counters = [f"counter netdev {TABLE} {name}_{part}" for part in LINK_COUNTERS]
    quota, budget = f"quota netdev {TABLE} {name}_quota", f"limit netdev {TABLE} {name}_budget"
    return [
        *(f"add {counter}" for counter in counters),
        f"add {quota} {{ over 1 bytes; }}",
        f"add {budget} {{ rate over 1/week burst 1 packets; }}",
        *(f"add element {family} {TABLE} noisy {{ {device} {_NOISY} }}" for family in FAMILIES),
        f"add chain {limit}",
        f"add element inet {TABLE} connections {{ {device} : jump {name}_connections }}",
        f"add chain {chain}",
        f"flush chain {chain}",
        f"delete chain {chain}",
        *(f"delete element {family} {TABLE} noisy {{ {device} }}" for family in FAMILIES),
        f"delete element inet {TABLE} connections {{ {device} }}",
        f"flush chain {limit}",
        f"delete chain {limit}",
        f"delete {quota}",
        f"delete {budget}",
        *(f"delete {counter}" for counter in counters),
    ]


def drop_workspace(want: WorkspaceWant) -> list[str]:
    """Commands that remove a workspace. The kernel refuses (EBUSY) while a link still jumps there."""
    things = fragment(want, Pools(), checked=False)
    gone = [key for key, thing in things.items() if not (isinstance(thing, Set) and thing.partial)]
    chains = [key for key in gone if key.sort == "chain"]
    lines = [f"flush chain {key.path(TABLE)}" for key in chains]
    lines += [f"delete chain {key.path(TABLE)}" for key in chains]
    for key, thing in things.items():
        if isinstance(thing, Set) and thing.partial:
            lines += objects.delete_elements(key, thing.elements, TABLE)
        elif isinstance(thing, Set):
            lines.append(f"delete {thing.word} {key.path(TABLE)}")
        elif isinstance(thing, Counter):
            lines.append(f"delete counter {key.path(TABLE)}")
    return lines


def nat(entries: Iterable[NatEntry], current: Mapping[tuple[int, str], str]) -> list[str]:
    """Commands that make `entries` true where `current` ((mark, synthetic) -> real) is; [] if it is so.

    Open connections keep the address they have: conntrack asks the map once per connection.
    """
    old: dict[Key, list[str]] = {}
    new: dict[Key, dict[str, Entry]] = {}
    for entry in entries:
        now = current.get((entry.mark, entry.synthetic))
        if now == entry.real:
            continue
        key, name, value = _nat_element(entry)
        if now is not None:
            old.setdefault(key, []).append(name)
        if entry.real is not None:
            new.setdefault(key, {})[name] = value
    lines = [line for key, names in old.items() for line in objects.delete_elements(key, names, TABLE)]
    return lines + [line for key, added in new.items() for line in objects.add_elements(key, added, TABLE)]


def host(pools: Pools) -> list[str]:
    """Commands that make `table inet egressd_host` exactly so, in the host's namespace. Idempotent:
    one transaction removes the table, if there, and makes it again."""
    table = f"table inet {HOST_TABLE}"
    note = 'comment "egressd: the gateway may go out through the host, and nowhere else"'
    return [
        f"add {table}",
        f"delete {table}",
        f"add {table} {{ {note}; }}",
        *_commands(_host(pools), HOST_TABLE),
    ]


def tables() -> list[str]:
    """Commands that make the gateway's two tables; and wake them, should somebody have put them to sleep
    (`flags dormant`)."""
    return [
        f'add table netdev {TABLE} {{ comment "egressd: what may leave a sandbox, link by link"; }}',
        f'add table inet {TABLE} {{ comment "egressd: where it may go, and what may return"; }}',
    ]


def _commands(things: Objects, table: str) -> list[str]:
    """Declarations, then elements, then rules: each may refer to what comes before."""
    lines = [line for key, thing in things.items() for line in objects.make(key, thing, table)]
    for key, thing in things.items():
        if isinstance(thing, Set):
            lines += objects.add_elements(key, thing.elements, table)
    for key, thing in things.items():
        lines += objects.fill(key, thing, table)
    return lines


# --------------------------------------------------------------------------------------------------
# the whole


def desired(wanted: Desired) -> Objects:
    """Both tables as they are to be. ValueError when a link's workspace is not among the wants."""
    things = _static(wanted.pools)
    parts = [fragment(want, wanted.pools) for want in wanted.wants.values()]
    for lease in wanted.links:
        if lease.workspace not in wanted.wants:
            raise ValueError(f"{lease.link.device}: no workspace {lease.workspace!r}")
        parts.append(link_objects(lease, wanted.wants[lease.workspace], wanted.pools))
    return _together(things, [*parts, _nat(wanted.nat.values())])


def _together(things: Objects, parts: Iterable[Objects]) -> Objects:
    """All of it; what several parts put into one set is gathered there."""
    gathered: dict[Key, dict[str, Entry]] = {}
    for part in parts:
        for key, thing in part.items():
            if isinstance(thing, Set) and thing.partial:
                gathered.setdefault(key, {}).update(thing.elements)
            elif key in things:
                raise ValueError(f"{key.sort} {key.name} is wanted twice")
            else:
                things[key] = thing
    for key, elements in gathered.items():
        shared = things[key]
        assert isinstance(shared, Set)
        things[key] = replace(shared, elements=elements)
    return things


# --------------------------------------------------------------------------------------------------
# what is always there


def unreachable(pools: Pools) -> tuple[tuple[IPv4Network, ...], tuple[IPv6Network, ...]]:
    """Networks that no rule reaches as they are, whatever the guard: this host, a link, many at once,
    egressd's own. (RFC 1122 3.2.1.3; RFC 3927 2.7: a router must not forward link-local; RFC 4291.)"""
    four = [pools.synthetic4, pools.sandbox4]
    four += map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"))
    six = [pools.synthetic6, pools.sandbox6, IPv6Network((int(RESOLVER6) >> 64 << 64, 64))]
    six += (IPv6Network((int(of) >> 64 << 64, 64)) for of in (UPLINK_GATEWAY6, DIAL6.network_address))
    six += map(IPv6Network, ("::/127", "::ffff:0.0.0.0/96", "fe80::/10", "ff00::/8"))
    return tuple(sorted(four)), tuple(sorted(six))


def _static(pools: Pools) -> Objects:
    return {**_static_netdev(pools), **_static_inet()}


def _static_netdev(pools: Pools) -> Objects:
    four, six = unreachable(pools)
    return {
        Key("netdev", "set", "unreachable4"): _networks(four, "ipv4_addr"),
        Key("netdev", "set", "unreachable6"): _networks(six, "ipv6_addr"),
        Key("netdev", "set", "noisy"): _noisy(),
        Key("netdev", "chain", "refuse"): Chain(rules=_REFUSE, comment="says no at once"),
        Key("netdev", "counter", f"late_{SPENT}"): Counter(comment=LATE[SPENT]),
        Key("netdev", "chain", f"late_{SPENT}"): _late(SPENT),
    }


def _networks(networks: Iterable[IPv4Network | IPv6Network], kind: str) -> Set:
    return Set(
        type=kind,
        flags=("interval",),
        comment="whatever the guard mode",
        elements={network_text(network): Entry() for network in networks},
    )


def _noisy() -> Set:
    """One for each table: the kernel lets no table see another's."""
    return Set(type="ifname", flags=("dynamic",), size=65535, comment="links that have been logged enough of")


_REFUSE = ("meta l4proto tcp reject with tcp reset", "reject with icmpx port-unreachable")


def _static_inet() -> Objects:
    things: Objects = {
        _inet("counter", f"late_{reason}"): Counter(comment=LATE[reason]) for reason in _LATE_BEHIND
    }
    things[_inet("counter", "stray")] = Counter(comment="not of a sandbox, and no answer to one")
    things[_inet("counter", "revoked")] = Counter(comment="answers of hosts that were revoked")
    things |= {
        _inet("set", "in"): Set(type="mark", counter=True, comment="what may be answered; counts replies"),
        _inet("set", "opened"): Set(type="mark", counter=True, comment="counts connections"),
        _inet("set", "upstream"): Set(type="mark", comment="what the inspector may be answered"),
        _inet("set", "connections"): Set(
            type="ifname", data=VERDICT, comment="what each sandbox may begin, and have open"
        ),
        _inet("set", "noisy"): _noisy(),
        _inet("set", "real4"): Set(type="mark . ipv4_addr", data="ipv4_addr", comment="names lead here"),
        _inet("set", "real6"): Set(type="mark . ipv6_addr", data="ipv6_addr", comment="names lead here"),
        _inet("set", "dial4"): Set(type=_DIAL_MAP4, data="mark", counter=True, comment=_MAY_DIAL),
        _inet("set", "dial6"): Set(type=_DIAL_MAP6, data="mark", counter=True, comment=_MAY_DIAL),
        _inet("chain", "refuse"): Chain(rules=_REFUSE, comment="says no at once"),
        _inet("chain", "dial_4"): Chain(rules=_dialling("ip", "4", _BLOCK4), comment="the lookup (IPv4)"),
        _inet("chain", "dial_6"): Chain(rules=_dialling("ip6", "6", _BLOCK6), comment="the lookup (IPv6)"),
        _inet("chain", "dialled"): Chain(rules=_DIALLED, comment="answers to the inspector"),
        _inet("chain", "revoked"): Chain(
            rules=_REVOKED, comment="answers of revoked hosts, turned into resets"
        ),
        _inet("chain", "cut"): Chain(rules=_CUT_CHAIN, comment="connections that were ended"),
        _inet("chain", "cut_bare"): Chain(
            rules=_CUT_BARE, comment="the same without data: resets may go out"
        ),
    }
    for reason in _LATE_BEHIND:
        things[_inet("chain", f"late_{reason}")] = _late(reason)
    things[_inet("chain", "end_invalid")] = Chain(rules=_END_INVALID, comment="where it is safe, a reset")
    return {**things, **_static_chains()}


def _late(reason: str) -> Chain:
    """Counted, logged with "-" for the workspace (the link tells it), and refused where that is safe:
    a reset for a packet that conntrack finds out of window would cut a live connection."""
    end = ["drop"] if reason in ("unmarked", "reply") else ["goto refuse"]
    if reason == "invalid":
        end = ["goto end_invalid"]
    if reason == "dial":
        end = [_REFUSE[0], "drop"]  # the sender is in the gateway: a drop is an error to it, at once
    quiet = [] if reason == "dial" else [f"iifname @noisy {end[0]}"]
    rules = (f'counter name "late_{reason}"', *quiet, _log("-", reason), *end)
    return Chain(rules=rules, comment=LATE[reason])


def _log(workspace: str, reason: str) -> str:
    return f"{_LOG_LIMIT} log prefix {string(f'{workspace} {reason}')} group {NFLOG_GROUP} snaplen 128"


def _inet(sort: str, name: str) -> Key:
    return Key("inet", sort, name)  # type: ignore[arg-type]


def _static_chains() -> Objects:
    return {
        _inet("chain", name): Chain(rules=rules, hook=Hook(kind, hook, priority, policy), comment=text)
        for name, kind, hook, priority, policy, text, rules in (
            ("steer", "filter", "prerouting", -150, "accept", "only what a guard has marked goes on", _STEER),
            ("translate", "nat", "prerouting", -100, "accept", "synthetic address to real one", _TRANSLATE),
            (
                "forwarding",
                "filter",
                "forward",
                0,
                "drop",
                "out: marked, translated; back: replies",
                _PASS,
            ),
            ("dial", "filter", "output", -150, "accept", "what the inspector may dial", _DIAL),
            ("unseen", "filter", "output", -300, "accept", "segments of no connection", _UNSEEN),
            ("translate_out", "nat", "output", -100, "accept", "the same for the inspector", _TRANSLATE_OUT),
            ("local_in", "filter", "input", 0, "drop", "resolver, relay and inspector", _LOCAL_IN),
            ("local_out", "filter", "output", 0, "drop", "answers, refusals, nothing else", _LOCAL_OUT),
            ("disguise", "nat", "postrouting", 100, "accept", "behind the address of the gateway", _DISGUISE),
        )
    }


_LINKS_IN, _LINKS_OUT = f"iifgroup {LINK_GROUP}", f"oifgroup {LINK_GROUP}"
_UP_IN, _UP_OUT = f'iifname "{UPLINK}"', f'oifname "{UPLINK}"'
_LO_IN, _LO_OUT = 'iifname "lo"', 'oifname "lo"'
_STEERED = f"meta mark & {_RELAY} != {_ZERO}"
_TO_INSPECT, _TO_RELAY = f"meta mark & {_INSPECT} == {_INSPECT}", f"meta mark & {_INSPECT} == {_RELAY}"
_A_QUESTION = f"meta mark & {mark_text(Kind.RESOLVE)} != {_ZERO}"
_NOT_A_QUESTION = f"meta mark & {mark_text(Kind.RESOLVE)} == {_ZERO}"
_TO_TRANSLATE = f"meta mark & {_DIRECT} == {_FORWARD}"  # bit 31 without bit 28
_FRESH = f"ct mark {_ZERO}"
# Not one that is read: what conntrack does not know of those was open before its port was read, and must end.
_END_INVALID = (f"{_TO_INSPECT} tcp flags & rst != rst reject with tcp reset", "drop")
# An entry keeps the mark it was begun with: one that is cut at this moment must not be given another.
_KEEP = f"{_FRESH} ct mark set meta mark"
_IS_CUT = f"ct mark >= {mark_text(CUT)} ct mark < {_LEAST_ADMITTED}"
_NUDGE = f"meta mark {mark_text(NUDGE)} meta l4proto tcp"

_STEER = (
    f"iifgroup != {LINK_GROUP} return",
    f"meta mark < {_LEAST_ADMITTED} goto late_unmarked",
    # the many: the guard has looked them up, conntrack knows them, and their mark stands in their entry
    f"ct state established ct direction original meta mark >= {_FORWARD} ct mark >= {_FORWARD} accept",
    # untracked: somebody's `notrack`; what conntrack does not see is neither translated nor disguised
    "ct state invalid,untracked goto late_invalid",
    "ct direction reply goto late_reply",
    f"{_IS_CUT} goto cut",
    # an ICMP error bears the entry of the connection it is about (nf_conntrack_inet_error): it keeps its mark
    f"ct state != related {_KEEP}",
    f"{_A_QUESTION} iifname vmap @connections",
    f"ct state new {_NOT_A_QUESTION} iifname vmap @connections",
    f"{_TO_INSPECT} meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:{INSPECTOR_PORT} accept",
    f"{_TO_INSPECT} meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:{INSPECTOR_PORT} accept",
    f"{_TO_RELAY} meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:{RELAY_PORT} accept",
    f"{_TO_RELAY} meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:{RELAY_PORT} accept",
    # tproxy ends the rule when no socket listens
    f"{_STEERED} goto late_inspector",
)
_TRANSLATE = (
    f"{_LINKS_IN} meta mark @opened",
    f"{_LINKS_IN} {_TO_TRANSLATE} dnat ip to meta mark . ip daddr map @real4",
    f"{_LINKS_IN} {_TO_TRANSLATE} dnat ip6 to meta mark . ip6 daddr map @real6",
    # Here and not when it is forwarded: the backstop among the routes would say that the host is unreachable,
    # of which the sender of a datagram is not told (icmp_err_convert), and nobody would count it.
    f"{_LINKS_IN} {_TO_TRANSLATE} goto late_unresolved",
)
# Not of type `route`: that would ask routing before the translation, for a synthetic address. The translation
# asks by itself, for every packet (nf_nat_ipv4_local_fn), and by then the mark is there.
_DIAL = (f"ip saddr {DIAL4} goto dial_4", f"ip6 saddr {DIAL6} goto dial_6")


def _dialling(ip: str, digit: str, mask: str) -> tuple[str, ...]:
    """The one lookup of what the inspector sends, packet by packet."""
    # the mask comes first: nft 1.0.6 reads one only there
    lookup = f"{ip} daddr & {mask} . {ip} saddr . tcp dport map @dial{digit}"
    return (
        "ct state invalid,untracked goto late_invalid",
        f"meta mark set {_ZERO}",
        f"ct direction original meta mark set {lookup}",
        f"meta mark {_ZERO} goto late_dial",
        f"{_IS_CUT} goto cut",
        _KEEP,
    )


_TRANSLATE_OUT = (
    f"{_TO_TRANSLATE} dnat ip to meta mark . ip daddr map @real4",
    f"{_TO_TRANSLATE} dnat ip6 to meta mark . ip6 daddr map @real6",
)
_PASS = (
    f"{_LINKS_IN} {_UP_OUT} meta mark & {_DIRECT} == {_DIRECT} accept",
    f"{_LINKS_IN} {_UP_OUT} {_TO_TRANSLATE} ct status dnat accept",
    f"{_UP_IN} {_LINKS_OUT} ct direction reply ct mark @in accept",
    f"{_UP_IN} {_LINKS_OUT} ct direction reply goto revoked",
    f"{_LINKS_IN} {_TO_TRANSLATE} goto late_unresolved",
    f"{_LINKS_IN} goto late_misrouted",
    'counter name "stray"',
)
# The sandbox may be waiting for just this answer and say nothing itself: dropped, the connection would hang
# until its next word. As a reset in sequence (RFC 5961 3.2) it ends at once, and its data is never delivered.
_REVOKED = (
    'counter name "revoked"',
    f"{_IS_CUT} goto cut",
    "tcp flags set rst accept",
    "drop",
)


def _bare(ip: str) -> tuple[str, ...]:
    """Segments without data. Options and the like have been refused: the header's length is known. One rule
    for each length, since nft 1.0.6 aborts on a concatenation with a field of four bits."""
    length = "ip length" if ip == "ip" else "ip6 length"
    return tuple(
        f"tcp doff {n} {length} {(20 if ip == 'ip' else 0) + 4 * n} goto cut_bare" for n in range(5, 16)
    )


# The first segment without data becomes the host's reset: its sequence number is the one that a reset must
# have (RFC 5961 3.2). Data would go along, so until then it waits; so do the host's answers, which as resets
# would silence the client too early. From then on the client is refused, and what the host says is turned
# into a reset, where it has data. Where it has none it may go on: a host that has not believed its reset,
# since data had been on the way, asks again, and the sandbox answers with another one.
_CUT_RESETS = "limit rate 10/second burst 20 packets"
_UNTOLD = f"ct mark & {mark_text(TOLD)} == {_ZERO}"
_CUT_CHAIN = (
    f"{_UNTOLD} ct direction reply drop",
    *_bare("ip"),
    *_bare("ip6"),
    f'{_UNTOLD} meta l4proto tcp counter name "late_cut" drop',
    "ct direction reply tcp flags set rst accept",
    "ct direction reply drop",
    "goto late_cut",
)
_CUT_BARE = (
    "ct direction reply tcp flags & fin == fin tcp flags set rst accept",  # no orderly end
    "ct direction reply accept",
    f"{_UNTOLD} ct mark set ct mark | {mark_text(TOLD)} tcp flags set rst accept",
    # as the kernel makes them, and few: their headers, too, could carry words
    f"tcp flags & rst == rst tcp doff 5 {_CUT_RESETS} accept",
    "goto late_cut",
)
# What the warden sends so that an end of a connection that was cut says something (kernel/nudge.py). Not
# tracked: the connection's own entry has these addresses the other way round.
_UNSEEN = (f"{_NUDGE} notrack",)
_NEIGHBOURS = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"
# Not @in, which counts what sandboxes received: of a host that is read on one port and forwarded on another,
# both have the one mark.
_DIALLED = (
    "ct direction reply ct mark @upstream accept",
    "ct direction reply goto revoked",
    'counter name "stray"',
)
# To and from itself, the gateway says only no: to what the inspector dialled.
_WITHIN = "ct state related tcp flags & rst == rst accept"
_LOCAL_IN = (
    f"{_LINKS_IN} meta mark & {mark_text(Kind.RELAY | Kind.RESOLVE)} != {_ZERO} accept",
    f"{_LINKS_IN} goto late_misrouted",
    f"{_UP_IN} {_NEIGHBOURS}",
    f"{_UP_IN} ip daddr {DIAL4} goto dialled",
    f"{_UP_IN} ip6 daddr {DIAL6} goto dialled",
    f"{_LO_IN} {_WITHIN}",
    f"{_LO_IN} {_NUDGE} accept",
    'counter name "stray"',
)
_LOCAL_OUT = (
    # our own refusals, and the ends of connections whose host was revoked. Not by what conntrack says of
    # them: there may be no entry. Nobody here but the kernel makes a reset, and it carries nothing.
    f"{_LINKS_OUT} tcp flags & rst == rst accept",
    f"{_LINKS_OUT} icmp type destination-unreachable accept",
    f"{_LINKS_OUT} icmpv6 type {{ destination-unreachable, packet-too-big }} accept",
    f"{_LINKS_OUT} ct direction reply ct mark @in accept",
    # the device is the one that was meant before the translation, for the whole of this hook
    f"{_LO_OUT} {_TO_TRANSLATE} ct status dnat accept",
    f"{_LO_OUT} {_TO_TRANSLATE} goto late_unresolved",
    f"{_LO_OUT} {_WITHIN}",
    f"{_LINKS_OUT} {_NUDGE} accept",
    f"{_LO_OUT} {_NUDGE} accept",
    f"{_UP_OUT} {_NEIGHBOURS}",
    'counter name "stray"',
)
_DISGUISE = (f"{_UP_OUT} masquerade",)


def _elements(kind: str, elements: dict[str, Entry]) -> Set:
    """What a workspace or a link puts into a set that is there for all."""
    return Set(type=kind, elements=elements, partial=True)


# --------------------------------------------------------------------------------------------------
# a workspace


def fragment(want: WorkspaceWant, pools: Pools, *, checked: bool = True) -> Objects:
    """A workspace's objects; its part of the shared sets as `partial` ones."""
    name = check_workspace(want.workspace)
    things: Objects = {}
    for reason in DENIALS:
        things[_netdev("counter", f"{name}_{reason}_denied")] = Counter()
    # Of every guard, though an enforcing one never adds to it: what was let through stays in the books.
    things[_netdev("counter", f"{name}_unlisted_ok")] = Counter(comment="on no list, let through")
    things |= _maps(want, pools, checked=checked)
    for reason in DENIALS:
        things[_netdev("chain", f"{name}_{reason}")] = _denial(name, reason)
    things[_netdev("chain", f"{name}_4")] = _lookup(want, "ip")
    things[_netdev("chain", f"{name}_6")] = _lookup(want, "ip6")
    named = _marks(want)
    things[_inet("set", "in")] = _elements("mark", named)
    things[_inet("set", "opened")] = _elements("mark", named)
    things[_inet("set", "upstream")] = _elements("mark", _upstream(want))
    return things | _dials(want)


def _netdev(sort: str, name: str) -> Key:
    return Key("netdev", sort, name)  # type: ignore[arg-type]


def _denial(name: str, reason: str) -> Chain:
    rules = (
        f'counter name "{name}_{reason}_denied"',
        "iifname @noisy goto refuse",
        _log(name, reason),
        "goto refuse",
    )
    return Chain(rules=rules, comment=f"denied: {_DENIED[reason]}")


_DENIED = {
    "unlisted": "no rule of the workspace allows this destination",
    "shape": "fragments, options, extension headers, broken headers",
    "source": "not the source address of this sandbox",
    "quota": "the sandbox has used up its bytes",
    "closed": "the sandbox was started without a network",
}


def _lookup(want: WorkspaceWant, ip: str) -> Chain:
    """Shape, then the lookup. A rule whose map has no such key changes nothing; nor does one that reads
    beyond the end of a truncated packet."""
    name, digit, mask = want.workspace, ("4" if ip == "ip" else "6"), (_BLOCK4 if ip == "ip" else _BLOCK6)
    # `meta l4proto` is only there when version, header length and total length make sense
    # (nft_set_pktinfo_ipv4_validate); 255 is reserved.
    shape = "ip frag-off & 16383 == 0 ip hdrlength 5 meta l4proto != 255"
    if ip == "ip6":
        # AH by name: ipv6_find_hdr walks over it, and exthdr has no word for it
        headers = " ".join(f"exthdr {header} missing" for header in ("hbh", "rt", "frag", "dst"))
        shape = f"{headers} ip6 nexthdr != ah"
    well = f"meta mark {mark_text(_MARK_UNLISTED)} meta pkttype host"
    target = "meta l4proto . th dport map"
    rules = [
        f"meta mark set {mark_text(_MARK_SHAPE)}",
        f"{shape} meta mark set {mark_text(_MARK_UNLISTED)}",
        f"{well} meta mark set {ip} daddr & {mask} . {target} @{name}_out{digit}",
        f"{well} meta mark set {ip} daddr . {target} @{name}_cidr{digit}",
    ]
    rules += _let_through(want, f"{well} {ip} daddr != @unreachable{digit}")
    return Chain(rules=tuple(rules), comment=f"shape, then the lookup (IPv{digit})")


def _let_through(want: WorkspaceWant, unlisted: str) -> list[str]:
    """What guard `observe` and `off` add: the rest goes out as addressed, counted; observe logs it, with the
    mark that it goes out with: what is logged without one is taken for refused."""
    if want.guard == "enforce":
        return []
    mark, log = _unlisted(want), _log(want.workspace, "unlisted")
    admit = f'{unlisted} counter name "{want.workspace}_unlisted_ok" meta mark set {mark}'
    logged = [f"meta mark {mark} iifname @noisy return", f"meta mark {mark} {log}"]
    return [admit, *logged] if want.guard == "observe" else [admit]


def _unlisted(want: WorkspaceWant) -> str:
    return mark_text(int(Mark(kind=Kind.DIRECT, workspace=want.index, block=UNLISTED_BLOCK)))


def _marks(want: WorkspaceWant) -> dict[str, Entry]:
    """The workspace's elements of @in and @opened: one per mark, with its name."""
    named = _named(want, {element.mark: element.comment for element in want.elements})
    if want.guard != "enforce":
        named[_unlisted(want)] = Entry(comment=f"{want.workspace} (unlisted)")
    return named


def _upstream(want: WorkspaceWant) -> dict[str, Entry]:
    """The workspace's elements of @upstream: the second mark of what is inspected."""
    inspected = [element for element in want.elements if element.mark & _KINDS == Kind.INSPECT]
    return _named(want, {_forwarded(element.mark): element.comment for element in inspected})


def _named(want: WorkspaceWant, names: Mapping[int, str]) -> dict[str, Entry]:
    return {
        mark_text(mark): Entry(comment=comment(f"{want.workspace} {name}"))
        for mark, name in sorted(names.items())
    }


def marks(element: Element) -> tuple[int, ...]:
    """The marks that mean something because of an element. Where it leads to the inspector there are two
    connections, and the second one, on to the host, is forwarded."""
    inspected = element.mark & _KINDS == Kind.INSPECT
    return (element.mark, _forwarded(element.mark)) if inspected else (element.mark,)


def owner(element: Element) -> int:
    """Whose an element is, whatever is done with its packets: what is inspected has marks of two kinds."""
    return element.mark & OWNER


def _forwarded(mark: int) -> int:
    return mark & ~_KINDS | Kind.FORWARD


def _dials(want: WorkspaceWant) -> Objects:
    """The workspace's elements of @dial4 and @dial6: what is inspected, and nothing else."""
    found: dict[Key, dict[str, Entry]] = {}
    for element in want.elements:
        if element.mark & _KINDS == Kind.INSPECT:
            six = ":" in element.address
            name = f"{address_text(element.address)} . {dial_source(want.index)[six]} . {element.port}"
            entry = Entry(data=mark_text(_forwarded(element.mark)), comment=element.comment)
            found.setdefault(_inet("set", "dial6" if six else "dial4"), {})[name] = entry
    kinds = {"dial4": _DIAL_MAP4, "dial6": _DIAL_MAP6}
    return {key: _elements(kinds[key.name], elements) for key, elements in found.items()}


def _maps(want: WorkspaceWant, pools: Pools, *, checked: bool) -> Objects:
    """The allow maps: blocks in `out`, real networks and the resolver in `cidr`."""
    name = want.workspace
    maps: dict[str, dict[str, Entry]] = {f"{sort}{digit}": {} for sort in ("out", "cidr") for digit in "46"}
    for element in want.elements:
        where, address = _place(element, want, pools) if checked else _place_unchecked(element)
        key = f"{address} . {element.protocol} . {element.port}"
        if maps[where].setdefault(key, _entry(element)) != _entry(element):
            raise ValueError(f"workspace {name}: {key} is wanted with two marks")
    notes = {
        "out": "addresses of names: four neighbours are one name",
        "cidr": "real networks, and the resolver",
    }
    return {
        _netdev("set", f"{name}_{where}"): Set(
            type=_MAP4 if where.endswith("4") else _MAP6,
            data="mark",
            flags=("interval",) if where.startswith("cidr") else (),
            counter=True,
            comment=notes[where[:-1]],
            elements=elements,
        )
        for where, elements in maps.items()
    }


def _entry(element: Element) -> Entry:
    return Entry(data=mark_text(element.mark), comment=element.comment)


def _place_unchecked(element: Element) -> tuple[str, str]:
    return _map_of(element, ip_network(element.address)), network_text(element.address)


def _map_of(element: Element, place: Address | Network) -> str:
    exact = element.mark & _KINDS in (Kind.DIRECT, Kind.RESOLVE)
    return f"{'cidr' if exact else 'out'}{place.version}"


def _place(element: Element, want: WorkspaceWant, pools: Pools) -> tuple[str, str]:
    """(map, key) of an element; ValueError when its mark and its address do not belong together."""
    mark, text = Mark.of(element.mark), element.address
    place: Address | Network = ip_network(text) if "/" in text else ip_address(text)
    fault = ""
    if mark.workspace != want.index:
        fault = "the mark is another workspace's"
    elif element.protocol not in ("tcp", "udp") or not 0 < element.port < 65536:
        fault = "no such port"
    elif not _belongs(mark, place, element, pools):
        fault = f"mark {element.mark:#010x} does not fit the address"
    if fault:
        where = f"element {element.address} {element.protocol}/{element.port}"
        raise ValueError(f"workspace {want.workspace}: {where}: {fault}")
    return _map_of(element, place), str(place) if "/" not in text else network_text(text)


def _belongs(mark: Mark, place: Address | Network, element: Element, pools: Pools) -> bool:
    if isinstance(place, IPv4Network | IPv6Network):
        return mark.kind is Kind.DIRECT and not _forbidden(place, pools)
    match mark.kind:
        case Kind.RESOLVE:
            resolver = place in (RESOLVER4, RESOLVER6) and element.port == 53
            return resolver and mark.block == RESOLVER_BLOCK
        case Kind.FORWARD | Kind.RELAY | Kind.INSPECT:
            own = mark.block not in (RESOLVER_BLOCK, UNLISTED_BLOCK)
            own &= mark.kind is not Kind.INSPECT or element.protocol == "tcp"
            return own and pools.block_of(place) == (mark.block, 0)
    return False


def _forbidden(network: Network, pools: Pools) -> bool:
    four, six = unreachable(pools)
    return any(network.overlaps(other) for other in (four if network.version == 4 else six))


# --------------------------------------------------------------------------------------------------
# a link


def link_objects(lease: LinkWant, want: WorkspaceWant, pools: Pools) -> Objects:
    """All of a link's objects; its part of the shared sets as `partial` ones."""
    device, name = lease.link.device, check_workspace(want.workspace)
    things: Objects = {
        _netdev("counter", f"{device}_{part}"): Counter(comment=text) for part, text in _PARTS.items()
    }
    things |= {} if lease.closed else _budgets(lease)
    things[_netdev("chain", device)] = Chain(
        rules=_guard_closed(lease, name) if lease.closed else _guard(lease, name, pools),
        hook=Hook("filter", "ingress", -500, "drop", device),
        comment=f"sandbox of workspace {name}" + (", without a network" if lease.closed else ""),
    )
    things |= connection_limit(lease, want)
    noisy = {string(device): Entry(statement=_NOISY, comment=want.workspace)}
    for key in (_netdev("set", "noisy"), _inet("set", "noisy")):
        things[key] = _elements("ifname", noisy)
    return things


_PARTS = {
    "in": "all that came",
    "ok": "admitted",
    "denied": "denied and answered",
    "other": "not plain IP, dropped",
}
_BUDGET_PARTS = {
    "over_quota": "refused: no bytes left",
    "opened": "connections begun within the budget",
    "over_budget": "refused: no connection left",
}
LINK_COUNTERS = (*_PARTS, *_BUDGET_PARTS)


def _budgets(lease: LinkWant) -> Objects:
    """What a link may use up. Objects with names, so that they keep what they know when rules are written
    anew; what refuses has a counter, since a listing does not tell a quota that is just used up from one that
    has refused something (nft_quota_do_dump)."""
    device, things, parts = lease.link.device, Objects(), list[str]()
    if lease.quota is not None:
        things[_netdev("quota", f"{device}_quota")] = Quota(bytes=lease.quota, comment="bytes it may send")
        parts.append("over_quota")
    if lease.connections is not None:
        budget = Limit(burst=lease.connections, comment="connections it may ever open")
        things[_netdev("limit", f"{device}_budget")] = budget
        parts += ["opened", "over_budget"]
    for part in parts:
        things[_netdev("counter", f"{device}_{part}")] = Counter(comment=_BUDGET_PARTS[part])
    return things


def connection_limit(lease: LinkWant, want: WorkspaceWant) -> Objects:
    """What a link may begin, and have open at once: a chain and the element of @connections that leads there.
    {} when the link is closed: over it nothing begins.

    A chain for each link, since the rule is what counts. A set's element could count as well, but the kernel
    takes such an element away, limit and all, when it counts no connection (nft_connlimit_gc); and one that
    is made by the packet itself (`add @set { iifname ct count over 9 }`) limits nothing when the set is full.
    """
    if lease.closed:
        return {}
    device = lease.link.device
    name = f"{device}_connections"
    entry = Entry(data=f"jump {name}", comment=want.workspace)
    return {
        _inet("chain", name): Chain(
            rules=_beginning(_OPEN if want.connections is None else want.connections),
            comment=f"limits of a sandbox of workspace {want.workspace}",
        ),
        _inet("set", "connections"): Set(
            type="ifname", data=VERDICT, elements={string(device): entry}, partial=True
        ),
    }


def _beginning(open_: int) -> tuple[str, ...]:
    """Cheap ones first: the count goes through all that is open. Questions to the resolver have bounds of
    their own: they are not connections anybody would count, linger for half a minute, and may come without
    end over one. So has what the inspector and the relay carry: these serve all sandboxes."""
    return (
        f"{_A_QUESTION} {_QUESTIONS} goto late_pace",
        f"{_A_QUESTION} ct state new {_ASKERS} goto late_pace",
        f"{_A_QUESTION} return",
        f"{_STEERED} {_CARRIED} goto late_pace",
        f"{_PACE} goto late_pace",
        f"ct count over {int(open_)} goto late_connections",
    )


def _guard(lease: LinkWant, name: str, pools: Pools) -> tuple[str, ...]:
    device = identifier(lease.link.device)
    source4, source6 = pools.sandbox(lease.link)
    denied = f'counter name "{device}_denied"'
    quota = f'quota name "{device}_quota" counter name "{device}_over_quota" {denied} goto {name}_quota'
    admitted = f"meta mark >= {_LEAST_ADMITTED}"
    shape, unlisted = mark_text(_MARK_SHAPE), mark_text(_MARK_UNLISTED)
    rules = [
        *_plain(device),
        quota if lease.quota is not None else "",
        f"ip saddr {source4} jump {name}_4",
        f"ip6 saddr {source6} jump {name}_6",
        *(_spending(device, admitted) if lease.connections is not None else ()),
        f'{admitted} counter name "{device}_ok" accept',
        denied,
        # no set in braces: each would be an object of the kernel's, for each link
        f"meta mark {shape} goto {name}_shape",
        f"meta mark {unlisted} goto {name}_unlisted",
        f"goto {name}_source",
    ]
    return tuple(rule for rule in rules if rule)


def _plain(device: str) -> tuple[str, ...]:
    """Of all that comes, what is IP goes on, and not under a mark that it came with."""
    return (
        f'counter name "{device}_in"',
        # by what the frame says, VLAN tag included, not by what the kernel took it for
        f'ether type != ip ether type != ip6 counter name "{device}_other" drop',
        # veth takes marks off only on the way between namespaces (skb_scrub_packet)
        f"meta mark set {_ZERO}",
    )


def _guard_closed(lease: LinkWant, name: str) -> tuple[str, ...]:
    """No rule accepts, and none looks anything up: without any of them, and without all, nothing passes."""
    device = identifier(lease.link.device)
    return *_plain(device), f'counter name "{device}_denied" goto {name}_closed'


def _spending(device: str, admitted: str) -> tuple[str, str]:
    """A connection begins with a SYN without ACK, and with nothing else: conntrack knows no other beginning
    (nf_conntrack_proto_tcp.c: tcp_new, with tcp_loose=0), and what it does not know goes nowhere. So each
    such segment that the lookup has admitted takes one from the budget, wherever it leads: to a host, the
    inspector or the relay. One that is sent again, since nobody answered, takes another; a question to the
    resolver takes none. Nor do datagrams: nothing here knows which of them is a flow's first.

    By the time the budget is asked the element of the lookup has counted the segment: it was admitted, and is
    refused all the same, as `late` as what is over the limit of open connections.
    """
    begins = f"{admitted} {_NOT_A_QUESTION} tcp flags & (syn | ack) == syn"
    refused = f'counter name "{device}_over_budget" counter name "{device}_ok" goto late_{SPENT}'
    return (
        f'{begins} limit name "{device}_budget" {refused}',
        f'{begins} counter name "{device}_opened"',
    )


# --------------------------------------------------------------------------------------------------
# where names lead


def _nat(entries: Iterable[NatEntry]) -> Objects:
    maps: dict[Key, dict[str, Entry]] = {}
    for entry in entries:
        if entry.real is not None:
            key, name, value = _nat_element(entry)
            maps.setdefault(key, {})[name] = value
    return {
        key: _elements("mark . ipv4_addr" if key.name == "real4" else "mark . ipv6_addr", elements)
        for key, elements in maps.items()
    }


def _nat_element(entry: NatEntry) -> tuple[Key, str, Entry]:
    """ValueError when the two addresses are not of one family, or the mark is not one to be translated."""
    mark, synthetic = Mark.of(entry.mark), ip_address(entry.synthetic)
    if mark.kind is not Kind.FORWARD:
        raise ValueError(f"{entry.mark:#010x} is not translated")
    if entry.real is not None and ip_address(entry.real).version != synthetic.version:
        raise ValueError(f"{entry.synthetic} and {entry.real} are not of one family")
    key = _inet("set", "real4" if synthetic.version == 4 else "real6")
    name = f"{mark_text(entry.mark)} . {synthetic}"
    real = "" if entry.real is None else address_text(entry.real)
    return key, name, Entry(data=real, comment=entry.comment)


# --------------------------------------------------------------------------------------------------
# the host's side


def _host(pools: Pools) -> Objects:
    gateway = f'iifname "{HOST_LINK}"'
    own4 = f"{{ {pools.synthetic4}, {pools.sandbox4} }}"
    own6 = f"{{ {pools.synthetic6}, {pools.sandbox6} }}"
    untranslated = 'counter name "untranslated" drop'
    chains: Iterator[tuple[str, Hook, str, tuple[str, ...]]] = iter(
        (
            (
                "lifetimes",
                Hook("filter", "prerouting", -150, "accept"),
                "how long the table of connections keeps what came from sandboxes",
                tuple(
                    f'{gateway} ct state new meta nfproto {ip} meta l4proto tcp ct timeout set "{name}"'
                    for ip, name in (("ipv4", "gateway4"), ("ipv6", "gateway6"))
                ),
            ),
            (
                "wayless",
                Hook("filter", "prerouting", -90, "accept"),
                # The kernel's own word of that is not enough. TCP hears it, of IPv6, while connect(2) still
                # holds the socket, and heeds the next one, a second later (tcp_v6_err); a datagram's sender
                # never does: it is no hard error (icmp_err_convert, tab_unreach).
                "where the host has no route to, nobody waits for an answer",
                (
                    f"{gateway} ct state new fib daddr type != local fib daddr . mark oif missing"
                    ' counter name "wayless" goto refuse',
                ),
            ),
            (
                "disguise",
                Hook("nat", "postrouting", 100, "accept"),
                "behind an address of the host",
                (f'{gateway} oifname != "{HOST_LINK}" masquerade',),
            ),
            (
                "local_in",
                Hook("filter", "input", 0, "accept"),
                "no service of the host is for sandboxes",
                (
                    f"{gateway} icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept",
                    f'{gateway} ct state != {{ established, related }} counter name "refused" goto refuse',
                ),
            ),
            (
                "forwarding",
                Hook("filter", "forward", 0, "accept"),
                "a backstop behind the rules of the gateway",
                (
                    f"{gateway} ip saddr != {UPLINK_GATEWAY4} {untranslated}",
                    f"{gateway} ip6 saddr != {UPLINK_GATEWAY6} {untranslated}",
                    f"{gateway} ip daddr {own4} {untranslated}",
                    f"{gateway} ip6 daddr {own6} {untranslated}",
                    f'oifname "{HOST_LINK}" ct state != {{ established, related }}'
                    ' counter name "unasked" drop',
                ),
            ),
        )
    )
    things: Objects = {
        _inet("counter", name): Counter(comment=text)
        for name, text in (
            ("refused", "from a sandbox to the host itself"),
            ("untranslated", "with an address that must not leave the gateway"),
            ("unasked", "towards the gateway, and not an answer"),
            ("wayless", "to where the host has no route"),
        )
    }
    lifetimes = {"established": IDLE_FOR, "time_wait": CLOSED_FOR}
    things[_inet("ct timeout", "gateway4")] = Timeout("ip", lifetimes)
    things[_inet("ct timeout", "gateway6")] = Timeout("ip6", lifetimes)
    things[_inet("chain", "refuse")] = Chain(rules=_REFUSE, comment="says no at once")
    for name, hook, text, rules in chains:
        things[_inet("chain", name)] = Chain(rules=rules, hook=hook, comment=text)
    return things
