"""The server against its own OpenAPI document: whatever a client sends, no answer surprises it."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
from web_server import ScriptedScheduler, always, service_of, serving

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.slow

ROUTES = [
    "GET /health",
    "GET /stats",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /chat/completions",
    "POST /tokenize",
    "POST /v1/chat/completions",
    "POST /v1/completions",
]
# Limits that a schema cannot state (who speaks when, how much in all) refuse some sound bodies.
CONFIG = schemathesis.Config.from_dict(
    {"checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404"]}}}
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(service_of(lambda: ScriptedScheduler(always("Hey")))) as address:
        yield address


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_keeps_its_promises(address: str, route: str) -> None:
    method, path = route.split(" ")
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", config=CONFIG)
    operation = schema[path][method]

    @hypothesis.given(case=operation.as_strategy())
    @hypothesis.settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=address)

    check()


def test_all_routes_are_fuzzed(address: str) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", config=CONFIG)
    found = [result.ok() for result in schema.get_all_operations()]
    assert sorted(f"{op.method.upper()} {op.path}" for op in found) == sorted(ROUTES)
