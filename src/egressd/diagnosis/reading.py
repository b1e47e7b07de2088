"""Parsers for what a machine says of itself. None of them raises, whatever the bytes."""

from __future__ import annotations

import re
from ipaddress import ip_address

__all__ = [
    "bwrap_version",
    "kernel_version",
    "limit_of",
    "nameservers",
    "number",
    "pretty_name",
    "section_value",
]


def kernel_version(release: str) -> tuple[int, int] | None:
    """`6.1.0-18-amd64` is (6, 1)."""
    found = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", release)
    return (int(found[1]), int(found[2])) if found else None


def bwrap_version(text: str) -> tuple[int, int] | None:
    """What `bwrap --version` prints: `bubblewrap 0.8.0`."""
    found = re.search(r"\b([0-9]{1,4})\.([0-9]{1,4})", text)
    return (int(found[1]), int(found[2])) if found else None


def number(text: str | None) -> int | None:
    """A setting of one number, as /proc/sys shows it."""
    return int(text) if text is not None and re.fullmatch(r"\s*-?[0-9]{1,20}\s*", text, re.ASCII) else None


def pretty_name(text: str) -> str:
    """PRETTY_NAME of os-release(5); empty where there is none."""
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and name == "PRETTY_NAME":
            return _unquoted(value)[:128]
    return ""


def _unquoted(value: str) -> str:
    """As a shell would read it, as far as os-release(5) allows."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return re.sub(r'\\([\\"$`])', r"\1", value)


def nameservers(text: str) -> tuple[str, ...]:
    """The addresses of resolv.conf(5), a zone after % left out."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append(str(ip_address(words[1].partition("%")[0])))
            except ValueError:
                continue
    return tuple(found)


def limit_of(text: str, name: str) -> int | None:
    """The hard limit of /proc/PID/limits (proc(5)); None for "unlimited" and where there is none."""
    for line in text.splitlines():
        if line.startswith(name):
            words = line[len(name) :].split()
            return int(words[1]) if len(words) >= 2 and re.fullmatch("[0-9]{1,20}", words[1]) else None
    return None


def section_value(text: str, key: str) -> str | None:
    """The first `key=value` of a state file of NetworkManager or systemd-networkd."""
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and name == key:
            return value
    return None
