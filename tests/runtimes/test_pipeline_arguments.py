"""Every argument of a call with every kind of value: it works, or is an InputError before any network runs."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.pipeline.diffusion import Pipeline
from tests.runtimes.fakes import CHANNELS, DDIM, FACTS, calls_of, fake_sessions, tokenize

BASE: dict[str, Any] = {"prompt": "x", "steps": 2, "seed": 1, "output": "latents"}
IMAGE = np.full((32, 32, 3), 0.5)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 10**30, 1.5, math.nan, math.inf, -math.inf, "", "x", "0.5", b"x", 1j, [], (), [1],
    [None], ["x"], ("0", "0.8"), (0, 1), [0.0, math.nan], (0, 0.5, 1), {}, {"a": 1}, {0.0, 1.0}, object(),
    np.float32(0.5), np.int64(2), np.bool_(True), np.array(2), np.array([0.0, 1.0]),
    np.zeros((1, CHANNELS, 8, 8), np.float32),
    np.array(["x"]), np.array([None], object), range(2), lambda step: None, ValueError("x"), "a\ud800",
)
ARGUMENTS = [name for name, p in inspect.signature(Pipeline.__call__).parameters.items() if name != "self"]
ASIDE: dict[str, dict[str, Any]] = {  # what an argument needs beside it to mean something
    "mask": {"image": IMAGE}, "strength": {"image": IMAGE},
    "guidance_rescale": {"guidance_scale": 3.0}, "eta": {"scheduler": "ddim"},
}


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.filterwarnings("ignore")
def test_no_value_of_any_argument_escapes_as_another_error(argument: str):
    for value in VALUES:
        pipeline = Pipeline(fake_sessions(), FACTS, DDIM, tokenize)
        try:
            pipeline(**{**BASE, **ASIDE.get(argument, {}), argument: value})
        except InputError as error:
            assert error.where or error.what
            assert not calls_of(pipeline, "unet"), f"{argument} = {value!r} is refused after the U-Net ran"
        except Exception as error:
            raise AssertionError(f"{argument} = {value!r}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("part", [("0", "0.8"), None, 0.5, (0, True), "01", (0.1,), (math.nan, 1), (0, math.inf), {}])
def test_a_part_that_is_no_pair_of_numbers_is_named(part: Any):
    with pytest.raises(InputError) as caught:
        Pipeline(fake_sessions(), FACTS, DDIM, tokenize)(**BASE, part=part)
    assert caught.value.where == "part"


@pytest.mark.parametrize("part", [(0, 0.5), [0, 0.5], np.array([0, 0.5]), (np.float32(0), np.float64(0.5))])
def test_a_part_may_be_any_pair_of_numbers(part: Any):
    Pipeline(fake_sessions(), FACTS, DDIM, tokenize)(**{**BASE, "steps": 4}, part=part)


def test_a_part_is_read_once():
    """An iterator has two numbers once; what was checked is what is used."""
    Pipeline(fake_sessions(), FACTS, DDIM, tokenize)(**{**BASE, "steps": 4}, part=iter((0, 0.5)))
