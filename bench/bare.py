"""The wires of the lab without a guard: what the data path is compared with.

    bare-box ──veth── bare-gate ──veth── bare-host ──veth── bare-net

Four namespaces and three pairs, as from a sandbox over the gateway and the host to the internet; plain
forwarding, not one rule, no connection tracking. A second set (`nat-box` …) is the same with one masquerade
rule in gate and host each: what a container's network costs anyway, before anybody guards anything.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from lab.machine import Lab

__all__ = ["Wires"]

_MASQUERADE = """table inet nat {
  chain post {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "r*" masquerade
  }
}
"""
_PARTS = ("box", "gate", "host", "net")
_ROUTES = (("box", "10.77.0.2"), ("gate", "10.77.1.2"), ("host", "10.77.1.1"), ("net", "10.77.2.1"))


@dataclass(frozen=True)
class Wires:
    """`with` nothing: `build`, then `remove`."""

    name: str  # first part of the namespaces' names
    nat: bool = False
    server: str = "10.77.2.2"

    def place(self, part: str) -> str:
        return f"{self.name}-{part}"

    def build(self, lab: Lab) -> None:
        for part in _PARTS:
            where = self.place(part)
            lab.run(["ip", "netns", "add", where]).check()
            lab.run(["ip", "link", "set", "lo", "up"], where=where).check()
            lab.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"], where=where).check()
        for number, (left, right) in enumerate(itertools.pairwise(_PARTS)):
            self._pair(lab, number, self.place(left), self.place(right))
        for part, via in _ROUTES:
            lab.run(["ip", "route", "add", "default", "via", via], where=self.place(part)).check()
        for part in ("gate", "host") if self.nat else ():
            lab.run(["nft", "-f", "-"], where=self.place(part), stdin=_MASQUERADE).check()

    def _pair(self, lab: Lab, number: int, left: str, right: str) -> None:
        """Towards the right the device is r0, r1, r2; its other end l0, l1, l2."""
        near, far = f"r{number}", f"l{number}"
        words = [
            "ip",
            "link",
            "add",
            near,
            "netns",
            left,
            "type",
            "veth",
            "peer",
            "name",
            far,
            "netns",
            right,
        ]
        lab.run(words).check()
        for where, device, host in ((left, near, 1), (right, far, 2)):
            address = f"10.77.{number}.{host}/24"
            lab.run(["ip", "addr", "add", address, "dev", device], where=where).check()
            lab.run(["ip", "link", "set", device, "up"], where=where).check()

    def remove(self, lab: Lab) -> None:
        for part in _PARTS:
            lab.run(["ip", "netns", "del", self.place(part)])
