"""Host names, made canonical label by label, once: what is compared is what `canonical` returned.

A name that one program compares as a string and another resolves as labels is the oldest bypass of all:
a NUL, a trailing dot or a capital passes the first and means something else to the second. So a name is
taken apart into labels here, at the edge, and nothing past this page sees any other spelling.

Shape: lower-case ASCII, no trailing dot, at most 253 characters, labels of 1 to 63 letters, digits and
inner hyphens (RFC 1123 section 2.1, RFC 1035 section 2.3.4). Internationalised labels are written as
A-labels and must survive the way to Unicode and back (RFC 5891 section 5.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import idna

from egressd.model.errors import Unfit

__all__ = ["Pattern", "canonical", "covering", "is_pattern", "matches", "quoted", "service_label"]

MAX_NAME = 253  # RFC 1035 section 2.3.4: 255 octets on the wire are 253 characters
MAX_LABEL = 63
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_FOREIGN = re.compile(r"[^a-z0-9-]")
# What inet_aton and the WHATWG URL parser take for (the end of) an IPv4 address: 127.1, 0x7f.1, 2130706433
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_MAX_QUOTED = 80
_CHARACTERS = {
    "\0": "a NUL", " ": "a space", "\t": "a tab", "\n": "a line break", "\r": "a line break",
    "'": "a quote", '"': "a quote", "`": "a quote", "{": "a brace", "}": "a brace", "_": "an underscore",
    "*": "an asterisk", "/": "a slash", ":": "a colon", "\\": "a backslash", "@": "an at sign",
}  # fmt: skip
# A sandbox's /etc/hosts gives these a meaning of their own (localhost: RFC 6761 section 6.3).
_TAKEN_LABELS = frozenset({"localhost", "ip6-localhost", "ip6-loopback", "sandbox"})


def quoted(text: str) -> str:
    """`text` for a message: ASCII, control characters escaped, never longer than a line."""
    shown = text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "..."
    return ascii(shown)


def canonical(text: str) -> str:
    """The one spelling of a host name; `Unfit` with what is wrong and what to write instead."""
    _refuse_foreign_alphabet(text)
    name = text.lower().removesuffix(".")
    if not name:
        raise Unfit("the host name is empty", "write a name such as api.example.com")
    _refuse_other_things(name)
    if len(name) > MAX_NAME:
        raise Unfit(f"{quoted(name)} has {len(name)} characters", f"a name has at most {MAX_NAME}")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        raise Unfit(
            f"{quoted(name)} ends in a number, so programs read it as an IPv4 address",
            "for an address write a cidr rule",
        )
    for label in labels:
        _check_label(label, name)
    return name


def service_label(text: str) -> str:
    """The canonical name of a local service: one label, and none that already means something."""
    label = canonical(text)
    if "." in label:
        raise Unfit(
            f"{quoted(label)} is not a single label", "name the service with one word, as in local: ollama"
        )
    if label in _TAKEN_LABELS:
        raise Unfit(f"{quoted(label)} has a meaning of its own inside a sandbox", "choose another word")
    return label


def _refuse_foreign_alphabet(text: str) -> None:
    """Non-ASCII is refused, not translated: the author shall see the A-label they approve."""
    if text.isascii():
        return
    try:
        # bounded first: IDNA encoding takes quadratic time on very long input
        ascii_form = idna.encode(text, uts46=True).decode() if len(text) <= MAX_NAME else ""
    except UnicodeError:
        ascii_form = ""
    remedy = (
        f"write {ascii_form}, if that is what you mean" if ascii_form else "write it as an A-label (xn--...)"
    )
    raise Unfit(f"{quoted(text)} is not ASCII", remedy)


def _refuse_other_things(name: str) -> None:
    """Addresses, URLs and host:port pairs get an answer that says where they belong."""
    if "://" in name:
        raise Unfit(f"{quoted(name)} is a URL", "write only the host name")
    host, colon, port = name.rpartition(":")
    if colon and port.isdecimal() and ":" not in host:
        raise Unfit(f"{quoted(name)} has a port in it", f"write the port separately: ports: [{port[:5]}/tcp]")
    if name.count(":") > 1 and not set(name) - set("0123456789abcdef:.%[]/"):
        raise Unfit(f"{quoted(name)} looks like an IPv6 address", "for an address write a cidr rule")
    if "/" in name and not set(name) - set("0123456789./"):
        raise Unfit(f"{quoted(name)} looks like a network", "for addresses write a cidr rule")


def _check_label(label: str, name: str) -> None:
    if not label:
        raise Unfit(f"{quoted(name)} has an empty label", "remove the extra dot")
    if len(label) > MAX_LABEL:
        raise Unfit(
            f"{quoted(name)} has a label of {len(label)} characters", f"a label has at most {MAX_LABEL}"
        )
    if not _LABEL.fullmatch(label):
        raise _misspelt(label, name)
    if label[2:4] == "--":
        _check_reserved(label, name)


def _misspelt(label: str, name: str) -> Unfit:
    foreign = _FOREIGN.search(label)
    if foreign is None:
        return Unfit(
            f"{quoted(name)} has a label that begins or ends with a hyphen", "hyphens stand inside a label"
        )
    what = _CHARACTERS.get(foreign[0], f"the character U+{ord(foreign[0]):04X}")
    return Unfit(f"{quoted(name)} contains {what}", "host names have only letters, digits, hyphens and dots")


def _check_reserved(label: str, name: str) -> None:
    """Labels with hyphens in positions 3 and 4: only genuine A-labels (RFC 5891 section 4.2.3.1)."""
    if not label.startswith("xn--"):
        raise Unfit(
            f"{quoted(name)} has -- in the third place of a label that is not xn--",
            "check the spelling of the label",
        )
    try:
        genuine = idna.alabel(idna.ulabel(label)).decode() == label
    except UnicodeError:
        genuine = False
    if not genuine:
        raise Unfit(
            f"{quoted(name)} has an xn-- label that stands for no word", "check the spelling of the label"
        )


@dataclass(frozen=True, slots=True, order=True)
class Pattern:
    """`*.base`: exactly one label before it. `**.base`: one or more."""

    base: str  # canonical
    deep: bool

    @classmethod
    def of(cls, text: str, *, is_public_suffix: Callable[[str], bool]) -> Pattern:
        """Parse and check; `Unfit` for anything that would cover strangers, or is not one of the forms.

        `is_public_suffix` says whether a canonical name is one under which anyone may register.
        """
        stars, dot, rest = text.partition(".")
        if text.strip("*") == "" or not dot:
            raise Unfit(
                f"{quoted(text)} covers every name there is", "name the hosts, or a domain: *.example.com"
            )
        if stars not in ("*", "**") or "*" in rest:
            raise Unfit(
                f"{quoted(text)} has an asterisk where none may stand",
                "an asterisk is the whole first label: *.example.com or **.example.com",
            )
        base = canonical(rest)
        if len(base) > MAX_NAME - 2:
            raise Unfit(f"{quoted(text)} leaves no room for a label", f"a name has at most {MAX_NAME}")
        _refuse_shared(base, text, is_public_suffix)
        return cls(base=base, deep=stars == "**")

    def matches(self, name: str) -> bool:
        """Whether the canonical `name` is covered. The base itself never is."""
        head, found, tail = name.rpartition("." + self.base)
        return bool(head and found and not tail) and (self.deep or "." not in head)

    def __str__(self) -> str:
        return f"{'**' if self.deep else '*'}.{self.base}"


def _refuse_shared(base: str, text: str, is_public_suffix: Callable[[str], bool]) -> None:
    remedy = "put more of the name before it: *.example." + base
    if "." not in base:
        raise Unfit(f"{quoted(text)} covers a whole top-level domain", remedy)
    # "any.base" finds the list's own wildcard entries, such as *.compute.amazonaws.com
    if is_public_suffix(base) or is_public_suffix("any." + base):
        raise Unfit(f"{quoted(text)} covers a public suffix: anyone may have a name under it", remedy)


def is_pattern(text: str) -> bool:
    """Whether `text` is meant as a pattern. It may still be a bad one."""
    return "*" in text


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's host (canonical name, or canonical pattern) covers the canonical `name`."""
    if pattern.startswith("**."):
        return Pattern(base=pattern[3:], deep=True).matches(name)
    if pattern.startswith("*."):
        return Pattern(base=pattern[2:], deep=False).matches(name)
    return pattern == name


def covering(host: str) -> Iterator[str]:
    """Every host of a rule that would cover the canonical name or pattern `host`, the most specific first.

    `a.b.example.com`: itself, `*.b.example.com`, `**.b.example.com`, `**.example.com`, `**.com`. At most 128
    of them, so that one look into a dictionary for each finds the rule, however many rules there are.
    """
    yield host
    stars, _, rest = host.partition(".")
    if stars == "*":
        yield f"**.{rest}"
    elif stars != "**" and rest:
        yield from (f"*.{rest}", f"**.{rest}")
    while "." in rest:
        rest = rest.partition(".")[2]
        yield f"**.{rest}"
