"""A stand-in for egressd: the control socket's answers, and a real link, without policy or guard.

Run as root: `python fake_daemon.py RUN_DIR NAMESPACE`. It lives in the network namespace NAMESPACE, which
plays the gateway, makes the veth pair into the descriptor it is handed, and answers TCP on every service's
address with "SERVICE SOURCE\n". The workspace's name says how it behaves; see `TERMS` and `_attach`.
"""

# ruff: noqa: PTH101, PTH118, PTH123
from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import sys
import threading
import time
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import msgspec
from pyroute2 import IPRoute, NetlinkError

from egressd.ipc import messages
from egressd.ipc.channel import Channel
from egressd.model.errors import ProtocolError
from egressd.model.identities import Link
from egressd.ruleset import layout

SERVICE_PORT, OTHER_PORT = 11434, 8080
SERVICE4, SERVICE6 = layout.Pools().synthetic(1)
OTHER4, OTHER6 = layout.Pools().synthetic(2)
STRANGERS = ("203.0.113.1", "192.0.2.1", "192.0.2.129", "2001:db8::1")  # they refuse: nobody listens
OLLAMA = messages.LocalService(service="ollama", port=SERVICE_PORT, address4=SERVICE4, address6=SERVICE6)
OTHER = messages.LocalService(service="other", port=OTHER_PORT, address4=OTHER4, address6=OTHER6)

KNOWN = ("198.18.0.0/16", "fd53:e9::/64", "169.254.53.53", "fd53:53::53", "192.0.2.0/25")
TERMS: dict[str, dict[str, Any]] = {
    "acme": {"services": (OLLAMA, OTHER)},
    "plain": {},
    "brief": {"wall": 0.5},
    "watched": {"known": KNOWN},
    "acmew": {"services": (OLLAMA, OTHER), "known": KNOWN},
    "small": {"memory": 64 << 20, "processes": 12},
    "smallw": {"processes": 12, "known": KNOWN},
    "slow": {},  # the lease takes half a second
    "never": {},  # no lease at all
    "dies": {},  # closes the connection instead of giving a lease
    "mute": {},  # takes nobody's word
    "spent": {},  # both budgets of a link have refused something
    "full": {},  # refuses the lease
    "wordless": {},  # closes the connection half a second after the lease
    "revokes": {},  # the same, saying why
    "later": {},  # the same, having taken a word for it meanwhile
    "empty": {},  # a lease, but no link
    "dark": {},  # a link whose end in the gateway stays down, so that it never comes to life
    "withdrawn": {},  # the same, and half a second after the lease the link is taken away
}


# Or an address is tentative, on the loopback too, until a worker of the kernel has looked at it
# (addrconf_dad_work), and nobody can bind it.
_NODAD = 0x02  # linux/if_addr.h: IFA_F_NODAD
COUNTERS = {"in": (3, 180), "ok": (2, 120), "denied": (1, 60), "other": (0, 0)}
SPENT = {"spent": messages.Spent(counters=COUNTERS, spent=("connections", "quota"))}


class FakeDaemon:
    def __init__(self, run_dir: str) -> None:
        self.path = os.path.join(run_dir, "control.sock")
        self.route = IPRoute()
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        lo = self.route.link_lookup(ifname="lo")[0]
        self.route.link("set", index=lo, state="up")
        for address in (SERVICE4, OTHER4, layout.RESOLVER4):
            self.route.addr("add", index=lo, address=str(address), prefixlen=32)
        for address6 in (SERVICE6, OTHER6, layout.RESOLVER6):
            self.route.addr("add", index=lo, address=str(address6), prefixlen=128, flags=_NODAD)
        for stranger in STRANGERS:
            six = {"prefixlen": 128, "flags": _NODAD} if ":" in stranger else {"prefixlen": 32}
            self.route.addr("add", index=lo, address=stranger, **six)

    def serve(self) -> None:
        for service in (OLLAMA, OTHER):
            for address in (service.address4, service.address6):
                threading.Thread(target=_answer, args=(service, address), daemon=True).start()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.path)
        os.chmod(self.path, 0o666)
        listener.listen(256)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self.talk, args=(connection,), daemon=True).start()

    def talk(self, connection: socket.socket) -> None:
        channel: Channel[Any] = Channel(connection, messages.FROM_CLIENT)
        workspace, link = "", None
        try:
            while True:
                received = channel.receive()
                match received.message:
                    case messages.Enter():
                        workspace = received.message.workspace
                        self._enter(channel, workspace)
                    case messages.Attach():
                        self._write_down("attached.jsonl", received.message)
                        link = self._attach(channel, workspace, received.take())
                    case messages.Ended():
                        self._write_down("ended.jsonl", received.message)
                    case messages.Attempt():
                        self._write_down("attempts.jsonl", received.message)
                    case messages.Testify():
                        self._testify(channel, workspace, received.message, link)
                    case messages.ReadSpent():
                        channel.send(SPENT.get(workspace, messages.Spent(counters=COUNTERS)))
                    case _:
                        received.close()  # a namespace that nobody lets go of stays
                        channel.send(messages.Refusal(reason="protocol", text="only spawning is played here"))
        except (EOFError, OSError, ProtocolError):
            pass
        finally:
            if link is not None:
                self._remove(link)
            channel.close()

    def _testify(
        self, channel: Channel[Any], workspace: str, word: messages.Testify, link: Link | None
    ) -> None:
        if workspace == "mute":
            channel.send(messages.Refusal(reason="member", text="you are no broker"))
            return
        self._write_down("testified.jsonl", {"link": link and link.number, **msgspec.to_builtins(word)})
        channel.send(messages.Recorded())

    def _write_down(self, name: str, claim: Any) -> None:
        with open(os.path.join(os.path.dirname(self.path), name), "ab") as stream:  # noqa: PTH120
            stream.write(msgspec.json.encode(claim) + b"\n")

    def _enter(self, channel: Channel[Any], workspace: str) -> None:
        if workspace not in TERMS:
            text = f"you are not a member of {workspace!r}"
            channel.send(messages.Refusal(reason="member", text=text))
            return
        channel.send(
            messages.Terms(workspace=workspace, guard="enforce", policy="sha256:0", **TERMS[workspace])
        )

    def _attach(self, channel: Channel[Any], workspace: str, namespace: int) -> Link | None:
        match workspace:
            case "dies":
                raise EOFError
            case "never":
                return None
            case "full":
                channel.send(messages.Refusal(reason="limit", text="as many sandboxes as may be are running"))
                return None
            case "slow":
                time.sleep(0.5)
        with self.lock:
            link = Link(next(self.numbers))
            if workspace != "empty":
                self._make(link, namespace, up=workspace not in ("dark", "withdrawn"))
        os.close(namespace)
        address4, address6 = layout.Pools().sandbox(link)
        channel.send(messages.Lease(link=link.number, address4=address4, address6=address6))
        if workspace in ("wordless", "revokes"):
            time.sleep(0.5)
            if workspace == "revokes":
                channel.send(messages.Revoked(text="the workspace was removed"))
            raise EOFError
        if workspace == "later":
            threading.Timer(0.5, _revoke, (channel,)).start()
        if workspace == "withdrawn":
            time.sleep(0.5)
            self._remove(link)
        return link

    def _make(self, link: Link, namespace: int, *, up: bool = True) -> None:
        route, own = self.route, layout.Pools().sandbox(link)
        peer = {"ifname": "eth0", "net_ns_fd": namespace, "address": layout.SANDBOX_MAC}
        index = 1000 + link.number
        route.link(
            "add", index=index, ifname=link.device, kind="veth", peer=peer, address=layout.GATEWAY_MAC,
            flags=0x80, change=0x80,
        )  # fmt: skip
        with open(f"/proc/sys/net/ipv6/conf/{link.device}/addr_gen_mode", "w") as stream:
            stream.write("1")
        if not up:
            return
        route.link("set", index=index, state="up")
        for address in own:
            route.neigh("add", dst=str(address), lladdr=layout.SANDBOX_MAC, ifindex=index, state=0x80)
            route.route("add", dst=f"{address}/{address.max_prefixlen}", oif=index)

    def _remove(self, link: Link) -> None:
        with self.lock, contextlib.suppress(NetlinkError):  # it went with the other end's namespace
            self.route.link("del", index=1000 + link.number)


def _revoke(channel: Channel[Any]) -> None:
    with contextlib.suppress(OSError):
        channel.send(messages.Revoked(text="the workspace was removed"))
        channel.socket.shutdown(socket.SHUT_RDWR)


def _answer(service: messages.LocalService, address: IPv4Address | IPv6Address) -> None:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((str(address), service.port))
    listener.listen(64)
    while True:
        connection, peer = listener.accept()
        with connection:
            connection.sendall(f"{service.service} {peer[0]}\n".encode())


def main(kind: type[FakeDaemon] = FakeDaemon) -> None:
    run_dir, namespace = sys.argv[1:]
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x4000_0000):
        raise OSError(ctypes.get_errno(), "setns")
    kind(run_dir).serve()


if __name__ == "__main__":
    main()
