"""The catalogue's YAML files, read strictly: an entry that is not understood whole is a problem, not a gap.

clouds:
  aws:
    title: Amazon Web Services
    source: https://...
    domains: [amazonaws.com]          # beneath them, what fits no shape is theirs and is not placed
    regions:
      eu-central-1: DE                # a country, or several: [EEA, CH]
      cn-north-1: {countries: CN, partition: aws-cn, note: "..."}
    aliases: {Frankfurt: eu-central-1}
providers:
  aws-bedrock:
    title: Amazon Bedrock
    also: [bedrock]                   # other words for the key
    cloud: aws                        # its regions are this provider's, too
    source: https://...
    domains: [...]
    regions: {...}
    loopback: [11434]                 # ports of it on this machine
    path_region: locations            # /locations/REGION of a path has to agree with the host
    models: {segment: model, vendors: [amazon], profiles: [eu]}
    endpoints:
      - hosts: ["bedrock-runtime.{region}.amazonaws.com"]
        scope: region                 # region, multi-region, global, unplaced
        region: eu                    # where no label says it
        cloud: aws                    # whose regions the hole takes, if not the provider's
        partitions: ["", aws-us-gov]
        ports: [443]
        note: "..."
        source: https://...           # if not the provider's
        declarable: true
        main: true                    # the host that provider and region alone stand for
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TypeVar

from egressd.model.errors import PolicyError, Problem, Unfit
from egressd.model.names import canonical, quoted
from egressd.model.tree import Path, Tree
from egressd.model.tree import read as read_tree
from egressd.residency.jurisdictions import countries, jurisdiction
from egressd.residency.places import Scope
from egressd.residency.shapes import REGION, RESOURCE, Cloud, Host, Models, Provider, Region, Shape

__all__ = ["GLOBAL", "Entries", "read"]

GLOBAL = "global"  # the region that global endpoints have
_SCOPES = {str(one): one for one in (Scope.REGION, Scope.MULTI_REGION, Scope.GLOBAL, Scope.UNPLACED)}
_KEY = re.compile(r"[a-z][a-z0-9-]{0,40}")
_REGION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
_SOURCE = re.compile(r"https://[!-~]{1,300}")
_TOP = frozenset({"clouds", "providers"})
_CLOUD = frozenset({"title", "source", "domains", "regions", "aliases"})
_PROVIDER = frozenset(
    {
        "title",
        "source",
        "also",
        "cloud",
        "domains",
        "regions",
        "loopback",
        "path_region",
        "models",
        "endpoints",
    }
)
_ENDPOINT = frozenset(
    {
        "hosts",
        "names",
        "scope",
        "region",
        "cloud",
        "partitions",
        "ports",
        "note",
        "source",
        "declarable",
        "main",
    }
)
_MODELS = frozenset({"segment", "vendors", "profiles"})
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Entries:
    """All files together. `words` are further words for keys of providers."""

    clouds: Mapping[str, Cloud] = field(default_factory=dict)
    providers: Mapping[str, Provider] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Of what was understood: spelling, comments and the order of files do not change it."""
        content = json.dumps([_plain(self.clouds), _plain(self.providers)], sort_keys=True)
        return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


def _plain(value: object) -> object:
    """Dataclasses, mappings, sets and tuples as JSON has them, with one order."""
    match value:
        case str() | bool() | int() | None:
            return value
        case Mapping():
            return {str(key): _plain(one) for key, one in value.items()}
        case frozenset():
            return sorted(map(str, value))
        case tuple():
            return [_plain(one) for one in value]
        case Host():
            return str(value)
        case _:
            return [_plain(getattr(value, name)) for name in type(value).__slots__]  # type: ignore[attr-defined]


def read(files: Iterable[tuple[str, bytes]]) -> Entries:
    """`PolicyError` with every problem of every file."""
    reading = _Reading()
    for source, data in files:
        reading.take(source, data)
    entries = reading.entries()
    if reading.problems:
        raise PolicyError(reading.problems)
    return entries


@dataclass(frozen=True, slots=True)
class _Node:
    """A value where it stands."""

    tree: Tree
    path: Path
    value: object

    def below(self, part: str | int, value: object) -> _Node:
        return _Node(self.tree, (*self.path, part), value)


class _Reading:
    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._raw: dict[str, dict[str, _Node]] = {"clouds": {}, "providers": {}}
        self._clouds: dict[str, Cloud] = {}
        self._taken: dict[Host, tuple[str, _Node]] = {}
        self._where: dict[int, _Node] = {}

    def take(self, source: str, data: bytes) -> None:
        tree = read_tree(data, source=source)
        self.problems += tree.problems
        top = _Node(tree, (), tree.value)
        if not tree.readable or tree.value is None:
            return
        for kind, node in self._mapping(top, _TOP).items():
            for key, entry in self._mapping(node).items():
                if not _KEY.fullmatch(key):
                    self._wrong(entry, f"{quoted(key)} is not a key", "use a-z, 0-9 and hyphens")
                self._raw[kind][key] = entry

    def entries(self) -> Entries:
        self._clouds = {key: self._cloud(key, node) for key, node in self._raw["clouds"].items()}
        providers = {key: self._provider(key, node) for key, node in self._raw["providers"].items()}
        self._refuse_overlaps(providers)
        return Entries(self._clouds, providers, self._words(providers))

    # ---- entries

    def _cloud(self, key: str, node: _Node) -> Cloud:
        parts = self._mapping(node, _CLOUD, needed=("title", "source", "regions"))
        regions = self._regions(parts.get("regions"))
        aliases = {}
        for spelling, meant in self._mapping(parts.get("aliases")).items():
            aliases[spelling] = self._text(meant)
            if aliases[spelling] not in regions:
                self._wrong(meant, f"{quoted(aliases[spelling])} is none of its regions", "name one of them")
        return Cloud(
            key, self._title(parts), self._source(parts), self._domains(parts), regions, aliases
        )  # fmt: skip

    def _provider(self, key: str, node: _Node) -> Provider:
        parts = self._mapping(node, _PROVIDER, needed=("title", "source"))
        cloud = self._cloud_named(parts.get("cloud"))
        regions = {**(cloud.regions if cloud else {}), **self._regions(parts.get("regions"))}
        provider = Provider(
            key,
            self._title(parts),
            self._source(parts),
            also=self._texts(parts.get("also")),
            domains=self._domains(parts),
            regions=regions,
            path_region=self._text(parts.get("path_region")),
            models=self._models(parts.get("models")),
            loopback=self._ports(parts.get("loopback")),
        )
        shapes: list[Shape] = []
        for entry in self._items(parts.get("endpoints")):
            shapes += self._endpoint(entry, provider, cloud)
        return replace(provider, shapes=tuple(shapes), regions=_declarable(provider, shapes))

    def _endpoint(self, node: _Node, provider: Provider, cloud: Cloud | None) -> list[Shape]:
        parts = self._mapping(node, _ENDPOINT, needed=("hosts", "scope"))
        other = self._cloud_named(parts.get("cloud"))
        common = Shape(
            Host(()),
            self._scope(parts.get("scope")),
            region=self._text(parts.get("region")),
            ports=self._ports(parts.get("ports")) or (443,),
            partitions=self._texts(parts.get("partitions")) or ("",),
            note=self._text(parts.get("note")),
            source=self._source(parts) or provider.source,
            declarable=self._flag(parts.get("declarable")),
            main=self._flag(parts.get("main")),
            regions=other.regions if other else provider.regions,
        )
        domains = [*provider.domains, *(cloud.domains if cloud else ()), *(other.domains if other else ())]
        names = self._texts(parts.get("names")) or ("{name}",)
        shapes: list[Shape] = []
        for one in self._items(parts.get("hosts")):
            for text in dict.fromkeys(self._text(one).replace("{name}", name) for name in names):
                shapes += self._shape(_Node(one.tree, one.path, text), common, domains)
        return shapes

    def _shape(self, node: _Node, common: Shape, domains: list[str]) -> list[Shape]:
        """One, or none where something is wrong with it."""
        host = self._tried(node, Host.of)
        if host is None:
            return []
        if not any(host.tail == domain or host.tail.endswith("." + domain) for domain in domains):
            self._wrong(node, f"{host} is not beneath a domain of the provider", "list it under domains:")
        shape = replace(common, host=host)
        if common.scope is Scope.GLOBAL:
            shape = replace(shape, region=common.region or GLOBAL, regions={GLOBAL: Region(GLOBAL, ())})
        self._refuse_nowhere(node, shape)
        self._where[id(shape)] = node
        return [shape]

    def _refuse_nowhere(self, node: _Node, shape: Shape) -> None:
        """A host has its region in its name, or once for all, or it has none: never both."""
        named = REGION in shape.host.holes()
        if named and shape.region:
            self._wrong(
                node, f"{shape.host} has a hole for a region, and region: says one", "remove one of them"
            )
        if shape.region and shape.region not in shape.regions:
            self._wrong(node, f"{quoted(shape.region)} is none of its regions", "add it under regions:")
        placed = shape.scope in (Scope.REGION, Scope.MULTI_REGION)
        if placed and not named and not shape.region:
            self._wrong(
                node, f"{shape.host} says no region", "name it with region:, or write scope: unplaced"
            )
        if shape.main and RESOURCE in shape.host.holes():
            self._wrong(node, f"{shape.host} needs more than a region", "remove main:")

    def _refuse_overlaps(self, providers: Mapping[str, Provider]) -> None:
        """Of two shapes that one name fits, one has to say more: else it would be a matter of their order.
        And both have to be of one entry: a file that adds a provider would place names of another's anew,
        and nobody would see it. Who means that writes the other's entry."""
        alike: dict[tuple[int, str], list[tuple[str, Shape]]] = {}
        for provider in providers.values():
            for shape in provider.shapes:
                # the last two labels have no hole: a name is beneath a domain
                kind = (len(shape.host.labels), ".".join(map(str, shape.host.labels[-2:])))
                alike.setdefault(kind, []).append((provider.key, shape))
        for group in alike.values():
            for (first, one), (second, other) in combinations(group, 2):
                same = first == second and one.host.rank != other.host.rank
                if not same and one.host.meets(other.host):
                    text = f"{other.host} of {second} fits the same names as {one.host} of {first}"
                    self._wrong(self._where[id(other)], text, f"to replace it, write the whole entry {first}")

    def _words(self, providers: Mapping[str, Provider]) -> dict[str, str]:
        words: dict[str, str] = {}
        for provider in providers.values():
            for word in provider.also:
                if word in providers or word in words:
                    node = self._raw["providers"][provider.key]
                    self._wrong(node, f"{quoted(word)} is another entry's, too", "remove it from also:")
                words[word] = provider.key
        return words

    # ---- parts of entries

    def _regions(self, node: _Node | None) -> dict[str, Region]:
        found = {}
        for name, entry in self._mapping(node).items():
            if not _REGION.fullmatch(name):
                self._wrong(entry, f"{quoted(name)} is not a region's name", "write it as the provider does")
            found[name] = self._region(name, entry)
        return found

    def _region(self, name: str, node: _Node) -> Region:
        if not isinstance(node.value, dict):
            return Region(name, self._countries(node))
        parts = self._mapping(node, frozenset({"countries", "partition", "note"}), needed=("countries",))
        note, partition = self._text(parts.get("note")), self._text(parts.get("partition"))
        return Region(name, self._countries(parts.get("countries")), partition, note)

    def _countries(self, node: _Node | None) -> tuple[str, ...]:
        if node is None:
            return ()
        entries = self._items(node) if isinstance(node.value, list) else [node]
        codes = [code for entry in entries if (code := self._tried(entry, jurisdiction)) is not None]
        return tuple(sorted(countries(codes)))

    def _models(self, node: _Node | None) -> Models | None:
        if node is None:
            return None
        parts = self._mapping(node, _MODELS, needed=("segment", "vendors"))
        vendors, profiles = self._texts(parts.get("vendors")), self._texts(parts.get("profiles"))
        return Models(self._text(parts.get("segment")), frozenset(vendors), frozenset(profiles))

    def _domains(self, parts: Mapping[str, _Node]) -> tuple[str, ...]:
        found = [self._tried(node, _domain) for node in self._items(parts.get("domains"))]
        return tuple(domain for domain in found if domain is not None)

    def _title(self, parts: Mapping[str, _Node]) -> str:
        return self._text(parts.get("title"))

    def _source(self, parts: Mapping[str, _Node]) -> str:
        node = parts.get("source")
        text = self._text(node)
        if node is not None and text and not _SOURCE.fullmatch(text):
            self._wrong(
                node, "the source is not a URL that begins with https://", "write where its provider says so"
            )
        return text

    def _scope(self, node: _Node | None) -> Scope:
        text = self._text(node)
        if node is not None and text not in _SCOPES:
            self._wrong(node, f"{quoted(text)} is not a scope", f"use one of {', '.join(sorted(_SCOPES))}")
        return _SCOPES.get(text, Scope.UNPLACED)

    def _cloud_named(self, node: _Node | None) -> Cloud | None:
        if node is None:
            return None
        key = self._text(node)
        if key not in self._clouds:
            self._wrong(node, f"{quoted(key)} is no cloud of the catalogue", "add it under clouds:")
        return self._clouds.get(key)

    # ---- values

    def _mapping(
        self, node: _Node | None, keys: frozenset[str] | None = None, needed: tuple[str, ...] = ()
    ) -> dict[str, _Node]:
        """Of `keys` alone, if any are given; empty where nothing stands."""
        if node is None or (node.value is None and not needed):
            return {}
        if not isinstance(node.value, dict):
            self._wrong(node, "here stands no mapping", "write key: value")
            return {}
        for key in node.value:
            if keys is not None and key not in keys:
                place = node.below(key, None)
                self._wrong(place, f"{quoted(key)} is not known here", f"use {', '.join(sorted(keys))}")
        for key in needed:
            if node.value.get(key) in (None, ""):
                self._wrong(node, f"{key}: is missing", f"write {key}:")
        return {
            key: node.below(key, value) for key, value in node.value.items() if (keys is None or key in keys)
        }

    def _items(self, node: _Node | None) -> list[_Node]:
        if node is None or node.value is None:
            return []
        if not isinstance(node.value, list):
            self._wrong(node, "here stands no list", "write [one, two]")
            return []
        return [node.below(at, value) for at, value in enumerate(node.value)]

    def _texts(self, node: _Node | None) -> tuple[str, ...]:
        return tuple(self._text(one) for one in self._items(node))

    def _text(self, node: _Node | None) -> str:
        if node is None or node.value is None:
            return ""
        if isinstance(node.value, str) and len(node.value) <= 400 and node.value.isprintable():
            return node.value
        self._wrong(node, "here stands no short text", 'write it in one line, in "quotes" if it has signs')
        return ""

    def _ports(self, node: _Node | None) -> tuple[int, ...]:
        found = []
        for one in self._items(node):
            if isinstance(one.value, bool) or not isinstance(one.value, int) or not 0 < one.value < 65536:
                self._wrong(one, "a port is a number from 1 to 65535", "write [443]")
            else:
                found.append(one.value)
        return tuple(found)

    def _flag(self, node: _Node | None) -> bool:
        if node is None or isinstance(node.value, bool):
            return node is not None and node.value is True
        self._wrong(node, "here stands neither true nor false", "write true or false")
        return False

    def _tried(self, node: _Node, make: Callable[[str], _T]) -> _T | None:
        text = self._text(node)
        try:
            return make(text)
        except Unfit as error:
            self._wrong(node, error.text, error.remedy)
            return None

    def _wrong(self, node: _Node, text: str, remedy: str) -> None:
        self.problems.append(node.tree.problem(node.path, text, remedy))


def _domain(text: str) -> str:
    domain = canonical(text)
    if domain != text or "." not in domain:
        raise Unfit(f"{quoted(text)} is not a domain", "write it in lower case, as in example.com")
    return domain


def _declarable(provider: Provider, shapes: list[Shape]) -> dict[str, Region]:
    """All regions that a profile may declare: its own, those of its shapes, and `global` if it has such."""
    found = dict(provider.regions)
    for shape in shapes:
        if REGION in shape.host.holes() or shape.scope is Scope.GLOBAL:
            for name, region in shape.regions.items():
                found.setdefault(name, region)
    return found
