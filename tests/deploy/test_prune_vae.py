"""`--prune-vae`: both halves of an autoencoder made narrower, what they learn again, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from deploy.building.prune_folder import prune_folder
from deploy.building.run_build import run_build
from deploy.core.plan import Skip, Step, Unavailable
from deploy.core.spec import BuildSpec
from deploy.passes.prune_vae import PruneVae
from deploy.passes.recover import Recover
from deploy.pruning.recovery.training_loop import Training
from deploy.pruning.shrink.widths import config_of, levels_of, uniform_widths
from deploy.pruning.teacher.original import Teacher
from exporters.source.networks import torch_component
from runtimes.bundle.roles import Role
from runtimes.errors import InputError, ParityError
from tests.deploy.conftest import Cli, assert_nothing_left, assert_refused
from tests.deploy.test_pass_prune import LENIENT
from tests.deploy.test_recovery import Interrupted
from tests.parity.pipelines import write_model

pytestmark = pytest.mark.usefixtures("own_cache")

HALVES = {"vae_encoder": Role.IMAGE_ENCODER, "vae_decoder": Role.IMAGE_DECODER}

needs_torch_pruning = pytest.mark.skipif(
    util.find_spec("torch_pruning") is None, reason="test_pass_prune's first test says what is missing")


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                         up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4).eval().requires_grad_(False)


def latents(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def macs(module: torch.nn.Module, example: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(example)
    return counter.get_total_flops() // 2


def narrowed(network: AutoencoderKL, ratio: float = 0.5) -> AutoencoderKL:
    from deploy.pruning.shrink.importance import scorer_of
    from deploy.pruning.shrink.structured import prune_network

    widths = uniform_widths(levels_of(config_of(network), "vae"), ratio, "vae")
    feeds = {Role.IMAGE_ENCODER: [torch.rand(1, 3, 8, 8)], Role.IMAGE_DECODER: [torch.rand(1, 4, 4, 4)]}
    return prune_network(network, feeds, widths, scorer_of("taylor"), "vae")


def learning(half: str, folder: Path, steps: int, **more) -> Training:
    """A half whose last convolution is wrong, learning from the whole one."""
    from deploy.pruning.narrow_autoencoder import HalfDistillation, HalfRecipe

    network = autoencoder()
    student = copy.deepcopy(network)
    getattr(student, half.removeprefix("vae_")).conv_out.weight.mul_(0.5)
    decoder, encoder = torch_component(Role.IMAGE_DECODER, network), torch_component(Role.IMAGE_ENCODER, network)
    recipe = HalfRecipe(steps, **more)
    task = HalfDistillation(torch_component(HALVES[half], student), decoder, encoder if half == "vae_encoder" else None,
                            latents(), recipe)
    return Training(task, recipe, folder)


def test_it_is_planned_when_asked_for_and_reads_what_decides_its_result(source):
    assert isinstance(PruneVae().plan(source.manifest, BuildSpec(prune=0.3)), Skip)
    step = PruneVae().plan(source.manifest, BuildSpec(prune_vae=0.3))
    assert isinstance(step, Step)
    assert step.reads == {half: (half, "unet", "text_encoder") for half in HALVES}, "the original U-Net generates"
    assert isinstance(Recover().plan(source.manifest, BuildSpec(prune_vae=0.3, recover=5)), Skip), "no U-Net recovers"
    plain = PruneVae().plan(source.manifest, BuildSpec(prune_vae=0.3, prune_method="l2"))
    assert isinstance(plain, Step) and plain.reads == {half: (half,) for half in HALVES}, "magnitudes need no image"
    learned = PruneVae().plan(source.manifest, BuildSpec(prune_vae=0.3, prune_method="l2", recover=5))
    assert isinstance(learned, Step) and learned.reads == step.reads


def test_without_torch_pruning_its_package_is_named(source, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    planned = PruneVae().plan(source.manifest, BuildSpec(prune_vae=0.3))
    assert isinstance(planned, Unavailable) and "ldm-deploy[prune]" in planned.fix


def test_a_build_that_does_not_ask_for_it_keeps_its_digest():
    assert "prune_vae" not in BuildSpec(prune=0.3).resolved()
    assert BuildSpec(prune_vae=0.3).resolved()["prune_vae"] == 0.3


@pytest.mark.parametrize(("change", "words"), [
    ({"class_name": "VQModel"}, "the autoencoder is VQModel.*it can prune AutoencoderKL only"),
    ({"class_name": "AutoencoderTiny"}, "the autoencoder is AutoencoderTiny.*it can prune AutoencoderKL only"),
    ({"format": "onnx"}, "expected safetensors.*before export"),
])
def test_another_autoencoder_or_a_wrong_order_is_refused(source, change, words):
    components = {name: dataclasses.replace(c, **change) if name in HALVES else c
                  for name, c in source.manifest.components.items()}
    with pytest.raises(InputError, match=words):
        PruneVae().plan(dataclasses.replace(source.manifest, components=components), BuildSpec(prune_vae=0.3))


def test_a_model_that_cannot_generate_from_text_learns_what_works(source):
    components = {name: c for name, c in source.manifest.components.items() if name != "text_encoder"}
    silent = dataclasses.replace(source.manifest, components=components)
    with pytest.raises(InputError, match=r"no text_encoder to generate with.*--prune-method l2 and without --recover"):
        PruneVae().plan(silent, BuildSpec(prune_vae=0.3))
    assert isinstance(PruneVae().plan(silent, BuildSpec(prune_vae=0.3, prune_method="l2")), Step)


@needs_torch_pruning
def test_both_halves_do_less_work_each_with_channels_of_its_own(tmp_path):
    from deploy.pruning.narrow_autoencoder import accumulate_cycle_gradients

    network = autoencoder()
    for layer in network.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            layer.bias.copy_(torch.arange(len(layer.bias)) / 100)  # numbers the channels
    accumulate_cycle_gradients(network, latents())
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    assert all(gradients[f"{half}.conv_in.weight"].abs().max() > 0 for half in ("encoder", "decoder"))
    smaller = narrowed(network)
    smaller.save_pretrained(tmp_path)
    loaded, report = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and list(loaded.config.block_out_channels) == [8, 16]
    for half, example in (("vae_decoder", latents(1)), ("vae_encoder", torch.rand(1, 3, 16, 16))):
        after, before = (torch_component(HALVES[half], part) for part in (loaded, network))
        assert macs(after, example) < 0.4 * macs(before, example)
        assert after(example)[0].shape == before(example)[0].shape
    kept = [getattr(loaded, half).mid_block.resnets[0].norm1.bias * 100 for half in ("encoder", "decoder")]
    assert not torch.equal(*kept)
    for half, channels in zip(("encoder", "decoder"), kept, strict=True):
        before = getattr(network, half).mid_block.resnets[0].norm1.weight[channels.round().long()]
        assert torch.equal(getattr(loaded, half).mid_block.resnets[0].norm1.weight, before)
    assert torch.equal(loaded.post_quant_conv.weight, network.post_quant_conv.weight)


@pytest.mark.parametrize("half", HALVES)
def test_a_half_comes_nearer_to_the_original(half, tmp_path):
    training = learning(half, tmp_path, 30, warmup=3, ema=0.8, learning_rate=2e-3)
    (other,) = HALVES.keys() - {half}
    untouched = torch_component(HALVES[other], autoencoder()).state_dict()
    errors: list[float] = []
    network = training.run(lambda step, error: errors.append(error))
    assert sum(errors[-3:]) < 0.3 * sum(errors[:3]), errors
    assert not any(p.requires_grad for p in network.parameters())
    assert set(network.state_dict()).isdisjoint(untouched), "it holds no weight of the other half"


@pytest.mark.parametrize("half", HALVES)
def test_an_interrupted_half_ends_as_if_it_had_not_been_interrupted(half, tmp_path):
    whole = learning(half, tmp_path / "whole", 6, warmup=2).run()

    def kill(step, error):
        if step == 3:
            raise Interrupted

    first = learning(half, tmp_path / "cut", 6, warmup=2)
    with pytest.raises(Interrupted):
        first.run(kill)
    first.save()
    second = learning(half, tmp_path / "cut", 6, warmup=2)
    assert second.step == 3
    resumed = second.run().state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_images_larger_than_a_crop_are_learned_from_in_parts(tmp_path):
    task: Any = learning("vae_decoder", tmp_path, 1, crop=5).task
    generated = [task.generated(number) for number in (0, 1, 0)]
    assert generated[0].shape == (4, 4, 5, 5)
    assert torch.equal(generated[0], generated[2]) and not torch.equal(generated[0], generated[1]), (
        "a batch follows from its number")
    everything = latents().unfold(2, 5, 1).unfold(3, 5, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    crops = torch.cat([generated[0][:2], generated[0][2:].flip(3)])
    found = [(everything == crop).flatten(1).all(1).any() for crop in crops]
    assert all(found), "two as they are, two mirrored"


@needs_torch_pruning
def test_an_autoencoder_alone_is_built_narrower_and_recovered(tiny_model: Path, tmp_path: Path, monkeypatch):
    from deploy.pruning import narrow_autoencoder as module

    monkeypatch.setattr(module, "SCORED", 2)
    monkeypatch.setattr(module, "LEARNED", 3)
    monkeypatch.setattr(module, "JUDGED", 2)
    loads, load = [], Teacher.load

    def counted(*arguments: Any) -> Teacher:
        loads.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(Teacher, "load", counted)
    spec = BuildSpec(model=str(tiny_model), prune_vae=0.25, recover=3, budget=LENIENT)
    outcome = run_build(spec, tmp_path / "b")
    manifest = outcome.bundle.manifest
    assert [p.name for p in manifest.passes] == ["load", "prune-vae", "export", "optimize"]
    assert len(loads) == 1, "both halves learn from the same images"
    plain = run_build(BuildSpec(model=str(tiny_model), verify="no"), tmp_path / "plain").bundle.manifest
    for half in HALVES:
        component, before = manifest.components[half], plain.components[half]
        assert (component.inputs, component.outputs) == (before.inputs, before.outputs)
        assert (component.graph.macs or 0) < 0.85 * (before.graph.macs or 0)
        assert component.details.recovery and component.details.recovery.steps == 3
        pruning = component.details.pruning
        assert pruning is not None and component.parameters < 0.8 * pruning.parameters_before
        assert pruning.channels is not None and pruning.channels.remaining == (8, 12, 12)
    assert manifest.components["unet"].files == plain.components["unet"].files
    lost = {p["name"]: p["relative_l2"] for p in manifest.measured["passes"] if "relative_l2" in p}
    for half in HALVES:
        assert lost["prune-vae"][half] > 1e-3, "compared with the original"
        assert lost["export"][half] < 1e-4, "compared with the recovered autoencoder"
    assert manifest.parity is not None and run_build(spec, tmp_path / "b").up_to_date


@needs_torch_pruning
def test_both_networks_are_pruned_in_one_go_and_diffusers_loads_the_folder(tmp_path: Path):
    model, folder = write_model(tmp_path / "model"), tmp_path / "pruned"
    spec = BuildSpec(model=str(model), prune=0.4, prune_vae=0.25, prune_method="l2", budget=LENIENT)
    components = prune_folder(spec, folder)
    assert sorted(components) == ["unet", "vae_decoder", "vae_encoder"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    original = StableDiffusionPipeline.from_pretrained(model)
    assert pipeline.unet.num_parameters() < 0.8 * original.unet.num_parameters()
    assert list(pipeline.vae.config.block_out_channels) == [8, 12, 12]
    assert pipeline.vae.config.scaling_factor == original.vae.config.scaling_factor
    parts = [components[half].parameters for half in HALVES]
    assert pipeline.vae.num_parameters() == sum(parts)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a b", num_inference_steps=2, height=32, width=32, output_type="np").images.shape == (1, 32, 32, 3)


@needs_torch_pruning
def test_the_folder_has_of_each_half_what_that_half_learned(tiny_model: Path, tmp_path: Path, monkeypatch):
    from deploy.pruning import narrow_autoencoder as module

    monkeypatch.setattr(module, "LEARNED", 3)
    monkeypatch.setattr(module, "JUDGED", 2)
    options: dict[str, Any] = {"model": str(tiny_model), "prune_vae": 0.25, "prune_method": "l2", "verify": "no"}
    prune_folder(BuildSpec(**options), tmp_path / "pruned")
    prune_folder(BuildSpec(**options, recover=2), tmp_path / "recovered")
    before, after = (load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors")
                     for name in ("pruned", "recovered"))
    assert before.keys() == after.keys()
    for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."):
        weights = [key for key in before if key.startswith(part) and key.endswith("weight")]
        assert weights and not all(torch.equal(before[key], after[key]) for key in weights), part


@needs_torch_pruning
def test_an_autoencoder_beyond_the_budget_stops_the_build_and_names_the_pass(tiny_model: Path, tmp_path: Path):
    spec = BuildSpec(model=str(tiny_model), prune_vae=0.25, prune_method="l1", budget={"component_relative_l2": 1e-4})
    with pytest.raises(ParityError) as caught:
        run_build(spec, tmp_path / "b")
    assert "prune-vae" in str(caught.value.where) and "vae_" in str(caught.value.where)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("ratio", ["1.5", "1", "-0.1", "nan"])
def test_a_ratio_out_of_range_is_one_clear_line(cli: Cli, tmp_path: Path, ratio: str):
    assert_refused(cli("prune", "--prune-vae", ratio, "-o", tmp_path / "out"), "prune_vae")
    assert not (tmp_path / "out").exists()


@needs_torch_pruning
@pytest.mark.parametrize(("ratio", "words"), [
    ("0.9", ["0.9 of the 16 channels of level 1 leaves fewer than the 8", "prune 0.62 or less"]),
    ("0.01", ["removes nothing", "prune 0.10 or more"]),
])
def test_a_ratio_that_does_not_fit_names_one_that_does(cli: Cli, tiny_model: Path, tmp_path: Path, ratio: str, words):
    result = cli("build", tiny_model, "--prune-vae", ratio, "-o", tmp_path / "out")
    assert result.code == 2 and not (tmp_path / "out").exists()
    for word in ("vae", *words):
        assert word in result.err.splitlines()[-1]
