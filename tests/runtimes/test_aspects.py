"""Aspect ratios: the nearest size that a bundle makes."""

from __future__ import annotations

import math

import pytest

from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError
from runtimes.inputs.aspect_ratios import BUCKETS, nearest_size, parse_aspect
from runtimes.pipeline.diffusion import Pipeline
from tests.runtimes.fakes import DDIM, FACTS, fake_sessions, tokenize

FREE = (ShapeRange(64, 512, 2048), 8)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_free_bundle_is_near_in_shape_and_pixels(bucket):
    wanted = parse_aspect(bucket)
    height, width = nearest_size(wanted, 512 * 512, FREE, FREE)
    assert height % 8 == width % 8 == 0
    assert abs(math.log(width / height / wanted)) < 0.01 and abs(math.log(height * width / 512**2)) < 0.1


def test_what_a_bundle_does_not_make_is_not_chosen():
    assert nearest_size(1.0, 512 * 512, FREE, FREE) == (512, 512)
    assert nearest_size(21 / 9, 64 * 64, (ShapeRange(64, 64, 64), 16), (ShapeRange(32, 64, 96), 16)) == (64, 96)


def test_a_pipeline_generates_the_size_that_it_names():
    pipeline = Pipeline(fake_sessions(), FACTS, DDIM, tokenize)
    height, width = pipeline.size_of(16 / 9)
    assert (height, width) == (24, 40)
    assert pipeline("x", seed=0, steps=1, height=height, width=width, output="numpy").shape == (1, 24, 40, 3)


@pytest.mark.parametrize("text", ["", "0:9", "16:0", "a:b", "nan", "1:1000", "16:9:1"])
def test_no_ratio_is_refused(text):
    with pytest.raises(InputError, match="write width:height"):
        parse_aspect(text)
