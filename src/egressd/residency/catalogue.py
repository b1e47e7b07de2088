"""Provider endpoints as data, and what a URL says by them."""

from __future__ import annotations

from dataclasses import dataclass

from egressd.residency.endpoints import Endpoint
from egressd.residency.places import Placement

__all__ = ["Catalogue"]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The empty one knows no provider."""

    digest: str = ""

    @property
    def providers(self) -> tuple[str, ...]:
        """What `type:` of a profile may say, sorted."""
        return ()

    def place(self, endpoint: Endpoint) -> Placement:
        return Placement()

    def region(self, provider: str, region: str) -> tuple[str, ...] | None:
        """Countries of a provider's region; None if it has none of that name."""
        return None
