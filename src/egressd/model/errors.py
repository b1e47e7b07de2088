"""Errors, named by whose fault they are.

``PolicyError``  the author of a file: every problem at once, each with its place and remedy.
``Unfit``        one value (a name, a network, a port): what is wrong with it and what to write instead.
``Refused``      the asker: a request that policy or identity does not permit; carries a `Reason`.
``ProtocolError`` a peer process: bytes that are not one of the agreed messages; ends the connection.
``KernelError``  the machine: the kernel said no, or lacks something; nothing was granted.
"""

from __future__ import annotations

from dataclasses import dataclass

from egressd.model.verdicts import Reason

__all__ = ["EgressdError", "KernelError", "PolicyError", "Problem", "ProtocolError", "Refused", "Unfit"]


class EgressdError(Exception):
    """Base of every error egressd raises on purpose."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing wrong with a file: where, what, and what to do about it."""

    source: str
    line: int  # 1-based; 0 when the whole file is meant
    where: str  # the path inside the document, e.g. "allow[2].ports[0]"
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line else self.source
        where = f" {self.where}:" if self.where else ""
        remedy = f" ({self.remedy})" if self.remedy else ""
        return f"{place}:{where} {self.text}{remedy}"


class PolicyError(EgressdError):
    """A policy or configuration file is refused whole; `problems` lists everything wrong with it."""

    def __init__(self, problems: list[Problem] | tuple[Problem, ...]) -> None:
        self.problems = tuple(sorted(problems))
        super().__init__("\n".join(map(str, self.problems)))


class Unfit(EgressdError, ValueError):
    """A value that cannot stand in a policy. Carries no place: whoever read it knows the line."""

    def __init__(self, text: str, remedy: str = "") -> None:
        self.text = text
        self.remedy = remedy
        super().__init__(f"{text} ({remedy})" if remedy else text)


class Refused(EgressdError):
    """The request is denied. `reason` is for machines and counters, the text for people."""

    def __init__(self, reason: Reason, text: str) -> None:
        self.reason = reason
        super().__init__(text)


class ProtocolError(EgressdError):
    """The other end of a channel sent something that is not one of the agreed messages."""


class KernelError(EgressdError):
    """The kernel refused or lacks something egressd needs. Nothing was granted."""
