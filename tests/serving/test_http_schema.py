"""Schemathesis over the OpenAPI description: whatever it makes up, no answer is a 500, and each is as described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.serving.http_server import Serving, serving

QUICK, LONG = 6, 300  # examples of an endpoint and mode
# Not asked: that whatever fits the description is accepted. What a bundle makes is narrower than what the API knows.
CHECKS = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_headers_conformance, checks.response_schema_conformance, checks.negative_data_rejection,
          checks.missing_required_header, checks.unsupported_method]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Serving]:
    """One whose limits keep what is generated quick."""
    with serving(tmp_path_factory.mktemp("state"), max_steps=6, max_images=2) as found:
        yield found


def ask_everything(server: Serving, examples: int, modes: tuple[GenerationMode, ...]) -> int:
    """So many examples of every endpoint and mode; the number of requests that were sent."""
    schema = schemathesis.openapi.from_dict(server.anybody.get("/openapi.json").json())
    sent = 0
    with requests.Session() as session:
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in modes:
                try:
                    strategy = operation.as_strategy(generation_mode=mode)
                except schemathesis.errors.InvalidSchema:
                    continue

                @seed(17)
                @settings(max_examples=examples, deadline=None, database=None, derandomize=False,
                          phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
                @given(strategy)
                def ask(case: Any) -> None:
                    nonlocal sent
                    sent += 1
                    case.call_and_validate(base_url=server.url, session=session, checks=CHECKS, timeout=30)

                try:
                    ask()
                except Exception as error:
                    if "Unsatisfiable" not in type(error).__name__:
                        raise
    return sent


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
def test_no_request_that_the_description_allows_or_forbids_is_answered_otherwise_than_described(server, mode):
    assert ask_everything(server, QUICK, (mode,)) > 30


@pytest.mark.slow
def test_many_requests_are_answered_as_described(server):
    assert ask_everything(server, LONG, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)) > 3000
