"""Identifiers that reach nft syntax, paths and logs. Each is checked here, once, on construction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

__all__ = ["WORKSPACE_PATTERN", "Link", "check_workspace"]

# Lower-case letters, digits and inner hyphens: safe as an nft identifier, a file name and a log word.
# No underscore, so "acme_out4" can only be workspace "acme", object "out4". At most 32 bytes.
WORKSPACE_PATTERN = r"[a-z][a-z0-9-]{0,30}[a-z0-9]|[a-z]"
_WORKSPACE = re.compile(WORKSPACE_PATTERN)


def check_workspace(name: str) -> str:
    """Return `name` if it is a well-formed workspace name, else raise ValueError saying why not."""
    if not _WORKSPACE.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a workspace name: use 1 to 32 lower-case letters, digits and inner hyphens,"
            " beginning with a letter"
        )
    return name


@dataclass(frozen=True, slots=True, order=True)
class Link:
    """A sandbox's link, numbered. A number is never used twice while the gateway exists.

    On Linux 6.18 a netdev chain outlives its device and binds to the next one of that name, so a
    reused name would carry the old workspace's policy to a new sandbox.
    """

    number: int

    def __post_init__(self) -> None:
        # "eg" + 9 digits fits IFNAMSIZ (16 with the terminating zero, linux/if.h)
        if not 1 <= self.number <= 999_999_999:
            raise ValueError(f"link number {self.number} is out of range")

    @property
    def device(self) -> str:
        """The gateway end's interface name; also the name of its chain."""
        return f"eg{self.number}"

    @classmethod
    def of_device(cls, device: str) -> Self | None:
        """The inverse of `device`; None for a name that is not one of ours."""
        match = re.fullmatch(r"eg([1-9][0-9]{0,8})", device)
        return cls(int(match[1])) if match else None

    @classmethod
    def written(cls, text: str) -> Self | None:
        """As a person may write it: with or without the letters."""
        return cls.of_device(text if text.startswith("eg") else f"eg{text}")
