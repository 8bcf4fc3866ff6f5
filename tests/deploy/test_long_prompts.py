"""A bundle built for long prompts reads them in windows, and refuses those of more windows than it was built for."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.families import family_of
from exporters.families.open_source import open_source
from tests.deploy.conftest import Cli, assert_refused


@pytest.mark.slow
def test_long_prompts_are_read_by_a_bundle_that_was_built_for_them(tiny_model: Path, cli: Cli):
    source = open_source(tiny_model)
    tokens = family_of(source.pipeline_class).roles(source).conditioner.encoders[0].tokens
    options = ("a cat " * tokens, "--long-prompts", "--steps", "2", "--seed", "1")
    shapes = f"sequence=1:{tokens}:{8 * tokens}"
    assert cli("build", tiny_model, "--shapes", shapes, "--no-verify", "-o", "long").code == 0
    assert cli("generate", "long", *options, "-o", "long.png").code == 0
    assert cli("generate", "long", options[0], *options[2:], "-o", "cut.png").code == 0
    assert Path("long.png").read_bytes() != Path("cut.png").read_bytes()
    assert_refused(cli("generate", "long", "a cat " * (6 * tokens), *options[1:]), "sequence=", "--shapes")
