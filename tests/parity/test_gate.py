"""The gate must let an equal pipeline pass, stop every broken one, and name what broke it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from deploy.core.budgets import budget_for
from deploy.parity.comparison_effort import Effort
from deploy.parity.reference.answers import Reference
from deploy.parity.verdict import check_components, check_pipeline, enforce, verify
from deploy.reference_models.retrieval import Gallery
from runtimes.backends.session import SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import digest_of
from runtimes.errors import ParityError
from runtimes.system.device import Device
from tests.exporters.pipelines import edit_json
from tests.parity.pipelines import changed, double_one_weight, misbehaving

FP32 = budget_for("fp32")
KEYS = {"max_abs", "relative_l2", "cosine", "nonfinite", "shapes"}


@pytest.fixture(scope="module")
def equal(source, reference):
    """The source against itself."""
    from tests.parity.conftest import OPTIONS

    return verify(reference, source, FP32, Effort("full", OPTIONS))


def refused(reference, candidate, options, names=None) -> ParityError:
    """The gate's error after a pass called `optimize`, at component level."""
    report = check_components(reference, candidate, options, names)
    with pytest.raises(ParityError) as error:
        enforce(report, FP32, "optimize")
    assert error.value.exit_code == 3
    return error.value


# ---- what passes ---------------------------------------------------------------------------------------------


def test_the_source_is_equal_to_itself_at_every_level(equal):
    assert equal.ok and not equal.broken
    equal.enforce()
    found = equal.to_json()
    assert set(found["components"]) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    for figures in found["components"].values():
        assert KEYS <= set(figures)
        assert figures["relative_l2"] == 0 and figures["nonfinite"] == 0
        assert len({tuple(shape) for shape in figures["shapes"]}) >= 3
    assert found["trajectory"]["relative_l2"] == [0.0] * 4
    assert found["images"] | {"psnr_db": 160.0, "ssim": 1.0, "count": 4} == found["images"]
    assert found["retrieval"] is None and found["unverified"] == [] and found["broken"] == []


def test_the_json_holds_no_infinity_or_nan_and_has_a_digest(equal):
    json.loads(json.dumps(equal.to_json(), allow_nan=False))
    assert digest_of(equal.to_json())


def test_inputs_are_real_latents_at_several_noise_levels(source, reference, options):
    from deploy.parity.reference.planned_shapes import plan_runs

    component = source.component("unet")
    runs = plan_runs(source.manifest.components, source.manifest.pipeline)
    samples = reference.samples("unet", component, runs, options)
    for run, at_shape in zip(runs, samples, strict=True):
        assert len(at_shape) == 3
        times = [s.feeds["timestep"][0] for s in at_shape]
        assert times[0] > times[-1]
        for sample in at_shape:
            assert sample.shape_of(component)[0] == run.sizes["unet"]["batch"]
            hidden = sample.feeds["encoder_hidden_states"]
            if len(hidden) > 1 and hidden.shape[1] > 1:  # the empty prompt and the prompt
                assert not np.array_equal(hidden[0], hidden[-1])


def test_pairs_are_what_a_report_shows(equal):
    pair = equal.pipeline.pairs[0]
    assert pair.reference.shape == (64, 64, 3) and pair.reference.dtype == np.uint8
    assert {(p.prompt, p.scheduler) for p in equal.pipeline.pairs} == {
        (prompt, scheduler) for prompt in ("a cat", "a dog") for scheduler in ("ddim", "dpm++")}


# ---- what must not pass, by name ------------------------------------------------------------------------------


def test_corrupted_weight_breaks_the_gate_and_names_the_unet(source, reference, options, copied):
    weights = "components/unet/model.safetensors"
    candidate = changed(source, copied, lambda f: double_one_weight(f / weights, "conv_in.weight"))
    report = check_components(reference, candidate, options)
    assert [name for name, f in report.figures.items() if not f.compare(FP32.component_relative_l2)] == ["unet"]
    error = refused(reference, candidate, options)
    assert error.where == "pass optimize, unet"
    figures = report.figures["unet"]
    assert f"out_sample at shape {list(figures.worst_shape)}" in error.what
    assert "the budget is at most 0.0001" in error.what and "would have passed" in error.what
    passing = figures.compare(FP32.component_relative_l2).would_pass
    assert passing is not None and f"component_relative_l2={passing:.3g}" in error.fix
    enforce(report, budget_for("fp32", {"component_relative_l2": passing}), "optimize")


def test_corrupted_weight_is_named_by_the_pipeline_level_too(source, reference, options, copied):
    weights = "components/unet/model.safetensors"
    candidate = changed(source, copied, lambda f: double_one_weight(f / weights, "conv_in.weight"))
    for components in (None, check_components(reference, candidate, options)):
        report = check_pipeline(reference, candidate, FP32, options, components=components)
        assert report.trajectory[0] > 0
        with pytest.raises(ParityError, match="trajectory_relative_l2") as error:
            enforce(report, FP32, "optimize")
        assert error.value.where == "pass optimize, unet"


@pytest.mark.parametrize(
    ("name", "file", "key"),
    [("text_encoder", "text_encoder", "final_layer_norm.weight"), ("vae_decoder", "vae", "decoder.conv_out.weight"),
     ("vae_encoder", "vae", "encoder.conv_in.weight")],
)
def test_corrupted_weight_names_every_other_component(source, reference, options, copied, name, file, key):
    candidate = changed(source, copied, lambda f: double_one_weight(f / f"components/{file}/model.safetensors", key))
    assert refused(reference, candidate, options).where == f"pass optimize, {name}"


def test_decoder_alone_is_blamed_when_only_the_images_differ(source, reference, options, copied):
    weights = "components/vae/model.safetensors"
    candidate = changed(source, copied, lambda f: double_one_weight(f / weights, "decoder.conv_out.weight"))
    report = check_pipeline(reference, candidate, FP32, options)
    assert max(report.trajectory) == 0
    with pytest.raises(ParityError, match="image_psnr_db") as error:
        enforce(report, FP32, "package")
    assert error.value.where == "pass package, vae_decoder"


def test_corrupted_scheduler_coefficient_names_the_scheduler(source, reference, options, copied):
    candidate = changed(source, copied, lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_end=0.0121))
    result = verify(reference, candidate, FP32, Effort("full", options))
    enforce(result.components, FP32, "package")  # every network is fine
    with pytest.raises(ParityError) as error:
        result.enforce("package")
    assert error.value.where == "pass package, scheduler"
    assert "beta_end: 0.012 -> 0.0121" in error.value.what
    assert not result.ok and result.to_json()["culprit"] == "scheduler"


def test_a_scheduler_setting_outside_the_noise_schedule_is_found_by_running_the_source_s(
    source, reference, options, copied
):
    def change(folder):
        edit_json(folder / "scheduler/scheduler_config.json", prediction_type="epsilon")

    report = check_pipeline(reference, changed(source, copied, change), FP32, options)
    assert report.schedule_error == 0
    with pytest.raises(ParityError, match="same networks pass with the source's config") as error:
        enforce(report, FP32, "package")
    assert error.value.where == "pass package, scheduler"
    assert "prediction_type" in error.value.what


def test_a_loose_budget_does_not_hide_a_changed_noise_schedule(source, reference, options, copied):
    candidate = changed(source, copied, lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_end=0.012001))
    loose = budget_for("int8")
    with pytest.raises(ParityError, match="noise schedule"):
        enforce(check_pipeline(reference, candidate, loose, options), loose, "package")
    allowed = replace(options, allow_scheduler_change=True)
    enforce(check_pipeline(reference, candidate, loose, allowed), loose, "package")


def test_another_tokenizer_is_named(source, reference, options, copied):
    def change(folder):
        file = folder / "tokenizer" / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a</w>"], vocabulary["t</w>"] = vocabulary["t</w>"], vocabulary["a</w>"]
        file.write_text(json.dumps(content))

    report = check_pipeline(reference, changed(source, copied, change), FP32, options)
    assert (report.culprit, report.problem) == ("tokenizer", "")


def test_another_scaling_factor_is_named(source, reference, options, copied):
    candidate = changed(source, copied, roles={"codec.scaling_factor": 0.5})
    with pytest.raises(ParityError, match=r"scaling_factor: 0\.18215 -> 0\.5"):
        enforce(check_pipeline(reference, candidate, FP32, options), FP32, "package")


def test_a_fixed_axis_names_the_component_the_axis_and_the_shape(source, reference, options, fake_format):
    candidate = misbehaving(source, "unet", "only batch 1")
    error = refused(reference, candidate, options)
    assert error.where == "pass optimize, unet"
    assert "sample at shape [2, 4, 16, 16]" in error.what
    assert "(axis batch" in error.what and "expected 1" in error.what


def test_swapped_axes_name_the_component_and_the_axes_at_the_shape_that_is_not_square(
    source, reference, options, fake_format
):
    candidate = misbehaving(source, "vae_decoder", "transposed")
    error = refused(reference, candidate, options)
    assert error.where == "pass optimize, vae_decoder"
    assert "axis image_height, image_width" in error.what
    assert "has shape [3, 3, 72, 56], expected [3, 3, 56, 72]" in error.what


def test_a_nan_at_a_single_noise_level_never_passes(source, reference, options, fake_format):
    candidate = misbehaving(source, "unet", "NaN at high noise")
    report = check_components(reference, candidate, options, ["unet"])
    endless = replace(FP32, component_relative_l2=1e300)
    with pytest.raises(ParityError, match="no tolerance passes"):
        enforce(report, endless, "quantize")
    result = verify(reference, candidate, endless, Effort("full", options))
    assert result.broken
    found = result.to_json()
    assert found["components"]["unet"]["relative_l2"] is None and found["components"]["unet"]["nonfinite"] > 0
    json.dumps(found, allow_nan=False)
    with pytest.raises(ParityError, match="not finite") as error:
        enforce(result.pipeline, endless, "quantize")
    assert error.value.where == "pass quantize, unet"


def test_a_renamed_output_is_broken_parity(source, reference, options, fake_format):
    error = refused(reference, misbehaving(source, "vae_encoder", "renamed"), options)
    assert error.where == "pass optimize, vae_encoder"
    assert "gives sample_out, not latent_parameters" in error.what


def test_only_the_named_components_are_compared(source, reference, options, fake_format):
    candidate = misbehaving(source, "vae_decoder", "transposed")
    report = check_components(reference, candidate, options, ["text_encoder", "unet"])
    assert set(report.figures) == {"text_encoder", "unet"}
    enforce(report, FP32, "optimize")


def test_a_component_that_cannot_be_loaded_is_broken_not_unverified(source, reference, options, copied):
    candidate = changed(source, copied)
    components = {**candidate.manifest.components, "unet": replace(candidate.component("unet"), format="onnx")}
    broken = Bundle(copied, replace(candidate.manifest, components=components))
    error = refused(reference, broken, options, ["unet"])
    assert error.where == "pass optimize, unet" and "cannot be loaded" in error.what


# ---- what cannot be executed here -----------------------------------------------------------------------------


def test_a_format_without_a_runtime_here_is_unverified_never_passed(source, reference, options):
    unknown = replace(source.component("unet"), format="engine-of-tomorrow")
    components = {**source.manifest.components, "unet": unknown}
    candidate = Bundle(source.path, replace(source.manifest, components=components))
    result = verify(reference, candidate, FP32, Effort("full", options))
    result.enforce()  # nothing is broken
    found = result.to_json()
    assert not found["ok"] and "unet" not in found["components"]
    assert found["unverified"][0] == "unet: nothing here runs the format 'engine-of-tomorrow'"
    assert len(found["unverified"]) == 2 and found["images"]["count"] == 0


def test_a_missing_device_is_unverified(source, reference, options, monkeypatch):
    from deploy.parity import components, whole_pipelines
    from runtimes.errors import UnavailableError

    def unavailable(bundle, name, session_options):
        assert session_options.device == Device("cuda")
        raise UnavailableError("no NVIDIA driver", where=name)

    monkeypatch.setattr(components, "open_candidate", unavailable)
    monkeypatch.setattr(whole_pipelines, "open_candidate", unavailable)
    result = verify(reference, source, FP32, Effort("full", replace(options, session=SessionOptions(Device("cuda")))))
    assert not result.ok and not result.broken
    assert result.unverified[0] == "text_encoder: text_encoder: no NVIDIA driver"
    assert len(result.unverified) == 5


# ---- memory, cache, retrieval ---------------------------------------------------------------------------------


def test_a_second_verify_asks_the_reference_for_nothing(source, options, tmp_path, equal):
    opened: list[int] = []

    def opener(bundle, capacity):
        from deploy.parity.reference.torch_sessions import reference_sessions

        opened.append(capacity)
        return reference_sessions(bundle, capacity=capacity)

    fewer = replace(options, schedulers=("ddim",))
    first = verify(Reference(source, cache=tmp_path, opener=opener), source, FP32, Effort("full", fewer))
    assert opened
    again = Reference(source, cache=tmp_path, opener=lambda *_: pytest.fail("the reference ran again"))
    assert verify(again, source, FP32, Effort("full", fewer)).to_json() == first.to_json()


def test_other_weights_or_settings_are_other_cache_entries(source, reference, options, copied):
    weights = "components/unet/model.safetensors"
    other = changed(source, copied, lambda f: double_one_weight(f / weights, "conv_in.weight"))
    assert Reference(other).identity != reference.identity
    report = check_components(Reference(other), source, options, ["unet"])
    assert report.figures["unet"].relative_l2 > 1e-3


def test_large_networks_are_held_one_at_a_time(source, options, monkeypatch):
    from deploy.parity.reference.torch_sessions import TorchSession

    alive: set[int] = set()
    most = 0
    init, close = TorchSession.__init__, TorchSession.close

    def counting_init(self, bundle, name):
        nonlocal most
        init(self, bundle, name)
        alive.add(id(self))
        most = max(most, len(alive))

    def counting_close(self):
        close(self)
        alive.discard(id(self))

    monkeypatch.setattr(TorchSession, "__init__", counting_init)
    monkeypatch.setattr(TorchSession, "close", counting_close)
    frugal = replace(options, prompts=("a cat",), schedulers=("ddim",), steps=2, recording_steps=2, keep_bytes=0)
    assert verify(Reference(source, keep_bytes=0), source, FP32, Effort("full", frugal)).ok
    assert most == 1 and not alive


def test_retrieval_is_scored_for_both_and_its_loss_is_budgeted(source, reference, options, fake_format, tmp_path):
    from deploy.parity.reference.trajectories import TrajectoryRequest

    names = ("a cat", "a dog", "a bus")
    request = TrajectoryRequest(names, "ddim", options.steps, options.guidance_scale, options.seed, 64, 64,
                                keep_latents=False)
    images = reference.generate(request).images
    small = np.rint(255 * images.reshape(3, 32, 2, 32, 2, 3).mean((2, 4))).astype(np.uint8)
    Image.fromarray(np.concatenate(list(small), axis=1)).save(tmp_path / "gallery.png")
    gallery = Gallery.load(tmp_path / "gallery.png", names, columns=3)
    asked = replace(options, retrieval_prompts=names)

    result = check_pipeline(reference, source, FP32, asked, gallery=gallery)
    assert result.retrieval == (1.0, 1.0)
    candidate = misbehaving(source, "unet", "shifted by one pixel")
    lost = check_pipeline(reference, candidate, FP32, asked, gallery=gallery)
    assert lost.retrieval is not None and lost.retrieval[0] == 1.0
    points = next(c for c in lost.comparisons(FP32) if c.metric == "retrieval_points")
    assert points.measured == pytest.approx(100 * (1 - lost.retrieval[1]))


def test_retrieval_of_a_reference_that_finds_nothing_is_unverified_not_passed(source, reference, options, tmp_path):
    sheet = np.zeros((32, 96, 3), np.uint8)
    sheet[:, :32], sheet[:, 32:64], sheet[:, 64:] = (0, 255, 0), (0, 0, 0), 128  # every image is nearest to grey
    Image.fromarray(sheet).save(tmp_path / "gallery.png")
    gallery = Gallery.load(tmp_path / "gallery.png", ("a cat", "a dog", "a bus"), columns=3)
    asked = replace(options, retrieval_prompts=("a cat", "a dog"))
    result = verify(reference, source, FP32, Effort("full", asked), gallery)
    assert result.pipeline.retrieval == (0.0, 0.0)
    assert not result.broken and not result.ok
    assert result.unverified[0].startswith("retrieval: the reference itself generates only 0.0%")
