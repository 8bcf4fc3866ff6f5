"""What company does to the rows of a network is measured, whatever it is, and read back where the same runs it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from deploy.building.batch_invariance import measure_batches, measure_rows
from deploy.core.pass_cache import Cache
from runtimes.bundle.folder import Bundle
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import BundleError
from runtimes.pipeline.batch_facts import DYNAMIC, BatchFacts
from tests.runtimes.fakes import FakeSession, fake_sessions, unet
from tests.runtimes.schedules import make_bundle

USUAL = ShapeRange(1, 2, 6)


def session(function: Any, rows: ShapeRange = USUAL) -> FakeSession:
    part = fake_sessions()["unet"].component
    axes = {**part.axes, "batch": dataclasses.replace(part.axes["batch"], range=rows)}
    return FakeSession("unet", dataclasses.replace(part, axes=axes), function)


def scaled_by_all_rows(sample: np.ndarray, **feeds: np.ndarray) -> np.ndarray:
    """As the ranges of dynamic INT8."""
    step = np.abs(sample).max() / 127
    return unet(np.round(sample / step).astype(np.float32) * step, **feeds)


def rounded_by_number(sample: np.ndarray, **feeds: np.ndarray) -> np.ndarray:
    """As products whose kernel is chosen by the number of rows."""
    return unet(sample, **feeds) * np.float32(1 + 1e-6 * (len(sample) > 2))


def test_rows_that_know_nothing_of_each_other_are_exact():
    assert measure_rows(session(unet)) == {
        "exact": True, "fixed": True, "rows": [1, 2, 3, 4, 5, 6], "sizes": {"height": 4, "width": 4}}


def test_rows_that_depend_on_their_number_alone_are_fixed_at_one_number():
    found = measure_rows(session(rounded_by_number))
    assert not found["exact"] and found["fixed"] and 110 < found["decibels"] < 130


def test_rows_that_depend_on_their_company_are_found():
    found = measure_rows(session(scaled_by_all_rows))
    assert not found["exact"] and not found["fixed"] and found["decibels"] < 60


def test_a_network_of_one_number_of_rows_is_compared_at_it():
    assert measure_rows(session(unet, ShapeRange(3, 3, 3)))["rows"] == [3]
    assert not measure_rows(session(scaled_by_all_rows, ShapeRange(3, 3, 3)))["exact"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("rows")))


def test_a_bundle_is_measured_once_and_read_where_the_same_runs_it(bundle, tmp_path, monkeypatch):
    found = measure_batches(bundle, Cache(tmp_path))
    assert set(found) == set(bundle.manifest.components)
    monkeypatch.setattr("deploy.building.batch_invariance.measure_rows", None)
    assert measure_batches(bundle, Cache(tmp_path)) == found
    manifest = dataclasses.replace(bundle.manifest, measured={"batch": found})
    assert BatchFacts.of(manifest).exact("vae_decoder") and set(BatchFacts.of(manifest).measured) == set(found)
    elsewhere = {name: {**fact, "runtime": "another processor"} for name, fact in found.items()}
    assert not BatchFacts.of(dataclasses.replace(manifest, measured={"batch": elsewhere})).measured


def test_a_large_network_is_measured_in_a_process_of_its_own(bundle, tmp_path, monkeypatch):
    here = measure_batches(bundle, Cache(tmp_path / "here"))
    monkeypatch.setattr("deploy.building.batch_invariance.ABOVE_BYTES", 0)
    monkeypatch.setattr("deploy.building.batch_invariance.measure_rows", None)
    assert measure_batches(bundle, Cache(tmp_path / "apart")) == here


def test_a_measurement_of_another_type_is_refused_when_the_bundle_is_opened(bundle, tmp_path):
    from runtimes.bundle.manifest import dumps, parse

    manifest = dataclasses.replace(bundle.manifest, measured={"batch": {"unet": {"exact": "yes", "fixed": True}}})
    with pytest.raises(BundleError, match=r"measured.batch.unet.exact"):
        parse(dumps(manifest), "manifest.json")


def test_rows_of_dynamic_int8_never_share_unless_they_were_measured_to_be_exact(bundle):
    from calibration.graphs.layers import DYNAMIC as LAYER
    from runtimes.bundle.details import GraphDetails, Quantization

    assert LAYER == DYNAMIC
    quantization = Quantization(recipe="dynamic", scheme={}, layers={DYNAMIC: 3, "float": 1}, parameters={},
                                weight_bytes=(4, 1))
    manifest = bundle.manifest
    components = {**manifest.components, "unet": dataclasses.replace(
        manifest.components["unet"], details=GraphDetails(quantization=quantization))}
    unknown = dataclasses.replace(manifest, components=components, measured={})
    assert not BatchFacts.of(unknown).shares("unet") and BatchFacts.of(unknown).shares("vae_decoder")
    assert BatchFacts.of(dataclasses.replace(manifest, measured={})).shares("unet")
