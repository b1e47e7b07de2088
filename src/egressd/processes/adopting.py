"""Is the gateway that stands here ours, and sound? Then it is adopted, and everything in it goes on.

When the gateway has been made, run_dir/gateway.json says which one, in which boot, for which ruleset. What
it says is compared with what is there; any doubt means that the gateway begins anew. Then its links and
tables go, and with them what the run directory remembers of them; each sandbox that is lost with its link
is kept for the record (unrecorded.py).

The run directory is root's, but controller/ in it is not: whoever has the controller's account can put
anything there. Root makes it its own before it looks (left_behind.py), and believes no number that it reads.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from egressd.kernel.namespaces import Identity
from egressd.kernel.nft import Nft
from egressd.model.errors import KernelError
from egressd.model.identities import Link
from egressd.processes import plain_files
from egressd.processes.left_behind import OF_A_GATEWAY, clear, taken_back
from egressd.processes.unrecorded import Happening, Plain
from egressd.ruleset import build, diff, observe
from egressd.ruleset.build import Desired
from egressd.ruleset.layout import Pools
from egressd.ruleset.objects import FAMILIES, Chain, Objects, Set
from egressd.ruleset.observe import LinkCounts

__all__ = [
    "Gateway",
    "asleep",
    "clean",
    "disown",
    "doubt",
    "empty",
    "guarded",
    "in_this_boot",
    "lost",
    "mend_base",
    "standing",
]

_STATE = "gateway.json"
_LAYOUT = 1  # raise it when a gateway of before cannot be taken over although its base ruleset is the same
_LEASES = "leases"
_LEASE_BYTES = 1 << 16
_MOST_LEASES = 4096  # that are believed without a link: a file is made faster than a sandbox


class Gateway(Struct, frozen=True, forbid_unknown_fields=True):
    """Which gateway was made. Equal to `now` means that it is this one."""

    layout: int
    boot: str
    namespace: Identity
    base: str  # digest of what is static in the ruleset, and of the ranges of addresses

    @classmethod
    def now(cls, namespace: Identity, pools: Pools) -> Gateway:
        text = "\n".join([*build.base(pools), repr(pools)])
        return cls(_LAYOUT, _boot(), namespace, hashlib.sha256(text.encode()).hexdigest())

    def write(self, directory: Path) -> None:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        plain_files.replace(directory / _STATE, msgspec.json.encode(self))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def in_this_boot(directory: Path) -> bool:
    """Whether this very kernel has had a gateway of ours."""
    with suppress(msgspec.DecodeError, OSError):
        return _made(directory).boot == _boot()
    return False


def _made(directory: Path) -> Gateway:
    return msgspec.json.decode((directory / _STATE).read_bytes(), type=Gateway)


def doubt(directory: Path, now: Gateway) -> str:
    """Why the gateway cannot be the one that was made; empty if nothing speaks against it."""
    try:
        made = _made(directory)
    except FileNotFoundError:
        return "there is no word of how it was made"
    except (msgspec.DecodeError, OSError) as error:
        return f"what stands in {directory / _STATE} cannot be used: {error}"
    if made.boot != now.boot:
        return "it was made before the machine was started"
    if made.namespace != now.namespace:
        return "another namespace is pinned in its place"
    if (made.layout, made.base) != (now.layout, now.base):
        return "it was made by another version of egressd, or for other pools"
    return ""


# ---- what stands in the kernel; to be asked inside the gateway


def standing(nft: Nft) -> observe.Observed:
    """The two tables without the elements of sets, which take a second where there are many hosts."""
    return observe.parse(nft.list_shapes(), nft.list_chains())


def asleep(observed: observe.Observed) -> str:
    """What of the two tables is not there; empty if they are."""
    for family in FAMILIES:
        if not observed.tables.get(family):
            return f"table {family} is gone from it, or sleeps"
    return ""


def guarded(observed: observe.Observed) -> set[Link]:
    """Links whose guard chain stands."""
    chains = (key for key, thing in observed.things.items() if isinstance(thing, Chain))
    named = (Link.of_device(key.name) for key in chains if key.family == "netdev")
    return {link for link in named if link is not None}


def mend_base(nft: Nft, observed: observe.Observed, pools: Pools) -> list[str]:
    """Put back what is static, should somebody have changed it while nobody watched. What is foreign, and the
    elements of sets, the warden sees to as soon as it is told what should stand."""
    desired = Desired(pools=pools, wants={})
    static = build.desired(desired)
    things: Objects = {}
    for key in static.keys() & observed.things.keys():
        things[key] = have = observed.things[key]
        want = static[key]
        if isinstance(have, Set) and isinstance(want, Set):
            things[key] = replace(have, elements=want.elements)
    operations = diff.plan(observe.Observed(tables=observed.tables, things=things), desired)
    nft.run(diff.commands(operations))
    return [operation.describe() for operation in operations]


# ---- what is lost when it begins anew


class _Lease(Struct):
    """What is read of the controller's files: who had which link."""

    link: Annotated[int, Meta(ge=1, le=999_999_999)]
    workspace: Annotated[str, Meta(max_length=64)]
    uid: Annotated[int, Meta(ge=0, le=2**32)] | None = None


def lost(directory: Path, present: Iterable[Link], nft: Nft | None, *, why: str) -> list[Happening]:
    """A record for each link that is in the gateway or leased: whose it was, and what it has counted."""
    present = set(present)
    leases = _leases(directory, present)
    counts = _counts(nft)
    found = []
    for link in sorted({*present, *leases.keys()}):
        lease = leases.get(link)
        fields: dict[str, Plain] = {"link": link.device, "why": why}
        fields["workspace"] = lease.workspace if lease else "unknown"
        if lease is not None and lease.uid is not None:
            fields["uid"] = lease.uid
        found.append(Happening("sandbox-lost", fields | _numbers(counts.get(link.device))))
    return found


def _counts(nft: Nft | None) -> dict[str, LinkCounts]:
    """By device; nothing where the tables are gone, or are those of a version that spoke otherwise."""
    if nft is not None:
        with suppress(KernelError, ValueError, KeyError, TypeError):
            return observe.counters(nft.list_counters()).links
    return {}


def _numbers(counts: LinkCounts | None) -> dict[str, Plain]:
    numbers: dict[str, Plain] = {}
    if counts is not None:
        for name in ("in_", "ok", "denied", "other"):
            tally, word = getattr(counts, name), name.rstrip("_")
            numbers |= {f"{word}_packets": tally.packets, f"{word}_bytes": tally.bytes}
    return numbers


def _leases(directory: Path, present: Collection[Link]) -> dict[Link, _Lease]:
    found: dict[Link, _Lease] = {}
    with (
        suppress(OSError),
        taken_back(directory / "controller") as own,
        taken_back(_LEASES, below=own) as place,
    ):
        names = (Path(name) for name in os.listdir(place))  # noqa: PTH208 -- by descriptor
        links = sorted(link for name in names if (link := Link.of_device(name.stem)) is not None)
        alone = [link for link in links if link not in present]
        for link in (*present, *alone[:_MOST_LEASES]):
            # RecursionError: it is nested deeply; ValueError: it is no text
            with suppress(OSError, ValueError, RecursionError):
                lease = msgspec.json.decode(_contents(f"{link.device}.json", place), type=_Lease)
                if lease.link == link.number:
                    found[link] = lease
    return found


def _contents(name: str, directory: int) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=directory)
    try:
        return os.read(descriptor, _LEASE_BYTES) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    finally:
        os.close(descriptor)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# ---- what is left lying about


def disown(directory: Path) -> None:
    """It is not adopted from here on, whatever happens before it has begun anew."""
    (directory / _STATE).unlink(missing_ok=True)


def empty(directory: Path) -> None:
    """Nothing in the run directory is of this gateway: it is gone, or about to begin anew."""
    disown(directory)
    with suppress(FileNotFoundError), taken_back(directory / "controller") as own:
        for name in (*OF_A_GATEWAY, _LEASES):
            clear(name, below=own)


def clean(directory: Path, state: Path) -> list[str]:
    """Files that a crash left half written, and sockets at which nobody listens. While no daemon runs."""
    own = directory / "controller"
    places = [place for place in (directory, own, own / _LEASES, state) if _remove(place, ending=".new")]
    dead = [path for path in sorted(directory.glob("*.sock")) if _dead(path)]
    for path in dead:
        path.unlink(missing_ok=True)
    return [*(f"removed what was half written in {place}" for place in places),
            *(f"removed {path}: nobody listens there" for path in dead)]  # fmt: skip


def _remove(directory: Path, *, ending: str = "") -> bool:
    """Its files; whether there were any. One that is none, or no directory of ours, stays."""
    removed = False
    with suppress(OSError), _opened(directory) as place:
        for name in os.listdir(place):  # noqa: PTH208 -- by descriptor
            if name.endswith(ending):
                with suppress(OSError):
                    os.unlink(name, dir_fd=place)
                    removed = True
    return removed


def _dead(path: Path) -> bool:
    """unix(7): a socket that nobody has bound any more refuses; one that listens, or is full, does not."""
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect(str(path))
            except ConnectionRefusedError:
                return True
            except OSError:
                continue  # EPROTOTYPE: it is of the other kind, and somebody has it
            return False
    return False
