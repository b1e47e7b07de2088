"""The host changes under a running egressd: its firewall flushed, its devices' addresses taken, forwarding
switched off, another uplink, everything stopped for a while. Approved traffic comes back by itself; what is
not approved is refused before, meanwhile and afterwards."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from integration.neighbours import MARKER, POLICY, doctor, mended, refused, works, works_again
from integration.probe import Resident
from lab import topology as t
from lab.daemon import Daemon
from lab.internet import start_internet
from lab.machine import Lab, poll

SETTLES = 10.0  # seconds within which something must have been put right; mostly it takes a tenth of one


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    found = start_module_daemon(policies={"acme": POLICY})
    poll(lambda: "custodian" in found.pids(), what="the custodian")
    return found


def in_order(daemon: Any) -> bool:
    """As the doctor sees it."""
    needs = doctor(daemon)
    return not {"table inet egressd_host", "forwarding on up0"} & needs.keys()


CHANGES = {
    # what somebody does to the host, what the record says
    "the firewall is flushed": ("nft flush ruleset", "table inet egressd_host was missing"),
    "our table is emptied": ("nft flush table inet egressd_host", "table inet egressd_host was changed"),
    "our table sleeps": (
        "nft add table inet egressd_host '{ flags dormant; }'",
        "table inet egressd_host was changed",
    ),
    "a manager takes the addresses of egw away": (
        "ip addr flush dev egw; ip -6 addr flush dev egw",
        "ip addr 169.254.54.1/30 dev egw was missing",
    ),
    "a manager takes egw down": ("ip link set egw down", "egw was down"),
    "its neighbour is forgotten": ("ip neigh flush dev egw nud permanent", "ip neigh 169.254.54.2"),
    "forwarding is switched off on the uplink": (
        "echo 0 > /proc/sys/net/ipv4/conf/up0/forwarding",
        "set net/ipv4/conf/up0/forwarding = 1 (was 0)",
    ),
    "forwarding is switched off altogether": (
        "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/ip_forward",
        "forwarding = 1 (was 0)",
    ),
    "the backstops are deleted": (
        "ip route flush type unreachable; ip -6 route flush type unreachable",
        "ip -4 route unreachable 198.18.0.0/16 was missing",
    ),
}


@pytest.mark.parametrize("half", [0, 1])
def test_somebody_changes_the_host_s_side(daemon: Any, uplink: Any, half: int) -> None:
    time_to_forget(daemon)
    since = uplink.settle()
    with Resident(daemon, timeout=1.0) as resident:
        works_again(resident)
        for command, said in list(CHANGES.values())[half::2]:
            changes(daemon, resident, command, said)
        works_again(resident)
    uplink.assert_never(MARKER.encode(), since=since)
    status = daemon.json("status")
    assert status["enforcing"]
    assert status["balanced"]
    assert any("host's side was changed" in alarm["text"] for alarm in status["alarms"])


def changes(daemon: Any, resident: Resident, command: str, said: str) -> None:
    known = len(mended(daemon))
    daemon.lab.run(["sh", "-e", "-c", command]).check()
    refused(resident)
    poll(
        lambda: any(said in record["what"] for record in mended(daemon)[known:]),
        timeout=SETTLES,
        what=f"{said!r} is on record",
    )
    poll(lambda: works(resident), timeout=SETTLES, what="approved traffic flows again")
    records = mended(daemon)[known:]
    assert all(record["restored"] for record in records), records
    if command.startswith("nft"):
        assert {record["by"].partition(" (pid ")[0] for record in records} == {"nft"}, records


def time_to_forget(daemon: Any) -> None:
    """The custodian's patience is for a minute, and these tests are many: another one has all of it."""
    before = daemon.pids().get("custodian", 0)
    daemon.lab.signal(before, signal.SIGKILL)
    poll(lambda: daemon.pids().get("custodian", before) != before, what="another custodian")
    poll(lambda: running(daemon), what="it runs")


def running(daemon: Any) -> bool:
    states = {process["name"]: process["state"] for process in daemon.ask("status")["processes"]}
    return states["custodian"] == "running"


def test_its_own_work_is_not_what_it_answers(daemon: Any) -> None:
    """`--mend` makes the table anew, and others have tables of their own: nothing is wrong."""
    known = len(mended(daemon))
    lab = daemon.lab
    lab.run(["/bin/sh", "-c", f"{sys.executable} -I -m egressd.processes.supervisor --config"
             f" {daemon.config_file} --mend"]).check()  # fmt: skip
    for _ in range(5):
        lab.run(["nft", "add table inet theirs; add chain inet theirs c; delete table inet theirs"]).check()
    lab.run(
        ["sh", "-c", "ip link add other0 type veth && ip link set other0 up && ip link del other0"]
    ).check()
    time.sleep(2.5)  # it would have looked by then, at settings too
    assert len(mended(daemon)) == known


@pytest.mark.slow
def test_somebody_who_flushes_for_ever_is_not_fought(daemon: Any) -> None:
    time_to_forget(daemon)
    known = len(mended(daemon))
    loop = "while :; do nft flush ruleset; sleep 0.05; done"
    somebody = daemon.lab.start(["sh", "-c", loop])
    try:
        poll(
            lambda: any("again and again" in record["what"] for record in mended(daemon)[known:]),
            timeout=3 * SETTLES,
            what="it is told",
        )
        with Resident(daemon, timeout=0.5) as resident:
            refused(resident)
        found = len(mended(daemon))
        time.sleep(3)
        assert len(mended(daemon)) - found <= 2
    finally:
        somebody.kill()
    told = mended(daemon)[known:]
    assert sum("again and again" in record["what"] for record in told) == 1
    assert [record["restored"] for record in told if "again and again" in record["what"]] == [False]
    time_to_forget(daemon)  # who looks at once
    with Resident(daemon, timeout=1.0) as resident:
        works_again(resident)


def test_without_the_custodian_what_was_denied_stays_denied(daemon: Any) -> None:
    """It is stopped, not dead: nobody puts the host's side back until it goes on."""
    with Resident(daemon, timeout=0.5) as resident:
        works_again(resident)
        pid = daemon.pids()["custodian"]
        daemon.lab.signal(pid, signal.SIGSTOP)
        try:
            daemon.lab.run(["nft", "flush", "ruleset"]).check()
            refused(resident)
            assert "egressd_host" not in daemon.lab.run(["nft", "list", "tables"]).check().out
        finally:
            daemon.lab.signal(pid, signal.SIGCONT)
        works_again(resident)
        poll(lambda: "egressd_host" in daemon.lab.run(["nft", "list", "tables"]).check().out)


def test_everything_stands_still_for_a_while(daemon: Any) -> None:
    """A virtual machine that is suspended, as far as its processes can tell. Nothing is let through meanwhile
    that was not before, nobody is killed for not having been heard of, and all goes on."""
    with Resident(daemon, timeout=1.0) as resident:
        works_again(resident)
        before = daemon.pids()
        address = resident.tries(("resolve", "plain.test", "4"))[0].data.split()[0]
        # the supervisor first: nobody is to be missed
        order = [before["supervisor"], *(pid for name, pid in before.items() if name != "supervisor")]
        try:
            for pid in order:
                daemon.lab.signal(pid, signal.SIGSTOP)
            # by its address: in the kernel there is nothing that stands still
            assert resident.tries(("tcp", address, 7, "x"))[0].result == "ok"
            refused_by_the_kernel(resident)
            time.sleep(2)
        finally:
            for pid in order:
                daemon.lab.signal(pid, signal.SIGCONT)
        works_again(resident)
        assert daemon.pids() == before
        assert daemon.json("status")["balanced"]


def refused_by_the_kernel(resident: Resident) -> None:
    tried = resident.tries(("tcp", str(t.EVIL4), 443, MARKER), ("udp", str(t.EVIL6), 443, MARKER))
    assert [one.result for one in tried] == ["ECONNREFUSED"] * 2


# ---- machines of their own


@pytest.fixture(scope="module")
def house() -> Iterator[Lab]:
    """A machine that may be changed for good."""
    with Lab() as lab:
        start_internet(lab)
        yield lab


Shell = Callable[[str], str]


def shell(lab: Lab, where: str = t.HOST) -> Shell:
    return lambda script: lab.run(["sh", "-e", "-c", script], where=where).check().out


def test_ipv6_is_off(house: Lab) -> None:
    """`net.ipv6.conf.all.disable_ipv6=1`: IPv4 works, IPv6 fails at once, and the doctor says so. A host that
    forwards nothing, too: nothing is forwarded after it either."""
    host = shell(house)
    host("for f in all default up0; do echo 1 > /proc/sys/net/ipv6/conf/$f/disable_ipv6; done")
    assert host("cat /proc/sys/net/ipv4/ip_forward").strip() == "0"
    with Daemon(house, policies={"acme": POLICY}, upstream=(f"udp://{t.DNS4}",)) as daemon:
        with Resident(daemon, timeout=4.0) as resident:
            works_again(resident)
            address = resident.tries(("resolve", "plain.test", "6"))[0].data
            six = resident.tries(("tcp", address, 7, MARKER), ("udp", address, 443, MARKER))
            assert [one.result for one in six] == ["ECONNREFUSED"] * 2
            assert max(one.milliseconds for one in six) < 500, six
        assert [row["result"] for row in doctor(daemon)["IPv6"]] == ["warning"]
        assert host("cat /proc/sys/net/ipv4/ip_forward").strip() == "0"
    assert host("cat /proc/sys/net/ipv4/conf/up0/forwarding").strip() == "0"
    host("for f in all default up0; do echo 0 > /proc/sys/net/ipv6/conf/$f/disable_ipv6; done")


STUB = """
import socket, sys
ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); ours.bind(("127.0.0.53", 53))
print("ready", flush=True)
while True:
    question, who = ours.recvfrom(4096)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as up:
        up.settimeout(2); up.connect((sys.argv[1], 53)); up.send(question)
        try: ours.sendto(up.recv(4096), who)
        except OSError: pass
"""


@pytest.mark.slow
def test_systemd_resolved_is_an_upstream_like_any_other(house: Lab) -> None:
    """Its stub, at 127.0.0.53 of the host. Sandboxes have another 127.0.0.53."""
    stub = house.start(["/usr/bin/python3", "-I", "-c", STUB, str(t.DNS4)])
    try:
        poll(lambda: "ready" in stub.out, what="the stub")
        with Daemon(house, policies={"acme": POLICY}, upstream=("udp://127.0.0.53",)) as daemon:
            with Resident(daemon, timeout=1.0) as resident:
                works_again(resident)
                tried = resident.tries(("ask", "127.0.0.53", f"{MARKER}.evil.test"))[0]
                assert tried.result == "ECONNREFUSED"
            assert "resolvers that fit this machine" not in doctor(daemon)
    finally:
        stub.kill()


SECOND = """
ip link add up1 type veth peer name net1 netns {net}
ip addr add 10.4.0.1/24 dev up1
ip addr add 2001:db8:4::1/64 dev up1 nodad
ip link set up1 up
"""
FAR = """
ip addr add 10.4.0.254/24 dev net1
ip addr add 2001:db8:4::fe/64 dev net1 nodad
ip link set net1 up
"""
MOVE = """
ip route replace default via 10.4.0.254 dev up1
ip -6 route replace default via 2001:db8:4::fe dev up1
ip -6 route del default dev up0 || true
ip link set up0 down
"""


def test_the_uplink_changes(house: Lab) -> None:
    """From the cable to the air: another device, another address, no restart. What it had to switch on is
    switched off again in the end."""
    host = shell(house)
    host(SECOND.format(net=t.NET))
    shell(house, t.NET)(FAR)
    upstream = ("udp://10.4.0.254", "udp://10.3.0.2")  # both lead to the lab's DNS
    with Daemon(house, policies={"acme": POLICY}, upstream=upstream) as daemon:
        with Resident(daemon, timeout=1.0) as resident:
            works_again(resident)
            assert host("cat /proc/sys/net/ipv4/conf/up1/forwarding").strip() == "0"
            host(MOVE)
            poll(lambda: host("cat /proc/sys/net/ipv4/conf/up1/forwarding").strip() == "1", timeout=SETTLES)
            works_again(resident)
        assert any("up1/forwarding" in record["what"] for record in mended(daemon))
    assert host("cat /proc/sys/net/ipv4/conf/up1/forwarding /proc/sys/net/ipv4/ip_forward").split() == [
        "0",
        "0",
    ]
