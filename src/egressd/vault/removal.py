"""Removing what lies beneath a directory, by descriptors: no link is followed, whatever is renamed."""

from __future__ import annotations

import contextlib
import os
import stat

__all__ = ["empty", "open_own", "remove_empty"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_own(name: str | bytes, *, above: int) -> int:
    """A directory of this account's, for listing; one whose mode forbids that, too."""
    try:
        return os.open(name, _DIRECTORY, dir_fd=above)
    except PermissionError:
        found = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        try:
            os.chmod(f"/proc/self/fd/{found}", 0o700)  # noqa: PTH101
            return os.open(name, _DIRECTORY, dir_fd=above)
        finally:
            os.close(found)


def empty(directory: int, *, blank: bool = False) -> list[str]:
    """Remove everything beneath the directory open as `directory`; it stays. Says what could not be removed
    and why, and goes on with the rest. `blank`: files are cut to nothing first, because one that somebody has
    open, or has sent to somebody who never receives it, outlives its name."""
    problems: list[str] = []
    with contextlib.suppress(OSError):
        os.fchmod(directory, 0o700)  # copies lie in directories of mode 0555
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError as error:
        return [f"a directory cannot be listed: {error.strerror}"]
    for name, is_directory in found:
        if is_directory:
            problems += _remove(name, above=directory, blank=blank)
        else:
            problems += _blanked(name, above=directory) if blank else []
            problems += _gone(name, above=directory, directory=False)
    return problems


def remove_empty(name: str, *, above: int) -> list[str]:
    """The empty directory `name`; and see that it is gone."""
    problems = _gone(name, above=above, directory=True)
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=above, follow_symlinks=False)
        problems.append(f"{name} is still there")
    return problems


def _blanked(name: str, *, above: int) -> list[str]:
    """A regular file with this one name, cut to nothing; all else is left alone. A copy has one name."""
    try:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        try:
            status = os.fstat(found)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                os.chmod(f"/proc/self/fd/{found}", 0o600)  # noqa: PTH101 - copies are 0444
                os.truncate(f"/proc/self/fd/{found}", 0)
        finally:
            os.close(found)
    except FileNotFoundError:
        pass
    except OSError as error:
        return [f"{name!a} cannot be emptied: {error.strerror}"]
    return []


def _remove(name: str, *, above: int, blank: bool) -> list[str]:
    """The directory `name` and all beneath it."""
    try:
        number = open_own(name, above=above)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{name!a} cannot be opened: {error.strerror}"]
    try:
        problems = empty(number, blank=blank)
    finally:
        os.close(number)
    return problems + _gone(name, above=above, directory=True)


def _gone(name: str, *, above: int, directory: bool) -> list[str]:
    """Remove one name."""
    try:
        (os.rmdir if directory else os.unlink)(name, dir_fd=above)
    except FileNotFoundError:
        pass
    except OSError as error:
        return [f"{name!a} cannot be removed: {error.strerror}"]
    return []
