"""A sandbox that tries forbidden things as fast as it can: the kernel counts every packet, the log is
bounded, and the auditor keeps up, loses nothing that it was given, and answers the others meanwhile.

The auditor is the real program, with the gateway's own sockets; the denials are a real kernel's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guard_topology import ACME, POOLS, SERVER4, SERVER6, Topology, inside, policy, topology
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from egressd.ipc import messages
from egressd.kernel import sockets
from egressd.model.identities import Link
from egressd.ruleset.books import books, equations
from egressd.ruleset.layout import GATEWAY_MAC, SANDBOX_MAC
from egressd.ruleset.observe import Counters, Tally
from lab.scale import scaled
from processes.auditor_lab import UID, Auditor, until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="starts a process that gives up root"),
]
RATE, BURST = 50, 200  # of the log, one sandbox's share of it: ruleset.build


@pytest.fixture
def there() -> Iterator[Topology]:
    with topology("storm") as made:
        made.apply(policy(*ACME))
        made.connect(1)
        yield made


@pytest.fixture
def state() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="egressd-storm-"))
    try:
        path.chmod(0o755)
        for name, mode in (("journal", 0o750), ("keys", 0o700)):
            (path / name).mkdir(mode=mode)
            os.chown(path / name, UID, UID)
        yield path
    finally:
        shutil.rmtree(path)


def storm(there: Topology, count: int) -> tuple[int, float]:
    """`count` packets, eight kinds in turn; returns how many bytes that was, and how many seconds."""
    me4, me6 = map(str, POOLS.sandbox(Link(1)))
    packets = [
        *(IP(src=me4, dst=SERVER4) / TCP(sport=4000 + i, dport=443, flags="S") for i in range(2)),
        *(IPv6(src=me6, dst=SERVER6) / TCP(sport=4000 + i, dport=443, flags="S") for i in range(2)),
        IP(src=me4, dst=SERVER4) / UDP(sport=4000, dport=53) / b"question",
        IPv6(src=me6, dst=SERVER6) / UDP(sport=4000, dport=53) / b"question",
        IP(src="10.9.9.9", dst=SERVER4) / UDP(sport=4000, dport=53) / b"forged",
        IP(src=me4, dst=SERVER4, flags="MF") / UDP(sport=4000, dport=53) / b"fragment",
    ]
    data = [bytes(Ether(src=SANDBOX_MAC, dst=GATEWAY_MAC) / packet) for packet in packets]
    wire = there.raw(there.sandbox(1), "eth0")
    began = time.monotonic()
    for i in range(count):
        wire.send(data[i & 7])
    return sum(len(data[i & 7]) - 14 for i in range(count)), time.monotonic() - began


def weather(there: Topology, state: Path, count: int) -> None:
    with contextlib.ExitStack() as stack:
        with inside(there.gateway):
            opened = {name: stack.enter_context(sock) for name, sock in sockets.open_all().items()}
        auditor = stack.enter_context(Auditor(state, nflog=opened["nflog"], flows=opened["flows"])).ready()
        auditor.bind(1, "acme", *map(str, POOLS.sandbox(Link(1))))
        auditor.event("sandbox-opening", link="eg1", workspace="acme")
        octets, seconds = storm(there, count)
        counters = there.settled(1, count)
        check_counters(counters, count, octets)
        link = counters.links["eg1"]
        close(auditor, link.in_, link.denied)
        [closed] = auditor.wait_for("sandbox-closed")
        assert (closed["denied_packets"], closed["denied_bytes"]) == (count, octets)
        [flows] = auditor.wait_for("link-flows")
        assert (flows["ok_packets"], flows["unrecorded_packets"]) == (0, 0)
        supervisor = auditor.channels["supervisor"].socket
        supervisor.settimeout(3)
        assert auditor.channels["supervisor"].receive().message == messages.Heartbeat()
        assert auditor.stop() == 0
        check_log(auditor, count, seconds)


def check_counters(counters: Counters, count: int, octets: int) -> None:
    link, everything = counters.links["eg1"], Tally(count, octets)
    assert (link.in_, link.denied) == (everything, everything)
    assert (link.ok, link.other) == (Tally(), Tally())
    denied = counters.denied["acme"]
    assert sum(denied.values(), Tally()) == everything
    assert denied["unlisted"].packets == count * 6 // 8
    assert (denied["source"].packets, denied["shape"].packets) == (count // 8, count // 8)
    found = books(equations(counters, {}, {}, workspace_of={"eg1": "acme"}))
    assert found.balanced, found.differences


def check_log(auditor: Auditor, count: int, seconds: float) -> None:
    """Logged at a bounded rate, all reasons together; what was logged is recorded, or counted as lost."""
    denied = auditor.of("denied")
    assert {f["reason"] for f in denied} == {"unlisted", "source", "shape"}
    # the others' sources are not validated, and the device is not numbered as the warden's are
    assert {f["link"] for f in denied if f["reason"] == "unlisted"} == {"eg1"}
    recorded = sum(f["packets"] for f in denied)
    lost = sum(f["count"] for f in auditor.of("lost"))
    most = BURST + RATE * (seconds + 1)
    assert BURST <= recorded + lost <= min(most, count)
    assert lost == 0
    assert len(denied) <= 8 * (seconds + 4), "a flood is one record a second for each kind"


def close(auditor: Auditor, in_: Tally, denied: Tally) -> None:
    auditor.event(
        "sandbox-closed",
        link="eg1", workspace="acme", in_packets=in_.packets, in_bytes=in_.bytes, ok_packets=0, ok_bytes=0,
        denied_packets=denied.packets, denied_bytes=denied.bytes,
    )  # fmt: skip
    auditor.erased(1)


def test_a_storm_of_denials_ends_with_exact_totals(there: Topology, state: Path) -> None:
    weather(there, state, 24_000)


@pytest.mark.slow
def test_a_storm_of_a_million_denials(there: Topology, state: Path) -> None:
    weather(there, state, scaled(1_000_000, least=50_000) // 8 * 8)


def test_the_auditor_is_not_in_the_way(there: Topology, state: Path) -> None:
    """Nobody reads the log: the same packets are denied and counted all the same."""
    with contextlib.ExitStack() as stack:
        with inside(there.gateway):
            for sock in sockets.open_all().values():
                stack.enter_context(sock)
        octets, _ = storm(there, 8_000)
        check_counters(there.settled(1, 8_000), 8_000, octets)
        assert until(lambda: there.counters().links["eg1"].denied == Tally(8_000, octets))
