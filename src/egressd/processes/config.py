"""The daemon's configuration, as the supervisor hands it to the other processes: JSON, and no YAML there.
config_file.py reads it."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from egressd.ruleset import layout

__all__ = ["OPTIONAL", "Account", "Config", "ListenAddress", "PoolsConfig", "account"]

_ACCOUNTS = ("daemon", "warden", "custody", "resolve", "relay", "inspect", "audit")
_Role = Literal["daemon", "warden", "custody", "resolve", "relay", "inspect", "audit", "metrics", "api"]
# Roles of processes that run only where this key says where: the key and the account have one name.
OPTIONAL: tuple[_Role, ...] = ("metrics", "api")
_BROKER = "egressd-broker"
# linux/un.h: sun_path, with the NUL at its end.
_UNIX_PATH_MAX = 107


class Account(Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers, looked up once while names can still be looked up."""

    uid: int
    gid: int


class PoolsConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Address ranges egressd hands out, as text; see ruleset.layout.Pools."""

    synthetic4: str = "198.18.0.0/16"
    synthetic6: str = "fd53:e9::/64"
    sandbox4: str = "198.19.0.0/16"
    sandbox6: str = "fd53:1::/64"

    def pools(self) -> layout.Pools:
        """ValueError for a range of the wrong size or kind."""
        return layout.Pools(
            synthetic4=IPv4Network(self.synthetic4),
            synthetic6=IPv6Network(self.synthetic6),
            sandbox4=IPv4Network(self.sandbox4),
            sandbox6=IPv6Network(self.sandbox6),
        )


class ListenAddress(Struct, frozen=True):
    """Where HTTP is answered: an address of the loopback and a port, or the path of a Unix socket."""

    address: IPv4Address | IPv6Address | None
    port: int
    path: str

    @staticmethod
    def parse(text: str, service: Service) -> ListenAddress:
        """`127.0.0.1:9464`, `[::1]:9464` or `unix:/path`. ValueError, with the remedy, for anything else."""
        if text.startswith("unix:"):
            return ListenAddress(None, 0, _unix_path(text.removeprefix("unix:"), service))
        found = re.fullmatch(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<four>[0-9.]+)):(?P<port>[0-9]{1,5})", text)
        if found is None:
            raise ValueError(f"{text!r} is none of {service.forms}")
        address = ip_address(found["six"] or found["four"])
        # Not `is_loopback`: what it says about addresses with an IPv4 one inside depends on the Python.
        if address != IPv6Address("::1") and address not in IPv4Network("127.0.0.0/8"):
            raise ValueError(
                f"{address} can be reached from elsewhere; {service.what} at {service.forms} only:"
                f" {service.elsewhere}"
            )
        if not 1 <= int(found["port"]) <= 65535:
            raise ValueError(f"{found['port']} is not a port")
        return ListenAddress(address, int(found["port"]), "")


class Service(Struct, frozen=True):
    """What is offered at an address: a sentence without its end, the forms of an address, and what to do for
    those who are elsewhere."""

    what: str
    forms: str
    elsewhere: str


# Whoever reaches the address reads who talks to whom, and nothing there asks who they are.
_METRICS = Service(
    "metrics are read",
    "127.0.0.1:9464, [::1]:9464, unix:/run/egressd/metrics.sock",
    "put a proxy in front that knows TLS and who may read",
)
# There they are asked, but the kernel can tell only of clients on this machine.
_API = Service(
    "the HTTP API answers",
    "127.0.0.1:8000, [::1]:8000, unix:/run/egressd/api.sock",
    "it knows its clients by their sockets on this machine, so come in by ssh",
)


def _unix_path(path: str, service: Service) -> str:
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ValueError(f"{path!r} is not the absolute path of a socket, as in {service.forms}")
    if len(path.encode()) > _UNIX_PATH_MAX:
        raise ValueError(f"the path of a socket has at most {_UNIX_PATH_MAX} bytes")
    return path


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Every field of egressd.yaml(5). Paths are absolute."""

    workspaces_dir: str = "/etc/egressd/workspaces"
    run_dir: str = "/run/egressd"
    state_dir: str = "/var/lib/egressd"
    upstream: tuple[Annotated[str, Meta(max_length=512)], ...] = ()
    upstream_ca: str | None = None
    upstream_0x20: bool = False
    hosts: dict[str, tuple[str, ...]] = {}
    pools: PoolsConfig = PoolsConfig()
    user: str | dict[_Role, str] = "egressd"
    metrics: str | None = None
    api: str | None = None
    residency_dir: str = "/etc/egressd/residency"
    gateway: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,31}$")] = layout.GATEWAY
    uplinks: tuple[Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,15}$")], ...] = ()
    brokers: Annotated[tuple[str, ...], Meta(max_length=64)] | None = None

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()

    @staticmethod
    def decode(text: str) -> Config:
        return msgspec.json.decode(text, type=Config)

    @property
    def control_socket(self) -> Path:
        return Path(self.run_dir, "control.sock")

    @property
    def metrics_address(self) -> ListenAddress | None:
        """None: no metrics, and no process for them."""
        return None if self.metrics is None else ListenAddress.parse(self.metrics, _METRICS)

    @property
    def api_address(self) -> ListenAddress | None:
        """None: no HTTP API, and no process for it."""
        return None if self.api is None else ListenAddress.parse(self.api, _API)

    def broker_uids(self) -> frozenset[int]:
        """Whose word about requests is put on record, root's aside. Looked up at the time of asking, as
        members are: an account that is removed is no broker any more. Where nobody is named,
        `egressd-broker` is, if there is such an account."""
        return frozenset(self._broker_uids())

    def is_broker(self, uid: int) -> bool:
        """As `broker_uids`, looking up no more accounts than it takes: this is asked for each record."""
        return uid in self._broker_uids()

    def _broker_uids(self) -> Iterator[int]:
        for name in (_BROKER,) if self.brokers is None else self.brokers:
            with contextlib.suppress(KeyError):
                yield account(name).uid

    def accounts(self) -> dict[str, Account]:
        """Who each process runs as, by role; `metrics` and `api` are among them only where these are offered.
        KeyError names a missing account.

        `user: same` keeps the invoking user for all of them: for a lab without subordinate ids, where
        the processes are then kept apart by capabilities alone.
        """
        # An account is asked for only if it is used: a configuration that is older than metrics has none.
        roles = (*_ACCOUNTS, *(role for role in OPTIONAL if getattr(self, role) is not None))
        if self.user == "same":
            return dict.fromkeys(roles, Account(os.getuid(), os.getgid()))
        if isinstance(self.user, str):
            names = {role: f"{self.user}-{role}" for role in roles} | {"daemon": self.user}
        else:
            # A list that is older than the custodian: the warden's account has the same one capability.
            names = {"custody": self.user.get("warden", "")} | {
                role: self.user[role] for role in roles if role in self.user
            }
            names = {role: names.get(role, "") for role in roles}
        return {role: account(name) for role, name in names.items()}


def account(name: str) -> Account:
    if re.fullmatch(r"[0-9]{1,10}", name):
        return Account(int(name), int(name))
    entry = pwd.getpwnam(name)
    return Account(entry.pw_uid, entry.pw_gid)
