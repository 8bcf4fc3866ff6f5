"""A CompVis checkpoint becomes the pipeline it was made of; what does not fit the configs is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.families import family_of
from exporters.families.open_source import open_source
from runtimes.errors import InputError
from runtimes.system.progress import listening
from tests.exporters.compvis import write_single_file
from tests.exporters.family_pipelines import write_pipeline_of
from tests.exporters.pipelines import edit_json, edit_weights
from tests.heard import Heard


@pytest.fixture(scope="module")
def checkpoint(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(pristine, tmp_path_factory.mktemp("single") / "model.safetensors")


@pytest.fixture
def configs(pipeline: Path) -> Path:
    """What a user has offline: a pipeline folder without its weights."""
    for file in pipeline.rglob("*.safetensors"):
        file.unlink()
    return pipeline


def assert_same(folder: Path, original: Path) -> None:
    """Every network has the weights of the original, bit for bit."""
    import torch

    from exporters.source.networks import load_module

    for name, component in open_source(folder).components.items():
        found = load_module(component.folder, component.library, component.class_name).state_dict()
        wanted = load_module(original / name, component.library, component.class_name).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_gives_back_the_pipeline_it_was_made_of(
    checkpoint: Path, configs: Path, pristine: Path, tmp_path: Path
) -> None:
    from exporters.source.single_file import convert_single_file

    out = convert_single_file(checkpoint, configs, tmp_path / "out")
    assert open_source(out).pipeline_class == "StableDiffusionPipeline"
    assert_same(out, pristine)


@pytest.mark.parametrize(("kind", "family", "networks"), [
    ("sd2", "stable-diffusion", {"text_encoder", "unet", "vae"}),
    ("xl", "stable-diffusion-xl", {"text_encoder", "text_encoder_2", "unet", "vae"}),
])
def test_the_layouts_of_stable_diffusion_2_and_xl(kind: str, family: str, networks: set[str], tmp_path: Path) -> None:
    from exporters.source.single_file import convert_single_file

    original = write_pipeline_of(kind, tmp_path / "original")
    checkpoint = write_single_file(original, tmp_path / "model.safetensors", kind)
    configs = Path(shutil.copytree(original, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors")))
    out = convert_single_file(checkpoint, configs, tmp_path / "out")
    source = open_source(out)
    assert family_of(source.pipeline_class).name == family and set(source.components) == networks
    assert_same(out, original)


def other_channels(configs: Path, checkpoint: Path) -> None:
    edit_json(configs / "unet" / "config.json", block_out_channels=[8, 32])


def more_layers(configs: Path, checkpoint: Path) -> None:
    edit_json(configs / "unet" / "config.json", layers_per_block=2)


def deeper_text_encoder(configs: Path, checkpoint: Path) -> None:
    edit_json(configs / "text_encoder" / "config.json", num_hidden_layers=3)


def no_vae(configs: Path, checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("first_stage")})


def adapter(configs: Path, checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda tensors: {"lora_unet_mid.alpha": next(iter(tensors.values()))})


def no_index(configs: Path, checkpoint: Path) -> None:
    (configs / "model_index.json").unlink()


@pytest.mark.parametrize(("damage", "words"), [
    (other_channels, ("the unet of this file is not what the configs describe", "the config asks for", "--configs")),
    (more_layers, ("the unet of this file is not what the configs describe", "--configs")),
    (deeper_text_encoder, ("the text_encoder of this file is not what the configs describe", "layers.2")),
    (no_vae, ("it holds no VAE", "first_stage_model.")),
    (adapter, ("it holds no U-Net", "lora_unet_mid.alpha", "an adapter")),
    (no_index, ("model_index.json is missing",)),
])
def test_what_does_not_fit_is_one_clear_line(
    damage: Callable[[Path, Path], None], words: tuple[str, ...], checkpoint: Path, configs: Path, tmp_path: Path
) -> None:
    from exporters.source.single_file import convert_single_file

    file = Path(shutil.copy(checkpoint, tmp_path / "model.safetensors"))
    damage(configs, file)
    with pytest.raises(InputError) as caught:
        convert_single_file(file, configs, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_never_opened(configs: Path, tmp_path: Path) -> None:
    from exporters.source.single_file import convert_single_file

    file = tmp_path / "model.ckpt"
    file.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(InputError, match="a pickle, which can run code"):
        convert_single_file(file, configs, tmp_path / "out")


def test_a_file_given_as_a_model_learns_how_to_convert(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="`convert` makes one of a single-file checkpoint"):
        open_source(checkpoint)


def test_convert_writes_a_folder_that_build_reads(
    checkpoint: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.cli.commands import main

    out = tmp_path / "out"
    command = ["ldm-deploy", "convert", str(checkpoint), "--configs", str(configs), "-o", str(out)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert str(out) in " ".join(capsys.readouterr()).replace("\n", "")
    assert set(open_source(out).components) == {"text_encoder", "unet", "vae"}


def with_keys(checkpoint: Path, folder: Path, **keys: Any) -> Path:
    """A copy of the file with further tensors."""
    file = Path(shutil.copy(checkpoint, folder / "more.safetensors"))
    edit_weights(file, lambda tensors: {**tensors, **keys})
    return file


def scheduler_of(folder: Path, **changes: Any) -> dict[str, Any]:
    file = folder / "scheduler" / "scheduler_config.json"
    if changes:
        edit_json(file, **changes)
    return json.loads(file.read_text())


@pytest.mark.parametrize(("marker", "wanted"), [
    ("v_pred", {"prediction_type": "v_prediction"}),
    ("ztsnr", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
])
def test_markers_set_the_scheduler(
    marker: str, wanted: dict[str, Any], checkpoint: Path, configs: Path, tmp_path: Path
) -> None:
    import torch

    from exporters.source.single_file import convert_single_file

    scheduler_of(configs, prediction_type="epsilon", rescale_betas_zero_snr=False)
    heard = Heard()
    file = with_keys(checkpoint, tmp_path, **{marker: torch.zeros(0)})
    with listening(heard):
        out = convert_single_file(file, configs, tmp_path / "out")
    assert wanted.items() <= scheduler_of(out).items()
    assert len(heard.said) == 1 and f"the key {marker} sets" in heard.said[0]
    assert scheduler_of(configs)["prediction_type"] == "epsilon", "the configs stay as they were"


def test_a_marker_that_the_scheduler_cannot_honour_is_refused(checkpoint: Path, configs: Path, tmp_path: Path) -> None:
    import torch

    from exporters.source.single_file import convert_single_file

    scheduler_of(configs, _class_name="PNDMScheduler")
    with pytest.raises(InputError, match="ztsnr asks for rescale_betas_zero_snr, which PNDMScheduler does not have"):
        convert_single_file(with_keys(checkpoint, tmp_path, ztsnr=torch.zeros(0)), configs, tmp_path / "out")


def test_a_noise_schedule_in_the_file_agrees_with_the_configs_or_is_refused(
    checkpoint: Path, configs: Path, tmp_path: Path
) -> None:
    from diffusers import DDIMScheduler

    from exporters.source.single_file import convert_single_file

    config = scheduler_of(configs)
    own = DDIMScheduler.from_config(config)
    same = with_keys(checkpoint, tmp_path, betas=own.betas.double(), alphas_cumprod=own.alphas_cumprod,
                     sqrt_alphas_cumprod=own.alphas_cumprod.sqrt())
    assert scheduler_of(convert_single_file(same, configs, tmp_path / "same")) == config
    zero = DDIMScheduler.from_config(config, rescale_betas_zero_snr=True)
    rescaled = with_keys(checkpoint, tmp_path, alphas_cumprod=zero.alphas_cumprod)
    assert scheduler_of(convert_single_file(rescaled, configs, tmp_path / "zero"))["rescale_betas_zero_snr"] is True
    other = DDIMScheduler.from_config(config, beta_end=2 * config["beta_end"])
    with pytest.raises(InputError, match="alphas_cumprod is another noise schedule"):
        convert_single_file(with_keys(checkpoint, tmp_path, alphas_cumprod=other.alphas_cumprod), configs,
                            tmp_path / "other")


def test_leftovers_of_training_are_named(checkpoint: Path, configs: Path, pristine: Path, tmp_path: Path) -> None:
    import torch

    from exporters.source.single_file import convert_single_file

    keys = {"model_ema.diffusion_modelinput_blocks00weight": torch.ones(3), "model_ema.decay": torch.ones(()),
            "first_stage_model.loss.logvar": torch.ones(()), "global_step": torch.ones(()),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(4)}
    heard = Heard()
    with listening(heard):
        out = convert_single_file(with_keys(checkpoint, tmp_path, **keys), configs, tmp_path / "out")
    assert_same(out, pristine)
    for key in ("model_ema.decay", "loss.logvar"):
        assert [line for line in heard.said if key in line]
    assert len(heard.said) == 3


@pytest.mark.parametrize("key", [
    "control_model.input_hint_block.0.weight", "embedding_manager.embedder.cat", "lora_unet_mid.alpha",
    "model.diffusion_model.label_emb.0.0.weight", "first_stage_model.decoder.more.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.9.mlp.fc1.weight", "edm_mean"])
def test_a_key_that_no_network_takes_is_refused_by_its_name(
    key: str, checkpoint: Path, configs: Path, tmp_path: Path
) -> None:
    import torch

    from exporters.source.single_file import convert_single_file

    with pytest.raises(InputError) as caught:
        convert_single_file(with_keys(checkpoint, tmp_path, **{key: torch.ones(2, 2)}), configs, tmp_path / "out")
    assert key.rpartition(".")[0].rpartition(".")[2] in str(caught.value) and not (tmp_path / "out").exists()
