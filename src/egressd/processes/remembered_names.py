"""Names on disk: where they led, and which a wildcard's rule was granted for.

The kernel goes on translating while there is no controller. The next one removes what it does not know of
(`Settle`), so it has to know what its predecessor did: else every stream to a name would be cut, and every
address that a sandbox remembers lead nowhere, until the name is asked for again.

The file is a log, a JSON array a line, since names come by the thousand: what has changed is written at once,
in one write(2), before the kernel is told. Where most lines are overtaken by later ones it is written anew;
numbers of names that were given back are in `numbers.json` by then. It lies in memory (/run): nothing is
synchronised, and after a boot there is nothing to remember.

    ["a", host, private, terms, slots4, slots6]      where a name leads
    ["f", host, private, terms]                      it leads nowhere
    ["g", workspace, host, wildcard, block, private, since]
    ["r", workspace, host, block]                    given back: the last number to be another's
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from egressd.model.addresses import objection
from egressd.policy.compiled import HostRule
from egressd.processes import plain_files
from egressd.processes.grants import Grant
from egressd.processes.left_behind import NAMES
from egressd.ruleset.layout import SLOTS, Pools

if TYPE_CHECKING:
    from egressd.processes.grants import Held
    from egressd.processes.names import Key, Slots4, Slots6

__all__ = ["Memory", "NamesFile"]

log = logging.getLogger("controller")

_SPARE: Final = 4096  # lines that may be superfluous, whatever there is
_PLACE: TypeAlias = tuple[str, str]  # workspace, host


@dataclass(slots=True)
class Memory:
    """What a file says."""

    learned: dict[Key, tuple[Slots4, Slots6]] = field(default_factory=dict)
    granted: dict[_PLACE, Grant] = field(default_factory=dict)
    gone: dict[_PLACE, int] = field(default_factory=dict)  # the block that it had, oldest first

    def held(self) -> Held:
        held: Held = {}
        for (workspace, host), grant in self.granted.items():
            held.setdefault(workspace, {})[host] = grant
        return held


class NamesFile:
    """`note` what may have changed, `flush` before anybody relies on it."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAMES
        self._names: dict[Key, None] = {}  # to be written
        self._grants: dict[_PLACE, tuple[Grant, bool]] = {}  # the same, and whether it is held
        self._lines = 0
        self._broken = False

    def note_names(self, keys: Iterable[Key]) -> None:
        self._names.update(dict.fromkeys(keys))

    def note_grant(self, grant: Grant, *, held: bool) -> None:
        self._grants[grant.workspace, grant.host] = grant, held

    def flush(self, learned: Mapping[Key, tuple[Slots4, Slots6]], held: Held) -> bool:
        """Append what has changed; where that cannot be written it is told, and nobody fails for it. True:
        the file is long, and better written anew (`rewrite`)."""
        if not self._names and not self._grants:
            return False
        lines = [_name_line(key, learned.get(key)) for key in self._names]
        lines += [
            _grant_line(grant) if is_held else _gone_line(grant) for grant, is_held in self._grants.values()
        ]
        self._names.clear()
        self._grants.clear()
        self._append(lines)
        live = len(learned) + sum(map(len, held.values()))
        return self._broken or self._lines > 2 * live + _SPARE

    def rewrite(self, learned: Mapping[Key, tuple[Slots4, Slots6]], held: Held) -> None:
        """What there is now, and no more. The numbers of what is gone must be on disk elsewhere."""
        self._names.clear()
        self._grants.clear()
        lines = [_name_line(key, slots) for key, slots in learned.items()]
        lines += [_grant_line(grant) for grants in held.values() for grant in grants.values()]
        with self._told():
            plain_files.replace(self._path, _joined(lines))
        self._lines = len(lines)

    def _append(self, lines: Collection[bytes]) -> None:
        with self._told(), self._path.open("ab", buffering=0) as stream:
            data = _joined(lines)
            if stream.write(data) != len(data):
                raise OSError(0, "not all of it could be written")
        self._lines += len(lines)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Without this file streams to names end with the controller; nothing else depends on it."""
        try:
            yield
            self._broken = False
        except OSError as error:
            if not self._broken:
                log.error("where names lead is not remembered: %s: %s", self._path, error.strerror)  # noqa: TRY400
            self._broken = True

    # ---- what a controller before this one has left

    def load(self, pools: Pools) -> Memory:
        """As far as the file can be read; what follows on a line that is none is left out."""
        memory = Memory()
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return memory
        except OSError as error:
            log.error("where names led is not known: %s: %s", self._path, error.strerror)  # noqa: TRY400
            return memory
        for number, line in enumerate(data.splitlines(), 1):
            try:
                _take(memory, msgspec.json.decode(line), pools)
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                log.error("%s:%d: %s; the rest is left out", self._path, number, error)  # noqa: TRY400
                break
        return memory


def _joined(lines: Iterable[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _name_line(key: Key, slots: tuple[Slots4, Slots6] | None) -> bytes:
    if slots is None:
        return msgspec.json.encode(["f", *key])
    return msgspec.json.encode(["a", *key, *([None if a is None else str(a) for a in s] for s in slots)])


def _grant_line(grant: Grant) -> bytes:
    return msgspec.json.encode(
        ["g", grant.workspace, grant.host, grant.wildcard, grant.block, grant.rule.private, grant.since]
    )


def _gone_line(grant: Grant) -> bytes:
    return msgspec.json.encode(["r", grant.workspace, grant.host, grant.block])


def _take(memory: Memory, line: Any, pools: Pools) -> None:
    """ValueError, TypeError or LookupError for what is no line of ours."""
    if line[0] == "a":
        _led(memory, line[1:], pools)
    else:
        _TAKERS[line[0]](memory, line[1:])


def _led(memory: Memory, line: Any, pools: Pools) -> None:
    host, private, terms, four, six = line
    slots4 = tuple(None if text is None else IPv4Address(text) for text in four)
    slots6 = tuple(None if text is None else IPv6Address(text) for text in six)
    if len(slots4) != SLOTS or len(slots6) != SLOTS:
        raise ValueError(f"{host} has {len(slots4)} and {len(slots6)} slots")
    for address in (*slots4, *slots6):
        if address is not None and objection(address, private=private, own=pools.own) is not None:
            raise ValueError(f"{host} may not lead to {address}")
    memory.learned[str(host), bool(private), str(terms)] = slots4, slots6


def _forgotten(memory: Memory, line: Any) -> None:
    host, private, terms = line
    memory.learned.pop((host, private, terms), None)


def _granted(memory: Memory, line: Any) -> None:
    """Its ports and its index are the policy's to say."""
    workspace, host, wildcard, block, private, since = line
    rule = HostRule(host=str(host), ports=(), inspected=(), private=bool(private), line=0)
    memory.gone.pop((workspace, host), None)
    memory.granted[workspace, host] = Grant(
        workspace=workspace, index=0, rule=rule, wildcard=wildcard, block=int(block), since=float(since)
    )


def _released(memory: Memory, line: Any) -> None:
    workspace, host, block = line
    memory.granted.pop((workspace, host), None)
    memory.gone[workspace, host] = int(block)


_TAKERS: Final[Mapping[str, Callable[[Memory, Any], None]]] = {
    "f": _forgotten,
    "g": _granted,
    "r": _released,
}
