"""The configuration's file: YAML, read once by the supervisor.

A file with anything wrong in it is refused whole; egressd does not start on half a configuration.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from egressd.dns.exchange import Server
from egressd.model import tree
from egressd.model.errors import PolicyError, Problem
from egressd.processes.config import OPTIONAL, Config, ListenAddress, account

__all__ = ["load"]


def load(path: Path) -> Config:
    """Read and check a configuration file. PolicyError lists everything wrong with it."""
    source = str(path)
    try:
        with path.open("rb") as stream:
            found = tree.read(stream.read(tree.MAX_BYTES + 1), source=source)
    except OSError as error:
        text = error.strerror or str(error)
        raise PolicyError([Problem(source, 0, "", text, "see egressd.yaml(5) for an example")]) from error
    if not found.readable:
        raise PolicyError(found.problems)
    document = {} if found.value is None else found.value
    if not isinstance(document, dict):
        raise PolicyError([found.problem((), "the file is not a mapping", "see egressd.yaml(5)")])
    problems = [*found.problems, *_problems(document, found)]
    if not problems:
        problems += _problems_together(document, found)
    if problems:
        raise PolicyError(problems)
    return _convert(document)


def _convert(document: Any) -> Config:
    return msgspec.convert(document, type=Config, strict=True)


def _problems(document: dict[str, Any], found: tree.Tree) -> Iterator[Problem]:
    """Each key alone, so that one mistake does not hide another."""
    for key, value in document.items():
        try:
            config = _convert({key: value})
            check = _CHECKS.get(key)
            if check is not None:
                check(config)
        except (msgspec.ValidationError, ValueError) as error:
            yield found.problem((key,), str(error), "see egressd.yaml(5)")


def _problems_together(document: dict[str, Any], found: tree.Tree) -> Iterator[Problem]:
    """What no key shows alone. Each key is good by now."""
    yield from _shared_sockets(_convert(document), found)
    if "user" not in document:
        return  # default accounts are looked up at the start, where they are needed
    for role, number, text in (
        ("metrics", 906, "metrics are read by a process of its own, and it has no account"),
        ("api", 907, "the HTTP API is a process of its own, and it has no account"),
    ):
        if document.get(role) is None:
            continue
        config = _convert({"user": document["user"], role: document[role]})
        try:
            config.accounts()
        except KeyError:
            if isinstance(config.user, str):
                remedy = f"create {config.user}-{role} (systemd-sysusers egressd.conf)"
            else:
                remedy = f"add one to `user`: {role}: '{number}', or the name of an account"
            yield found.problem((role,), text, f"{remedy}, or remove the line")


def _shared_sockets(config: Config, found: tree.Tree) -> Iterator[Problem]:
    """A socket that stands at a path already is taken for an old one of ours, and removed."""
    taken = {os.path.normpath(config.control_socket): "the control socket"}
    for role in OPTIONAL:
        address: ListenAddress | None = getattr(config, f"{role}_address")
        if address is None or not address.path:
            continue
        other = taken.setdefault(os.path.normpath(address.path), role)
        if other != role:
            yield found.problem((role,), f"{address.path} is the path of {other}, too", "name another path")


def _absolute(*fields: str) -> Callable[[Config], None]:
    def check(config: Config) -> None:
        for field in fields:
            value = getattr(config, field)
            if value is not None and not value.startswith("/"):
                raise ValueError(f"{value!r} is not an absolute path")

    return check


def _check_hosts(config: Config) -> None:
    for name, addresses in config.hosts.items():
        if not addresses:
            raise ValueError(f"{name!r} has no address")
        for address in addresses:
            ipaddress.ip_address(address)


def _check_user(config: Config) -> None:
    try:
        config.accounts()
    except KeyError as error:
        raise ValueError(
            f"there is no account {error.args[0]!r}; create it (systemd-sysusers egressd.conf),"
            " or name numbers: user: {daemon: '900', warden: '901', resolve: '902', relay: '903',"
            " inspect: '904', audit: '905', custody: '909'}"
        ) from error


def _check_brokers(config: Config) -> None:
    for name in config.brokers or ():
        try:
            account(name)
        except KeyError:
            text = f"there is no account {name!r}; create it, or name a number: brokers: ['908']"
            raise ValueError(text) from None


def _check_upstream(config: Config) -> None:
    for server in config.upstream:
        Server.parse(server)


def _check_addresses(config: Config) -> None:
    """ValueError by reading them."""
    for role in OPTIONAL:
        getattr(config, f"{role}_address")


_CHECKS: dict[str, Callable[[Config], None]] = {
    "workspaces_dir": _absolute("workspaces_dir"),
    "run_dir": _absolute("run_dir"),
    "state_dir": _absolute("state_dir"),
    "residency_dir": _absolute("residency_dir"),
    "upstream_ca": _absolute("upstream_ca"),
    "hosts": _check_hosts,
    "pools": lambda config: (config.pools.pools(), None)[1],
    "metrics": _check_addresses,
    "api": _check_addresses,
    "upstream": _check_upstream,
    "user": _check_user,
    "brokers": _check_brokers,
}
