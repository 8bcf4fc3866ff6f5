"""Build specs: options, YAML, ranges, and the one clear line for each mistake."""

import re
from pathlib import Path
from typing import Any

import pytest

from deploy.core.spec import NEEDS, BuildSpec, covering, make_spec, parse_budget, parse_engine, parse_shapes
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError


def test_shapes_may_come_in_one_option_or_in_several():
    expected = {"batch": ShapeRange(1, 2, 8), "height": ShapeRange(64, 64, 64)}
    assert parse_shapes(["batch=1:2:8,height=64"]) == [expected]
    assert parse_shapes(["batch=1:2:8", "height=64"]) == [expected]


@pytest.mark.parametrize(
    ("option", "complaint"),
    [("batch", "not axis"), ("batch=1:2", "not a range"), ("batch=a:b:c", "not a range"), ("batch=3:2:1", "min <= opt"),
     ("batch=0", "min <= opt"), ("batch=-1:2:3", "not a range")],
)
def test_a_wrong_range_is_one_clear_line(option: str, complaint: str):
    with pytest.raises(InputError, match=complaint):
        parse_shapes([option])


def test_options_win_over_the_file(tmp_path: Path):
    file = tmp_path / "build.yaml"
    file.write_text("target: onnxruntime\nprecision: fp16\nshapes: {batch: '1:2:4'}\n")
    spec = make_spec({"precision": "fp32"}, file)
    assert (spec.precision, spec.shapes["batch"]) == ("fp32", ShapeRange(1, 2, 4))


def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path):
    file = tmp_path / "build.yaml"
    file.write_text("precison: fp16\n")
    with pytest.raises(InputError, match="did you mean precision") as caught:
        make_spec({}, file)
    assert caught.value.where == str(file)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\xff"])
def test_an_unreadable_spec_is_bad_input(tmp_path: Path, text: str):
    file = tmp_path / "build.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError):
        make_spec({}, file)


def test_an_unknown_target_is_bad_input():
    with pytest.raises(InputError, match="target"):
        make_spec({"target": "coreml"})


def test_options_that_do_not_fit_together_are_refused_in_our_words_alone():
    with pytest.raises(InputError) as error:
        make_spec({"text_encoder_bits": 4})
    assert error.value.what == "text_encoder_bits needs --precision int8 or auto; without, it would change nothing"


def test_budget_options_are_numbers():
    assert parse_budget(["image_psnr_db=40,image_ssim=0.9"]) == {"image_psnr_db": 40.0, "image_ssim": 0.9}
    with pytest.raises(InputError, match="not name=number"):
        parse_budget(["image_psnr_db=high"])


def test_the_resolved_spec_holds_no_local_folder():
    assert "/somewhere" not in str(make_spec({"model": "/somewhere/model"}).resolved())


def test_an_axis_that_comes_again_begins_the_next_profile():
    profiles = parse_shapes(["height=64,batch=1", "batch=4:4:8"])
    first = {"height": ShapeRange(64, 64, 64), "batch": ShapeRange(1, 1, 1)}
    assert profiles == [first, {"batch": ShapeRange(4, 4, 8)}]
    assert covering(profiles) == {"height": ShapeRange(64, 64, 64), "batch": ShapeRange(1, 1, 8)}


def test_profiles_and_engine_options_are_for_engines_alone():
    profiles = ({"batch": "1:1:1"}, {"batch": "4:4:8"})
    assert make_spec({"target": "tensorrt", "profiles": profiles}).profiles[1] == {"batch": ShapeRange(4, 4, 8)}
    for options in ({"profiles": profiles}, {"engine": {"static": True}}):
        with pytest.raises(InputError, match="needs --target tensorrt or tensorrt-rtx"):
            make_spec(options)


def test_engine_options_are_yaml_scalars():
    made = parse_engine(["optimization_level=5", "static=true", "capabilities=SM86+SM89"])
    assert made == {"optimization_level": 5, "static": True, "capabilities": "SM86+SM89"}
    with pytest.raises(InputError, match="not name=value"):
        parse_engine(["static"])


def test_the_target_decides_the_precision_that_is_not_asked_for():
    assert {t: BuildSpec(target=t).precision for t in ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime")} == {
        "tensorrt": "fp16", "tensorrt-rtx": "fp16", "openvino": "fp32", "onnxruntime": "fp32"}
    assert BuildSpec(target="tensorrt", precision="fp32").precision == "fp32"


# ---- every option is honoured or refused by name ---------------------------------------------------------------

# Fields that every build uses, or that say what they need in a validator of their own.
ALWAYS = {"model", "target", "precision", "shapes", "lora", "lora_mode", "embedding", "vae", "opset", "verify",
          "step_cache", "safety_checker", "prune", "prune_vae", "prune_blocks", "mask", "recover", "recover_prompts",
          "variant", "revision", "device", "hoist"}
OTHER_VALUES: dict[str, Any] = {
    "profiles": ({"batch": "1:1:1"},), "engine": {"static": True}, "keep": ("conv_in",), "quantization": "static",
    "text_encoder_bits": 4, "quantization_methods": ("smoothquant",), "smoothquant_alpha": 0.7,
    "calibration_prompts": ("a cat",), "calibration_samples": 16, "range_estimator": "minmax", "cpu": "avx2",
    "prune_method": "l1", "prune_widths": "sensitivity", "recover_batch": 8,
}


def test_every_field_is_used_by_every_build_or_says_what_it_needs():
    assert set(BuildSpec.model_fields) == ALWAYS | set(NEEDS) and not ALWAYS & set(NEEDS)
    assert set(NEEDS) - {"budget", "prompts", "prune_candidates"} == set(OTHER_VALUES)


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_an_option_that_a_plain_build_does_not_honour_is_refused_by_name(name: str):
    with pytest.raises(InputError) as caught:
        make_spec({name: OTHER_VALUES[name]})
    assert caught.value.what.startswith(f"{name} needs --")


INT8, PRUNED = {"precision": "int8"}, {"prune": 0.3}


@pytest.mark.parametrize(("options", "name"), [
    ({"target": "tensorrt", "precision": "fp32", "keep": ("a",)}, "keep"),
    ({**INT8, "quantization": "weight-only", "calibration_samples": 16}, "calibration_samples"),
    ({**INT8, "quantization": "dynamic", "range_estimator": "minmax"}, "range_estimator"),
    ({**INT8, "quantization": "dynamic", "quantization_methods": ("split-skips",)}, "quantization_methods"),
    ({**INT8, "quantization": "weight-only", "calibration_prompts": ("a",)}, "calibration_prompts"),
    ({**INT8, "smoothquant_alpha": 0.7}, "smoothquant_alpha"),
    ({**INT8, "target": "tensorrt-rtx", "cpu": "avx2"}, "cpu"),
    ({"verify": "no", "budget": {"image_ssim": 0.5}}, "budget"),
    ({"verify": "no", "prompts": ("a cat",)}, "prompts"),
    ({"verify": "no", "prune_candidates": (0.3, 0.2)}, "prune_candidates"),
    ({"prune_blocks": "base", "prune_method": "l1"}, "prune_method"),
    ({"prune_vae": 0.3, "prune_widths": "sensitivity"}, "prune_widths"),
    ({"prune_vae": 0.3, "recover": 3, "recover_batch": 8}, "recover_batch"),
    ({**PRUNED, "recover_batch": 8}, "recover_batch"),
])
def test_an_option_is_refused_where_the_others_leave_it_without_effect(options: dict[str, Any], name: str):
    with pytest.raises(InputError, match=f"{name} needs") as caught:
        make_spec(options)
    assert "would change nothing" in caught.value.what


@pytest.mark.parametrize("options", [
    {}, {"quantization": "hybrid", "range_estimator": "mse", "cpu": "auto", "calibration_samples": 128},
    {**INT8, "quantization_methods": ("smoothquant",), "smoothquant_alpha": 0.7, "cpu": "avx2", "keep": ("a",)},
    {"precision": "auto", "quantization": "weight-only", "calibration_samples": 16, "range_estimator": "minmax",
     "quantization_methods": ("bias-correction",), "prompts": ("a",), "verify": "no", "budget": {"image_ssim": 0.5}},
    {**INT8, "verify": "no", "budget": {"component_relative_l2": 0.2}},
    {"target": "auto", **INT8, "cpu": "vnni"}, {"target": "tensorrt", "keep": ("a",)},
    {"prune_vae": 0.3, "prune_method": "l1"}, {**PRUNED, "recover": 4, "recover_batch": 8},
    {"prune_candidates": (0.3, 0.2), "prune_widths": "sensitivity"},
])
def test_defaults_are_silent_and_what_is_honoured_is_taken(options: dict[str, Any]):
    made = make_spec(options)
    assert all(getattr(made, name) == value for name, value in options.items())


def test_an_unknown_budget_is_refused_with_the_spec_and_the_nearest_named():
    with pytest.raises(InputError, match="unknown parity budget 'psnr'") as caught:
        make_spec({"budget": {"psnr": 40}})
    assert "image_psnr_db" in caught.value.fix


@pytest.mark.parametrize("value", ["[", "{a", "'", "2020-99-99", "!!python/object:os.system x", "\x07"])
def test_an_engine_option_that_is_no_yaml_is_named(value: str):
    with pytest.raises(InputError, match="its value is not YAML") as caught:
        parse_engine([f"optimization_level={value}"])
    assert caught.value.where == "--engine"


@pytest.mark.parametrize("engine", [{"static": "maybe"}, {"keep_graph": 1}])
def test_a_switch_of_the_engine_is_true_or_false(engine: dict[str, Any]):
    with pytest.raises(InputError, match="expected true or false"):
        make_spec({"target": "tensorrt", "engine": engine})


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfprecision: fp16\r\n", "\ufeffprecision: fp16\n".encode("utf-16-le"),
                                     "precision: fp16\n".encode("utf-16")])
def test_a_spec_may_have_a_byte_order_mark_and_windows_line_ends(tmp_path: Path, content: bytes):
    (tmp_path / "s.yaml").write_bytes(content)
    assert make_spec({}, tmp_path / "s.yaml").precision == "fp16"


@pytest.mark.parametrize("text", ["1: 2\n", "? [a]\n: b\n", "a: &x [*x", "2020-99-99: 1", "- - -", "just words"])
def test_a_spec_that_is_no_mapping_says_how_one_is_written(tmp_path: Path, text: str):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        make_spec({}, tmp_path / "s.yaml")
    assert "`precision: fp16`" in caught.value.fix


def test_documents_that_error_texts_name_are_there(root: Path):
    """`docs/NAME.md` exists; README's sections are not cited by name at all, since nothing would keep the name true."""
    for package in ("deploy", "runtimes", "exporters", "calibration"):
        for file in (root / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for name in re.findall(r"docs/[\w-]+\.md", text):
                assert (root / name).is_file(), f"{file} names {name}"
            assert not re.search(r"see README, '", text), file
