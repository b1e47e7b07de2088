"""From the verified claims of an ID token to an `Identity`: where each provider says who is in which group.

A group that is missed is not a small loss: lists also deny groups, and barriers bind them. So a token that
does not say for certain which groups its subject is in is refused; it never counts as "in no group".

- Okta: `groups`, a list of names.
- Entra ID: `groups`, a list of object ids (GUIDs), and `tid`, the tenant. Above 200 groups there is no list
  but a reference to one, `_claim_names` or `hasgroups` (learn.microsoft.com, "Groups overage claim"). The
  subject is `oid`, by which the tenant's own lists name a user; `sub` is another for each application.
- Google Workspace: tokens say no groups. `hd` names the organisation; groups come from a file.
- Plain OpenID Connect: a claim of whatever name, a list of names or one name.

A provider may leave out a claim that would be an empty list. Where that is so, `optional` says it.
"""

from __future__ import annotations

import enum
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

from egressd.access.principals import Identity, group
from egressd.model.errors import PolicyError, Unfit
from egressd.model.names import quoted
from egressd.model.tree import Tree, read

__all__ = ["MAX_GROUPS", "GroupClaims", "Provider", "identity", "read_members", "read_names"]

MAX_GROUPS = 2000  # of one asker
_MAX_SUBJECT = 255  # ASCII characters: OpenID Connect Core 1.0, section 2
_MAX_EMAIL = 320
_SUBJECT = re.compile(r"[\x21-\x7e]+")
_GUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


class Provider(enum.StrEnum):
    """Whose habits a token follows, beyond OpenID Connect."""

    OIDC = "oidc"
    OKTA = "okta"
    ENTRA = "entra"
    GOOGLE = "google"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupClaims:
    """How one provider's tokens are read. `Unfit` for a mapping that would not be safe to use."""

    provider: Provider = Provider.OIDC
    claim: str = "groups"  # "" where tokens of this provider are known to say no groups; never with Google
    tenant: str = ""  # what `tid` must be; Entra needs it
    domain: str = ""  # what `hd` must be; Google needs it
    names: Mapping[str, str] = field(default_factory=dict)  # Entra: object id -> name. A group goes by both
    members: Mapping[str, frozenset[str]] | None = None  # Google: `sub` or e-mail address -> names of groups
    optional: bool = False  # whether a token without the claim, or an asker not in the file, is in no group

    def __post_init__(self) -> None:
        if self.provider == Provider.ENTRA and not _GUID.fullmatch(self.tenant):
            raise Unfit("Entra ID needs the tenant's id", "write tenant: and the GUID, in lower case")
        if self.provider == Provider.GOOGLE and not self.domain:
            raise Unfit("Google Workspace needs the organisation's domain", "write domain:")
        if self.members is not None and self.provider != Provider.GOOGLE:
            raise Unfit("a file of members would stand beside what tokens say", "use one of the two")
        _check_names(self.names)


def identity(claims: Mapping[str, object], mapping: GroupClaims, issuer_name: str) -> Identity:
    """Who the token speaks of. `Unfit` for claims of the wrong type, or that leave something open.

    `claims` are of a token whose signature, issuer, audience and times were verified already; `issuer_name`
    is the configuration's name of its issuer. Values of claims are foreign: messages quote them, bounded.
    """
    _check_origin(claims, mapping)
    email = _email(claims, mapping.provider)
    names = _groups(claims, mapping, email)
    if len(names) > MAX_GROUPS:
        raise Unfit(f"the token names {len(names)} groups", f"{MAX_GROUPS} are the most")
    return Identity(
        issuer=issuer_name,
        subject=_subject(claims, mapping.provider),
        groups=frozenset(group(issuer_name, name) for name in names),
        email=email,
        expires=_expires(claims),
    )


def read_members(data: bytes, *, source: str) -> dict[str, frozenset[str]]:
    """A file {members: {SUB-OR-EMAIL: [GROUP, ...]}}, for `GroupClaims.members`. `PolicyError` has all.

    ```yaml
    members:
      "104356120987234561234": [finance, board]
      anna@acme.example: [research]
    ```
    """
    tree = read(data, source=source)
    entries = _section(tree, "members", "write members: {ann@example.com: [finance]}")
    found: dict[str, frozenset[str]] = {}
    for key, value in entries.items():
        spelt = _folded(key)
        if spelt in found:
            tree.problems.append(
                tree.problem(("members", key), "who this is stands here already", "join them")
            )
        found[spelt] = frozenset(_file_names(tree, key, value))
    _refuse(tree)
    return found


def read_names(data: bytes, *, source: str) -> dict[str, str]:
    """A file {groups: {GUID: NAME}}, for `GroupClaims.names`. `PolicyError` has all."""
    tree = read(data, source=source)
    found: dict[str, str] = {}
    for key, value in _section(tree, "groups", "write groups: {GUID: NAME}").items():
        try:
            found[key.lower()] = _text(value, "a group's name")
            _check_names({key.lower(): found[key.lower()]})
        except Unfit as wrong:
            tree.problems.append(tree.problem(("groups", key), wrong.text, wrong.remedy))
    _refuse(tree)
    try:
        _check_names(found)
    except Unfit as wrong:
        raise PolicyError([tree.problem(("groups",), wrong.text, wrong.remedy)]) from None
    return found


# ---- what a token must say of where it comes from


def _check_origin(claims: Mapping[str, object], mapping: GroupClaims) -> None:
    if mapping.tenant and claims.get("tid") != mapping.tenant:
        raise Unfit("the token is of another tenant", "ask with a token of this organisation")
    if mapping.domain and claims.get("hd") != mapping.domain:
        raise Unfit(
            "the token is of another organisation, or of none", "ask with a token of this organisation"
        )


def _subject(claims: Mapping[str, object], provider: Provider) -> str:
    name = "oid" if provider == Provider.ENTRA else "sub"
    value = claims.get(name)
    if not isinstance(value, str) or len(value) > _MAX_SUBJECT or not _SUBJECT.fullmatch(value):
        raise Unfit(f"`{name}` names no subject")
    if provider == Provider.ENTRA and not _GUID.fullmatch(value.lower()):
        raise Unfit("`oid` is not an object id")
    return value.lower() if provider == Provider.ENTRA else value


def _expires(claims: Mapping[str, object]) -> float:
    value = claims.get("exp")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 53:
        raise Unfit("`exp` is no time")
    return float(value)


def _email(claims: Mapping[str, object], provider: Provider) -> str:
    """For people to read, so only where the provider does not say that it was never checked."""
    names = ("email", "preferred_username") if provider == Provider.ENTRA else ("email",)
    value = next((claims[name] for name in names if claims.get(name) is not None), "")
    if not isinstance(value, str):
        raise Unfit("`email` is not text")
    if len(value) > _MAX_EMAIL or any(unicodedata.category(c)[0] in "CZ" for c in value):
        raise Unfit("`email` is no address")
    return value if claims.get("email_verified", True) in (True, "true") else ""


# ---- groups


def _groups(claims: Mapping[str, object], mapping: GroupClaims, email: str) -> frozenset[str]:
    if mapping.provider == Provider.GOOGLE:
        return _members(claims, mapping, email)
    if not mapping.claim:
        return frozenset()
    _check_overage(claims, mapping.claim)
    listed = _listed(claims, mapping)
    if mapping.provider == Provider.ENTRA:
        return _entra_names(listed, mapping.names)
    return frozenset(listed)


def _check_overage(claims: Mapping[str, object], claim: str) -> None:
    """Claims that stand elsewhere (OpenID Connect Core 1.0, section 5.6.2), and Entra's `hasgroups`."""
    if "hasgroups" in claims:
        raise Unfit("the token does not list its groups: there are too many", _NARROW)
    elsewhere = claims.get("_claim_names", {})
    if not isinstance(elsewhere, Mapping) or claim in elsewhere:
        raise Unfit("the token refers to a list of groups elsewhere", _NARROW)
    if "_claim_sources" in claims and "_claim_names" not in claims:
        raise Unfit("the token refers to claims elsewhere, and does not say which", _NARROW)


_NARROW = "let the provider emit only the groups assigned to this application"


def _listed(claims: Mapping[str, object], mapping: GroupClaims) -> list[str]:
    if mapping.claim not in claims:
        if mapping.optional:
            return []
        raise Unfit(f"the token says no groups: it has no claim {quoted(mapping.claim)}", _ABSENT)
    value = claims[mapping.claim]
    if isinstance(value, str) and mapping.provider == Provider.OIDC:
        return [_text(value, "a group")]
    if not isinstance(value, list | tuple):
        raise Unfit(f"the claim {quoted(mapping.claim)} is not a list of groups")
    return [_text(item, "a group") for item in value]


_ABSENT = "let the provider add the claim; where it leaves out an empty list, say optional_groups: true"


def _entra_names(listed: list[str], names: Mapping[str, str]) -> frozenset[str]:
    guids = {item.lower() for item in listed}
    for guid in guids:
        if not _GUID.fullmatch(guid):
            raise Unfit(f"{quoted(guid)} is not a group's object id", "let the provider emit group ids")
    return frozenset(guids | {names[guid] for guid in guids & names.keys()})


def _members(claims: Mapping[str, object], mapping: GroupClaims, email: str) -> frozenset[str]:
    """From the file. An address counts only where the provider says that it was verified, and is its own."""
    if mapping.members is None:
        return frozenset()
    keys = [str(claims.get("sub"))]
    if email and claims.get("email_verified") in (True, "true"):
        keys.append(_folded(email))
    found = [mapping.members[key] for key in keys if key in mapping.members]
    if not found and not mapping.optional:
        raise Unfit("the file of members does not say which groups this is in", "add them, or an empty list")
    if len(set(found)) > 1:
        raise Unfit("the file of members contradicts itself", "list this member once")
    return found[0] if found else frozenset()


# ---- names


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise Unfit(f"{what} is not text")
    return value


def _folded(key: str) -> str:
    """Addresses differ by more than case nowhere that matters; subjects are compared as they are."""
    return key.casefold() if "@" in key else key


def _check_names(names: Mapping[str, str]) -> None:
    """A name that could be taken for another group would give that group's rights away."""
    for guid, name in names.items():
        if not _GUID.fullmatch(guid):
            raise Unfit(f"{quoted(guid)} is not a group's object id", "write the GUID in lower case")
        if not isinstance(name, str) or _GUID.fullmatch(name.lower()):
            raise Unfit(f"the group {guid} is called like an object id", "give it a name")
        group("x", name)
    if len({unicodedata.normalize("NFC", name) for name in names.values()}) != len(names):
        raise Unfit("two groups have one name", "give each its own")


# ---- files


def _section(tree: Tree, key: str, wanted: str) -> dict[str, object]:
    if tree.problems:
        raise PolicyError(tree.problems)
    root = tree.value
    section = root.get(key) if isinstance(root, dict) and set(root) == {key} else None
    if not isinstance(section, dict):
        raise PolicyError([tree.problem((), f"the file has one section, {key}", wanted)])
    return section


def _file_names(tree: Tree, key: str, value: object) -> list[str]:
    if not isinstance(value, list):
        tree.problems.append(
            tree.problem(("members", key), "this is not a list of groups", "write [NAME, ...]")
        )
        return []
    names: list[str] = []
    for index, item in enumerate(value):
        try:
            group("x", _text(item, "a group"))
            names.append(str(item))
        except Unfit as wrong:
            tree.problems.append(tree.problem(("members", key, index), wrong.text, wrong.remedy))
    return names


def _refuse(tree: Tree) -> None:
    if tree.problems:
        raise PolicyError(tree.problems)
