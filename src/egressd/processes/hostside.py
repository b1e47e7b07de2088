"""The host's side of the way out: what stands on the host so that what the gateway lets through leaves it,
and the answers come back. The foundation makes it as root; the custodian keeps it, with CAP_NET_ADMIN alone.

It is: the settings of egressd's device and of the uplinks, the device up with its addresses, neighbours and
routes, and `table inet egressd_host`. All of it permits: without it approved traffic fails, and nothing else
leaves.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from egressd.kernel import gateway, sysctl
from egressd.kernel.netlink import Netlink
from egressd.kernel.nft import Nft
from egressd.kernel.routing import Tables
from egressd.processes import plain_files
from egressd.ruleset import build, layout
from egressd.ruleset.layout import Pools

__all__ = ["CUSTODY", "kept_settings", "listed", "make_table", "put_right", "uplinks", "write_settings"]

log = logging.getLogger("egressd")

# What `put_right` may ever have set of devices that are not egressd's, and what the kernel has for values.
_SETTING = re.compile(
    r"net/ipv4/conf/[^/]{1,15}/forwarding|net/ipv6/conf/[^/]{1,15}/(?:forwarding|force_forwarding|accept_ra)"
)
_VALUE = re.compile("-?[0-9]{1,4}")
_DOTS = (".", "..")
_BYTES = 1 << 20  # of such a file; a setting takes 60
CUSTODY = "custodian/settings.json"  # in run_dir: what the custodian has changed since the start


def uplinks(route: Netlink, configured: Sequence[str]) -> list[str]:
    """Devices that lead out: those that are named, or those of the default routes there are now."""
    if configured:
        return list(configured)
    tables = Tables(route)
    names = {device.index: device.name for device in tables.devices().values()}
    return [name for name in tables.default_devices(names) if name != layout.HOST_LINK]


def put_right(route: Netlink, pools: Pools, out: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """All but the table: what was done, and the settings as they were before. KernelError if it cannot be
    done, or egressd's device is not there."""
    # Settings before the link is up, so that it never has an automatic address.
    changed = sysctl.ensure(gateway.host_settings(out))
    done = gateway.run(route, gateway.host_steps(route, pools))
    done += [f"set {key} = {after} (was {before})" for key, (before, after) in changed.items()]
    return done, {key: before for key, (before, _) in changed.items()}


# ---- the table


def listed(nft: Nft) -> str | None:
    """`table inet egressd_host` as the kernel has it; None: it is not there."""
    return nft.list_table("inet", layout.HOST_TABLE)


def make_table(nft: Nft, pools: Pools) -> None:
    """One transaction, whatever was there before."""
    nft.run(build.host(pools))


# ---- what the host's settings were before


def write_settings(path: Path, before: Mapping[str, str]) -> None:
    """Keep the values that the host had first. Settings of our own device go with it."""
    ours = f"/{layout.HOST_LINK}/"
    kept = {key: value for key, value in before.items() if ours not in key} | kept_settings(path)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    plain_files.replace(path, f"{json.dumps({'settings': kept}, indent=1)}\n".encode())


def kept_settings(path: Path) -> dict[str, str]:
    """Nothing but what may have been put there: root writes these into /proc/sys, and the file may be another
    account's."""
    try:
        if not os.path.lexists(path):
            return {}
        data = plain_files.contents(lambda: os.open(path, plain_files.FLAGS), limit=_BYTES, large=_large)
        found = json.loads(data)["settings"].items()
    except (plain_files.Unreadable, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        log.warning("%s is damaged: settings of the host from before cannot be restored", path)
        return {}
    return {str(key): str(value) for key, value in found if _plausible(str(key), str(value))}


def _large(size: int) -> plain_files.Unreadable:
    return plain_files.Unreadable(f"it has {size} bytes")


def _plausible(key: str, value: str) -> bool:
    # A NUL, or half of a character, would be no path at all.
    sound = key.isprintable() and _SETTING.fullmatch(key) and _VALUE.fullmatch(value)
    return bool(sound) and not set(key.split("/")) & set(_DOTS)
