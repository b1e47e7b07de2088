"""Parts of a document: a mapping whose keys are known, and every fault of one told at its line.

What is wrong is told in our words, never in those of the parser or of pydantic, which quote what they read:
a file is refused when a secret stands in it in clear, and the message goes to logs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from egressd.model.errors import Problem, Unfit
from egressd.model.names import quoted
from egressd.model.tree import Path, Tree, spelt
from egressd.policy import values

__all__ = ["MAX_PROBLEMS", "MISSING", "Part", "Reader", "close_to", "first_keys"]

MAX_PROBLEMS = 1000  # told one by one
MISSING = {
    "workspace": "add workspace: NAME",
    "ports": "add ports: such as [443/tcp]",
    "jurisdictions": "add jurisdictions: [EEA]",
    "type": "add type: such as azure-openai, or openai-compatible",
    "base_url": "add base_url: https://...",
    "region": "add region: as the provider spells it",
    "jurisdiction": "add jurisdiction: such as EEA or FR",
}
P = TypeVar("P", bound="Part")


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Reader:
    """Collects problems in the tree it reads."""

    def __init__(self, tree: Tree, context: dict[str, object]) -> None:
        self.tree = tree
        self._context = context

    def wrong(self, path: Path, text: str, remedy: str = "") -> None:
        if not self.tree.is_unclear(path):
            self.tree.problems.append(self.tree.problem(path, text, remedy))

    def part(self, model: type[P], value: object, path: Path) -> P | None:
        """None after telling everything that is wrong with it."""
        try:
            return model.model_validate(value, context=self._context)
        except ValidationError as error:
            known = tuple(model.model_fields)
            meant = {match for key in first_keys(value) if key not in known for match in close_to(key, known)}
            for fault in error.errors(include_url=False, include_input=True):
                # a misspelt key is one mistake, told where it stands; not that the right one is missing
                if fault["type"] != "missing" or fault["loc"][-1] not in meant:
                    self._fault(fault, model, path)
            return None

    def _fault(self, fault: Any, model: type[Part], base: Path) -> None:
        """One of pydantic's findings, in our words and at its line."""
        path: Path = (*base, *fault["loc"])
        match fault["type"]:
            case "value_error":
                self._unfit(path, fault["ctx"]["error"])
            case "extra_forbidden":
                self._unknown_key(path, tuple(model.model_fields))
            case "missing":
                self.wrong(path, f"{path[-1]} is missing", MISSING.get(str(path[-1]), "add it"))
            case "list_type":
                self.not_a(path, fault["input"], "a list: [...]", empty="write [] or remove the line")
            case "model_type" | "dict_type":
                self.not_a(path, fault["input"], "a mapping: {...}", empty="remove the line")
            case _:
                self.wrong(path, str(fault["msg"]))

    def _unfit(self, path: Path, error: ValueError) -> None:
        if isinstance(error, Unfit):
            self.wrong(path, error.text, error.remedy)
        else:
            self.wrong(path, str(error))

    def _unknown_key(self, path: Path, known: tuple[str, ...]) -> None:
        key = str(path[-1])
        if ":" in key:
            self._unparted_key(path)
            return
        # a file of nothing but unknown keys must not buy a comparison for each of them
        close = close_to(key, known) if len(self.tree.problems) < MAX_PROBLEMS else []
        remedy = f"did you mean {close[0]}?" if close else f"the keys here are {', '.join(known)}"
        self.wrong(path, f"{quoted(key)} is not a key of this section", remedy)

    def _unparted_key(self, path: Path) -> None:
        """`{api_key:VALUE}` without a space is one long key to YAML. What follows the colon is not told."""
        key, above = str(path[-1]).partition(":")[0], path[:-1]
        if self.tree.is_unclear(path):
            return
        text = f"{quoted(key)} and what follows its colon are one word"
        remedy = "write a space after the colon"
        self.tree.problems.append(Problem(self.tree.source, self.tree.line(path), spelt(above), text, remedy))

    def too_long(self, value: object, path: Path, most: int) -> bool:
        """Told before the entries are looked at: a list beyond all bounds gets one answer, not thousands."""
        if not isinstance(value, list | dict) or len(value) <= most:
            return False
        self.wrong(path, f"there are {len(value)} entries, {most} are the most", "list fewer")
        return True

    def not_a(self, path: Path, value: object, wanted: str, *, empty: str) -> None:
        self.wrong(path, f"this is {values.kind(value)}", empty if value is None else f"write {wanted}")


def first_keys(mapping: object) -> Iterable[str]:
    """A few keys: more than any section has, and few enough to compare each with all that are known."""
    return islice(mapping, 8) if isinstance(mapping, dict) else ()


def close_to(key: str, known: Iterable[str]) -> list[str]:
    """What `key` was meant to be, most likely: one of `known`, or nothing."""
    return difflib.get_close_matches(key[:40].lower(), list(known), n=1, cutoff=0.7)
