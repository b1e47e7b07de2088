"""Provider endpoints as data, and what a URL says by them.

Names are compared label by label from the right, as they are owned. A provider's name that fits none of its
shapes is not placed, and not unknown either: it is theirs, and nobody here knows what it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from egressd.model.names import quoted
from egressd.residency.catalogue_files import Entries, read
from egressd.residency.endpoints import Endpoint
from egressd.residency.places import Placement, Scope
from egressd.residency.shapes import REGION, Cloud, Models, Provider, Region, Shape

__all__ = ["Catalogue"]

# by number of labels, first label ("" if it has a hole) and the labels after the last hole
_Index = Mapping[tuple[int, str, str], tuple[tuple[Provider, Shape], ...]]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The empty one knows no provider. Two are equal if their digests are."""

    digest: str = ""  # "sha256:" and hex over all that is in it
    _entries: Entries = field(default_factory=Entries, compare=False, repr=False)
    _index: _Index = field(default_factory=dict, compare=False, repr=False)
    _owners: Mapping[str, Cloud | Provider] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def load(cls, files: Iterable[tuple[str, bytes]]) -> Catalogue:
        """Of YAML files, each with the name by which problems call it. An entry of a later file replaces the
        one of the same key. `PolicyError` with everything that is wrong with any of them."""
        entries = read(files)
        return cls(entries.digest(), entries, _indexed(entries), _owners(entries))

    @property
    def providers(self) -> tuple[str, ...]:
        """What `type:` of a profile may say, sorted; other words for the same provider among them."""
        return tuple(sorted({*self._entries.providers, *self._entries.words}))

    def key(self, provider: str) -> str | None:
        """The word that placements use for what `type:` says; None if nobody is called so."""
        if provider in self._entries.providers:
            return provider
        return self._entries.words.get(provider)

    def title(self, provider: str) -> str:
        """For people: "Amazon Bedrock". The word itself if nobody is called so."""
        found = self._provider(provider)
        return found.title if found else provider

    def regions(self, provider: str) -> Mapping[str, tuple[str, ...]]:
        """Countries by region, for all that a profile of this provider may declare; `global` has none. Empty
        for `openai-compatible`, of which no region is known, and for what is no provider."""
        found = self._provider(provider)
        return MappingProxyType({name: one.countries for name, one in found.regions.items()} if found else {})

    def region(self, provider: str, region: str) -> tuple[str, ...] | None:
        """Countries of a provider's region; None if it has none of that name. () where they are not known."""
        found = self._provider(provider)
        one = found.regions.get(region) if found else None
        return None if one is None else one.countries

    def cloud_region(self, cloud: str, region: str) -> tuple[str, ...] | None:
        """Countries of a region of a cloud ("aws", "google", "azure"), in any spelling that its published
        prefixes use. None for no region of it, () where the country is not known."""
        found = self._entries.clouds.get(cloud)
        if found is None:
            return None
        one = found.regions.get(found.aliases.get(region, region))
        return None if one is None else one.countries

    def host_of(self, provider: str, region: str) -> str | None:
        """The host that a provider and a region alone stand for, where there is exactly one."""
        found = self._provider(provider)
        hosts = [_filled(shape, region) for shape in found.shapes if shape.main] if found else []
        named = [host for host in hosts if host]
        return named[0] if len(named) == 1 else None

    def place(self, endpoint: Endpoint) -> Placement:
        """What the URL says. Never raises; a name that is nobody's is `Scope.UNKNOWN`."""
        if endpoint.address is not None:
            here = endpoint.address.is_loopback
            return self._loopback(endpoint) if here else Placement()
        if endpoint.host == "localhost":
            return self._loopback(endpoint)
        return self._named(endpoint) or self._owned(endpoint) or Placement()

    def _provider(self, word: str) -> Provider | None:
        key = self.key(word)
        return None if key is None else self._entries.providers[key]

    def _loopback(self, endpoint: Endpoint) -> Placement:
        owners = (one.key for one in self._entries.providers.values() if endpoint.port in one.loopback)
        return Placement(Scope.LOOPBACK, provider=next(owners, ""))

    def _named(self, endpoint: Endpoint) -> Placement | None:
        """By the first shape that fits whole; else by what the nearest one lacks; None for no shape."""
        labels = endpoint.host.split(".")
        near: Placement | None = None
        for provider, shape in self._candidates(endpoint.host, len(labels)):
            holes = shape.host.fill(labels)
            if holes is None:
                continue
            lacking = _lacking(shape, endpoint, holes.get(REGION))
            if not lacking:
                return _placed(provider, shape, endpoint, holes.get(REGION) or shape.region)
            near = near or _unplaced(provider, shape, lacking)
        return near

    def _candidates(self, host: str, count: int) -> Iterator[tuple[Provider, Shape]]:
        """Those that may fit, the longest tail first: two looks into a dictionary for each label."""
        first = host.partition(".")[0]
        tail = host
        while tail:
            named = self._index.get((count, first, tail), ())
            open_ = self._index.get((count, "", tail), ())
            yield from sorted((*named, *open_), key=_rank) if named and open_ else named or open_
            tail = tail.partition(".")[2]

    def _owned(self, endpoint: Endpoint) -> Placement | None:
        tail = endpoint.host
        while tail:
            owner = self._owners.get(tail)
            if owner is not None:
                note = f"{endpoint.host} is a name of {owner.title} whose shape is not known"
                key = owner.key if isinstance(owner, Provider) else ""
                return Placement(Scope.UNPLACED, provider=key, note=note, source=owner.source)
            tail = tail.partition(".")[2]
        return None


def _indexed(entries: Entries) -> _Index:
    """Within one entry, shapes that say the most come first."""
    index: dict[tuple[int, str, str], list[tuple[Provider, Shape]]] = {}
    for provider in entries.providers.values():
        for shape in provider.shapes:
            first = shape.host.labels[0]
            key = (len(shape.host.labels), "" if first.hole else first.before, shape.host.tail)
            index.setdefault(key, []).append((provider, shape))
    return {key: tuple(sorted(found, key=_rank)) for key, found in index.items()}


def _rank(one: tuple[Provider, Shape]) -> tuple[tuple[int, int], ...]:
    return one[1].host.rank


def _owners(entries: Entries) -> dict[str, Cloud | Provider]:
    owners: dict[str, Cloud | Provider] = {}
    found: list[Cloud | Provider] = [*entries.clouds.values(), *entries.providers.values()]
    for owner in found:
        for domain in owner.domains:
            owners.setdefault(domain, owner)
    return owners


def _filled(shape: Shape, region: str) -> str | None:
    """The shape's host with `region` in its hole, if it may stand there."""
    if REGION not in shape.host.holes():
        return str(shape.host) if shape.region == region else None
    found = shape.regions.get(region)
    if found is None or found.partition not in shape.partitions:
        return None
    return str(shape.host).replace("{region}", region)


# ---- one endpoint and one shape that has its name


def _lacking(shape: Shape, endpoint: Endpoint, region: str | None) -> str:
    """Why the endpoint does not fit although its name does; "" if it does."""
    if endpoint.port not in shape.ports:
        return f"{endpoint.host} has no endpoint on port {endpoint.port} that is known"
    if region is None:
        return ""
    found = shape.regions.get(region)
    if found is None:
        return f"{endpoint.host} names {region}, and no region of that name is known"
    if found.partition not in shape.partitions:
        return f"{endpoint.host} names {region}, which belongs to another partition of the provider"
    return ""


def _unplaced(provider: Provider, shape: Shape, note: str) -> Placement:
    return Placement(Scope.UNPLACED, provider=provider.key, note=note, source=shape.source)


def _placed(provider: Provider, shape: Shape, endpoint: Endpoint, name: str) -> Placement:
    """`name` is the region that the host says, or ""."""
    objection = _path_objection(provider, endpoint, name) or _model_objection(provider.models, endpoint)
    if objection:
        return _unplaced(provider, shape, objection)
    region = shape.regions.get(name) or Region(name, ())
    return Placement(
        scope=shape.scope,
        provider=provider.key,
        region=name,
        countries=region.countries,
        partition=region.partition or (shape.partitions[0] if len(shape.partitions) == 1 else ""),
        note=shape.note or region.note,
        source=shape.source,
        declarable=shape.declarable,
    )


def _path_objection(provider: Provider, endpoint: Endpoint, name: str) -> str:
    """Where the path names a region, too, it has to be the host's."""
    for said in _after(endpoint.path, provider.path_region):
        if said != name:
            return f"{endpoint.host} is in {name or 'no certain region'}, and its path says {quoted(said)}"
    return ""


def _model_objection(models: Models | None, endpoint: Endpoint) -> str:
    if models is None:
        return ""
    for model in _after(endpoint.path, models.segment):
        group, dot, _ = model.partition(".")
        if dot and group in models.profiles:
            return (
                f"{quoted(model)} is a cross-region inference profile: "
                f"requests are answered in any region of the group {quoted(group)}"
            )
        if not dot or group not in models.vendors:
            return f"in which region {quoted(model)} is answered, its ID does not say"
    return ""


def _after(path: str, segment: str) -> list[str]:
    """What stands after each `segment` of the path."""
    if not segment or segment not in path:
        return []
    parts = path.split("/")
    return [parts[at + 1] for at, part in enumerate(parts[:-1]) if part == segment]
