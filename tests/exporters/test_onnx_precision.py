"""16-bit graphs: what is converted, what stays float32 and why, and what ONNX Runtime's CPU would hide about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.precision import sixteen_bits
from exporters.precision.emulation import emulate
from exporters.precision.sixteen_bits import convert_precision
from runtimes.errors import InputError
from tests.exporters.exporting import relative_l2
from tests.runtimes.fakes import graph

F, H, B = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
node = helper.make_node


def block() -> onnx.ModelProto:
    """A U-Net in small: timestep embedding, two convolutions, group norm, attention; (batch, 4, height, width)."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    nodes = [
        node("Mul", ["timestep", "frequencies"], ["angles"], name="time/angles"),
        node("Sin", ["angles"], ["sine"], name="time/sin"),
        node("MatMul", ["sine", "time_weight"], ["embedding"], name="time/linear"),
        node("Unsqueeze", ["embedding", "last_axes"], ["bias"], name="time/unsqueeze"),
        node("Conv", ["sample", "first"], ["a"], pads=[1] * 4, name="conv_in"),
        node("Add", ["a", "bias"], ["b"], name="add_time"),
        node("InstanceNormalization", ["b", "scale", "shift"], ["c"], name="norm"),
        node("Sigmoid", ["c"], ["d"], name="act"),
        node("Reshape", ["d", "flat"], ["tokens"], name="to_tokens"),
        node("Transpose", ["tokens"], ["keys"], perm=[0, 2, 1], name="keys"),
        node("MatMul", ["keys", "tokens"], ["scores"], name="attention/scores"),
        node("Add", ["scores", "mask"], ["masked"], name="attention/mask"),
        node("Softmax", ["masked"], ["weights"], axis=-1, name="attention/softmax"),
        node("MatMul", ["tokens", "weights"], ["mixed"], name="attention/values"),
        node("Shape", ["sample"], ["shape"], name="shape"),
        node("Reshape", ["mixed", "shape"], ["image"], name="to_image"),
        node("Conv", ["image", "last"], ["out_sample"], pads=[1] * 4, name="conv_out"),
    ]
    constants = {
        "frequencies": np.array([[1.0, 0.1, 0.01, 0.001]], np.float32), "time_weight": weight(4, 4),
        "last_axes": np.array([2, 3], np.int64), "first": weight(4, 4, 3, 3), "last": weight(4, 4, 3, 3),
        "scale": np.ones(4, np.float32), "shift": np.zeros(4, np.float32), "flat": np.array([0, 0, -1], np.int64),
    }
    constants["mask"] = np.where(np.arange(64) < 60, 0, -3e38).astype(np.float32)
    return graph([("sample", F, ["batch", 4, 8, 8]), ("timestep", F, ["batch", 1])],
                 [("out_sample", F, ["batch", 4, 8, 8])], nodes, constants)


@pytest.fixture
def source(tmp_path) -> Path:
    onnx.save(block(), tmp_path / "block.onnx")
    return tmp_path / "block.onnx"


def feeds(batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"sample": rng.standard_normal((batch, 4, 8, 8)).astype(np.float32),
            "timestep": np.linspace(999, 1, batch, dtype=np.float32)[:, None]}


def run(file: Path, values: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, values)[0]


def types_of(file: Path) -> dict[str, int]:
    """Element types of all values as ONNX itself infers them, strictly."""
    model = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True, check_type=True)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in model.graph.initializer}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_converted_graph_is_valid_and_strongly_typed(source, tmp_path, precision):
    convert_precision(source, tmp_path / "low.onnx", precision)
    onnx.checker.check_model(str(tmp_path / "low.onnx"), full_check=True)
    types = types_of(tmp_path / "low.onnx")
    for n in onnx.load(tmp_path / "low.onnx").graph.node:
        if n.op_type in ("Add", "Mul", "MatMul", "Conv"):
            assert len({types[name] for name in n.input}) == 1, n.name


def test_inputs_and_outputs_stay_float32_under_their_names(source, tmp_path):
    convert_precision(source, tmp_path / "low.onnx", "fp16")
    made = onnx.load(tmp_path / "low.onnx").graph
    assert [(v.name, v.type.tensor_type.elem_type) for v in (*made.input, *made.output)] == [
        ("sample", F), ("timestep", F), ("out_sample", F)]


def test_what_is_sensitive_stays_float32_and_is_reported_with_the_reason(source, tmp_path):
    report = convert_precision(source, tmp_path / "low.onnx", "fp16")
    assert report.float32["normalization"] == {"InstanceNormalization": 1}
    assert report.float32["softmax"] == {"Softmax": 1}
    assert report.float32["trigonometric"] == {"Sin": 1}
    assert report.float32["feeds a sine or cosine"] == {"Mul": 1}
    assert report.named["constant outside float16 (up to 3e+38)"] == ("attention/mask",)
    assert report.converted == {"MatMul": 3, "Conv": 2, "Reshape": 2, "Add": 1, "Sigmoid": 1, "Transpose": 1,
                                "Unsqueeze": 1}


def test_float16_agrees_with_float32_within_its_rounding(source, tmp_path):
    convert_precision(source, tmp_path / "low.onnx", "fp16")
    emulate(tmp_path / "low.onnx", tmp_path / "proof.onnx")
    reference = run(source, feeds())
    for file in ("low.onnx", "proof.onnx"):
        assert 1e-6 < relative_l2(run(tmp_path / file, feeds()), reference) < 3e-3


def test_bfloat16_is_proven_by_emulation_since_onnx_runtime_has_no_kernels_for_it(source, tmp_path):
    convert_precision(source, tmp_path / "low.onnx", "bf16")
    assert emulate(tmp_path / "low.onnx", tmp_path / "proof.onnx") > 5
    assert 1e-4 < relative_l2(run(tmp_path / "proof.onnx", feeds()), run(source, feeds())) < 3e-2


def test_storage_halves_the_weights_and_computes_in_float32(tmp_path):
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = graph([("x", F, ["n", 64])], [("y", F, ["n", 64])],
                  [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])],
                  {"w": weight, "b": np.ones(64, np.float32)})
    onnx.save(model, tmp_path / "x.onnx")
    report = convert_precision(tmp_path / "x.onnx", tmp_path / "y.onnx", "fp16", mode="storage")
    assert (report.weight_bytes_before, report.weight_bytes_after) == (64 * 64 * 4 + 256, 64 * 64 * 2 + 256)
    stored = {t.name: t.data_type for t in onnx.load(tmp_path / "y.onnx").graph.initializer}
    assert stored == {"w_fp16": H, "b": F}
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    expected = x @ weight.astype(np.float16).astype(np.float32) + 1
    np.testing.assert_allclose(run(tmp_path / "y.onnx", {"x": x}), expected, rtol=1e-5, atol=1e-4)


def overflowing(tmp_path: Path) -> Path:
    """x * 60000 / 6000: the intermediate value leaves float16 above x = 1.09, no constant does."""
    model = graph([("x", F, ["n"])], [("y", F, ["n"])],
                  [node("Mul", ["x", "k"], ["b"]), node("Mul", ["b", "l"], ["y"])],
                  {"k": np.array([60000], np.float32), "l": np.array([1 / 6000], np.float32)})
    onnx.save(model, tmp_path / "overflow.onnx")
    convert_precision(tmp_path / "overflow.onnx", tmp_path / "low.onnx", "fp16")
    return tmp_path / "low.onnx"


def test_onnx_runtime_hides_an_overflow_that_the_emulation_shows(tmp_path):
    low = overflowing(tmp_path)
    emulate(low, tmp_path / "proof.onnx")
    x = {"x": np.array([1.0, 3.0], np.float32)}
    np.testing.assert_allclose(run(low, x), [10, 30], rtol=1e-3)  # what a GPU would not give
    proof = run(tmp_path / "proof.onnx", x)
    assert np.isclose(proof[0], 10, rtol=1e-3) and np.isinf(proof[1])


def test_weights_outside_float16_stay_float32(tmp_path):
    weight = np.full((4, 4), 1e5, np.float32)
    model = graph([("x", F, ["n", 4])], [("y", F, ["n", 4])],
                  [node("MatMul", ["x", "big"], ["p"], name="too_big"), node("MatMul", ["p", "w"], ["y"], name="fine")],
                  {"big": weight, "w": np.eye(4, dtype=np.float32) / 1e5 + np.float32(0.5)})
    onnx.save(model, tmp_path / "x.onnx")
    report = convert_precision(tmp_path / "x.onnx", tmp_path / "y.onnx", "fp16")
    assert report.named == {"constant outside float16 (up to 1e+05)": ("too_big",)}
    assert {t.name for t in onnx.load(tmp_path / "y.onnx").graph.initializer} == {"big", "w_fp16"}


def test_an_epsilon_that_float16_rounds_away_keeps_its_node_float32(tmp_path):
    model = graph([("x", F, ["n"])], [("y", F, ["n"])],
                  [node("Add", ["x", "eps"], ["s"], name="add_eps"), node("Div", ["x", "s"], ["y"], name="div")],
                  {"eps": np.float32(1e-12)})
    onnx.save(model, tmp_path / "x.onnx")
    report = convert_precision(tmp_path / "x.onnx", tmp_path / "y.onnx", "fp16")
    assert report.named == {"constant below float16's normal range (1e-12)": ("add_eps",)}


def test_conv_in_and_conv_out_stay_float32_when_asked(source, tmp_path):
    report = convert_precision(source, tmp_path / "low.onnx", "fp16", keep_ends=True)
    assert report.float32["first or last convolution"] == {"Conv": 2}


def test_patterns_keep_nodes_by_their_name_or_their_weights(source, tmp_path):
    report = convert_precision(source, tmp_path / "low.onnx", "fp16", keep=("attention/*", "last"))
    assert report.float32["asked for"] == {"MatMul": 2, "Add": 1, "Conv": 1, "Softmax": 1}


def test_a_pattern_that_fits_nothing_names_the_nearest(source, tmp_path):
    with pytest.raises(InputError, match=r"'conv_im' fits no node.*conv_in"):
        convert_precision(source, tmp_path / "low.onnx", "fp16", keep=("conv_im",))


@pytest.mark.parametrize(("precision", "mode"), [("fp8", "compute"), ("fp16", "speed")])
def test_unknown_precisions_and_modes_are_refused(source, tmp_path, precision, mode):
    with pytest.raises(InputError, match="cannot convert"):
        convert_precision(source, tmp_path / "low.onnx", precision, mode=mode)
    assert not (tmp_path / "low.onnx").exists()


def test_quantized_weights_keep_their_integers_and_get_16_bit_scales(tmp_path):
    rng = np.random.default_rng(0)
    model = graph(
        [("x", F, ["n", 8])], [("y", F, ["n", 8])],
        [node("QuantizeLinear", ["x", "xs", "zero"], ["xq"]), node("DequantizeLinear", ["xq", "xs", "zero"], ["xd"]),
         node("DequantizeLinear", ["wq", "ws", "zeros"], ["wd"], axis=1), node("MatMul", ["xd", "wd"], ["y"])],
        {"xs": np.float32(0.02), "zero": np.int8(0), "wq": rng.integers(-63, 63, (8, 8)).astype(np.int8),
         "ws": np.full(8, 0.01, np.float32), "zeros": np.zeros(8, np.int8)})
    onnx.save(model, tmp_path / "x.onnx")
    report = convert_precision(tmp_path / "x.onnx", tmp_path / "y.onnx", "fp16")
    assert report.converted == {"DequantizeLinear": 2, "MatMul": 1, "QuantizeLinear": 1}
    onnx.checker.check_model(str(tmp_path / "y.onnx"), full_check=True)
    x = {"x": rng.standard_normal((4, 8)).astype(np.float32)}
    emulate(tmp_path / "y.onnx", tmp_path / "proof.onnx")
    assert relative_l2(run(tmp_path / "proof.onnx", x), run(tmp_path / "x.onnx", x)) < 1e-2


def test_a_quantization_scale_too_small_for_float16_keeps_its_node(tmp_path):
    model = graph([("x", F, ["n"])], [("y", F, ["n"])],
                  [node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
                   node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq")],
                  {"s": np.float32(1e-6), "z": np.int8(0)})
    onnx.save(model, tmp_path / "x.onnx")
    report = convert_precision(tmp_path / "x.onnx", tmp_path / "y.onnx", "fp16")
    assert report.named == {"quantization scale below float16's normal range (1e-06)": ("dq", "q")}


def test_branches_keep_float32_and_still_see_the_values_around_them(tmp_path):
    taken = helper.make_graph([node("Mul", ["m", "two"], ["t"])], "taken", [],
                              [helper.make_tensor_value_info("t", F, None)])
    other = helper.make_graph([node("Identity", ["m"], ["e"])], "other", [],
                              [helper.make_tensor_value_info("e", F, None)])
    model = graph([("x", F, ["n", 2]), ("c", TensorProto.BOOL, [])], [("y", F, ["n", 2])],
                  [node("MatMul", ["x", "w"], ["m"]), node("If", ["c"], ["i"], then_branch=taken, else_branch=other),
                   node("MatMul", ["i", "w"], ["y"])],
                  {"w": np.eye(2, dtype=np.float32), "two": np.float32(2)})
    onnx.save(model, tmp_path / "x.onnx")
    convert_precision(tmp_path / "x.onnx", tmp_path / "y.onnx", "fp16")
    x = np.array([[1, 2]], np.float32)
    for condition, expected in ((True, 2 * x), (False, x)):
        np.testing.assert_array_equal(run(tmp_path / "y.onnx", {"x": x, "c": np.array(condition)}), expected)


def test_external_weights_stay_external_and_are_never_all_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sixteen_bits, "EXTERNAL_ABOVE_BYTES", 1000)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = graph([("x", F, ["n", 64])], [("y", F, ["n", 64])], [node("MatMul", ["x", "w"], ["y"])], {"w": weight})
    onnx.save(model, tmp_path / "x.onnx", save_as_external_data=True, location="x.onnx.data", size_threshold=0)
    convert_precision(tmp_path / "x.onnx", tmp_path / "out" / "y.onnx", "fp16")
    assert (tmp_path / "out" / "y.onnx.data").stat().st_size == 64 * 64 * 2
    stored = onnx.load(tmp_path / "out" / "y.onnx").graph.initializer[0]
    np.testing.assert_array_equal(numpy_helper.to_array(stored), weight.astype(np.float16))


def test_a_converted_graph_refers_to_nothing_of_its_source(tmp_path):
    onnx.save(block(), tmp_path / "x.onnx", save_as_external_data=True, location="x.onnx.data", size_threshold=100)
    expected = run(tmp_path / "x.onnx", feeds())
    convert_precision(tmp_path / "x.onnx", tmp_path / "out" / "y.onnx", "fp16")
    (tmp_path / "x.onnx.data").unlink()
    assert relative_l2(run(tmp_path / "out" / "y.onnx", feeds()), expected) < 3e-3


def test_an_opset_without_16_bit_operators_is_refused(tmp_path):
    model = helper.make_model(block().graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(InputError, match="opset 11 is too old"):
        convert_precision(tmp_path / "x.onnx", tmp_path / "y.onnx", "fp16")


def test_the_same_graph_gives_the_same_bytes(source, tmp_path):
    for name in ("a.onnx", "b.onnx"):
        convert_precision(source, tmp_path / name, "fp16")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
