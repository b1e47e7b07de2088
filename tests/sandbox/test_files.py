"""What may be shown to a sandbox, and where the machine keeps the files we cover."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.sandbox.files import check_tree, machine, open_binds, open_files, seen_anyway
from egressd.sandbox.plan import Overlay

RUN_DIR = "/run/egressd"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A harmless tree: a file, a directory, links within it and to the system."""
    root = tmp_path / "job"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "er" / "data").write_text("x")
    (root / "inside").symlink_to("deep/er/data")
    (root / "deep" / "up").symlink_to("../inside")
    (root / "python").symlink_to("/usr/bin/python3")
    (root / ".#lock").symlink_to("user@host.1234")
    return root


def refused(root: Path) -> str:
    with pytest.raises(Refused) as caught:
        open_files(str(root), run_dir=RUN_DIR)
    assert caught.value.reason is Reason.FILES
    return str(caught.value)


def test_a_tree_of_files_is_shown(tree: Path) -> None:
    assert open_files(str(tree), run_dir=RUN_DIR) == str(tree.resolve())


def test_a_socket_is_a_way_out(tree: Path) -> None:
    place = tree / "deep" / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        assert "docker.sock' is a socket" in refused(tree)
    place.unlink()
    check_tree(str(tree), links=True)


def test_a_fifo_is_a_way_out(tree: Path) -> None:
    os.mkfifo(tree / "deep" / "er" / "pipe")
    assert "pipe' is a FIFO" in refused(tree)


@pytest.mark.skipif(os.getuid() != 0, reason="device nodes need root")
@pytest.mark.parametrize(("mode", "said"), [(0o020600, "a character device"), (0o060600, "a block device")])
def test_a_device_is_refused(tree: Path, mode: int, said: str) -> None:
    os.mknod(tree / "node", mode, os.makedev(1, 3))
    assert f"node' is {said}" in refused(tree)


@pytest.mark.parametrize("target", ["/home/other/secret", "../../elsewhere", "/run/user/1000/bus", "/"])
def test_a_link_to_what_the_sandbox_does_not_have_is_refused(tree: Path, target: str) -> None:
    (tree / "deep" / "out").symlink_to(target)
    assert "out' is a link to" in refused(tree)


def test_bound_directories_may_have_links_anywhere_but_no_sockets(tree: Path) -> None:
    (tree / "out").symlink_to("/home/other")
    assert [bind.target for bind in open_binds([str(tree)], run_dir=RUN_DIR)] == [str(tree)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "agent"))
        with pytest.raises(Refused, match="agent' is a socket"):
            open_binds([str(tree)], run_dir=RUN_DIR)


@pytest.mark.parametrize(
    "place", ["/", "/run", "/proc", "/sys", "/dev", "/run/lock", "/proc/self", "/dev/shm", "/var/run", "//"]
)
def test_places_with_the_machines_own_sockets_are_never_shown(place: str) -> None:
    for opened in (lambda: open_files(place, run_dir=RUN_DIR), lambda: open_binds([place], run_dir=RUN_DIR)):
        with pytest.raises(Refused) as caught:
            opened()
        assert caught.value.reason is Reason.FILES


def test_the_control_directory_is_not_shown_nor_what_holds_it(tree: Path) -> None:
    for run_dir in (tree, tree / "deep", tree / "deep" / "er"):
        with pytest.raises(Refused, match="is, holds or lies in"):
            open_files(str(tree), run_dir=str(run_dir))


def test_a_link_to_a_forbidden_place_is_that_place(tree: Path) -> None:
    (tree.parent / "harmless").symlink_to("/run")
    assert "cannot be shown" in refused(tree.parent / "harmless")


@pytest.mark.parametrize("name", ["absent", "job/deep/er/data"])
def test_what_is_not_a_directory_is_refused(tree: Path, name: str) -> None:
    refused(tree.parent / name)


@pytest.mark.parametrize("target", ["/usr", "/etc", "/usr/bin/.."])
def test_a_bind_does_not_cover_the_system(target: str) -> None:
    with pytest.raises(Refused, match="cover"):
        open_binds([target], run_dir=RUN_DIR)


# ---- the machine's own /etc, in every shape in which resolv.conf is met


def etc(root: Path, **links: str) -> Path:
    """A root with an /etc; `links` maps file names ("resolv.conf" as resolv_conf) to link targets."""
    (root / "etc").mkdir(parents=True)
    (root / "usr" / "lib").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    for name in ("resolv.conf", "nsswitch.conf", "hosts"):
        key = name.replace(".", "_")
        if key in links:
            (root / "etc" / name).symlink_to(links[key])
        else:
            (root / "etc" / name).write_text("")
    return root


def resolv(root: Path) -> Overlay:
    return next(o for o in machine(str(root)).overlays if o.name == "/etc/resolv.conf")


STUB = "/run/systemd/resolve/stub-resolv.conf"


@pytest.mark.parametrize(
    ("target", "resolved"),
    [
        (None, "/etc/resolv.conf"),
        ("../run/systemd/resolve/stub-resolv.conf", STUB),  # systemd-resolved
        (STUB, STUB),
        ("/run/resolvconf/resolv.conf", "/run/resolvconf/resolv.conf"),  # resolvconf
        ("/usr/lib/resolv.conf", "/usr/lib/resolv.conf"),
        ("resolv.conf.real", "/etc/resolv.conf.real"),
        ("/lib/systemd/resolv.conf", "/usr/lib/systemd/resolv.conf"),
        ("../../../../run/x", "/run/x"),  # more dots than directories, as the kernel takes them
        ("/mnt/wsl/resolv.conf", "/mnt/wsl/resolv.conf"),  # WSL
    ],
)
def test_resolv_conf_is_found_where_it_really_lies(tmp_path: Path, target: str | None, resolved: str) -> None:
    links = {} if target is None else {"resolv_conf": target}
    assert resolv(etc(tmp_path / "r", **links)) == Overlay("/etc/resolv.conf", resolved)


def test_links_outside_etc_are_made_again(tmp_path: Path) -> None:
    root = etc(tmp_path / "r", resolv_conf="/var/run/resolv.conf")
    (root / "var").mkdir()
    (root / "var" / "run").symlink_to("/run")
    assert resolv(root) == Overlay("/etc/resolv.conf", "/run/resolv.conf", (("/var/run", "/run"),))


def test_a_link_to_itself_is_refused_and_so_is_no_resolv_conf(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="leads to itself"):
        machine(str(etc(tmp_path / "r", resolv_conf="resolv.conf")))
    root = etc(tmp_path / "s")
    (root / "etc" / "resolv.conf").unlink()
    with pytest.raises(Refused, match="make an empty one"):
        machine(str(root))


def test_a_machine_without_nsswitch_conf_is_fine(tmp_path: Path) -> None:
    root = etc(tmp_path / "r")
    (root / "etc" / "nsswitch.conf").unlink()
    assert [o.name for o in machine(str(root)).overlays] == ["/etc/resolv.conf", "/etc/hosts"]


def test_merged_and_unmerged_roots(tmp_path: Path) -> None:
    root = etc(tmp_path / "r")
    (root / "lib64").mkdir()
    (root / "etc" / "egressd").mkdir()
    found = machine(str(root))
    assert found.roots == {"lib": "usr/lib", "lib64": None}
    assert found.hidden == ("/etc/egressd",)


@pytest.mark.parametrize(
    ("path", "bound", "by"),
    [
        ("/usr/share/handbook", (), "/usr"),
        ("/etc", (), "/etc"),
        ("/", (), "/usr"),
        ("/bin", (), "/usr"),
        ("/etc/egressd/broker.key", (), None),
        ("/etc/egressd/broker.key", ("/etc/egressd",), "/etc/egressd"),
        ("/srv/docs", (), None),
        ("/srv/docs", ("/srv",), "/srv"),
        ("/srv/docs", ("/opt/x", "/srv/docs/venv"), "/srv/docs/venv"),
        ("/srv/docs", ("/srv/docs-of-others", "/opt"), None),
    ],
)
def test_what_a_sandbox_sees_without_being_shown_it(
    path: str, bound: tuple[str, ...], by: str | None
) -> None:
    assert seen_anyway(path, bind_ro=bound) == by
