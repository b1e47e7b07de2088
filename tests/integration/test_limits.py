"""Every limit of a workspace, reached for real: the sandbox is told at once, the reason is counted, the books
stay exact, and nobody else is held to it."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from integration import inside
from integration.probe import Resident, probe
from lab.machine import LabError, poll

POLICY = """
workspace: {name}
guard: enforce
members: [user:4001]
allow:
  - {{host: plain.test, ports: [7/tcp, 443/udp], verify: address}}
limits: {limits}
"""
WALL = 124  # as timeout(1)


def policy(name: str, limits: str) -> str:
    return POLICY.format(name=name, limits=limits)


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(
        policies={
            "acme": policy("acme", "{wall: 1s, processes: 20}"),
            "bytes": policy("bytes", "{egress_bytes: 64KiB}"),
            "few": policy("few", "{connections: 5}"),
            "read": policy("read", "{connections: 2}").replace("443/udp], verify: address", "8443/tls]"),
            "memory": policy("memory", "{memory: 96MiB}"),
            "free": policy("free", "{}"),
        }
    )


def exact(daemon: Any, workspace: str) -> dict[str, Any]:
    account = inside.counters(daemon, workspace)
    assert account["balance"]["balanced"] and account["balance"]["difference"] == [0, 0], account["balance"]
    return account


def test_wall(daemon: Any) -> None:
    began = time.monotonic()
    result = daemon.sandbox("acme", ["/bin/sleep", "60"])
    assert result.status == WALL and "wall limit of 1 s" in result.err, result
    assert 0.9 < time.monotonic() - began < 3.0
    assert daemon.sandbox("acme", ["/bin/true"]).status == 0


def test_wall_ends_what_ignores_it(daemon: Any) -> None:
    text = (
        "import signal, os, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "os.fork(); time.sleep(60)"
    )
    result = daemon.sandbox("acme", ["/usr/bin/python3", "-c", text])
    assert result.status == WALL


def test_memory(daemon: Any) -> None:
    text = "x = bytearray({} << 20)\nprint('had it')"
    enough = daemon.sandbox("memory", ["/usr/bin/python3", "-c", text.format(32)])
    much = daemon.sandbox("memory", ["/usr/bin/python3", "-c", text.format(200)])
    assert enough.out == "had it\n", enough
    assert much.status != 0 and "had it" not in much.out, much
    assert "MemoryError" in much.err or much.status == 137
    shared = "f = open('/dev/shm/x', 'wb')\nf.write(bytes(200 << 20))\nf.flush()"
    full = daemon.sandbox("memory", ["/usr/bin/python3", "-c", shared])
    assert full.status != 0 and ("No space left" in full.err or "MemoryError" in full.err), full


def test_processes(daemon: Any) -> None:
    text = (
        "import os, time\ncount = 0\n"
        "try:\n    while count < 100:\n        if os.fork() == 0: time.sleep(60)\n        count += 1\n"
        "except OSError as error: print(count, error.errno)\n"
        "else: print(count, 0)\n"
    )
    count, errno = map(int, daemon.sandbox("acme", ["/usr/bin/python3", "-c", text]).out.split())
    assert 5 < count < 20 and errno == 11, "EAGAIN before the limit of twenty"


def test_egress_bytes(daemon: Any) -> None:
    """What is over is refused like everything else that is denied, counted as `quota`; a reset and an ICMP
    error are answers, so nothing times out."""
    with (
        Resident(daemon, workspace="bytes", timeout=1.0) as resident,
        Resident(daemon, workspace="free") as free,
    ):
        first, *_ = resident.tries(("tcp", "plain.test", 7, "x" * 1000))
        assert first.result == "ok"
        plain4 = resident.tries(("resolve", "plain.test", "4"))[0].data
        plain6 = resident.tries(("resolve", "plain.test", "6"))[0].data
        resident.tries(*(("udp", plain4, 443, "x" * 1400) for _ in range(60)))
        spent = resident.tries(*(("tcp", where, 7, "x") for where in (plain4, plain6)),
                               *(("udp", where, 443, "x") for where in (plain4, plain6)))  # fmt: skip
        assert {o.result for o in spent} == {"ECONNREFUSED"}, spent
        assert max(o.milliseconds for o in spent) < 50
        account = exact(daemon, "bytes")
        (link,) = account["links"]
        assert link["ok"][1] <= 65536 < link["ok"][1] + 1500, "to the packet"
        assert account["denied"]["quota"][0] >= 4
        assert account["denied"]["quota"] == link["denied"]
        assert free.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok", "nobody else's limit"
    again = probe(daemon, [("tcp", "plain.test", 7, "x")], workspace="bytes")
    assert again[0].result == "ok", "a limit is each sandbox's own"


def test_a_policy_change_does_not_give_the_bytes_back(daemon: Any) -> None:
    with Resident(daemon, workspace="bytes", timeout=1.0) as resident:
        plain4 = resident.tries(("resolve", "plain.test", "4"))[0].data
        resident.tries(*(("udp", plain4, 443, "x" * 1400) for _ in range(60)))
        daemon.policy("bytes", policy("bytes", "{egress_bytes: 64KiB, connections: 50}"))
        assert resident.tries(("tcp", plain4, 7, "x"))[0].result == "ECONNREFUSED"
        daemon.policy("bytes", policy("bytes", "{egress_bytes: 64KiB}"))


def test_connections(daemon: Any) -> None:
    text = (
        "import socket, sys, json\nheld, errors = [], []\n"
        "for n in range(9):\n"
        "    try: held.append(socket.create_connection(('plain.test', 7), timeout=2))\n"
        "    except OSError as error: errors.append(error.errno or 0)\n"
        "print(len(held), errors)\n"
        "held.pop().close(); held.pop().close()\n"
    )
    before = exact(daemon, "few")["late"]["connections"]
    result = daemon.sandbox("few", ["/usr/bin/python3", "-c", text]).check()
    assert result.out == "5 [111, 111, 111, 111]\n", result
    after = exact(daemon, "few")["late"]["connections"]
    # both families of the name are tried, and each refusal is counted
    assert after[0] - before[0] == 8, (before, after)


def test_udp_flows_are_connections_too(daemon: Any) -> None:
    with Resident(daemon, workspace="few") as resident:
        plain4 = resident.tries(("resolve", "plain.test", "4"))[0].data
        tried = resident.tries(*(("udp", plain4, 443, "x") for _ in range(8)))
        assert [o.result for o in tried] == ["ok"] * 5 + ["ECONNREFUSED"] * 3, tried
        exact(daemon, "few")


def running(daemon: Any) -> bool:
    try:
        return all(process["state"] == "running" for process in daemon.json("status")["processes"])
    except LabError:
        return False


def addresses(resident: Resident) -> tuple[str, str]:
    found = resident.tries(*(("resolve", "plain.test", family) for family in "46"))
    return found[0].data, found[1].data


def refusals(daemon: Any, resident: Resident, *attempts: tuple[Any, ...]) -> None:
    """Each is refused at once, counted once, in exact books."""
    before = exact(daemon, "few")["late"]["connections"][0]
    tried = resident.tries(*attempts)
    assert {o.result for o in tried} == {"ECONNREFUSED"}, tried
    assert max(o.milliseconds for o in tried) < 50, tried
    assert exact(daemon, "few")["late"]["connections"][0] - before == len(attempts)


def everything(addresses: tuple[str, ...]) -> list[tuple[Any, ...]]:
    return [(kind, where, port, "x") for where in addresses for kind, port in (("tcp", 7), ("udp", 443))]


def test_a_limit_of_connections_holds_after_idleness(daemon: Any) -> None:
    """Both families and both protocols together, whatever happened before."""
    with (
        Resident(daemon, workspace="few") as resident,
        Resident(daemon, workspace="free") as free,
    ):
        four, six = where = addresses(resident)
        for _ in range(2):
            time.sleep(2.5)  # the kernel looks every second for limits that count nothing (nft_connlimit_gc)
            held = resident.tries(*(("hold", at, 7) for at in (four, six, four, six, four)))
            assert [o.result for o in held] == ["ok"] * 5, held
            refusals(daemon, resident, *everything(where))
            assert daemon.json("policy", "diff")["drift"] == []
            assert daemon.ctl("policy", "diff").check().out.startswith("no changes")
            assert free.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok", "nobody else's limit"
            resident.tries(("release", 5))
        assert daemon.json("policy", "diff")["drift"] == []


def test_a_connection_that_is_closed_gives_its_place_to_one_other(daemon: Any) -> None:
    with Resident(daemon, workspace="few") as resident:
        four, six = where = addresses(resident)
        assert [o.result for o in resident.tries(*[("hold", four, 7)] * 5)] == ["ok"] * 5
        for at in (six, four):
            resident.tries(("release", 1))
            poll(lambda at=at: resident.tries(("hold", at, 7))[0].result == "ok", what="a place")
            refusals(daemon, resident, *everything(where))


def test_connections_that_are_read_count(daemon: Any) -> None:
    with Resident(daemon, workspace="read") as resident:
        four, six = addresses(resident)
        assert [o.result for o in resident.tries(("hold", four, 8443), ("hold", six, 8443))] == ["ok"] * 2
        before = exact(daemon, "read")["late"]["connections"][0]
        tried = resident.tries(("hold", four, 8443), ("hold", six, 8443), ("tcp", four, 7, "x"))
        assert {o.result for o in tried} == {"ECONNREFUSED"} and max(o.milliseconds for o in tried) < 50
        assert exact(daemon, "read")["late"]["connections"][0] - before == 3


def test_a_changed_limit_of_connections(daemon: Any) -> None:
    """What is open lives on and counts no more; from the change on there are so many others."""
    with Resident(daemon, workspace="few") as resident:
        four, six = where = addresses(resident)
        assert [o.result for o in resident.tries(*[("hold", four, 7)] * 5)] == ["ok"] * 5
        refusals(daemon, resident, *everything(where))
        for limit in (2, 7):
            daemon.policy("few", policy("few", f"{{connections: {limit}}}"))
            assert {o.result for o in resident.tries(*[("hold", six, 7)] * limit)} == {"ok"}
            refusals(daemon, resident, *everything(where))
        daemon.policy("few", policy("few", "{}"))
        assert {o.result for o in resident.tries(*[("hold", six, 7)] * 9)} == {"ok"}
        daemon.policy("few", policy("few", "{connections: 5}"))
        assert daemon.json("policy", "diff")["drift"] == []
    with Resident(daemon, workspace="few") as resident:
        four, six = where = addresses(resident)
        assert [o.result for o in resident.tries(*[("hold", six, 7)] * 5)] == ["ok"] * 5
        refusals(daemon, resident, *everything(where))


def test_a_limit_of_connections_counts_on_while_the_warden_is_replaced(daemon: Any) -> None:
    with Resident(daemon, workspace="few") as resident:
        where = addresses(resident)
        assert [o.result for o in resident.tries(*[("hold", where[0], 7)] * 5)] == ["ok"] * 5
        before = daemon.pids()["warden"]
        daemon.lab.signal(before, signal.SIGKILL)
        poll(lambda: daemon.pids().get("warden", before) != before, timeout=5, what="another warden")
        poll(lambda: running(daemon), timeout=10, what="everything works again")
        refusals(daemon, resident, *everything(where))
        assert daemon.json("policy", "diff")["drift"] == []
