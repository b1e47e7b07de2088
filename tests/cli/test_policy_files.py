"""`egressctl policy check` and `explain`, and the reader that the controller uses too: no daemon, no root."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from egressd.model.errors import PolicyError, Problem
from egressd.processes.workspaces import MAX_BYTES, broken_workspaces, read_policy_file, read_workspaces

GOOD = """\
workspace: acme
guard: enforce
members: [user:infer]
allow:
  - host: eu.api.openai.com
  - host: db.internal.example
    ports: [5432/tcp]
    private: true
limits: {wall: 120s, memory: 4GiB, processes: 128, egress_bytes: 50MiB, connections: 200}
"""
BAD = """\
workspace: acme
gaurd: enforce
allow:
  - host: "*.com"
  - host: api.example
    ports: [70000/tcp]
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="egressd-policies-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def good(place: Path, name: str = "acme") -> Path:
    path = place / f"{name}.yaml"
    path.write_text(GOOD.replace("acme", name))
    return path


# ---- check


def test_a_good_file(egressctl: Any, place: Path) -> None:
    told = egressctl("policy", "check", good(place))
    assert (told.status, told.err) == (0, "")
    assert told.out.startswith("acme: ok, guard enforce, 2 rules, sha256:")


def test_every_problem_of_a_bad_file_with_its_line(egressctl: Any, place: Path) -> None:
    path = place / "acme.yaml"
    path.write_text(BAD)
    told = egressctl("policy", "check", path)
    assert (told.status, told.out) == (1, "")
    lines = [line.split(":")[1] for line in told.err.splitlines() if line.startswith(f"{path}:")]
    assert {"2", "4", "6"} <= set(lines)


def test_a_remark_on_a_whole_line_has_no_place_in_it(egressctl: Any, place: Path) -> None:
    path = place / "acme.yaml"
    pin = "residency: {jurisdictions: [EU]}"
    path.write_text(f"workspace: acme\nguard: enforce\n{pin}\nallow:\n  - host: api.openai.com\n")
    told = egressctl("policy", "check", path)
    assert told.status == 0
    assert f"{path}:5: remark: api.openai.com is barred by residency: " in told.err


def test_remarks_are_told_and_are_no_problems(egressctl: Any, place: Path) -> None:
    path = good(place)
    path.write_text(GOOD.replace("guard: enforce", "guard: observe"))
    told = egressctl("policy", "check", path)
    assert told.status == 0
    assert told.err.startswith(f"{path}: remark: guard: guard: observe restricts nothing")
    assert told.out.startswith("acme: ok, guard observe")
    as_document = egressctl("--json", "policy", "check", place).json
    assert as_document["ok"] is True
    assert [(remark["source"], remark["where"]) for remark in as_document["remarks"]] == [
        (str(path), "guard")
    ]


def test_wildcards_and_what_is_read_are_checked_and_explained_without_a_daemon(
    egressctl: Any, place: Path
) -> None:
    path = good(place)
    path.write_text(
        GOOD.replace("  - host: eu.api.openai.com\n", '  - host: "**.example.com"\n    ech: allow\n')
    )
    told = egressctl("policy", "check", path)
    assert told.status == 0
    assert [line.split(":")[1] for line in told.err.splitlines()] == ["5", "5"]
    assert "may be sent encrypted_client_hello" in told.err and "covers names of any depth" in told.err
    explained = egressctl("policy", "explain", path).out
    assert "host **.example.com on 443/tcp, verified by SNI, ECH allowed (line 5)" in explained
    assert "host db.internal.example on 5432/tcp, also in private ranges (line 7)" in explained
    assert "names of wildcards: 64 names, 4KiB of labels, 5 a second for a sandbox" in explained


def test_json_for_an_editor(egressctl: Any, place: Path) -> None:
    good(place)
    bad = place / "bad.yaml"
    bad.write_text(BAD)
    told = egressctl("--json", "policy", "check", place)
    assert (told.status, told.err) == (1, "")
    assert told.json["ok"] is False
    assert [policy["workspace"] for policy in told.json["policies"]] == ["acme"]
    assert {problem["source"] for problem in told.json["problems"]} == {str(bad)}
    assert all(
        problem.keys() == {"source", "line", "where", "text", "remedy"} for problem in told.json["problems"]
    )


def test_many_files_are_all_looked_at(egressctl: Any, place: Path) -> None:
    missing, fine = place / "missing.yaml", good(place)
    told = egressctl("policy", "check", missing, fine)
    assert told.status == 1
    assert told.err == f"{missing}: there is no such file\n"
    assert told.out.startswith("acme: ok")


def test_an_empty_directory_is_said_to_be_empty(egressctl: Any, place: Path) -> None:
    told = egressctl("policy", "check", place)
    assert (told.status, told.out, told.err) == (0, "", "no policy files found\n")


def test_hostile_contents_do_not_reach_the_terminal(egressctl: Any, place: Path) -> None:
    path = place / "acme.yaml"
    path.write_bytes(b'workspace: "a\\e[2J"\nallow: [{host: "x\\u202e.example"}]\n')
    told = egressctl("policy", "check", path)
    assert told.status == 1
    assert all(line.isprintable() for line in told.err.splitlines())


# ---- what is not read at all


def as_symlink(path: Path) -> None:
    target = path.parent / ".elsewhere"
    target.write_text(GOOD)
    path.symlink_to(target)


def as_dangling_symlink(path: Path) -> None:
    path.symlink_to("nowhere")


def as_directory(path: Path) -> None:
    path.mkdir()


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def as_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("may not make device nodes here")


def as_hundred_megabytes(path: Path) -> None:
    path.touch()
    os.truncate(path, 100_000_000)


def as_one_byte_too_many(path: Path) -> None:
    path.write_bytes(GOOD.encode() + b"#" * (MAX_BYTES + 1 - len(GOOD)))


def as_writable_by_everybody(path: Path) -> None:
    path.write_text(GOOD)
    path.chmod(0o666)


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (as_symlink, "it is a symbolic link (put the file itself here)"),
    (as_dangling_symlink, "it is a symbolic link (put the file itself here)"),
    (as_directory, "it is a directory, not a regular file (put the file itself here)"),
    (as_fifo, "it is a FIFO, not a regular file (put the file itself here)"),
    (as_socket, "it is a socket, not a regular file (put the file itself here)"),
    (as_device, "it is a device, not a regular file (put the file itself here)"),
    (as_hundred_megabytes, "it has at least 100000000 bytes; a policy may have 1048576"),
    (as_one_byte_too_many, "it has at least 1048577 bytes; a policy may have 1048576"),
    (as_writable_by_everybody, "everybody may write to it, so anybody could widen it (chmod o-w)"),
]


@pytest.mark.parametrize(("make", "says"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_refused_without_being_read(
    egressctl: Any, place: Path, make: Callable[[Path], None], says: str
) -> None:
    path = place / "acme.yaml"
    make(path)
    told = egressctl("policy", "check", place)
    assert (told.status, told.out) == (1, "")
    assert told.err.startswith(f"{path}: {says}")
    assert len(told.err.splitlines()) == 1


def test_a_symlink_named_directly_is_refused_even_if_it_leads_to_a_directory(
    egressctl: Any, place: Path
) -> None:
    (place / "real").mkdir()
    link = place / "link.yaml"
    link.symlink_to("real")
    told = egressctl("policy", "check", link)
    assert (told.status, told.err) == (1, f"{link}: it is a symbolic link (put the file itself here)\n")


def test_the_largest_file_there_may_be_is_read(place: Path) -> None:
    path = good(place)
    path.write_bytes(GOOD.encode() + b"#" * (MAX_BYTES - len(GOOD)))
    assert read_policy_file(path).workspace == "acme"


def test_a_file_that_says_it_is_empty_is_held_to_the_same_bound() -> None:
    """Files of /proc are regular and have size 0; what counts is what is read."""
    endless = Path("/proc/kallsyms")  # some 10 MB
    if not endless.exists() or len(endless.read_bytes()) <= MAX_BYTES:
        pytest.skip("no large file under /proc here")
    with pytest.raises(PolicyError, match="it has at least 1048577 bytes"):
        read_policy_file(endless)


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user to be")
def test_an_unreadable_file_as_an_ordinary_user(place: Path) -> None:
    path = good(place)
    path.chmod(0o600)
    command = ["setpriv", "--reuid", "4001", "--regid", "4001", "--clear-groups"]
    command += [sys.executable, "-m", "egressd.cli.main", "policy", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{path}: it may not be read (make it readable for the user that runs this)\n"


# ---- a directory, as the controller reads it


def test_one_broken_file_does_not_hide_the_others(place: Path) -> None:
    good(place, "alpha")
    good(place, "beta")
    (place / "gamma.yaml").write_text(BAD)
    (place / "delta.yaml").symlink_to("alpha.yaml")
    policies, problems = read_workspaces(place)
    assert sorted(policies) == ["alpha", "beta"]
    assert broken_workspaces(problems) == {"gamma", "delta"}


def test_a_file_speaks_only_for_the_workspace_it_is_named_after(place: Path) -> None:
    (place / "other.yaml").write_text(GOOD)
    policies, problems = read_workspaces(place)
    assert not policies
    assert broken_workspaces(problems) == {"other"}


@pytest.mark.parametrize("name", [".acme.yaml.swp", ".git", "acme.yaml~"])
def test_leavings_are_passed_over(place: Path, name: str) -> None:
    (place / name).write_text("garbage: [")
    assert read_workspaces(place) == ({}, [])


@pytest.mark.parametrize("name", ["acme.yml", "README", "acme.yaml.bak"])
def test_what_looks_like_a_policy_and_is_not_read_is_a_problem(place: Path, name: str) -> None:
    (place / name).write_text(GOOD)
    policies, problems = read_workspaces(place)
    assert not policies
    assert problems == [
        Problem(
            str(place / name), 0, "", "it is not read: its name does not end in .yaml",
            "name it WORKSPACE.yaml, or move it out of this directory",
        )
    ]  # fmt: skip
    assert not broken_workspaces(problems)  # so that renaming a file away takes its workspace away


def test_an_unreadable_directory_says_nothing_about_its_workspaces(place: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read: No such file"):
        read_workspaces(place / "nowhere")
    with pytest.raises(PolicyError, match="cannot be read: Not a directory"):
        read_workspaces(good(place))


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_directory_everybody_may_write_to_is_not_read(place: Path, mode: int) -> None:
    good(place)
    place.chmod(mode)
    with pytest.raises(PolicyError, match="anybody could add or replace a policy"):
        read_workspaces(place)
    place.chmod(0o755)
    assert sorted(read_workspaces(place)[0]) == ["acme"]


def open_descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_reading_leaves_no_descriptor_open(place: Path) -> None:
    good(place, "alpha")
    as_fifo(place / "fifo.yaml")
    as_directory(place / "directory.yaml")
    as_hundred_megabytes(place / "large.yaml")
    read_workspaces(place)
    before = open_descriptors()
    read_workspaces(place)
    assert open_descriptors() == before


# ---- explain


def test_explain_a_file_without_a_daemon(egressctl: Any, place: Path) -> None:
    path = good(place)
    told = egressctl("policy", "explain", path)
    assert (told.status, told.err) == (0, "")
    assert "eu.api.openai.com" in told.out
    assert "5432/tcp" in told.out
    as_document = egressctl("--json", "policy", "explain", path).json
    assert as_document.keys() == {"workspace", "digest", "text"}
    assert as_document["text"].rstrip("\n") + "\n" == told.out


def test_explain_a_bad_file(egressctl: Any, place: Path) -> None:
    path = place / "acme.yaml"
    path.write_text(BAD)
    told = egressctl("policy", "explain", path)
    assert (told.status, told.out) == (1, "")
    assert f"{path}:2:" in told.err


def test_explain_what_is_in_force(egressctl: Any, daemon: Any) -> None:
    daemon.document = {"workspace": "acme", "digest": "sha256:00", "text": "acme may reach\n\tx\x1b.example"}
    told = egressctl("--run-dir", daemon.run_dir, "policy", "explain", "acme")
    assert (told.status, told.out) == (0, "acme may reach\n\tx\\x1b.example\n")


def test_explaining_a_broken_file_in_json_is_a_document_of_its_problems(egressctl: Any, place: Path) -> None:
    path = good(place)
    path.write_text("workspace: acme\ngaurd: off\n")
    told = egressctl("--json", "policy", "explain", path)
    assert told.status == 1
    assert told.json["ok"] is False
    assert [problem["where"] for problem in told.json["problems"]] == ["gaurd"]
    assert "did you mean guard?" in told.err
