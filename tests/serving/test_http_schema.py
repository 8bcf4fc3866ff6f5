"""Schemathesis over the OpenAPI description: whatever it makes up, no answer is a 500, and each is as described."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from tests.serving.hostile import b64, png
from tests.serving.http_server import Serving, serving

QUICK, LONG = 4, 300  # examples of an endpoint and mode
# Not asked: that whatever fits the description is accepted. What a bundle makes is narrower than what the API knows.
CHECKS = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_headers_conformance, checks.response_schema_conformance, checks.negative_data_rejection,
          checks.missing_required_header, checks.unsupported_method]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Serving]:
    """One whose limits keep what is generated quick."""
    with serving(tmp_path_factory.mktemp("state"), max_steps=6, max_images=2) as found:
        yield found


# What the server of this test makes, so that fitting requests are carried out for the most part.
MADE: dict[str, dict[str, Any]] = {
    "model": {"enum": ["fake"]}, "size": {"enum": ["auto", "32x32", "40x16"]}, "n": {"enum": [1, 2]},
    "num_inference_steps": {"enum": [1, 4, 6]}, "steps": {"enum": [1, 4, 6]}, "aspect": {"enum": ["16:9"]},
    "width": {"enum": [32, 64]}, "height": {"enum": [16, 40]}, "batch_size": {"enum": [1, 2]}, "n_iter": {"enum": [1]},
    "scheduler": {"enum": ["ddim", "euler"]}, "sampler_name": {"enum": ["DDIM"]}, "sampler_index": {"enum": ["DDIM"]},
    "seed": {"enum": [0, 7]}, "quality": {"enum": ["auto", "standard"]}, "cache_interval": {"enum": [1]},
    "guidance_scale": {"enum": [1, 3.5]}, "tile": {"enum": [32]}, "sd_model_checkpoint": {"enum": ["fake"]},
    "override_settings": {"enum": [{}, {"sd_model_checkpoint": "fake"}]}, "output_compression": {"enum": [100]},
    "long_prompts": {"enum": [False]}, "image": {"enum": [b64(png(32, 32))]}, "mask": {"enum": [None]},
    "init_images": {"enum": [[b64(png(32, 32))]]}, "response_format": {"enum": ["url", "b64_json"]}}


def narrowed(description: dict[str, Any]) -> dict[str, Any]:
    """The description with what this server makes in the place of what the API knows; bodies have nothing else."""
    for methods in description["paths"].values():
        for operation in methods.values():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                schema = content["application/json"]["schema"]
                schema["additionalProperties"] = False
                schema["properties"] |= {name: said for name, said in MADE.items() if name in schema["properties"]}
    return description


def ask_everything(server: Serving, examples: int, mode: GenerationMode) -> Counter[int]:
    """So many examples of every endpoint; the number of answers by their status."""
    description = server.anybody.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(
        narrowed(description) if mode is GenerationMode.POSITIVE else description)
    found: Counter[int] = Counter()
    with requests.Session() as session:
        for result in schema.get_all_operations():
            assert isinstance(result, Ok), result
            try:
                strategy = result.ok().as_strategy(generation_mode=mode)
            except schemathesis.errors.InvalidSchema:  # nothing of it can be unfitting
                continue

            @seed(17)
            @settings(max_examples=examples, deadline=None, database=None, phases=(Phase.generate,),
                      suppress_health_check=list(HealthCheck))
            @given(strategy)
            def ask(case: Any) -> None:
                answer = case.call_and_validate(base_url=server.url, session=session, checks=CHECKS, timeout=30)
                found[answer.status_code] += 1

            with contextlib.suppress(Unsatisfiable):  # the same, found later
                ask()
    return found


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
def test_no_request_that_the_description_allows_or_forbids_is_answered_otherwise_than_described(server, mode):
    found = ask_everything(server, QUICK, mode)
    assert sum(found.values()) > 30 and (mode is GenerationMode.NEGATIVE or found[200] + found[202] > 20), found


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
def test_many_requests_are_answered_as_described(server, mode):
    assert sum(ask_everything(server, LONG, mode).values()) > 1000
