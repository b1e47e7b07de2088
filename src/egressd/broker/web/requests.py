"""What an asker sends: JSON bytes to a request that is well formed, or every problem with it at once.

Nothing is looked up here. Whether a file exists, or a workspace, is not decided by how it is spelled: what is
well formed and names nothing goes the same way as what names something that the asker may not see.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import msgspec

from egressd.access.identifiers import MAX_IDENTIFIER
from egressd.broker.runners.jobs import Limits
from egressd.model.errors import Unfit
from egressd.policy import values

__all__ = ["LIMITS", "Fault", "Faults", "NewInference", "document", "lower", "new_inference", "spelled"]

_MOST_FAULTS = 100
_IDENTIFIER = re.compile(r"[a-z][a-z0-9-]{0,31}:(?:[A-Za-z0-9/._-]|%[0-9A-F]{2})+")
_NAME = re.compile(r"[a-z](?:[a-z0-9_-]{0,30}[a-z0-9])?")
_MAX_WORDS, _MAX_WORD, _MAX_COMMAND = 1024, 1 << 17, 1 << 20  # linux/binfmts.h: MAX_ARG_STRLEN
# Spelled as in a policy; beside it the field of `Limits`, which is also what `hit` names.
LIMITS: Mapping[str, str] = {
    ("egress_bytes" if name == "egress" else name): name for name in Limits.__struct_fields__
}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """`where` is a path in the document, as in "files[2]"; "" is all of it."""

    where: str
    text: str
    remedy: str = ""

    def told(self) -> dict[str, str]:
        return {"where": self.where, "text": self.text, "remedy": self.remedy}


class Faults(Exception):
    """The request is not one that could be meant. Every fault at once, up to a bound."""

    def __init__(self, found: list[Fault]) -> None:
        self.found = tuple(found[:_MOST_FAULTS])
        super().__init__("; ".join(f"{fault.where}: {fault.text}" for fault in self.found))


@dataclass(frozen=True, slots=True)
class NewInference:
    """POST /v1/inferences. One of `inference` and `command` is there."""

    workspace: str
    inference: str = ""
    command: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()  # shown if they may be
    files: tuple[str, ...] = ()  # all of them, or nothing runs
    input: bytes = b""
    network: str = "policy"
    limits: Limits = field(default_factory=Limits)
    stream: bool = False

    @property
    def action(self) -> str:
        """As the record calls it."""
        return self.inference or "command"


# ---- JSON


def document(data: bytes) -> dict[str, Any]:
    """An object, read strictly (RFC 8259; I-JSON, RFC 7493): no name twice, no NaN, no lone surrogate."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Faults([Fault("", "the body is not UTF-8", "send JSON in UTF-8")]) from None
    except RecursionError:
        raise Faults([Fault("", "the document is nested too deeply", "flatten it")]) from None
    except Unfit as error:
        raise Faults([Fault("", error.text, error.remedy)]) from None
    except ValueError:
        raise Faults([Fault("", "the body is not JSON", "send one JSON object")]) from None
    if not isinstance(value, dict):
        raise Faults([Fault("", f"the body is {values.kind(value)}", "send a JSON object: {...}")])
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unfit("a name stands twice in one object", "send it once")
    return found


def _no_constant(text: str) -> Any:
    raise Unfit(f"{text} is not JSON", "send a number")


# ---- the request


def new_inference(data: bytes, *, candidates: int, files: int) -> NewInference:
    """`Faults` lists everything that is wrong. The bounds are those of the service."""
    reading = _Reading(document(data))
    asked = NewInference(
        workspace=reading.take("workspace", _text(values.workspace), required=True) or "",
        inference=reading.take("inference", _name) or "",
        command=reading.take("command", _command) or (),
        candidates=reading.take("candidates", _identifiers(candidates)) or (),
        files=reading.take("files", _identifiers(files)) or (),
        input=reading.input(),
        network=reading.take("network", _network) or "policy",
        limits=reading.take("limits", _limits) or Limits(),
        stream=reading.take("stream", values.truth) or False,
    )
    reading.end()
    return asked


@dataclass(slots=True)
class _Reading:
    body: dict[str, Any]
    faults: list[Fault] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    def take(self, name: str, check: Callable[[Any], T], *, required: bool = False) -> T | None:
        """The value if it is there and fit. null is the same as not there."""
        self.known.append(name)
        value = self.body.get(name)
        if value is None:
            if required:
                self.faults.append(Fault(name, f"{name} is missing", f'send "{name}"'))
            return None
        try:
            return check(value)
        except Faults as error:
            self.faults += [Fault(name + fault.where, fault.text, fault.remedy) for fault in error.found]
        except Unfit as error:
            self.faults.append(Fault(name, error.text, error.remedy))
        return None

    def input(self) -> bytes:
        text, coded = self.take("input", _utf8), self.take("input_base64", _base64)
        if text is not None and coded is not None:
            self.faults.append(Fault("input_base64", "there are two inputs", "send one of them"))
        return text or coded or b""

    def end(self) -> None:
        parts = f"the parts are {', '.join(self.known)}"
        unknown = (name for name in self.body if name not in self.known)
        self.faults += [
            Fault(_shown(name), "this is no part of a request", parts)
            for name in islice(unknown, _MOST_FAULTS)
        ]
        if (self.body.get("inference") is None) == (self.body.get("command") is None):
            self.faults.append(Fault("", "one of inference and command is needed", "send one of them"))
        if self.faults:
            raise Faults(self.faults)


def _shown(text: str) -> str:
    return ascii(text[:64])[1:-1]


def _text(check: Callable[[object], str]) -> Callable[[object], str]:
    """What is wrong with it is told without repeating it at length."""

    def checked(value: object) -> str:
        if isinstance(value, str) and len(value) > 256:
            raise Unfit("this is longer than any name", "send the name")
        return check(value)

    return checked


def _name(value: object) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise Unfit("this is not the name of an inference", values.LABELS)


def _command(value: object) -> tuple[str, ...]:
    wanted = 'send a list of words: ["python3", "infer.py"]'
    if not isinstance(value, list) or not value or len(value) > _MAX_WORDS:
        raise Unfit("this is not a command", wanted)
    faults = [
        Fault(f"[{at}]", "this is not a word", wanted) for at, word in enumerate(value) if not _is_word(word)
    ]
    if faults:
        raise Faults(faults)
    if not value[0]:
        raise Unfit("the first word is empty", wanted)
    if sum(map(len, value)) > _MAX_COMMAND:
        raise Unfit("the command is too long", "send what is long as input")
    return tuple(value)


def _is_word(word: object) -> bool:
    return isinstance(word, str) and len(word) < _MAX_WORD and "\0" not in word and _encodable(word)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return False
    return True


def _identifiers(most: int) -> Callable[[object], tuple[str, ...]]:
    def check(value: object) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise Unfit(f"this is {values.kind(value)}", "send a list of SOURCE:PATH")
        if len(value) > most:
            raise Unfit(f"there are {len(value)} entries, {most} are the most", "send fewer")
        faults = [
            Fault(f"[{at}]", "this is not a document's identifier", "send SOURCE:PATH, other bytes as %XX")
            for at, one in enumerate(value)
            if not isinstance(one, str) or len(one) > MAX_IDENTIFIER or not _IDENTIFIER.fullmatch(one)
        ]
        if faults:
            raise Faults(faults)
        return tuple(value)

    return check


def _utf8(value: object) -> bytes:
    if not isinstance(value, str):
        raise Unfit(f"this is {values.kind(value)}", "send text; other bytes as input_base64")
    if not _encodable(value):
        raise Unfit("this holds a lone surrogate, which is no character", "send bytes as input_base64")
    return value.encode()


def _base64(value: object) -> bytes:
    try:
        return base64.b64decode(value if isinstance(value, str) else "?", validate=True)
    except (binascii.Error, ValueError):
        raise Unfit("this is not base64", "send RFC 4648 section 4, padded") from None


def _network(value: object) -> str:
    if value == "none":
        return "none"
    raise Unfit("this is not a network", 'send "none", or leave it out for what the workspace permits')


# ---- limits


def _limits(value: object) -> Limits:
    if not isinstance(value, dict):
        raise Unfit(f"this is {values.kind(value)}", "send an object: {...}")
    faults: list[Fault] = []
    found: dict[str, Any] = {}
    for name, number in islice(value.items(), _MOST_FAULTS):
        if name not in LIMITS:
            faults.append(
                Fault(f".{_shown(name)}", "there is no such limit", f"there are {', '.join(LIMITS)}")
            )
        elif isinstance(number, bool) or not isinstance(number, int | float):
            faults.append(Fault(f".{name}", f"this is {values.kind(number)}", _NUMBER))
        else:
            try:
                found |= {LIMITS[name]: _number(LIMITS[name], number)}
            except msgspec.ValidationError:
                faults.append(Fault(f".{name}", "this is out of range", _NUMBER))
    if faults:
        raise Faults(faults)
    return Limits(**found)


_NUMBER = "send a number greater than zero: seconds, bytes, or a whole count"


def _number(name: str, number: float) -> Any:
    """By `Limits`' own bounds."""
    return getattr(msgspec.convert({name: number}, type=Limits, strict=True), name)


def lower(offered: Limits, wished: Limits) -> Limits:
    """Whichever of the two is lower. `Faults` for a wish that is higher: it would not come true."""
    faults: list[Fault] = []
    found: dict[str, Any] = {}
    for spelled_as, name in LIMITS.items():
        has, wants = getattr(offered, name), getattr(wished, name)
        if has is not None and wants is not None and wants > has:
            faults.append(Fault(f"limits.{spelled_as}", f"{has:g} is the most", "ask for that, or for less"))
        found[name] = has if wants is None else wants
    if faults:
        raise Faults(faults)
    return Limits(**found)


def spelled(names: tuple[str, ...]) -> list[str]:
    """Fields of `Limits` as askers spell them."""
    return [next((told for told, field in LIMITS.items() if field == name), name) for name in names]
