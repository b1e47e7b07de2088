"""The HTTP service described for machines: OpenAPI 3.1. Tests hold the service against it."""

from __future__ import annotations

from typing import Any

from egressd import __version__
from egressd.access.identifiers import MAX_IDENTIFIER
from egressd.access.principals import MAX_PRINCIPAL
from egressd.access.roles import Role
from egressd.broker.inferences import State
from egressd.broker.web.requests import LIMITS

__all__ = ["document"]

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_ID = {"type": "string", "pattern": "^r-[0-9a-z]{26}$"}
_NAME = {"type": "string", "pattern": "^[a-z]([a-z0-9_-]{0,30}[a-z0-9])?$"}
_WORKSPACE = {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"}
_PRINCIPAL = {
    "type": "string",
    "pattern": "^(user|group):[a-z][a-z0-9-]*:.+$",
    "maxLength": MAX_PRINCIPAL,
    "description": "user:ISSUER:SUBJECT or group:ISSUER:NAME",
}
_FILE = {
    "type": "string",
    "pattern": "^[a-z][a-z0-9-]{0,31}:([A-Za-z0-9/._-]|%[0-9A-F]{2})+$",
    "maxLength": MAX_IDENTIFIER,
    "description": "SOURCE:PATH, other bytes as %XX",
}
_SECURED: list[dict[str, list[str]]] = [{"idToken": []}]


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object", "properties": properties}
    return found | ({"required": list(required)} if required else {})


def _list(of: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": of, **more}


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


# ---- documents


def _schemas() -> dict[str, Any]:
    return {
        "Problem": _object(
            ("title", "status", "detail"),
            title=_TEXT,
            status={"type": "integer"},
            detail=_TEXT,
            problems=_list(_object(("where", "text", "remedy"), where=_TEXT, text=_TEXT, remedy=_TEXT)),
        ),
        "Limits": _object(
            (),
            **{
                name: {
                    "type": "number" if name in ("wall", "cpu", "cost") else "integer",
                    "exclusiveMinimum": 0,
                }
                for name in LIMITS
            },
        )
        | {
            "additionalProperties": False,
            "description": "Seconds, bytes or a count. They may only be lower than what is offered.",
        },
        "NewInference": _new_inference(),
        "Inference": _object(
            ("id", "state", "workspace", "action", "asked"),
            id=_ID,
            state={"enum": [state.value for state in State]},
            workspace=_WORKSPACE,
            action=_NAME,
            asked=_TEXT,
            result=_ref("Result"),
        ),
        "Result": _object(
            ("status", "why", "hit"),
            status=_maybe({"type": "integer"}),
            why=_TEXT,
            hit=_list({"enum": list(LIMITS)}),
            refused=_TEXT,
            output=_object(
                ("stdout", "stderr", "octets", "cut"),
                stdout=_ref("Bytes"),
                stderr=_ref("Bytes"),
                octets=_COUNT,
                cut=_COUNT,
            ),
            receipt=_ref("Receipt"),
        ),
        "Bytes": {
            "oneOf": [
                _object(("text",), text=_TEXT),
                _object(("base64",), base64={"type": "string", "contentEncoding": "base64"}),
            ],
            "description": "text where it is UTF-8, base64 where it is not",
        },
        "Receipt": _receipt(),
        "Manifest": _manifest(),
        "Member": _object(
            ("principal", "role", "clearance"),
            principal=_PRINCIPAL,
            role=_ref("Role"),
            clearance=_TEXT,
            granted_by=_TEXT,
            at={"type": "number"},
        ),
        "Role": {"enum": [str(role) for role in Role if role is not Role.NONE]},
        "Source": _object(
            ("source", "front_matter", "read", "deny", "clearance"),
            source=_TEXT,
            front_matter={"type": "boolean"},
            read=_list(_PRINCIPAL),
            deny=_list(_PRINCIPAL),
            groups=_list(_PRINCIPAL),
            clearance=_TEXT,
            ingested_at=_maybe({"type": "number"}),
        ),
    }


def _new_inference() -> dict[str, Any]:
    found = _object(
        ("workspace",),
        workspace=_WORKSPACE,
        inference=_NAME | {"description": "one that the workspace offers"},
        command=_list({"type": "string"}, minItems=1, description="one of your own, where that is permitted"),
        candidates=_list(_FILE, description="shown if you may see them"),
        files=_list(_FILE, description="all of them are shown, or nothing is run"),
        input={"type": "string", "description": "what the command reads"},
        input_base64={"type": "string", "contentEncoding": "base64"},
        network={"enum": ["none"]},
        limits=_ref("Limits"),
        stream={
            "type": "boolean",
            "description": "answer with the output as it comes; the inference ends with the connection",
        },
    )
    one = [{"required": ["inference"]}, {"required": ["command"]}]
    return found | {"additionalProperties": False, "oneOf": one}


def _receipt() -> dict[str, Any]:
    count = _object(("packets", "bytes"), packets=_COUNT, bytes=_COUNT)
    return _object(
        ("request", "workspace", "asker", "action", "role", "files", "manifest", "network", "status"),
        request=_ID,
        workspace=_WORKSPACE,
        asker=_PRINCIPAL,
        action=_NAME,
        role=_TEXT,
        files=_list(
            _object(("id", "sha256"), id=_FILE, sha256={"type": "string", "pattern": "^[0-9a-f]{64}$"})
        ),
        manifest=_TEXT,
        network=_object(
            ("mode", "link", "counters"),
            mode={"enum": ["policy", "none"]},
            link=_maybe({"type": "integer"}),
            counters={"type": "object", "additionalProperties": count},
        ),
        policy=_TEXT,
        status=_maybe({"type": "integer"}),
        why=_TEXT,
        hit=_list({"enum": list(LIMITS)}),
        tokens=_COUNT,
        cost={"type": "number"},
        destroyed={"type": "boolean"},
        times=_object(asked=_TEXT, started=_TEXT, ended=_TEXT, steps={"type": "object"}),
        signed=_maybe({"type": "string", "description": "where signed evidence of it is to be had"}),
    )


def _manifest() -> dict[str, Any]:
    sha256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
    file = _object(("id", "path", "sha256", "size"), id=_FILE, path=_TEXT, sha256=sha256, size=_COUNT)
    return _object(("files",), files=_list(file)) | {
        "additionalProperties": False,
        "description": "byte for byte what the sandbox had at /work/MANIFEST.json",
    }


# ---- paths


def _json(schema: Any, says: str, **headers: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"description": says, "content": {"application/json": {"schema": schema}}}
    return found | ({"headers": headers} if headers else {})


def _answers(*codes: int) -> dict[str, Any]:
    return {str(code): {"$ref": f"#/components/responses/{code}"} for code in codes}


_ALWAYS = (401, 404, 429, 500, 503)


def _operation(id: str, summary: str, answers: dict[str, Any], *codes: int, **more: Any) -> dict[str, Any]:
    return {
        "operationId": id,
        "summary": summary,
        "security": _SECURED,
        "responses": answers | _answers(*sorted({*_ALWAYS, *codes})),
        **more,
    }


def _sent(schema: Any) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _parameter(name: str, schema: Any, says: str, *, place: str = "query") -> dict[str, Any]:
    found = {"name": name, "in": place, "schema": schema, "description": says}
    return found | ({"required": True} if place == "path" else {})


_WAIT = _parameter(
    "wait", {"type": "integer", "minimum": 0, "maximum": 999999999}, "seconds to wait for the end"
)
_OFFSET = _parameter(
    "offset", {"type": "integer", "minimum": 0, "maximum": 10**14}, "bytes that are known already"
)
_PROOF = _parameter("proof", {"enum": ["0", "1"]}, "1: signed evidence, an envelope (DSSE)")
_AT = {name: _parameter(name, schema, says, place="path") for name, schema, says in (
    ("id", _ID, "of an inference"),
    ("workspace", _WORKSPACE, "of a workspace"),
    ("principal", _PRINCIPAL, "of a member"),
    ("source", _NAME, "of a source"),
)}  # fmt: skip
_LOCATION = {"schema": {"type": "string"}, "description": "where it is from now on"}
_STREAM = {
    "application/x-ndjson": {"schema": {"type": "string", "description": "one JSON document per line"}},
    "text/event-stream": {"schema": {"type": "string", "description": "events `output`, then one `end`"}},
}


def _inferences() -> dict[str, Any]:
    one = _ref("Inference")
    created = _json(one, "it is begun, or over if that was waited for", Location=_LOCATION)
    created["content"] |= _STREAM
    listed = _object(("inferences",), inferences=_list(one))
    ask = _operation(
        "ask", "Run an inference over documents that you may see", {"201": created}, 403, 408, 413, 415, 422,
        parameters=[_WAIT], requestBody=_sent(_ref("NewInference")),
    )  # fmt: skip
    output = {"200": {"description": "what is written, and then how it ended", "content": _STREAM}}
    receipt = {
        "200": _json({"anyOf": [_ref("Receipt"), {"type": "object"}]}, "the receipt, or signed evidence")
    }
    manifest = {"200": _json(_ref("Manifest"), "the MANIFEST.json of its sandbox, byte for byte")}
    shown = {"200": _json(one, "it")}
    cancelled = {"200": _json(one, "it is over"), "202": _json(one, "it is being ended")}
    return {
        "/v1/inferences": {
            "post": ask,
            "get": _operation("list", "One's own", {"200": _json(listed, "those that are remembered")}),
        },
        "/v1/inferences/{id}": {
            "parameters": [_AT["id"]],
            "get": _operation("show", "Its state, and how it ended", shown, 422, parameters=[_WAIT]),
            "delete": _operation("cancel", "End it", cancelled, 422, parameters=[_WAIT]),
        },
        "/v1/inferences/{id}/output": {
            "parameters": [_AT["id"]],
            "get": _operation("output", "What it writes, as it comes", output, 422, parameters=[_OFFSET]),
        },
        "/v1/inferences/{id}/receipt": {
            "parameters": [_AT["id"]],
            "get": _operation("receipt", "What became of it", receipt, 409, parameters=[_PROOF]),
        },
        "/v1/inferences/{id}/manifest": {
            "parameters": [_AT["id"]],
            "get": _operation("manifest", "Which files it was shown", manifest, 409),
        },
    }  # fmt: skip


def _workspaces() -> dict[str, Any]:
    members = {"200": _json(_object(("members",), members=_list(_ref("Member"))), "all of them")}
    sources = {"200": _json(_object(("sources",), sources=_list(_ref("Source"))), "all of them")}
    pairs = {"200": _json(_object(("barriers",), barriers=_list(_list(_PRINCIPAL))), "all of them")}
    member = _object(("role",), role=_ref("Role"), clearance=_TEXT) | {"additionalProperties": False}
    names = {name: _list(_PRINCIPAL) for name in ("read", "deny", "groups")}
    trust = _object((), front_matter={"type": "boolean"}, clearance=_TEXT, **names)
    trust |= {"additionalProperties": False}
    two = [_parameter(name, _PRINCIPAL, "a group") | {"required": True} for name in ("a", "b")]
    trusted = {"200": _json(_ref("Source"), "as it is now")}
    anything = {"type": "object"}
    done = {"200": _json(anything, "what was so before")}
    made = done | {"201": _json(anything, "it is new")}
    base = "/v1/workspaces/{workspace}"
    return {
        f"{base}/members": {
            "parameters": [_AT["workspace"]],
            "get": _operation("members", "Who is a member", members, 403),
        },
        f"{base}/members/{{principal}}": {
            "parameters": [_AT["workspace"], _AT["principal"]],
            "get": _operation("member", "One of them", {"200": _json(_ref("Member"), "it")}, 403),
            "put": _operation("setMember", "Make somebody a member, or change their role", made, *_CHANGE,
                              requestBody=_sent(member)),
            "delete": _operation("removeMember", "Take a membership away", done, 403, 422),
        },
        f"{base}/sources": {
            "parameters": [_AT["workspace"]],
            "get": _operation("sources", "Where documents come from, and what is believed", sources, 403),
        },
        f"{base}/sources/{{source}}": {
            "parameters": [_AT["workspace"], _AT["source"]],
            "put": _operation("setTrust", "What is believed of a source", trusted, *_CHANGE,
                              requestBody=_sent(trust)),
            "delete": _operation("dropSource", "Forget a source and its documents", done, 403, 422),
        },
        f"{base}/barriers": {
            "parameters": [_AT["workspace"]],
            "get": _operation("barriers", "Which groups must not see each other's documents", pairs, 403),
            "put": _operation("addBarrier", "One more", made, 403, 422, parameters=two),
            "delete": _operation("removeBarrier", "One less", done, 403, 422, parameters=two),
        },
    }  # fmt: skip


_CHANGE = (403, 408, 413, 415, 422)
_CODES = {
    400: "the body ended early",
    401: "no token, or none that is believed",
    403: "your role does not have that right",
    404: "it does not exist, or you may not see it",
    408: "the body did not arrive in time",
    409: "it cannot be had yet",
    413: "the body is too large",
    415: "the body is not JSON",
    422: "the request is not one that can be done; `problems` lists everything",
    429: "too often, or too much at once",
    500: "the service failed",
    503: "something that the service needs does not work",
}
_HEADERS = {401: "WWW-Authenticate", 429: "Retry-After"}


def _responses() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for code, says in _CODES.items():
        content = {"application/problem+json": {"schema": _ref("Problem")}}
        found[str(code)] = {"description": says, "content": content}
        if code in _HEADERS:
            found[str(code)]["headers"] = {_HEADERS[code]: {"schema": {"type": "string"}}}
    return found


def document() -> dict[str, Any]:
    open_to_all = {
        "/v1/openapi.json": {
            "get": {
                "operationId": "openapi", "summary": "This document", "security": [],
                "responses": {"200": _json({"type": "object"}, "OpenAPI 3.1")},
            }
        },
        "/healthz": {
            "get": {
                "operationId": "health", "summary": "That the service answers", "security": [],
                "responses": {"200": _json(_object(("status",), status={"const": "ok"}), "it does")},
            }
        },
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "egressd-broker",
            "version": __version__,
            "description": "Inferences over documents that the asker may see, in sandboxes with no other way"
            " out. What may not be seen is answered as what does not exist.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": _inferences() | _workspaces() | open_to_all,
        "components": {
            "schemas": _schemas(),
            "responses": _responses(),
            "securitySchemes": {
                "idToken": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "an OpenID Connect ID token; its nonce, if it has one, in OpenID-Nonce",
                }
            },
        },
    }
