"""The live terminal view. The one file that imports textual, and the last one to be imported.

All cells are `rich.text.Text`, never markup: a command called `[red]` stays one. What comes here was escaped
before (`watch_frame`). Of long tables only the first rows are shown, and how many more there are.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from itertools import zip_longest
from time import time
from typing import ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Static

from egressd.cli.exits import INTERRUPTED, OK
from egressd.cli.status import moment
from egressd.cli.text import Paint, escape, shorten
from egressd.cli.watch_frame import (
    HOST_HEAD,
    NO_DENIALS,
    SANDBOX_HEAD,
    SORTS,
    Frame,
    denial_line,
    headline,
    host_cells,
    sandbox_cells,
)  # fmt: skip
from egressd.model.errors import EgressdError

__all__ = ["Watch"]

_MOST: Final = 200  # rows of a table; a person looks at the first ones, and each costs time once a second
_PLAIN: Final = Paint(io.StringIO(), no_color=True)
_STYLES: Final = {
    "enforcing": "green",
    "NOT ENFORCING": "bold red",
    "books balance": "green",
    "BOOKS DO NOT BALANCE": "bold red",
    "JOURNAL FAILS": "bold red",
    "NO WORD OF THE JOURNAL": "bold red",
    "differences of the ruleset": "bold red",
    "alarms": "bold red",
    "PAUSED": "bold yellow",
}
_NUMBERS: Final = frozenset({"age", "in/s", "out/s", "denied/s", "in", "out", "denied", "conn"})


class Watch(App[int]):
    """`read` gives the next frame, or raises why there is none; it is called in a thread."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #head { height: 3; }
    #head.away { background: $error; }
    #sandboxes { height: auto; max-height: 30%; }
    #hosts { height: 1fr; }
    #denials { height: 7; overflow-y: hidden; }
    .denials-only #tables { display: none; }
    .denials-only #denials { height: 1fr; }
    DataTable { scrollbar-size-horizontal: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("w", "workspace", "workspace"),
        Binding("s", "sort", "sort"),
        Binding("d", "denials", "denials only"),
        Binding("p", "pause", "pause"),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
    ]

    def __init__(self, read: Callable[[], Frame], *, interval: float, workspace: str | None = None) -> None:
        super().__init__()
        self._read, self._interval = read, interval
        self._workspace, self._sort = workspace, SORTS[0]
        self._paused = False
        self._latest: Frame | None = None
        self._away = ""  # why egressd does not answer
        self._away_since = 0.0
        self._note = ""

    def compose(self) -> ComposeResult:
        yield Static("asking egressd...", id="head", markup=False)
        with Vertical(id="tables"):
            yield _Table(SANDBOX_HEAD, id="sandboxes")
            yield _Table(HOST_HEAD, id="hosts")
        yield Static("", id="denials", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#hosts").focus()
        self.run_worker(self._ask_for_ever(), exclusive=True)

    # ---- asking

    async def _ask_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            if not self._paused:
                await self._ask()
            await asyncio.sleep(max(self._interval - (loop.time() - began), 0.02))

    async def _ask(self) -> None:
        try:
            frame = await asyncio.to_thread(self._read)
        except (EgressdError, OSError, ValueError) as error:
            self._is_away(str(error))
        else:
            self._is_back(frame)
        if not self._paused:  # pressed meanwhile: what is on the screen stays
            self.show()

    def _is_away(self, why: str) -> None:
        if not self._away:
            self._away_since = time()
        self._away = why or "no answer"

    def _is_back(self, frame: Frame) -> None:
        if self._away:
            self._note = f"egressd answers again after {time() - self._away_since:.0f} s"
        elif self._latest is not None and frame.since != self._latest.since:
            self._note = f"egressd was started anew at {moment(frame.since)}"
        self._away, self._latest = "", frame

    # ---- showing

    def show(self) -> None:
        """Draw the latest frame, as sorted and narrowed down."""
        self._show_head()
        if self._latest is None:
            return
        frame = self._latest.of(self._workspace).sorted_by(self._sort)
        self.query_one("#sandboxes", _Table).show(
            [sandbox_cells(sandbox, frame.time) for sandbox in frame.sandboxes[:_MOST]]
        )
        self.query_one("#hosts", _Table).show([host_cells(host) for host in frame.hosts[:_MOST]])
        self._show_denials(frame)

    def _show_head(self) -> None:
        head = self.query_one("#head", Static)
        head.set_class(bool(self._away), "away")
        if self._away:
            first = f"EGRESSD DOES NOT ANSWER since {moment(self._away_since)}; trying again"
            head.update(Text(f"{first}\n{shorten(escape(self._away), 200)}\n{self._view()}"))
        elif self._latest is not None:
            text = Text(f"{headline(self._latest, _PLAIN)}\n{self._view()}")
            for words, style in _STYLES.items():
                text.highlight_words([words], style)
            head.update(text)

    def _view(self) -> str:
        """What is shown of it: `workspace acme, by rate; 200 of 10000 hosts`"""
        parts = ["PAUSED"] if self._paused else []
        parts.append(f"workspace {self._workspace}" if self._workspace else "all workspaces")
        parts.append(f"by {self._sort}")
        if self._latest is not None:
            frame = self._latest.of(self._workspace)
            parts += _counts(len(frame.sandboxes), "sandboxes") + _counts(len(frame.hosts), "hosts")
        parts += [self._note] if self._note else []
        return ", ".join(parts)

    def _show_denials(self, frame: Frame) -> None:
        panel = self.query_one("#denials", Static)
        room = max(panel.size.height - 1, 1)
        lines = [denial_line(each) for each in frame.denials[-room:]]
        title = "latest denials" if lines else NO_DENIALS
        text = Text("\n".join([title, *lines]), no_wrap=True, overflow="ellipsis")
        text.stylize("bold", 0, len(title))
        panel.update(text)

    # ---- keys

    def action_workspace(self) -> None:
        names = [None, *(self._latest.workspaces if self._latest else ())]
        at = names.index(self._workspace) if self._workspace in names else 0
        self._workspace = names[(at + 1) % len(names)]
        self.show()

    def action_sort(self) -> None:
        self._sort = SORTS[(SORTS.index(self._sort) + 1) % len(SORTS)]
        self.show()

    def action_denials(self) -> None:
        self.screen.toggle_class("denials-only")
        self.call_after_refresh(self.show)

    def action_pause(self) -> None:
        self._paused = not self._paused
        self.show()

    async def action_quit(self) -> None:
        self.exit(OK, return_code=OK)

    def action_interrupt(self) -> None:
        self.exit(INTERRUPTED, return_code=INTERRUPTED)


def _counts(count: int, what: str) -> list[str]:
    return [f"{_MOST} of {count} {what}" if count > _MOST else f"{count} {what}"]


class _Table(DataTable[Text]):
    """Rows that are replaced as a whole; cells that did not change are left alone, and so is where the reader
    has scrolled to."""

    def __init__(self, head: Sequence[str], *, id: str) -> None:
        super().__init__(id=id, cursor_type="none", zebra_stripes=False, show_row_labels=False)
        self._head = head
        self._shown: list[tuple[str, ...]] = []

    def on_mount(self) -> None:
        for name in self._head:
            self.add_column(_cell(name, name), key=name)

    def show(self, rows: Sequence[tuple[str, ...]]) -> None:
        for at, (old, new) in enumerate(zip_longest(self._shown, rows)):
            if new is None:
                self.remove_row(str(at))
            elif old is None:
                cells = (_cell(n, c) for n, c in zip(self._head, new, strict=True))
                self.add_row(*cells, key=str(at))
            else:
                self._change(str(at), old, new)
        self._shown = list(rows)

    def _change(self, row: str, old: tuple[str, ...], new: tuple[str, ...]) -> None:
        for name, before, now in zip(self._head, old, new, strict=True):
            if before != now:
                self.update_cell(row, name, _cell(name, now), update_width=True)


def _cell(name: str, text: str) -> Text:
    return Text(text, justify="right" if name in _NUMBERS else "left", no_wrap=True, style=_style(name, text))


def _style(name: str, text: str) -> str:
    if name in ("denied/s", "denied") and text not in ("-", "0", name):
        return "red"
    return "bold" if name.endswith("/s") and text not in ("-", name) else ""
