"""guard, residency, local-only: one thing of the file is changed, egressd applies it, and all is told."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from egressd.cli.policy_rewriting import NotReplaced, PolicyFile
from egressd.ipc import messages
from egressd.policy.document import load

POLICY = """\
# acme's: see contract 4711
workspace: acme
guard: observe   # for now
members: [user:4001]
allow:
  - host: eu.api.openai.com  # them
  - local: ollama
"""
GUARD_CHANGE = {"workspace": "acme", "text": "- guard: changed from observe to enforce", "widens": False}
APPLIED = {"changes": [GUARD_CHANGE], "problems": [], "applied": True, "milliseconds": 1.5}
NOTHING = {"changes": [], "problems": [], "applied": False, "milliseconds": 0.1}


@pytest.fixture
def workspaces(tmp_path: Path) -> Path:
    directory = tmp_path / "workspaces"
    directory.mkdir(mode=0o755)
    (directory / "acme.yaml").write_text(POLICY)
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@dataclass
class Scene:
    """egressctl with this directory of policies, and with egressd or without."""

    egressctl: Any
    directory: Path
    daemon: Any = None

    def __call__(self, *words: str) -> Any:
        run_dir = self.daemon.run_dir if self.daemon else self.directory
        more = [] if self.daemon else ["--workspaces-dir", str(self.directory)]
        return self.egressctl("--run-dir", run_dir, *words, *more)

    @property
    def text(self) -> str:
        return (self.directory / "acme.yaml").read_text()


@pytest.fixture
def alone(egressctl: Any, workspaces: Path) -> Scene:
    """egressd does not run."""
    return Scene(egressctl, workspaces)


def status(workspaces: Path | None = None, **more: Any) -> dict[str, Any]:
    own = {
        "workspace": "acme",
        "guard": "observe",
        "local_only": False,
        "residency": None,
        "policy": "sha256:1",
    }
    directories = {"workspaces_dir": str(workspaces), "residency_dir": "/nowhere"} if workspaces else {}
    return {"workspaces": [own | more], **directories}


@pytest.fixture
def scene(egressctl: Any, workspaces: Path, daemon: Any) -> Scene:
    """egressd runs, and whoever asks may see everything. It is asked twice to apply: what it would do, and to
    do it."""
    daemon.status = status(workspaces)
    daemon.document, daemon.then = NOTHING, APPLIED
    return Scene(egressctl, workspaces, daemon)


def applies(daemon: Any) -> list[messages.Apply]:
    return [asked for asked in daemon.asked if isinstance(asked, messages.Apply)]


# ---- without egressd


def test_the_guard_is_switched_in_the_file_and_its_comments_stay(alone: Scene) -> None:
    told = alone("guard", "acme", "on")
    assert (told.status, told.err) == (0, "")
    assert told.out == (
        "guard of acme: observe -> enforce (file; egressd is not running: it holds when egressd starts)\n"
        "acme: - guard: changed from observe to enforce\n"
    )
    assert alone.text == POLICY.replace("observe ", "enforce ")


@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (("guard", "acme", "enforce"), "guard: observe", "guard: enforce"),
        (("guard", "acme", "off"), "guard: observe", "guard: off"),
        (("local-only", "acme", "on"), "# for now\n", "# for now\nlocal_only: true\n"),
        (("residency", "acme", "EU"), "4001]\n", "4001]\nresidency: {jurisdictions: [EU]}\n"),
        (("residency", "acme", "EEA,CH"), "4001]\n", "4001]\nresidency: {jurisdictions: [EEA, CH]}\n"),
        (("residency", "acme", "EEA", "CH"), "4001]\n", "4001]\nresidency: {jurisdictions: [EEA, CH]}\n"),
        (("residency", "-w", "acme", "CH"), "4001]\n", "4001]\nresidency: {jurisdictions: [CH]}\n"),
        (("guard", "acme", "observe"), "", ""),
        (("local-only", "acme", "off"), "", ""),
        (("residency", "acme", "none"), "", ""),
    ],
)
def test_each_changes_its_own_line(alone: Scene, words: tuple[str, ...], old: str, new: str) -> None:
    assert alone(*words).status == 0
    assert alone.text == POLICY.replace(old, new)


def test_a_workspace_called_as_an_action_is_reached_with_w(alone: Scene) -> None:
    (alone.directory / "import.yaml").write_text("workspace: import\n")
    assert alone("residency", "-w", "import", "EU").status == 0
    told = (alone.directory / "import.yaml").read_text()
    assert told == "workspace: import\nresidency: {jurisdictions: [EU]}\n"


def test_without_a_value_the_present_one_is_shown_and_nothing_touched(alone: Scene) -> None:
    assert alone("guard", "acme").out == "guard of acme: observe\n"
    assert alone("local-only", "acme").out == "local-only of acme: off\n"
    assert alone("residency", "acme").out == "residency of acme: none\n"
    assert alone("residency", "acme", "EU", "--json").json["after"] == ["EU"]
    assert alone("residency", "acme").out == "residency of acme: EU\n"
    document = alone("residency", "acme", "--json").json
    assert document["value"] == ["EU"] and not document["running"] and not document["in_force"]
    assert names(alone.directory) == [".egressctl.lock", "acme.yaml"]


@pytest.mark.parametrize(
    ("before", "words", "opens"),
    [
        ("guard: enforce", ("guard", "acme", "off"), ["sandboxes may reach what is not listed"]),
        ("guard: enforce", ("guard", "acme", "observe"), ["sandboxes may reach what is not listed"]),
        ("guard: enforce\nlocal_only: true", ("local-only", "acme", "off"), ["hosts may be reached again"]),
        (
            "guard: off\nlocal_only: true", ("local-only", "acme", "off"),
            ["sandboxes may reach what is not listed", "hosts may be reached again"],
        ),
        (
            "guard: enforce\nresidency: {jurisdictions: [EU]}", ("residency", "acme", "none"),
            ["what is listed may be anywhere"],
        ),
        (
            "guard: enforce\nresidency: {jurisdictions: [EU]}", ("residency", "acme", "EU", "US"),
            ["what is listed may also be in US"],
        ),
        ("guard: enforce\nresidency: {jurisdictions: [EU, CH]}", ("residency", "acme", "EU"), []),
        ("guard: off", ("guard", "acme", "on"), []),
        ("guard: enforce", ("residency", "acme", "EU"), []),
        ("guard: enforce", ("local-only", "acme", "on"), []),
    ],
)  # fmt: skip
def test_what_opens_needs_no_confirmation_but_is_told(
    alone: Scene, before: str, words: tuple[str, ...], opens: list[str]
) -> None:
    path = alone.directory / "acme.yaml"
    path.write_text(f"workspace: acme\n{before}\nallow:\n  - host: eu.api.openai.com\n")
    told = alone(*words, "--dry-run")
    assert [line for line in told.out.splitlines() if "this opens" in line] == [
        f"this opens: {s}" for s in opens
    ]
    assert alone(*words, "--json").json["opens"] == opens


def test_a_pin_under_a_guard_that_lets_everything_through_says_what_it_cannot_hold(alone: Scene) -> None:
    note = "the guard does not enforce, so what is not listed may still be anywhere\n"
    assert alone("residency", "acme", "EU").out.endswith(note)
    assert note not in alone("guard", "acme", "on").out
    assert note in alone("guard", "acme", "off").out


def test_a_dry_run_shows_the_difference_and_changes_nothing(alone: Scene) -> None:
    told = alone("guard", "acme", "on", "--dry-run")
    assert told.status == 0
    assert "guard of acme: observe -> enforce (nothing is changed: --dry-run)\n" in told.out
    assert "\n-guard: observe   # for now\n+guard: enforce   # for now\n" in told.out
    assert alone.text == POLICY
    assert names(alone.directory) == ["acme.yaml"]
    document = alone("guard", "acme", "on", "--dry-run", "--json").json
    assert (document["written"], document["applied"]) == (False, False)
    assert "+guard: enforce   # for now\n" in document["diff"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("guard", "acme", "sideways"), "'sideways' is no way to guard (say on, observe or off)"),
        (("guard", "acme", "on\x1b[2J"), r"no way to guard"),
        (("local-only", "acme", "observe"), "'observe' is neither on nor off (say on or off)"),
        (("residency", "acme", "XX"), "'XX' is not a jurisdiction"),
        (("residency", "acme", "eu"), "did you mean EU?"),
        (("residency", "acme", "EU", "none"), "'none' is not a jurisdiction"),
        (("residency", "acme", ","), "no jurisdiction is named (say EU, or EEA,CH)"),
        (("guard", "../acme", "on"), "'../acme' is not a workspace name"),
        (("guard", "-w", "acme", "on"), "unrecognized arguments: -w"),
        (("guard",), "required: WORKSPACE"),
    ],
)
def test_a_wrong_word_is_status_2_and_nothing_is_touched(
    alone: Scene, words: tuple[str, ...], says: str
) -> None:
    told = alone(*words)
    assert (told.status, told.out) == (2, "")
    assert says in told.err and "\x1b" not in told.err
    assert alone.text == POLICY


# ---- files that are not changed


def test_a_workspace_that_is_not_there(alone: Scene) -> None:
    told = alone("guard", "other", "on")
    assert told.status == 125
    assert f"there is no workspace other: no other.yaml in {alone.directory}" in told.err


def test_a_policy_with_problems_is_left_alone_and_they_are_listed(alone: Scene) -> None:
    text = "workspace: acme\nguard: off\nallow:\n  - host: 'a b'\n  - cidr: 10.0.0.0\n"
    (alone.directory / "acme.yaml").write_text(text)
    told = alone("guard", "acme", "on")
    assert told.status == 1
    assert "acme.yaml:4: allow[0].host" in told.err and "acme.yaml:5: allow[1]" in told.err
    assert "the policy has problems, so nothing was changed" in told.err
    assert alone.text == text


def test_a_value_that_is_written_in_a_way_of_its_own_is_left_to_its_author(alone: Scene) -> None:
    text = "workspace: acme\nguard: >-\n  off\n"
    (alone.directory / "acme.yaml").write_text(text)
    told = alone("guard", "acme", "on")
    assert told.status == 125
    assert "guard is not written on one line (change it by hand, then: egressctl policy apply)" in told.err
    assert alone.text == text


def as_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def as_second_name(path: Path) -> None:
    path.with_name("other").hardlink_to(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (as_link, "is a symbolic link, which egressd does not read: put the file itself there"),
        (as_second_name, "has another name (a hard link)"),
        (lambda path: path.chmod(0o646), "everybody may write to"),
        (lambda path: path.parent.chmod(0o777), "anybody could add or replace a policy: chmod o-w"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "it is a FIFO, not a regular file"),
        (lambda path: (path.unlink(), path.mkdir()), "it is a directory, not a regular file"),
        (lambda path: path.write_text(POLICY + "#" * (1 << 20)), "is larger than a policy may be"),
    ],
)
def test_a_way_that_others_could_bend_is_refused(
    alone: Scene, spoil: Callable[[Path], object], says: str
) -> None:
    spoil(alone.directory / "acme.yaml")
    told = alone("guard", "acme", "on")
    assert told.status == 125
    assert says in told.err
    assert [name for name in names(alone.directory) if name.startswith(".acme")] == []


def unprivileged(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """egressctl as somebody else, with what it needs already imported: its directory may be private."""
    script = (
        "import os, sys; from egressd.cli.main import main, whole_parser; import egressd.cli.switching;"
        "from egressd.processes.workspaces import public_suffixes; public_suffixes(); whole_parser();"
        "import yaml, egressd.policy.document;"
        "os.setgroups([]); os.setresgid(4009, 4009, 4009); os.setresuid(4009, 4009, 4009);"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def reachable() -> Iterator[Path]:
    """For everybody: pytest's own directories are for their owner alone."""
    if os.geteuid():
        pytest.skip("needs root to be somebody else")
    with tempfile.TemporaryDirectory(prefix="switches-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        Path(name, "acme.yaml").write_text(POLICY)
        yield Path(name)


def test_who_may_not_write_the_file_is_told_so_before_anything_is_touched(reachable: Path) -> None:
    words = ("--run-dir", reachable, "guard", "acme", "on", "--workspaces-dir", reachable)
    told = unprivileged(*words)
    assert (told.returncode, told.stdout) == (125, "")
    assert told.stderr == f"egressctl: you may not write to {reachable}/acme.yaml: use sudo\n"
    (reachable / "acme.yaml").chmod(0o666 & ~0o002)
    os.chown(reachable / "acme.yaml", 4009, 4009)
    told = unprivileged(*words)
    assert told.stderr == f"egressctl: you may not write to {reachable}: use sudo\n"
    assert (reachable / "acme.yaml").read_text() == POLICY
    assert names(reachable) == ["acme.yaml"]


def test_who_may_write_the_file_needs_no_root(reachable: Path) -> None:
    for path in (reachable, reachable / "acme.yaml"):
        os.chown(path, 4009, 4009)
    told = unprivileged("--run-dir", reachable, "guard", "acme", "on", "--workspaces-dir", reachable)
    assert (told.returncode, told.stderr) == (0, "")
    assert (reachable / "acme.yaml").stat().st_uid == 4009


# ---- how it is written


def test_owner_mode_and_attributes_stay(alone: Scene) -> None:
    path = alone.directory / "acme.yaml"
    path.chmod(0o640)
    if not os.geteuid():
        os.chown(path, 4001, 4002)
    try:
        os.setxattr(path, "user.note", b"kept")
        # user::rw- user:4005:r-- group::r-- mask::r-- other::---, as in linux/posix_acl_xattr.h
        entries = [(1, 6, 2**32 - 1), (2, 4, 4005), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1)]
        listed = b"\2\0\0\0" + b"".join(
            tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + who.to_bytes(4, "little")
            for tag, mode, who in entries
        )
        os.setxattr(path, "system.posix_acl_access", listed)
    except OSError:
        pytest.skip("no such attributes on this filesystem")
    before = path.stat()
    assert alone("guard", "acme", "on").status == 0
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino, "it is another file, not the old one written over"
    assert os.getxattr(path, "user.note") == b"kept"
    assert os.getxattr(path, "system.posix_acl_access") == listed


def test_a_file_without_an_access_list_gets_none_from_its_directory(alone: Scene) -> None:
    entries = [(1, 6, 2**32 - 1), (2, 6, 4005), (4, 4, 2**32 - 1), (16, 6, 2**32 - 1), (32, 0, 2**32 - 1)]
    listed = b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, mode, who in entries
    )
    try:
        os.setxattr(alone.directory, "system.posix_acl_default", listed)
    except OSError:
        pytest.skip("no access lists on this filesystem")
    path = alone.directory / "acme.yaml"
    mode = path.stat().st_mode
    assert alone("guard", "acme", "on").status == 0
    assert "system.posix_acl_access" not in os.listxattr(path)
    assert path.stat().st_mode == mode


def opened(directory: Path) -> PolicyFile:
    file = PolicyFile(str(directory), "acme").__enter__()
    file.lock()
    return file


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda path: path.write_text(POLICY + "# an editor was here\n"),
        lambda path: (path.with_suffix(".new").write_text(POLICY), path.with_suffix(".new").rename(path)),
        lambda path: path.unlink(),
        as_link,
    ],
    ids=["written", "replaced by the same", "removed", "made a link"],
)
def test_what_somebody_else_changed_meanwhile_is_not_written_over(
    workspaces: Path, meanwhile: Callable[[Path], object]
) -> None:
    path = workspaces / "acme.yaml"
    file = opened(workspaces)
    try:
        data = file.read()
        meanwhile(path)
        found = path.read_bytes() if path.exists() else None
        with pytest.raises(NotReplaced):
            file.replace(b"workspace: acme\n", instead_of=data)
    finally:
        file.__exit__()
    assert (path.read_bytes() if path.exists() else None) == found
    assert [name for name in names(workspaces) if "egressctl-" in name] == []


KILLED = """
import os, signal, sys
from egressd.cli.policy_rewriting import PolicyFile
directory, name, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
whole, calls = getattr(os, name), 0
def step(*args, **kwargs):
    global calls
    calls += 1
    if calls == number:
        if name == "write":
            whole(args[0], bytes(args[1])[:10])
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **kwargs)
with PolicyFile(directory, "acme") as file:
    file.lock()
    data = file.read()
    setattr(os, name, step)
    file.replace(b"workspace: acme\\nguard: enforce\\n", instead_of=data)
"""


@pytest.mark.parametrize(
    ("call", "number", "new"),
    [
        ("open", 1, False),
        ("write", 1, False),
        ("fchmod", 1, False),
        ("fsync", 1, False),
        ("rename", 1, False),
        ("fsync", 2, True),  # of the directory: the file has its name
    ],
)
def test_who_is_killed_leaves_the_old_or_the_new_and_no_lock(
    alone: Scene, call: str, number: int, new: bool
) -> None:
    words = [sys.executable, "-c", KILLED, alone.directory, call, str(number)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert alone.text == ("workspace: acme\nguard: enforce\n" if new else POLICY)
    load(alone.text.encode(), source="", expected_name="acme", is_public_suffix=lambda name: False)
    assert alone("local-only", "acme", "on").status == 0
    assert names(alone.directory) == [".egressctl.lock", "acme.yaml"], "the leavings are gone"


def test_switches_thrown_at_once_all_hold(alone: Scene) -> None:
    """Each waits for the other, so none is lost; whichever came last decides what only one of them says."""
    words = [["guard", "acme", "on"], ["residency", "acme", "EU"], ["local-only", "acme", "on"]]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "egressd.cli.main", "--run-dir", alone.directory, *each,
             "--workspaces-dir", alone.directory],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for each in words
    ]  # fmt: skip
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    policy = load(alone.text.encode(), source="", expected_name="acme", is_public_suffix=lambda name: False)
    assert (policy.guard, policy.residency, policy.local_only) == ("enforce", ("EU",), True)
    assert alone.text.count("#") == POLICY.count("#")


def test_one_that_holds_the_lock_for_long_is_not_waited_for_for_ever(
    alone: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egressd.cli.policy_rewriting._LOCK_WITHIN", 0.1)
    with (alone.directory / ".egressctl.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        told = alone("guard", "acme", "on")
    assert told.status == 125
    assert "another egressctl has been changing policies" in told.err
    assert alone.text == POLICY


def test_the_lock_is_for_those_who_may_write(alone: Scene) -> None:
    """A directory can be opened, and so locked, by whoever may read it."""
    alone("guard", "acme", "on")
    assert (alone.directory / ".egressctl.lock").stat().st_mode & 0o777 == 0o600
    (alone.directory / ".egressctl.lock").unlink()
    alone.directory.chmod(0o775)
    alone("guard", "acme", "off")
    assert (alone.directory / ".egressctl.lock").stat().st_mode & 0o777 == 0o660


def test_a_lock_that_is_another_name_of_something_is_not_given_away(alone: Scene) -> None:
    """Whoever may write into the directory can link any file there: it would become theirs to write."""
    other = alone.directory.parent / "shadow"
    other.write_text("root:*")
    other.chmod(0o600)
    (alone.directory / ".egressctl.lock").hardlink_to(other)
    alone.directory.chmod(0o775)
    try:
        told = alone("guard", "acme", "on")
        assert told.status == 125 and ".egressctl.lock is no file of egressctl's: look what it is" in told.err
        assert other.stat().st_mode & 0o777 == 0o600 and alone.text == POLICY
        (alone.directory / ".egressctl.lock").unlink()
        os.mkfifo(alone.directory / ".egressctl.lock")
        assert alone("guard", "acme", "on").status == 125
    finally:
        other.unlink()


# ---- with egressd


def test_a_running_egressd_applies_it_and_is_told_why(scene: Scene) -> None:
    told = scene("guard", "acme", "on")
    assert (told.status, told.err) == (0, "")
    assert told.out == (
        "guard of acme: observe -> enforce (file and kernel)\n"
        "acme: - guard: changed from observe to enforce\n"
    )
    assert scene.text == POLICY.replace("observe ", "enforce ")
    asked = messages.Apply(why="guard acme enforce", about="acme")
    assert applies(scene.daemon) == [messages.Apply(dry_run=True), asked]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("guard", "acme", "off"), "guard acme off"),
        (("residency", "acme", "CH", "EEA"), "residency acme CH,EEA"),
        (("local-only", "acme", "on"), "local-only acme on"),
    ],
)
def test_what_was_asked_for_is_what_is_put_on_record(scene: Scene, words: tuple[str, ...], why: str) -> None:
    assert scene(*words).status == 0
    assert applies(scene.daemon)[-1] == messages.Apply(why=why, about="acme")


def test_the_document_for_programs(scene: Scene) -> None:
    assert scene("guard", "acme", "on", "--json").json == {
        "workspace": "acme", "setting": "guard", "before": "observe", "after": "enforce",
        "file": str(scene.directory / "acme.yaml"), "opens": [], "changes": [GUARD_CHANGE], "problems": [],
        "written": True, "applied": True, "milliseconds": 1.5,
    }  # fmt: skip


def test_nothing_to_do_is_said_and_not_put_on_record(scene: Scene) -> None:
    told = scene("guard", "acme", "observe")
    assert (told.status, told.out) == (0, "guard of acme: observe (as it was)\n")
    assert applies(scene.daemon) == [messages.Apply(dry_run=True)]


def test_what_the_file_says_already_and_is_not_in_force_is_applied(scene: Scene) -> None:
    """Somebody edited the file and forgot: the switch makes it so."""
    (scene.directory / "acme.yaml").write_text(POLICY.replace("observe ", "enforce "))
    scene.daemon.document = {**APPLIED, "applied": False}
    told = scene("guard", "acme", "on")
    assert told.status == 0
    assert "guard of acme: enforce (file and kernel)\n" in told.out
    assert applies(scene.daemon)[-1] == messages.Apply(why="guard acme enforce", about="acme")


def test_other_changes_that_come_with_it_are_not_hidden(scene: Scene) -> None:
    other = {"workspace": "beta", "text": "+ host x.example added", "widens": True}
    scene.daemon.document = {**NOTHING, "changes": [other]}
    scene.daemon.then = {**APPLIED, "changes": [GUARD_CHANGE, other]}
    told = scene("guard", "acme", "on")
    assert told.status == 0
    assert "beta: + host x.example added  (gives more)\n" in told.out
    assert "what had been written before and not been applied was applied with it" in told.err


def test_a_file_that_egressd_refuses_is_put_back(scene: Scene) -> None:
    problem = f"{scene.directory}/acme.yaml:3: guard: not with these pools"
    scene.daemon.then = {**NOTHING, "problems": [problem]}
    told = scene("guard", "acme", "on")
    assert (told.status, told.out) == (1, "")
    assert problem in told.err
    assert "it was put back, and nothing has changed" in told.err
    assert scene.text == POLICY
    assert applies(scene.daemon)[1:] == [
        messages.Apply(why="guard acme enforce", about="acme"),
        messages.Apply(why="guard acme enforce: put back", about="acme"),
    ]


def test_problems_of_other_files_are_told_and_do_not_undo_it(scene: Scene) -> None:
    problem = f"{scene.directory}/beta.yaml:1: it is empty"
    scene.daemon.then = {**APPLIED, "problems": [problem]}
    told = scene("guard", "acme", "on")
    assert told.status == 1
    assert "guard of acme: observe -> enforce (file and kernel)" in told.out
    assert f"problem: {problem}" in told.err
    assert scene.text == POLICY.replace("observe ", "enforce ")


def test_where_it_cannot_be_applied_now_the_file_stays_as_it_was_wanted(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(scene.daemon), "_answer", ending(type(scene.daemon)._answer))
    told = scene("guard", "acme", "on")
    assert told.status == 125
    assert "is changed, but egressd has not applied it" in told.err
    assert "try again: egressctl policy apply" in told.err
    assert scene.text == POLICY.replace("observe ", "enforce ")


def ending(answer: Any) -> Any:
    """The stand-in, but the second request to apply ends the connection."""

    class Channel:
        def __init__(self, channel: Any) -> None:
            self._channel, self._applies = channel, 0

        def receive(self) -> Any:
            received = self._channel.receive()
            self._applies += isinstance(received.message, messages.Apply)
            if self._applies == 2:
                raise EOFError
            return received

        def send(self, *args: Any, **kwargs: Any) -> None:
            self._channel.send(*args, **kwargs)

    return lambda daemon, channel: answer(daemon, Channel(channel))


def test_a_member_is_told_before_anything_is_touched(scene: Scene) -> None:
    scene.daemon.status = status()
    told = scene("guard", "acme", "on")
    assert (told.status, told.out) == (125, "")
    assert told.err == "egressctl: only root and the daemon's own user change guard of acme: use sudo\n"
    assert scene.text == POLICY and names(scene.directory) == ["acme.yaml"]
    assert applies(scene.daemon) == []


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (("guard", "acme"), "guard of acme: observe\n"),
        (("local-only", "acme"), "local-only of acme: off\n"),
        (("residency", "acme"), "residency of acme: CH,EEA\n"),
    ],
)
def test_a_member_sees_what_is_in_force(scene: Scene, words: tuple[str, ...], out: str) -> None:
    scene.daemon.status = status(residency={"jurisdictions": ["CH", "EEA"]})
    assert scene(*words).out == out
    told = scene("guard", "other")
    assert told.status == 125
    assert "you are not a member of a workspace 'other'" in told.err


def test_root_sees_the_file_and_whether_it_is_in_force(scene: Scene) -> None:
    told = scene("guard", "acme")
    assert told.out == (
        "guard of acme: observe\n"
        "the file is not what is in force: egressctl policy diff, egressctl policy apply\n"
    )


def test_another_directory_than_egressds_is_refused(scene: Scene, tmp_path: Path) -> None:
    told = scene("guard", "acme", "on", "--workspaces-dir", str(tmp_path))
    assert told.status == 125
    assert f"egressd reads its policies from {scene.directory}, not from {tmp_path}" in told.err
    link = tmp_path / "link"
    link.symlink_to(scene.directory)
    assert scene("guard", "acme", "on", "--workspaces-dir", str(link)).status == 0, "another spelling"


def test_a_refusal_in_json_is_a_document_and_a_line(scene: Scene) -> None:
    scene.daemon.status = status()
    told = scene("guard", "acme", "on", "--json")
    text = "only root and the daemon's own user change guard of acme: use sudo"
    assert told.json == {"error": {"reason": "member", "text": text}}
    assert text in told.err


def test_a_thread_can_throw_them_too(alone: Scene) -> None:
    """Many of one process are kept apart by the lock as well."""
    words = ["on", "off"] * 5
    failures: list[BaseException] = []

    def throw(word: str) -> None:
        try:
            with PolicyFile(str(alone.directory), "acme") as file:
                file.lock()
                data = file.read()
                file.replace(data + f"# {word}\n".encode(), instead_of=data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=throw, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert alone.text.count("\n") == POLICY.count("\n") + len(words)
    assert names(alone.directory) == [".egressctl.lock", "acme.yaml"]
