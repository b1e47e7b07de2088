"""`egressctl watch`: from documents to rates, the picture as text, and the live view by its keys."""

from __future__ import annotations

import asyncio
import copy
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import COUNTERS, STATUS, changed
from test_audit import DENIED4, lay, line

from egressd.cli import watch_frame
from egressd.cli.text import Paint
from egressd.cli.watch_frame import Frame, History, page, rate, size
from egressd.cli.watch_screen import Watch
from egressd.ipc import messages
from egressd.model.errors import Refused
from egressd.model.verdicts import Reason

PLAIN = Paint(io.StringIO(), no_color=True)
HOSTILE = "python3 [red]x[/red] [link=a]\x1b[2J\u202e"


def reading(second: int = 0, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """STATUS and COUNTERS `second` seconds later: 2048 bytes per second out, 3 packets denied in each."""
    counters = changed(COUNTERS, time=COUNTERS["time"] + 7200 + second)
    acme = counters["workspaces"][0]
    acme["hosts"][0]["out"] = [7 + second, 48201 + 2048 * second]
    acme["links"][0]["in"] = [40 + second, 56068 + 2048 * second]
    acme["links"][0]["denied"] = [29 + 3 * second, 7667]
    acme["denied"] = {"unlisted": [29 + 3 * second, 1745], "shape": [2, 6100]}
    acme["names_refused_by"] = {"name": 5 if second else 4}
    return changed(STATUS, **changes), counters


def frame(*seconds: int, **changes: Any) -> Frame:
    history = History()
    return [history.take(*reading(second, **changes)) for second in seconds][-1]


PAGE = """\
egressd 0.1.0: enforcing, books balance
2026-09-21 16:13:24Z, up 2 h 00 min, journal 120 records, 3 s behind, 2 lost

sandbox  workspace         age  in/s  denied/s     in  denied  command
eg7      acme       1 h 00 min  2.0K         3  62.8K      41  python3 infer.py

host                  workspace  out/s  in/s  conn    out    in
eu.api.openai.com     acme        2.0K     -     1  55.1K  3.3M
(resolver)            acme           -     -     4    244   512
*.search.example.com  acme           -     -     0      0     0

latest denials
  16:13:24Z  acme  12 packets denied [unlisted]
  16:13:24Z  acme  1 questions refused [name]"""


def test_the_picture_as_text() -> None:
    state = {"records": 120, "lag": 3.2, "lost": {"queue": 2}, "failing": ""}
    shown = page(frame(0, 4, journal=state).sorted_by("rate"), paint=PLAIN, most=50)
    assert shown == PAGE


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"enforcing": False}, "egressd 0.1.0: NOT ENFORCING, books balance"),
        ({"balanced": False}, "egressd 0.1.0: enforcing, BOOKS DO NOT BALANCE"),
        ({"journal": {"records": 5, "failing": "No space\x1b[2J"}}, r"JOURNAL FAILS: No space\x1b[2J"),
        ({"journal": None, "journal_error": "the auditor is down"}, "NO WORD OF THE JOURNAL: the auditor"),
        ({"drift": ["chain eg7 is missing"]}, ", 1 differences of the ruleset"),
        ({"alarms": [{"time": 0, "text": "x"}] * 3}, ", 3 alarms"),
        ({"workspaces": [{**STATUS["workspaces"][0], "problem": "no"}]}, ", 1 policies with problems"),
        ({"journal": None}, "up 2 h 00 min\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_stands_above_everything(changes: dict[str, Any], says: str) -> None:
    shown = page(frame(0, 4, **changes), paint=PLAIN, most=50)
    assert says in "\n".join([*shown.split("\n")[:2], ""])


def test_nothing_has_a_rate_at_the_first_look_and_nothing_was_denied_yet() -> None:
    first = frame(0)
    assert {host.out_rate for host in first.hosts} == {0.0}
    assert first.sandboxes[0].in_rate == first.sandboxes[0].denied_rate == 0.0
    assert first.denials == ()
    assert page(first, paint=PLAIN, most=50).endswith(watch_frame.NO_DENIALS)


def test_counters_that_begin_anew_have_no_rate_rather_than_a_wrong_one() -> None:
    history = History()
    history.take(*reading(9))
    status, counters = reading(4)
    counters["time"] += 60
    found = history.take(status, counters)
    assert (found.hosts[0].out_rate, found.sandboxes[0].in_rate, found.denials) == (0.0, 0.0, ())
    assert history.take(*reading(70)).hosts[0].out_rate > 0


def test_a_host_that_was_not_there_before_counts_from_zero() -> None:
    history = History()
    history.take(*reading(0))
    status, counters = reading(1)
    new = {**counters["workspaces"][0]["hosts"][0], "host": "new.example.com", "out": [1, 500]}
    counters["workspaces"][0]["hosts"].append(new)
    assert history.take(status, counters).hosts[-1].out_rate == 500.0


def test_last_counters_of_what_was_given_back_are_no_rate() -> None:
    history = History()
    history.take(*reading(0))
    status, counters = reading(1)
    counters["workspaces"][0]["hosts"][1]["out"] = [50, 90_000]
    wildcard = history.take(status, counters).hosts[1]
    assert (wildcard.kind, wildcard.out_rate, wildcard.out_bytes) == ("wildcard", 0.0, 90_000)


def test_one_workspace_is_all_that_is_left_of_a_frame() -> None:
    whole = frame(0, 1)
    assert whole.workspaces == ("acme", "lab")
    assert whole.of("acme") == whole
    none = whole.of("lab")
    assert (none.sandboxes, none.hosts, none.denials) == ((), (), ())


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("rate", ["eu.api.openai.com", "(resolver)", "*.search.example.com"]),
        ("total", ["eu.api.openai.com", "(resolver)", "*.search.example.com"]),
        ("name", ["(resolver)", "*.search.example.com", "eu.api.openai.com"]),
    ],
)
def test_orders(key: str, order: list[str]) -> None:
    assert [host.host for host in frame(0, 1).sorted_by(key).hosts] == order


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (999.6, "1.0K"), (1000, "1.0K"), (48201, "47.1K"), (102_400, "100K"),
     (1 << 20, "1.0M"), (999 << 10, "999K"), (1 << 70, "1024E")],
)  # fmt: skip
def test_sizes_are_short(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("per_second", "text"), [(0, "-"), (0.2, "<1"), (0.97, "<1"), (3, "3"), (5000, "4.9K")]
)
def test_rates(per_second: float, text: str) -> None:
    assert rate(per_second) == text


def test_long_tables_say_how_much_is_missing() -> None:
    shown = page(frame(0), paint=PLAIN, most=1)
    assert "... and 2 more hosts" in shown and "more sandboxes" not in shown


def test_nothing_a_stranger_chose_reaches_the_page_unescaped() -> None:
    status, counters = reading(1)
    status["sandboxes"][0]["command"] = HOSTILE
    counters["workspaces"][0]["hosts"][0]["host"] = HOSTILE
    shown = page(History().take(status, counters), paint=PLAIN, most=50)
    assert "[red]x[/red]" in shown and r"\x1b[2J\u202e" in shown
    assert all(each.isprintable() for each in shown.split("\n"))


# ---- the verb


def test_once_is_a_page_from_two_readings(egressctl: Any, daemon: Any) -> None:
    daemon.status, daemon.document = reading(0)
    daemon.then = reading(4)[1]
    told = egressctl("--run-dir", daemon.run_dir, "watch", "--once", "--interval", "0.1", "-w", "acme")
    assert (told.status, told.err) == (0, "")
    assert "eu.api.openai.com     acme        2.0K" in told.out
    assert "12 packets denied [unlisted]" in told.out
    assert daemon.asked == [messages.Ask(what="status"), messages.Ask(what="counters")] * 2


def test_denials_come_from_the_journal_where_it_may_be_read(
    egressctl: Any, daemon: Any, tmp_path: Path
) -> None:
    from datetime import UTC, datetime

    now = line(0, "auditor", "denied", DENIED4, at=datetime.now(UTC))
    old = line(1, "auditor", "denied", {**DENIED4, "port": 81})
    lay(tmp_path / "journal", [old, now])
    status, daemon.document = reading(0)
    daemon.status, daemon.then = {**status, "state_dir": str(tmp_path)}, reading(4)[1]
    told = egressctl("--run-dir", daemon.run_dir, "watch", "--once", "--interval", "0.1")
    assert "acme  eg7  denied  11.22.33.66:80/tcp: no rule of the workspace" in told.out
    assert "66:81" not in told.out and "packets denied" not in told.out


def test_json_is_one_document_with_the_numbers(egressctl: Any, daemon: Any) -> None:
    daemon.status, daemon.document = reading(0)
    daemon.then = reading(4)[1]
    told = egressctl("--run-dir", daemon.run_dir, "watch", "--once", "--json", "--interval", "0.1")
    assert told.json["hosts"][0]["out_rate"] == 2048.0
    assert told.json["sandboxes"][0]["denied_rate"] == 3.0
    assert told.out.count("\n") == 1


@pytest.mark.parametrize("words", [["--once"], ["--json"], ["--once", "--json"]])
def test_without_a_daemon_it_is_125(egressctl: Any, tmp_path: Path, words: list[str]) -> None:
    told = egressctl("--run-dir", tmp_path, "watch", *words)
    assert told.status == 125
    assert "egressd is not running" in told.err
    assert ("error" in told.out) == ("--json" in words)


def test_a_refusal_and_a_strange_answer_are_125(egressctl: Any, daemon: Any) -> None:
    daemon.document = {"time": 1}
    daemon.status = STATUS
    told = egressctl("--run-dir", daemon.run_dir, "watch", "--once")
    assert told.status == 125 and "another shape" in told.err
    daemon.refusal = messages.Refusal(reason="member", text="no\x1b[2J")
    told = egressctl("--run-dir", daemon.run_dir, "watch", "--once")
    assert (told.status, told.out, told.err) == (125, "", "egressctl: no\\x1b[2J\n")


def test_without_a_terminal_it_says_what_to_use(egressctl: Any, daemon: Any) -> None:
    told = egressctl("--run-dir", daemon.run_dir, "watch")
    assert (told.status, told.out) == (125, "")
    assert "watch needs a terminal" in told.err and "egressctl watch --once" in told.err
    assert daemon.asked == []


@pytest.mark.parametrize("interval", ["0", "soon", "-1", "nan", "1e9"])
def test_an_interval_is_seconds(egressctl: Any, interval: str) -> None:
    told = egressctl("watch", f"--interval={interval}")
    assert told.status == 2 and "write seconds between 0.1 and 3600" in told.err


# ---- the live view


class Readings:
    """What the view asks: one reading after the other; raises while `away`."""

    def __init__(self) -> None:
        self.history, self.second = History(), 0
        self.away = False
        self.hosts = 0  # more of them
        self.command = "python3 infer.py"

    def __call__(self) -> Frame:
        if self.away:
            raise Refused(Reason.UNAVAILABLE, "egressd is not running [bold]\x1b[2J")
        self.second += 1
        status, counters = reading(self.second)
        status["sandboxes"][0]["command"] = self.command
        hosts = counters["workspaces"][0]["hosts"]
        for number in range(self.hosts):
            extra = {"host": f"h{number}.example.com", "out": [self.second, number * self.second]}
            hosts.append({**copy.copy(hosts[0]), **extra})
        return self.history.take(status, counters)


def screen(app: Watch) -> list[str]:
    """What stands on the screen, line by line."""
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip).rstrip() for strip in strips]


async def until(pilot: Any, app: Watch, holds: Callable[[list[str]], bool]) -> list[str]:
    for _ in range(200):
        await pilot.pause(0.02)
        if holds(screen(app)):
            return screen(app)
    raise AssertionError("\n".join(screen(app)))


def live(
    readings: Readings, talk: Callable[[Any, Watch], Awaitable[None]], *, columns: int = 80, rows: int = 24
) -> Watch:
    app = Watch(readings, interval=0.05)

    async def whole() -> None:
        async with app.run_test(size=(columns, rows)) as pilot:
            await until(pilot, app, lambda lines: "eg7" in "\n".join(lines))
            await talk(pilot, app)

    asyncio.run(whole())
    return app


def has(text: str) -> Callable[[list[str]], bool]:
    return lambda lines: text in "\n".join(lines)


def lacks(text: str) -> Callable[[list[str]], bool]:
    return lambda lines: text not in "\n".join(lines)


def test_the_view_at_80_by_24() -> None:
    async def talk(pilot: Any, app: Watch) -> None:
        await until(pilot, app, has("p pause"))  # the footer comes when it likes
        lines = await until(pilot, app, has("3 packets denied [unlisted]"))
        assert lines[0] == "egressd 0.1.0: enforcing, books balance"
        assert lines[1].startswith("2026-09-21 16:1")
        assert lines[2] == "all workspaces, by rate, 1 sandboxes, 3 hosts"
        assert lines[3].split() == [
            "sandbox",
            "workspace",
            "age",
            "in/s",
            "denied/s",
            "in",
            "denied",
            "command",
        ]
        assert lines[4].startswith(" eg7      acme       1 h 00 min  2.0K         3")
        assert lines[5].split() == ["host", "workspace", "out/s", "in/s", "conn", "out", "in"]
        assert lines[6].startswith(" eu.api.openai.com     acme        2.0K     -     1")
        assert "latest denials" in lines
        assert lines[23].split("  ") == [" q quit", "w workspace", "s sort", "d denials only", "p pause"]
        assert len(lines) == 24 and max(map(len, lines)) <= 80
        await pilot.press("q")

    assert live(Readings(), talk).return_code == 0


def test_the_keys() -> None:
    async def talk(pilot: Any, app: Watch) -> None:
        await pilot.press("w")
        await until(pilot, app, has("workspace acme, by rate"))
        await pilot.press("w", "s")
        await until(pilot, app, has("workspace lab, by total, 0 sandboxes, 0 hosts"))
        await until(pilot, app, lacks("eg7"))
        await pilot.press("w", "s")
        lines = await until(pilot, app, has("all workspaces, by name"))
        await until(pilot, app, has("eg7"))
        await pilot.press("s", "d")
        lines = await until(pilot, app, lacks("eg7"))
        assert sum("packets denied" in each for each in lines) >= 1 and "by rate" in lines[2]
        await pilot.press("d")
        await until(pilot, app, has("eg7"))
        await pilot.press("p")
        stopped = await until(pilot, app, has("PAUSED"))
        await pilot.pause(0.3)
        assert screen(app)[1] == stopped[1]
        await pilot.press("p")
        await until(pilot, app, lambda lines: lines[1] != stopped[1] and "PAUSED" not in lines[2])
        await pilot.press("ctrl+c")

    assert live(Readings(), talk).return_code == 130


def test_a_daemon_that_goes_away_is_told_and_so_is_its_return() -> None:
    readings = Readings()

    async def talk(pilot: Any, app: Watch) -> None:
        readings.away = True
        lines = await until(pilot, app, has("EGRESSD DOES NOT ANSWER since"))
        assert lines[1] == r"egressd is not running [bold]\x1b[2J"
        assert "eg7" in "\n".join(lines)  # what was known last
        readings.away = False
        await until(pilot, app, has("egressd answers again after 0 s"))
        assert "enforcing" in screen(app)[0]
        await pilot.press("q")

    live(readings, talk)


def test_commands_are_neither_markup_nor_escapes() -> None:
    readings = Readings()
    readings.command = HOSTILE

    async def talk(pilot: Any, app: Watch) -> None:
        lines = await until(pilot, app, has(r"python3 [red]x[/red] [link=a]\x1b[2J"))
        assert all(each.isprintable() for each in lines)
        await pilot.press("q")

    live(readings, talk, columns=140)


def test_ten_thousand_hosts() -> None:
    readings = Readings()
    readings.hosts = 10_000

    async def talk(pilot: Any, app: Watch) -> None:
        lines = await until(pilot, app, has("200 of 10003 hosts"))
        lines = await until(pilot, app, has("h9999.example.com"))  # the fastest first
        assert "h9998.example.com" in "\n".join(lines) and "h17.example.com" not in "\n".join(lines)
        began = time.monotonic()
        app.show()
        assert time.monotonic() - began < 1.0
        await pilot.press("q")

    live(readings, talk)


# ---- on a terminal


@pytest.fixture
def terminal(daemon: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    daemon.status, daemon.document = reading(0)
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    command = [sys.executable, "-m", "egressd.cli.main", "--run-dir", str(daemon.run_dir), "watch"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    ) as process:
        os.close(slave)
        yield process, master
        process.kill()
    os.close(master)


def read_until(master: int, wanted: bytes, *, seconds: float = 20) -> bytes:
    got, end = b"", time.monotonic() + seconds
    while wanted not in got:
        assert time.monotonic() < end, got
        if select.select([master], [], [], 0.1)[0]:
            got += os.read(master, 65536)
    return got


@pytest.mark.parametrize(("key", "status"), [(b"q", 0), (b"\x03", 130)], ids=["q", "ctrl-c"])
def test_a_real_terminal_gets_the_picture_and_is_left_as_it_was(
    terminal: Any, key: bytes, status: int
) -> None:
    process, master = terminal
    read_until(master, b"eu.api.openai.com")
    os.write(master, key)
    rest = read_until(master, b"\x1b[?1049l")  # the screen that was there before
    assert b"\x1b[?25h" in rest + read_rest(process, master)  # and its cursor
    assert process.wait(10) == status


def read_rest(process: subprocess.Popen[bytes], master: int) -> bytes:
    got = b""
    while process.poll() is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.05)[0]:
            try:
                got += os.read(master, 65536)
            except OSError:  # EIO: nobody holds the other end any more
                break
    return got


def test_a_terminal_that_closes_ends_it(terminal: Any) -> None:
    process, master = terminal
    read_until(master, b"eu.api.openai.com")
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) != 0


def test_other_verbs_do_not_load_it() -> None:
    code = "import sys; from egressd.cli.main import main; main(['watch', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"textual", "rich", "asyncio", "pydantic"}
