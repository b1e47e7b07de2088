"""The foundation: made, found in order, mended, taken away without a trace."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from warden_world import World, nothing_left, poll, sh

from egressd.kernel import namespaces
from egressd.kernel.probe import probe
from egressd.model.errors import KernelError
from egressd.processes import foundation, unrecorded
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
    assert [path.name for path in (world.directory / "state").iterdir()] == ["unrecorded.jsonl"]
    assert not list((world.directory / "run").iterdir())
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


# ---- a gateway that is there already

LINK7 = (
    "ip link add eg7 type veth peer name x; ip link set eg7 up group 53 arp off;"
    "nft add counter netdev egressd eg7_in '{ packets 12 bytes 3400 }';"
    "nft add chain netdev egressd eg7 '{ type filter hook ingress device \"eg7\" priority -500; }';"
    "nft add rule netdev egressd eg7 counter name eg7_in"
)


def inhabited(world: World) -> None:
    """A gateway with a link, and what the controller remembers of it."""
    world.found()
    sh(LINK7, namespace=world.gateway)
    leases = world.config.run_dir / "controller" / "leases"
    leases.mkdir(parents=True)
    (leases / "eg7.json").write_text(
        '{"link": 7, "workspace": "acme", "uid": 4001, "more": ["than", "this"]}'
    )
    (world.config.run_dir / "controller" / "books.json").write_text("{}")


def recorded(world: World) -> list[tuple[str, dict[str, Any]]]:
    """What waits for the next auditor; once."""
    found = [(each.event, dict(each.fields)) for each in unrecorded.kept(world.config.state_dir)]
    unrecorded.forget(world.config.state_dir)
    return found


def remembered(world: World) -> set[str]:
    return {path.name for path in (world.config.run_dir / "controller").rglob("*.json")}


def test_a_sound_gateway_is_adopted(world: World) -> None:
    inhabited(world)
    assert [event for event, _ in recorded(world)] == ["gateway-begun"]
    before = world.nft("-s -a list ruleset"), world.ip("-o link show eg7")
    world.found()
    after = world.nft("-s -a list ruleset"), world.ip("-o link show eg7")
    assert after == before, "not one object was made anew: the handles are the same"
    assert "packets 12 bytes 3400" in world.nft("list counter netdev egressd eg7_in")
    assert "198.19.0.7 dev eg7" in world.ip("route show table all"), "it is reached again"
    assert world.found() == []
    assert recorded(world) == []
    assert remembered(world) == {"eg7.json", "books.json"}


def test_a_link_that_was_being_closed_is_not_raised_again(world: World) -> None:
    inhabited(world)
    sh("ip link set eg7 down; nft delete chain netdev egressd eg7", namespace=world.gateway)
    world.found()
    assert "state DOWN" in world.ip("-o link show eg7")
    assert "eg7" not in world.ip("route show table all")


def test_a_base_that_was_changed_meanwhile_is_mended(world: World) -> None:
    inhabited(world)
    sound = world.nft("-s list ruleset")
    world.nft("insert rule inet egressd forwarding accept")
    assert world.nft("-s list ruleset") != sound
    world.found()
    assert world.nft("-s list ruleset") == sound
    assert world.ip("-o link show eg7")


def edited(world: World, **changes: Any) -> None:
    path = world.config.run_dir / "gateway.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DOUBTS: dict[str, tuple[Callable[[World], object], str]] = {
    "another boot": (lambda world: edited(world, boot="0" * 32), "before the machine was started"),
    "another version's ruleset": (lambda world: edited(world, base="0" * 64), "another version"),
    "another layout": (lambda world: edited(world, layout=0), "another version"),
    "another namespace": (lambda world: edited(world, namespace=[1, 2]), "another namespace"),
    "a field too many": (lambda world: edited(world, more=1), "cannot be used"),
    "no word of it": (lambda world: (world.config.run_dir / "gateway.json").unlink(), "no word"),
    "half a file": (lambda world: _halved(world.config.run_dir / "gateway.json"), "cannot be used"),
    "the ruleset flushed": (lambda world: world.nft("flush ruleset"), "is gone from it"),
    "a table asleep": (
        lambda world: world.nft("add table inet egressd '{ flags dormant; }'"), "dormant",
    ),
    "something foreign in a table": (
        lambda world: world.nft("add ct helper inet egressd ftp '{ type \"ftp\" protocol tcp; }'"),
        "cannot be read",
    ),
}  # fmt: skip


def _halved(path: Path) -> None:
    path.write_text(path.read_text()[:40])


@pytest.mark.parametrize("what", DOUBTS)
def test_any_doubt_begins_anew_and_who_was_there_is_on_record(world: World, what: str) -> None:
    doubt, why = DOUBTS[what]
    inhabited(world)
    recorded(world)
    doubt(world)
    counted = "eg7_in" in world.nft("list ruleset")
    assert "removed stale eg7" in world.found()
    assert "eg7" not in snapshot(world.gateway)
    (lost, fields), (begun, facts) = recorded(world)
    assert (lost, begun) == ("sandbox-lost", "gateway-begun")
    assert (fields["link"], fields["workspace"], fields["uid"]) == ("eg7", "acme", 4001)
    assert why in str(fields["why"]) and why in str(facts["why"])
    assert fields.get("in_packets", 12) == 12 and ("in_packets" in fields) == counted
    assert facts["links"] == 1
    assert remembered(world) == set()
    assert world.found() == [], "adopted from here on"


def test_leases_of_a_gateway_that_is_gone_are_lost_with_it(world: World) -> None:
    inhabited(world)
    recorded(world)
    os.close(world.gateway)
    world.gateway = -1
    namespaces.unpin(world.config.gateway)
    poll(lambda: "egw" not in sh("ip -o link", namespace=world.host), what="its end of the pair goes, too")
    world.found()
    assert [(event, fields.get("link")) for event, fields in recorded(world)] == [
        ("sandbox-lost", "eg7"), ("gateway-begun", None)
    ]  # fmt: skip


def test_dismantling_is_on_record(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "1000")
    inhabited(world)
    recorded(world)
    world.dismantle()
    (event, fields), (lost, facts) = recorded(world)
    assert (event, lost) == ("gateway-dismantled", "sandbox-lost")
    assert (fields["uid"], fields["sudo_uid"], fields["gateway"]) == (0, 1000, world.config.gateway)
    assert str(fields["at"]).endswith("Z")
    assert (facts["link"], facts["why"], facts["in_packets"]) == ("eg7", "the gateway was dismantled", 12)
    world.dismantle()
    assert recorded(world) == [], "there was nothing to open"


def test_what_the_controller_put_there_leads_root_nowhere(world: World, tmp_path: Path) -> None:
    """Its directory is its own: links in it, and other things that are no leases, are neither followed nor
    believed."""
    inhabited(world)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.json").write_text('{"link": 9, "workspace": "acme"}')
    leases = world.config.run_dir / "controller" / "leases"
    (leases / "eg8.json").symlink_to(mine / "precious.json")
    os.mkfifo(leases / "eg10.json")
    (leases / "eg11.json").write_text('{"link": 0, "workspace": "acme"}')
    (leases / "eg12.json").write_text('{"link": 12, "workspace": 3}')
    edited(world, boot="another")
    recorded(world)
    world.found()
    assert [fields.get("link") for _, fields in recorded(world)] == ["eg7", None]
    assert (mine / "precious.json").exists() and not leases.exists()
    leases.symlink_to(mine)
    edited(world, boot="another")
    world.found()
    assert [event for event, _ in recorded(world)] == ["gateway-begun"]
    assert (mine / "precious.json").exists()


def test_what_a_crash_left_is_cleaned_away(world: World) -> None:
    world.found()
    run, state = world.config.run_dir, world.config.state_dir
    (run / "controller" / "leases").mkdir(parents=True)
    halves = [run / "gateway.json.new", run / "controller" / "next-link.new", state / "foundation.json.new"]
    halves.append(run / "controller" / "leases" / "eg7.json.new")
    for path in halves:
        path.write_text("ha")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(run / "control.sock"))
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(run / "api.sock"))
        alive.listen()
        done = "; ".join(world.found())
        assert {path.name for path in run.glob("*.sock")} == {"api.sock"}
    assert not [path for path in halves if path.exists()]
    assert "control.sock: nobody listens there" in done
    world.found()
    assert not list(run.glob("*.sock"))


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
    config = Config(
        gateway=world.config.gateway, state_dir=str(world.config.state_dir), run_dir=str(world.config.run_dir)
    )
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
    reply = json.loads(data)
    assert reply["kept"] == []
    found = dict(zip(reply["names"], descriptors, strict=True))
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
        "ended",
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
    config = Config(
        gateway=world.config.gateway, state_dir=str(world.config.state_dir), run_dir=str(world.config.run_dir)
    )
    command = [sys.executable, "-I", "-m", "egressd.processes.foundation", "--config-json", config.encode()]
    done = subprocess.run(
        ["setpriv", "--reuid", "4001", "--regid", "4001", "--clear-groups", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Operation not permitted" in done.stderr or "Permission denied" in done.stderr
