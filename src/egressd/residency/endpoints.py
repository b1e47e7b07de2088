"""A provider's base URL, taken apart once; only what is left of it is compared with anything."""

from __future__ import annotations

from dataclasses import dataclass

from egressd.model.addresses import Address
from egressd.model.names import canonical

__all__ = ["Endpoint"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    scheme: str  # "https" or "http"
    host: str  # canonical; "" where the URL has an address
    address: Address | None  # instead of a host
    port: int
    path: str  # decoded segments, joined by "/", beginning with "/"; "" or "/" for none

    @property
    def name(self) -> str:
        """What people call it."""
        return self.host or str(self.address)

    @classmethod
    def of_host(cls, host: str) -> Endpoint:
        """Of a host alone, as HTTPS. `Unfit` for what is no name."""
        return cls("https", canonical(host), None, 443, "")
