"""libnftables, in process: one session, one network namespace, atomic batches.

A libmnl socket belongs to the namespace its thread is in when the socket is made, and libnftables makes
one per session. A session is for one thread at a time. A batch is one netlink transaction: the kernel
applies all of it or nothing, and one that fails leaves the ruleset as it was. Everything here blocks;
100,000 elements take about a second.

The library resolves no names and reads no files for what we send; `set_numeric_proto_output` keeps
/etc/protocols out of what we read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import nftables

from egressd.model.errors import KernelError

__all__ = ["Nft"]


class Nft:
    """A session bound to the network namespace its thread is in when it is made."""

    def __init__(self) -> None:
        self._session = nftables.Nftables()
        self._session.set_numeric_proto_output(True)
        self._session.set_numeric_prio_output(True)

    def run(self, commands: Sequence[str]) -> None:
        """One atomic batch; an empty one does nothing.

        KernelError with nft's own words when any of it is refused; then nothing of it is in force.
        """
        if commands:
            self._command("\n".join(commands) + "\n")

    def list_json(self, family: Literal["netdev", "inet"] | None = None) -> dict[str, Any]:
        """`nft -j list ruleset [family]`: every object with its counters. Not one snapshot: under
        traffic, counters listed later have seen more."""
        self._session.set_json_output(True)
        try:
            text = self._command(f"list ruleset {family}" if family else "list ruleset")
        finally:
            self._session.set_json_output(False)
        listing: dict[str, Any] = json.loads(text) if text else {"nftables": []}
        return listing

    def list_text(self) -> str:
        """`nft list ruleset`, for people."""
        self._session.set_numeric_proto_output(False)
        self._session.set_numeric_prio_output(False)
        try:
            return self._command("list ruleset")
        finally:
            self._session.set_numeric_proto_output(True)
            self._session.set_numeric_prio_output(True)

    def list_chains(self) -> str:
        """`nft -t list ruleset`: without the elements of sets. For what the JSON of 1.0.6 leaves out or
        gets wrong: devices and comments of chains, flags of tables (it prints what lies in memory)."""
        self._session.set_terse_output(True)
        try:
            return self._command("list ruleset")
        finally:
            self._session.set_terse_output(False)

    def _command(self, text: str) -> str:
        status, output, error = self._session.cmd(text)
        if status:
            raise KernelError(f"nft: {_first(error)}")
        return str(output)


def _first(error: str) -> str:
    """The message without the batch's text, which may be megabytes: nft repeats the failing command."""
    lines = [line for line in error.splitlines() if "Error" in line or "error" in line]
    return "; ".join(line[:300] for line in lines[:3]) or error[:300] or "no reason given"
