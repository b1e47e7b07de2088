"""Looking at the caller's directories and at the machine's own, before anything is built.

A directory shown to a sandbox is a way in and must not be a way out. A read-only mount does not stop
connect() on a socket or open() on a FIFO lying in it, so a tree that holds one is refused, and so is
everything that holds the machine's own sockets. Symbolic links are resolved by the sandbox in its own view;
one that leads nowhere there is refused, because the caller meant something else.
"""

# pathlib costs 9 ms to import, a tenth of all of `egressctl run`
# ruff: noqa: PTH100, PTH112, PTH114, PTH115, PTH116
from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable

from egressd.model.errors import Refused
from egressd.model.verdicts import Reason
from egressd.sandbox.plan import DATA_FILES, Bind, Machine, Overlay

__all__ = ["check_tree", "machine", "open_binds", "open_files", "seen_anyway"]

_NEVER_SHOWN = ("/run", "/proc", "/sys", "/dev")
_VISIBLE = ("/usr", "/etc", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32")
_OWN_PLACES = ("/etc", "/usr", "/tmp", "/work", *_VISIBLE)  # noqa: S108 - not to be covered by a bind
_HIDDEN = ("/etc/egressd",)  # other workspaces' policies
_MAX_LINKS = 40  # as the kernel, ELOOP


def _refuse(place: str, why: str) -> Refused:
    return Refused(Reason.FILES, f"{place!r} {why}")


def _within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def open_directory(path: str, *, run_dir: str) -> str:
    """The real path of a directory that may be shown; `Refused` saying which place and why not."""
    real = os.path.realpath(path)
    try:
        if not stat.S_ISDIR(os.stat(real).st_mode):
            raise _refuse(path, "is not a directory")
        if not os.access(real, os.R_OK | os.X_OK):
            raise _refuse(path, "cannot be read by you")
    except OSError as error:
        raise _refuse(path, f"cannot be shown: {error.strerror}") from error
    for place in (*_NEVER_SHOWN, os.path.realpath(run_dir)):
        if _within(real, place) or _within(place, real):
            raise _refuse(path, f"cannot be shown to a sandbox: it is, holds or lies in {place}")
    return real


def open_files(path: str, *, run_dir: str) -> str:
    """`--files DIR`: checked whole, links included."""
    real = open_directory(path, run_dir=run_dir)
    check_tree(real, links=True)
    return real


def open_binds(paths: list[str] | tuple[str, ...], *, run_dir: str) -> tuple[Bind, ...]:
    """`--bind-ro DIR`: shown at the same path as here, so that a virtual environment's scripts work."""
    binds = []
    for path in paths:
        real, target = open_directory(path, run_dir=run_dir), posixpath.normpath(os.path.abspath(path))
        if target in _OWN_PLACES:
            raise _refuse(path, "would cover a part of the sandbox's own system")
        check_tree(real, links=False)
        binds.append(Bind(source=real, target=target))
    return tuple(binds)


def seen_anyway(path: str, *, bind_ro: Iterable[str] = ()) -> str | None:
    """The place in every sandbox, or among those bound into this one, that shows something of `path` as it
    is, whatever else was decided about it. None where there is none."""
    real = os.path.realpath(path)
    visible: tuple[str, ...] = () if any(_within(real, hidden) for hidden in _HIDDEN) else _VISIBLE
    for place in (*visible, *bind_ro):
        other = os.path.realpath(place)
        if _within(real, other) or _within(other, real):
            return place
    return None


def check_tree(root: str, *, links: bool) -> None:
    """Walk `root` without following links; `Refused` at the first thing that cannot be shown.

    The kind comes with the directory entry (d_type), so files cost no stat: about 1 us each.
    """
    waiting = [root]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif not entry.is_file(follow_symlinks=False):
                        _check_special(entry, root=root, links=links)
        except PermissionError:
            continue  # what the caller cannot read, its sandbox cannot read either
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError as error:
            raise _refuse(root, f"cannot be looked through: {error}") from error


def _check_special(entry: os.DirEntry[str], *, root: str, links: bool) -> None:
    if not entry.is_symlink():
        kinds = {stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a FIFO", stat.S_IFBLK: "a block device",
                 stat.S_IFCHR: "a character device"}  # fmt: skip
        kind = kinds.get(stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode), "not a file")
        raise _refuse(entry.path, f"is {kind}: a way out of the sandbox; move it out of {root!r}")
    if links:
        _check_link(entry.path, root=root)


def _check_link(path: str, *, root: str) -> None:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), os.readlink(path)))
    if not any(_within(target, place) for place in (root, *_VISIBLE)):
        raise _refuse(path, f"is a link to {target!r}, which the sandbox does not have")


# --------------------------------------------------------------------------------------------------
# the machine's own


def machine(root: str = "/") -> Machine:
    """What the plan needs to know. `root` is for tests; paths in the result are without it."""
    return Machine(
        roots=_roots(root),
        overlays=tuple(_overlay(name, root=root) for name in DATA_FILES if _present(name, root=root)),
        hidden=tuple(path for path in _HIDDEN if os.path.isdir(_at(root, path))),
    )


def _at(root: str, path: str) -> str:
    return posixpath.join(root, path.lstrip("/"))


def _present(name: str, *, root: str) -> bool:
    """Missing nsswitch.conf and hosts are as good as ours; without our resolv.conf there are no names."""
    if os.path.lexists(_at(root, name)):
        return True
    if name == "/etc/resolv.conf":
        raise _refuse(name, "does not exist, so there is no place for the sandbox's own: make an empty one")
    return False


def _roots(root: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for path in _VISIBLE:
        name, place = path[1:], _at(root, path)
        if os.path.islink(place):
            found[name] = os.readlink(place)
        elif os.path.isdir(place):
            found[name] = None
    return {name: target for name, target in found.items() if name not in ("usr", "etc")}


def _overlay(name: str, *, root: str) -> Overlay:
    """Follow `name` link by link, as the kernel would, noting the links that /etc and /usr do not bring."""
    todo = name.strip("/").split("/")
    done = "/"
    links: list[tuple[str, str]] = []
    for _ in range(_MAX_LINKS * 16):
        if not todo:
            return Overlay(name=name, resolved=done, links=tuple(links))
        part = todo.pop(0)
        if part in ("", "."):
            continue
        path = posixpath.normpath(posixpath.join(done, part))
        if not os.path.islink(_at(root, path)):
            done = path
            continue
        target = os.readlink(_at(root, path))
        if not any(_within(path, place) for place in _VISIBLE):
            links.append((path, target))
        done = "/" if target.startswith("/") else posixpath.dirname(path)
        todo = target.split("/") + todo
    raise _refuse(name, "is a link that leads to itself")
