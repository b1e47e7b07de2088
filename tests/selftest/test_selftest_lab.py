"""The self-test on a live installation: all is refused where all is well, and what is broken is found."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lab import topology
from lab.machine import VENV, Result, poll

POLICY = """
workspace: acme
guard: {guard}
members: [user:4001]
allow:
  - host: eu.api.openai.test
  - {{host: plain.test, ports: [7/tcp, 443/udp], verify: address}}
  - {{cidr: 10.255.255.0/24, ports: [80/tcp, 80/udp]}}
  - local: ollama
"""
# egressctl as somebody would have it who forgot the filter: bubblewrap is given one that allows all.
WITHOUT_FILTER = """
import struct, sys
from egressd.sandbox import seccomp
seccomp.program = lambda: struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)  # BPF_RET, SECCOMP_RET_ALLOW
from egressd.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(policies={"acme": POLICY.format(guard="enforce")})


def selftest(daemon: Any, *words: str, broken: bool = False) -> tuple[Result, Any]:
    argv = daemon.ctl_argv("--json", "selftest", "-w", "acme", *words)
    if broken:
        argv = [str(VENV / "bin" / "python"), "-c", WITHOUT_FILTER, *argv[1:]]
    result = daemon.lab.run(argv, uid=daemon.lab.user, timeout=120)
    return result, json.loads(result.out)


def escaped(found: Any) -> set[str]:
    return {f"{w['group']}: {w['name']}" for w in found["ways"] if w["verdict"] == "ESCAPED"}


def wrong(found: Any) -> list[Any]:
    return [way for way in found["ways"] if way["verdict"] not in ("refused", "not tried")]


def test_all_is_refused_counted_and_put_on_record(daemon: Any, uplink: Any) -> None:
    since = uplink.settle()
    result, found = selftest(daemon)
    assert wrong(found) == [] and (result.status, found["escaped"], found["unclear"]) == (0, 0, 0)
    assert found["tried"] >= 500 and found["refused"] == found["tried"]
    assert found["tried"] + found["not_tried"] == len(found["ways"])
    untried = {way["why"] for way in found["ways"] if way["verdict"] == "not tried"}
    assert all(why.startswith(("this kernel has no ", "the policy lists 10.255.255.0/24")) for why in untried)
    assert "the policy lists 10.255.255.0/24" in untried
    assert {w["group"] for w in found["ways"] if w["verdict"] == "refused"} >= {"TLS", "names", "frames"}
    # The books say the same: what was sent over that link is what the table says, and the honest questions.
    (closed,) = poll(
        lambda: [r for r in records(daemon, "sandbox-closed") if r["link"] == found["link"]], timeout=30
    )
    for name in ("denied", "other"):
        assert closed[f"{name}_packets"] == sum(way[name] for way in found["ways"]), name
    assert closed["in_packets"] >= sum(way["sent"] for way in found["ways"])
    (said,) = records(daemon, "selftest")
    assert found["recorded"] and said["table"] == found["table"] and said["link"] == found["link"]
    assert (said["tried"], said["escaped"], said["broker_uid"]) == (found["tried"], 0, daemon.lab.user)
    uplink.assert_only_to(topology.DNS4, topology.DNS6, topology.OPENAI4, topology.OPENAI6, since=since)
    assert daemon.json("counters")["balanced"]


def records(daemon: Any, event: str) -> list[dict[str, Any]]:
    result = daemon.ctl("--json", "audit", "--event", event)
    return [json.loads(line)["fields"] for line in result.out.splitlines()]


def test_a_member_proves_it(daemon: Any) -> None:
    place = daemon.lab.inside("selftest.proof")
    daemon.ctl("proof", "-w", "acme", "-o", place).check()
    result = daemon.lab.run([str(VENV / "bin" / "egressctl"), "verify", place]).check()
    assert "Self-test over eg" in result.out and "0 escaped" in result.out
    assert "by its caller's word" in result.out


def test_without_the_filter_what_it_holds_back_escapes(daemon: Any) -> None:
    result, found = selftest(daemon, "--only", "kernel", broken=True)
    assert result.status == 2 and not found["recorded"]
    assert escaped(found) >= {
        "kernel: a new user namespace (unshare)", "kernel: a new user namespace (clone)",
        "kernel: io_uring_setup", "kernel: a program in the kernel (bpf)",
        "kernel: clone3, whose flags no filter sees", "kernel: typing into the terminal (TIOCSTI)",
    }  # fmt: skip
    result, found = selftest(daemon, "--only", "protocols", broken=True)
    assert result.status == 2
    assert escaped(found) >= {
        "protocols: netlink: netfilter (nft)", "protocols: a socket of family packet",
        "protocols: a vsock socket, the family's upper half set",
    }  # fmt: skip


def test_a_run_without_the_filter_is_called_off_by_the_preflight(daemon: Any) -> None:
    argv = daemon.ctl_argv("run", "-w", "acme", "--preflight", "--", "echo", "ran")
    argv = [str(VENV / "bin" / "python"), "-c", WITHOUT_FILTER, *argv[1:]]
    result = daemon.lab.run(argv, uid=daemon.lab.user)
    assert (result.status, result.out) == (125, "")
    assert "preflight: a new user namespace is not refused: nothing is run" in result.err
    whole = daemon.sandbox("acme", ["sh", "-c", "cat; echo ran"], "--preflight")
    assert (whole.status, whole.out, whole.err) == (0, "ran\n", "")


def test_where_the_guard_only_observes_addresses_escape(daemon: Any) -> None:
    daemon.policy("acme", POLICY.format(guard="observe"))
    try:
        result, found = selftest(daemon, "--only", "*raw address, h*")
        assert result.status == 2 and found["guard"] == "observe"
        assert {way["verdict"] for way in found["ways"]} == {"ESCAPED"}
        assert {way["ok"] >= 1 for way in found["ways"]} == {True}
        run = daemon.sandbox("acme", ["echo", "ran"], "--preflight")
        assert (run.status, run.out) == (125, "")
        assert "preflight: a raw IPv4 address is not refused: nothing is run" in run.err
    finally:
        daemon.policy("acme", POLICY.format(guard="enforce"))


def test_who_is_no_member_tests_nothing(daemon: Any) -> None:
    result = daemon.ctl("selftest", "-w", "acme", uid=4002)
    assert result.status == 125 and "uid 4002 is not a member" in result.err


def test_only_one_workspace_need_not_be_named(daemon: Any) -> None:
    result = daemon.ctl("selftest", "--only", "a reboot", uid=daemon.lab.user)
    assert result.status == 0 and "1 ways tried, 1 refused, 0 escaped; 0 not tried" in result.out


def test_nothing_stays(daemon: Any) -> None:
    assert daemon.sandbox_links() == []
