"""Identity providers, as broker.yaml names them: whose tokens are believed, and what must stand in them.

```yaml
issuers:
  okta:                                               # a name of our own: user:okta:SUBJECT
    issuer: https://acme.okta.com/oauth2/default      # `iss`, letter by letter
    audience: 0oa1b2c3                                # the client's id, or a list of them
    provider: okta                                    # oidc (the default), okta, entra, google
  entra:
    issuer: https://login.microsoftonline.com/6f1c.../v2.0
    audience: 2d4d11a2-...
    provider: entra
    tenant: 6f1c...
    jwks_file: /etc/egressd/entra.jwks.json           # then no network is used for this provider
  google:
    issuer: https://accounts.google.com
    audience: 1048-ab.apps.googleusercontent.com
    provider: google
    domain: acme.example
    members_file: /etc/egressd/google-groups.yaml     # Google's tokens say no groups
```

What decides is never taken from a token: its algorithms, its keys' address, how it spells groups all stand
here. Symmetric algorithms and `none` have no spelling (RFC 8725, sections 2.1 and 3.1).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from egressd.access.claims import GroupClaims, Provider
from egressd.access.principals import ISSUER
from egressd.model.errors import Problem, Unfit
from egressd.model.names import quoted
from egressd.model.tree import Path, Tree

__all__ = ["ALGORITHMS", "DEFAULT_ALGORITHMS", "MAX_ISSUERS", "Issuer", "Nonce", "Provider", "parse"]

# RFC 7518, section 3.1, and RFC 8037: those whose verifying key can be published. No more may be configured.
ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
DEFAULT_ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA")
MAX_ISSUERS = 32
_MAX_LIST = 64
_MAX_TEXT = 512  # characters of a URL, a path, a client's id
_MAX_SKEW = 300  # seconds: with more, "expired" would mean little
_DAY = 86_400
_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_DOMAIN = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9-]{2,63}")
_WELL_KNOWN = "/.well-known/openid-configuration"
_SEE = "see the issuers of broker.yaml"


class Nonce(enum.StrEnum):
    """What is asked of a token's `nonce` (OpenID Connect Core 1.0, section 3.1.3.7, item 11)."""

    IGNORE = "ignore"
    MATCH = "match"  # what the token says is what the asker says; both may say nothing
    ONCE = "once"  # it must be there, match, and be seen for the first time


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A provider whose ID tokens are believed. Times are seconds, files absolute paths."""

    name: str  # access.principals.ISSUER
    issuer: str  # compared with `iss` as it is: no normalisation
    audiences: tuple[str, ...]  # a token names one at least, and no other
    provider: Provider = Provider.OIDC
    algorithms: tuple[str, ...] = DEFAULT_ALGORITHMS
    groups: str = "groups"  # the claim; "" where tokens are known to say no groups
    optional_groups: bool = False  # whether a token without that claim is of somebody in no group
    tenant: str = ""  # Entra: what `tid` must be
    domain: str = ""  # Google: what `hd` must be
    members_file: str = ""  # Google: who is in which group, see access.claims.read_members
    names_file: str = ""  # Entra: what groups are called, see access.claims.read_names
    jwks_file: str = ""  # the keys; then nothing is asked of the network
    discovery: str = ""  # "" is `issuer` and the well-known path
    ca_file: str = ""  # PEM; "" trusts what the system trusts
    skew: int = 60
    nonce: Nonce = Nonce.MATCH
    max_age: int = _DAY  # since `iat`, whatever `exp` says
    parties: tuple[str, ...] = ()  # what `azp` may be; () is the audiences
    types: tuple[str, ...] = (
        "jwt",
    )  # of the header, lower case, without "application/"; none at all is good

    @property
    def discovery_url(self) -> str:
        """Where the provider describes itself (OpenID Connect Discovery 1.0, section 4)."""
        return self.discovery or self.issuer.removesuffix("/") + _WELL_KNOWN

    @property
    def authorised_parties(self) -> tuple[str, ...]:
        return self.parties or self.audiences

    def group_claims(
        self, *, members: Mapping[str, frozenset[str]] | None = None, names: Mapping[str, str] | None = None
    ) -> GroupClaims:
        """How its claims are read, with what stands in its two files."""
        return GroupClaims(
            provider=self.provider,
            claim=self.groups,
            tenant=self.tenant,
            domain=self.domain,
            names=names or {},
            members=members,
            optional=self.optional_groups,
        )


def parse(value: object, found: Tree, path: Path = ("issuers",)) -> tuple[tuple[Issuer, ...], list[Problem]]:
    """`value` is what stands at `path` of a YAML file, `found` that file. Every problem, with its line.

    Where there is a problem, the issuers are those without one: of use only for finding further problems.
    """
    if not isinstance(value, dict) or not value:
        text = "no identity provider is named" if value in (None, {}) else "this is not a mapping"
        return (), [found.problem(path, text, "write NAME: {issuer: https://..., audience: ...}")]
    if len(value) > MAX_ISSUERS:
        return (), [
            found.problem(path, f"there are more than {MAX_ISSUERS} identity providers", "remove some")
        ]
    issuers: list[Issuer] = []
    problems: list[Problem] = []
    for name, entry in value.items():
        here = (*path, name)
        wrong = [found.problem(here + at, text, remedy) for at, text, remedy in _wrong(name, entry)]
        problems += wrong
        if not wrong:
            issuers.append(_issuer(name, entry))
    problems += _shared(issuers, found, path)
    return tuple(issuers), problems


_Wrong = list[tuple[Path, str, str]]


def _wrong(name: str, entry: object) -> _Wrong:
    """What is wrong with one entry: where below it, what, and what to do."""
    wrong: _Wrong = []
    if not ISSUER.fullmatch(name):
        wrong.append(((), f"{quoted(name)} is no name", "use lower-case letters, digits and inner hyphens"))
    if not isinstance(entry, dict):
        return [*wrong, ((), "this is not a mapping", "write issuer: and audience: below the name")]
    for key, value in entry.items():
        try:
            _read(key, value)
        except Unfit as error:
            wrong.append(((key,), error.text, error.remedy))
    wrong += [
        ((), f"there is no {key}", f"add {key}: {example}")
        for key, example in _NEEDED.items()
        if key not in entry
    ]
    return wrong or _together(_issuer(name, entry))


_NEEDED = {"issuer": "https://...", "audience": "the client's id"}


def _read(key: str, value: object) -> tuple[str, Any]:
    """The field of `Issuer` that a key is for, and its value."""
    if key not in _KEYS:
        raise Unfit(f"there is no key {quoted(key)} here", f"use {', '.join(_KEYS)}")
    field, reader = _KEYS[key]
    return field, reader(value)


def _issuer(name: str, entry: Mapping[str, object]) -> Issuer:
    return Issuer(name=name, **dict(_read(key, value) for key, value in entry.items()))


def _together(issuer: Issuer) -> _Wrong:
    """What no key shows alone."""
    wrong: _Wrong = []
    entra, google = issuer.provider is Provider.ENTRA, issuer.provider is Provider.GOOGLE
    if entra and not issuer.tenant:
        text = "the tenant is not named, and tokens of others would pass"
        wrong.append((("provider",), text, "add tenant: the directory's UUID"))
    if entra and issuer.tenant and issuer.tenant not in issuer.issuer:
        wrong.append((("issuer",), "this is not the address of that tenant", "put the tenant's UUID into it"))
    if google and not issuer.domain:
        text = "the domain is not named, and any Google account would pass"
        wrong.append((("provider",), text, "add domain: the organisation's domain"))
    wrong += [
        ((key,), f"{key} is for provider: {provider} only", "remove it, or name that provider")
        for key, provider in _FOR_ONE.items()
        if getattr(issuer, key) and issuer.provider is not provider
    ]
    wrong += [
        ((key,), f"{key} is not used where there is a jwks_file", "remove one of them")
        for key in ("discovery", "ca_file")
        if issuer.jwks_file and getattr(issuer, key)
    ]
    return wrong


_FOR_ONE = {
    "tenant": Provider.ENTRA,
    "names_file": Provider.ENTRA,
    "domain": Provider.GOOGLE,
    "members_file": Provider.GOOGLE,
}


def _shared(issuers: list[Issuer], found: Tree, path: Path) -> list[Problem]:
    """`iss` selects the provider, so that each may stand there once."""
    first: dict[str, str] = {}
    return [
        found.problem(
            (*path, issuer.name, "issuer"),
            f"this is the issuer of {first[issuer.issuer]}, too",
            "name each provider once, with all its audiences",
        )
        for issuer in issuers
        if first.setdefault(issuer.issuer, issuer.name) != issuer.name
    ]


# ---- one value


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # a client's id of digits alone is a number to YAML
    if not isinstance(value, str) or not value:
        raise Unfit("this is not a text", _SEE)
    if len(value) > _MAX_TEXT or not _PRINTABLE.fullmatch(value):
        raise Unfit(f"{quoted(value)} is no text of at most {_MAX_TEXT} plain characters", "write it out")
    return value


def _issuer_url(value: object) -> str:
    """Issuers have neither query nor fragment (OpenID Connect Core 1.0, section 2)."""
    text = _url(value)
    if "?" in text or "#" in text:
        raise Unfit(
            f"{quoted(text)} has a query or a fragment", "write it as it stands in the provider's tokens"
        )
    return text


def _url(value: object) -> str:
    text = _text(value)
    try:
        parts = urlsplit(text)
        port_is_good = parts.port != 0
    except ValueError:
        raise Unfit(f"{quoted(text)} is no URL", "write https://HOST/PATH") from None
    if parts.scheme != "https" or not text.startswith("https://"):
        raise Unfit(f"{quoted(text)} is not https", "keys are fetched over TLS only; or use a jwks_file")
    if not parts.hostname or not port_is_good or "@" in parts.netloc or "\\" in text:
        raise Unfit(f"{quoted(text)} names no host", "write https://HOST/PATH")
    if "{" in text or "<" in text:
        raise Unfit(
            f"{quoted(text)} has a placeholder in it", "write what stands there for your organisation"
        )
    return text


def _absolute(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or len(value) > _MAX_TEXT:
        raise Unfit("this is not an absolute path", "write /etc/egressd/...")
    return value


def _list(reader: Callable[[object], str]) -> Callable[[object], tuple[str, ...]]:
    """One, or a list of some."""

    def read(value: object) -> tuple[str, ...]:
        items = value if isinstance(value, list) else [value]
        if not items or len(items) > _MAX_LIST:
            raise Unfit("the list is empty, or too long", f"name at least one, and at most {_MAX_LIST}")
        return tuple(dict.fromkeys(reader(item) for item in items))

    return read


def _algorithm(value: object) -> str:
    if value not in ALGORITHMS:
        shown = quoted(str(value))
        raise Unfit(f"{shown} is no algorithm with a public key", f"use {', '.join(ALGORITHMS)}")
    return str(value)


def _seconds(least: int, most: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Unfit(f"this is no number of seconds from {least} to {most}", "write digits alone")
        return value

    return read


def _one_of(kind: type[enum.StrEnum]) -> Callable[[object], enum.StrEnum]:
    def read(value: object) -> enum.StrEnum:
        try:
            return kind(str(value))
        except ValueError:
            raise Unfit(f"{quoted(str(value))} is not known", f"use {', '.join(kind)}") from None

    return read


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        text = _text(value).lower()
        if not pattern.fullmatch(text):
            raise Unfit(f"{quoted(text)} is no {what}", f"write the {what} as the provider shows it")
        return text

    return read


def _claim(value: object) -> str:
    return "" if value == "" else _text(value)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise Unfit("this is neither true nor false", "write one of them")
    return value


def _type(value: object) -> str:
    return _text(value).lower().removeprefix("application/")


# What stands in broker.yaml, the field it is for, and how it is read.
_KEYS: Mapping[str, tuple[str, Callable[[object], Any]]] = {
    "issuer": ("issuer", _issuer_url),
    "audience": ("audiences", _list(_text)),
    "provider": ("provider", _one_of(Provider)),
    "algorithms": ("algorithms", _list(_algorithm)),
    "groups": ("groups", _claim),
    "optional_groups": ("optional_groups", _truth),
    "tenant": ("tenant", _matching(_UUID, "UUID")),
    "domain": ("domain", _matching(_DOMAIN, "domain")),
    "members_file": ("members_file", _absolute),
    "names_file": ("names_file", _absolute),
    "jwks_file": ("jwks_file", _absolute),
    "discovery": ("discovery", _url),
    "ca_file": ("ca_file", _absolute),
    "skew": ("skew", _seconds(0, _MAX_SKEW)),
    "nonce": ("nonce", _one_of(Nonce)),
    "max_age": ("max_age", _seconds(60, 30 * _DAY)),
    "azp": ("parties", _list(_text)),
    "typ": ("types", _list(_type)),
}
assert {field for field, _ in _KEYS.values()} | {"name"} == {field.name for field in fields(Issuer)}
