"""The same batch for one link after another, without asking libnftables each time.

libnftables reads all chains, sets and objects of the kernel before each batch that holds a rule (nft 1.0.6,
evaluate_cache_add): with a thousand links that is 40 ms for opening one more, and as much for closing it. The
batches of links differ in a name and two addresses. So libnftables is asked twice what it would send, for two
links that do not exist, without sending it (--check, --debug=mnl); where the first one's messages, with the
second one's name and addresses put in, are the second one's, byte for byte, they are good for any link.
Otherwise, and whenever the kernel refuses such a batch, the words go through libnftables as ever.

Layouts: linux/netlink.h, linux/netfilter/nfnetlink.h. What is printed: libmnl, mnl_nlmsg_fprintf.
"""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from egressd.kernel.netlink import CREATE, Request, attribute, attributes
from egressd.kernel.nft import Nft
from egressd.model.errors import KernelError
from egressd.model.identities import Link

__all__ = ["Addresses", "Make", "Mould", "Stencils", "Values", "fill", "mould", "printed"]

Make = Callable[[Link], Sequence[str]]  # nft syntax for a link
Addresses = Callable[[Link], tuple[IPv4Address, IPv6Address]]

_FIRST, _SECOND = Link(987_654_321), Link(31)  # names of different lengths; neither is asked for in earnest
_MOST = 256  # kinds of links that are remembered
_IFNAMSIZ = 16  # linux/if.h: an interface as the key of an element is as long as this
_BEGIN, _END = 16, 17  # NFNL_MSG_BATCH_*
_NESTED, _NET_ORDER = 0x8000, 0x4000  # NLA_F_*
_NLM_F_APPEND = 0x800
_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NEW_SET, _SET_ID = _SUBSYSTEM | 9, 10  # NFT_MSG_NEWSET, NFTA_SET_ID
# The flags are not printed in full. What adds creates what is not there, and is content with what is (`add`,
# not `create`); rules go to the end. What takes away has none.
_FLAGS = {_SUBSYSTEM | kind: CREATE for kind in (0, 3, 9, 12, 18)}  # NEWTABLE, CHAIN, SET, SETELEM, OBJ
_FLAGS[_SUBSYSTEM | 6] = CREATE | _NLM_F_APPEND  # NFT_MSG_NEWRULE
_PLAIN = {_SUBSYSTEM | kind for kind in (2, 5, 8, 11, 14, 20)}  # NFT_MSG_DEL*


class Values(NamedTuple):
    """What differs from link to link."""

    name: bytes
    address4: bytes
    address6: bytes

    @classmethod
    def of(cls, link: Link, addresses: Addresses) -> Values:
        address4, address6 = addresses(link)
        return cls(link.device.encode(), address4.packed, address6.packed)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """An attribute with something to fill in: what stands between, in turn text and the number of a value."""

    kind: int
    pieces: tuple[bytes | int, ...]
    padded: bool

    def fill(self, values: Values) -> bytes:
        data = b"".join(values[piece] if isinstance(piece, int) else piece for piece in self.pieces)
        return attribute(self.kind, data.ljust(_IFNAMSIZ, b"\0") if self.padded else data)


@dataclass(frozen=True, slots=True)
class _Nest:
    kind: int
    inside: tuple[_Part, ...]

    def fill(self, values: Values) -> bytes:
        return attribute(self.kind, fill(self.inside, values))


_Part = bytes | _Leaf | _Nest  # bytes: attributes that are always the same


Mould = tuple[_Part, ...]


def mould(data: bytes, values: Values) -> Mould:
    """Attributes of one link, to be filled with what another link has in place of `values`."""
    return _merged(_parts(data, values))


def fill(parts: Sequence[_Part], values: Values) -> bytes:
    return b"".join(part if isinstance(part, bytes) else part.fill(values) for part in parts)


@dataclass(frozen=True, slots=True)
class _Message:
    kind: int
    header: bytes  # struct nfgenmsg
    parts: tuple[_Part, ...]

    def request(self, values: Values, what: str) -> Request:
        body = self.header + fill(self.parts, values)
        return Request(self.kind, body, what, _FLAGS.get(self.kind, 0))


class Stencils:
    """Learns from what it is asked for the second time."""

    def __init__(self, nft: Nft) -> None:
        self._nft = nft
        self._known: OrderedDict[tuple[str, ...], tuple[_Message, ...] | None] = OrderedDict()

    def requests(self, make: Make, link: Link, addresses: Addresses) -> list[Request] | None:
        """The messages of one batch, for `Netlink.transact`; None where libnftables has to be asked."""
        key = tuple(make(_FIRST))
        if key not in self._known:
            self._remember(key, None)
            return None
        messages = self._known[key]
        if messages is None:
            messages = self._learn(key, make(_SECOND), addresses)
        self._remember(key, messages)
        values = Values.of(link, addresses)
        return [message.request(values, f"change {link.device}") for message in messages] or None

    def forget(self) -> None:
        """The kernel did not like what was made of them: everything is learnt anew."""
        self._known.clear()

    def _remember(self, key: tuple[str, ...], messages: tuple[_Message, ...] | None) -> None:
        self._known[key] = messages
        self._known.move_to_end(key)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)

    def _learn(
        self, first: Sequence[str], second: Sequence[str], addresses: Addresses
    ) -> tuple[_Message, ...]:
        """() if it cannot be learnt."""
        values, other = Values.of(_FIRST, addresses), Values.of(_SECOND, addresses)
        learnt = tuple(_messages(self._nft.would_send(first), values))
        filled = [message.request(other, "") for message in learnt]
        wanted = [message.request(other, "") for message in _messages(self._nft.would_send(second), None)]
        known = all(request.kind in _FLAGS or request.kind in _PLAIN for request in filled)
        return learnt if known and _same(filled, wanted) else ()


def _same(one: Sequence[Request], other: Sequence[Request]) -> bool:
    """Byte for byte, but for the numbers of anonymous sets: libnftables counts these on from batch to batch,
    and they mean something only within one."""
    numbers = set(zip(_numbers(one), _numbers(other), strict=False))
    return len(one) == len(other) and all(
        a.kind == b.kind and len(a.body) == len(b.body) and _differences(a.body, b.body) <= numbers
        for a, b in zip(one, other, strict=True)
    )


def _differences(one: bytes, other: bytes) -> set[tuple[bytes, bytes]]:
    places = range(0, len(one), 4)
    words = ((one[at : at + 4], other[at : at + 4]) for at in places)
    return {(a, b) for a, b in words if a != b}


def _numbers(requests: Sequence[Request]) -> list[bytes]:
    """NFTA_SET_ID of the sets that a batch makes."""
    made = (dict(attributes(request.body[4:])) for request in requests if request.kind == _NEW_SET)
    return [said[_SET_ID] for said in made if _SET_ID in said]


def _messages(text: str, values: Values | None) -> Iterator[_Message]:
    for kind, body in printed(text):
        yield _Message(kind, body[:4], _merged(_parts(body[4:], values)))


def _parts(data: bytes, values: Values | None) -> Iterator[_Part]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        value = data[at + 4 : at + length]
        if kind & _NESTED:
            inside = _merged(_parts(value, values))
            fixed = all(isinstance(part, bytes) for part in inside)
            nest = _Nest(kind, inside)
            yield nest.fill(Values(b"", b"", b"")) if fixed else nest
        else:
            yield _leaf(kind, value, values)
        at += (length + 3) & ~3


def _leaf(kind: int, value: bytes, values: Values | None) -> _Part:
    if values is None:
        return attribute(kind, value)
    padded = len(value) == _IFNAMSIZ and value.rstrip(b"\0") == values.name
    pieces: list[bytes | int] = [values.name if padded else value]
    for number, known in enumerate(values):
        pieces = [piece for old in pieces for piece in _split(old, known, number)]
    return attribute(kind, value) if pieces == [value] else _Leaf(kind, tuple(pieces), padded)


def _split(piece: bytes | int, known: bytes, number: int) -> Iterator[bytes | int]:
    if isinstance(piece, int):
        yield piece
        return
    for turn, part in enumerate(piece.split(known)):
        if turn:
            yield number
        if part:
            yield part


def _merged(parts: Iterator[_Part]) -> tuple[_Part, ...]:
    """What is always the same, in one piece."""
    found: list[_Part] = []
    for part in parts:
        if found and isinstance(part, bytes) and isinstance(found[-1], bytes):
            found[-1] += part
        else:
            found.append(part)
    return tuple(found)


# ---- reading what libmnl prints

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TYPE = re.compile(r"\| (\d{5}) \| .{4} \|\t")
_ATTRIBUTE = re.compile(r"\|(\d{5})\|([N-])([B-])\|(\d{5})\|\t")
_WORDS = re.compile(r"\| ((?:[0-9a-f]{2} ){4}) \|\t")


def printed(text: str) -> Iterator[tuple[int, bytes]]:
    """(type, body) of each message between the beginning and the end of the batch. KernelError if there is
    no such thing."""
    messages: list[tuple[int, bytearray]] = []
    for line in _COLOUR.sub("", text).splitlines():
        if match := _TYPE.match(line):
            messages.append((int(match[1]), bytearray()))
        elif messages and (match := _ATTRIBUTE.match(line)):
            nested, order = (_NESTED if match[2] == "N" else 0), (_NET_ORDER if match[3] == "B" else 0)
            messages[-1][1].extend(struct.pack("=HH", int(match[1]), int(match[4]) | nested | order))
        elif messages and (match := _WORDS.match(line)):
            messages[-1][1].extend(bytes.fromhex(match[1]))
    kinds = [kind for kind, _ in messages]
    if _BEGIN not in kinds:
        raise KernelError("libnftables does not print what it would send")
    for kind, body in messages[kinds.index(_BEGIN) + 1 :]:
        if kind == _END:
            return
        yield kind, bytes(body)
