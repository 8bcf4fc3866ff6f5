"""The safety checker: as diffusers' own decides, through every pass, and never called or obeyed unasked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from PIL import Image
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import runtimes
from deploy.building.run_build import plan_build, run_build
from deploy.core.spec import BuildSpec
from exporters.quiet import quiet
from exporters.source.networks import filled, load_module
from runtimes.backends.session import Arrays, Session
from runtimes.bundle.tensors import ShapeRange
from runtimes.codec.safety_checker import CONCEPT_SCORES, SPECIAL_SCORES, Preprocessing, flags
from runtimes.errors import InputError
from tests.deploy.conftest import Cli, assert_refused
from tests.exporters.pipelines import edit_json, edit_weights
from tests.parity.pipelines import write_model

SIDE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a random safety checker whose thresholds lie among the scores, weights named as of 2022."""
    folder = write_model(tmp_path_factory.mktemp("model") / "safe")
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
             "projection_dim": 8}
    torch.manual_seed(3)
    with quiet():
        checker = StableDiffusionSafetyChecker(CLIPConfig(
            text_config=tower, vision_config={**tower, "image_size": SIDE, "patch_size": 8}, projection_dim=8))
        for parameter in checker.parameters():
            torch.nn.init.uniform_(parameter, -1.0, 1.0)
        processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
        processor.save_pretrained(folder / "feature_extractor")
        prepared = torch.from_numpy(processor(images(64), return_tensors="np")["pixel_values"].astype(np.float32))
        with torch.no_grad():
            embeds = checker.visual_projection(checker.vision_model(prepared)[1])
            for concepts in ("concept", "special_care"):
                scores = cosine_distance(embeds, getattr(checker, f"{concepts}_embeds"))
                getattr(checker, f"{concepts}_embeds_weights").copy_(scores.quantile(0.97, dim=0))
        checker.save_pretrained(folder / "safety_checker")
    edit_weights(folder / "safety_checker" / "model.safetensors", lambda tensors: {
        key.replace("vision_model.", "vision_model.vision_model."): value for key, value in tensors.items()}
        | {"vision_model.vision_model.embeddings.position_ids": torch.arange(17)[None]})
    edit_json(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
              feature_extractor=["transformers", "CLIPImageProcessor"])
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory, build_cache: Path) -> Path:
    spec = BuildSpec(model=str(model), safety_checker=True, prompts=("a", "b c"),
                     shapes={name: ShapeRange(32, 32, 64) for name in ("height", "width")})
    return run_build(spec, tmp_path_factory.mktemp("safe") / "bundle", cache_root=build_cache).bundle.path


def images(count: int) -> list[Image.Image]:
    random = np.random.default_rng(1)
    sizes = [(40, 64), (64, 40), (33, 33), (200, 90)]
    return [Image.fromarray(random.integers(0, 256, (*sizes[i % 4], 3), np.uint8)).resize(sizes[i % 4][::-1])
            for i in range(count)]


def theirs(model: Path, prepared: np.ndarray) -> list[bool]:
    """diffusers' own class, filled with the model's weights under today's names."""
    checker = load_module(model / "safety_checker", "diffusers", "StableDiffusionSafetyChecker")
    return checker(torch.from_numpy(prepared), [np.zeros((4, 4, 3))] * len(prepared))[1]


def test_images_are_prepared_as_clip_image_processor_does(model: Path) -> None:
    processor = CLIPImageProcessorPil.from_pretrained(model / "feature_extractor")
    config = json.loads((model / "feature_extractor" / "preprocessor_config.json").read_text())
    expected = processor(images(4), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(Preprocessing.from_config(config, "")(images(4)), expected, rtol=0, atol=1e-6)
    older = {"size": SIDE, "crop_size": SIDE, "image_mean": config["image_mean"], "image_std": config["image_std"]}
    np.testing.assert_allclose(Preprocessing.from_config(older, "")(images(4)), expected, rtol=0, atol=1e-6)


def test_it_is_built_compared_and_flags_what_diffusers_flags(bundle: Path, model: Path) -> None:
    component = runtimes.Bundle.open(bundle).component("safety_checker")
    assert component.parity is not None and component.parity["relative_l2"] < 1e-4
    pipeline, generated = runtimes.load(bundle), images(64)
    processor = CLIPImageProcessorPil.from_pretrained(model / "feature_extractor")
    expected = theirs(model, processor(generated, return_tensors="np")["pixel_values"].astype(np.float32))
    assert 8 < sum(expected) < 56  # or there is nothing to tell apart
    assert pipeline.flagged(generated) == expected


def test_special_concepts_lower_the_other_thresholds_as_in_diffusers(
    model: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores are set one by one, around zero and around what special care adds."""
    values = np.array([-0.02, -0.0101, -0.0099, -0.0095, -0.0004, 0.0, 0.0004, 0.0006, 0.02], np.float32)
    first, second = (grid.reshape(-1, 1) for grid in np.meshgrid(values, values))
    special, concepts = np.hstack([first - 1, first, second]), np.hstack([second] + [second - 1] * 16)
    module = "diffusers.pipelines.stable_diffusion.safety_checker"
    monkeypatch.setattr(f"{module}.cosine_distance", lambda embeds, concept_embeds: torch.from_numpy(
        {3: special, 17: concepts}[len(concept_embeds)]))
    monkeypatch.setattr("exporters.source.networks.filled", lambda network, weights: filled(network, {
        name: weight * 0 if name.endswith("_embeds_weights") else weight for name, weight in weights.items()}))
    prepared = np.zeros((len(special), 3, SIDE, SIDE), np.float32)

    class Scores(Session):
        def _run(self, feeds: Arrays) -> dict[str, np.ndarray]:
            return {SPECIAL_SCORES: special, CONCEPT_SCORES: concepts}

    component = replace(runtimes.Bundle.open(bundle).component("safety_checker"), axes={})
    found, expected = flags(Scores("safety_checker", component), prepared), theirs(model, prepared)
    assert found == expected and 8 < sum(expected) < len(expected) - 8


def test_generate_reports_and_replaces_only_when_asked(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.pipeline.diffusion.flags", lambda session, prepared: [False, True])
    options = ("generate", bundle, "a", "-n", "2", "--steps", "1", "--seed", "3", "-o", "x.png")
    files = [Path("x-1.png"), Path("x-2.png")]
    plain = cli(*options)
    unasked = [file.read_bytes() for file in files]
    reported = cli(*options, "--safety", "report")
    assert "flagged" not in plain.out + plain.err
    assert "flagged by the safety checker: 2 of 2" in reported.out + reported.err
    assert [file.read_bytes() for file in files] == unasked
    replaced = cli(*options, "--safety", "replace")
    assert "and replaced: 2 of 2" in replaced.out + replaced.err
    assert files[0].read_bytes() == unasked[0] and not np.asarray(Image.open(files[1])).any()


def test_models_and_bundles_without_one_are_refused(cli: Cli, model: Path, tiny_model: Path, reference_bundle: Path,
                                                    tmp_path: Path) -> None:
    assert_refused(cli("build", tiny_model, "--safety-checker"), "no safety_checker", "model_index.json")
    assert_refused(cli("generate", reference_bundle, "x", "--safety", "report"), "safety_checker")
    assert_refused(cli("generate", reference_bundle, "x", "--safety", "strict"), "off, report, replace")
    with pytest.raises(InputError, match="no safety checker"):
        runtimes.load(reference_bundle).flagged([])


@pytest.mark.parametrize(("change", "word"), [
    ({"do_center_crop": False}, "do_center_crop"), ({"image_mean": ...}, "image_mean"),
    ({"crop_size": {"height": 24, "width": 24}}, "cut to"), ({"crop_size": 64}, "does not fit"),
])
def test_another_preprocessing_is_refused(model: Path, change: dict, word: str, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    edit_json(copy / "feature_extractor" / "preprocessor_config.json", **change)
    with pytest.raises(InputError, match=word):
        plan_build(BuildSpec(model=str(copy), safety_checker=True))
