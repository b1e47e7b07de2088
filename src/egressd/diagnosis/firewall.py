"""Would the host's own firewall drop what comes from egressd's device? Read from `nft -j list ruleset`.

A packet goes through every base chain of the forward hook, in whatever table; an accept in one does not
overrule a drop in another. So each is walked, with a packet of which only this much is known: the devices it
comes from and goes to, its family, that it is TCP, and whether its connection is new. A comparison with
anything else may hold or not. A chain in which the packet is dropped whatever those are is an obstacle; one
in which it is dropped unless one of them holds is an uncertain one. A drop that hangs on such a comparison is
none: blocklists are meant to be.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from egressd.diagnosis.facts import Obstacle

__all__ = ["Packet", "obstacles", "remedy"]

_MOST_STEPS = 20_000  # rules that are looked at for one packet: a ruleset may be a maze of jumps
_FAMILIES = ("ip", "ip6", "inet")
_TCP = "tcp"  # what the packet is: what drops all of it is an obstacle, whatever becomes of the rest

Name: TypeAlias = tuple[str, str, str]  # family, table, chain or set


@dataclass(frozen=True, slots=True)
class Packet:
    family: str  # ip, ip6
    incoming: str
    outgoing: str
    state: str  # new, established


class _End(enum.Enum):
    ACCEPT = "accept"
    DROP = "drop"
    FALL = "fall"  # through to the next rule of who called, or to the policy


@dataclass(slots=True)
class _Chain:
    rules: list[list[Any]] = field(default_factory=list)
    hook: str = ""
    kind: str = ""
    policy: str = "accept"


@dataclass(slots=True)
class _Walk:
    packet: Packet
    chains: Mapping[Name, _Chain]
    sets: Mapping[Name, list[Any]]
    doubtful: bool = False  # something that is not known would have accepted it
    why: str = ""
    steps: int = 0


def obstacles(listing: object, *, link: str, uplinks: Iterable[str], ours: str) -> list[Obstacle]:
    """`link`: egressd's device on the host; `ours`: egressd's own table there, which is not in question."""
    chains, sets = _chains(listing), _sets(listing)
    found: dict[tuple[object, ...], Obstacle] = {}
    for uplink in uplinks:
        for version in ("ip", "ip6"):
            for direction, packet in (
                ("out", Packet(version, link, uplink, "new")),
                ("back", Packet(version, uplink, link, "established")),
            ):
                for name, chain in chains.items():
                    if chain.hook != "forward" or chain.kind != "filter" or name[1] == ours:
                        continue
                    if name[0] not in ("inet", version):
                        continue
                    obstacle = _judge(name, packet, direction, chains, sets)
                    if obstacle is not None:
                        found.setdefault((name, direction, version), obstacle)
    return list(found.values())


def _judge(
    name: Name, packet: Packet, direction: str, chains: Mapping[Name, _Chain], sets: Mapping[Name, list[Any]]
) -> Obstacle | None:
    walk = _Walk(packet, chains, sets)
    end = _walk(walk, name, ())
    if end is _End.FALL:
        end = _End.DROP if chains[name].policy == "drop" else _End.ACCEPT
        walk.why = "its policy is drop, and no rule accepts it"
    if end is _End.ACCEPT:
        return None
    return Obstacle(
        family=name[0],
        table=name[1],
        chain=name[2],
        owner=_owner(name, chains),
        direction=direction,
        packet=packet.family,
        why=walk.why,
        certain=not walk.doubtful,
    )


def _owner(name: Name, chains: Mapping[Name, _Chain]) -> str:
    siblings = {chain for family, table, chain in chains if (family, table) == name[:2]}
    if name[1] == "firewalld":
        return "firewalld"
    if "DOCKER-USER" in siblings:
        return "docker"
    return "ufw" if any(re.match("ufw6?-", chain) for chain in siblings) else ""


# ---- walking


def _walk(walk: _Walk, name: Name, path: tuple[Name, ...]) -> _End:
    chain = walk.chains.get(name)
    if chain is None or name in path or len(path) > 16:  # NFT_JUMP_STACK_SIZE
        return _End.FALL
    for expressions in chain.rules:
        walk.steps += 1
        if walk.steps > _MOST_STEPS:
            walk.doubtful = True
            return _End.FALL
        holds, verdict = _rule(walk, name, expressions)
        if holds is False or verdict is None:
            continue
        end = _follow(walk, name, verdict, path)
        if holds is None:
            walk.doubtful |= end is _End.ACCEPT
            continue
        if end is not None:
            return end
    return _End.FALL


def _follow(walk: _Walk, name: Name, verdict: tuple[str, str], path: tuple[Name, ...]) -> _End | None:
    """Where a verdict leads; None: to the next rule."""
    word, target = verdict
    if word == "accept":
        return _End.ACCEPT
    if word in ("drop", "reject"):
        walk.why = f"a rule of chain {name[2]} says {word}"
        return _End.DROP
    if word == "return":
        return _End.FALL
    end = _walk(walk, (name[0], name[1], target), (*path, name))
    return None if end is _End.FALL and word == "jump" else end


def _rule(walk: _Walk, name: Name, expressions: list[Any]) -> tuple[bool | None, tuple[str, str] | None]:
    """Whether its comparisons hold (None: not known), and its verdict."""
    holds: bool | None = True
    tracked = False
    for expression in expressions:
        if not isinstance(expression, dict) or len(expression) != 1:
            return None, None
        ((word, value),) = expression.items()
        if word in _VERDICTS:
            return _of_state(walk, holds, word) if tracked else holds, (word, _target(value))
        if word == "vmap":
            known, verdict = _mapped(walk, name, value)
            return (holds if known else (None if holds is not False else False)), verdict
        if word in _NEUTRAL:
            continue
        if _is_conntrack(word, value):
            tracked = True
            continue
        one = _matches(walk, name, value) if word == "match" else None
        if one is False:
            return False, None
        holds = None if one is None else holds
    return holds, None


def _is_conntrack(word: str, value: object) -> bool:
    return word == "xt" and isinstance(value, dict) and value.get("name") == "conntrack"


def _of_state(walk: _Walk, holds: bool | None, word: str) -> bool | None:
    """iptables' `-m conntrack`, of which nft shows no more than the name. What it accepts is answers,
    in every ruleset there is (RELATED,ESTABLISHED); of what it drops nothing is known."""
    if word != "accept":
        return None
    return holds if walk.packet.state == "established" else False


_VERDICTS = frozenset({"accept", "drop", "reject", "return", "jump", "goto"})
_NEUTRAL = frozenset({"counter", "log", "mangle", "notrack", "ct helper", "ct timeout", "map", "flow"})


def _target(value: object) -> str:
    return str(value.get("target", "")) if isinstance(value, dict) else ""


def _mapped(walk: _Walk, name: Name, value: object) -> tuple[bool, tuple[str, str] | None]:
    """A verdict map: whether its key is known, and the verdict for it."""
    if not isinstance(value, dict):
        return False, None
    own = _own(walk.packet, value.get("key"))
    if own is None:
        return False, None
    for element in _elements(walk, name, value.get("data")):
        if isinstance(element, list) and len(element) == 2 and _equal(own, element[0]):
            verdict = element[1]
            if isinstance(verdict, dict) and len(verdict) == 1:
                ((word, target),) = verdict.items()
                return True, (word, _target(target)) if word in _VERDICTS else None
    return True, None


def _matches(walk: _Walk, name: Name, value: object) -> bool | None:
    if not isinstance(value, dict):
        return None
    left, operator = value.get("left"), value.get("op")
    if _of_others(walk.packet, left):
        return False
    own = _own(walk.packet, left)
    if own is None or operator not in ("==", "in", "!="):
        return None
    right = value.get("right")
    wanted = _elements(walk, name, right) if _several(right) else [right]
    if any(isinstance(one, dict) for one in wanted):
        return None  # ranges and prefixes are not of devices and states
    found = any(_equal(own, one) for one in wanted)
    return found is not (operator == "!=")


def _of_others(packet: Packet, left: object) -> bool:
    """A comparison with a field that the packet does not have."""
    payload = left.get("payload") if isinstance(left, dict) else None
    protocol = payload.get("protocol") if isinstance(payload, dict) else None
    if protocol in ("ip", "ip6"):
        return bool(protocol != packet.family)
    return protocol in ("udp", "udplite", "icmp", "icmpv6", "igmp", "sctp", "dccp")


def _own(packet: Packet, left: object) -> str | None:
    """The packet's own value of what is compared; None: not known."""
    if not isinstance(left, dict):
        return None
    meta, tracked, payload = left.get("meta"), left.get("ct"), left.get("payload")
    if isinstance(meta, dict):
        return {
            "iifname": packet.incoming,
            "iif": packet.incoming,
            "oifname": packet.outgoing,
            "oif": packet.outgoing,
            "nfproto": "ipv4" if packet.family == "ip" else "ipv6",
            "protocol": packet.family,
            "l4proto": _TCP,
        }.get(str(meta.get("key")))
    if isinstance(tracked, dict):
        # nothing of ours is translated on the host but the source, after all of this
        return {"state": packet.state, "status": "confirmed"}.get(str(tracked.get("key")))
    if isinstance(payload, dict) and payload.get("field") in ("protocol", "nexthdr"):
        return _TCP
    return None


def _equal(own: str, other: object) -> bool:
    if not isinstance(other, str):
        return False
    return own.startswith(other[:-1]) if other.endswith("*") else own == other


def _several(right: object) -> bool:
    return (
        isinstance(right, list) or (isinstance(right, dict) and "set" in right) or str(right).startswith("@")
    )


def _elements(walk: _Walk, name: Name, value: object) -> list[Any]:
    if isinstance(value, str) and value.startswith("@"):
        return walk.sets.get((name[0], name[1], value[1:]), [])
    inner = value.get("set") if isinstance(value, dict) else value
    return inner if isinstance(inner, list) else []


# ---- reading


def _objects(listing: object, *words: str) -> Iterator[dict[str, Any]]:
    rows = listing.get("nftables") if isinstance(listing, dict) else None
    for row in rows if isinstance(rows, list) else ():
        for word in words:
            found = row.get(word) if isinstance(row, dict) else None
            if isinstance(found, dict) and found.get("family") in _FAMILIES:
                yield found


def _chains(listing: object) -> dict[Name, _Chain]:
    chains = {
        _name(found, "name"): _Chain(
            hook=str(found.get("hook", "")),
            kind=str(found.get("type", "")),
            policy=str(found.get("policy", "accept")),
        )
        for found in _objects(listing, "chain")
    }
    for found in _objects(listing, "rule"):
        expressions = found.get("expr")
        if isinstance(expressions, list):
            chains.setdefault(_name(found, "chain"), _Chain()).rules.append(expressions)
    return chains


def _sets(listing: object) -> dict[Name, list[Any]]:
    return {
        _name(found, "name"): found["elem"]
        for found in _objects(listing, "set", "map")
        if isinstance(found.get("elem"), list)
    }


def _name(found: Mapping[str, Any], key: str) -> Name:
    return str(found.get("family", "")), str(found.get("table", "")), str(found.get(key, ""))


# ---- what to do


_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DOCKER = {
    "out": "{tables} -I DOCKER-USER -i {link} -j ACCEPT",
    "back": "{tables} -I DOCKER-USER -o {link} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
}
_RULES = {
    "out": 'nft insert rule {family} {table} {chain} iifname "{link}" accept',
    "back": 'nft insert rule {family} {table} {chain} oifname "{link}" ct state established,related accept',
}


def remedy(obstacle: Obstacle, *, link: str) -> str:
    """The command that lets egressd's device through. Safe to paste: only plain names are shown."""
    match obstacle.owner:
        case "firewalld":
            return f"firewall-cmd --permanent --zone=trusted --add-interface={link} && firewall-cmd --reload"
        case "ufw":
            return f"ufw route allow in on {link}" + (
                "" if obstacle.direction == "out" else f"; ufw route allow out on {link}"
            )
        case "docker":
            tables = "iptables" if obstacle.packet == "ip" else "ip6tables"
            return _DOCKER[obstacle.direction].format(tables=tables, link=link)
    names = (obstacle.family, obstacle.table, obstacle.chain)
    if not all(_PLAIN.fullmatch(name) for name in names):
        return f"let {link} through in that chain (docs/operations.md)"
    family, table, chain = names
    return _RULES[obstacle.direction].format(family=family, table=table, chain=chain, link=link)
