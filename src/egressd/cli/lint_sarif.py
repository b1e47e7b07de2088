"""Lint reports as SARIF 2.1.0, the format that code scanning reads.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/sarif-v2.1.0-os.html; what GitHub takes of it:
https://docs.github.com/en/code-security/code-scanning/integrating-with-code-scanning/sarif-support-for-code-scanning

What could not be verified is a result as well, of kind `review`: something for a person to look at, which is
neither right nor wrong (section 3.27.9), and so of level `none` (section 3.27.10).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from egressd import __version__
from egressd.policy.lint import Finding, Report, Unverified
from egressd.policy.lint_rules import PAGE, RULES, LintRule

__all__ = ["NOT_VERIFIED", "document"]

SCHEMA: Final = (
    "https://raw.githubusercontent.com/oasis-tcs/sarif-spec/master/Schemata/sarif-schema-2.1.0.json"
)
NOT_VERIFIED: Final = "not-verified"
_ROOT: Final = "%SRCROOT%"
_IDS: Final = (*RULES, NOT_VERIFIED)


def document(reports: Sequence[Report], *, here: Path) -> dict[str, Any]:
    """One run. Paths are told relative to `here`, the directory that lint was run in."""
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": _driver()},
                "originalUriBaseIds": {_ROOT: {"description": {"text": "the directory lint was run in"}}},
                "columnKind": "unicodeCodePoints",
                "results": [result for report in reports for result in _results(report, here)],
            }
        ],
    }


def _driver() -> dict[str, Any]:
    return {
        "name": "egressctl policy lint",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [*map(_rule, RULES.values()), _not_verified()],
    }


def _rule(rule: LintRule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.id.split("-")),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.help},
        "help": {
            "text": f"{rule.help} See {rule.anchor}.",
            "markdown": f"{rule.help}\n\nSee `{rule.anchor}`.",
        },
        "defaultConfiguration": {"level": str(rule.level)},
        "properties": {"tags": ["security", "residency"], "documentation": rule.anchor},
    }


def _not_verified() -> dict[str, Any]:
    text = "What cannot be known from the file. Nothing is wrong with it; somebody may want to look."
    anchor = f"{PAGE}#what-could-not-be-verified"
    return {
        "id": NOT_VERIFIED,
        "name": "NotVerified",
        "shortDescription": {"text": "It could not be verified"},
        "fullDescription": {"text": text},
        "help": {"text": f"{text} See {anchor}.", "markdown": f"{text}\n\nSee `{anchor}`."},
        "defaultConfiguration": {"level": "none"},
        "properties": {"tags": ["residency"], "documentation": anchor},
    }


def _results(report: Report, here: Path) -> Iterable[dict[str, Any]]:
    location = _location(report.source, here)
    seen: Counter[str] = Counter()
    for found in report.findings:
        text = f"{found.text} ({found.remedy})" if found.remedy else found.text
        yield _result(found.rule, found, text, location, seen) | {"level": str(found.level)}
    for end in report.unverified:
        text = f"could not verify: {end.text}"
        yield _result(NOT_VERIFIED, end, text, location, seen) | {"level": "none", "kind": "review"}


def _result(
    rule: str, about: Finding | Unverified, text: str, location: dict[str, Any], seen: Counter[str]
) -> dict[str, Any]:
    # Code scanning shows only what has a line: the first one stands for the whole file.
    place = {"artifactLocation": location, "region": {"startLine": max(about.line, 1)}}
    return {
        "ruleId": rule,
        "ruleIndex": _IDS.index(rule),
        "message": {"text": text},
        "locations": [{"physicalLocation": place}],
        "partialFingerprints": _fingerprints(rule, about, location["uri"], seen),
    }


def _fingerprints(rule: str, about: Finding | Unverified, uri: str, seen: Counter[str]) -> dict[str, str]:
    """The same wherever the line moves: made of the rule, the file and whose finding it is, no line.

    The name is the one by which code scanning knows results again; after the colon, which one of several
    alike it is.
    """
    subject = about.subject or about.text
    digest = hashlib.sha256("\0".join((rule, uri, subject)).encode("utf-8", "surrogateescape")).hexdigest()[
        :32
    ]
    seen[digest] += 1
    return {"primaryLocationLineHash": f"{digest}:{seen[digest]}"}


def _location(source: str, here: Path) -> dict[str, Any]:
    """Relative to the run's directory, so that it means the same file in another checkout; what lies
    elsewhere has an absolute URI."""
    path = Path(source)
    whole = path if path.is_absolute() else here / path
    try:
        inside = whole.relative_to(here)
    except ValueError:
        return {"uri": "file://" + quote(str(whole).encode("utf-8", "surrogateescape"))}
    if ".." in inside.parts:
        return {"uri": quote(str(path).encode("utf-8", "surrogateescape"))}
    # A first segment with a colon would be read as a scheme (RFC 3986 section 4.2); quote() escapes it.
    return {"uri": quote(str(inside).encode("utf-8", "surrogateescape")), "uriBaseId": _ROOT}
