"""Kernel settings of the namespace this thread is in, as values.

/proc/sys/net shows the settings of the reader's own network namespace, and CAP_NET_ADMIN over that
namespace is enough to write them (net_ctl_permissions in net/sysctl_net.c).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from egressd.model.errors import KernelError

__all__ = ["Setting", "ensure", "read", "wrong"]

_ROOT = Path("/proc/sys")


@dataclass(frozen=True, slots=True)
class Setting:
    """`key` in path form ("net/ipv4/ip_forward"), since interface names may hold dots."""

    key: str
    value: str
    why: str = ""
    optional: bool = False  # older kernels do without it

    def describe(self) -> str:
        return f"{self.key} = {self.value}"


def read(key: str) -> str | None:
    """The value in force, several numbers parted by a space; None where the kernel has no such setting."""
    try:
        return " ".join((_ROOT / key).read_text().split())
    except FileNotFoundError:
        return None


def write(key: str, value: str) -> None:
    try:
        (_ROOT / key).write_text(value)
    except OSError as error:
        raise KernelError(
            f"{key} cannot be set to {value}: {error.strerror};"
            " is /proc/sys writable (systemd: ProtectKernelTunables=no) and CAP_NET_ADMIN held?"
        ) from error


def wrong(settings: Iterable[Setting]) -> list[Setting]:
    """Those not in force. KernelError for one that the kernel lacks and that is not optional."""
    found = []
    for setting in settings:
        value = read(setting.key)
        if value is None and not setting.optional:
            raise KernelError(f"the kernel has no setting {setting.key}; {setting.why or 'it is required'}")
        if value is not None and value != setting.value:
            found.append(setting)
    return found


def ensure(settings: Iterable[Setting]) -> dict[str, tuple[str, str]]:
    """Put all in force; returns what was changed: key -> (before, after)."""
    changed = {}
    for setting in wrong(settings):
        before = read(setting.key) or ""
        write(setting.key, setting.value)
        changed[setting.key] = (before, setting.value)
    return changed
