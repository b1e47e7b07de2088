"""What the journal costs: how many records a second it takes, what a flood of denials makes others wait, and
how fast somebody checks it all.

Records per second, process against process: the real auditor, told events over its socket as egressd's
other processes tell it (it reads, checks, numbers, spells, hashes, syncs and signs them), and
systemd-journald, told the same lines over its own socket (bench/journald.py). Both have one core, the sender
has the other and waits whenever the receiver's queue is full; both have everything on disk when the clock is
stopped. Afterwards it is counted what each has: a lost record ends the run.

They do not promise the same. The auditor syncs each batch, 4096 records or what 20 milliseconds brought, and
signs a checkpoint a second. journald syncs once a second (so configured; by itself every five minutes) and
signs nothing; *sealed* it does (forward secure sealing, a key per second).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench import first, journald, scene, spawn
from bench.figures import Figure, Report, Sample, interleaved
from egressd.ipc import messages
from egressd.journal import records, verification
from egressd.journal.keys import PrivateKey
from egressd.processes import journal_reader
from egressd.processes.journal_file import Draft, JournalFile, Writer, timestamp
from egressd.processes.journal_keys import Keys
from lab import topology
from lab.daemon import VENV, Daemon
from lab.internet import Internet
from lab.machine import Lab, Process, poll

__all__ = ["latency", "measure", "records_per_second", "verification_speed"]

_AHEAD = 16_384  # records told and not yet on disk, at most: the auditor's queue takes four times that
_LOOK = 1000  # records between two looks at how far it is
_EVENT, _PROCESS = "flow-closed", "inspector"
RATE = 10_000  # datagrams per second
_PORTS = 20_000  # that are denied: hardly two denials are equal, and so hardly two share a record
_HOST, _ADDRESS, _ALLOWED, _DENIED = "storm.bench.test", "11.22.33.88", 7301, 7302


def measure(
    report: Report,
    *,
    given: tuple[Lab, Internet] | None = None,
    rounds: int = 7,
    count: int = 50_000,
    pairs: int = 21,
    questions: int = 200,
    spawns: int = 10,
    proved: int = 40_000,
) -> None:
    records_per_second(report, rounds=rounds, count=count)
    with scene.stage(given) as (lab, internet):
        latency(report, lab, internet, rounds=pairs, questions=questions, spawns=spawns)
    verification_speed(report, rounds=rounds, count=proved)


# ---- records per second


def _fields(number: int) -> dict[str, Any]:
    """What the inspector says of a connection that has ended."""
    return {
        "link": f"eg{1 + number % 200}",
        "workspace": "acme",
        "host": "eu.api.openai.test",
        "name": "eu.api.openai.test",
        "source": f"198.19.0.{1 + number % 200}",
        "source_port": 20_000 + number % 40_000,
        "destination": "198.18.0.7",
        "port": 443,
        "out_bytes": 517 + number % 5000,
        "in_bytes": number * 37 % 1_000_000,
        "seconds": round(number % 3000 / 1000, 3),
        "why": "both ends closed",
    }


@dataclass(frozen=True)
class Written:
    rate: float  # records per second
    processor: float  # microseconds of the receiver's core per record


def records_per_second(report: Report, *, rounds: int, count: int) -> None:
    """The order turns among all of them; each goes on with its own journal from round to round."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, {cores[-1]})
        ways: dict[str, _Auditor | _Alone | _Peer] = {
            "ours": stack.enter_context(_auditor(count, cores[0])),
            "alone": stack.enter_context(_alone(count, {cores[0]}, {cores[-1]})),
        }
        if journald.installed():
            ways["journald"] = stack.enter_context(_peer(count, cores[0], sealed=False))
            ways["sealed"] = stack.enter_context(_peer(count, cores[0], sealed=True))
        found = interleaved(rounds, {name: way.write for name, way in ways.items()})
        octets = {name: way.check(rounds * count) / (rounds * count) for name, way in ways.items()}
    _tell_rates(report, found, octets)


def _tell_rates(report: Report, found: dict[str, list[Written]], octets: dict[str, float]) -> None:
    rates = {name: [each.rate for each in written] for name, written in found.items()}
    spent = {name: [each.processor for each in written] for name, written in found.items()}
    if "journald" not in found:
        report.add(Figure.alone("journal_records_per_s", rates["ours"], "rec/s"))
        report.add(Figure.alone("journal_writer_records_per_s", rates["alone"], "rec/s"))
        report.add(Figure("journal_disk_bytes_per_record", octets["ours"], "B"))
        return
    target = ("at least", 2.0)
    figures = (
        Figure.paired("journal_records_per_s", rates["ours"], rates["journald"], "rec/s", target=target),
        Figure.paired("journal_records_per_s_vs_sealed", rates["ours"], rates["sealed"], "rec/s"),
        Figure.paired("journal_record_processor", spent["ours"], spent["journald"], "us/rec"),
        Figure.paired("journal_record_processor_vs_sealed", spent["ours"], spent["sealed"], "us/rec"),
        Figure.paired("journal_writer_records_per_s", rates["alone"], rates["journald"], "rec/s"),
        Figure("journal_disk_bytes_per_record", octets["ours"], "B", octets["journald"]),
    )
    for figure in figures:
        report.add(figure)


def _spent(pid: int) -> float:
    """Seconds of processor time, to the nanosecond (Documentation/scheduler/sched-stats.rst)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def _pin(pid: int, core: int) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


def _timed(count: int, spent: Callable[[], float], write: Callable[[], object]) -> Written:
    before, began = spent(), time.monotonic()
    write()
    seconds = time.monotonic() - began
    time.sleep(0.02)  # the account is written when the process leaves its core
    return Written(count / seconds, (spent() - before) / count * 1e6)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """On a disk: /tmp may be memory, where syncing costs nothing. Others may pass through."""
    with tempfile.TemporaryDirectory(prefix="egressd-bench-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _on_disk(journal: Path) -> int:
    """Records: leaf hashes are written after the lines have been synced."""
    return sum(path.stat().st_size for path in journal.glob("*.leaves")) // 32


def _signed(journal: Path) -> int:
    """Records under the latest checkpoint (C2SP tlog-checkpoint: name, size, root)."""
    try:
        return int((journal / "checkpoint").read_text().split("\n")[1])
    except FileNotFoundError:
        return 0


def _checked(journal: Path, events: int) -> float:
    """The bytes of a journal that is in order and holds so many of our events, all under a checkpoint."""
    poll(lambda: _signed(journal) == _on_disk(journal), timeout=10, what="a checkpoint over all of it")
    report = journal_reader.inspect_journal(journal)
    if report.findings or report.signed != report.records:
        raise RuntimeError(f"the journal is not in order: {report}")
    told = sum(records.decode(line).event == _EVENT for _, line in journal_reader.lines(journal))
    if told != events:
        raise RuntimeError(f"of {events} records {told} are in the journal")
    return float(sum(path.stat().st_size for path in journal.iterdir()))


class _Auditor:
    """The real process, and the other end of its sockets."""

    def __init__(self, lab: Any, count: int) -> None:
        self._lab, self._journal = lab, lab.directory
        encode = msgspec.json.Encoder(enc_hook=str).encode
        self._told = [
            encode(messages.Event(process=_PROCESS, event=_EVENT, fields=_fields(number)))
            for number in range(count)
        ]

    def write(self) -> Written:
        return _timed(len(self._told), lambda: _spent(self._lab.process.pid), self._tell)

    def _tell(self) -> None:
        """A full socket blocks; what was read waits in the auditor's queue, which must not overflow."""
        sock, base = self._lab.channels[_PROCESS].socket, _on_disk(self._journal)
        for number, message in enumerate(self._told):
            if number % _LOOK == 0:
                self._wait_for(base + number - _AHEAD)
            sock.send(message)
        self._wait_for(base + len(self._told))

    def _wait_for(self, size: int) -> None:
        while _on_disk(self._journal) < size:
            if self._lab.process.poll() is not None:
                raise RuntimeError(f"the auditor ended: {self._lab.said()}")
            time.sleep(0.001)

    def check(self, events: int) -> float:
        return _checked(self._journal, events)


@contextlib.contextmanager
def _auditor(count: int, core: int) -> Iterator[_Auditor]:
    # The tests' own labs import one another by their bare names, as pytest has them.
    sys.path.insert(0, str(scene.PROJECT / "tests" / "processes"))
    import auditor_lab

    with _directory() as directory:
        os.chown(directory, auditor_lab.UID, auditor_lab.UID)
        with auditor_lab.Auditor(directory, names=("controller", "warden", _PROCESS)) as lab:
            lab.ready()
            _pin(lab.process.pid, core)
            first_records = poll(lambda: _on_disk(lab.directory), timeout=10, what="the journal is opened")
            poll(lambda: _signed(lab.directory) >= first_records, timeout=10, what="the first checkpoint")
            yield _Auditor(lab, count)


class _Alone:
    """The auditor's writer in this process: queue, thread, files, signatures; nobody sends anything."""

    def __init__(self, journal: JournalFile, count: int, cores: set[int], back: set[int]) -> None:
        self._directory = journal.directory
        self._cores, self._back = cores, back
        self.writer = Writer(journal, say=lambda text: print(f"bench: {text}", file=sys.stderr))
        self._drafts = [
            Draft(timestamp(), _PROCESS, _EVENT, records.bounded(_fields(number))) for number in range(count)
        ]

    def write(self) -> Written:
        for task in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(task.name), self._cores)
        try:
            return _timed(len(self._drafts), time.process_time, self._submit)
        finally:
            for task in Path("/proc/self/task").iterdir():
                os.sched_setaffinity(int(task.name), self._back)

    def _submit(self) -> None:
        base = self.writer.state().records
        for number, draft in enumerate(self._drafts):
            if number % _LOOK == 0:
                self._wait_for(base + number - _AHEAD)
            self.writer.submit(draft)
        self._wait_for(base + len(self._drafts))

    def _wait_for(self, size: int) -> None:
        while self.writer.state().records < size:
            time.sleep(0.001)

    def check(self, events: int) -> float:
        return _checked(self._directory, events)


@contextlib.contextmanager
def _alone(count: int, cores: set[int], back: set[int]) -> Iterator[_Alone]:
    with _directory() as directory:
        alone = _Alone(JournalFile(directory, keys=Keys(PrivateKey.generate())), count, cores, back)
        try:
            alone.writer.barrier().result(10)
            yield alone
        finally:
            alone.writer.end()


class _Peer:
    """systemd-journald, told the lines that our journal has."""

    def __init__(self, peer: journald.Journald, count: int) -> None:
        self._peer = peer
        now = timestamp()
        lines = (
            records.spell(seq=number, time=now, process=_PROCESS, event=_EVENT, fields=_fields(number))
            for number in range(count)
        )
        self._datagrams = [peer.datagram(line.rstrip(b"\n")) for line in lines]
        self._empty = peer.octets()

    def write(self) -> Written:
        return _timed(
            len(self._datagrams), lambda: _spent(self._peer.pid), lambda: self._peer.write(self._datagrams)
        )

    def check(self, events: int) -> float:
        if (told := self._peer.entries()) != events:
            raise RuntimeError(f"of {events} records {told} are in journald's files")
        return float(self._peer.octets() - self._empty)


@contextlib.contextmanager
def _peer(count: int, core: int, *, sealed: bool) -> Iterator[_Peer]:
    with journald.started(sealed=sealed) as peer:
        _pin(peer.pid, core)
        yield _Peer(peer, count)


# ---- what others feel of a storm

_ASKED = """\
workspace: asks
guard: enforce
members: ["user:{user}"]
allow:
  - {{host: {host}, ports: [{port}/udp], verify: address}}
"""
_STARTED = """\
workspace: acme
guard: enforce
members: ["user:{user}"]
allow:
  - {{host: {host}, ports: [{port}/udp], verify: address}}
"""
# An open port that nobody reads: what comes is thrown away, without a word.
_DEAF = (
    "import socket,signal;s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM);"
    f"s.bind(('0.0.0.0',{_ALLOWED}));print('ready',flush=True);signal.pause()"
)


class _Told:
    """A program that is told a line, and answers with one."""

    def __init__(self, say: Callable[[bytes], object], hear: Callable[[], str]) -> None:
        self.say, self._hear = say, hear
        if hear() != "ready":
            raise RuntimeError("a program of the benchmark did not start")

    def ask(self, order: object) -> Any:
        self.say(json.dumps(order).encode() + b"\n")
        return self.answer()

    def answer(self) -> Any:
        return json.loads(self._hear())


def latency(
    report: Report, lab: Lab, internet: Internet, *, rounds: int, questions: int, spawns: int
) -> None:
    """One sandbox sends 10,000 datagrams a second that are denied, another asks for a name that the resolver
    knows, and sandboxes are started; by turns with silence, and with a storm of that rate that is allowed.

    What such a storm costs is mostly not the journal's: a sender, and packets that are routed, refused or
    carried. The allowed one is the control: the same rate, and nothing to write down."""
    internet.set(_HOST, A=[_ADDRESS])
    user = scene.account()
    about = {"host": _HOST, "port": _ALLOWED}
    policies = {
        "asks": _ASKED.format(user=lab.user, **about),
        "storm": _ASKED.format(user=lab.user, **about).replace("asks", "storm"),
        "acme": _STARTED.format(user=user.pw_uid, **about),
    }
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(scene.started(lab, policies))
        deaf = lab.start(["/usr/bin/python3", "-I", "-c", _DEAF], where=topology.NET)
        stack.callback(deaf.kill)
        poll(lambda: "ready" in deaf.out, timeout=10, what="the server")
        asker = stack.enter_context(_inside(daemon, "asks"))
        sender = stack.enter_context(_inside(daemon, "storm"))
        starter = stack.enter_context(_starter(daemon, user))
        storms = _Storms(daemon, asker, sender, starter, questions=questions, spawns=spawns)
        found = interleaved(
            rounds,
            {
                "idle": storms.silence,
                "denied": lambda: storms.during(_DENIED),
                "allowed": lambda: storms.during(_ALLOWED),
            },
        )
        storms.check()
        storms.alarms = scene.alarms(daemon)
    _tell_latency(report, found, storms)


@dataclass(frozen=True)
class Felt:
    """Medians of a round, in milliseconds."""

    dns: float
    spawn: float


class _Storms:
    def __init__(
        self, daemon: Daemon, asker: _Told, sender: _Told, starter: _Told, *, questions: int, spawns: int
    ) -> None:
        self._daemon, self._asker, self._sender, self._starter = daemon, asker, sender, starter
        self._questions, self._spawns = questions, spawns
        self._address = _looked_up(daemon)
        self._auditor = daemon.pids()["auditor"]
        self.sent: dict[int, list[dict[str, float]]] = {_ALLOWED: [], _DENIED: []}
        self.alarms: list[str] = []

    def silence(self) -> Felt:
        names = self._asker.ask({"do": "ask", "name": _HOST, "count": self._questions})
        return Felt(Sample(tuple(names)).median, Sample(tuple(self._starter.ask(self._spawns))).median)

    def during(self, port: int) -> Felt:
        before = self._auditors_time()
        ports = _PORTS if port == _DENIED else 1
        order = {"do": "storm", "to": [self._address, port], "ports": ports, "rate": RATE}
        self._sender.say(json.dumps(order).encode() + b"\n")
        time.sleep(0.1)
        felt = self.silence()
        self._sender.say(b"\n")
        told = self._sender.answer()
        told["auditor"] = self._auditors_time() - before
        self.sent[port].append(told)
        return felt

    def _auditors_time(self) -> float:
        """Seconds; /proc as the lab's processes see it."""
        root = Path(f"/proc/{self._daemon.lab.keeper_pid}/root/proc/{self._auditor}/task")
        return sum(int(path.read_text().split()[0]) for path in root.glob("*/schedstat")) / 1e9

    def check(self) -> None:
        """What was sent was denied, and allowed: exactly so much, as the kernel counted."""
        totals = self._daemon.counters("storm")
        sent = {port: sum(int(told["sent"]) for told in each) for port, each in self.sent.items()}
        denied = sum(int(pair[0]) for pair in totals["denied"].values())
        if denied < sent[_DENIED]:
            raise RuntimeError(f"of {sent[_DENIED]} datagrams {denied} were denied")

    def details(self, port: int) -> dict[str, Any]:
        seconds = sum(told["seconds"] for told in self.sent[port])
        return {
            "datagrams_per_second": round(sum(told["sent"] for told in self.sent[port]) / seconds),
            "of_a_core_the_sender": round(sum(told["processor"] for told in self.sent[port]) / seconds, 3),
            "of_a_core_the_auditor": round(sum(told["auditor"] for told in self.sent[port]) / seconds, 3),
        }


def _looked_up(daemon: Daemon) -> str:
    """The synthetic address of the host, as sandboxes have it."""
    text = f"import socket;print(socket.gethostbyname({_HOST!r}))"
    done = daemon.sandbox("storm", ["/usr/bin/python3", "-I", "-c", text]).check()
    return str(done.out).strip()


def _tell_latency(report: Report, found: dict[str, list[Felt]], storms: _Storms) -> None:
    about = {
        "storm": storms.details(_DENIED), "control": storms.details(_ALLOWED), "alarms": storms.alarms,
    }  # fmt: skip
    for what in ("dns", "spawn"):
        idle, denied, allowed = (
            [getattr(felt, what) for felt in found[name]] for name in ("idle", "denied", "allowed")
        )
        target = ("at most", 1.1)
        report.add(
            Figure.paired(f"journal_added_latency_{what}", denied, idle, "ms", target=target, details=about)
        )
        report.add(Figure.paired(f"journal_added_latency_{what}_vs_allowed_storm", denied, allowed, "ms"))
        report.add(Figure.paired(f"journal_allowed_storm_{what}", allowed, idle, "ms"))


@contextlib.contextmanager
def _inside(daemon: Daemon, workspace: str) -> Iterator[_Told]:
    text = (scene.PROJECT / "bench" / "inside" / "stormer.py").read_text()
    process = daemon.start_sandbox(workspace, ["/usr/bin/python3", "-I", "-c", text])
    try:
        assert process.stdin is not None
        yield _Told(process.stdin.write, _lines(process))
    finally:
        process.close()
        process.wait()


def _lines(process: Process) -> Callable[[], str]:
    heard = 0

    def hear() -> str:
        nonlocal heard
        heard += 1

        def said() -> bool:
            if process.status() is not None:
                process.drain()
                raise RuntimeError(f"a program in a sandbox ended: {process.err}")
            return process.out.count("\n") >= heard

        poll(said, timeout=60, what="the answer from a sandbox")
        return process.out.splitlines()[heard - 1]

    return hear


@contextlib.contextmanager
def _starter(daemon: Daemon, user: Any) -> Iterator[_Told]:
    """inside/starter.py as that user, outside the lab."""
    with scene.shared_directory() as files, spawn.reach(daemon) as run_dir:
        orders = {
            "workspace": "acme",
            "run_dir": f"/proc/self/fd/{run_dir}",
            "files": str(files),
            "inside": first.command(files, seen_as="/work"),
        }
        process = subprocess.Popen(
            scene.program("starter", json.dumps(orders)),
            user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd=scene.PROJECT,
            env=scene.environment() | {"HOME": "/tmp"}, pass_fds=[run_dir],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        try:
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None and stdout is not None
            yield _Told(stdin.write, lambda: _line(stdout))
        finally:
            process.kill()
            process.communicate()


def _line(stream: Any) -> str:
    """The next line of an unbuffered pipe, within a minute."""
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([stream], [], [], 60)[0]:
            raise RuntimeError("the program that starts sandboxes is silent")
        if not (more := stream.read(1 << 16)):
            raise RuntimeError("the program that starts sandboxes ended; see above")
        line += more
    return line.decode().rstrip("\n")


# ---- checking


def verification_speed(report: Report, *, rounds: int, count: int) -> None:
    """`egressctl verify` on a proof of about so many records, the whole command with its start; and on the
    journal itself, which is read and hashed anew from its first line."""
    with _directory() as directory:
        story = _story(directory, count)
        proof, key = directory / "acme.proof", directory / "key.pem"
        proof.write_bytes(story.proof())
        key.write_text(story.key.public.pem())
        report_of = verification.verify(proof.read_bytes(), key=story.key.public)
        if not report_of.verified or report_of.statement is None:
            raise RuntimeError(f"the proof does not hold: {report_of.broken}")
        proved = len(report_of.statement.predicate.journal.records.lines)
        inside = [
            _rate(proved, lambda: verification.verify(proof.read_bytes(), key=story.key.public))
            for _ in range(rounds)
        ]
        details = {
            "records": proved,
            "bytes": proof.stat().st_size,
            "without_starting_python": Sample(tuple(inside)).document(),
        }
        words = [str(VENV / "bin" / "egressctl"), "verify", str(proof), "--key", str(key)]
        whole = [_rate(proved, lambda: _verified(words)) for _ in range(rounds)]
        report.add(Figure.alone("verify_records_per_s", whole, "rec/s", details=details))
        size = story.file.seq
        found = [_rate(size, lambda: _in_order(story.directory)) for _ in range(rounds)]
        report.add(Figure.alone("verify_journal_records_per_s", found, "rec/s", details={"records": size}))
        story.file.close()


def _rate(count: int, work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return count / (time.monotonic() - began)


def _verified(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"egressctl verify: {done.stdout[-2000:]}{done.stderr}")


def _in_order(journal: Path) -> None:
    if findings := journal_reader.check_journal(journal):
        raise RuntimeError(f"the journal is not in order: {findings}")


def _story(directory: Path, count: int) -> Any:
    """A journal of sandboxes, each with a denial and a flow, whose books balance; written in batches."""
    sys.path.insert(0, str(scene.PROJECT / "tests" / "evidence"))
    import scene as evidence

    class Quick(evidence.Story):  # type: ignore[misc, name-defined]
        def tell(self, event: str, *, process: str = "controller", after: float = 1.0, **fields: Any) -> int:
            self.clock += after / 1000
            waiting.append(Draft(evidence.at(self.clock), process, event, fields))
            return self.file.seq + len(waiting) - 1

        def checkpoint(self) -> int:
            self.file.append(waiting)
            waiting.clear()
            return int(super().checkpoint())

    waiting: list[Draft] = []
    story = Quick(directory)
    story.snapshot()
    sandboxes = max(1, count // 4)
    for number in range(1, sandboxes + 1):
        story.sandbox(number)
        if number % 1000 == 0:
            story.checkpoint()
    story.snapshot(openai=3 * sandboxes, unlisted=2 * sandboxes)
    return story
