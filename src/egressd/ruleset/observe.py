"""Reading the kernel back: `nft -j list ruleset` as the same data that `build` makes, and as numbers.

`render` writes the JSON of a rule in the words that `build` uses. It knows the expressions that our rules
use and no others: what it does not know, or knows with a field more or less, becomes the raw JSON, which
is no rule of ours. So a difference can only ever be seen too often, not overlooked.

Not in nft 1.0.6's JSON: comments and devices of chains, the flag `dynamic`, and in any reliable way the
flags of tables. Devices and flags can be had from `nft -t list ruleset`, see `parse`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_network
from typing import Any, TypeAlias, cast

from msgspec import Struct, field
from msgspec.structs import replace

from egressd.ruleset.layout import SPENT, TABLE
from egressd.ruleset.objects import (
    Chain,
    Counter,
    Entry,
    Family,
    Hook,
    Key,
    Limit,
    Objects,
    Quota,
    Set,
    mark_text,
    string,
)

__all__ = [
    "Counters", "DialCount", "ElementCount", "LinkCounts", "Numbers", "Observed", "Tally", "admitting",
    "counted", "counters", "exact", "parse", "render",
]  # fmt: skip

Json: TypeAlias = dict[str, Any]


class Tally(Struct, frozen=True, array_like=True):
    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.packets + other.packets, self.bytes + other.bytes)

    def __sub__(self, other: Tally) -> Tally:
        return Tally(self.packets - other.packets, self.bytes - other.bytes)


class LinkCounts(Struct, frozen=True):
    """One link's books: in_ = ok + denied + other, exactly. What its budget of connections refused had been
    admitted, and counts as such."""

    in_: Tally = Tally()
    ok: Tally = Tally()
    denied: Tally = Tally()
    other: Tally = Tally()
    quota_used: int | None = None  # bytes; None: no quota
    quota: int | None = None
    connections_used: int | None = None  # connections opened; None: no budget of them
    connections: int | None = None


class ElementCount(Struct, frozen=True):
    """One key of an allow map and what it admitted. `address` as in `wants.Element`."""

    workspace: str
    address: str
    protocol: str
    port: int
    mark: int
    comment: str
    packets: int
    bytes: int


class DialCount(Struct, frozen=True):
    """What the inspector has sent on to one host and port, in one family. `workspace` is empty where no
    workspace of that number is there; `mark` is that of what is forwarded."""

    workspace: str
    address: str
    port: int
    mark: int
    comment: str
    packets: int
    bytes: int


class Counters(Struct, frozen=True):
    """Every number in the two tables."""

    links: dict[str, LinkCounts]  # by device, "eg7"
    denied: dict[str, dict[str, Tally]]  # workspace -> reason, one of build.DENIALS
    unlisted: dict[str, Tally]  # workspace -> admitted though on no list (guard off or observe)
    elements: tuple[ElementCount, ...]
    replies: dict[int, Tally]  # by mark
    opened: dict[int, Tally]  # by mark: packets is the number of connections
    late: dict[str, Tally]  # admitted, then lost: by reason
    stray: Tally = Tally()  # neither from a sandbox nor an answer to one
    dialled: tuple[DialCount, ...] = ()  # came over no link, so in no book of one


class Observed(Struct, frozen=True):
    """Our two tables as they are. `tables`: family -> awake (not `dormant`)."""

    tables: dict[str, bool]
    things: Objects


# --------------------------------------------------------------------------------------------------
# structure


def parse(listing: Json, chains: str = "", *, table: str = TABLE) -> Observed:
    """From `nft -j list ruleset`. Tables that are not ours are ignored; ValueError if it is no listing.

    `chains`: the text of `nft -t list ruleset`, for the devices that netdev chains hang on and for tables
    that sleep. Without it each chain is taken to hang on the device it is named for.
    """
    devices, flagged = _headers(chains, table)
    tables: dict[str, bool] = {}
    things: Objects = {}
    rules: dict[Key, list[str]] = {}
    for sort, body in _ours(listing, table):
        family = cast(Family, body["family"])
        match sort:
            case "table":
                tables[family] = family not in flagged if chains else "flags" not in body
            case "rule":
                text = render(body["expr"], comment=body.get("comment", ""))
                rules.setdefault(Key(family, "chain", body["chain"]), []).append(text)
            case "chain":
                hook = _hook(body, devices if chains else None)
                things[Key(family, "chain", body["name"])] = Chain(hook=hook)
            case "counter":
                things[Key(family, "counter", body["name"])] = Counter()
            case "quota":
                things[Key(family, "quota", body["name"])] = _quota(body)
            case "limit":
                things[Key(family, "limit", body["name"])] = _limit(body)
            case "set" | "map":
                things[Key(family, "set", body["name"])] = _set(body)
            case _:
                raise ValueError(f"nft lists a {sort} in our table: not one of ours")
    for key, texts in rules.items():
        chain = things[key]
        assert isinstance(chain, Chain)
        things[key] = Chain(rules=tuple(texts), hook=chain.hook)
    return Observed(tables=tables, things=things)


def _ours(listing: Json, table: str) -> Iterator[tuple[str, Json]]:
    try:
        entries = listing["nftables"]
    except (KeyError, TypeError):
        raise ValueError("this is not the output of nft -j list") from None
    for entry in entries:
        for sort, body in entry.items():
            if sort != "metainfo" and body.get("name" if sort == "table" else "table") == table:
                yield sort, body


def _headers(listing: str, table: str) -> tuple[dict[str, str], set[str]]:
    """({netdev chain: device}, {families whose table has flags}) from the text of a listing.

    Comments could say anything, but only in quotes, on lines that begin with `comment` or hold a rule.
    """
    devices: dict[str, str] = {}
    flagged: set[str] = set()
    family = name = chain = ""
    for line in listing.splitlines():
        if match := re.match(r"table (\w+) (\S+) \{", line):
            family, name = match.groups()
        elif name != table:
            continue
        elif re.match(r"\tflags ", line):
            flagged.add(family)
        elif match := re.match(r"\tchain (\S+) \{", line):
            chain = match[1]
        elif family == "netdev" and (match := re.match(r"\t\ttype \w+ hook \w+ device(.*) priority ", line)):
            devices[chain] = _device(match[1])
    return devices, flagged


def _device(text: str) -> str:
    """The one device named; something that is no device's name if there is none, or several."""
    match = re.fullmatch(r' "([^"]*)"', text)
    return match[1] if match else text


def _hook(body: Json, devices: Mapping[str, str] | None) -> Hook | None:
    if "hook" not in body:
        return None
    device = None
    if body["family"] == "netdev":
        device = body["name"] if devices is None else devices.get(body["name"], "")
    return Hook(body["type"], body["hook"], body["prio"], body["policy"], device)


def _quota(body: Json) -> Quota:
    # one that matches until it is used up would let everything after it be judged: not ours
    return Quota(bytes=body["bytes"] if body.get("inv") else -1)


def _limit(body: Json) -> Limit:
    match body:  # one of bytes has units; one that is not `over` matches until it is used up: not ours
        case {"rate": 1, "per": "week", "burst": int(burst), "inv": True, **rest} if "burst_unit" not in rest:
            return Limit(burst=burst)
    return Limit(burst=-1)


def _set(body: Json) -> Set:
    statements = body.get("stmt", [])
    return Set(
        type=_type(body["type"]),
        data=_type(body["map"]) if "map" in body else None,
        flags=tuple(body.get("flags", ())),
        counter=statements == [{"counter": None}],
        size=body.get("size"),
        elements=dict(_elements(body)),
    )


def _type(kind: str | list[str]) -> str:
    return kind if isinstance(kind, str) else " . ".join(kind)


def _elements(body: Json) -> Iterator[tuple[str, Entry]]:
    marks = "map" in body and body["map"] == "mark"
    quoted = body["type"] == "ifname"
    for item in body.get("elem", ()):
        value, data = item if "map" in body else (item, "")
        inner: Json = value["elem"] if isinstance(value, dict) and "elem" in value else {"val": value}
        name = _value(inner["val"], mark=body["type"] == "mark" or body["type"][:1] == ["mark"])
        yield (
            string(name) if quoted else name,
            Entry(
                data=_data(data, mark=marks),
                comment=inner.get("comment", ""),
                statement=_statement(inner),
            ),
        )


def _data(data: Any, *, mark: bool) -> str:
    """What an element of a map leads to: a mark, an address, a verdict (`jump eg7_connections`)."""
    match data:
        case int(number) if mark:
            return mark_text(number)
        case {"jump": {"target": str(target), **more}, **rest} if not rest and not more:
            return f"jump {target}"
    return str(data)


def _statement(inner: Json) -> str:
    """What else hangs on an element; its counter is the set's own business."""
    rest = {key: value for key, value in inner.items() if key not in ("val", "comment", "counter")}
    if set(rest) == {"limit"}:
        with contextlib.suppress(_ForeignError):
            return _rate(rest["limit"])
    return json.dumps(rest) if rest else ""


_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 51: "ah", 58: "ipv6-icmp"}


def _protocol(value: Any) -> str:
    """nft's word for a protocol number. It may list either, depending on its flags and /etc/protocols."""
    return _PROTOCOLS.get(value, str(value)) if isinstance(value, int) else str(value)


def _value(value: Any, *, mark: bool = False) -> str:
    """An element's key as text: `198.18.0.4 . tcp . 80`, `0x80004001 . 198.18.0.4`, `10.20.0.0/16`."""
    match value:
        case {"concat": [first, protocol, int(port)]} if not mark:
            return f"{_value(first)} . {_protocol(protocol)} . {port}"
        case {"concat": [int(number), address]} if mark:
            return f"{mark_text(number)} . {_value(address)}"
        case {"prefix": {"addr": str(address), "len": int(length)}}:
            return f"{_address(address)}/{length}"
        case int(number):
            return mark_text(number) if mark else str(number)
        case str(text):
            return _address(text)
    return json.dumps(value)


def _address(text: str) -> str:
    # inet_ntop writes ::ffff:1.2.3.4 and Python does not; nothing else differs
    return str(ip_address(text)) if "." in text and ":" in text else text


# --------------------------------------------------------------------------------------------------
# rules


class _ForeignError(Exception):
    """An expression that none of our rules has."""


def render(expressions: Iterable[Json], *, comment: str = "") -> str:
    """A rule in the words of `build`; raw JSON, recognisably not one of ours, where that cannot be."""
    items = list(expressions)
    try:
        text = " ".join(_expression(item) for item in items)
    except (_ForeignError, KeyError, TypeError, ValueError):
        text = f"foreign {json.dumps(items)}"
    return f'{text} comment "{comment}"' if comment else text


_PROTOCOL_FIELDS = ({"meta": {"key": "l4proto"}}, {"payload": {"protocol": "ip6", "field": "nexthdr"}})
_BARE = ("iifname", "oifname", "iifgroup", "oifgroup")


def _rate(body: Json) -> str:
    match body:
        case {"rate": int(rate), "burst": int(burst), "per": str(per), **rest} if rest in ({}, {"inv": True}):
            over = "over " if rest else ""
            return f"limit rate {over}{rate}/{per} burst {burst} packets"
    raise _ForeignError


def _expression(item: Json) -> str:
    """One statement or match. Every field must be accounted for."""
    [(word, body)] = item.items()
    match word, body:
        case (("accept" | "drop" | "return" | "masquerade" | "notrack"), None):
            return str(word)
        case (("counter" | "quota" | "limit"), str(name)):
            return f'{word} name "{name}"'
        case (("jump" | "goto"), {"target": str(target), **rest}) if not rest:
            return f"{word} {target}"
        case "match", {"op": str(operator), "left": left, "right": right, **rest} if not rest:
            return _match(operator, left, right)
        case "mangle", {"key": key, "value": value, **rest} if not rest:
            return f"{_operand(key)} set {_operand(value, mark=_is_mark(key))}"
        case "vmap", {"key": key, "data": data, **rest} if not rest:
            return f"{_operand(key)} vmap {_verdicts(data, key)}"
        case "ct count", {"val": int(limit), "inv": True, **rest} if not rest:
            return f"ct count over {limit}"
        case "limit", dict(rate):
            return _rate(rate)
        case "log", {"prefix": str(prefix), "group": int(group), "snaplen": int(length), **rest} if not rest:
            return f'log prefix "{prefix}" group {group} snaplen {length}'
        case "reject", dict(how):
            return f"reject with {_refusal(how)}"
        case "dnat", {"family": str(family), "addr": {"map": target, **x}, **rest} if not rest and not x:
            return f"dnat {family} to {_lookup(target)}"
        case "tproxy", {"family": str(family), "addr": str(address), "port": int(port), **rest} if not rest:
            where = f"[{address}]" if ":" in address else address
            return f"tproxy {family} to {where}:{port}"
    raise _ForeignError(word)


def _refusal(how: Json) -> str:
    match how:
        case {"type": "tcp reset", **rest} if not rest:
            return "tcp reset"
        case {"type": "icmpx", "expr": str(code), **rest} if not rest:
            return f"icmpx {code}"
    raise _ForeignError("reject")


def _match(operator: str, left: Any, right: Any) -> str:
    if "exthdr" in left:
        return _extension(operator, left["exthdr"], right)
    if left in _PROTOCOL_FIELDS and isinstance(right, int):
        right = _protocol(right)
    quoted = left.get("meta", {}).get("key") in ("iifname", "oifname")
    value = _operand(right, mark=_is_mark(left), quoted=quoted)
    # "in" is nft's word for the implicit operator of flags (ct state), "==" for that of the rest
    if operator == "in" or (operator == "==" and "&" not in left):
        return f"{_operand(left)} {value}"
    return f"{_operand(left)} {operator} {value}"


def _extension(operator: str, header: Json, right: Any) -> str:
    if set(header) != {"name"} or operator != "==" or right not in (True, False):
        raise _ForeignError("exthdr")
    return f"exthdr {header['name']} {'exists' if right else 'missing'}"


def _is_mark(operand: Any) -> bool:
    match operand:
        case {"meta": {"key": "mark"}} | {"ct": {"key": "mark"}}:
            return True
        case {"&": [inner, int()]}:
            return _is_mark(inner)
    return False


def _operand(operand: Any, *, mark: bool = False, quoted: bool = False) -> str:
    match operand:
        case bool():
            raise _ForeignError("bool")
        case int(number):
            return mark_text(number) if mark else str(number)
        case str(text):
            return text if not quoted or text.startswith("@") else string(text)
        case {"meta": {"key": str(key), **more}, **rest} if not rest and not more:
            return key if key in _BARE else f"meta {key}"
        case {"ct": {"key": str(key), **more}, **rest} if not rest and not more:
            return f"ct {key}"
        case {"payload": {"protocol": str(protocol), "field": str(name), **x}, **rest} if not rest and not x:
            return f"{protocol} {name}"
        case {"&": [left, right]} | {"|": [left, right]} if len(operand) == 1:
            [sign] = operand
            return f"{_operand(left)} {sign} {_mask(right, mark=_is_mark(left))}"
        case {"concat": list(parts), **rest} if not rest:
            return " . ".join(_operand(part) for part in parts)
        case {"map": target, **rest} if not rest:
            return _lookup(target)
        case list(flags):
            return ",".join(_operand(flag) for flag in flags)
        case {"set": _} | {"prefix": _}:
            return _member(operand)
    raise _ForeignError("operand")


def _mask(mask: Any, *, mark: bool) -> str:
    """A number; or flags by their names, several of them as nft reads them there."""
    if isinstance(mask, list):
        return f"({' | '.join(_operand(flag) for flag in mask)})"
    return _operand(mask, mark=mark)


def _lookup(target: Json) -> str:
    match target:
        case {"key": key, "data": str(data), **rest} if not rest:
            return f"{_operand(key)} map {data}"
    raise _ForeignError("map")


def _verdicts(data: Any, key: Any) -> str:
    """The map of a `vmap`: one that has a name, or what stands in the rule."""
    match data:
        case str(name):
            return name
        case {"set": list(pairs), **rest} if not rest:
            return f"{{ {', '.join(_pair(pair, key) for pair in pairs)} }}"
    raise _ForeignError("vmap")


def _pair(pair: Any, key: Any) -> str:
    value, verdict = pair
    return f"{_operand(value, mark=_is_mark(key))} : {_expression(verdict)}"


def _member(member: Any) -> str:
    match member:
        case {"prefix": {"addr": str(address), "len": int(length), **more}, **rest} if not rest and not more:
            return str(ip_network(f"{address}/{length}"))
        case {"prefix": _}:  # of a number: nft's word for its upper bits
            raise _ForeignError("prefix")
        case {"set": list(members), **rest} if not rest:
            return f"{{ {', '.join(_member(each) for each in members)} }}"
        case {"set": _}:
            raise _ForeignError("set")
    return _operand(member)


# --------------------------------------------------------------------------------------------------
# numbers

_COUNTER = re.compile(r"(?P<link>eg[1-9][0-9]*)_(?P<part>in|ok|denied|other|opened)")
_REASON = re.compile(r"(?P<workspace>[a-z][a-z0-9-]*)_(?P<reason>[a-z]+)_denied")
_UNLISTED = re.compile(r"(?P<workspace>[a-z][a-z0-9-]*)_unlisted_ok")
_MAP = re.compile(r"(?P<workspace>[a-z][a-z0-9-]*)_(?:out|cidr)[46]")


class Numbers(Struct):
    """What the kernel counts, by the names it has there; however it was read."""

    named: dict[tuple[str, str], Tally] = field(default_factory=dict)  # (family, counter)
    quotas: dict[str, tuple[int, int]] = field(default_factory=dict)  # device -> used, bytes
    budgets: dict[str, int] = field(default_factory=dict)  # device -> connections
    elements: list[ElementCount] = field(default_factory=list)
    dialled: list[DialCount] = field(default_factory=list)  # of nobody yet
    marks: dict[str, dict[int, Tally]] = field(default_factory=dict)  # of `in` and `opened`


def counters(listing: Json, *, table: str = TABLE) -> Counters:
    """From `nft -j list ruleset`, or any listing that holds our tables. ValueError if it is no listing."""
    numbers = Numbers()
    sets: dict[tuple[str, str], Json] = {}
    for sort, body in _ours(listing, table):
        match sort:
            case "counter":
                numbers.named[body["family"], body["name"]] = Tally(body["packets"], body["bytes"])
            case "quota":
                numbers.quotas[body["name"].removesuffix("_quota")] = (body["used"], body["bytes"])
            case "limit":
                numbers.budgets[body["name"].removesuffix("_budget")] = body["burst"]
            case "set" | "map":
                sets[body["family"], body["name"]] = body
    numbers.elements = list(_element_counts(sets))
    numbers.dialled = list(_dial_counts(sets))
    numbers.marks = {name: _by_mark(sets.get(("inet", name), {})) for name in ("in", "opened")}
    return counted(numbers)


def counted(numbers: Numbers) -> Counters:
    """The same, told apart: whose each is, and of what."""
    guard = {name: tally for (family, name), tally in numbers.named.items() if family == "netdev"}
    after = {name: tally for (family, name), tally in numbers.named.items() if family == "inet"}
    names = {_index(element.mark): element.workspace for element in numbers.elements}
    return Counters(
        links=_links(guard, numbers.quotas, numbers.budgets),
        denied=_denied(guard),
        unlisted={match["workspace"]: tally for match, tally in _matching(_UNLISTED, guard)},
        elements=tuple(numbers.elements),
        replies=numbers.marks.get("in", {}),
        opened=numbers.marks.get("opened", {}),
        late=_late(guard, after),
        stray=after.get("stray", Tally()),
        dialled=tuple(replace(dial, workspace=names.get(_index(dial.mark), "")) for dial in numbers.dialled),
    )


def admitting(name: str) -> str | None:
    """Whose allow map a map at the links is; None if it is none."""
    match = _MAP.fullmatch(name)
    return match["workspace"] if match else None


def _matching(pattern: re.Pattern[str], named: Mapping[str, Tally]) -> Iterator[tuple[re.Match[str], Tally]]:
    for name, tally in named.items():
        if match := pattern.fullmatch(name):
            yield match, tally


def _late(guard: Mapping[str, Tally], after: Mapping[str, Tally]) -> dict[str, Tally]:
    """A workspace may be called `late`: at the links only what has exactly our name is nobody's own."""
    spent = {name: guard[name] for name in (f"late_{SPENT}",) if name in guard}
    late = {name: tally for name, tally in after.items() if name.startswith("late_")} | spent
    return {name.removeprefix("late_"): tally for name, tally in late.items()}


def _links(
    named: Mapping[str, Tally], quotas: Mapping[str, tuple[int, int]], budgets: Mapping[str, int]
) -> dict[str, LinkCounts]:
    parts: dict[str, dict[str, Tally]] = {}
    for match, tally in _matching(_COUNTER, named):
        parts.setdefault(match["link"], {})[match["part"]] = tally
    return {
        device: LinkCounts(
            in_=found.get("in", Tally()),
            ok=found.get("ok", Tally()),
            denied=found.get("denied", Tally()),
            other=found.get("other", Tally()),
            quota_used=quotas[device][0] if device in quotas else None,
            quota=quotas[device][1] if device in quotas else None,
            connections_used=found.get("opened", Tally()).packets if device in budgets else None,
            connections=budgets.get(device),
        )
        for device, found in parts.items()
    }


def _denied(named: Mapping[str, Tally]) -> dict[str, dict[str, Tally]]:
    denied: dict[str, dict[str, Tally]] = {}
    for match, tally in _matching(_REASON, named):
        denied.setdefault(match["workspace"], {})[match["reason"]] = tally
    return denied


def _element_counts(sets: Mapping[tuple[str, str], Json]) -> Iterator[ElementCount]:
    for (family, name), body in sets.items():
        workspace = admitting(name)
        if family != "netdev" or workspace is None:
            continue
        for value, mark in body.get("elem", ()):
            inner = value["elem"]
            address, protocol, port = inner["val"]["concat"]
            count = inner.get("counter", {})
            yield ElementCount(
                workspace=workspace,
                address=exact(_value(address), mark),
                protocol=_protocol(protocol),
                port=port,
                mark=mark,
                comment=inner.get("comment", ""),
                packets=count.get("packets", 0),
                bytes=count.get("bytes", 0),
            )


def _dial_counts(sets: Mapping[tuple[str, str], Json]) -> Iterator[DialCount]:
    for name in ("dial4", "dial6"):
        for value, mark in sets.get(("inet", name), {}).get("elem", ()):
            inner = value["elem"]
            address, _, port = inner["val"]["concat"]
            count = inner.get("counter", {})
            yield DialCount(
                workspace="",
                address=_address(address),
                port=port,
                mark=mark,
                comment=inner.get("comment", ""),
                packets=count.get("packets", 0),
                bytes=count.get("bytes", 0),
            )


def _index(mark: int) -> int:
    """The workspace's, of anything that stands where a mark should (bits 14 to 26)."""
    return mark >> 14 & 0x1FFF


def exact(address: str, mark: int) -> str:
    """nft lists a network of one address without its length; a `cidr` rule's element has one."""
    direct = mark & 0x9000_0000 == 0x9000_0000
    return str(ip_network(address)) if direct and "/" not in address else address


def _by_mark(body: Json) -> dict[int, Tally]:
    tallies: dict[int, Tally] = {}
    for item in body.get("elem", ()):
        if isinstance(item, dict) and "elem" in item:
            count = item["elem"].get("counter", {})
            tallies[item["elem"]["val"]] = Tally(count.get("packets", 0), count.get("bytes", 0))
    return tallies
