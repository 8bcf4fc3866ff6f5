"""Build specs: options, YAML, ranges, and the one clear line for each mistake."""

from pathlib import Path

import pytest

from deploy.spec import BuildSpec, covering, make_spec, parse_budget, parse_engine, parse_shapes
from runtimes.errors import InputError
from runtimes.tensors import ShapeRange


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


def test_options_that_do_not_fit_together_are_told_in_our_words_alone():
    with pytest.raises(InputError) as error:
        make_spec({"text_encoder_bits": 4})
    assert error.value.what == "text_encoder_bits=4 needs --precision int8 or auto"


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
