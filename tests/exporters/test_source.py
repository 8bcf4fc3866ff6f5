"""A pipeline folder is read without torch, and every kind of damage is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.families.open_source import open_source
from exporters.source.model_folder import link_component
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
    code = ("import sys; from exporters.families.open_source import open_source; s = open_source(sys.argv[1]);"
            "from exporters.families import family_of; family = family_of(s.pipeline_class);"
            "family.components(s, {}); family.roles(s); print(sorted({'torch', 'diffusers', 'transformers', 'onnx',"
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
    (two_variants, ("the variant fp16 and non_ema", "--variant fp16")),
])
def test_damage_is_one_clear_line(damage: Callable[[Path], None], words: tuple[str, ...], pipeline: Path) -> None:
    damage(pipeline)
    with pytest.raises(InputError) as caught:
        open_source(pipeline)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def as_shards(file: Path, change: Callable[[dict], dict] = lambda weights: weights, dotted: str = "") -> Path:
    """The weights of a file once more, as two shards and an index; gives the index."""
    from safetensors.torch import load_file, save_file

    stem, whole = file.name.split(".")[0], change(load_file(file))
    names = {key: f"{stem}{dotted}-0000{1 + (i % 2)}-of-00002.safetensors" for i, key in enumerate(sorted(whole))}
    for name in set(names.values()):
        save_file({k: v.clone() for k, v in whole.items() if names[k] == name}, file.parent / name)
    index = file.parent / f"{stem}.safetensors.index{dotted}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def doubled(weights: dict) -> dict:
    key = min(weights)
    return {**weights, key: 2 * weights[key]}


def test_a_variant_alone_is_not_read_unless_it_is_asked_for(pipeline: Path) -> None:
    variant = pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    (pipeline / UNET_WEIGHTS).rename(variant)
    with pytest.raises(InputError, match=r"no diffusion_pytorch_model\.safetensors, but the variant fp16"):
        open_source(pipeline)
    source = open_source(pipeline, "fp16")
    assert source.components["unet"].weights == (variant,)
    assert source.components["vae"].weights == (pipeline / "vae/diffusion_pytorch_model.safetensors",)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_the_variant_that_is_asked_for_wins(variant: str, pipeline: Path) -> None:
    other = pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(pipeline / UNET_WEIGHTS, other)
    wanted = other if variant else pipeline / UNET_WEIGHTS
    assert open_source(pipeline, variant).components["unet"].weights == (wanted,)


def test_a_variant_that_no_component_has_is_refused(pipeline: Path) -> None:
    with pytest.raises(InputError, match="no weights of the variant 'ema'"):
        open_source(pipeline, "ema")


def test_a_variant_in_shards(pipeline: Path) -> None:
    index = as_shards(pipeline / UNET_WEIGHTS, dotted=".fp16")
    assert open_source(pipeline, "fp16").components["unet"].index == index
    assert open_source(pipeline).components["unet"].index is None


@pytest.mark.parametrize(("file", "index_wins"), [(UNET_WEIGHTS, True), ("text_encoder/model.safetensors", False)])
def test_of_two_equal_forms_the_one_is_read_that_the_library_reads(file: str, index_wins: bool, pipeline: Path) -> None:
    index = as_shards(pipeline / file)
    component = open_source(pipeline).components[file.partition("/")[0]]
    assert (component.index, len(component.weights)) == ((index, 2) if index_wins else (None, 1))


@pytest.mark.parametrize(("file", "chosen"), [
    (UNET_WEIGHTS, "diffusion_pytorch_model.safetensors.index.json"),
    ("text_encoder/model.safetensors", "model.safetensors")])
def test_two_forms_that_disagree_are_refused_by_name(file: str, chosen: str, pipeline: Path) -> None:
    as_shards(pipeline / file, doubled)
    with pytest.raises(InputError, match="disagree about") as caught:
        open_source(pipeline)
    assert caught.value.what.startswith(chosen) and chosen in caught.value.fix


def test_a_file_of_the_other_library_with_other_numbers_is_refused(pipeline: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(doubled(load_file(pipeline / UNET_WEIGHTS)), pipeline / "unet" / "model.safetensors")
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors and model\.safetensors disagree"):
        open_source(pipeline)


def test_a_file_by_the_other_librarys_name_is_not_the_weights(pipeline: Path) -> None:
    (pipeline / UNET_WEIGHTS).rename(pipeline / "unet" / "model.safetensors")
    with pytest.raises(InputError, match=r"no diffusion_pytorch_model\.safetensors: it holds model\.safetensors"):
        open_source(pipeline)


def test_diffusers_and_transformers_read_the_forms_that_we_read(pipeline: Path) -> None:
    """Each library is given two forms with other numbers, and asked which it loaded."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file
    from transformers import CLIPTextModel

    from exporters.quiet import quiet

    for file in (UNET_WEIGHTS, "text_encoder/model.safetensors"):
        as_shards(pipeline / file, doubled)
    with quiet():
        unet = UNet2DConditionModel.from_pretrained(pipeline / "unet").state_dict()
        text = CLIPTextModel.from_pretrained(pipeline / "text_encoder").state_dict()
    single = load_file(pipeline / UNET_WEIGHTS), load_file(pipeline / "text_encoder/model.safetensors")
    key, word = min(single[0]), min(single[1])
    assert torch.equal(unet[key], 2 * single[0][key]), "diffusers reads the shards"
    assert torch.equal(text[word], single[1][word]), "transformers reads the single file"


def test_component_is_linked_under_canonical_names(pristine: Path, tmp_path: Path) -> None:
    component = open_source(pristine).components["unet"]
    files = link_component(component, tmp_path / "unet")
    assert [f.name for f in files] == ["config.json", "model.safetensors"]
    assert files[1].read_bytes() == component.weights[0].read_bytes()


def test_shards_are_linked_with_their_index(pipeline: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from exporters.source.networks import load_module

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
