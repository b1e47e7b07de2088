"""egressd ends and starts again while sandboxes are at work: what stays, what goes, and what is on record."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from egressd.ruleset.layout import RESOLVER4
from integration import service_manager
from integration.chatter import Chatter
from integration.probe import Resident, probe
from lab import topology as t
from lab.daemon import Daemon
from lab.internet import Internet
from lab.machine import Lab, poll

pytestmark = pytest.mark.kernel

POLICY = """
workspace: acme
guard: enforce
members: [user:4001]
allow:
  - {host: plain.test, ports: [7/tcp], verify: address}
  - {host: one.cdn.test, ports: [7/tcp], verify: address}
"""
OTHER = POLICY.replace("one.cdn.test", "two.cdn.test")
FLOWS = ["tcp4 plain.test 7", "tcp6 plain.test 7"]


def journal(lab: Lab) -> list[dict[str, Any]]:
    directory = lab.path("daemon-egressd/state/journal")
    lines = [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


class Told(Daemon):
    """Its records are those since it was made: the lab's journal is one."""

    def __init__(self, lab: Lab, **options: Any) -> None:
        super().__init__(lab, **options)
        self.before = len(journal(lab))
        lab.path(f"{self.directory}/state/unrecorded.jsonl").unlink(missing_ok=True)


def records(daemon: Told, event: str) -> list[dict[str, Any]]:
    return [record["fields"] for record in journal(daemon.lab)[daemon.before :] if record["event"] == event]


@pytest.fixture
def daemon(lab: Lab, internet: Internet) -> Iterator[Told]:
    with lab.leaving_nothing(), Told(lab, policies={"acme": POLICY}) as made:
        yield made


def links(daemon: Told) -> list[str]:
    """Number and name of each sandbox's link in the gateway: made anew, a link has the same name, and this
    tells."""
    text = daemon.lab.run(["ip", "-o", "link", "show", "group", "53"], where=daemon.gateway).check().out
    return [" ".join(line.split()[:2]) for line in text.splitlines()]


def rules(daemon: Told) -> list[str]:
    """Of the links' chains, with their handles, so that the same rules made anew are others."""
    text = (
        daemon.lab.run(["nft", "-s", "-a", "list", "table", "netdev", "egressd"], where=daemon.gateway)
        .check()
        .out
    )
    return [line for line in text.splitlines() if '"eg' in line or "chain eg" in line]


def balanced(daemon: Told) -> bool:
    return bool(daemon.counters("acme")["balance"]["balanced"])


def admitted(daemon: Told) -> int:
    return int(daemon.counters("acme")["balance"]["admitted"][0])


@pytest.mark.parametrize("how", ["leave", "kill"])
def test_a_sandbox_and_its_streams_outlive_egressd(daemon: Told, how: str) -> None:
    """`leave`: a restart that was asked for. `kill`: every process at once."""
    with Chatter(daemon, FLOWS) as chatter:
        before = links(daemon), rules(daemon), admitted(daemon)
        getattr(daemon, how)()
        chatter.go_on()
        daemon.start()
        chatter.go_on()
        poll(lambda: len(records(daemon, "sandbox-resumed")) == 1, what="the sandbox is taken over")
        assert (links(daemon), rules(daemon)) == before[:2]
        assert admitted(daemon) > before[2] > 0
        assert chatter.events() == []
        assert balanced(daemon)
    poll(lambda: records(daemon, "sandbox-closed"), what="its end is on record")
    assert (records(daemon, "sandbox-lost"), links(daemon)) == ([], [])
    assert balanced(daemon)


def test_a_policy_that_changed_meanwhile_is_what_holds_afterwards(daemon: Told) -> None:
    with Chatter(daemon, [*FLOWS, "tcp4 one.cdn.test 7"]) as chatter, Resident(daemon) as resident:
        daemon.leave()
        daemon.write_policy("acme", OTHER)
        daemon.start()
        chatter.wait_for_failure("tcp4 one.cdn.test 7")
        beats = chatter.beats()
        poll(lambda: all(chatter.beats()[flow] > beats[flow] for flow in FLOWS), what="the others go on")
        assert {event["flow"] for event in chatter.events()} == {"tcp4 one.cdn.test 7"}
        poll(lambda: len(records(daemon, "sandbox-resumed")) == 2, what="both are taken over")
        one, two = resident.tries(("tcp", "one.cdn.test", 7, "x"), ("tcp", "two.cdn.test", 7, "x"))
        assert (one.result, two.result) == ("EAI_NONAME", "ok")
        assert balanced(daemon)


def test_a_gateway_that_cannot_be_adopted_begins_anew_and_nobody_is_forgotten(daemon: Told) -> None:
    resident = Resident(daemon)
    assert resident.tries(("tcp", "plain.test", 7, "x"))[0].result == "ok"
    (link,) = daemon.sandbox_links()
    daemon.leave()
    state = f"{daemon.run_dir}/gateway.json"
    daemon.lab.run(["sed", "-i", 's/"base":"[0-9a-f]*"/"base":"of another version"/', state]).check()
    daemon.start()
    assert resident.process.wait(30) == 125
    poll(lambda: records(daemon, "sandbox-lost"), what="the sandbox is on record as lost")
    (lost,) = records(daemon, "sandbox-lost")
    assert (lost["link"], lost["workspace"], lost["uid"]) == (link, "acme", 4001)
    assert "another version of egressd" in lost["why"] and lost["in_packets"] > 0
    assert [begun["links"] for begun in records(daemon, "gateway-begun")] == [0, 1]
    assert links(daemon) == []
    assert [o.result for o in probe(daemon, [("tcp", "plain.test", 7, "x")])] == ["ok"]
    assert balanced(daemon)


def test_a_stop_ends_the_sandboxes_and_keeps_the_denial(daemon: Told) -> None:
    resident = Resident(daemon)
    daemon.stop(dismantle=False)
    assert resident.process.wait(10) == 125
    assert "stopping" in resident.process.err
    assert links(daemon) == []
    assert "unmarked" in daemon.lab.run(["nft", "list", "table", "inet", "egressd"], where=daemon.gateway).out
    daemon.start()
    assert (records(daemon, "sandbox-lost"), records(daemon, "sandbox-resumed")) == ([], [])
    assert len(records(daemon, "gateway-begun")) == 1, "it was adopted"
    assert balanced(daemon)


def test_opening_up_is_on_record(daemon: Told) -> None:
    daemon.stop()
    daemon.start()
    poll(lambda: records(daemon, "gateway-dismantled"), what="the record of it")
    (fields,) = records(daemon, "gateway-dismantled")
    assert (fields["gateway"], fields["uid"]) == ("egressd", 0)
    daemon.stop(dismantle=False)
    daemon.start()
    assert len(records(daemon, "gateway-dismantled")) == 1


# ---- stopped for a while


@pytest.mark.slow
def test_nobody_hangs_with_one_that_is_stopped(daemon: Told) -> None:
    """A moment each: what does not need it goes on, and afterwards it is the same process."""
    pids = daemon.pids()
    with Chatter(daemon, FLOWS) as chatter:
        for name, pid in pids.items():
            daemon.lab.signal(pid, signal.SIGSTOP)
            try:
                until = time.monotonic() + 1.5
                while time.monotonic() < until:
                    chatter.go_on()
                    if name not in ("controller", "warden"):  # who answers, and whose numbers they are
                        assert daemon.ask("status"), name
                    time.sleep(0.2)
            finally:
                daemon.lab.signal(pid, signal.SIGCONT)
            poll(lambda: daemon.sandbox("acme", ["true"]).status == 0, timeout=10, what=f"with {name} again")
        assert chatter.events() == []
    assert daemon.pids() == pids, "nobody was killed for it"
    assert balanced(daemon)


# ---- with a service manager that keeps descriptors

NAMES = [
    "control",
    "ended",
    "flows",
    "inspect4",
    "inspect6",
    "nflog",
    "relay4",
    "relay6",
    "tcp4",
    "tcp6",
    "udp4",
    "udp6",
]


class Managed(Told):
    """Started by something like systemd, which keeps its sockets."""

    @property
    def argv(self) -> list[str]:
        program = Path(service_manager.__file__).read_text()
        return ["/usr/bin/python3", "-I", "-c", program, f"{self.run_dir}-notify", *super().argv]

    def tell(self, *words: str) -> str:
        """The manager's answer."""
        process = self.process
        assert process is not None
        before = len(process.out.splitlines())
        process.stdin.write(" ".join(words).encode() + b"\n")
        poll(lambda: len(process.out.splitlines()) > before, timeout=20, what=f"an answer to {words}")
        return process.out.splitlines()[before]

    def resume(self) -> None:
        assert self.tell("start") == "ready"

    def kept(self) -> list[str]:
        found: list[str] = json.loads(self.tell("store"))
        return found

    def sockets(self) -> set[str]:
        """Inode numbers of the sockets that live in the gateway or listen on the host: of these, two that are
        equal are one."""
        found = set()
        for name in ("auditor", "controller", "resolver", "relay", "inspector", "custodian"):
            directory = f"/proc/{self.pids()[name]}/fd"
            text = self.lab.run(["sh", "-c", f"readlink {directory}/* | sort"]).out
            found |= {f"{name} {line}" for line in text.splitlines() if line.startswith("socket:")}
        return found


@pytest.fixture
def managed(lab: Lab, internet: Internet) -> Iterator[Managed]:
    with lab.leaving_nothing(), Managed(lab, policies={"acme": POLICY}) as made:
        yield made
    lab.run(["rm", "-f", f"{made.run_dir}-notify"])


def test_sockets_are_kept_and_what_arrives_meanwhile_waits_in_them(managed: Managed) -> None:
    poll(lambda: managed.kept() == NAMES, what="all are kept")
    with Resident(managed, timeout=20.0) as resident:
        (link,) = managed.sandbox_links()
        before = managed.sockets()
        assert managed.tell("stop") == "stopped"
        # asked while nobody is there: a name, whose answer comes later; a connection, refused by the kernel
        refused = resident.tries(("tcp", str(t.EVIL4), 4711, "x"))[0]
        assert refused.result in ("EACCES", "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH"), refused
        client = managed.lab.start(managed.ctl_argv("--json", "status"))
        resident.process.stdin.write(json.dumps([["ask", str(RESOLVER4), "plain.test"]]).encode() + b"\n")
        managed.resume()
        poll(lambda: resident.process.out.count("\n") >= 3, timeout=20, what="the name's answer")
        result, _, said = json.loads(resident.process.out.splitlines()[2])[0]
        assert (result, said) == ("ok", "rcode 0")
        assert client.wait(20) == 0, client.err
        poll(lambda: len(managed.sockets() & before) == len(NAMES), what="the very same sockets")
        poll(
            lambda: any(r.get("port") == 4711 for r in records(managed, "denied")),
            what="the denial, recorded",
        )
        assert [r["link"] for r in records(managed, "denied") if r.get("port") == 4711] == [link]
        poll(lambda: records(managed, "sandbox-resumed"), what="it is taken over")
    assert managed.kept() == NAMES


def denied(daemon: Told, port: int) -> list[str]:
    """Whose links."""
    return [record["link"] for record in records(daemon, "denied") if record.get("port") == port]


@pytest.mark.parametrize("harm", ["swap control nflog", "spoil flows"])
def test_what_is_not_what_it_is_called_is_made_anew(managed: Managed, harm: str) -> None:
    poll(lambda: managed.kept() == NAMES, what="all are kept")
    managed.tell("stop")
    managed.tell(*harm.split())
    managed.resume()
    assert [o.result for o in probe(managed, [("tcp", "plain.test", 7, "x")])] == ["ok"]
    poll(lambda: managed.kept() == NAMES, what="all are kept again")
    assert "cannot be used" in managed.log
    managed.tell("stop")
    managed.resume()
    assert managed.log.count("cannot be used") < 3
    poll(lambda: balanced(managed), what="the books balance")
