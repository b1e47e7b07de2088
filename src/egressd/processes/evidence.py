"""The controller's part of a proof: what the journal cannot say about a workspace.

The policy in force, the ruleset as the kernel lists it, what of that is not as compiled, which programs these
are, and which boot of the machine this is. The auditor's prover adds the journal's part and signs the whole.

A proof is for the members of one workspace. Of the ruleset it has the digest of the whole text, and the text
without what belongs to others: only what is known to be everybody's or theirs is let through.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from egressd import __version__
from egressd.ipc import messages
from egressd.model.errors import Refused
from egressd.model.identities import Link
from egressd.model.verdicts import Reason
from egressd.policy.compile import canonical
from egressd.policy.compiled import Policy
from egressd.processes.residency import tables_of
from egressd.ruleset import build
from egressd.ruleset.layout import TABLE, Pools
from egressd.ruleset.objects import FAMILIES

if TYPE_CHECKING:
    from egressd.processes.controller import Controller

__all__ = ["Own", "boot_id", "facts", "own_drift", "own_text", "prove", "versions"]

_PROVING = 600.0  # seconds: a journal of years is read from end to end
_TABLE = re.compile(r"table (?P<family>\w+) (?P<name>\S+) \{")
_OBJECT = re.compile(r"\t(?P<word>chain|set|map|counter|quota|\w+) (?P<name>\S+) \{")
_ELEMENTS = re.compile(r"\n\t\telements = \{ (?P<elements>[^{}]*) \}(?=\n)")
_MARK, _DEVICE = re.compile(r"\b0x([0-9a-f]{8})\b"), re.compile(r'"(eg[0-9]+)"')
# What operations of ruleset.diff are called: "make chain netdev egressd acme_4", "add to acme_out4: ..."
_DRIFTED = re.compile(
    r"(?:(?P<word>\w+) (?P<family>netdev|inet) egressd |^(?:add to|remove from) )(?P<name>[\w-]+)"
)
_SORTS = {"of": "chain", "map": "set", None: "set"}  # "write the 9 rules of ..."


@dataclass(frozen=True, slots=True)
class Own:
    """What of the gateway's ruleset is one workspace's. `devices`: of its links."""

    workspace: str
    index: int
    devices: frozenset[str]
    static: frozenset[tuple[str, str, str]]  # (family, sort, name) of what is everybody's

    @classmethod
    def of(cls, controller: Controller, workspace: str) -> Own:
        links = controller.leases.by_link.values()
        return cls(
            workspace=workspace,
            index=controller.wants[workspace].index,
            devices=frozenset(s.link.device for s in links if s.workspace == workspace),
            static=_static(controller.pools),
        )

    def owns(self, name: str, *, family: str, sort: str) -> bool:
        """By how objects are named: "acme_out4"; "eg7", "eg7_in". No workspace's name has an underscore, but
        one may be called eg7: what kind of thing it is tells the two apart."""
        owner, _, rest = name.partition("_")
        if _is_of_a_link(rest, family=family, sort=sort):
            return owner in self.devices
        return owner == self.workspace and bool(rest)

    def shared(self, name: str, *, family: str, sort: str) -> bool:
        """`family` may be empty: either."""
        return any((each, sort, name) in self.static for each in _families(family))

    def element(self, text: str) -> bool:
        """Whether an element of a set that all share may be shown: it has this workspace's marks and links,
        or none at all."""
        marks = [int(found, 16) >> 14 & 0x1FFF for found in _MARK.findall(text)]
        return all(index == self.index for index in marks) and all(
            device in self.devices for device in _DEVICE.findall(text)
        )


def _families(family: str) -> tuple[str, ...]:
    return (family,) if family else FAMILIES


def _is_of_a_link(rest: str, *, family: str, sort: str) -> bool:
    """Whether an object called `OWNER_rest` is a link's (see ruleset.build)."""
    match sort:
        case "chain":
            return not rest or (family != "netdev" and rest == "connections")
        case "counter":
            return rest in build.LINK_COUNTERS
        case _:
            return sort in ("quota", "limit")


@functools.cache
def _static(pools: Pools) -> frozenset[tuple[str, str, str]]:
    things = build.desired(build.Desired(pools=pools, wants={}))
    return frozenset((key.family, key.sort, key.name) for key in things)


# ---- the ruleset, without what is others'


def own_text(listing: str, own: Own) -> str:
    """`nft list ruleset` without the objects and elements of other workspaces, and without other tables."""
    return "".join(_tables(listing, own))


def _tables(listing: str, own: Own) -> Iterator[str]:
    for head, body in _blocks(listing, indent=""):
        found = _TABLE.fullmatch(head)
        if found is None or found["name"] != TABLE:
            yield "# here stands what is not egressd's\n"
            continue
        comment = [line for line in body.split("\n") if line.startswith("\tcomment ")]
        kept = [text for text in _objects(body, found["family"], own) if text]
        yield "\n".join([head, *comment, ""]) + "\n".join(kept) + "}\n"


def _objects(body: str, family: str, own: Own) -> Iterator[str]:
    for head, inside in _blocks(body, indent="\t"):
        found = _OBJECT.fullmatch(head)
        if found is None:
            continue
        sort = "set" if found["word"] == "map" else found["word"]
        if own.shared(found["name"], family=family, sort=sort):
            yield f"{head}\n{_own_elements(inside, own)}\t}}\n"
        elif own.owns(found["name"], family=family, sort=sort):
            yield f"{head}\n{inside}\t}}\n"


def _own_elements(inside: str, own: Own) -> str:
    def kept(found: re.Match[str]) -> str:
        elements = [text.strip() for text in found["elements"].split(",")]
        mine = [text for text in elements if own.element(text)]
        if len(mine) == len(elements):
            return found[0]
        return "\n\t\telements = { " + ",\n\t\t\t     ".join(mine) + " }" if mine else ""

    return _ELEMENTS.sub(kept, f"\n{inside}")[1:]


def _blocks(text: str, *, indent: str) -> Iterator[tuple[str, str]]:
    """(head, inside) of each `head {` ... `}` at this indentation. No comment holds a line's end."""
    head: str | None = None
    inside: list[str] = []
    for line in text.split("\n"):
        if head is None:
            is_head = line.startswith(indent) and line.endswith("{") and line[len(indent) :][:1].strip() != ""
            head, inside = (line, []) if is_head else (None, [])
        elif line == f"{indent}}}":
            yield head, "".join(f"{each}\n" for each in inside)
            head = None
        else:
            inside.append(line)


def own_drift(drift: Iterable[str], own: Own) -> list[str]:
    """Of the differences between kernel and compiled policy: those of this workspace and of nobody."""
    return [text for line in drift if (text := _own_line(line, own))]


def _own_line(line: str, own: Own) -> str:
    if line.startswith("table "):
        return line
    found = _DRIFTED.search(line)
    if found is None:
        return "something that is not egressd's"
    name, family = found["name"], found["family"] or ""
    sort = _SORTS.get(found["word"], found["word"])
    if own.owns(name, family=family, sort=sort):
        return line
    if not own.shared(name, family=family, sort=sort):
        return ""
    return f"{line.partition(':')[0]}: elements" if ":" in line else line


# ---- the facts


def boot_id() -> str:
    """This boot of the machine; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@functools.cache
def versions() -> dict[str, str]:
    system = os.uname()
    return {
        "egressd": __version__,
        "kernel": f"{system.sysname} {system.release} {system.version} {system.machine}",
        "nft": _nft_version(),
        "python": platform.python_version(),
    }


def _nft_version() -> str:
    """Of the program, which comes with the library that the warden uses: that one does not tell."""
    try:
        done = subprocess.run(
            ["nft", "--version"],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()[:200]


def facts(controller: Controller, policy: Policy, *, listing: str, drift: Sequence[str]) -> dict[str, Any]:
    """journal.statement.Facts. `listing`: the whole ruleset; `drift`: of everybody."""
    own = Own.of(controller, policy.workspace)
    return {
        "policy": {"digest": policy.digest, "text": canonical(policy), "guard": policy.guard.value},
        "ruleset": {
            "digest": f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}",
            "text": own_text(listing, own),
            "drift": own_drift(drift, own),
        },
        "versions": versions(),
        "machine": {"boot": controller.boot},
        "registry": {
            "digest": controller.registry.digest,
            "tables": tables_of(controller.registry),
            "catalogue": controller.registry.own,
        },
    }


async def prove(controller: Controller, asked: messages.Prove, *, link: Link | None) -> bytes:
    """The signed envelope. Refused, or PeerGone, with nothing proved."""
    if link is not None:
        await controller.told(link)
    snapshots = await controller.snapshots.take(asked.workspace)
    drift, listing = await controller.drift(), await controller.ruleset()
    policy, snapshot = controller.policies.get(asked.workspace), snapshots.get(asked.workspace)
    if policy is None or snapshot is None:
        raise Refused(Reason.WORKSPACE, f"workspace {asked.workspace} was removed while this was asked")
    document = msgspec.json.encode(facts(controller, policy, listing=listing, drift=drift))
    peer = controller.peer("evidence")
    message = messages.MakeProof(
        request=peer.next_request(),
        payload_length=len(document),
        workspace=asked.workspace,
        link=None if link is None else link.number,
        since=asked.since,
        until=asked.until,
        after=snapshot,
        continues=asked.continues,
    )
    received = await peer.ask(message, data=document, timeout=_PROVING)
    return received.payload()
