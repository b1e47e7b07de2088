"""The processes: each with the rights on its card, each replaceable, none able to stop the others."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any

import pytest

from egressd.ipc import messages
from egressd.ipc.channel import Channel
from egressd.processes.cards import CARDS, Capability
from integration.chatter import Chatter
from integration.probe import Resident, probe
from lab.machine import LabError, poll

POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp], verify: address}
  - local: ollama
"""
CHILDREN = [
    "warden", "controller", "resolver", "relay", "inspector", "auditor", "custodian", "exporter", "api",
]  # fmt: skip


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    found = start_module_daemon(policies={"acme": POLICY}, metrics="127.0.0.1:9464", api="127.0.0.1:8000")
    poll(lambda: running(found), timeout=10, what="exporter and api too: nobody waits for them at the start")
    return found


def running(daemon: Any) -> bool:
    try:
        states = {p["name"]: p["state"] for p in daemon.json("status")["processes"]}
    except LabError:
        return False
    return set(states.values()) == {"running"} and set(states) == set(CHILDREN)


def spawns(daemon: Any) -> bool:
    result = daemon.sandbox("acme", ["/bin/true"])
    return result.status == 0


def status_of(daemon: Any, pid: int) -> dict[str, str]:
    text = daemon.lab.run(["cat", f"/proc/{pid}/status"]).check().out
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


@pytest.mark.parametrize("name", CARDS)
def test_a_process_holds_what_its_card_says_and_no_more(daemon: Any, name: str) -> None:
    status = status_of(daemon, daemon.pids()[name])
    card = CARDS[name]
    bits = sum(1 << capability for capability in card.capabilities)
    kept_back = (1 << Capability.NET_ADMIN | 1 << Capability.SETPCAP) if name == "supervisor" else 0
    found = {key: status[key] for key in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs")}
    assert found == {
        "CapPrm": f"{bits:016x}",
        "CapEff": f"{bits & ~kept_back:016x}",
        "CapBnd": f"{bits:016x}",
        "CapInh": f"{0:016x}",
        "CapAmb": f"{0:016x}",
        "NoNewPrivs": "1",
    }
    assert (status["Uid"].split()[0] == "0") == (card.user == "root")


def test_warden_and_inspector_live_in_the_gateway_and_nobody_else(daemon: Any) -> None:
    def namespace(name: str) -> str:
        pid = daemon.pids()[name]
        return str(daemon.lab.run(["readlink", f"/proc/{pid}/ns/net"]).check().out)

    homes = {name: namespace(name) for name in CARDS}
    inside = {name for name, home in homes.items() if home == homes["warden"]}
    assert inside == {"warden", "inspector"}
    assert len(set(homes.values())) == 2


@pytest.mark.parametrize("name", CHILDREN)
def test_a_process_that_dies_comes_back_and_sandboxes_work_again(daemon: Any, name: str) -> None:
    poll(lambda: running(daemon), timeout=10)
    before = daemon.pids()[name]
    daemon.lab.signal(before, signal.SIGKILL)
    poll(lambda: daemon.pids().get(name, before) != before, timeout=5, what=f"another {name}")
    poll(lambda: running(daemon) and spawns(daemon), timeout=10, what="everything works again")
    outcomes = probe(
        daemon, [("tcp", "plain.test", 7, "x"), ("tcp", "127.0.0.1", 11434, "GET / HTTP/1.0\r\n\r\n")]
    )
    assert [o.result for o in outcomes] == ["ok", "ok"], outcomes


@pytest.mark.parametrize("name", ["warden", "resolver", "relay", "inspector", "auditor", "controller"])
def test_open_streams_go_on_while_a_process_is_replaced(daemon: Any, name: str) -> None:
    poll(lambda: running(daemon), timeout=10)
    with Chatter(daemon, ["tcp4 plain.test 7", "tcp6 plain.test 7"]) as chatter:
        before = daemon.pids()[name]
        daemon.lab.signal(before, signal.SIGKILL)
        poll(lambda: daemon.pids().get(name, before) != before and running(daemon), timeout=10)
        beats = chatter.beats()
        poll(
            lambda: all(
                now > then for now, then in zip(chatter.beats().values(), beats.values(), strict=True)
            )
        )
        assert chatter.events() == []
    account = daemon.counters("acme")
    assert account["balance"]["balanced"], account["balance"]


def test_the_end_of_one_sandbox_is_no_other_s_loss(daemon: Any) -> None:
    poll(lambda: running(daemon), timeout=10)
    before = daemon.json("counters")["late"]["invalid"]
    with Chatter(daemon, ["tcp4 plain.test 7", "tcp6 plain.test 7"]) as chatter:
        for _ in range(3):
            assert [o.result for o in probe(daemon, [("tcp", "plain.test", 7, "x")])] == ["ok"]
            chatter.go_on()
        assert chatter.events() == []
    assert daemon.json("counters")["late"]["invalid"] == before


def replace(daemon: Any, name: str) -> None:
    before = daemon.pids()[name]
    daemon.lab.signal(before, signal.SIGKILL)
    poll(lambda: daemon.pids().get(name, before) != before and running(daemon), timeout=10)


def test_a_sandbox_outlives_the_controller_that_gave_its_lease(daemon: Any) -> None:
    poll(lambda: running(daemon), timeout=10)
    with Resident(daemon) as resident:
        for _ in range(2):
            assert resident.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok"
            replace(daemon, "controller")
        assert resident.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok"
    account = daemon.counters("acme")
    assert account["balance"]["balanced"] and account["ended"]["in"][0] > 0, account["balance"]


@pytest.mark.parametrize("name", CHILDREN)
def test_a_process_that_hangs_is_replaced(daemon: Any, name: str) -> None:
    poll(lambda: running(daemon), timeout=10)
    before = daemon.pids()[name]
    daemon.lab.signal(before, signal.SIGSTOP)
    poll(lambda: daemon.pids().get(name, before) != before, timeout=20, what=f"another {name}")
    poll(lambda: running(daemon) and spawns(daemon), timeout=10, what="everything works again")
    hung, ended = {"name": name, "pid": before}, {"name": name, "pid": before, "status": -signal.SIGKILL}
    poll(lambda: recorded(daemon, "process-hung", hung), timeout=5, what="the record of it")
    poll(lambda: recorded(daemon, "process-ended", ended), timeout=5, what="the record of its end")


def recorded(daemon: Any, event: str, fields: dict[str, Any]) -> bool:
    directory = daemon.lab.path(f"{daemon.directory}/state/journal")
    lines = [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
    found = [record["fields"] for record in map(json.loads, lines) if record["event"] == event]
    return any(fields.items() <= record.items() for record in found)


# ---- the control socket, attacked


def connect(daemon: Any) -> socket.socket:
    sock = daemon.lab.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(5)
    sock.connect(f"/proc/{daemon.lab.keeper_pid}/root{daemon.run_dir}/control.sock")
    return sock  # type: ignore[no-any-return]


ATTACKS = {
    "garbage": [b"\x00\xff\xfe"],
    "half a message": [b'{"type":"Enter","works'],
    "an unknown type": [b'{"type":"Shutdown"}'],
    "the privileged side's words": [b'{"type":"OpenLink","request":1,"link":1,"workspace":"acme","owner":0}'],
    "a message without its descriptor": [b'{"type":"Attach","command":"x"}'],
    "an empty datagram": [b""],
    "a hundred thousand brackets": [b"[" * 100_000],
}


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_client_that_sends_nonsense_is_cut_off_and_nobody_else(daemon: Any, data: list[bytes]) -> None:
    with connect(daemon) as bystander, connect(daemon) as sock:
        for each in data:
            sock.send(each)
        assert sock.recv(1 << 16) == b""
        Channel(bystander, None).send(messages.Ask(what="status"))
        assert bystander.recv(1 << 16)
    assert spawns(daemon)


def test_ten_thousand_messages_from_one_client_hurt_nobody(daemon: Any) -> None:
    with connect(daemon) as sock:
        sock.setblocking(False)
        sent = 0
        for _ in range(10_000):
            try:
                sock.send(b'{"type":"Enter","workspace":"nobody"}')
                sent += 1
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                break
        assert sent > 10
        assert spawns(daemon)
    poll(lambda: running(daemon), timeout=5)


def test_descriptors_that_are_no_namespace_of_the_callers_are_refused(daemon: Any) -> None:
    poll(lambda: running(daemon), timeout=10)
    wrong = {
        "a regular file": os.open(__file__, os.O_RDONLY),
        "/dev/null": os.open("/dev/null", os.O_RDONLY),
        "the host's namespace": daemon.lab.namespace("lab-host"),
        "the gateway": daemon.lab.namespace(daemon.gateway),
        "a mount namespace": os.open("/proc/self/ns/mnt", os.O_RDONLY),
        "a user namespace": os.open("/proc/self/ns/user", os.O_RDONLY),
        "a pipe": os.pipe()[0],
    }
    before = daemon.json("status")["sandboxes"]
    for what, descriptor in wrong.items():
        daemon.policy("acme", POLICY.replace("user:4001", "user:0"))
        with connect(daemon) as sock:
            channel: Channel[Any] = Channel(sock, messages.TO_CLIENT)
            channel.send(messages.Enter(workspace="acme"))
            assert isinstance(channel.receive().message, messages.Terms)
            channel.send(messages.Attach(command="attack"), descriptor=descriptor)
            answer = channel.receive().message
        os.close(descriptor)
        assert isinstance(answer, messages.Refusal) and answer.reason == "namespace", (what, answer)
    assert daemon.json("status")["sandboxes"] == before
    daemon.policy("acme", POLICY)
    assert spawns(daemon)


def test_a_client_that_only_connects_holds_nothing_up(daemon: Any) -> None:
    idle = [connect(daemon) for _ in range(200)]
    assert spawns(daemon)
    for sock in idle:
        sock.close()


def test_only_root_and_the_daemon_may_apply_policies_or_see_the_ruleset(daemon: Any) -> None:
    for words in (["policy", "apply"], ["policy", "diff"], ["ruleset"]):
        result = daemon.ctl(*words, uid=4001)
        assert result.status == 125 and "sudo" in result.err, (words, result)
    assert daemon.ctl("status", uid=4002).out.count("acme") == 0


@pytest.mark.parametrize("verb", [[], ["--foundation"], ["--dismantle"]])
def test_a_second_egressd_keeps_its_hands_off_the_first(daemon: Any, verb: list[str]) -> None:
    before = daemon.json("ruleset")["text"]
    program = daemon.ctl_argv()[0].replace("egressctl", "egressd")
    result = daemon.lab.run([program, "--config", daemon.config_file, *verb])
    assert result.status == 1
    assert "running already" in result.err and str(daemon.pids()["supervisor"]) in result.err
    assert daemon.json("ruleset")["text"].count("chain") == before.count("chain") and spawns(daemon)
