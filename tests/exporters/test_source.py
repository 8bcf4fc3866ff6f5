"""A pipeline folder is read without torch, and every kind of damage is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.source import link_component, open_source
from runtimes.errors import InputError
from tests.exporters.pipelines import edit_json

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_reads_configs_and_finds_weights(pristine: Path) -> None:
    source = open_source(pristine)
    assert source.pipeline_class == "StableDiffusionPipeline"
    assert set(source.components) == {"text_encoder", "unet", "vae"}
    assert source.components["unet"].class_name == "UNet2DConditionModel"
    assert source.components["unet"].config["block_out_channels"] == [16, 32]
    assert source.scheduler_config["prediction_type"] == "v_prediction"
    assert UNET_WEIGHTS in source.weight_files()
    assert source.components["text_encoder"].headers()["final_layer_norm.bias"] == ("F32", (24,))


def test_imports_nothing_heavy(pristine: Path, run_python: Callable[..., str]) -> None:
    code = ("import sys; from exporters.source import open_source; s = open_source(sys.argv[1]);"
            "s.family.components(s, {}); s.family.facts(s); print(sorted({'torch', 'diffusers', 'transformers', 'onnx',"
            "'onnxscript', 'onnx_ir', 'onnxruntime', 'safetensors'} & set(sys.modules)))")
    assert run_python(code, pristine).strip() == "[]"


def remove(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def pickle_only(folder: Path) -> None:
    (folder / UNET_WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def index(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model_index.json", **changes)


def lost_shard(folder: Path) -> None:
    (folder / UNET_WEIGHTS).unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"conv_in.bias": "diffusion_pytorch_model-00001-of-00002.safetensors"}}))


def two_variants(folder: Path) -> None:
    shutil.copy(folder / UNET_WEIGHTS, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / UNET_WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")


@pytest.mark.parametrize(("damage", "words"), [
    (shutil.rmtree, ("no such folder", "diffusers pipeline folder")),
    (remove("model_index.json"), ("holds no model_index.json", "save_pretrained")),
    (write("model_index.json", b"{"), ("not valid JSON", "model_index.json")),
    (write("unet/config.json", b"\xff\xfe"), ("not valid JSON", "unet/config.json")),
    (write("unet/config.json", b"[]"), ("expected a JSON object", "unet/config.json")),
    (index(_class_name="StableDiffusionPipelin"),
     ("unknown pipeline class 'StableDiffusionPipelin'", "nearest: StableDiffusionPipeline;", "known: ")),
    (index(_class_name="Q"), ("unknown pipeline class 'Q'", "(known: ")),
    (index(unet=...), ("unet is missing", "model_index.json")),
    (index(unet=["my_code", "UNet"]), ("library 'my_code'", "never run")),
    (remove("vae"), ("the folder vae is missing",)),
    (remove("vae/config.json"), ("config.json is missing", "/vae")),
    (remove("scheduler/scheduler_config.json"), ("scheduler_config.json is missing",)),
    (remove(UNET_WEIGHTS), ("no .safetensors file", "/unet")),
    (cut(UNET_WEIGHTS, 5), ("truncated", UNET_WEIGHTS)),
    (cut(UNET_WEIGHTS, 500), ("truncated inside its header", UNET_WEIGHTS)),
    (cut(UNET_WEIGHTS, -1), ("truncated", "its header says", UNET_WEIGHTS)),
    (write(UNET_WEIGHTS, b"\x10" + b"\0" * 7 + b"not json at all!"), ("its header is damaged",)),
    (write(UNET_WEIGHTS, b"\xff" * 64), ("not a safetensors file",)),
    (pickle_only, ("pickle (diffusion_pytorch_model.bin)", "refused", "safe_serialization=True")),
    (lost_shard, ("the shard diffusion_pytorch_model-00001-of-00002.safetensors is missing",)),
    (two_variants, ("several variants", "fp16", "non_ema")),
])
def test_damage_is_one_clear_line(damage: Callable[[Path], None], words: tuple[str, ...], pipeline: Path) -> None:
    damage(pipeline)
    with pytest.raises(InputError) as caught:
        open_source(pipeline)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_variant_is_taken_when_it_is_the_only_one(pipeline: Path) -> None:
    variant = pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    (pipeline / UNET_WEIGHTS).rename(variant)
    assert open_source(pipeline).components["unet"].weights == (variant,)


def test_plain_weights_win_over_a_variant(pipeline: Path) -> None:
    shutil.copy(pipeline / UNET_WEIGHTS, pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert open_source(pipeline).components["unet"].weights == (pipeline / UNET_WEIGHTS,)


def test_component_is_linked_under_canonical_names(pristine: Path, tmp_path: Path) -> None:
    component = open_source(pristine).components["unet"]
    files = link_component(component, tmp_path / "unet")
    assert [f.name for f in files] == ["config.json", "model.safetensors"]
    assert files[1].read_bytes() == component.weights[0].read_bytes()


def test_shards_are_linked_with_their_index(pipeline: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from exporters.modules import load_module

    whole = load_file(pipeline / UNET_WEIGHTS)
    keys = sorted(whole)
    names = {key: f"diffusion_pytorch_model-0000{1 + (i > 40)}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({k: whole[k].clone() for k in keys if names[k] == name}, pipeline / "unet" / name)
    (pipeline / UNET_WEIGHTS).unlink()
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    component = open_source(pipeline).components["unet"]
    files = link_component(component, tmp_path / "unet")
    assert [f.name for f in files] == ["config.json", "model.safetensors.index.json",
                                       "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    loaded = load_module(tmp_path / "unet", component.library, component.class_name).state_dict()
    assert all(torch.equal(loaded[key], whole[key]) for key in keys)
