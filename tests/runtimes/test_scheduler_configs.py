"""The keys of scheduler configs: none that diffusers reads is ignored, and other classes read them as diffusers' do."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields

import diffusers
import pytest

from runtimes.schedulers import CLASS_NAMES
from tests.runtimes.scheduler_reference import (
    CLASSES,
    SCHEDULERS,
    base_config,
    compare,
    correct_rounding,
    keys_of,
    make_theirs,
)


def their_defaults(name):
    parameters = inspect.signature(CLASSES[name].__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in ("self", "kwargs")}


def keys_read(name):
    """What the source of diffusers' class takes from its config: `self.config.KEY`, listed in its signature or not."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(CLASSES[name])))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.config":
            found.add(node.attr)
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_key_that_diffusers_reads_is_honoured_refused_or_without_effect(name):
    kind = SCHEDULERS[name].__self__
    known = keys_of(name) | set(kind.unsupported) | kind.inert
    missing = (set(their_defaults(name)) | keys_read(name)) - known - {"get"}
    assert not missing, f"diffusers {diffusers.__version__} reads {missing}: honour them or list them in `unsupported`"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_key_is_read_that_diffusers_class_ignores(name):
    assert keys_of(name) <= set(their_defaults(name)) | keys_read(name) | {"sigma_min", "sigma_max"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_defaults_are_those_of_diffusers_class(name):
    theirs, kind = their_defaults(name), SCHEDULERS[name].__self__
    for field in fields(kind):
        if field.name in theirs and field.name in keys_of(name):
            default = () if theirs[field.name] == [] else theirs[field.name]
            assert field.default == default, field.name
    for key, accepted in kind.unsupported.items():
        assert theirs[key] in accepted, key


def test_each_class_has_its_method_and_each_method_its_class():
    assert sorted(CLASS_NAMES.values()) == sorted(SCHEDULERS)


@pytest.mark.parametrize("source", SCHEDULERS)
def test_another_method_reads_a_config_as_diffusers_from_config_does(source):
    written = make_theirs(source, {"beta_start": 0.002, "beta_end": 0.03, "steps_offset": 1, "sigma_max": 60.0})
    bare = base_config(source, beta_end=0.03, sigma_min=0.04, sigma_max=30.0, use_karras_sigmas=True,
                       rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=True, thresholding=True)
    with correct_rounding():
        for target in SCHEDULERS:
            compare(dict(written.config), 5, name=target)
            compare(bare, 5, name=target)
