"""Whom an access list, a membership or a barrier names: one user of one issuer, or one group of one.

Spelled ``user:ISSUER:SUBJECT`` and ``group:ISSUER:NAME``. ISSUER is the name that the broker's configuration
gives an identity provider, so that two providers' users and groups are never taken for each other. SUBJECT is
the token's `sub`, which the provider never gives to anybody else (OpenID Connect Core 1.0, section 2); an
e-mail address may be, and is therefore nobody's identity here.

Names are compared letter by letter, after composition (Unicode's NFC): a file saved on one system and a token
from another spell the same "é" differently, and a group that is denied must be denied by either.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from egressd.model.errors import Unfit
from egressd.model.names import quoted

__all__ = ["ISSUER", "MAX_PRINCIPAL", "Identity", "group", "principal", "user"]

ISSUER = re.compile(r"[a-z][a-z0-9-]{0,30}[a-z0-9]|[a-z]")
MAX_PRINCIPAL = 320  # characters, prefix included
# Control, format and surrogate characters, and separators of lines: nothing that could break a line of a
# record, or be there and not be seen. The two joiners belong to the spelling of Persian and Hindi.
_NAMELESS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = frozenset("\u200c\u200d")
# Of these composition makes K, ; and `: whoever may name a group with one of them could name another's.
_IMPOSTORS = frozenset("\u212a\u037e\u1fef")
_PLAIN = re.compile(r"[\x20-\x7e]*")
_REMEDY = (
    "write user:ISSUER:SUBJECT or group:ISSUER:NAME, where ISSUER is a name from the broker's configuration"
)


def principal(text: object) -> str:
    """`text` if it names a user or a group as above; `Unfit` says what to write instead."""
    if not isinstance(text, str):
        raise Unfit("this names nobody: it is not text", _REMEDY)
    if len(text) > MAX_PRINCIPAL:
        raise Unfit(f"{quoted(text)} is longer than {MAX_PRINCIPAL} characters", _REMEDY)
    kind, _, rest = text.partition(":")
    issuer, _, name = rest.partition(":")
    if kind not in ("user", "group") or not ISSUER.fullmatch(issuer) or not name:
        raise Unfit(f"{quoted(text)} names nobody", _REMEDY)
    found = text if _PLAIN.fullmatch(name) else unicodedata.normalize("NFC", text)
    if name != name.strip() or _misleads(name) or len(found) > MAX_PRINCIPAL:
        raise Unfit(f"{quoted(text)} is no name that a provider gives", _REMEDY)
    return found


def _misleads(name: str) -> bool:
    if _PLAIN.fullmatch(name):
        return False
    return any(c in _IMPOSTORS or (unicodedata.category(c) in _NAMELESS and c not in _JOINERS) for c in name)


def user(issuer: str, subject: str) -> str:
    return principal(f"user:{issuer}:{subject}")


def group(issuer: str, name: str) -> str:
    return principal(f"group:{issuer}:{name}")


@dataclass(frozen=True, slots=True)
class Identity:
    """An asker whose token was verified. `email` is for people to read; nothing is decided by it.

    `Unfit` for one that no token gives: a provider speaks of its own users and groups alone.
    """

    issuer: str
    subject: str
    groups: frozenset[str] = frozenset()  # as principals, "group:okta:finance"
    email: str = ""
    expires: float = 0.0  # Unix time, of the token

    def __post_init__(self) -> None:
        user(self.issuer, self.subject)
        for name in self.groups:
            if not name.startswith(f"group:{self.issuer}:") or principal(name) != name:
                raise Unfit(f"{quoted(name)} is no group of {self.issuer}", _REMEDY)

    @property
    def user(self) -> str:
        return user(self.issuer, self.subject)

    @property
    def principals(self) -> frozenset[str]:
        """All the names this asker goes by."""
        return self.groups | {self.user}
