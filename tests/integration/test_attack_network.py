"""The caller as root of the sandbox's own network: whatever is added, moved, renamed or deleted there, what
comes over the link is judged at its other end, and the books stay exact."""

from __future__ import annotations

import itertools
import json
import signal
import socket
from typing import Any

import dnslib
import pytest

from integration import inside
from integration.chatter import Chatter
from integration.probe import Resident, probe
from lab import topology as t
from lab.capture import Frame
from lab.machine import poll

MARKER = "network-2e77"
POLICY = """
workspace: {name}
guard: enforce
members: [user:4001]
allow:
  - {{host: {host}, ports: [7/tcp, 443/udp], verify: address}}
"""
# Sends to who is not allowed, in every way the family offers; prints nothing, fails never.
SEND = """
import socket, sys
for family, to in ((2, "11.22.33.66"), (10, "2a10:5353::66"), (2, "169.254.54.1"), (10, "fd53:2::1")):
    for kind in (1, 2):
        for source in sys.argv[1:] or [""]:
            sock = socket.socket(family, kind)
            sock.settimeout(0.2)
            try:
                if source:
                    sock.bind((source, 0))
                sock.connect((to, 443))
                sock.send(b"network-2e77")
                sock.recv(10)
            except OSError:
                pass
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(
        policies={
            "acme": POLICY.format(name="acme", host="plain.test"),
            "beta": POLICY.format(name="beta", host="one.cdn.test"),
        }
    )


def commands(daemon: Any, process: Any, text: str) -> None:
    """Each line by itself; what this kernel lacks a module for is passed over."""
    for line in text.strip().splitlines():
        inside.run(daemon, process, *line.split())


def send(daemon: Any, process: Any, *sources: str) -> None:
    inside.run(daemon, process, "/usr/bin/python3", "-I", "-c", SEND, *sources)


def balanced(daemon: Any) -> dict[str, Any]:
    for workspace in ("acme", "beta"):
        account = inside.counters(daemon, workspace)
        assert account["balance"]["balanced"], account["balance"]
        for link in account["links"]:
            assert link["in"] == [sum(p) for p in zip(link["ok"], link["denied"], link["other"], strict=True)]
    return inside.counters(daemon, "acme")


TRICKS = {
    "another sandbox's address": "ip addr add {other4}/32 dev eth0\n"
    "ip -6 addr add {other6}/128 dev eth0 nodad",
    "the host's address": "ip addr add 10.3.0.1/24 dev eth0\nip -6 addr add 2001:db8:3::1/64 dev eth0 nodad",
    "the gateway's addresses": "ip addr add 169.254.54.1/30 dev eth0\nip addr add 169.254.53.53/32 dev eth0\n"
    "ip -6 addr add fd53:2::2/64 dev eth0 nodad",
    "routes": "ip route add 11.22.33.0/24 via 169.254.53.53 dev eth0 onlink\n"
    "ip route add 10.0.0.0/8 dev eth0\nip -6 route add 2000::/3 dev eth0",
    "another MAC": "ip link set eth0 down\nip link set eth0 address 02:53:00:00:00:02\nip link set eth0 up\n"
    "ip route add default via 169.254.53.53 dev eth0 onlink",
    "ARP and discovery on": "ip link set eth0 arp on\nip link set eth0 addrgenmode eui64\n"
    "ip neigh flush all\nip link set eth0 down\nip link set eth0 up",
    "a large MTU": "ip link set eth0 mtu 65535\nip link set eth0 gso_max_size 300000",
    "a small MTU": "ip link set eth0 mtu 576",
    "vlan": "ip link add link eth0 name v0 type vlan id 5\nip link set v0 up\n"
    "ip addr add 11.22.33.1/24 dev v0",
    "macvlan": "ip link add m0 link eth0 type macvlan mode bridge\nip link set m0 up\n"
    "ip addr add 11.22.33.1/24 dev m0\nip route add default dev m0 metric 1",
    "a bridge": "ip link add b0 type bridge\nip link set eth0 master b0\nip link set b0 up\n"
    "ip addr add {me4}/32 dev b0\nip route add default dev b0",
    "vxlan to the allowed host": "ip link add x0 type vxlan id 5 dstport 443 remote {plain4} dev eth0\n"
    "ip link set x0 up\nip addr add 11.22.33.1/24 dev x0",
    "gre and ipip": "ip link add g0 type gretap remote {plain4} local {me4}\nip link set g0 up\n"
    "ip tunnel add p0 mode ipip remote {plain4} local {me4}\nip addr add 11.22.33.1/24 dev g0",
    "forwarding through it": "sysctl -qw net.ipv4.ip_forward=1\nsysctl -qw net.ipv6.conf.all.forwarding=1\n"
    "ip link add d0 type dummy\nip link set d0 up\nip addr add 11.22.33.2/24 dev d0",
    "its own translation": "nft add table ip mine\n"
    "nft add chain ip mine post {{ type nat hook postrouting priority 100; }}\n"
    "nft add rule ip mine post snat to {other4}",
    "traffic control": "tc qdisc add dev eth0 clsact\n"
    "tc filter add dev eth0 egress protocol all matchall action skbedit mark 0x80004001 ptype host",
    "another name": "ip link set eth0 down\nip link set eth0 name eg2\nip link set eg2 up\n"
    "ip route add default dev eg2",
}  # fmt: skip


def allowed(frame: Frame) -> bool:
    """A tunnel to the approved host is that host's business, and is on its counter."""
    return frame.destination in (t.PLAIN4, t.PLAIN6) and frame.source in (t.HOST4, t.HOST6)


def refreshing(frame: Frame) -> bool:
    """egressd's own question, as it asks again and again, for a name that a policy lists."""
    if frame.destination not in (t.DNS4, t.DNS6) or frame.source not in (t.HOST4, t.HOST6):
        return False
    if frame.protocol != socket.IPPROTO_UDP or (frame.ports or (0, 0))[1] != 53:
        return False
    asked = dnslib.DNSRecord.parse(frame.transport[8:]).questions
    return [str(question.qname).lower() for question in asked] in (["plain.test."], ["one.cdn.test."])


@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS.keys())
def test_the_owner_of_the_network_gains_nothing(daemon: Any, uplink: Any, trick: str) -> None:
    with Resident(daemon, timeout=1.0) as mine, Resident(daemon, workspace="beta") as other:
        found = {s["workspace"]: s for s in daemon.json("status")["sandboxes"]}
        plain4 = mine.tries(("resolve", "plain.test", "4"))[0].data
        words = {
            "me4": found["acme"]["address4"], "other4": found["beta"]["address4"],
            "other6": found["beta"]["address6"], "plain4": plain4,
        }  # fmt: skip
        before = balanced(daemon)
        commands(daemon, mine.process, trick.format(**words))
        since = uplink.settle()
        send(daemon, mine.process)
        send(daemon, mine.process, words["other4"], words["other6"], "10.3.0.1", "169.254.54.1")
        poll(lambda: balanced(daemon), timeout=2)
        frames = uplink.frames(since=since, outgoing=True)
        strays = [f for f in frames if not (allowed(f) or refreshing(f))]
        assert not strays, [str(f) for f in strays]
        after = balanced(daemon)
        denied = sum(after["denied"][r][0] for r in after["denied"])
        assert denied >= sum(before["denied"][r][0] for r in before["denied"])
        assert other.tries(("tcp", "one.cdn.test", 7, "fine"))[0].data == "fine"


@pytest.mark.parametrize(
    "gone", ["ip link delete eth0", "ip link set eth0 netns {pid}"], ids=["deleted", "moved"]
)
def test_a_link_that_its_owner_takes_away_is_accounted_for_and_leaves_nothing(
    daemon: Any, lab: Any, gone: str
) -> None:
    with Resident(daemon, timeout=0.5) as mine:
        assert mine.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok"
        before = balanced(daemon)["links"][0]
        asleep = inside.start(daemon, mine.process, "unshare", "--net", "sleep", "100")
        poll(lambda: set(inside_names(lab, asleep)) == {"lo"}, what="a network of its own")
        done = inside.run(daemon, mine.process, *gone.format(pid=asleep.pid).split())
        assert done.status == 0, done
        assert mine.tries(("tcp", "plain.test", 7, "x"))[0].result != "ok"
    ended = poll(lambda: [a for a in [balanced(daemon)] if not a["links"]])[0]["ended"]
    assert ended["in"][0] >= before["in"][0], "what the link carried stays in the books"
    poll(lambda: not [n for n in lab.links(daemon.gateway) if n.startswith("eg")], what="no link is left")
    assert "eth0" not in inside_names(lab, asleep)
    asleep.kill()


def inside_names(lab: Any, process: Any) -> set[str]:
    listing = lab.run(["ip", "-j", "link"], where=f"/proc/{process.pid}/ns/net").check().out
    return {link["ifname"] for link in json.loads(listing)}


def test_nothing_of_the_callers_gets_into_the_gateway(daemon: Any, lab: Any) -> None:
    """The pinned namespace may be opened by anyone; putting something into it takes rights over it."""
    pin = f"/run/netns/{daemon.gateway}"
    with Resident(daemon) as mine:
        before = set(lab.links(daemon.gateway))
        for words in (
            ["ip", "link", "set", "eth0", "netns", pin],
            ["ip", "link", "add", "w0", "type", "veth", "peer", "name", "w1", "netns", pin],
            ["nsenter", f"--net={pin}", "ip", "link"],
            ["ip", "link", "set", "eth0", "netns", "1"],
        ):
            assert inside.run(daemon, mine.process, *words).status != 0, words
        assert set(lab.links(daemon.gateway)) == before


@pytest.mark.parametrize("how", ["process", "bind"])
def test_a_network_that_outlives_its_sandbox_has_no_link(
    daemon: Any, lab: Any, uplink: Any, how: str
) -> None:
    """Kept alive by a process of the caller's, or by a descriptor, after the broker was killed."""
    chatter = Chatter(daemon, ["tcp4 plain.test 7", "udp6 plain.test 443"])
    if how == "process":
        keeper = inside.start(daemon, chatter.process, "sleep", "100")
    else:
        path = daemon.namespace_of(chatter.process)
        keeper = lab.start(["bash", "-c", f"exec 9<{path}; exec sleep 100"], uid=daemon.lab.user)
    poll(lambda: any(c.pid == keeper.pid and c.command.startswith("sleep") for c in lab.table()))
    chatter.process.signal(signal.SIGKILL)
    poll(
        lambda: not [n for n in lab.links(daemon.gateway) if n.startswith("eg")],
        timeout=1.0,
        what="the link is gone within a second",
    )
    where = f"/proc/{keeper.pid}/ns/net" if how == "process" else f"/proc/{keeper.pid}/fd/9"
    listing = lab.run(["ip", "-j", "link"], where=where).check().out
    assert {link["ifname"] for link in json.loads(listing)} == {"lo"}
    assert "chain eg" not in daemon.json("ruleset")["text"]
    keeper.kill()
    chatter.process.wait()
    balanced(daemon)


def namesakes() -> tuple[str, str]:
    """Two names whose rules begin to look for a block at the same place, so that in workspaces of their own
    they have the same synthetic addresses."""
    from egressd.ruleset.allocate import _BLOCKS, _free

    seen: dict[int, str] = {}
    for number in itertools.count():
        name = f"n{number}.same.test"
        block = _free(name, _BLOCKS, set())
        if block in seen:
            return seen[block], name
        seen[block] = name
    raise AssertionError


def test_one_address_in_two_workspaces_leads_to_two_hosts(daemon: Any, internet: Any) -> None:
    """The mark says whose the address is, in both families; and each is counted as its own."""
    one, two = namesakes()
    internet.set(one, A=[str(t.PLAIN4)], AAAA=[str(t.PLAIN6)])
    internet.set(two, A=[str(t.CDN4)], AAAA=[str(t.CDN6)])
    daemon.write_policy("beta", POLICY.format(name="beta", host=two))
    daemon.policy("acme", POLICY.format(name="acme", host=one))
    try:
        for family in "46":
            (first,) = probe(daemon, [("resolve", one, family)])
            (second,) = probe(daemon, [("resolve", two, family)], workspace="beta")
            assert first.data == second.data, "the same address"
            for workspace, address in (("acme", (t.PLAIN4, t.PLAIN6)), ("beta", (t.CDN4, t.CDN6))):
                internet.forget()
                (tried,) = probe(daemon, [("tcp", first.data, 7, MARKER)], workspace=workspace)
                assert tried.data == MARKER
                (seen,) = [s for s in internet.seen(port=7) if MARKER in s.data]
                assert seen.address == str(address[family == "6"])
        balanced(daemon)
    finally:
        daemon.write_policy("beta", POLICY.format(name="beta", host="one.cdn.test"))
        daemon.policy("acme", POLICY.format(name="acme", host="plain.test"))
