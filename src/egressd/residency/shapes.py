"""The shape of an endpoint's host name, label by label: what a provider's names look like, and nothing else.

A shape is as many labels as the name has. A label is written out, or has one hole: `{region}` for a region
of the provider's, `{resource}` for whatever a customer called theirs. `{region}-aiplatform` has a hole and an
affix. No label ever stands for more or fewer than one, so that nothing can be put before, behind or between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from egressd.model.errors import Unfit
from egressd.model.names import canonical, quoted
from egressd.residency.places import Scope

__all__ = ["Cloud", "Host", "Label", "Models", "Provider", "Region", "Shape"]

REGION, RESOURCE = "region", "resource"
_LABEL = re.compile(r"([a-z0-9-]*)\{(region|resource)\}([a-z0-9-]*)")
_RANKS = {"": 0, REGION: 2, RESOURCE: 3}


@dataclass(frozen=True, slots=True)
class Label:
    """`before` alone where `hole` is ""; else what stands before and after the hole."""

    before: str
    hole: str = ""
    after: str = ""

    @classmethod
    def of(cls, text: str) -> Label:
        found = _LABEL.fullmatch(text)
        return cls(found[1], found[2], found[3]) if found else cls(text)

    def fill(self, label: str) -> str | None:
        """What stands in the hole if `label` fits ("" where there is none), else None."""
        if not self.hole:
            return "" if label == self.before else None
        inner = len(label) - len(self.before) - len(self.after)
        if inner < 1 or not label.startswith(self.before) or not label.endswith(self.after):
            return None
        return label[len(self.before) : len(self.before) + inner]

    @property
    def rank(self) -> tuple[int, int]:
        """The smaller, the more it says: written out, then with an affix, then a region, then anything."""
        affix = len(self.before) + len(self.after)
        return (1, -affix) if self.hole and affix else (_RANKS[self.hole], 0)

    def meets(self, other: Label) -> bool:
        """Whether some label fits both."""
        if not self.hole:
            return other.fill(self.before) is not None
        if not other.hole:
            return self.fill(other.before) is not None
        heads = self.before.startswith(other.before) or other.before.startswith(self.before)
        return heads and (self.after.endswith(other.after) or other.after.endswith(self.after))

    def __str__(self) -> str:
        return f"{self.before}{{{self.hole}}}{self.after}" if self.hole else self.before


@dataclass(frozen=True, slots=True)
class Host:
    """A host's labels, from left to right."""

    labels: tuple[Label, ...]

    @classmethod
    def of(cls, text: str) -> Host:
        """`Unfit` for what is no shape of a name, or could be a name of somebody else's."""
        labels = tuple(Label.of(part) for part in text.split("."))
        example = ".".join("x" if label.hole else label.before for label in labels)
        if canonical(example) != example or "{" in example:
            raise Unfit(
                f"{quoted(text)} is not a canonical host name",
                "write it in lower case, without a dot at the end",
            )
        if [label.hole for label in labels].count(REGION) > 1:
            raise Unfit(f"{quoted(text)} has a region twice", "a host names one region")
        return cls(labels)

    @property
    def tail(self) -> str:
        """The labels after the last hole: what a look into a dictionary finds the shape by."""
        kept: list[str] = []
        for label in reversed(self.labels):
            if label.hole:
                break
            kept.append(label.before)
        return ".".join(reversed(kept))

    @property
    def rank(self) -> tuple[tuple[int, int], ...]:
        """Compared from the right, as the name is owned."""
        return tuple(label.rank for label in reversed(self.labels))

    def fill(self, labels: list[str]) -> dict[str, str] | None:
        """The holes by name if the labels fit, else None. Two resources: the last one is told."""
        if len(labels) != len(self.labels):
            return None
        found: dict[str, str] = {}
        for mine, label in zip(self.labels, labels, strict=True):
            value = mine.fill(label)
            if value is None:
                return None
            if mine.hole:
                found[mine.hole] = value
        return found

    def meets(self, other: Host) -> bool:
        """Whether some name fits both."""
        if len(self.labels) != len(other.labels):
            return False
        return all(mine.meets(theirs) for mine, theirs in zip(self.labels, other.labels, strict=True))

    def holes(self) -> frozenset[str]:
        return frozenset(label.hole for label in self.labels if label.hole)

    def __str__(self) -> str:
        return ".".join(map(str, self.labels))


@dataclass(frozen=True, slots=True)
class Region:
    """`countries` () where its provider does not say in which country it is."""

    name: str
    countries: tuple[str, ...]  # sorted ISO codes, blocs written out
    partition: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of endpoint. `regions` are those that may stand in its hole, by name."""

    host: Host
    scope: Scope
    region: str = ""  # for all of these hosts; "" where the name or nothing says it
    ports: tuple[int, ...] = (443,)
    partitions: tuple[str, ...] = ("",)
    note: str = ""
    source: str = ""
    declarable: bool = False
    main: bool = False  # the URL that a region alone stands for
    regions: Mapping[str, Region] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Models:
    """IDs of models in the path `/SEGMENT/ID`: which name a model of the region asked, and which do not."""

    segment: str
    vendors: frozenset[str]  # an ID is VENDOR.MODEL ...
    profiles: frozenset[str]  # ... or PROFILE.VENDOR.MODEL, answered in any region of a group


@dataclass(frozen=True, slots=True)
class Cloud:
    key: str
    title: str
    source: str
    domains: tuple[str, ...]
    regions: Mapping[str, Region]
    aliases: Mapping[str, str]  # other spellings, as in published prefixes


@dataclass(frozen=True, slots=True)
class Provider:
    key: str
    title: str
    source: str
    also: tuple[str, ...] = ()  # other words for `key`
    domains: tuple[str, ...] = ()
    regions: Mapping[str, Region] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = ()
    path_region: str = ""  # the path segment after which a region stands
    models: Models | None = None
    loopback: tuple[int, ...] = ()  # its port on this machine
