"""Published prefixes: in which region an address is, as far as its provider says."""

from __future__ import annotations

from dataclasses import dataclass

from egressd.model.addresses import Address
from egressd.residency.places import Observation, TableName

__all__ = ["Prefixes"]


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The empty one has no prefix."""

    names: tuple[TableName, ...] = ()

    def observe(self, address: Address) -> Observation:
        return Observation(address)
