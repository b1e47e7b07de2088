"""Documents for the policy tests: written as text, because that is what people write."""

from __future__ import annotations

from collections.abc import Iterable

from publicsuffixlist import PublicSuffixList

from egressd.model.addresses import Network
from egressd.model.errors import PolicyError, Problem
from egressd.policy.compiled import Policy
from egressd.policy.document import load

PUBLIC = PublicSuffixList().is_public


def policy(text: str | bytes, *, name: str | None = "acme", own: Iterable[Network] = ()) -> Policy:
    data = text.encode() if isinstance(text, str) else text
    return load(data, source="acme.yaml", expected_name=name, is_public_suffix=PUBLIC, own=own)


def problems(text: str | bytes, **options: object) -> tuple[Problem, ...]:
    """What is wrong with a document; () when it is accepted."""
    try:
        policy(text, **options)  # type: ignore[arg-type]
    except PolicyError as error:
        return error.problems
    return ()


def allowing(*rules: str, guard: str = "enforce", more: str = "") -> str:
    """A workspace with these rules in flow style, one per line from line 4 on."""
    lines = "".join(f"  - {rule}\n" for rule in rules)
    return f"workspace: acme\nguard: {guard}\nallow:{' []' if not rules else ''}\n{lines}{more}"
