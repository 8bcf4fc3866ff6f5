"""Which sizes the source model itself can run, found without weights: the same that PyTorch then runs."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.parity.reference.torch_sessions import SizeTrial, TorchSession
from runtimes.bundle.folder import Bundle
from runtimes.errors import BundleError
from tests.exporters import family_pipelines
from tests.parity.pipelines import source_bundle


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Bundle:
    """An XL pipeline with one channel a group, whose lowest feature map at 2 latent rows is 1x1."""
    folder = tmp_path_factory.mktemp("narrow")
    family_pipelines.xl(block_out_channels=(8, 16)).save_pretrained(folder)
    return source_bundle(folder, tmp_path_factory.mktemp("loaded"))


@pytest.mark.parametrize(("rows", "side", "runs"), [(1, 2, False), (2, 2, True), (1, 4, True), (3, 8, True)])
def test_the_trial_says_what_pytorch_does(source, rows, side, runs):
    session = TorchSession(source, "unet")
    sizes = {axis: {"height": side, "width": side, "batch": rows}.get(axis, 77) for axis in session_axes(source)}
    feeds = {spec.name: np.ones(spec.resolve(sizes), spec.dtype) for spec in session.component.inputs}
    if runs:
        assert session.run(feeds)
    else:
        with pytest.raises(BundleError, match="PyTorch cannot run it: Expected more than 1 value per channel"):
            session.run(feeds)
    assert SizeTrial(source).possible("unet", sizes) is runs


def test_text_encoders_and_strangers_run_at_any_size(source):
    trial = SizeTrial(source)
    assert trial.possible("text_encoder", {"batch": 1, "sequence": 1}) and trial.possible("transformer", {})


def session_axes(source: Bundle) -> list[str]:
    return list(source.component("unet").axes)
