"""The name servers that are measured, ours and the peers, each in a namespace made for it.

Ours is the real resolver process with sockets handed in, fed by a stand-in for the controller
(tests/processes/resolver_scene.py). The peers are Debian's unbound and dnsmasq, one thread each, which have
learnt the same names from an upstream server that stops before anything is measured: they answer from their
caches, as ours answers from its own. All listen on the resolver's address and port.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from egressd.dns.table import WorkspaceNames
from egressd.ruleset.layout import RESOLVER4
from processes.resolver_scene import Namespace, Scene, eventually

__all__ = ["DENIED", "Place", "dnsmasq", "listed", "ours", "unbound"]

DENIED = "unlisted.test"  # the zone of names that nobody may ask for
_ADDRESS = "93.184.215.14"
_UPSTREAM = "127.0.0.54"


def listed(count: int) -> list[str]:
    return [f"host-{number:05d}.bench.test" for number in range(count)]


@dataclass(frozen=True)
class Place:
    """A server that answers, the namespace it is in, and its process."""

    name: str
    namespace: Namespace
    pid: int
    scene: Scene | None = None


def _pin(pid: int, cores: set[int]) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


@contextlib.contextmanager
def ours(names: Sequence[str], *, cores: set[int]) -> Iterator[Place]:
    """The resolver with one workspace, whose list is `names`; two sandboxes, links 1 and 2, are bound."""
    with contextlib.ExitStack() as stack:
        namespace = Namespace()
        stack.callback(namespace.close)
        scene = Scene(namespace, upstream=[], hosts={name: [_ADDRESS] for name in names})
        stack.callback(scene.close)
        scene.controller.names(
            WorkspaceNames(
                workspace="acme",
                guard="enforce",
                hosts={name: (block, False) for block, name in enumerate(names, start=1)},
            ),
            WorkspaceNames(workspace="other", guard="enforce", hosts={names[0]: (1, False)}),
        )
        scene.controller.bind(1)
        scene.controller.bind(2, "other")
        eventually(lambda: len(scene.controller.resolved) >= len(names), within=30)
        eventually(lambda: scene.dig(names[-1]).data)
        _pin(scene.process.pid, cores)
        yield Place("ours", namespace, scene.process.pid, scene)


_UNBOUND = """\
server:
  chroot: ""
  username: ""
  pidfile: ""
  use-syslog: no
  verbosity: 0
  num-threads: 1
  interface: {address}@53
  access-control: 0.0.0.0/0 allow
  do-not-query-localhost: no
  module-config: "iterator"
  msg-cache-size: 64m
  rrset-cache-size: 64m
  cache-max-ttl: 86400
  local-zone: "test." transparent
{zones}
remote-control:
  control-enable: no
{more}"""
_FORWARD = f'forward-zone:\n  name: "."\n  forward-addr: {_UPSTREAM}\n'

_DNSMASQ = """\
no-resolv
no-hosts
no-negcache
user=root
bind-interfaces
listen-address={address}
no-dhcp-interface=lo
cache-size=10000
server={upstream}
local=/{denied}/
nftset=/bench.test/4#inet#bench#allowed
"""


@contextlib.contextmanager
def unbound(names: Sequence[str], *, cores: set[int]) -> Iterator[Place]:
    zones = f'  local-zone: "{DENIED}." always_nxdomain'
    text = _UNBOUND.format(address=RESOLVER4, zones=zones, more=_FORWARD)
    with _peer("unbound", text, names) as place:
        _pin(place.pid, cores)
        yield place


@contextlib.contextmanager
def dnsmasq(names: Sequence[str], *, cores: set[int]) -> Iterator[Place]:
    """With `nftset`: each address it learns goes into a set of its namespace's kernel."""
    text = _DNSMASQ.format(address=RESOLVER4, upstream=_UPSTREAM, denied=DENIED)
    with _peer("dnsmasq", text, names) as place:
        if _ADDRESS not in place.namespace.command("nft", "list", "set", "inet", "bench", "allowed"):
            raise RuntimeError("dnsmasq put nothing into its set")
        _pin(place.pid, cores)
        yield place


@contextlib.contextmanager
def _peer(name: str, text: str, names: Sequence[str]) -> Iterator[Place]:
    """The server, after it has learnt every name."""
    with contextlib.ExitStack() as stack:
        namespace = Namespace()
        stack.callback(namespace.close)
        namespace.command("nft", "add table inet bench; add set inet bench allowed { type ipv4_addr; }")
        data = "".join(f'  local-data: "{name}. 86400 A {_ADDRESS}"\n' for name in names)
        upstream = _UNBOUND.format(address=_UPSTREAM, zones=data, more="")
        with _started(namespace, "unbound", upstream, _UPSTREAM):
            pid = stack.enter_context(_started(namespace, name, text, str(RESOLVER4)))
            found = _ask(namespace, str(RESOLVER4), names)
            if found.count(_ADDRESS) != len(names):
                raise RuntimeError(f"{name} learnt {found.count(_ADDRESS)} of {len(names)} names")
        yield Place(name, namespace, pid)


@contextlib.contextmanager
def _started(namespace: Namespace, name: str, text: str, address: str) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="egressd-bench-", dir="/tmp"))
        path = Path(directory, "configuration")
        path.write_text(text)
        words = {"unbound": ["unbound", "-d", "-p", "-c"], "dnsmasq": ["dnsmasq", "--no-daemon", "-C"]}[name]
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace.name, *words, str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            eventually(lambda: process.poll() is not None or _ask(namespace, address, [f"x.{DENIED}"]) != "")
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended: {process.stderr and process.stderr.read()}")
            yield process.pid  # `ip netns exec` has become the server
        finally:
            process.terminate()
            process.communicate(timeout=10)


def _ask(namespace: Namespace, address: str, names: Sequence[str]) -> str:
    """dig's words about the names; empty when nobody answers."""
    found = subprocess.run(
        ["ip", "netns", "exec", namespace.name, "dig", f"@{address}", "+time=1", "+tries=2", "-f", "-"],
        input="".join(f"{name} A\n" for name in names),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return found.stdout if "status:" in found.stdout else ""
