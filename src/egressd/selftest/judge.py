"""Tries every way out of a throw-away sandbox, and judges by what came of it and by what the link counted.

One sandbox, made as any other is (`sandbox.launch`). In it runs `shown/attacks.py`, which tries what it is
told to; in its network, from outside, the `companion`, which sends `frames` and knows how many frames went
into the link. After each attempt the counters of the link are read over the connection that holds the lease
(`ReadSpent`), so three witnesses have to agree: who tried, the sandbox's end, and the gateway's.

An attempt is *refused* if it ended as it must and every frame of it was counted where it must; *escaped* if
something was admitted, reached, opened or done; *unclear* if it came to nothing, but not in the way it must.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH100, PTH110, PTH120, PTH123
from __future__ import annotations

import contextlib
import enum
import fnmatch
import hashlib
import json
import os
import platform
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

from egressd import __version__
from egressd.ipc import messages
from egressd.model.errors import KernelError, Refused
from egressd.model.verdicts import Reason
from egressd.ruleset.layout import Pools
from egressd.sandbox import launch
from egressd.sandbox.control import DEFAULT_RUN_DIR, Control, Fact
from egressd.selftest.companion import Companion
from egressd.selftest.frames import FRAMES, Ends
from egressd.selftest.preflight import interpreter
from egressd.selftest.shown import attacks

__all__ = [
    "EVENT",
    "Counts",
    "Report",
    "Row",
    "Verdict",
    "Way",
    "chosen",
    "judged",
    "kernel_has",
    "run",
    "ways",
]

EVENT: Final = "selftest"
SHOWN = os.path.dirname(os.path.abspath(attacks.__file__))
_PROGRAM = "/opt/egressd/attacks.py"
_PATIENCE = 20.0  # seconds for one attempt, after which the sandbox is taken for dead
_LATE = 0.2  # seconds for frames that come late, before a second try
_COUNTED = 0.5  # seconds within which what was sent has been counted
_WALL = 300.0  # seconds for all of it


class Verdict(enum.StrEnum):
    REFUSED = "refused"
    ESCAPED = "ESCAPED"
    UNCLEAR = "unclear"
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class Way:
    """A way out: row `number` of the table, from 1. `frame` for those that the companion sends."""

    number: int
    group: str
    name: str
    family: str
    must: tuple[str, ...]
    counted: str
    place: int
    frame: bool

    def __str__(self) -> str:
        return f"{self.group}: {self.name}" + ("" if self.family == "-" else f" ({self.family})")


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one. `sent` frames left the sandbox; the link counted the rest of the numbers."""

    number: int
    group: str
    name: str
    family: str
    must: tuple[str, ...]
    counted: str
    happened: str
    verdict: Verdict
    why: str = ""
    sent: int = 0
    ok: int = 0
    denied: int = 0
    other: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    workspace: str
    guard: str
    policy: str
    link: str
    rows: tuple[Row, ...]
    seconds: float
    whole: bool  # every way of the table was looked at
    recorded: bool = False
    unrecorded: str = ""  # why not
    version: str = __version__

    def count(self, verdict: Verdict) -> int:
        return sum(row.verdict is verdict for row in self.rows)

    @property
    def tried(self) -> int:
        return len(self.rows) - self.count(Verdict.NOT_TRIED)

    @property
    def table(self) -> str:
        """The digest of what was tried, what happened and the verdicts: of the rows as JSON, keys sorted."""
        return _digest(self.rows)

    def document(self) -> dict[str, Any]:
        """For programs; also what `egressctl selftest --json` prints."""
        return {
            "workspace": self.workspace,
            "guard": self.guard,
            "policy": self.policy,
            "link": self.link,
            "version": self.version,
            "seconds": round(self.seconds, 3),
            "whole": self.whole,
            **self.counts(),
            "table": self.table,
            "recorded": self.recorded,
            "unrecorded": self.unrecorded,
            "ways": [_plain(row) for row in self.rows],
        }

    def counts(self) -> dict[str, int]:
        return {
            "tried": self.tried,
            "refused": self.count(Verdict.REFUSED),
            "escaped": self.count(Verdict.ESCAPED),
            "unclear": self.count(Verdict.UNCLEAR),
            "not_tried": self.count(Verdict.NOT_TRIED),
        }


def ways() -> tuple[Way, ...]:
    """The whole table: what is tried from inside, then the frames."""
    inside = [
        Way(n, a.group, a.name, a.family, a.must, a.counted, n - 1, frame=False)
        for n, a in enumerate(attacks.ATTACKS, 1)
    ]
    sent = [
        Way(len(inside) + n, "frames", f.name, f.family, ("sent",), f.counted, n - 1, frame=True)
        for n, f in enumerate(FRAMES, 1)
    ]
    return (*inside, *sent)


def chosen(pattern: str | None) -> tuple[Way, ...]:
    """Those whose number, group or description matches: a number, `*` and `?`, or a part of the text."""
    if pattern is None:
        return ways()
    wanted = pattern.lower()
    if wanted.isdigit():
        return tuple(way for way in ways() if way.number == int(wanted))
    glob = wanted if any(c in wanted for c in "*?[") else f"*{wanted}*"
    return tuple(way for way in ways() if fnmatch.fnmatchcase(str(way).lower(), glob))


def run(
    workspace: str,
    *,
    run_dir: str = DEFAULT_RUN_DIR,
    only: str | None = None,
    record: bool = True,
    told: Callable[[Row], None] | None = None,
) -> Report:
    """Try them. `told` hears of each as it is judged. `Refused`, `KernelError`, `OSError`: it cannot be said.

    Only a whole table goes on record. The caller must have no threads (companion.py).
    """
    wanted = chosen(only)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        asked = _Asked(workspace, run_dir)
        witness = stack.enter_context(_Witness())
        scene = stack.enter_context(_Scene(asked, witness))
        rows = []
        for way in wanted:
            rows.append(scene.judge(way))
            if told is not None:
                told(rows[-1])
        report = Report(
            workspace=workspace,
            guard=asked.terms.guard,
            policy=scene.running.policy,
            link=f"eg{scene.running.link}",
            rows=tuple(rows),
            seconds=time.monotonic() - began,
            whole=only is None,
        )
        return _recorded(report, scene.control) if record and only is None else report


def _recorded(report: Report, control: Control) -> Report:
    """Over the connection that holds the lease, as its holder's word."""
    fields: dict[str, Fact] = {**report.counts(), "table": report.table, "version": report.version}
    try:
        control.testify(EVENT, fields)
    except Refused as refused:
        return _with(report, unrecorded=str(refused))
    return _with(report, recorded=True)


def _with(report: Report, **changes: Any) -> Report:
    return Report(**{**{name: getattr(report, name) for name in Report.__slots__}, **changes})


def _plain(row: Row) -> dict[str, Any]:
    return {**asdict(row), "must": list(row.must), "verdict": row.verdict.value}


def _digest(rows: tuple[Row, ...]) -> str:
    text = json.dumps([_plain(row) for row in rows], sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


# --------------------------------------------------------------------------------------------------
# what is asked before


class _Asked:
    """The terms, and of the policy what the attacks need."""

    def __init__(self, workspace: str, run_dir: str) -> None:
        self.workspace, self.run_dir = workspace, run_dir
        with Control(run_dir) as control:
            self.terms: messages.Terms = control.enter(workspace)
        with Control(run_dir) as control:
            self.policy: Mapping[str, Any] = control.ask("policy", workspace=workspace)

    def networks(self) -> Iterator[Any]:
        """Which the policy lists as they are."""
        for rule in self.policy.get("rules", ()):
            if rule["kind"] == "cidr":
                yield ip_network(rule["network"])

    def hosts(self) -> list[Mapping[str, Any]]:
        """Listed by name, without wildcards; first those whose TLS is read and may not be encrypted."""
        found = [r for r in self.policy.get("rules", ()) if r["kind"] == "host" and "*" not in r["host"]]
        return sorted(found, key=lambda rule: (_read_port(rule) is None, rule["host"]))[:4]


def _read_port(rule: Mapping[str, Any]) -> int | None:
    if rule["ech"] != "refuse":
        return None
    for port, verify in rule["verify"].items():
        number, _, protocol = port.partition("/")
        if verify == "sni" and protocol == "tcp" and number.isdigit():
            return int(number)
    return None


class _Witness:
    """Sockets of the host that no sandbox may reach. Who connects all the same has escaped."""

    def __init__(self) -> None:
        self.abstract = f"egressd-selftest-{secrets.token_hex(8)}"
        self._tcp = socket.create_server(("127.0.0.1", 0))
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unix.bind("\0" + self.abstract)
        self._unix.listen()
        for sock in (self._tcp, self._unix):
            sock.setblocking(False)
        self.port: int = self._tcp.getsockname()[1]

    def seen(self) -> bool:
        for sock in (self._tcp, self._unix):
            with contextlib.suppress(OSError):
                sock.accept()[0].close()
                return True
        return False

    def __enter__(self) -> _Witness:
        return self

    def __exit__(self, *_: Any) -> None:
        self._tcp.close()
        self._unix.close()


def _host_addresses() -> dict[str, str]:
    """One address of each family that is this machine's own and not a loopback's; "" for none."""
    return {"host4": _host4(), "host6": _host6()}


def _host4() -> str:
    """A /32 that is local, of the routing tables (/proc/net/fib_trie)."""
    last = ""
    with contextlib.suppress(OSError), open("/proc/net/fib_trie", encoding="ascii") as stream:
        for line in stream:
            words = line.split()
            if len(words) == 2 and words[0] == "|--":
                last = words[1]
            elif words[:3] == ["/32", "host", "LOCAL"] and _is_ordinary(last):
                return last
    return ""


def _host6() -> str:
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as stream:
        for line in stream:
            address = str(IPv6Address(int(line.split()[0], 16)))
            if _is_ordinary(address):
                return address
    return ""


def _is_ordinary(text: str) -> bool:
    """Neither the loopback's nor link-local, nor of a device of egressd's own."""
    address = ip_address(text)
    if address.is_loopback or address.is_link_local:
        return False
    own = (*Pools().own, ip_network("169.254.0.0/16"), ip_network("fd53::/16"))
    return not any(address in network for network in own if network.version == address.version)


def kernel_has(what: str) -> bool:
    """Whether this kernel has a family ("family:30") or an Internet protocol ("inet:132"), built in, loaded
    or as a module. Nothing is loaded by asking."""
    sort, _, number = what.partition(":")
    aliases = {f"net-pf-{number}"} if sort == "family" else {f"net-pf-{f}-proto-{number}" for f in (2, 10)}
    return _loaded(sort, int(number)) or bool(aliases & _module_aliases())


# /proc/net/protocols names what is there; families by their numbers in linux/socket.h
_NAMES: Final[Mapping[tuple[str, int], str]] = {
    ("family", 15): "KEY", ("family", 17): "PACKET", ("family", 29): "CAN", ("family", 30): "TIPC",
    ("family", 31): "HCI", ("family", 38): "ALG", ("family", 40): "AF_VSOCK", ("family", 43): "SMC",
    ("family", 44): "XDP", ("inet", 132): "SCTP", ("inet", 136): "UDP-Lite", ("inet", 262): "MPTCP",
    ("inet", 256): "SMC",
}  # fmt: skip


def _loaded(sort: str, number: int) -> bool:
    name = _NAMES.get((sort, number))
    with contextlib.suppress(OSError), open("/proc/net/protocols", encoding="ascii") as stream:
        return any(line.split()[:1] == [name] for line in stream)
    return False


_aliases: set[str] | None = None


def _module_aliases() -> set[str]:
    """Of families and protocols, from depmod's files: modules, and what is built in."""
    global _aliases  # noqa: PLW0603 - read once
    if _aliases is None:
        _aliases = set()
        directory = f"/lib/modules/{platform.release()}"
        with contextlib.suppress(OSError), open(f"{directory}/modules.alias", encoding="utf-8") as stream:
            _aliases |= {line.split()[1] for line in stream if line.startswith("alias net-pf-")}
        with contextlib.suppress(OSError), open(f"{directory}/modules.builtin.modinfo", "rb") as binary:
            words = (entry.partition(b".alias=")[2] for entry in binary.read().split(b"\0"))
            _aliases |= {word.decode() for word in words if word.startswith(b"net-pf-")}
    return _aliases


# --------------------------------------------------------------------------------------------------
# the sandbox


@dataclass(slots=True)
class Counts:
    """Packets: what the sandbox's end of the link has sent, and what the gateway's has counted."""

    sent: int = 0
    ok: int = 0
    denied: int = 0
    other: int = 0
    came: int = 0

    def since(self, before: Counts) -> Counts:
        return Counts(*(getattr(self, n) - getattr(before, n) for n in Counts.__slots__))


@dataclass(slots=True)
class _Scene:
    """The sandbox, who tries in it, and who counts."""

    asked: _Asked
    witness: _Witness
    running: launch.Running = field(init=False)
    companion: Companion = field(init=False)
    ends: Ends = field(init=False)
    facts: dict[str, Any] = field(init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _say: int = -1
    _hear: int = -1
    _held: bytes = b""
    _before: Counts = field(init=False)

    def __enter__(self) -> _Scene:
        try:
            self._begin()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    @property
    def control(self) -> Control:
        return self.running.control

    def _begin(self) -> None:
        theirs, self._say = os.pipe2(os.O_CLOEXEC)
        self._stack.callback(os.close, self._say)
        self._hear, out = os.pipe2(os.O_CLOEXEC)
        self._stack.callback(os.close, self._hear)
        leases: list[messages.Lease] = []
        try:
            wish = launch.Wish(
                workspace=self.asked.workspace,
                command=(interpreter(), "-I", "-S", _PROGRAM),
                run_dir=self.asked.run_dir,
                tools=SHOWN,
                wall=_WALL,
                admitted=lambda _, lease: leases.append(lease),
            )
            self.running = launch.start(wish, stdio=(theirs, out, 2))
        finally:
            os.close(theirs)
            os.close(out)
        self._stack.callback(self.running.destroy)
        self.companion = self._stack.enter_context(Companion(self.running.child))
        self._lay_out(leases[0])

    def _lay_out(self, lease: messages.Lease) -> None:
        own4, own6 = lease.address4, lease.address6
        self.ends = Ends(own4, own6, IPv4Address(_beside(own4)), IPv6Address(_beside(own6)))
        pools = self._synthetic()
        self.facts = {
            "own4": str(own4),
            "own6": str(own6) if os.path.exists("/proc/net/if_inet6") else "",
            **_host_addresses(),
            # Block 16,000 (layout.SLOTS): the last that a workspace would have, if it had so many names.
            "synthetic4": str(pools[4][64_000]), "synthetic6": str(pools[6][64_000]),
            "pools": {
                str(family): [int(network.network_address), int(network.broadcast_address)]
                for family, network in pools.items()
            },
            "run_dir": os.path.abspath(self.asked.run_dir),
            "pid": os.getpid(),
            "port": self.witness.port,
            "abstract": self.witness.abstract,
            "x86_64": platform.machine() == "x86_64",
            **dict.fromkeys(("listed", "listed6", "listed_name", "tls", "tls_name"), ""),
        }  # fmt: skip
        self._tell(self.facts)
        if self._answer() != len(attacks.ATTACKS):
            raise KernelError("what runs in the sandbox is another version of the table")
        self._before = self._counts()
        self._find_hosts()

    def _synthetic(self) -> dict[int, Any]:
        """Where names lead, by family. The terms say so where the guard is on; else as it mostly is."""
        pools = {4: ip_network(Pools().synthetic4), 6: ip_network(Pools().synthetic6)}
        for network in map(ip_network, (self.asked.terms.known or ())[:2]):
            pools[network.version] = network
        return pools

    def _find_hosts(self) -> None:
        """Listed hosts that have addresses now: asked for honestly, and counted as that."""
        for rule in self.asked.hosts():
            self._tell({"resolve": rule["host"]})
            four, six = self._answer()
            port = _read_port(rule)
            if (four or six) and not self.facts["listed_name"]:
                self.facts |= {"listed_name": rule["host"], "listed": (four or six)[0]}
            if four and not self.facts["listed"]:
                self.facts["listed"] = four[0]
            if six and not self.facts["listed6"]:
                self.facts["listed6"] = six[0]
            if (four or six) and port and not self.facts["tls"]:
                self.facts |= {"tls": (four or six)[0], "tls_name": rule["host"], "tls_port": port}
        self._tell({"facts": self.facts})
        self._answer()
        spent = self._settled()
        if spent.ok != spent.sent or spent.denied or spent.other:
            text = f"{spent.sent} honest frames were counted as {spent.ok} admitted and {spent.denied} denied"
            raise KernelError(f"the link's counters cannot be relied on: {text}")
        if self.asked.hosts() and not spent.sent:
            raise KernelError("the honest questions of the run were not sent: the sandbox has no network")

    # ---- one attempt

    def judge(self, way: Way) -> Row:
        """Once more where it came to nothing as it must and the numbers do not fit: a frame of what was tried
        before may have been late. What gets out gets out again."""
        if why := self._hindrance(way):
            return _row(way, "", Verdict.NOT_TRIED, why, Counts())
        row = self._judged(way)
        if row.happened in row.must and row.verdict in (Verdict.ESCAPED, Verdict.UNCLEAR):
            time.sleep(_LATE)
            self._settled()
            row = self._judged(way)
        return row

    def _judged(self, way: Way) -> Row:
        happened = self._send(way) if way.frame else self._attempt(way)
        spent = self._settled()
        if happened in way.must and (why := _absent(way)):
            return _row(way, happened, Verdict.NOT_TRIED, why, spent)
        verdict, why = judged(way, happened, spent)
        if self.witness.seen():
            verdict, why = Verdict.ESCAPED, "the host's own socket was reached"
        return _row(way, happened, verdict, why, spent)

    def _hindrance(self, way: Way) -> str:
        if way.frame:
            return ""
        attack = attacks.ATTACKS[way.place]
        for need in attack.needs:
            if not self.facts.get(need):
                return attacks.NEEDS[need]
        if attack.target:
            target = ip_address(attack.target)
            for network in self.asked.networks():
                if target.version == network.version and target in network:
                    return f"the policy lists {network}"
        return ""

    def _attempt(self, way: Way) -> str:
        self._tell(way.place)
        return str(self._answer())

    def _send(self, way: Way) -> str:
        try:
            self.companion.send(FRAMES[way.place].build(self.ends))
        except OSError as error:
            return error.strerror or str(error)
        return "sent"

    # ---- counting

    def _counts(self) -> Counts:
        """Until the sandbox's end has sent no more while the gateway's was asked, and all of it has come."""
        deadline = time.monotonic() + _COUNTED
        while True:
            sent = self.companion.sent()
            found = {name: packets for name, (packets, _) in self.control.spent().counters.items()}
            counts = Counts(sent, found["ok"], found["denied"], found["other"], found["in"])
            still = self.companion.sent() == sent
            if (still and counts.came == sent) or time.monotonic() > deadline:
                return counts

    def _settled(self) -> Counts:
        now = self._counts()
        spent, self._before = now.since(self._before), now
        return spent

    # ---- talking to it

    def _tell(self, message: object) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            os.write(self._say, data)
        except BrokenPipeError:
            raise self._dead() from None

    def _answer(self) -> Any:
        poll = select.poll()
        poll.register(self._hear, select.POLLIN)
        while b"\n" not in self._held:
            data = os.read(self._hear, 1 << 16) if poll.poll(_PATIENCE * 1000) else b""
            if not data:
                raise self._dead()
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return json.loads(line)

    def _dead(self) -> Refused:
        return Refused(Reason.UNAVAILABLE, "the sandbox has ended, or does not answer: it cannot be tested")


def _absent(way: Way) -> str:
    """Why it says nothing that it was refused: the filter and a kernel without it answer alike."""
    what = "" if way.frame else attacks.ATTACKS[way.place].kernel
    if not what or kernel_has(what):
        return ""
    sort, _, number = what.partition(":")
    return f"this kernel has no {'family' if sort == 'family' else 'protocol'} {number}"


def _beside(address: IPv4Address | IPv6Address) -> str:
    """The address of the link after, in the same pool (`Pools.sandbox`)."""
    number = int(address)
    return str(type(address)(number & ~0xFFFF | (number + 1) & 0xFFFF))


def _row(way: Way, happened: str, verdict: Verdict, why: str, spent: Counts) -> Row:
    return Row(
        number=way.number, group=way.group, name=way.name, family=way.family, must=way.must,
        counted=way.counted, happened=happened, verdict=verdict, why=why, sent=spent.sent, ok=spent.ok,
        denied=spent.denied, other=spent.other,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# the verdict


def judged(way: Way, happened: str, spent: Counts) -> tuple[Verdict, str]:
    """PURE: what it comes to, and why if it is not refused."""
    if spent.ok and way.counted != attacks.ADMITTED:
        return Verdict.ESCAPED, f"{spent.ok} of {spent.sent} frames were admitted"
    if happened not in way.must:
        return _otherwise(way, happened)
    if spent.came != spent.sent or spent.ok + spent.denied + spent.other != spent.came:
        text = (
            f"{spent.sent} frames were sent, the link counted {spent.came}: {spent.ok} admitted,"
            f" {spent.denied} denied, {spent.other} other"
        )
        return Verdict.UNCLEAR, text
    wrong = _miscounted(way.counted, spent)
    return (Verdict.UNCLEAR, wrong) if wrong else (Verdict.REFUSED, "")


def _otherwise(way: Way, happened: str) -> tuple[Verdict, str]:
    """An error is no success, but of a system call another one than the filter's means that no filter was
    there; and what did not run as it should says nothing."""
    text = f"{happened} instead of {' or '.join(way.must)}"
    if happened.startswith("failed:") or way.frame:
        return Verdict.UNCLEAR, text
    is_error = happened == "silence" or happened.startswith(("E", "SIG"))
    if is_error and way.group not in ("kernel", "protocols"):
        return Verdict.UNCLEAR, text
    if not is_error and way.group == "names" and happened in ("SERVFAIL", "closed"):
        return Verdict.UNCLEAR, text
    return Verdict.ESCAPED, text


def _miscounted(counted: str, spent: Counts) -> str:
    """Why these numbers are not those of `counted`; empty if they are."""
    if counted == attacks.NOTHING:
        return f"{spent.sent} frames were sent, and none should have been" if spent.sent else ""
    if not spent.sent and counted != attacks.EITHER:
        return "no frame was sent"
    if spent.denied and counted in (attacks.ADMITTED, "other"):
        return f"{spent.denied} frames were denied"
    return f"{spent.other} frames were not IP" if spent.other and counted != "other" else ""
