"""A host, a gateway laid by the real foundation, a real warden, and sandboxes' namespaces: all throw-away.

Nothing here touches the machine's own network: the "host" is a namespace too.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from egressd.ipc import messages
from egressd.ipc.channel import Channel, Received, pair, payload
from egressd.kernel import namespaces
from egressd.model.identities import Link
from egressd.processes import foundation
from egressd.processes.config import Config
from egressd.processes.foundation import FoundationConfig
from egressd.ruleset.layout import RESOLVER4, RESOLVER6, Kind, Mark, Pools
from egressd.ruleset.wants import Element, NatEntry, WorkspaceWant

USER = 4001  # who owns sandboxes; a plain number
WARDEN = 4003
POOLS = Pools()
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWNS = 0x1000_0000, 0x4000_0000, 0x2_0000
_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


def poll(condition: Callable[[], Any], *, timeout: float = 3.0, what: str = "") -> Any:
    """The first true value; AssertionError when a look begun after `timeout` seconds finds none."""
    deadline = time.monotonic() + timeout
    while True:
        began = time.monotonic()
        if value := condition():
            return value
        assert began < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.005)


def sh(
    command: str, *, namespace: int | None = None, check: bool = True, pass_fds: Sequence[int] = ()
) -> str:
    """Run a shell line, in a network namespace (descriptor)."""
    enter = (lambda: namespaces.enter(namespace)) if namespace is not None else None
    line = ["sh", "-c", command]
    done = subprocess.run(
        line, capture_output=True, text=True, preexec_fn=enter, pass_fds=pass_fds, check=False
    )
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@dataclass
class Inhabitant:
    """A process of `uid` in namespaces of its own; `net` is a descriptor of its network namespace."""

    pid: int
    net: int

    def close(self) -> None:
        os.close(self.net)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def open(self, kind: str) -> int:
        return os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def inhabitant(uid: int = USER, *, user: bool = True) -> Inhabitant:
    """Fork a process that becomes `uid` and unshares; without `user` it makes its namespace as root."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        _inhabit(uid, user, told)
    os.close(told)
    assert os.read(ready, 1) == b"k", "the namespaces could not be made"
    os.close(ready)
    return Inhabitant(pid, os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))


def _inhabit(uid: int, user: bool, told: int) -> None:
    try:
        _libc.prctl(1, signal.SIGKILL, 0, 0, 0)
        os.closerange(3, told)  # or channels of this process would never be seen to end
        os.closerange(told + 1, 1024)
        if user:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        flags = (_CLONE_NEWUSER if user else 0) | _CLONE_NEWNET | _CLONE_NEWNS
        if _libc.unshare(flags) == 0:
            os.write(told, b"k")
            os.close(told)
            while True:
                signal.pause()
    finally:
        os._exit(1)


@dataclass
class World:
    """`host` and `gateway` are descriptors."""

    directory: Path
    name: str = field(default_factory=lambda: f"{os.getpid()}-{next(_numbers)}")
    host: int = -1
    gateway: int = -1
    done: list[str] = field(default_factory=list)
    children: list[Warden] = field(default_factory=list)
    inhabitants: list[Inhabitant] = field(default_factory=list)

    @property
    def config(self) -> FoundationConfig:
        return FoundationConfig(
            gateway=f"kn-g{self.name}", state_dir=self.directory / "state", run_dir=self.directory / "run"
        )

    def __enter__(self) -> World:
        self.host, _ = namespaces.pin(f"kn-h{self.name}")
        sh(
            "ip link set lo up; ip link add wan type veth peer name far;"
            "for end in wan far; do ip link set $end addrgenmode none; ip link set $end up; done;"
            "ip addr add 192.0.2.1/24 dev wan; ip route add default via 192.0.2.2 dev wan;"
            "ip -6 addr add 2001:db8::1/64 dev wan nodad; ip -6 route add default via 2001:db8::2 dev wan",
            namespace=self.host,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.stop()
        for one in self.inhabitants:
            one.close()
        with namespaces.inside(self.host):
            foundation.dismantle(self.config)
        if self.gateway >= 0:
            os.close(self.gateway)
        os.close(self.host)
        namespaces.unpin(f"kn-h{self.name}")

    def found(self) -> list[str]:
        """Lay the foundation (again); returns what was done."""
        with namespaces.inside(self.host):
            result = foundation.setup(self.config)
        if self.gateway >= 0:
            os.close(self.gateway)
        self.gateway = os.dup(result.namespace)
        result.close()
        return result.done

    def dismantle(self) -> list[str]:
        with namespaces.inside(self.host):
            return foundation.dismantle(self.config)

    def nft(self, command: str) -> str:
        return sh(f"nft {command}", namespace=self.gateway)

    def ip(self, command: str) -> str:
        return sh(f"ip {command}", namespace=self.gateway)

    def left(self) -> int:
        """Packets that left the gateway for the host, ever."""
        with namespaces.inside(self.host):
            return int(next(line for line in Path("/proc/thread-self/net/dev").read_text().splitlines()
                            if "egw:" in line).split()[2])  # fmt: skip

    def inhabitant(self, uid: int = USER, *, user: bool = True) -> Inhabitant:
        one = inhabitant(uid, user=user)
        self.inhabitants.append(one)
        return one

    def warden(self) -> Warden:
        child = Warden(self)
        self.children.append(child)
        return child


class Warden:
    """The real process, and a controller's end of the channel to it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.unasked: list[Any] = []
        self.reports: list[int] = []  # numbers of those that were `heard`, which returns them without
        self.controller: Channel[Any]
        supervisor, its_supervisor = pair()
        audit, its_audit = pair()
        controller, its_controller = pair()
        self.supervisor: Channel[Any] = Channel(supervisor, messages.FROM_CHILD)
        self._audit = audit
        self._use(controller)
        ends = {"controller": its_controller, "supervisor": its_supervisor, "audit": its_audit}
        command = [sys.executable, "-I", "-m", "egressd.processes.warden", "--uid", str(WARDEN)]
        command += ["--gid", str(WARDEN), "--config-json", Config().encode()]
        for name, end in ends.items():
            command += ["--fd", f"{name}={end.fileno()}"]
        self.process = subprocess.Popen(
            command,
            pass_fds=[end.fileno() for end in ends.values()],
            preexec_fn=lambda: namespaces.enter(world.gateway),  # noqa: PLW1509 -- one thread here
        )
        for end in ends.values():
            end.close()
        supervisor.settimeout(10)
        assert isinstance(self.supervisor.receive().message, messages.Ready)

    def _use(self, sock: socket.socket) -> None:
        sock.settimeout(10)
        self.controller = Channel(sock, messages.FROM_WARDEN)

    def reconnect(self) -> None:
        """As the supervisor does when the controller was started again."""
        self.controller.close()
        mine, its = pair()
        with its:
            self.supervisor.send(messages.NewPeer(name="controller"), descriptor=its.fileno())
        self._use(mine)

    def ask(
        self, kind: type[Any], *, descriptor: int | None = None, data: bytes | None = None, **fields: Any
    ) -> Any:
        """The reply, with its payload decoded into bytes if it has one."""
        request = next(_numbers)
        if data is not None:
            fields["payload_length"] = len(data)
            with payload(data) as bulk:
                self.controller.send(kind(request=request, **fields), descriptor=bulk)
        else:
            self.controller.send(kind(request=request, **fields), descriptor=descriptor)
        while True:
            received: Received[Any] = self.controller.receive()
            message = received.message
            if getattr(message, "request", None) == request:
                return received.payload() if isinstance(message, messages.Payload) else message
            self.unasked.append(message)

    def heard(self, kind: type[Any], *, timeout: float = 3.0) -> Any:
        """The next message of that kind that nobody asked for."""
        deadline = time.monotonic() + timeout
        while True:
            for message in self.unasked:
                if isinstance(message, kind):
                    self.unasked.remove(message)
                    self.reports.append(getattr(message, "report", 0))
                    return msgspec.structs.replace(message, report=0) if self.reports[-1] else message
            self.controller.socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                self.unasked.append(self.controller.receive().message)
            finally:
                self.controller.socket.settimeout(10)

    def quiet(self) -> None:
        """Forget what was said unasked until now, also what is still on its way."""
        self.ask(messages.ReadRuleset)
        self.unasked.clear()

    def workspaces(self, *wants: WorkspaceWant) -> Any:
        return self.ask(messages.SetWorkspaces, data=msgspec.json.encode(list(wants)))

    def nat(self, *entries: NatEntry) -> Any:
        return self.ask(messages.SetNat, entries=entries)

    def begin(self, *wants: WorkspaceWant) -> None:
        """What a controller says first."""
        assert isinstance(self.workspaces(*wants), messages.Done)
        assert isinstance(self.ask(messages.Settle), messages.Done)

    def open(
        self, link: int, descriptor: int, *, workspace: str = "acme", owner: int = USER, **bounds: Any
    ) -> Any:
        """`bounds`: quota, connections, closed."""
        return self.ask(
            messages.OpenLink, descriptor=descriptor, link=link, workspace=workspace, owner=owner, **bounds
        )

    def close(self, link: int) -> Any:
        return self.ask(messages.CloseLink, link=link)

    def stop(self) -> None:
        self.supervisor.close()
        self.controller.close()
        self._audit.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(3)
        self.process.kill()
        self.process.wait()


# ---- what a controller wants

PLAIN, QUIC = 1, 2  # blocks of acme


def mark(kind: Kind, block: int, *, index: int = 1) -> int:
    return int(Mark(kind=kind, workspace=index, block=block))


def element(
    block: int,
    port: int,
    comment: str,
    *,
    protocol: str = "tcp",
    index: int = 1,
    kind: Kind = Kind.FORWARD,
) -> tuple[Element, ...]:
    """A name's element in both families."""
    value = mark(kind, block, index=index)
    return tuple(
        Element(str(address), protocol, port, value, comment)  # type: ignore[arg-type]
        for address in POOLS.synthetic(block)
    )


def resolver(*, index: int = 1) -> tuple[Element, ...]:
    value = mark(Kind.RESOLVE, 0, index=index)
    return tuple(
        Element(str(address), protocol, 53, value, "(resolver)")  # type: ignore[arg-type]
        for address in (RESOLVER4, RESOLVER6)
        for protocol in ("udp", "tcp")
    )


def want(name: str = "acme", *elements: tuple[Element, ...], index: int = 1, **more: Any) -> WorkspaceWant:
    every = (resolver(index=index), *elements)
    flat = tuple(one for group in every for one in group)
    return WorkspaceWant(
        workspace=name, index=index, guard=more.pop("guard", "enforce"), elements=flat, **more
    )


def acme(*more: tuple[Element, ...], connections: int | None = None) -> WorkspaceWant:
    plain, quic = element(PLAIN, 80, "plain.test"), element(QUIC, 443, "quic.test", protocol="udp")
    return want("acme", plain, quic, *more, connections=connections)


def nat(block: int, *reals: str, index: int = 1) -> tuple[NatEntry, ...]:
    """All four slots of a block lead to these addresses, by family."""
    entries = []
    for real in reals:
        for slot in range(4):
            four, six = POOLS.synthetic(block, slot)
            synthetic = six if ":" in real else four
            entries.append(
                NatEntry(mark(Kind.FORWARD, block, index=index), str(synthetic), real, "plain.test")
            )
    return tuple(entries)


def plumb(one: Inhabitant, link: int) -> None:
    """What the broker does inside."""
    four, six = POOLS.sandbox(Link(link))
    sh(
        "ip link set lo up; ip link set eth0 arp off addrgenmode none; ip link set eth0 up;"
        f"ip addr add {four}/32 dev eth0; ip -6 addr add {six}/128 dev eth0 nodad;"
        "ip neigh replace 169.254.53.53 lladdr 02:53:00:00:00:02 dev eth0 nud permanent;"
        "ip neigh replace fe80::53 lladdr 02:53:00:00:00:02 dev eth0 nud permanent;"
        f"ip route add 169.254.53.53 dev eth0; ip route add default via 169.254.53.53 src {four};"
        f"ip -6 route add default via fe80::53 dev eth0 src {six}",
        namespace=one.net,
    )


@contextlib.contextmanager
def nothing_left(*, descriptors: bool = True) -> Iterator[None]:
    """The block leaves no namespace pinned by it, and no descriptor, behind."""
    before = set(_descriptors()), set(Path("/run/netns").iterdir())
    yield
    assert not descriptors or len(_descriptors()) <= len(before[0])
    mine = {path for path in Path("/run/netns").iterdir() if f"{os.getpid()}-" in path.name}
    assert mine <= before[1]


def _descriptors() -> list[Path]:
    return list(Path("/proc/self/fd").iterdir())
