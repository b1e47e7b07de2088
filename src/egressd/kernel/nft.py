"""libnftables, in process: one session, one network namespace, atomic batches.

A libmnl socket belongs to the namespace its thread is in when the socket is made, and libnftables makes
one per session. A session is for one thread at a time. A batch is one netlink transaction: the kernel
applies all of it or nothing, and one that fails leaves the ruleset as it was. Everything here blocks;
100,000 elements take about a second.

The library resolves no names and reads no files for what we send; `set_numeric_proto_output` keeps
/etc/protocols out of what we read.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import nftables

from egressd.kernel.dumps import Dumps
from egressd.model.errors import KernelError

__all__ = ["Nft"]


_STEP, _LONGEST = (
    0.5,
    120.0,
)  # seconds of a listing: between two calls of `meanwhile`; until it counts as hung


class Nft:
    """A session bound to the network namespace its thread is in when it is made.

    `meanwhile` is called every half second while everything is listed, which takes two seconds with a
    thousand links and far more on a busy machine: so that who waits for it can say that it lives.
    """

    meanwhile: Callable[[], None] | None = None

    def __init__(self) -> None:
        self._dumps = Dumps()
        self._session = nftables.Nftables()
        self._session.set_numeric_proto_output(True)
        self._session.set_numeric_prio_output(True)

    def __del__(self) -> None:
        """As Nftables closes its session."""
        with contextlib.suppress(AttributeError):  # it could not be made
            self._dumps.close()

    def run(self, commands: Sequence[str]) -> None:
        """One atomic batch; an empty one does nothing.

        KernelError with nft's own words when any of it is refused; then nothing of it is in force.
        """
        if commands:
            self._command("\n".join(commands) + "\n")

    def would_send(self, commands: Sequence[str]) -> str:
        """The messages that `run` would send, as libmnl prints them. Nothing is changed."""
        self._session.set_debug({"mnl"})
        self._session.set_dry_run(True)
        try:
            # A refusal is no matter: kernels before 6.16 know no chain for a device that is not there.
            return str(self._session.cmd("\n".join(commands) + "\n")[1])
        finally:
            self._session.set_dry_run(False)
            self._session.set_debug(set())

    def list_json(self, family: Literal["netdev", "inet"] | None = None) -> dict[str, Any]:
        """`nft -j list ruleset [family]`: every object with its counters. Not one snapshot: under
        traffic, counters listed later have seen more. KernelError while any table has a flag."""
        if flagged := self._dumps.flagged():
            # 1.0.6 frees the flags before it prints them: it writes anything, breaks off, or dies of it.
            names = ", ".join(repr(name) for name in flagged)
            raise KernelError(f"nft: what is dormant, or owned by a process, cannot be listed: {names}")
        return self._json(f"list ruleset {family}" if family else "list ruleset")

    def list_counters(self) -> dict[str, Any]:
        """`nft -j list counters`: the named ones, of dormant tables, too. In the form of `list_json`."""
        return self._json("list counters")

    def _json(self, command: str) -> dict[str, Any]:
        self._session.set_json_output(True)
        try:
            text = self._listed(command)
        finally:
            self._session.set_json_output(False)
        listing: dict[str, Any] = json.loads(text) if text else {"nftables": []}
        return listing

    def list_shapes(self) -> dict[str, Any]:
        """`nft -t -j list ruleset`: every object, sets and maps without their elements."""
        self._session.set_terse_output(True)
        try:
            return self.list_json()
        finally:
            self._session.set_terse_output(False)

    def list_text(self) -> str:
        """`nft list ruleset`, for people."""
        self._session.set_numeric_proto_output(False)
        self._session.set_numeric_prio_output(False)
        try:
            return self._listed("list ruleset")
        finally:
            self._session.set_numeric_proto_output(True)
            self._session.set_numeric_prio_output(True)

    def list_table(self, family: str, name: str) -> str | None:
        """One table, without what its counters say; None where there is none of that name."""
        self._session.set_stateless_output(True)
        try:
            return self._command(f"list table {family} {name}")
        except KernelError as error:
            if "No such file or directory" in str(error):
                return None
            raise
        finally:
            self._session.set_stateless_output(False)

    def list_chains(self) -> str:
        """`nft -t list ruleset`: without the elements of sets. For what the JSON of 1.0.6 leaves out or
        gets wrong: devices and comments of chains, flags of tables (it prints what lies in memory)."""
        self._session.set_terse_output(True)
        try:
            return self._listed("list ruleset")
        finally:
            self._session.set_terse_output(False)

    def _listed(self, text: str) -> str:
        if self.meanwhile is None:
            return self._command(text)
        found: list[str | KernelError] = []

        def ask() -> None:
            try:
                found.append(self._command(text))
            except KernelError as error:
                found.append(error)

        # One thread at a time has the session; ctypes lets the other run while the library works.
        worker, began = threading.Thread(target=ask, name="listing", daemon=True), time.monotonic()
        worker.start()
        while worker.is_alive():
            worker.join(_STEP)
            if time.monotonic() - began < _LONGEST:
                self.meanwhile()
        listed = found[0] if found else KernelError("nft: the listing failed")
        if isinstance(listed, KernelError):
            raise listed
        return listed

    def _command(self, text: str) -> str:
        status, output, error = self._session.cmd(text)
        if status:
            raise KernelError(f"nft: {_first(error)}")
        return str(output)


def _first(error: str) -> str:
    """The message without the batch's text, which may be megabytes: nft repeats the failing command."""
    lines = [line for line in error.splitlines() if "Error" in line or "error" in line]
    return "; ".join(line[:300] for line in lines[:3]) or error[:300] or "no reason given"
