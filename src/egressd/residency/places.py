"""What can be said about where an endpoint is: by its URL, by a declaration, by its address.

Three sources, of different worth. What a URL says is a claim of its provider's (`Placement`); what a profile
declares is a claim of its author's (`Declared`); in which published prefix an address lies is evidence
(`Observation`). `judge` weighs them; nothing here decides.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import date

from egressd.model.addresses import Address
from egressd.residency import jurisdictions
from egressd.residency.jurisdictions import countries

__all__ = ["Declared", "Observation", "Pin", "Placement", "Scope", "TableName"]


class Scope(enum.StrEnum):
    """How much an endpoint's URL says about where requests are processed. The zero says nothing."""

    UNKNOWN = "unknown"  # no provider of the catalogue has such names
    REGION = "region"  # one region
    MULTI_REGION = "multi-region"  # several places, and which is known
    GLOBAL = "global"  # wherever the provider likes
    UNPLACED = "unplaced"  # a provider's own, and its URL does not say where
    LOOPBACK = "loopback"  # this machine


@dataclass(frozen=True, slots=True)
class Placement:
    """What the catalogue says of an endpoint.

    `countries` are all in which a request may be processed; () where nobody says. `note` is one sentence that
    says exactly why the URL cannot decide, or what it means. `declarable`: a declared region can settle what
    the URL leaves open (the resource lies in one region, which its name does not tell).
    """

    scope: Scope = Scope.UNKNOWN
    provider: str = ""  # key of the catalogue, e.g. "aws-bedrock"
    region: str = ""  # the provider's own spelling, e.g. "eu-central-1"
    countries: tuple[str, ...] = ()  # sorted codes
    partition: str = ""  # "aws-cn", "azure-government" ...; "" for the ordinary one
    note: str = ""
    source: str = ""  # URL of the provider's documentation
    declarable: bool = False


@dataclass(frozen=True, slots=True)
class Declared:
    """`residency:` of a provider profile."""

    region: str
    jurisdiction: str  # one of jurisdictions.CODES, or several, as in "CH, EEA"
    source_url: str  # where the provider says so; "" if nothing was written

    @property
    def countries(self) -> frozenset[str]:
        return countries(self.jurisdiction.split(", "))


@dataclass(frozen=True, slots=True)
class Pin:
    """`residency: {jurisdictions: [...]}` of a workspace: where its requests may go. No codes: anywhere."""

    codes: tuple[str, ...] = ()  # sorted, of jurisdictions.CODES

    @classmethod
    def of(cls, text: str) -> Pin:
        """Of `EU` or `EEA,CH`. `Unfit` as `jurisdictions.codes` has it."""
        return cls(tuple(sorted(jurisdictions.codes(text))))

    @property
    def countries(self) -> frozenset[str]:
        return countries(self.codes)

    def __bool__(self) -> bool:
        return bool(self.codes)

    def __str__(self) -> str:
        return ", ".join(self.codes)


@dataclass(frozen=True, slots=True)
class TableName:
    """Which table of prefixes said it."""

    name: str  # as imported, e.g. "aws"
    digest: str  # "sha256:" + hex of the imported file
    published: date | None  # when; None if the file does not say

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True, slots=True)
class Observation:
    """What the tables of published prefixes say of an address.

    `prefix` None: no table has it. `countries` of the region; () with `anycast`, or where the region is not
    known. Where several tables have it, `others` are what they say; `conflict` says in words that one table
    contradicts itself about this prefix.
    """

    address: Address
    prefix: str | None = None  # "3.120.0.0/14", the most specific one
    provider: str = ""
    region: str = ""
    countries: tuple[str, ...] = ()
    anycast: bool = False
    conflict: str = ""
    table: TableName | None = None
    others: tuple[Observation, ...] = ()
