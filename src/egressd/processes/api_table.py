"""The HTTP API as one table: which paths there are, what each takes, what each may answer.

Requests are led by it and parameters are read by it; the OpenAPI document is made of it. What is not in it
does not exist.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_to_bytes

from egressd import __version__
from egressd.journal.moments import moment
from egressd.model.identities import WORKSPACE_PATTERN, Link
from egressd.model.verdicts import Reason
from egressd.processes.journal_pages import MOST

__all__ = ["ENDPOINTS", "JSON", "NDJSON", "PROBLEM", "Endpoint", "Malformed", "Parameter", "openapi", "read"]

JSON, NDJSON, PROBLEM = "application/json", "application/x-ndjson", "application/problem+json"
_MAX_VALUE = 1024  # characters, decoded
_MAX_WORDS = 64  # of a query: each that is wrong takes a while to be said, and nobody knows yet who asks
Schema = dict[str, Any]


class Malformed(ValueError):
    """What is wrong with parameters: name -> what, and what to write."""

    def __init__(self, wrong: Mapping[str, str]) -> None:
        self.wrong = dict(wrong)
        super().__init__("; ".join(f"{name}: {text}" for name, text in wrong.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """`read` takes what was written and gives what is meant; ValueError, with the remedy, for what it cannot
    be."""

    name: str
    says: str
    schema: Schema
    read: Callable[[str], Any]
    required: bool = False
    example: str = ""

    @property
    def longest(self) -> int:
        """Characters of a value, decoded."""
        return int(self.schema.get("maxLength", _MAX_VALUE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`name` is the method of the API that answers. `problems`: what else than 200 may come of a request that
    is well formed. `known`: whether who asks has to be known."""

    path: str
    name: str
    summary: str
    says: str
    parameters: tuple[Parameter, ...] = ()
    kinds: tuple[str, ...] = (JSON,)
    schema: str = "Document"
    problems: tuple[int, ...] = ()
    known: bool = True

    @property
    def statuses(self) -> tuple[int, ...]:
        """All that may come, 200 first."""
        return (200, *sorted({*_ANY, *self.problems}))


# What any request may be told, by the server's bounds or because of how it came.
_ANY = (400, 403, 408, 413, 431, 500)
_ASKED = (429, 503)  # where the controller is asked
_OF_WORKSPACE = (404, *_ASKED)
_MEANINGS = {
    400: "A parameter is unknown, repeated or not what it must be (the text names it), or this is no HTTP.",
    403: "Nobody knows who asks, or the request is one that a web page could have made.",
    404: "There is no such thing, or none that the asker may know about: that is one answer.",
    408: "The request was not complete in time.",
    413: "The request has a body; none is read here.",
    429: "As many questions of the asker are waited for as may be.",
    431: "The request's head is too long.",
    500: "A defect; egressd's log has it.",
    503: "The controller or the auditor does not answer, or the journal cannot be searched like that.",
}


# ---- what is written in a query


def _workspace(text: str) -> str:
    if not re.fullmatch(WORKSPACE_PATTERN, text):
        raise ValueError(f"{text[:64]!r} is not the name of a workspace")
    return text


def _word(text: str) -> str:
    return text


def _events(text: str) -> frozenset[str]:
    found = _words(text)
    odd = [word for word in sorted(found) if not re.fullmatch(r"[a-z][a-z-]{1,40}", word)]
    if odd or not found:
        raise ValueError(f"{(odd or [text])[0][:64]!r} is no event: write events such as denied,flow")
    return found


def _reasons(text: str) -> frozenset[str]:
    found, known = _words(text), [reason.value for reason in Reason]
    for word in sorted(found - set(known)) or ([] if found else [text]):
        raise ValueError(f"there is no reason {word[:64]!r}: {_meant(word, known)}")
    return found


def _words(text: str) -> frozenset[str]:
    return frozenset(word for word in text.split(",") if word)


def _moment(text: str) -> datetime:
    return moment(text, now=datetime.now(UTC))


def _number(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text[:64]!r} is no number from {low} to {high}")
        return int(text)

    return read


def _sandbox(text: str) -> int:
    link = Link.of_device(text)
    if link is None:
        raise ValueError(f"{text[:64]!r} is no sandbox: write eg7, as /v1/status does")
    return link.number


def _meant(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word[:64], known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


# ---- parameters

_TIMES = "`30m`, `2h` or `7d` ago, `today`, `yesterday`, or an instant such as `2026-11-21T10:00:00Z`"
_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": _MAX_VALUE}
_NAME: Schema = {"type": "string", "pattern": f"^({WORKSPACE_PATTERN})$"}
_AT: Schema = {"type": "string", "minLength": 1, "maxLength": 64}


def _of_workspace(says: str, *, required: bool) -> Parameter:
    return Parameter(
        name="workspace", says=says, schema=_NAME, read=_workspace, required=required, example="acme"
    )


_SINCE = Parameter(
    name="since", says=f"Not before: {_TIMES}.", schema=_AT, read=_moment, example="2026-11-21T10:00:00Z"
)
_UNTIL = Parameter(
    name="until", says="Before; spelled alike.", schema=_AT, read=_moment, example="2026-11-21T12:00:00Z"
)
_AUDIT = (
    _of_workspace("Of this workspace.", required=False),
    Parameter(
        name="route",
        says="Selections of this route: `route-selected` and `route-refused`.",
        schema=_TEXT,
        read=_word,
        example="default",
    ),
    Parameter(
        name="event",
        says="Of these kinds, with commas between.",
        schema=_TEXT,
        read=_events,
        example="denied",
    ),
    Parameter(
        name="reason",
        says="For these reasons, with commas between.",
        schema=_TEXT,
        read=_reasons,
        example="unlisted",
    ),
    Parameter(
        name="host",
        says="About this name or address; `*.example.com` is one label more, `**.example.com` any.",
        schema=_TEXT,
        read=_word,
        example="api.example.com",
    ),
    _SINCE,
    _UNTIL,
    Parameter(
        name="limit",
        says="At most so many records.",
        schema={"type": "integer", "minimum": 1, "maximum": MOST, "default": 100},
        read=_number(1, MOST),
        example="100",
    ),
    Parameter(
        name="after",
        says="With a greater `seq`: the `seq` of the last record of the page before.",
        schema={"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
        read=_number(0, 10**18 - 1),
        example="4711",
    ),
)


# ---- the table

ENDPOINTS: Mapping[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint(
            path="/v1/audit",
            name="audit",
            summary="Records of the journal",
            says="Those for which everything that is given holds, oldest first, each as the journal holds it,"
            " byte for byte; `seq` is its index. With `since` or `after` the first ones, else the last ones."
            ' Where there may be more, a `Link` header with `rel="next"` leads there. Records of workspaces'
            " that the asker is a member of, but not what brokers say of requests there; all for root. As"
            " JSON an array, as NDJSON a line each.",
            parameters=_AUDIT,
            kinds=(JSON, NDJSON),
            schema="Records",
            problems=_OF_WORKSPACE,
        ),
        Endpoint(
            path="/v1/policy",
            name="policy",
            summary="The policy in force",
            says="Its digest, guard and pin, the rules that take part and those that are barred with the"
            " reason, providers and routes. Of a key there is the reference only.",
            parameters=(_of_workspace("Of this workspace.", required=True),),
            schema="Policy",
            problems=_OF_WORKSPACE,
        ),
        Endpoint(
            path="/v1/counters",
            name="counters",
            summary="The kernel's counters, and whether they add up",
            says="What `egressctl counters --json` shows. Pairs are packets and bytes.",
            parameters=(_of_workspace("Of this workspace alone.", required=False),),
            schema="Counters",
            problems=_OF_WORKSPACE,
        ),
        Endpoint(
            path="/v1/proof",
            name="proof",
            summary="Signed evidence of a workspace",
            says="The DSSE envelope that `egressctl proof` writes. It may take a minute. That of a sandbox"
            " which ran a request is for its broker, and root.",
            parameters=(
                _of_workspace("Of this workspace.", required=True),
                _SINCE,
                _UNTIL,
                Parameter(
                    name="sandbox",
                    says="Of this sandbox alone, once it has ended.",
                    schema={"type": "string", "pattern": "^eg[1-9][0-9]{0,8}$"},
                    read=_sandbox,
                    example="eg7",
                ),
            ),
            schema="Envelope",
            problems=_OF_WORKSPACE,
        ),
        Endpoint(
            path="/v1/route",
            name="route",
            summary="Which provider is selected for a route",
            says="And why, or why none. What `egressctl route` answers; it is recorded.",
            parameters=(
                _of_workspace("Of this workspace.", required=True),
                Parameter(
                    name="route",
                    says="Its name under `routes:`.",
                    schema={**_TEXT, "maxLength": 256},
                    read=_word,
                    required=True,
                    example="default",
                ),
            ),
            schema="Route",
            problems=_OF_WORKSPACE,
        ),
        Endpoint(
            path="/v1/status",
            name="status",
            summary="How egressd is",
            says="What `egressctl status --json` shows: workspaces and sandboxes that the asker may know of.",
            schema="Status",
            problems=_ASKED,
        ),
        Endpoint(
            path="/openapi.json",
            name="openapi",
            summary="This document",
            says="Tells nothing of anybody; who asks need not be known.",
            known=False,
        ),
        Endpoint(
            path="/healthz",
            name="healthz",
            summary="Whether the controller answers",
            says="Tells nothing of anybody; who asks need not be known.",
            schema="Health",
            problems=(503,),
            known=False,
        ),
    )
}


# ---- reading a query


def read(endpoint: Endpoint, query: str) -> dict[str, Any]:
    """What is meant by a query string. Malformed with everything that is wrong with it.

    A plus sign is a plus sign (RFC 3986), so that an offset of a time may stand as it is.
    """
    if query.count("&") >= _MAX_WORDS:
        raise Malformed({"query": f"has more than {_MAX_WORDS} parameters"})
    known = {parameter.name: parameter for parameter in endpoint.parameters}
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for word in query.split("&") if query else []:
        name, _, text = word.partition("=")
        try:
            name, text = _decoded(name), _decoded(text)
            parameter = known.get(name)
            if parameter is None:
                wrong[_shown(name)] = f"is no parameter of {endpoint.path}: {_meant_parameter(name, known)}"
            elif name in values:
                wrong[name] = "is there twice"
            elif not 0 < len(text) <= parameter.longest:
                wrong[name] = f"has no value, or one of more than {parameter.longest} characters"
            else:
                values[name] = parameter.read(text)
        except ValueError as error:
            wrong[_shown(name)] = str(error)
    for name, parameter in known.items():
        if parameter.required and name not in values and name not in wrong:
            wrong[name] = f"is missing: {endpoint.path}?{name}={parameter.example}"
    if values.get("since", _EARLIEST) > values.get("until", _LATEST):
        wrong["until"] = "is before since"
    if wrong:
        raise Malformed(wrong)
    return values


_EARLIEST, _LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def _decoded(text: str) -> str:
    try:
        found = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 in percent-encoding") from None
    if re.search(r"%(?![0-9A-Fa-f]{2})", text) or not found.isprintable():
        raise ValueError("is not percent-encoded as it must be, or holds control characters")
    return found


def _shown(name: str) -> str:
    return name[:64]


def _meant_parameter(name: str, known: Mapping[str, Parameter]) -> str:
    return _meant(name, list(known)) if known else "it has none"


# ---- OpenAPI


def openapi() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "egressd",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "What egressd knows, read-only, on this machine. Who asks is known by the kernel's"
            " word about the connection, and sees what a member of their workspaces sees; root sees all."
            " HEAD is answered like GET, without a body. Any other method is refused with 405.",
        },
        "servers": [{"url": "http://localhost:8000", "description": "or wherever `api:` says"}],
        "security": [],
        "paths": {path: {"get": _operation(endpoint)} for path, endpoint in ENDPOINTS.items()},
        "components": {
            "schemas": _SCHEMAS,
            "responses": {f"Problem{status}": _problem(says) for status, says in _MEANINGS.items()},
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    answer = {
        "description": endpoint.summary,
        "content": {kind: {"schema": _answer_schema(endpoint, kind)} for kind in endpoint.kinds},
    }
    if endpoint.name == "audit":
        answer["headers"] = {
            "Link": {"description": "Where it goes on (RFC 8288).", "schema": {"type": "string"}}
        }
    return {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "description": endpoint.says,
        "parameters": [_parameter(parameter) for parameter in endpoint.parameters],
        "responses": {
            "200": answer,
            **{str(s): {"$ref": f"#/components/responses/Problem{s}"} for s in endpoint.statuses if s != 200},
        },
    }


def _answer_schema(endpoint: Endpoint, kind: str) -> Schema:
    if kind == NDJSON:
        return {"type": "string", "description": "One record per line."}
    return {"$ref": f"#/components/schemas/{endpoint.schema}"}


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": "query",
        "required": parameter.required,
        "description": parameter.says,
        "schema": parameter.schema,
        "example": parameter.example if parameter.schema["type"] == "string" else int(parameter.example),
    }


def _problem(says: str) -> dict[str, Any]:
    return {
        "description": says,
        "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


def _object(properties: Schema, *, required: tuple[str, ...] | None = None, **more: Any) -> Schema:
    """Other members may be there, and more may come."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
        **more,
    }


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_STRING: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_BOOLEAN: Schema = {"type": "boolean"}
_DOCUMENT: Schema = {"type": "object"}
_PAIR: Schema = {"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 2}
_SCHEMAS: dict[str, Schema] = {
    "Document": _DOCUMENT,
    "Records": _array({"$ref": "#/components/schemas/Record"}),
    "Record": _object(
        {
            "event": _STRING,
            "fields": {
                "type": "object",
                "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
            },
            "process": _STRING,
            "seq": {"type": "integer", "minimum": 0},
            "time": {"type": "string", "format": "date-time"},
        },
        additionalProperties=False,
    ),
    "Finding": _object({"code": _STRING, "compliant": _BOOLEAN, "text": _STRING, "remedy": _STRING}),
    "Rule": _object(
        {"kind": {"enum": ["host", "cidr", "local"]}, "ports": _array(_STRING), "line": _INTEGER}
    ),
    "Policy": _object(
        {
            "workspace": _STRING,
            "digest": _STRING,
            "text": _STRING,
            "guard": {"enum": ["off", "observe", "enforce"]},
            "holding": {"enum": ["off", "observe", "enforce"]},
            "local_only": _BOOLEAN,
            "pin": _object({"jurisdictions": _array(_STRING), "countries": _array(_STRING)}),
            "members": _array(_STRING),
            "rules": _array({"$ref": "#/components/schemas/Rule"}),
            "barred": _array(
                _object(
                    {
                        "rule": {"$ref": "#/components/schemas/Rule"},
                        "reason": _STRING,
                        "text": _STRING,
                        "finding": {"$ref": "#/components/schemas/Finding"},
                    }
                )
            ),
            "providers": _array(
                _object(
                    {
                        "provider": _STRING,
                        "type": _STRING,
                        "base_url": _STRING,
                        "region": _STRING,
                        "api_key": _STRING,
                        "declared": {"type": ["object", "null"]},
                        "models": _array(_STRING),
                        "finding": {"$ref": "#/components/schemas/Finding"},
                    }
                )
            ),
            "routes": _array(_object({"route": _STRING, "providers": _array(_STRING)})),
        }
    ),
    "Counters": _object(
        {
            "time": {"type": "number"},
            "balanced": _BOOLEAN,
            "differences": _array(_STRING),
            "workspaces": _array(_object({"workspace": _STRING, "hosts": _array(_DOCUMENT)})),
            "late": {"type": "object", "additionalProperties": _PAIR},
        }
    ),
    "Status": _object(
        {
            "version": _STRING,
            "enforcing": _BOOLEAN,
            "balanced": _BOOLEAN,
            "workspaces": _array(_DOCUMENT),
            "sandboxes": _array(_DOCUMENT),
            "alarms": _array(_DOCUMENT),
            "drift": _array(_STRING),
            "processes": _array(_DOCUMENT),
        }
    ),
    "Envelope": _object({"payload": _STRING, "payloadType": _STRING, "signatures": _array(_DOCUMENT)}),
    "Route": _object(
        {
            "workspace": _STRING,
            "route": _STRING,
            "selected": {"type": ["object", "null"]},
            "code": _STRING,
            "reason": _STRING,
            "remedy": _STRING,
            "candidates": _array(_DOCUMENT),
        }
    ),
    "Health": _object({"status": {"const": "ok"}}),
    "Problem": _object(
        {
            "type": {"const": "about:blank"},
            "title": _STRING,
            "status": _INTEGER,
            "detail": {"type": "string", "description": "What is wrong, and what to do."},
            "parameters": {
                "type": "object",
                "description": "What is wrong with each parameter.",
                "additionalProperties": _STRING,
            },
        },
        required=("type", "title", "status", "detail"),
        description="RFC 9457.",
    ),
}
