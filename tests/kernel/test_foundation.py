"""The foundation: made, found in order, mended, taken away without a trace."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from warden_world import World, nothing_left, sh

from egressd.kernel import namespaces
from egressd.kernel.probe import probe
from egressd.model.errors import KernelError
from egressd.processes import foundation
from egressd.processes.config import Config

pytestmark = pytest.mark.kernel


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with nothing_left(), World(tmp_path) as world:
        yield world


def snapshot(namespace: int) -> str:
    """Everything of a namespace's network that egressd could have changed."""
    commands = (
        "ip -br link; ip -br addr; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all;"
        "ip neigh; nft -s list ruleset;"
        "grep -rs . /proc/sys/net/ipv4/conf/*/forwarding /proc/sys/net/ipv6/conf/*/force_forwarding"
        " /proc/sys/net/ipv6/conf/*/accept_ra /proc/sys/net/ipv4/ip_forward"
    )
    return sh(commands, namespace=namespace, check=False)


def test_this_kernel_will_do() -> None:
    probe()


def test_it_is_idempotent(world: World) -> None:
    assert "made egw and up0" in world.found()
    gateway, host = snapshot(world.gateway), snapshot(world.host)
    assert world.found() == []
    assert (snapshot(world.gateway), snapshot(world.host)) == (gateway, host)


def test_dismantling_leaves_the_host_as_it_was(world: World) -> None:
    before = snapshot(world.host)
    world.found()
    assert snapshot(world.host) != before
    done = world.dismantle()
    assert "unpinned" in "".join(done)
    assert "set net/ipv4/conf/wan/forwarding back to 0" in done
    assert snapshot(world.host) == before
    assert not list((world.directory / "state").iterdir())
    world.dismantle()  # nothing there, nothing wrong
    assert snapshot(world.host) == before


def test_the_first_values_are_the_ones_put_back(world: World) -> None:
    world.found()
    sh("sysctl -qw net.ipv4.conf.wan.forwarding=0", namespace=world.host)
    assert any("wan/forwarding = 1" in line for line in world.found())
    kept = json.loads((world.directory / "state" / "foundation.json").read_text())["settings"]
    assert kept["net/ipv4/conf/wan/forwarding"] == "0"


def test_forwarding_is_for_our_link_and_the_uplinks_alone(world: World) -> None:
    sh("ip link add other type veth peer name rehto", namespace=world.host)
    world.found()
    assert sh("cat /proc/sys/net/ipv4/conf/*/forwarding /proc/sys/net/ipv4/ip_forward", namespace=world.host)
    values = {
        name: sh(f"cat /proc/sys/net/ipv4/conf/{name}/forwarding", namespace=world.host).strip()
        for name in ("egw", "wan", "other", "all")
    }
    assert values == {"egw": "1", "wan": "1", "other": "0", "all": "0"}


BREAKAGES = {
    "the gateway's rules flushed": ("gateway", "ip rule flush; ip -6 rule flush"),
    "rules that let everything out": ("gateway", "ip rule add lookup 200; ip -6 rule add lookup 200"),
    "a rule like ours, with a source": (
        "gateway", "ip rule add pref 13 from 198.19.0.9 fwmark 0x80000000/0x80000000 lookup 200",
    ),
    "an inverted rule": ("gateway", "ip rule add not fwmark 0x80000000/0x80000000 pref 13 lookup 200"),
    "a route in the table of the admitted": ("gateway", "ip route add 10.0.0.0/8 via 169.254.54.1 table 200"),
    "the default routes gone": ("gateway", "ip route flush table 200; ip -6 route flush table 200"),
    "the routes to the inspector gone": ("gateway", "ip route flush table 100; ip -6 route flush table 100"),
    "the resolver's addresses gone": ("gateway", "ip addr flush dev lo"),
    "table local emptied": ("gateway", "ip route flush table local"),
    "neighbours gone": ("gateway", "ip neigh flush all nud permanent; ip -6 neigh flush all nud permanent"),
    "the uplink down": ("gateway", "ip link set up0 down"),
    "the uplink with ARP": ("gateway", "ip link set up0 arp on"),
    "early demultiplexing on": ("gateway", "sysctl -qw net.ipv4.ip_early_demux=1 net.ipv4.tcp_early_demux=1"),
    "loose connection tracking": ("gateway", "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=1"),
    "the gateway's ruleset flushed": ("gateway", "nft flush ruleset"),
    "a table of our name asleep": (
        "gateway", "nft flush ruleset; nft add table inet egressd '{ flags dormant; }'",
    ),
    "the host's table gone": ("host", "nft delete table inet egressd_host"),
    "the host's end down": ("host", "ip link set egw down"),
    "the backstops gone": ("host", "ip route flush proto 53; ip -6 route flush proto 53"),
    "the pair gone": ("host", "ip link del egw"),
}  # fmt: skip


def test_whatever_is_broken_is_put_right(world: World) -> None:
    world.found()
    sound = snapshot(world.gateway), snapshot(world.host)
    for what, (where, command) in BREAKAGES.items():
        namespace = world.gateway if where == "gateway" else world.host
        sh(command, namespace=namespace)
        assert (snapshot(world.gateway), snapshot(world.host)) != sound, f"{what}: broke nothing"
        world.found()
        assert _sorted(snapshot(world.gateway)) == _sorted(sound[0]), what
        assert _sorted(snapshot(world.host)) == _sorted(sound[1]), what
        assert world.found() == [], what


def _sorted(text: str) -> list[str]:
    """Order of routes and interface numbers (a pair made anew) do not matter; nor do the kernel's own
    prefix routes of 127.0.0.0/8, which we do not make."""
    lines = (re.sub(r"@if[0-9]+", "@if", line) for line in text.splitlines())
    return sorted(line for line in lines if "127.0.0.0" not in line and "127.255.255.255" not in line)


def test_links_of_a_former_life_are_cleared_away(world: World) -> None:
    world.found()
    sh(
        "ip link add eg7 type veth peer name x; ip link set eg7 up;"
        "nft add chain netdev egressd eg7 '{ type filter hook ingress device \"eg7\" priority -500; }'",
        namespace=world.gateway,
    )
    assert "removed stale eg7" in world.found()
    assert "eg7" not in snapshot(world.gateway)


def test_another_gateways_pair_is_not_taken(world: World) -> None:
    sh("ip link add egw type veth peer name x", namespace=world.host)
    with pytest.raises(KernelError, match="another gateway is connected"):
        world.found()
    sh("ip link del egw", namespace=world.host)


def test_mending_the_host_leaves_the_gateway_alone(world: World) -> None:
    world.found()
    sh("nft add chain netdev egressd witness", namespace=world.gateway)
    sh("nft flush ruleset; ip link set egw down", namespace=world.host)
    with namespaces.inside(world.host):
        assert foundation.mend(world.config)
    assert "masquerade" in sh("nft list ruleset", namespace=world.host)
    assert "witness" in world.nft("list ruleset")


def test_mending_needs_a_gateway(world: World) -> None:
    with namespaces.inside(world.host), pytest.raises(KernelError, match="no gateway"):
        foundation.mend(world.config)


def test_as_a_program_it_hands_over_sockets_that_live_in_the_gateway(world: World) -> None:
    config = Config(gateway=world.config.gateway, state_dir=str(world.config.state_dir))
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-I", "-m", "egressd.processes.foundation"]
    command += ["--config-json", config.encode(), "--fd", f"reply={its.fileno()}"]
    done = subprocess.run(
        command,
        pass_fds=[its.fileno()],
        capture_output=True,
        text=True,
        preexec_fn=lambda: namespaces.enter(world.host),
        check=False,
    )
    its.close()
    assert done.returncode == 0, done.stderr
    data, descriptors, _, _ = socket.recv_fds(mine, 1 << 16, 64)
    mine.close()
    found = dict(zip(json.loads(data), descriptors, strict=True))
    assert list(found) == [
        "gateway",
        "udp4",
        "tcp4",
        "inspect4",
        "relay4",
        "udp6",
        "tcp6",
        "inspect6",
        "relay6",
        "nflog",
        "flows",
    ]
    world.gateway = found.pop("gateway")
    with socket.socket(fileno=os.dup(found["udp6"])) as udp:
        assert udp.getsockname()[:2] == ("fd53:53::53", 53)
    with socket.socket(fileno=os.dup(found["inspect4"])) as tproxy:
        assert tproxy.getsockname() == ("127.0.0.1", 8443)
        assert tproxy.getsockopt(socket.IPPROTO_IP, 19) == 1  # IP_TRANSPARENT
    listening = sh("cat /proc/net/netfilter/nfnetlink_log", namespace=world.gateway)
    assert listening.split()[0] == "5"
    for descriptor in found.values():
        os.close(descriptor)


def test_as_a_program_it_fails_with_a_remedy(world: World) -> None:
    config = Config(gateway=world.config.gateway, state_dir=str(world.config.state_dir))
    command = [sys.executable, "-I", "-m", "egressd.processes.foundation", "--config-json", config.encode()]
    done = subprocess.run(
        ["setpriv", "--reuid", "4001", "--regid", "4001", "--clear-groups", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Operation not permitted" in done.stderr or "Permission denied" in done.stderr
