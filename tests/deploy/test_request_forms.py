"""A field of a request is written once: its option, keyword, YAML key and Triton input are made of it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import runtimes
from deploy.building.triton_repository import request_inputs
from deploy.cli.generate import GenerateOptions, generate_options, request_options
from runtimes.errors import InputError
from runtimes.inputs.request import Request, described
from runtimes.inputs.request_fields import SizeConditions
from runtimes.pipeline.diffusion import Pipeline

FIELDS = {field.name: field for field in dataclasses.fields(Request)}
# A value of each field as JSON and YAML hold it, and as the command line does.
VALUES: dict[str, tuple[Any, list[str]]] = {
    "prompt": (["a", "b"], []), "negative_prompt": ("x", ["x"]), "steps": (7, ["7"]), "guidance_scale": (2.5, ["2.5"]),
    "seed": (5, ["5"]), "images_per_prompt": (2, ["2"]), "height": (64, ["64"]), "width": (96, ["96"]),
    "aspect": ("16:9", ["16:9"]), "scheduler": ("heun", ["heun"]), "eta": (0.5, ["0.5"]),
    "guidance_rescale": (0.7, ["0.7"]), "guidance_interval": ([0.1, 0.7], ["0.1:0.7"]), "image": ("i.png", ["i.png"]),
    "mask": ("m.png", ["m.png"]), "strength": (0.6, ["0.6"]), "weighting": (True, []), "long_prompts": (True, []),
    "cache_interval": (3, ["3"]), "tile": (64, ["64"]), "latents": ("l.npy", ["l.npy"]), "output": ("latents", []),
    "part": ([0.0, 0.8], ["0:0.8"]), "sizes": ({"original": [64, 48]}, ["original=64:48"]),
}
BESIDE: dict[str, dict[str, Any]] = {"mask": {"image": "i.png"}, "strength": {"image": "i.png"}}


@pytest.fixture(autouse=True)
def latents_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("l.npy", np.zeros((1, 2, 4, 4), np.float32))


def test_every_field_is_a_keyword_of_the_call_with_its_default():
    keywords = inspect.signature(Pipeline.__call__).parameters
    assert {name: keywords[name].default for name in FIELDS} == {n: f.default for n, f in FIELDS.items()}
    assert set(keywords) - set(FIELDS) == {"self", "on_step", "cancel", "profile"}
    assert all(f"{name}: " in (Pipeline.__call__.__doc__ or "") for name in FIELDS)


def test_every_field_has_an_option_or_says_why_not():
    options = {option.name for option in request_options()}
    without = {name: field.metadata["no_option"] for name, field in FIELDS.items() if "no_option" in field.metadata}
    assert options | set(without) == set(FIELDS) and not options & set(without)
    assert all(len(reason.split()) > 3 for reason in without.values()) and set(without) == {"output"}


def test_no_option_of_the_command_hides_a_field():
    options = [option.name for option in generate_options()]
    assert len(options) == len(set(options))
    assert {field.name for field in dataclasses.fields(GenerateOptions)} & set(FIELDS) <= {"output"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_read_from_yaml_and_the_command_line_alike(name: str):
    value, words = VALUES[name]
    beside = BESIDE.get(name, {})
    text = yaml.safe_dump({name: value, **beside})
    read = getattr(Request.from_mapping(yaml.safe_load(text)), name)
    assert np.array_equal(read, getattr(Request(**{name: value, **beside}), name)) or read == getattr(
        Request(**{name: value, **beside}), name)
    kind: Any = FIELDS[name].metadata["kind"]
    if words:
        typed = getattr(Request(**{name: kind.word(words[0]), **beside}), name)
        assert np.array_equal(typed, read) or str(typed) == str(read)


@pytest.mark.parametrize("name", FIELDS)
def test_help_holds_default_and_range(name: str):
    said, option = FIELDS[name].metadata, {o.name: o for o in request_options()}.get(name)
    text = option.text if option is not None else described()
    default = said.get("command_line", said.get("default", FIELDS[name].default))
    assert str({True: "on", False: "off"}[default] if isinstance(default, bool) else default).removesuffix(".0") in text
    for limit in ("least", "above", "most"):
        if limit in said:
            assert re.search(rf"\b{said[limit]:g}\b", text)
    assert all(choice in text for choice in said.get("choices", ()))


def test_every_field_that_a_tensor_can_hold_is_an_input_of_tritons():
    assert set(request_inputs()) == set(FIELDS) - {"output"}
    assert all(("optional: true" in line) == (name != "prompt") for name, line in request_inputs().items())


def test_an_unknown_key_is_refused_by_name_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown key 'step' \(did you mean steps\?\)"):
        Request.from_mapping({"prompt": "x", "step": 3})


@pytest.mark.parametrize("name", ["image", "mask", "latents"])
def test_a_server_can_refuse_the_files_of_others(name: str):
    with pytest.raises(InputError, match="files are not read") as caught:
        Request.from_mapping({name: "/etc/passwd", **BESIDE.get(name, {})}, files=False)
    assert caught.value.where in (name, "image")


@pytest.mark.parametrize(("fields", "where"), [
    ({"strength": 0.5}, "strength"), ({"mask": "m.png"}, "mask"), ({"aspect": "1:1", "height": 64}, "aspect"),
    ({"part": (0.8, 1)}, "part"), ({"prompt": []}, "prompt"), ({"prompt": ["a", "b"], "seed": [1]}, "seed"),
    ({"guidance_interval": (0.7, 0.1)}, "guidance_interval"), ({"sizes": {"origin": [1, 2]}}, "sizes"),
    ({"sizes": "crop=a:b"}, "sizes"), ({"latents": "no.npy"}, "no.npy"), ({"aspect": "wide"}, "aspect"),
])
def test_fields_that_do_not_fit_are_refused_without_a_bundle(fields: dict[str, Any], where: str):
    with pytest.raises(InputError) as caught:
        Request(**fields)
    assert caught.value.where == where


def test_sizes_are_read_from_text_and_mappings():
    assert SizeConditions.read("original=64:48,aesthetic_score=5.5") == SizeConditions(
        original=(64, 48), aesthetic_score=5.5)
    assert Request(sizes={"crop": [3, 4]}).sizes == SizeConditions(crop=(3, 4))  # type: ignore[arg-type]


def test_the_request_is_public():
    assert runtimes.Request is Request
