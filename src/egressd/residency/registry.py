"""The catalogue of endpoints and the tables of prefixes together: what a residency decision rests on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from egressd.model.addresses import Address, Network
from egressd.model.errors import Unfit
from egressd.residency import judge
from egressd.residency.catalogue import Catalogue
from egressd.residency.endpoints import Endpoint
from egressd.residency.judge import Code, Finding
from egressd.residency.places import Declared, Observation, Pin, Placement
from egressd.residency.prefixes import Prefixes

__all__ = ["Registry"]


@dataclass(frozen=True, slots=True)
class Registry:
    """`broken` says why the files cannot be read: under a pin everything is refused then. `own`: files by
    which this machine's catalogue is another than the one that comes with egressd, "NAME@sha256:...". The
    empty one knows no provider and no prefix."""

    catalogue: Catalogue = field(default_factory=Catalogue)
    prefixes: Prefixes = field(default_factory=Prefixes)
    broken: str = ""
    own: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """`sha256:` and hex over everything a decision can depend on."""
        parts = [self.catalogue.digest, self.prefixes.digest, self.broken]
        return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def refusal(self, pin: Pin) -> Finding | None:
        """Of everything under a pin, while a file cannot be read."""
        if pin and self.broken:
            return Finding(Code.BROKEN, self.broken, "correct the file named")
        return None

    def place(self, endpoint: Endpoint) -> Placement:
        return self.catalogue.place(endpoint)

    def observe(self, address: Address) -> Observation:
        return self.prefixes.observe(address)

    def judge_name(self, host: str, *, pin: Pin) -> Finding:
        """Of a plain host rule, or of a name that a wildcard covers."""
        try:
            endpoint = Endpoint.of_host(host)
        except Unfit as error:
            return Finding(Code.UNJUDGED, error.text)
        return self.judge_endpoint(endpoint, declared=None, pin=pin)

    def judge_endpoint(self, endpoint: Endpoint, *, declared: Declared | None, pin: Pin) -> Finding:
        found = judge.judge_endpoint(self.place(endpoint), declared=declared, pin=pin, name=endpoint.name)
        return self.refusal(pin) or found

    def judge_address(self, address: Address, *, pin: Pin, vouched: bool) -> tuple[Finding, Observation]:
        seen = self.observe(address)
        return self.refusal(pin) or judge.judge_address(seen, pin=pin, vouched=vouched), seen

    def judge_network(self, network: Network, *, pin: Pin, vouched: bool) -> Finding:
        """Of all its addresses at once: each has to be where the pin allows.

        One that is in no table (and no table has private networks) is let be if the rule vouches for it.
        """
        seen = self.prefixes.covers(network)
        return self.refusal(pin) or judge.judge_network(network, seen, pin=pin, vouched=vouched)
