"""The table of the HTTP API: what is made of it is OpenAPI, and what the API answers is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_scene import Site, play, write_journal
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from egressd.processes.api import Api
from egressd.processes.api_table import ENDPOINTS, Malformed, openapi, read


def test_it_is_openapi() -> None:
    document = json.loads(json.dumps(openapi()))
    validate(document, cls=OpenAPIV31SpecValidator)
    document["paths"]["/v1/audit"]["get"]["parameters"][0]["in"] = "the query"
    with pytest.raises(Exception, match="the query"):
        validate(document, cls=OpenAPIV31SpecValidator)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_each_path_has_a_method_and_each_parameter_an_example_that_is_one(path: str) -> None:
    endpoint = ENDPOINTS[path]
    assert callable(getattr(Api, f"_{endpoint.name}"))
    for parameter in endpoint.parameters:
        required = [p for p in endpoint.parameters if p.required and p is not parameter]
        words = [f"{p.name}={p.example}" for p in (*required, parameter)]
        assert parameter.name in read(endpoint, "&".join(words))
        example = int(parameter.example) if parameter.schema["type"] == "integer" else parameter.example
        Draft202012Validator(parameter.schema).validate(example)


ROUTED = """\
guard: enforce
members: [user:4001]
residency: {jurisdictions: [EU]}
providers:
  here: {type: openai-compatible, base_url: "http://127.0.0.1:11434/v1", api_key: "secret://env/KEY"}
routes:
  default: {provider: here}
allow:
  - provider: here
  - host: bedrock-runtime.us-east-2.amazonaws.com
"""


def schema_of(path: str) -> dict[str, Any]:
    document = openapi()
    answer = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    return {**answer, "components": document["components"]}


def test_what_is_answered_is_what_is_documented(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        write_journal(site.journal, [("auditor", "denied", {"port": 7, "n": None, "x": 1.5, "b": True})])
        site.world.controller.alarm("tampered", "somebody: did it", {})
        for path in ENDPOINTS:
            query = {"/v1/route": "?workspace=acme&route=default"}.get(path, "")
            query = query or ("?workspace=acme" if path in ("/v1/policy", "/v1/proof") else "")
            reply = await site.get(f"{path}{query}")
            assert reply.status == 200
            Draft202012Validator(schema_of(path)).validate(reply.json)
        (provider,) = (await site.get("/v1/policy?workspace=acme")).json["providers"]
        assert (provider["provider"], provider["api_key"]) == ("here", "secret://env/KEY")
        wrong = (await site.get("/v1/policy")).json
        problem = {"$ref": "#/components/schemas/Problem", "components": openapi()["components"]}
        Draft202012Validator(problem).validate(wrong)
        assert not Draft202012Validator(schema_of("/v1/policy")).is_valid(wrong), "the schemas do tell"

    play(tmp_path, story, acme=ROUTED)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(ENDPOINTS.values())),
    st.one_of(
        st.from_regex(r"[!-~]{0,80}", fullmatch=True),
        st.lists(
            st.tuples(
                st.sampled_from(
                    ["workspace", "route", "event", "host", "since", "until", "limit", "after", "x"]
                ),
                st.from_regex(r"[!-~]{0,30}", fullmatch=True),
            ).map("=".join),
            max_size=6,
        ).map("&".join),
    ),
)
def test_any_query_is_read_or_refused(endpoint: Any, query: str) -> None:
    try:
        values = read(endpoint, query)
    except Malformed as error:
        assert error.wrong and all(text.isprintable() for text in error.wrong.values())
    else:
        assert values.keys() <= {parameter.name for parameter in endpoint.parameters}


@pytest.mark.parametrize(("count", "many"), [(64, False), (65, True), (8000, True)])
def test_a_query_has_no_more_parameters_than_are_looked_at(count: int, many: bool) -> None:
    """Each that is wrong is compared with those there are. 8 KiB of them took a tenth of a second, in which
    nobody else was answered."""
    with pytest.raises(Malformed) as told:
        read(ENDPOINTS["/v1/audit"], "&".join(f"x{number}" for number in range(count)))
    assert (told.value.wrong == {"query": "has more than 64 parameters"}) == many
