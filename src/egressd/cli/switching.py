"""Throwing a switch: the policy's file is changed, and a running egressd applies it.

The order is the point. Who may not have it applied, or may not write the file, is told before anything is
touched. The new text is compiled before it is written. egressd has the last word: if it refuses the file, the
file is put back, so that it says what is in force. Where egressd cannot apply it just now, the file stays as
it was wanted, and that is said; to put it back would make the next apply undo the switch.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egressd.cli.daemon import Document
from egressd.cli.exits import FOUND, OK
from egressd.cli.policy_changes import change_lines
from egressd.cli.policy_rewriting import NotReplaced, PolicyFile
from egressd.cli.screen import complain, paint, print_json
from egressd.cli.switches import GUARD, LOCAL_ONLY, RESIDENCY, Switch, plain, refuse
from egressd.cli.text import escape_lines
from egressd.model.errors import EgressdError, PolicyError, Refused
from egressd.model.verdicts import Reason
from egressd.policy import diff, edit
from egressd.policy.compiled import Guard, Policy
from egressd.policy.document import load
from egressd.processes.config import Config
from egressd.processes.registry_files import read_registry
from egressd.processes.workspaces import DEFAULT_POOLS, public_suffixes
from egressd.sandbox.control import Control, NotRunning

__all__ = ["show", "throw"]


# ---- egressd, if it runs


@dataclass(frozen=True, slots=True)
class _Egressd:
    """`control` None: it does not run. `directory` "": it does not tell this caller where policies are."""

    control: Control | None
    workspaces: dict[str, Document]
    directory: str
    residency_dir: str

    def directory_for(self, said: str | None) -> str:
        if said and self.directory and not _are_same(said, self.directory):
            text = f"egressd reads its policies from {self.directory}, not from {said}"
            raise Refused(Reason.WORKSPACE, f"{text}: leave --workspaces-dir out")
        return said or self.directory or Config().workspaces_dir

    def source(self, file: PolicyFile) -> str:
        """What it calls the file."""
        return str(Path(self.directory or file.directory, file.name))

    def compiled(self, data: bytes, file: PolicyFile) -> Policy:
        """As it would. PolicyError if it would refuse it."""
        return load(
            data,
            source=file.path,
            expected_name=file.workspace,
            is_public_suffix=public_suffixes(),
            own=DEFAULT_POOLS.own,
            registry=read_registry(Path(self.residency_dir)),
        )


@contextmanager
def _egressd(run_dir: str) -> Iterator[_Egressd]:
    usual = Config()
    try:
        control = Control(run_dir)
    except NotRunning:
        yield _Egressd(None, {}, "", usual.residency_dir)
        return
    with control:
        status = control.ask("status")
        workspaces = {each["workspace"]: each for each in status["workspaces"]}
        directories = status.get("workspaces_dir", ""), status.get("residency_dir", usual.residency_dir)
        yield _Egressd(control, workspaces, *directories)


def _are_same(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


# ---- showing


def show(args: argparse.Namespace, which: Switch, workspace: str) -> int:
    """What the file says, for who may read it; else what is in force."""
    with _egressd(args.run_dir) as egressd:
        force = egressd.workspaces.get(workspace)
        if egressd.control is not None and not egressd.directory:
            return _show_force(args, which, workspace, force)
        with PolicyFile(egressd.directory_for(args.workspaces_dir), workspace) as file:
            try:
                policy = egressd.compiled(file.read(), file)
            except PolicyError as error:
                return _broken(args, error, "what the file says cannot be told")
        running = egressd.control is not None
    differs = running and (force is None or force["policy"] != policy.digest)
    document = {
        "workspace": workspace,
        "setting": which.name,
        "value": plain(which.of(policy)),
        "file": file.path,
        "running": running,
        "in_force": running and not differs,
    }
    lines = [f"{which.name} of {workspace}: {which.told(which.of(policy))}"]
    if differs:
        lines.append("the file is not what is in force: egressctl policy diff, egressctl policy apply")
    return _say(args, document, lines)


def _show_force(args: argparse.Namespace, which: Switch, workspace: str, force: Document | None) -> int:
    if force is None or force.get("policy") is None:
        text = f"you are not a member of a workspace {workspace!r}; members are listed in its policy"
        raise Refused(Reason.MEMBER, text)
    value = force[which.key]
    if which is RESIDENCY:
        value = tuple(value["jurisdictions"]) if value else ()
    document = {"workspace": workspace, "setting": which.name, "value": plain(value), "running": True}
    lines = [f"{which.name} of {workspace}: {which.told(value)}"]
    return _say(args, document | {"in_force": True}, lines)


# ---- throwing


def throw(args: argparse.Namespace, which: Switch, workspace: str, value: edit.Setting) -> int:
    with _egressd(args.run_dir) as egressd:
        pending = _pending(egressd, which, workspace)
        with PolicyFile(egressd.directory_for(args.workspaces_dir), workspace) as file:
            file.check_right()
            if not args.dry_run:
                file.lock()
            try:
                throwing = _prepared(args, which, egressd, file=file, value=value)
            except PolicyError as error:
                return _broken(args, error, "nothing was changed")
            if args.dry_run:
                return throwing.foretell()
            return throwing.finish(pending)


def _pending(egressd: _Egressd, which: Switch, workspace: str) -> list[Document]:
    """What was written before and is not in force. To ask is to learn whether the caller may apply at all."""
    if egressd.control is None:
        return []
    if not egressd.directory:
        text = f"only root and the daemon's own user change {which.name} of {workspace}: use sudo"
        raise Refused(Reason.MEMBER, text)
    changes: list[Document] = egressd.control.apply(dry_run=True)["changes"]
    return changes


def _prepared(
    args: argparse.Namespace, which: Switch, egressd: _Egressd, *, file: PolicyFile, value: edit.Setting
) -> _Throwing:
    """Compiled before and after; what they mean differs in that one thing."""
    old = file.read()
    before = egressd.compiled(old, file)
    new = edit.changed(old.decode(), which.key, value, source=file.path).encode()
    after = egressd.compiled(new, file)
    wanted = tuple(sorted(value)) if isinstance(value, tuple) else value
    if which.of(after) != wanted or _rest(before, which) != _rest(after, which):
        raise NotReplaced(
            f"{which.name} of {file.workspace} cannot be changed alone: change {file.path} by hand"
        )
    return _Throwing(args, which, egressd, file, (old, new), (before, after))


def _rest(policy: Policy, which: Switch) -> object:
    """What a policy says beside one setting. A rule that is barred is written all the same."""
    settings = [each.of(policy) for each in (GUARD, RESIDENCY, LOCAL_ONLY) if each is not which]
    written = sorted((rule.key, *map(str, rule.ports)) for rule in policy.written)
    providers = [(provider.name, provider.base_url) for provider in policy.providers]
    routes = [(route.name, route.providers) for route in policy.routes]
    return policy.members, policy.limits, policy.wildcards, settings, written, providers, routes


@dataclass(frozen=True, slots=True)
class _Throwing:
    """Text and policy, before and after."""

    args: argparse.Namespace
    which: Switch
    egressd: _Egressd
    file: PolicyFile
    texts: tuple[bytes, bytes]
    policies: tuple[Policy, Policy]

    @property
    def writes(self) -> bool:
        return self.texts[0] != self.texts[1]

    @property
    def changes(self) -> list[Document]:
        """As egressd tells them."""
        return [
            {"workspace": self.file.workspace, "text": change.describe(), "widens": change.widens}
            for change in diff.diff(*self.policies)
        ]

    def foretell(self) -> int:
        old, new = (text.decode().splitlines(keepends=True) for text in self.texts)
        path = self.file.path
        text = "".join(_ended(line) for line in difflib.unified_diff(old, new, path, path))
        shown = escape_lines(text.replace("\r\n", "\n")).splitlines()
        return self._say(
            "nothing is changed: --dry-run",
            self.changes,
            before=shown,
            written=False,
            applied=False,
            diff=text,
        )

    def finish(self, pending: Sequence[Document]) -> int:
        """Write the file, and have it applied."""
        mine = [change for change in pending if change["workspace"] == self.file.workspace]
        if not self.writes and not mine:
            running = self.egressd.control is not None
            return self._say("as it was", [], written=False, applied=running)
        if self.writes:
            self.file.replace(self.texts[1], instead_of=self.texts[0])
        if self.egressd.control is None:
            where = "file; egressd is not running: it holds when egressd starts"
            return self._say(where, self.changes, written=self.writes, applied=False)
        try:
            answer = self.egressd.control.apply(why=self._why, about=self.file.workspace)
        except (EgressdError, OSError, ValueError) as error:
            return self._not_applied(error)
        source = f"{self.egressd.source(self.file)}:"
        refused = [problem for problem in answer["problems"] if problem.startswith(source)]
        if refused and self.writes:
            return self._put_back(self.egressd.control, refused)
        return self._applied(answer, pending)

    @property
    def _why(self) -> str:
        return self.which.asked(self.file.workspace, self.which.of(self.policies[1]))

    def _applied(self, answer: Document, pending: Sequence[Document]) -> int:
        self._say(
            "file and kernel", answer["changes"], written=self.writes, applied=True,
            problems=answer["problems"], milliseconds=answer["milliseconds"],
        )  # fmt: skip
        if pending:
            complain("what had been written before and not been applied was applied with it, see above")
        for problem in answer["problems"]:
            complain(f"problem: {problem}")
        return FOUND if answer["problems"] else OK

    def _put_back(self, control: Control, problems: Iterable[str]) -> int:
        for problem in problems:
            complain(f"problem: {problem}")
        self.file.replace(self.texts[0], instead_of=self.texts[1])
        try:
            control.apply(why=f"{self._why}: put back", about=self.file.workspace)
        except (EgressdError, OSError, ValueError) as error:
            complain(f"egressd has not read the directory again: {error}")
        text = f"egressd refuses {self.file.path} like that: it was put back, and nothing has changed"
        return refuse(self.args, Reason.WORKSPACE, text, status=FOUND)

    def _not_applied(self, error: Exception) -> int:
        reason = error.reason if isinstance(error, Refused) else Reason.UNKNOWN
        state = "is changed" if self.writes else "says so already"
        text = f"{self.file.path} {state}, but egressd has not applied it: {error}"
        return refuse(self.args, reason, f"{text}; try again: egressctl policy apply")

    # ---- words

    def _say(self, where: str, changes: list[Document], *, before: Sequence[str] = (), **more: Any) -> int:
        which, (was, is_now) = self.which, self.policies
        opens = [sentence for sentence in _opened(was, is_now) if self.writes or changes]
        document = {
            "workspace": self.file.workspace,
            "setting": which.name,
            "before": plain(which.of(was)),
            "after": plain(which.of(is_now)),
            "file": self.file.path,
            "opens": opens,
            "changes": changes,
            "problems": [],
            **more,
        }
        told = [which.told(which.of(policy)) for policy in self.policies]
        change = " -> ".join(dict.fromkeys(told))
        lines = [f"{which.name} of {self.file.workspace}: {change} ({where})", *before]
        lines += change_lines(changes, paint())
        lines += [paint().bad(f"this opens: {sentence}") for sentence in opens]
        if which is not LOCAL_ONLY and is_now.pin and is_now.holding is not Guard.ENFORCE:
            lines.append("the guard does not enforce, so what is not listed may still be anywhere")
        return _say(self.args, document, lines)


def _opened(before: Policy, after: Policy) -> Iterator[str]:
    """What sandboxes may do now that they could not, in words; one by one, the change lines say it."""
    if before.holding is Guard.ENFORCE and after.holding is not Guard.ENFORCE:
        yield "sandboxes may reach what is not listed"
    if before.local_only and not after.local_only:
        yield "hosts may be reached again"
    if before.pin and not after.pin:
        yield "what is listed may be anywhere"
    elif before.pin and not after.pin.countries <= before.pin.countries:
        more = sorted(set(after.pin.codes) - set(before.pin.codes))
        yield f"what is listed may also be in {', '.join(more)}"


def _ended(line: str) -> str:
    return line if line.endswith("\n") else f"{line}\n\\ no newline at the end\n"


def _broken(args: argparse.Namespace, error: PolicyError, so: str) -> int:
    for problem in error.problems:
        complain(str(problem))
    return refuse(args, Reason.WORKSPACE, f"the policy has problems, so {so}", status=FOUND)


def _say(args: argparse.Namespace, document: Document, lines: Iterable[str]) -> int:
    if args.json:
        print_json(document)
    else:
        for line in lines:
            print(line)
    return OK
