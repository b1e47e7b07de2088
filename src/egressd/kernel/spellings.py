"""Is everything as it should be? Mostly yes, and that can be said without libnftables.

To compare the ruleset with the desired one libnftables lists all of it, twice, and the text is read: some
five seconds with a thousand links, in which nobody else is served. But what it makes of the kernel's messages
depends on nothing but these. So the messages of each chain that it has read as what it should be are kept;
while they are the same, byte for byte, and the chain should still be the same, it is. The chains of links
differ in a name and two addresses: what was read of one is good for each of its kind (see stencils.py). Sets,
their elements, and the objects with names are read here.

"Yes" is certain. Anything not known, remembered or understood is a "no", and then libnftables is asked.

Formats: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from egressd.kernel.dumps import Attributes, Dumps, text
from egressd.kernel.netlink import attribute, attributes
from egressd.kernel.set_elements import Unreadable, element
from egressd.kernel.stencils import Mould, Values, fill, mould
from egressd.model.identities import Link
from egressd.ruleset import build
from egressd.ruleset.build import Desired, LinkWant
from egressd.ruleset.layout import Pools
from egressd.ruleset.objects import (
    Chain,
    Counter,
    Entry,
    Family,
    Key,
    Limit,
    Object,
    Objects,
    Quota,
    Set,
    string,
)
from egressd.ruleset.wants import WorkspaceWant

__all__ = ["Spellings"]

_ANY = Link(987_654_321)
# What of a chain (NFTA_CHAIN_*), rule and set says what it is; the rest is handles, uses, ids and names.
_OF_CHAIN = (4, 5, 7, 8, 10, 12)  # HOOK, POLICY, TYPE, COUNTERS, FLAGS, USERDATA
_OF_RULE = (4, 5, 7)  # EXPRESSIONS, COMPAT, USERDATA
_OF_SET = (3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 17, 18)
_ANONYMOUS = re.compile(rb"__(?:set|map)[0-9]+\0")
_INVERTED, _DEPLETED = 1, 2  # NFT_QUOTA_F_INV and _DEPLETED; NFT_LIMIT_F_INV
_WEEK = 604_800

_Kind = tuple[str, int | None, bool, bool, bool, int]
_Spelt = tuple[bytes, ...]  # a chain's own attributes, each rule's, and what stands in braces


@dataclass(slots=True)
class _Found:
    """Everything in both tables, by netlink."""

    tables: dict[str, Attributes] = field(default_factory=dict)
    objects: dict[Key, Object] = field(default_factory=dict)
    chains: dict[Key, bytes] = field(default_factory=dict)
    rules: dict[Key, list[bytes]] = field(default_factory=dict)
    sets: dict[Key, bytes] = field(default_factory=dict)
    elements: dict[Key, list[Attributes]] = field(default_factory=dict)

    def spelt(self, key: Key) -> _Spelt:
        rules = self.rules.get(key, [])
        names = [name for rule in rules for name in _ANONYMOUS.findall(rule)]
        braces = [Key(key.family, "set", text(name)) for name in names]
        inside = (b"".join([self.sets[each], *_whole(self.elements[each])]) for each in braces)
        return (self.chains[key], *rules, b"", *inside)

    def named(self) -> set[Key]:
        """All that is no set in braces."""
        sets = {key for key in self.sets if not _ANONYMOUS.fullmatch(f"{key.name}\0".encode())}
        return {*self.objects, *self.chains, *sets}


def _whole(elements: list[Attributes]) -> Iterator[bytes]:
    for said in elements:
        yield b"".join(attribute(kind, value) for kind, value in sorted(said.items()))


@dataclass(frozen=True, slots=True)
class _Known:
    """What libnftables has read as `thing`."""

    thing: Object
    spelt: _Spelt


class Spellings:
    def __init__(self, dumps: Dumps) -> None:
        self._dumps = dumps
        self._known: dict[Key, _Known] = {}
        self._links: dict[_Kind, dict[Key, tuple[Mould, ...]]] = {}  # by chain of `_ANY`

    def generation(self) -> bytes:
        return self._dumps.generation()

    def right(self, desired: Desired) -> bool:
        """Both tables are exactly as desired. False: that cannot be said here."""
        before = self._dumps.generation()
        try:
            found = self._take()
            right = self._compare(found, desired)
        except (Unreadable, KeyError, ValueError, struct.error):
            return False
        return right and self._dumps.generation() == before

    def learn(self, desired: Desired, generation: bytes) -> None:
        """libnftables has read all of it as desired, from `generation` on."""
        try:
            found = self._take()
            known = {
                key: _Known(thing, _spelling(found, key, thing))
                for key, thing in _apart_from_links(desired).items()
                if isinstance(thing, Chain | Set)
            }
            links = {_kind(lease, desired.wants): lease for lease in desired.links}
            moulds = dict(self._moulds(found, links, desired))
        except (Unreadable, KeyError, ValueError, struct.error):
            return
        if self._dumps.generation() == generation:
            self._known, self._links = known, {**self._links, **moulds}

    def _moulds(
        self, found: _Found, links: Mapping[_Kind, LinkWant], desired: Desired
    ) -> Iterator[tuple[_Kind, dict[Key, tuple[Mould, ...]]]]:
        for kind, lease in links.items():
            with suppress(Unreadable):
                yield kind, _moulds(found, lease, desired)

    # ---- reading

    def _take(self) -> _Found:
        found = _Found()
        for family in self._dumps.families:
            table = self._dumps.table(family)
            if table is None:
                raise Unreadable(f"there is no table {family}")
            found.tables[family] = table
            for said in self._dumps.objects(family):
                key, thing = _object(family, said)
                found.objects[key] = thing
            for said in self._dumps.chains(family):
                found.chains[Key(family, "chain", text(said[3]))] = _said(said, _OF_CHAIN)
            for said in self._dumps.rules(family):
                key = Key(family, "chain", text(said[2]))
                found.rules.setdefault(key, []).append(_said(said, _OF_RULE))
            for said in list(self._dumps.sets(family)):
                key = Key(family, "set", text(said[2]))
                found.sets[key] = _said(said, _OF_SET)
                found.elements[key] = self._dumps.elements(family, key.name, ends=True)
        return found

    # ---- comparing

    def _compare(self, found: _Found, desired: Desired) -> bool:
        things = _apart_from_links(desired)
        expected = set(things)
        shared: dict[Key, dict[str, Entry]] = {
            key: dict(thing.elements) for key, thing in things.items() if isinstance(thing, Set)
        }
        awake = all(not int.from_bytes(said.get(2, b""), "big") for said in found.tables.values())
        if not awake or not all(self._same(found, key, thing) for key, thing in things.items()):
            return False
        kinds: dict[_Kind, Objects] = {}
        for lease in desired.links:
            kind = _kind(lease, desired.wants)
            if kind not in kinds:
                kinds[kind] = _of_kind(lease, desired)
            if not self._chains_of(found, lease, kind, desired.pools):
                return False
            for key, thing in _of_link(lease, kinds[kind], shared):
                expected.add(key)
                if not isinstance(thing, Chain) and found.objects.get(key) != thing:
                    return False
        return expected == found.named() and all(
            _elements(found, key, things[key]) == entries
            for key, entries in shared.items()
            if _read(things[key])
        )

    def _same(self, found: _Found, key: Key, thing: Object) -> bool:
        if not isinstance(thing, Chain | Set):
            return found.objects.get(key) == thing
        known = self._known.get(key)
        return (
            known is not None and _alike(known.thing, thing) and _spelling(found, key, thing) == known.spelt
        )

    def _chains_of(self, found: _Found, lease: LinkWant, kind: _Kind, pools: Pools) -> bool:
        values, moulds = Values.of(lease.link, pools.sandbox), self._links.get(kind)
        return moulds is not None and all(
            tuple(fill(part, values) for part in mould) == found.spelt(_named(name, lease.link))
            for name, mould in moulds.items()
        )


def _named(name: Key, link: Link) -> Key:
    return name._replace(name=name.name.replace(_ANY.device, link.device))


def _of_link(
    lease: LinkWant, things: Objects, shared: dict[Key, dict[str, Entry]]
) -> Iterator[tuple[Key, Object]]:
    """A link's own objects; its elements go into `shared`. `things`: those of `_ANY`, of the same kind."""
    device = lease.link.device
    for key, thing in things.items():
        if isinstance(thing, Set):
            (entry,) = thing.elements.values()
            data = entry.data.replace(_ANY.device, device)
            shared[key][string(device)] = entry._replace(data=data)
        else:
            yield _named(key, lease.link), _budget(thing, lease)


def _apart_from_links(desired: Desired) -> Objects:
    return build.desired(replace(desired, links=()))


def _kind(lease: LinkWant, wants: Mapping[str, WorkspaceWant]) -> _Kind:
    """What the messages of a link's chains depend on, beside the letters of its name, and its addresses."""
    budgets = lease.quota is not None, lease.connections is not None
    # attributes within attributes have their lengths: a name of another length would need all of them changed
    return (
        lease.workspace,
        wants[lease.workspace].connections,
        lease.closed,
        *budgets,
        len(lease.link.device),
    )


def _of_kind(lease: LinkWant, desired: Desired) -> Objects:
    return build.link_objects(replace(lease, link=_ANY), desired.wants[lease.workspace], desired.pools)


def _moulds(found: _Found, lease: LinkWant, desired: Desired) -> dict[Key, tuple[Mould, ...]]:
    """Unreadable if something of the link's may stand there by chance: others would be taken for right that
    are not."""
    device, addresses = lease.link.device, desired.pools.sandbox(lease.link)
    values = Values.of(lease.link, desired.pools.sandbox)
    moulds = {}
    for key, thing in build.link_objects(lease, desired.wants[lease.workspace], desired.pools).items():
        if isinstance(thing, Chain):
            spelt, words = found.spelt(key), " ".join(thing.rules)
            told = b"".join(spelt[1:])
            seen = [told.count(value) for value in values]
            if device in lease.workspace or seen != [words.count(str(each)) for each in (device, *addresses)]:
                raise Unreadable(f"{key.name}: told from others by chance")
            name = key._replace(name=key.name.replace(device, _ANY.device))
            moulds[name] = tuple(mould(part, values) for part in spelt)
    return moulds


def _alike(one: Object, other: Object) -> bool:
    """Of sets the shape, since their elements are read."""
    if isinstance(one, Set) and isinstance(other, Set):
        return one.shape == other.shape and (_read(other) or one.elements == other.elements)
    return one == other


def _read(thing: Object) -> bool:
    """Are a set's elements understood? Of plain intervals they are remembered: these never change."""
    return isinstance(thing, Set) and (thing.flags != ("interval",) or " . " in thing.type)


def _spelling(found: _Found, key: Key, thing: Object) -> _Spelt:
    if isinstance(thing, Chain):
        return found.spelt(key)
    return (found.sets[key], *(() if _read(thing) else _whole(found.elements[key])))


def _elements(found: _Found, key: Key, thing: Object) -> dict[str, Entry]:
    assert isinstance(thing, Set)
    return dict(element(said, thing) for said in found.elements[key])


def _said(said: Attributes, kinds: tuple[int, ...]) -> bytes:
    return b"".join(attribute(kind, said[kind]) for kind in kinds if kind in said)


def _object(family: Family, said: Attributes) -> tuple[Key, Object]:
    """By its kind (NFT_OBJECT_*); -1 where something is not as in ours, see `observe`."""
    name, kind, data = text(said[2]), int.from_bytes(said[3], "big"), dict(attributes(said[4]))
    number = {at: int.from_bytes(value, "big") for at, value in data.items()}
    match kind:
        case 1:
            return Key(family, "counter", name), Counter()
        case 2:
            ours = number.get(2, 0) & ~_DEPLETED == _INVERTED
            return Key(family, "quota", name), Quota(bytes=number[1] if ours else -1)
        case 4:
            ours = (number[1], number[2], number.get(4, 0), number.get(5, 0)) == (1, _WEEK, 0, _INVERTED)
            return Key(family, "limit", name), Limit(burst=number[3] if ours else -1)
    raise Unreadable(f"{name}: an object of kind {kind}")


def _budget(thing: Object, lease: LinkWant) -> Object:
    if isinstance(thing, Quota):
        return Quota(bytes=lease.quota or 0)
    if isinstance(thing, Limit):
        return Limit(burst=lease.connections or 0)
    return thing
