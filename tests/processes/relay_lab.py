"""A relay under test, between three namespaces that play sandbox, gateway and host.

    sandbox 198.19.0.7 --- s0 | g0 --- gateway: TPROXY of 198.18.0.0/16 and fd53:e9::/64 to port 8443
                                       host: lo only; services, and the relay itself

Everything is opened by threads that live in their namespace, so that the tests read like one program.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from auditor_lab import until

from egressd.ipc import messages
from egressd.ipc.channel import Channel, pair
from egressd.processes.config import Config
from egressd.ruleset.layout import Pools

UID = 4003
SOURCE4, SOURCE6 = "198.19.0.7", "fd53:1::7"
OTHER4, OTHER6 = "198.19.0.8", "fd53:1::8"
POOLS = Pools()
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75  # linux/in.h, linux/in6.h
_CLONE_NEWNET = 0x40000000
T = TypeVar("T")

_RULES = """
table inet t {
  chain c {
  type filter hook prerouting priority mangle; policy accept;
  iifname "g0" meta nfproto ipv4 meta l4proto tcp meta mark set 1 tproxy ip to 127.0.0.1:8443 accept
  iifname "g0" meta nfproto ipv6 meta l4proto tcp meta mark set 1 tproxy ip6 to [::1]:8443 accept
  }
}
"""


class Namespace:
    """A network namespace and a thread in it."""

    def __init__(self, name: str) -> None:
        self.name = f"in-{name}{os.getpid()}"
        subprocess.run(("ip", "netns", "add", self.name), check=True)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self.do(self._enter)
        self.ip("link set lo up")

    def _enter(self) -> None:
        with Path(f"/run/netns/{self.name}").open("rb") as stream:
            if ctypes.CDLL(None, use_errno=True).setns(stream.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def do(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        return self._thread.submit(function, *arguments, **named).result()

    def ip(self, command: str) -> None:
        subprocess.run(("ip", "-n", self.name, *command.split()), check=True)

    def remove(self) -> None:
        self._thread.shutdown()
        subprocess.run(("ip", "netns", "del", self.name), check=False)


class Network:
    def __init__(self) -> None:
        self.made: list[Namespace] = []
        try:
            self.sandbox, self.gateway, self.host = (self._make(n) for n in ("s", "g", "h"))
            self._wire()
        except BaseException:
            self.remove()
            raise

    def _make(self, name: str) -> Namespace:
        self.made.append(Namespace(name))
        return self.made[-1]

    def _wire(self) -> None:
        s, g = self.sandbox, self.gateway
        s.ip(f"link add s0 type veth peer name g0 netns {g.name}")
        for address in (SOURCE4, OTHER4):
            s.ip(f"addr add {address}/32 dev s0")
        for address in (SOURCE6, OTHER6):
            s.ip(f"-6 addr add {address}/128 dev s0 nodad")
        g.ip("addr add 169.254.53.53/32 dev g0")
        g.ip("-6 addr add fd53:53::53/128 dev g0 nodad")
        s.ip("link set s0 up")
        g.ip("link set g0 up")
        s.ip("route add 169.254.53.53 dev s0")
        s.ip(f"route add default via 169.254.53.53 src {SOURCE4}")
        s.ip("-6 route add fd53:53::53 dev s0")
        s.ip(f"-6 route add default via fd53:53::53 src {SOURCE6}")
        g.ip("route add 198.19.0.0/16 dev g0")
        g.ip("-6 route add fd53:1::/64 dev g0")
        for family in ("-4", "-6"):
            g.ip(f"{family} rule add fwmark 1 lookup 100")
            g.ip(f"{family} route add local default dev lo table 100")
        subprocess.run(("ip", "netns", "exec", g.name, "nft", "-f", "-"), input=_RULES.encode(), check=True)

    def remove(self) -> None:
        for namespace in self.made:
            namespace.remove()

    # ---- sockets

    def tproxy(self, family: int) -> socket.socket:
        def listen() -> socket.socket:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET:
                sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
                sock.bind(("127.0.0.1", 8443))
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
                sock.bind(("::1", 8443))
            sock.listen(1024)
            return sock

        return self.gateway.do(listen)

    def service(self, port: int, *, backlog: int = 1024) -> socket.socket:
        """A listener on the host's 127.0.0.1."""
        listener = self.host.do(socket.create_server, ("127.0.0.1", port), backlog=backlog)
        listener.settimeout(10)
        return listener

    def client(
        self, block: int, port: int, *, v6: bool = False, source: str | None = None, slot: int = 0
    ) -> socket.socket:
        """A connection from the sandbox; it stands as soon as the gateway has taken it."""
        target4, target6 = POOLS.synthetic(block, slot)
        target = str(target6 if v6 else target4)
        return self.sandbox.do(
            socket.create_connection,
            (target, port),
            timeout=10,
            source_address=(source, 0) if source else None,
        )


class Steered:
    """The real program, with socket pairs where its neighbours would be."""

    program: ClassVar[str]
    listeners: ClassVar[tuple[str, str]]
    says: ClassVar[Any]  # to the controller

    def __init__(self, network: Network, *, home: Namespace, descriptors: int | None = None) -> None:
        self.network = network
        families = (socket.AF_INET, socket.AF_INET6)
        ends = {name: network.tproxy(f) for name, f in zip(self.listeners, families, strict=True)}
        self.supervisor, ends["supervisor"] = _channel(messages.FROM_CHILD)
        self.controller, ends["controller"] = _channel(self.says)
        self.audit, ends["audit"] = _channel(messages.TO_AUDITOR)
        self.seen: list[messages.Event | messages.Losses] = []
        self._requests = 0
        command = [sys.executable, "-m", f"egressd.processes.{self.program}"]
        command += ["--uid", str(UID), "--gid", str(UID)]
        for name, end in ends.items():
            command += ["--fd", f"{name}={end.fileno()}"]
        if descriptors is not None:
            command = ["prlimit", f"--nofile={descriptors}:{descriptors}", *command]
        self.process = home.do(
            subprocess.Popen,
            [*command, "--config-json", Config().encode()],
            pass_fds=[end.fileno() for end in ends.values()],
        )
        for end in ends.values():
            end.close()

    def ready(self) -> Self:
        self.supervisor.socket.settimeout(20)
        assert self.supervisor.receive().message == messages.Ready()
        return self

    # ---- what the controller says

    def _ask(self, kind: type, **fields: Any) -> messages.Done:
        self._requests += 1
        self.controller.socket.settimeout(10)
        self.controller.send(kind(request=self._requests, **fields))
        reply = self.controller.receive().message
        assert isinstance(reply, messages.Done)
        assert reply.request == self._requests
        return reply

    def new_controller(self) -> None:
        """It has come, and the old one is not heard any more."""
        old, self.controller = self.controller, self.introduce("controller", self.says)
        if old.fileno() >= 0:
            old.socket.settimeout(10)
            assert old.socket.recv(10) == b""
            old.close()
        else:
            self.bind(99, "nobody", "198.19.255.254", "fd53:1::fffe")  # answered by the new one's end

    def bind(
        self, link: int = 7, workspace: str = "acme", source4: str = SOURCE4, source6: str = SOURCE6
    ) -> None:
        self._ask(messages.BindSource, link=link, workspace=workspace, source4=source4, source6=source6)

    def unbind(self, link: int) -> None:
        self._ask(messages.UnbindSource, link=link)

    # ---- what it reports

    def events(self, name: str) -> list[dict[str, Any]]:
        self.audit.socket.setblocking(False)
        while True:
            try:
                self.seen.append(self.audit.receive().message)
            except BlockingIOError:
                break
        return [dict(e.fields) for e in self.seen if isinstance(e, messages.Event) and e.event == name]

    def wait_for(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        return until(lambda: f if len(f := self.events(name)) >= count else None, what=f"{count} x {name}")

    # ---- what the kernel knows of it

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def introduce(self, name: str, channel_type: Any) -> Channel[Any]:
        channel, its = _channel(channel_type)
        with its:
            self.supervisor.send(messages.NewPeer(name=name), descriptor=its.fileno())
        return channel

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for channel in (self.supervisor, self.controller, self.audit):
            channel.close()


class Relay(Steered):
    program, listeners, says = "relay", ("relay4", "relay6"), messages.FROM_RELAY

    def __init__(self, network: Network, *, descriptors: int | None = None) -> None:
        super().__init__(network, home=network.host, descriptors=descriptors)

    def relays(self, *relays: messages.Relay) -> int:
        return self._ask(messages.SetRelays, relays=relays).changes


def _channel(receives: Any) -> tuple[Channel[Any], socket.socket]:
    mine, its = pair()
    return Channel(mine, receives), its


def announced(
    block: int = 5, port: int = 11434, *, workspace: str = "acme", service: str = "ollama"
) -> messages.Relay:
    return messages.Relay(workspace=workspace, service=service, block=block, port=port)
