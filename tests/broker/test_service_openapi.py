"""What the service says of itself is OpenAPI by somebody else's reading, and what it does: schemathesis asks
it whatever the description permits, and some of what it does not. Runners and store are the scene's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from service_scene import CONFIG, Scene, request

from egressd.broker.config import BrokerConfig, ServiceLimits
from egressd.broker.web.app import ROUTES
from egressd.broker.web.openapi import document

PLENTY = ServiceLimits(rate=(999_999, 1.0), per_user=9999, at_once=9999, body=1 << 20)
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)


def test_the_description_is_openapi() -> None:
    OpenAPIV31SpecValidator(document()).validate()


def test_it_has_every_route_and_no_other() -> None:
    described = {
        path: {name.upper() for name in operations if name != "parameters"}
        for path, operations in document()["paths"].items()
    }
    assert described == {path.replace(":path}", "}"): set(handlers) for path, handlers in ROUTES.items()}


SCENE = Scene(BrokerConfig(workspaces=CONFIG.workspaces, limits=PLENTY))
SCHEMA = schemathesis.openapi.from_asgi("/v1/openapi.json", SCENE.app)
AS_OWNER = {"Authorization": "Bearer owner"}
FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@SCHEMA.parametrize()
@FEW
def test_it_does_what_it_says(case: Any) -> None:
    if "wait" in (case.query or {}):
        case.query["wait"] = 0  # nobody waits here
    response = case.call(headers=AS_OWNER)
    case.validate_response(response, checks=list(CHECKS))


@pytest.fixture(scope="module")
def ended() -> str:
    """An inference of the owner's that has ended."""

    async def ask() -> str:
        async with SCENE.client("owner") as client:
            found: str = (await client.post("/v1/inferences?wait=5", json=request())).json()["id"]
            return found

    return asyncio.run(ask())


@pytest.mark.parametrize("path", [path for path in ROUTES if "{id}" in path])
def test_and_of_an_inference_that_is_there(path: str, ended: str) -> None:
    for method in ROUTES[path]:
        case = SCHEMA[path][method].Case(path_parameters={"id": ended}, headers=AS_OWNER)
        response = case.call()
        assert response.status_code == 200
        case.validate_response(response, checks=list(CHECKS))


@pytest.mark.parametrize(
    "path", [path for path in ROUTES if path.startswith("/v1/inf") or "{workspace}" in path]
)
def test_nothing_is_done_without_a_token(path: str) -> None:
    async def ask() -> None:
        async with SCENE.client("") as client:
            for method in ROUTES[path]:
                told = await client.request(method, path.replace("{id}", "r-" + "a" * 26))
                assert told.status_code == 401

    asyncio.run(ask())
