"""Secrets that stand in a file in clear: where they are, and how to keep them out of what is told.

Two ways to find one: by the key it stands under (`api_key`, `token`), if it is no reference; and by its own
form, anywhere, comments included, because a key pasted into the wrong line is still a key. Whoever tells
anything about such a file passes it through `Secrets.hide`, since other messages quote what they do not
understand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from egressd.model.tree import Path, Tree

__all__ = ["HIDDEN", "Secret", "Secrets", "find"]

HIDDEN = "what stands on this line is not repeated, because a secret stands in the file"
_REFERENCE = "secret://"
_KEYS = re.compile(
    r"(?:.*[-_])?(?:api[-_]?key|apikey|token|secret|password|passwd|credentials?)", re.IGNORECASE
)
_MAX_LINE = 8192
# What is longer than this many characters of a secret, in any case, is not told.
_WINDOW = 6
_MIN = 4  # shorter ones are words like any other: nothing could be told any more
_FORMS = (
    (
        "a key of OpenAI's or Anthropic's form",
        r"(?<![A-Za-z0-9])sk-(?=[\w-]{0,99}[A-Z])(?=[\w-]{0,99}[0-9])[\w-]{16,}",
    ),
    ("an AWS access key id", r"(?<![A-Z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])"),
    ("an AWS Bedrock key", r"(?<![A-Za-z0-9])ABSK[A-Za-z0-9+/=]{40,}"),
    ("a Google API key", r"(?<![A-Za-z0-9])AIza[0-9A-Za-z_-]{35}"),
    ("a Hugging Face token", r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"),
    ("a GitHub token", r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,})"),
    ("a Slack token", r"(?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9-]{10,}"),
    ("a JSON web token", r"(?<![A-Za-z0-9])eyJ[\w-]{8,}+\.[\w-]{8,}+\.[\w-]*+"),
    ("a bearer token", r"(?i:bearer) +[A-Za-z0-9._~+/=-]{16,}"),
    ("a private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    ("a name or a password before a host", r"(?<=://)[^\s/?#@'\"]+(?=@)"),
    ("a key in a URL's query", r"(?i:[?&](?:api[-_]?key|key|token|sig|code)=)[^\s&'\"]{4,}"),
)
_PATTERNS = tuple((what, re.compile(pattern)) for what, pattern in _FORMS)


@dataclass(frozen=True, slots=True)
class Secret:
    """`value` must never be shown. `path` is () where only the form gave it away."""

    what: str
    line: int
    path: Path
    value: str

    def __repr__(self) -> str:  # a traceback is a place where things are shown
        return f"Secret({self.what!r}, line={self.line})"


@dataclass(frozen=True, slots=True)
class Secrets:
    """`found`: one for each to be told. `pieces`: of all, in lower case, by their length."""

    found: tuple[Secret, ...]
    pieces: Mapping[int, frozenset[str]]

    def hide(self, text: str) -> str:
        """`text`, unless a piece of a secret is in it."""
        lower = text.lower()
        shown = any(
            lower[at : at + length] in pieces
            for length, pieces in self.pieces.items()
            for at in range(len(lower) - length + 1)
        )
        return HIDDEN if shown else text


def find(data: bytes, tree: Tree) -> Secrets:
    """Every one. Where one stands under a telling key, others on its line are hidden, and not told again."""
    by_key, by_form = list(_by_key(tree)), list(_by_form(data))
    lines = {secret.line for secret in by_key}
    told = (*by_key, *(secret for secret in by_form if secret.line not in lines))
    return Secrets(told, _pieces(secret.value for secret in (*by_key, *by_form)))


def _pieces(values: Iterable[str]) -> dict[int, frozenset[str]]:
    """Whatever of them must not be shown: every run of `_WINDOW` characters; of shorter ones the whole."""
    found: dict[int, set[str]] = {}
    for value in values:
        for spelling in {value.lower(), ascii(value)[1:-1].lower()}:  # as `quoted` would show it
            length = min(len(spelling), _WINDOW)
            if length >= _MIN:
                runs = (spelling[at : at + length] for at in range(len(spelling) - length + 1))
                found.setdefault(length, set()).update(runs)
    return {length: frozenset(pieces) for length, pieces in found.items()}


def _by_key(tree: Tree) -> Iterator[Secret]:
    if not tree.readable:
        return
    pending: list[tuple[Path, object, bool]] = [((), tree.value, False)]
    while pending:
        path, value, telling = pending.pop()
        if isinstance(value, dict):
            for key, below in value.items():
                pending.append(((*path, key), below, telling or _KEYS.fullmatch(key) is not None))
        elif isinstance(value, list):
            pending += [((*path, place), below, telling) for place, below in enumerate(value)]
        elif telling and value is not None and not isinstance(value, bool):
            written = str(value)
            if not written.startswith(_REFERENCE):
                yield Secret("a value instead of a reference", tree.line(path), path, written)


def _by_form(data: bytes) -> Iterator[Secret]:
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
        told: set[str] = set()
        for what, pattern in _PATTERNS:
            for found in pattern.finditer(line[:_MAX_LINE]):
                if what not in told:
                    yield Secret(what, number, (), found[0])
                told.add(what)
