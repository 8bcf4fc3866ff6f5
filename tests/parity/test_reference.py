"""The PyTorch session equals diffusers, and frees what it loaded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deploy.parity.reference.torch_sessions import TorchSession, reference_sessions
from exporters.source.networks import load_module
from runtimes.bundle.folder import Bundle
from runtimes.errors import BundleError, DeployError, InputError


def feeds_of(source: Bundle, name: str, **sizes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for spec in source.component(name).inputs:
        shape = spec.resolve(sizes)
        whole = spec.dtype == "int64"
        made[spec.name] = rng.integers(0, 50, shape) if whole else rng.standard_normal(shape, np.float32)
    return made


def test_unet_equals_the_module_it_was_loaded_from(source):
    feeds = feeds_of(source, "unet", batch=3, height=6, width=10, sequence=5)
    found = TorchSession(source, "unet").run(feeds)["out_sample"]
    module = load_module(source.path / "components" / "unet", "diffusers", "UNet2DConditionModel")
    with torch.no_grad():
        expected = module(*(torch.from_numpy(feeds[n]) for n in ("sample", "timestep", "encoder_hidden_states"))).sample
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [("text_encoder", {"batch": 2, "sequence": 7}, (2, 7, 24)),
     ("vae_encoder", {"batch": 1, "image_height": 40, "image_width": 24}, (1, 8, 10, 6)),
     ("vae_decoder", {"batch": 3, "height": 5, "width": 4}, (3, 3, 20, 16))],
)
def test_both_halves_of_the_vae_and_the_text_encoder(source, name, sizes, expected):
    (output,) = TorchSession(source, name).run(feeds_of(source, name, **sizes)).values()
    assert output.shape == expected


def test_equal_feeds_give_equal_bits_and_fresh_arrays(source):
    session, feeds = TorchSession(source, "vae_decoder"), feeds_of(source, "vae_decoder", batch=1, height=4, width=4)
    first, second = session.run(feeds)["sample"], session.run(feeds)["sample"]
    np.testing.assert_array_equal(first, second)
    assert first.flags.writeable and not np.shares_memory(first, second)


def test_feeds_are_checked_by_name_dtype_and_shape_but_not_by_range(source):
    session = TorchSession(source, "unet")
    feeds = feeds_of(source, "unet", batch=7, height=6, width=6, sequence=5)
    assert session.run(feeds)["out_sample"].shape == (7, 4, 6, 6)  # the bundle promises batches up to 6
    with pytest.raises(InputError, match="float64"):
        session.run({**feeds, "sample": feeds["sample"].astype(np.float64)})
    with pytest.raises(InputError, match="missing"):
        session.run({"sample": feeds["sample"]})


def test_a_shape_that_the_network_cannot_take_is_an_error_of_ours(source):
    feeds = feeds_of(source, "text_encoder", batch=1, sequence=21)  # it has 20 positions
    with pytest.raises(BundleError, match="PyTorch cannot run it"):
        TorchSession(source, "text_encoder").run(feeds)


def test_only_the_source_format_is_run(source):
    component = replace(source.component("unet"), format="onnx")
    other = Bundle(source.path, replace(source.manifest, components={"unet": component}))
    with pytest.raises(BundleError, match="'onnx' is not a format that PyTorch runs"):
        TorchSession(other, "unet")


def test_closing_frees_the_weights(source):
    import weakref

    session = TorchSession(source, "unet")
    alive = weakref.ref(session._module)
    session.close()
    session.close()
    assert alive() is None
    with pytest.raises(DeployError, match="the session is closed"):
        session.run(feeds_of(source, "unet", batch=1, height=4, width=4, sequence=5))


def test_reference_sessions_load_late_and_one_at_a_time(source, monkeypatch):
    loaded: list[str] = []
    closed: list[str] = []
    init, close = TorchSession.__init__, TorchSession.close

    def noting_init(self, bundle, name):
        loaded.append(name)
        init(self, bundle, name)

    def noting_close(self):
        closed.append(self.name)
        close(self)

    monkeypatch.setattr(TorchSession, "__init__", noting_init)
    monkeypatch.setattr(TorchSession, "close", noting_close)
    sessions = reference_sessions(source, capacity=1)
    assert set(sessions) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"} and not loaded
    sessions["text_encoder"].run(feeds_of(source, "text_encoder", batch=1, sequence=3))
    assert (loaded, closed) == (["text_encoder"], [])
    sessions["vae_decoder"].run(feeds_of(source, "vae_decoder", batch=1, height=4, width=4))
    assert (loaded, closed) == (["text_encoder", "vae_decoder"], ["text_encoder"])
