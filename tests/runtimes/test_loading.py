"""A bundle on disk to images: loading late and once, moving the folder, and what importing costs."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

import runtimes
from runtimes.backends.session import SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.errors import BundleError, DeployError, UnavailableError
from runtimes.pipeline import bundle_sessions, loading
from runtimes.pipeline.bundle_sessions import BundleSessions, open_session
from runtimes.text.clip_tokenizer import prepare_tokenizer
from tests.runtimes.fakes import AFFINE, affine_bundle, write_pipeline_bundle
from tests.runtimes.vocabulary import make_vocabulary


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    vocab, merges = make_vocabulary()
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=5).save_pretrained(folder / "source")
    prepare_tokenizer(folder / "source", folder / "bundle" / "tokenizer")
    write_pipeline_bundle(folder / "bundle", len(vocab) + 1)
    return folder / "bundle"


def test_a_bundle_makes_images(bundle):
    pipeline = runtimes.load(bundle, threads=1)
    images = pipeline(["a red apple", "cat"], seed=0, steps=4)
    assert [image.size for image in images] == [(32, 32)] * 2
    assert not np.array_equal(images[0], images[1])
    redrawn = pipeline("cat", image=images[1], strength=0.5, seed=0, steps=4)
    assert redrawn[0].size == (32, 32)


def test_a_copied_bundle_makes_the_same_images(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "elsewhere")
    first, second = (runtimes.load(b, threads=1)("a star", seed=1, steps=4, output="numpy") for b in (bundle, copy))
    np.testing.assert_array_equal(first, second)


def test_the_encoder_is_loaded_when_an_image_comes_and_once_for_all_threads(bundle, monkeypatch):
    opened: list[str] = []

    def recorded(bundle, name, options):
        opened.append(name)
        return open_session(bundle, name, options)

    monkeypatch.setattr(bundle_sessions, "open_session", recorded)
    pipeline = runtimes.load(bundle, threads=1)
    assert opened == ["text_encoder", "unet", "vae_decoder"]
    image = np.zeros((32, 32, 3))
    threads = [threading.Thread(target=pipeline, args=("x",), kwargs={"image": image, "steps": 2}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened.count("vae_encoder") == 1


def test_a_changed_weight_is_found_before_anything_is_loaded(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "b")
    file = copy / "components" / "unet" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"components/unet/model.onnx was changed"):
        runtimes.load(copy)


def test_a_missing_device_is_said_at_once(bundle):
    with pytest.raises(UnavailableError, match="CUDAExecutionProvider"):
        runtimes.load(bundle, device="cuda")


def test_a_bundle_without_the_networks_of_a_pipeline_is_said(tmp_path):
    with pytest.raises(BundleError, match="has no text_encoder"):
        runtimes.load(affine_bundle(tmp_path / "b", part=AFFINE))


@pytest.mark.parametrize("content", ["[]", "{", None])
def test_a_broken_scheduler_config_is_said(bundle, tmp_path, content):
    copy = shutil.copytree(bundle, tmp_path / "b")
    file = copy / "scheduler" / "scheduler_config.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(BundleError):
        loading.scheduler_config(Bundle(copy, Bundle.open(bundle).manifest))


def test_sessions_are_a_mapping_of_the_components(bundle):
    sessions = BundleSessions(Bundle.open(bundle), SessionOptions(threads=1))
    assert set(sessions) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"} and len(sessions) == 4
    assert sessions["unet"] is sessions["unet"]


def test_closing_closes_what_is_loaded_and_loads_nothing(bundle, monkeypatch):
    opened: list[str] = []

    def recorded(bundle, name, options):
        opened.append(name)
        return open_session(bundle, name, options)

    monkeypatch.setattr(bundle_sessions, "open_session", recorded)
    sessions = BundleSessions(Bundle.open(bundle), SessionOptions(threads=1))
    unet = sessions["unet"]
    sessions.close()
    assert opened == ["unet"]
    with pytest.raises(DeployError, match="the session is closed"):
        unet.run({})
    assert sessions["unet"] is not unet


def test_importing_is_quick_and_brings_no_backend(run_python):
    output = run_python(
        "import sys, time; start = time.perf_counter(); import runtimes; seconds = time.perf_counter() - start\n"
        "print(seconds, sorted({'numpy', 'onnxruntime', 'PIL', 'tokenizers', 'torch'} & set(sys.modules)))\n"
        "import runtimes.pipeline.diffusion, runtimes.pipeline.loading\n"
        "print(sorted({'onnxruntime', 'PIL', 'tokenizers', 'torch'} & set(sys.modules)))")
    first, second = output.splitlines()
    seconds, _, modules = first.partition(" ")
    assert float(seconds) < 0.4 and modules == "[]" and second == "[]"


def test_public_names_are_there_and_others_are_not():
    assert {"load", "Pipeline", "Step"} <= set(dir(runtimes))
    for name in runtimes.__all__:
        assert getattr(runtimes, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = runtimes.nothing
