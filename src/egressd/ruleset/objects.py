"""What a ruleset is made of: chains, sets, counters, quotas, limits and timeouts, as data and as nft text.

Both sides of every comparison have this shape: `build` makes it from what is wanted, `observe` from what
the kernel lists. Rules are text in nft's own words; `observe.render` writes the kernel's JSON in the same
words, so equal text is an equal rule.

This is the one place where identifiers and strings become nft syntax. nft strings know no escape, so
what holds anything but the few characters below is refused with ValueError, never repaired.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal, NamedTuple, TypeAlias

__all__ = [
    "FAMILIES", "VERDICT", "Address", "Chain", "Counter", "Entry", "Family", "Hook", "Key", "Limit",
    "Network", "Objects", "Quota", "Set", "Timeout", "address_text", "identifier", "mark_text",
    "network_text", "string",
]  # fmt: skip

Family: TypeAlias = Literal["netdev", "inet"]
FAMILIES: tuple[Family, ...] = ("netdev", "inet")  # of each a table: at the links, and behind them
Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

_IDENTIFIER = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_STRING = re.compile(r"[A-Za-z0-9.*:,;/()_ -]{1,120}")
VERDICT = "verdict"  # the data of a map whose elements lead to chains
_CHUNK = 50_000  # elements in one command: bounds the parser's memory, not the batch


def identifier(name: str) -> str:
    """`name`, if it can stand unquoted as the name of an nft object; else ValueError."""
    if not _IDENTIFIER.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of an nft object")
    return name


def string(text: str) -> str:
    """`text` in quotes, if nft can hold it: 120 bytes, no quote or control character. Else ValueError."""
    if not _STRING.fullmatch(text):
        raise ValueError(f"{text!r} cannot be an nft string")
    return f'"{text}"'


def address_text(address: str | Address) -> str:
    """An address in the one spelling we compare; ValueError for anything else."""
    return str(ip_address(address))


def network_text(network: str | Network) -> str:
    """A network as nft lists it: without the prefix length when it is a single address."""
    net = ip_network(network)
    return str(net.network_address) if net.prefixlen == net.max_prefixlen else str(net)


def mark_text(mark: int) -> str:
    """A mark as nft lists it."""
    if not 0 <= mark <= 0xFFFF_FFFF:
        raise ValueError(f"{mark} is not a mark")
    return f"0x{mark:08x}"


class Entry(NamedTuple):
    """What stands beside a key: a map's data, a comment, a statement (`limit rate over 9/second`)."""

    data: str = ""
    comment: str = ""
    statement: str = ""


@dataclass(frozen=True, slots=True)
class Hook:
    """Where a base chain hangs. `device` only in netdev."""

    type: str  # filter, nat
    name: str  # ingress, prerouting, ...
    priority: int
    policy: str  # accept, drop
    device: str | None = None

    def __str__(self) -> str:
        device = f" device {string(self.device)}" if self.device else ""
        return f"type {self.type} hook {self.name}{device} priority {self.priority}; policy {self.policy};"


@dataclass(frozen=True, slots=True)
class Chain:
    """Rules in order. Each is text in the words `observe.render` uses."""

    rules: tuple[str, ...] = ()
    hook: Hook | None = None
    comment: str = field(default="", compare=False)  # nft 1.0.6 leaves chain comments out of its JSON

    def mentions(self, name: str) -> bool:
        """Does a rule refer to the object of that name?"""
        pattern = re.compile(rf'(?:@|"|jump |goto ){re.escape(name)}(?![\w-])')
        return any(pattern.search(rule) for rule in self.rules)


@dataclass(frozen=True, slots=True)
class Set:
    """A set, or a map when `data` is given. `type` as nft writes it: "mark . ipv4_addr"."""

    type: str
    data: str | None = None
    flags: tuple[str, ...] = ()
    counter: bool = False
    size: int | None = None
    comment: str = field(default="", compare=False)
    elements: Mapping[str, Entry] = field(default_factory=dict)
    partial: bool = field(default=False, compare=False)  # only elements, for a set declared elsewhere

    @property
    def word(self) -> str:
        return "set" if self.data is None else "map"

    @property
    def shape(self) -> tuple[object, ...]:
        """All but the elements: what cannot be changed without making the set anew."""
        # "dynamic" and the size that goes with it: nft 1.0.6 does not list the flag in JSON
        flags = tuple(flag for flag in self.flags if flag != "dynamic")
        return self.type, self.data, flags, self.counter, self.size

    def definition(self) -> str:
        parts = [f"type {self.type}" + (f" : {self.data}" if self.data else "")]
        parts += [f"size {self.size}"] if self.size else []
        parts += [f"flags {','.join(self.flags)}"] if self.flags else []
        parts += ["counter"] if self.counter else []
        parts += [f"comment {string(self.comment)}"] if self.comment else []
        return "{ " + "; ".join(parts) + "; }"


@dataclass(frozen=True, slots=True)
class Counter:
    comment: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Quota:
    """Matches once more than `bytes` have been seen."""

    bytes: int
    comment: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Limit:
    """Matches once more than `burst` packets have been seen, and as good as for ever: it gets one packet back
    in a week, which is as slow as nft 1.0.6 can say. Having a name it outlives the rules that ask it.

    The kernel counts in nanoseconds, `burst` times 6.048e14 of them in 64 bits, and compares signed numbers
    (nft_limit_eval): right up to 15,250.
    """

    burst: int
    comment: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Timeout:
    """How many seconds a TCP connection stays known in a state, in place of the namespace's own settings; for
    states that are left out these hold. Of the host's table only: nothing reads one back."""

    family: Literal["ip", "ip6"]
    policy: Mapping[str, int]  # states as nft writes them: time_wait, established, ...


Object: TypeAlias = Chain | Set | Counter | Quota | Limit | Timeout


class Key(NamedTuple):
    """What names an object within both tables. Chains, sets and maps, counters, quotas, limits and timeouts
    have namespaces of their own in the kernel; so here."""

    family: Family
    sort: Literal["chain", "set", "counter", "quota", "limit", "ct timeout"]
    name: str

    def path(self, table: str) -> str:
        return f"{self.family} {table} {identifier(self.name)}"


Objects: TypeAlias = dict[Key, Object]


def make(key: Key, thing: Object, table: str) -> Iterator[str]:
    """Commands that declare an object, without its rules and elements."""
    path = key.path(table)
    match thing:
        case Counter(comment=comment):
            yield f"add counter {path}" + (f" {{ comment {string(comment)}; }}" if comment else "")
        case Quota(bytes=limit, comment=comment):
            note = f" comment {string(comment)};" if comment else ""
            yield f"add quota {path} {{ over {int(limit)} bytes;{note} }}"
        case Limit(burst=burst, comment=comment):
            note = f" comment {string(comment)};" if comment else ""
            yield f"add limit {path} {{ rate over 1/week burst {int(burst)} packets;{note} }}"
        case Timeout(family=family, policy=policy):
            states = ", ".join(f"{identifier(state)} : {int(value)}" for state, value in policy.items())
            yield f"add ct timeout {path} {{ protocol tcp; l3proto {family}; policy = {{ {states} }}; }}"
        case Set(partial=True):
            return
        case Set():
            yield f"add {thing.word} {path} {thing.definition()}"
        case Chain(hook=hook, comment=comment):
            inside = [str(hook)] if hook else []
            inside += [f"comment {string(comment)};"] if comment else []
            yield f"add chain {path}" + (f" {{ {' '.join(inside)} }}" if inside else "")


def fill(key: Key, thing: Object, table: str) -> Iterator[str]:
    """Commands that put the rules into a chain."""
    if isinstance(thing, Chain):
        yield from (f"add rule {key.path(table)} {rule}" for rule in thing.rules)


def add_elements(key: Key, elements: Mapping[str, Entry], table: str) -> Iterator[str]:
    """One command for up to fifty thousand elements: nft's per-command work would dominate otherwise."""
    texts = [_element(name, entry) for name, entry in elements.items()]
    for start in range(0, len(texts), _CHUNK):
        yield f"add element {key.path(table)} {{ {', '.join(texts[start : start + _CHUNK])} }}"


def delete_elements(key: Key, names: Iterable[str], table: str) -> Iterator[str]:
    texts = list(names)
    for start in range(0, len(texts), _CHUNK):
        yield f"delete element {key.path(table)} {{ {', '.join(texts[start : start + _CHUNK])} }}"


def _element(name: str, entry: Entry) -> str:
    data, comment, statement = entry
    text = f"{name} {statement}" if statement else name
    if comment:
        text += f" comment {string(comment)}"
    return f"{text} : {data}" if data else text
