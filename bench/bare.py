"""The wires of the lab without a guard: what the data path is compared with.

    bare-box ──veth── bare-gate ──veth── bare-host ──veth── bare-net

Four namespaces and three pairs, as from a sandbox over the gateway and the host to the internet; plain
forwarding, not one rule, no connection tracking.
"""

from __future__ import annotations

from lab.machine import Lab

__all__ = ["BOX", "NET", "SERVER", "build", "remove"]

BOX, GATE, HOST, NET = "bare-box", "bare-gate", "bare-host", "bare-net"
SERVER = "10.77.2.2"
_CHAIN = (BOX, GATE, HOST, NET)
_WIRES = ((BOX, GATE, "10.77.0"), (GATE, HOST, "10.77.1"), (HOST, NET, "10.77.2"))
_ROUTES = ((BOX, "10.77.0.2"), (GATE, "10.77.1.2"), (HOST, "10.77.1.1"), (NET, "10.77.2.1"))


def build(lab: Lab) -> None:
    for name in _CHAIN:
        lab.run(["ip", "netns", "add", name]).check()
        lab.run(["ip", "link", "set", "lo", "up"], where=name).check()
        lab.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"], where=name).check()
    for number, (left, right, network) in enumerate(_WIRES):
        near, far = f"r{number}", f"l{number}"
        lab.run(
            ["ip", "link", "add", near, "netns", left, "type", "veth", "peer", "name", far, "netns", right]
        ).check()
        for where, device, host in ((left, near, 1), (right, far, 2)):
            lab.run(["ip", "addr", "add", f"{network}.{host}/24", "dev", device], where=where).check()
            lab.run(["ip", "link", "set", device, "up"], where=where).check()
    for where, via in _ROUTES:
        lab.run(["ip", "route", "add", "default", "via", via], where=where).check()


def remove(lab: Lab) -> None:
    for name in _CHAIN:
        lab.run(["ip", "netns", "del", name])
