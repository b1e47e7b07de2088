"""An inspector under test, between three namespaces that play sandbox, gateway and the servers of the world.

    sandbox 198.19.0.7 --- s0 | g0 --- gateway: TPROXY of what comes by g0; the inspector
                                       u0 | h0 --- host: every synthetic address is its own

The kernel's part, which looks up and translates what the inspector dials, is missing: here the synthetic
addresses themselves lead to the servers, so that the tests see which one was dialed, and from where.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from relay_lab import POOLS, Network, Steered

from egressd.ipc import messages
from egressd.ipc.channel import payload
from egressd.tls.retry import RETRY_RANDOM

_IPV6_FREEBIND = 78  # linux/in6.h
HOST, BLOCK, INDEX, PORT = "api.example.com", 5, 3, 443


class World(Network):
    """The relay's network, and a wire to servers at every synthetic address."""

    def _wire(self) -> None:
        for (
            namespace
        ) in self.made:  # or the first seconds of every IPv6 link are lost to looking for its double
            namespace.do(Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text, "0")
        super()._wire()
        g, h = self.gateway, self.host
        g.ip(f"link add u0 type veth peer name h0 netns {h.name}")
        g.ip("addr add 169.254.54.2/30 dev u0")
        h.ip("addr add 169.254.54.1/30 dev h0")
        g.ip("-6 addr add fd53:2::2/64 dev u0 nodad")
        h.ip("-6 addr add fd53:2::1/64 dev h0 nodad")
        g.ip("link set u0 up")
        h.ip("link set h0 up")
        g.ip("route add 198.18.0.0/16 via 169.254.54.1")
        g.ip("-6 route add fd53:e9::/64 via fd53:2::1")
        h.ip("route add 169.254.64.0/19 via 169.254.54.2")
        h.ip("-6 route add fd53:3::/112 via fd53:2::2")
        # AnyIP: the sources the inspector binds, and the servers' addresses
        g.ip("route add local 169.254.64.0/19 dev lo")
        g.ip("-6 route add local fd53:3::/112 dev lo")
        h.ip("route add local 198.18.0.0/16 dev lo")
        h.ip("-6 route add local fd53:e9::/64 dev lo")

    def server(
        self, *, v6: bool = False, port: int = PORT, address: str | None = None, backlog: int = 1024
    ) -> socket.socket:
        """A listener at every synthetic address of a family, or at one of them."""
        family = socket.AF_INET6 if v6 else socket.AF_INET

        def listen() -> socket.socket:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if v6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            sock.bind((address or ("::" if v6 else "0.0.0.0"), port))
            sock.listen(backlog)
            sock.settimeout(10)
            return sock

        return self.host.do(listen)

    @contextlib.contextmanager
    def silence(self, *addresses: str) -> Iterator[None]:
        """Packets to these addresses vanish."""
        rules = (f"ip{'6' if ':' in a else ''} daddr {a} drop" for a in addresses)
        text = "table inet silence { chain c { type filter hook prerouting priority 0;\n%s\n}\n}"
        self._nft(text % "\n".join(rules))
        try:
            yield
        finally:
            self._nft("delete table inet silence")

    def _nft(self, text: str) -> None:
        command = ("ip", "netns", "exec", self.host.name, "nft", "-f", "-")
        subprocess.run(command, input=text.encode(), check=True)


class Inspector(Steered):
    program, listeners, says = "inspector", ("inspect4", "inspect6"), messages.FROM_INSPECTOR
    network: World

    def __init__(self, network: World, *, descriptors: int | None = None) -> None:
        super().__init__(network, home=network.gateway, descriptors=descriptors)

    def sites(self, *sites: messages.Site) -> int:
        data = msgspec.json.encode(list(sites))
        self._requests += 1
        with payload(data) as descriptor:
            message = messages.SetSites(request=self._requests, payload_length=len(data))
            self.controller.send(message, descriptor=descriptor)
        self.controller.socket.settimeout(10)
        reply = self.controller.receive().message
        assert isinstance(reply, messages.Done)
        return reply.changes

    def add(self, *sites: messages.Site) -> int:
        return self._ask(messages.AddSites, sites=sites).changes

    def remove(self, *sites: messages.Site) -> int:
        return self._ask(messages.RemoveSites, sites=sites).changes

    def refused(self) -> dict[str, dict[str, int]]:
        self._requests += 1
        self.controller.socket.settimeout(10)
        self.controller.send(messages.ReadRefused(request=self._requests))
        reply = self.controller.receive().message
        assert isinstance(reply, messages.RefusedFlows)
        return reply.counts


def site(host: str = HOST, *, block: int = BLOCK, port: int = PORT, **more: Any) -> messages.Site:
    return messages.Site(**{"workspace": "acme", "index": INDEX, **more}, host=host, block=block, port=port)


def slot_address(slot: int, *, v6: bool, block: int = BLOCK) -> str:
    return str(POOLS.synthetic(block, slot)[v6])


# ---- what is said


def real_hello(host: str | None) -> bytes:
    """OpenSSL's, as Python sends it."""
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=host)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("it finished without a server")


def hello(*names: str | bytes, ech: bool = False, padding: int = 0, record: int = 1 << 14) -> bytes:
    """A small ClientHello with these server names, cut into records of at most `record` bytes."""
    entries = b""
    for name in names:
        raw = name.encode() if isinstance(name, str) else name
        entries += b"\0" + struct.pack("!H", len(raw)) + raw
    extensions = _extension(0, struct.pack("!H", len(entries)) + entries) if names else b""
    extensions += _extension(0xFE0D, bytes(200)) if ech else b""
    extensions += _extension(21, bytes(padding))
    body = (
        b"\3\3"
        + bytes(32)
        + b"\0"
        + b"\0\2\x13\1"
        + b"\1\0"
        + struct.pack("!H", len(extensions))
        + extensions
    )
    return records(b"\1" + len(body).to_bytes(3, "big") + body, record=record)


def _extension(kind: int, content: bytes) -> bytes:
    return struct.pack("!HH", kind, len(content)) + content


def records(message: bytes, *, record: int = 1 << 14) -> bytes:
    """A handshake message in TLS records."""
    cut = (message[at : at + record] for at in range(0, len(message), record))
    return b"".join(b"\x16\3\1" + struct.pack("!H", len(part)) + part for part in cut)


def server_hello(*, retry: bool = False) -> bytes:
    """As much of one as anybody looks at."""
    body = b"\3\3" + (RETRY_RANDOM if retry else bytes(32)) + bytes(6)
    return records(b"\2" + len(body).to_bytes(3, "big") + body)
