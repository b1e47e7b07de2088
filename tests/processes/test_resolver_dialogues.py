"""The scenario files of tests/dns against the real process: real sockets, both families, a real upstream.

Those that need a long clock are played there only.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import socket
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dnslib
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "dns"))

from dialogue import FILES, Heard, Scenario, load, play
from resolver_scene import UPSTREAM, Authority, Namespace, Scene, able

from egressd.dns.table import WorkspaceNames
from egressd.ipc import messages
from egressd.ruleset.layout import RESOLVER4, RESOLVER6

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not able(), reason="needs root, ip and dig")]

SCENARIOS = {path.stem: load(path) for path in FILES}
_numbers = itertools.count(1000)


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    for link in range(1, 5):
        for address, bits in ((f"198.19.0.{link}", 32), (f"fd53:1::{link}", 128)):
            made.command("ip", "address", "replace", f"{address}/{bits}", "dev", "lo", "nodad")
    yield made
    made.close()
    assert not Path("/run/netns", made.name).exists()


class ProcessStage:
    """Plays against a process. `version` is the family the sandboxes speak."""

    def __init__(self, scene: Scene, authority: Authority | None, version: int) -> None:
        self.scene, self.authority, self.version = scene, authority, version
        self._sockets: dict[int, socket.socket] = {}
        self._seen: collections.Counter[str] = collections.Counter()
        self._denied: collections.Counter[str] = collections.Counter()

    def names(self, listed: list[WorkspaceNames]) -> None:
        controller = self.scene.controller
        controller.granted = {
            (names.workspace, host): block for names in listed for host, (block, _) in names.granted.items()
        }
        assert isinstance(controller.names(*listed), messages.Done)

    def script(self, upstream: dict[str, Any]) -> None:
        if self.authority is not None:
            self.authority.zone = _zone(upstream)

    def kernel(self, good: bool) -> None:
        self.scene.controller.verdict = lambda _: good

    def refuses(self, refused: dict[str, str]) -> None:
        self.scene.controller.refuses = {str(ip_address(address)): why for address, why in refused.items()}

    def begin(self, link: int, workspace: str) -> None:
        assert isinstance(self.scene.controller.bind(link, workspace), messages.Done)

    def end(self, link: int) -> None:
        assert isinstance(self.scene.controller.unbind(link), messages.Done)

    def after(self, seconds: float) -> None:
        raise AssertionError("this clock cannot be turned")

    def ask(self, link: int, name: str, qtype: str) -> Heard:
        record = dnslib.DNSRecord.question(name, qtype)
        record.header.id = next(_numbers) & 0xFFFF
        record.add_ar(dnslib.EDNS0(udp_len=1232))
        sock = self._socket(link)
        sock.send(record.pack())
        while (data := sock.recv(4096))[:2] != record.header.id.to_bytes(2, "big"):
            pass
        return Heard.of(data)

    def _socket(self, link: int) -> socket.socket:
        if link not in self._sockets:
            self._sockets[link] = self.scene.namespace.run(self._connect, link)
        return self._sockets[link]

    def _connect(self, link: int) -> socket.socket:
        six = self.version == 6
        sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(6)
        sock.bind((f"fd53:1::{link}" if six else f"198.19.0.{link}", 0))
        sock.connect((str(RESOLVER6 if six else RESOLVER4), 53))
        return sock

    def caused(self, kind: str, *, expected: int) -> list[str]:
        """Waits for as many as are expected; what comes beyond them shows with the next step."""
        deadline = time.monotonic() + 3
        while len(found := self._list(kind)[self._seen[kind] :]) < expected and time.monotonic() < deadline:
            time.sleep(0.005)
        self._seen[kind] += len(found)
        return found

    def _list(self, kind: str) -> list[str]:
        if kind == "grants":
            return self.scene.controller.admitted
        if kind == "releases":
            return self.scene.controller.releases
        asked = self.authority.asked if self.authority else []
        return [name for name, qtype, _, _ in list(asked) if qtype == "A"]

    def denied(self) -> dict[str, int]:
        reply = self.scene.controller.ask(messages.ReadRefused(request=next(_numbers)))
        assert isinstance(reply, messages.RefusedNames)
        total: collections.Counter[str] = collections.Counter()
        for by_reason in reply.counts.values():
            total.update(by_reason)
        return dict(total)

    def granted(self, workspace: str) -> dict[str, tuple[int, bool]]:
        held = self.scene.controller.granted
        return {host: (block, False) for (name, host), block in held.items() if name == workspace}

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()


def _zone(upstream: dict[str, Any]) -> dict[tuple[str, str], list[str] | int]:
    zone: dict[tuple[str, str], list[str] | int] = {}
    for name, entry in upstream.items():
        for qtype in ("A", "AAAA"):
            match entry:
                case "NXDOMAIN":
                    zone[name, qtype] = 3
                case "SERVFAIL":
                    zone[name, qtype] = 2
                case "NODATA":
                    zone[name, qtype] = []
                case _:
                    ttl = entry.get("ttl", 60)
                    zone[name, qtype] = [
                        f"{name} {ttl} {qtype} {ip_address(a)}" for a in entry.get(qtype, ())
                    ]
    return zone


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.process])
def test_dialogue(namespace: Namespace, name: str, version: int) -> None:
    scenario = SCENARIOS[name]
    with contextlib.ExitStack() as left:
        authority = None
        if scenario.upstream is not None:
            authority = left.enter_context(contextlib.closing(Authority(namespace)))
        scene = _scene(namespace, scenario)
        try:
            stage = left.enter_context(contextlib.closing(ProcessStage(scene, authority, version)))
            play(scenario, stage)
        finally:
            errors = scene.close()
        assert "Traceback" not in errors, errors
        assert scene.process.returncode == 0


def _scene(namespace: Namespace, scenario: Scenario) -> Scene:
    upstream = [] if scenario.upstream is None else [f"udp://{UPSTREAM}:5300"]
    return Scene(namespace, upstream=upstream, hosts=scenario.hosts)


def test_enough_of_them_are_played_here() -> None:
    assert sum(scenario.process for scenario in SCENARIOS.values()) >= 8
