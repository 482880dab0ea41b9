"""Requests that schemathesis makes up from the OpenAPI document; whatever they are, there is no 5xx."""

from collections import Counter
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.server.scripted import ScriptedLoop
from tests.server.serving import serving

ROUTES = {"/v1/completions", "/api", "/v1/images/generations", "/v1/images/edits", "/v1/images/{name}"}


@pytest.fixture(scope="module")
def server():
    with serving(ScriptedLoop(), max_n=16) as running:
        yield running


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_document(server):
    document = server.client.get("/openapi.json").json()
    assert set(document["paths"]) >= ROUTES | {"/v1/models", "/health", "/metrics", "/"}
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], (path, method)
            assert operation["description"], (path, method)
    for fields in (schemas["CompletionBody"], schemas["ImageBody"]):
        assert fields["properties"]["temperature"]["description"]


def explore(schema, examples):
    """Calls every route with valid and with broken bodies. Returns the statuses."""
    tried = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        statuses = tried.setdefault(operation.label, Counter())
        for mode in schemathesis.GenerationMode:
            # A route that takes nothing cannot be called wrongly.
            with suppress(Unsatisfiable):
                explore_route(operation.as_strategy(generation_mode=mode), examples, statuses)
    return tried


def explore_route(cases, examples, statuses):
    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
        database=None,
        derandomize=True,
    )
    @given(case=cases)
    def explore_case(case):
        response = case.call(timeout=60)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])

    explore_case()


def test_no_request_is_answered_with_5xx(schema, server):
    tried = explore(schema, 25)
    assert tried["POST /v1/completions"].keys() >= {200, 400}
    assert tried["PUT /api"].keys() >= {200, 400}
    assert tried["POST /v1/images/edits"][400]
    assert server.loop.open_requests == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_request_of_many_is_answered_with_5xx(schema, server):
    tried = explore(schema, 400)
    print(tried)
    assert server.loop.open_requests == 0
