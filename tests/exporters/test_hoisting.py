"""What leaves a step graph: from data dependence alone, at the cheapest place, and with equal results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.hoisting.apart import analyse, content_of, labelled, same_values
from exporters.hoisting.classes import Classes, Inputs, Kind, classify
from exporters.hoisting.cut import CPU, GPU, MOST_BYTES, Speeds, choose_cut, stored_bytes
from exporters.hoisting.dependence import RANDOM
from exporters.hoisting.split import leave_entry, leave_steps
from runtimes.bundle.tensors import Axis, ShapeRange

Arrays = dict[str, np.ndarray[Any, Any]]
AXES = {name: Axis(name, ShapeRange(1, size, 64)) for name, size in
        {"batch": 2, "sequence": 7, "height": 8, "width": 8}.items()}
INPUTS = Inputs("batch", "timestep", frozenset({"context", "pooled"}), frozenset({"time_ids"}), frozenset({"lora"}))
ANYTHING = Speeds(1.0, 1.0, 1.0, 1e15, 1.0, 1e-6)  # each operator costs seconds, and feeding next to nothing
SIZES = {"batch": 3, "sequence": 5, "height": 4, "width": 6}


def graph(body: str, inputs: str, outputs: str = "float[batch, 4] out", weights: str = "") -> bytes:
    """A model in ONNX's text format, its nodes named after what they make."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> net ({inputs}) => ({outputs}) <{weights}> {{ {body} }}')
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def loaded(content: bytes) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(content))


def classes_of(content: bytes) -> tuple[ir.Model, Classes]:
    model = loaded(content)
    return model, classify(model, INPUTS, AXES)


def kinds(content: bytes) -> dict[str, Kind | None]:
    """Each value by name, with when it is known."""
    model, classes = classes_of(content)
    return {value.name or "": classes.kind(value) for node in model.graph for value in node.outputs}


def crossing(content: bytes, speeds: Speeds = ANYTHING) -> dict[str, Kind]:
    model, classes = classes_of(content)
    return {value.name or "": kind for value, kind in choose_cut(model, classes, speeds).items()}


def run(model: ir.Model | bytes, feeds: Mapping[str, Any]) -> Arrays:
    content = model if isinstance(model, bytes) else ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    session = ort.InferenceSession(content)
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, {value.name: feeds[value.name] for value in session.get_inputs()})
    return dict(zip(names, found, strict=True))


def feeds_for(content: bytes) -> Arrays:
    random = np.random.default_rng(0)
    proto = onnx.load_from_string(content).graph
    weights = {tensor.name for tensor in proto.initializer}
    shapes = {value.name: [d.dim_value or SIZES[d.dim_param] for d in value.type.tensor_type.shape.dim]
              for value in proto.input if value.name not in weights}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def composed(content: bytes, feeds: Arrays, speeds: Speeds = ANYTHING) -> tuple[Arrays, ir.Model]:
    """The results of the graphs after hoisting, and the step graph."""
    hoisting = analyse(lambda: loaded(content), INPUTS, AXES, speeds)
    values = dict(feeds)
    for kind in hoisting.takes:
        entry = loaded(content)
        leave_entry(entry, hoisting.of(kind), "batch", "rows")
        assert tuple(value.name for value in entry.graph.inputs) == hoisting.takes[kind]
        values |= run(entry, feeds)
    steps = loaded(content)
    leave_steps(steps, hoisting.values, labelled(steps))
    assert tuple(value.name for value in steps.graph.inputs) == hoisting.remain
    return run(steps, values), steps


def assert_equal(content: bytes, speeds: Speeds = ANYTHING) -> ir.Model:
    feeds = feeds_for(content)
    found, steps = composed(content, feeds, speeds)
    for name, expected in run(content, feeds).items():
        np.testing.assert_array_equal(found[name], expected)
    return steps


SAMPLE, TIMESTEP, CONTEXT = "float[batch, 4] sample", "float[batch] timestep", "float[batch, sequence, 4] context"
TWO = "int64[1] one = {1}"


def test_prompt_schedule_and_both_are_told_apart_by_their_data():
    content = graph("""
        t = Unsqueeze (timestep, one)  a = Sigmoid (t)
        p = Relu (pooled)              both = Add (p, a)
        s = Mul (sample, both)         late = Add (s, p)
        out = Add (late, a)""", f"{SAMPLE}, {TIMESTEP}, float[batch, 4] pooled", weights=TWO)
    found = kinds(content)
    assert {found[name] for name in ("t", "a")} == {Kind.STEP}
    assert found["p"] is Kind.PROMPT and found["both"] is Kind.REQUEST
    assert {found[name] for name in ("s", "late", "out")} == {None}
    assert crossing(content) == {"a": Kind.STEP, "p": Kind.PROMPT, "both": Kind.REQUEST}
    assert_equal(content)


def test_numbers_of_a_request_are_no_prompt():
    found = kinds(graph("n = Relu (time_ids)  out = Add (sample, n)", f"{SAMPLE}, float[batch, 4] time_ids"))
    assert found["n"] is Kind.REQUEST


def test_the_shape_of_the_sample_is_not_its_contents():
    content = graph("""
        rows = Shape <start = 0, end = 1> (sample)
        many = Expand (half, rows)     t = Mul (timestep, many)
        u = Unsqueeze (t, one)         a = Sigmoid (u)
        out = Add (sample, a)""", f"{SAMPLE}, {TIMESTEP}", weights=f"{TWO}, float half = {{0.5}}")
    assert kinds(content)["a"] is Kind.STEP and crossing(content) == {"a": Kind.STEP}
    hoisting = analyse(lambda: loaded(content), INPUTS, AXES, ANYTHING)
    assert hoisting.takes == {Kind.STEP: ("timestep",)}, "rows are counted by the timestep, not by the sample"
    assert_equal(content)


def test_height_and_width_make_a_value_a_requests_and_the_entry_takes_the_sample_for_its_shape():
    content = graph("""
        sizes = Shape <start = 2, end = 4> (sample)   real = Cast <to = 1> (sizes)
        area = ReduceProd <keepdims = 0> (real)       u = Unsqueeze (timestep, one)
        a = Mul (u, area)                             b = Sigmoid (a)
        c = Unsqueeze (b, axes)                       out = Add (sample, c)""",
        f"float[batch, 4, height, width] sample, {TIMESTEP}", "float[batch, 4, height, width] out",
        weights=f"{TWO}, int64[2] axes = {{2, 3}}")
    assert kinds(content)["b"] is Kind.REQUEST and kinds(content)["area"] is None
    hoisting = analyse(lambda: loaded(content), INPUTS, AXES, ANYTHING)
    assert hoisting.takes == {Kind.REQUEST: ("sample", "timestep")}
    feeds = feeds_for(content)
    entry = loaded(content)
    leave_entry(entry, hoisting.values, "batch", "rows")
    zeros = feeds | {"sample": np.zeros_like(feeds["sample"])}
    [name] = [value.name for value in hoisting.values]
    np.testing.assert_array_equal(run(entry, feeds)[name], run(entry, zeros)[name])
    assert_equal(content)


def test_contents_that_decide_a_shape_count_wherever_the_shape_is_read():
    content = graph("""
        whole = Cast <to = 7> (sample)   places = NonZero (whole)   shape = Shape (places)
        real = Cast <to = 1> (shape)     one_number = ReduceSum <keepdims = 0> (real)
        a = Mul (timestep, one_number)   u = Unsqueeze (a, one)     out = Add (sample, u)""",
        f"{SAMPLE}, {TIMESTEP}", weights=TWO)
    assert kinds(content)["a"] is None and crossing(content) == {}


def test_random_numbers_stay():
    content = graph("t = Unsqueeze (timestep, one)  noise = RandomNormalLike (t)  n = Abs (noise)  "
                    "out = Add (sample, n)", f"{SAMPLE}, {TIMESTEP}", weights=TWO)
    model, classes = classes_of(content)
    assert RANDOM in classes.dependences.of(labelled(model)["n"]) and crossing(content) == {}


IF = """
    t = Unsqueeze (timestep, one)  first = ReduceMax <keepdims = 0> (timestep)  yes = Greater (first, zero)
    a = If (yes) <then_branch = yes_graph () => (float[batch, 4] y) {{ y = Add ({read}, t) }},
                  else_branch = no_graph () => (float[batch, 4] n) {{ n = Sub ({read}, t) }}>
    b = Relu (a)  out = Add (sample, b)"""


@pytest.mark.parametrize(("read", "kind"), [("pooled", Kind.REQUEST), ("sample", None)])
def test_an_if_is_taken_whole_with_what_its_branches_read(read: str, kind: Kind | None):
    content = graph(IF.format(read=read), f"{SAMPLE}, {TIMESTEP}, float[batch, 4] pooled",
                    weights=f"{TWO}, float zero = {{0}}")
    assert kinds(content)["b"] is kind
    steps = assert_equal(content)
    assert ("If" in {node.op_type for node in steps.graph}) is (read == "sample" or "a" not in kinds(content))


def test_a_loop_is_taken_whole():
    content = graph("""
        t = Unsqueeze (timestep, one)
        a = Loop (three, yes, t) <body = turn (int64 i, bool on, float[batch, 1] x) => (bool again, float[batch, 1] y)
            { again = Identity (on)  y = Mul (x, t) }>
        out = Add (sample, a)""", f"{SAMPLE}, {TIMESTEP}", weights=f"{TWO}, int64 three = {{3}}, bool yes = {{1}}")
    assert kinds(content)["a"] is Kind.STEP
    assert_equal(content)


def test_a_weight_that_both_sides_read_stays_on_both():
    content = graph("p = MatMul (pooled, w)  s = MatMul (sample, w)  q = Relu (p)  out = Add (s, q)",
                    f"{SAMPLE}, float[batch, 4] pooled", weights=(
                        f"float[4, 4] w = {{{', '.join(str(i / 7) for i in range(16))}}}"))
    assert crossing(content) == {"q": Kind.PROMPT}
    assert "w" in assert_equal(content).graph.initializers


def test_the_cut_lies_where_little_crosses():
    """A row of 4 numbers spread to a million: the numbers cross, and the spreading stays."""
    content = graph("""
        t = Unsqueeze (timestep, one)   a = Sigmoid (t)  b = Mul (a, row)
        c = Unsqueeze (b, axes)         wide = Expand (c, large)  e = Relu (wide)
        s = ReduceMean <keepdims = 0> (e, axes)  out = Add (sample, s)""", f"{SAMPLE}, {TIMESTEP}", weights=(
        f"{TWO}, int64[2] axes = {{2, 3}}, int64[4] large = {{1, 4, 512, 512}}, float[4] row = {{1, 2, 3, 4}}"))
    assert crossing(content) == {"s": Kind.STEP}, "behind the mean there are 4 numbers again"
    read_late = content_with_reader_of_wide()
    assert crossing(read_late, CPU) in ({"b": Kind.STEP}, {}), "a million numbers are not fed at every step"


def content_with_reader_of_wide() -> bytes:
    return graph("""
        t = Unsqueeze (timestep, one)   a = Sigmoid (t)  b = MatMul (a, row)
        c = Unsqueeze (b, axes)         wide = Expand (c, large)
        out = Add (sample, wide)""", f"float[batch, 4, 512, 512] sample, {TIMESTEP}", "float[batch, 4, 512, 512] out",
        weights=(f"{TWO}, int64[2] axes = {{2, 3}}, int64[4] large = {{1, 4, 512, 512}}, "
                 "float[1, 4] row = {1, 2, 3, 4}"))


def test_values_that_are_no_rows_do_not_cross():
    content = graph("t = Unsqueeze (context, zero)  u = Relu (t)  v = Squeeze (u, zero)  m = ReduceMean <keepdims = 0> "
                    "(v, one)  out = Add (sample, m)", f"{SAMPLE}, {CONTEXT}", weights=f"{TWO}, int64[1] zero = {{0}}")
    model, classes = classes_of(content)
    values = labelled(model)
    assert classes.kind_to_cross(values["u"]) is None and classes.kind_to_cross(values["v"]) is Kind.PROMPT
    assert_equal(content)


def attention(wide: int) -> bytes:
    """Keys of a prompt, which a product with the sample reads."""
    weights = f"int64[1] one = {{1}}, float[4, {wide}] w = {{{', '.join(['0.5'] * 4 * wide)}}}"
    return graph("""
        k = MatMul (context, w)  r = Relu (k)  m = ReduceMean <keepdims = 0> (r, one)  q = MatMul (sample, w)
        s = Mul (q, m)  long = Unsqueeze (q, one)  x = Mul (long, r)  y = ReduceMean <keepdims = 0> (x, one)
        out = Add (s, y)""", f"{SAMPLE}, {CONTEXT}", f"float[batch, {wide}] out", weights)


def test_what_takes_too_much_memory_stays():
    content = attention(64)
    model, classes = classes_of(content)
    chosen = choose_cut(model, classes, ANYTHING)
    assert {value.name for value in chosen} == {"r", "m"}
    axes = AXES | {"sequence": Axis("tokens", ShapeRange(1, MOST_BYTES // 128, MOST_BYTES))}
    long = classify(model, INPUTS, axes)
    assert {value.name for value in choose_cut(model, long, ANYTHING)} == {"m"}
    assert all(size <= MOST_BYTES for size in stored_bytes(choose_cut(model, long, ANYTHING), long).values())


def test_a_gpu_computes_the_keys_again():
    """They would go over PCIe at every step; the time embedding's few numbers are fed in any case."""
    assert Kind.PROMPT in crossing(attention(1024), CPU).values()
    large = graph("k = MatMul (context, w)  x = Mul (sample, k)  out = Relu (x)",
                  "float[batch, sequence, 512] sample, float[batch, sequence, 4] context",
                  "float[batch, sequence, 512] out", f"float[4, 512] w = {{{', '.join(['0.5'] * 2048)}}}")
    model = loaded(large)
    axes = AXES | {"sequence": Axis("tokens", ShapeRange(1, 77, 77))}
    assert not choose_cut(model, classify(model, INPUTS, axes), GPU)


def transformer(blocks: int = 3) -> bytes:
    """adaLN as in DiT, Peebles and Xie, arXiv 2212.09748: shift, scale and gate of each block from time and text."""
    nodes = ["t = Unsqueeze (timestep, one)  te = MatMul (t, w1)  pe = MatMul (pooled, w2)  sum = Add (te, pe)",
             "e = Sigmoid (sum)"]
    weights = [TWO, "int64[3] parts = {8, 8, 8}", "int64[1] tokens = {1}"]
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> None:
        numbers = ", ".join(f"{x:.3f}" for x in random.standard_normal(shape).ravel())
        weights.append(f"float[{', '.join(map(str, shape))}] {name} = {{{numbers}}}")

    for name, shape in (("w1", (1, 8)), ("w2", (4, 8)), ("scale", (8,)), ("bias", (8,))):
        weight(name, *shape)
    last = "sample"
    for i in range(blocks):
        weight(f"m{i}", 8, 24)
        weight(f"f{i}", 8, 8)
        nodes.append(f"""mod{i} = MatMul (e, m{i})  sh{i}, sc{i}, ga{i} = Split <axis = 1> (mod{i}, parts)
            us{i} = Unsqueeze (sh{i}, one)  uc{i} = Unsqueeze (sc{i}, one)  ug{i} = Unsqueeze (ga{i}, one)
            n{i} = LayerNormalization (x{i}_in, scale, bias)  a{i} = Mul (n{i}, uc{i})  b{i} = Add (a{i}, us{i})
            f{i}o = MatMul (b{i}, f{i})  g{i} = Mul (f{i}o, ug{i})  x{i} = Add (x{i}_in, g{i})""".replace(
                f"x{i}_in", last))
        last = f"x{i}"
    nodes.append(f"out = Identity ({last})")
    return graph("\n".join(nodes), "float[batch, sequence, 8] sample, float[batch] timestep, float[batch, 4] pooled",
                 "float[batch, sequence, 8] out", ", ".join(weights))


def test_modulation_by_time_and_text_is_computed_once_a_request():
    content = transformer()
    hoisting = analyse(lambda: loaded(content), INPUTS, AXES, ANYTHING)
    assert hoisting.takes == {Kind.REQUEST: ("timestep", "pooled")} and hoisting.remain[0] == "sample"
    steps = assert_equal(content)
    assert "pooled" not in hoisting.remain and "timestep" not in hoisting.remain
    left = {node.op_type for node in steps.graph}
    assert "Sigmoid" not in left and sum(node.op_type == "MatMul" for node in steps.graph) == 3
    assert content_of(steps).parameters < content_of(loaded(content)).parameters / 3


def test_an_adapter_goes_with_what_it_changes():
    content = graph("k = MatMul (pooled, w)  d = MatMul (pooled, lora)  a = Add (k, d)  b = Relu (a)  "
                    "l = Relu (lora)  m = MatMul (sample, l)  out = Add (m, b)",
                    f"{SAMPLE}, float[batch, 4] pooled, float[4, 4] lora",
                    weights=f"float[4, 4] w = {{{', '.join(str(i / 7) for i in range(16))}}}")
    assert crossing(content) == {"b": Kind.PROMPT}, "what an adapter alone decides is no row, and stays"
    hoisting = analyse(lambda: loaded(content), INPUTS, AXES, ANYTHING)
    assert hoisting.takes == {Kind.PROMPT: ("pooled", "lora")} and "lora" in hoisting.remain
    assert_equal(content)


def test_another_entry_takes_the_values_that_it_computes_alike():
    whole = graph("a = Relu (pooled)  b = Neg (a)  c = Exp (b)  s = Add (sample, b)  out = Add (s, c)",
                  f"{SAMPLE}, float[batch, 4] pooled")
    part = graph("x = Relu (pooled)  y = Neg (x)  c = Abs (y)  s = Add (sample, y)  out = Add (s, c)",
                 f"{SAMPLE}, float[batch, 4] pooled")
    hoisting = analyse(lambda: loaded(whole), INPUTS, AXES, ANYTHING)
    other = loaded(part)
    same = same_values(loaded(whole), other, hoisting.values)
    assert {name: value.name for name, value in same.items()} == {"b": "y"}, "c is computed otherwise there"
    leave_steps(other, hoisting.values, same)
    assert [value.name for value in other.graph.inputs] == ["sample", "b"]
    feeds = feeds_for(part)
    values = feeds | {"b": -np.maximum(feeds["pooled"], 0)}
    np.testing.assert_array_equal(run(other, values)["out"], run(part, feeds)["out"])


# ---- any graph -------------------------------------------------------------------------------------------------

ROW = ("sample", "pooled", "time_ids")


@st.composite
def graphs(draw: st.DrawFn) -> bytes:
    """Graphs over rows of 4 numbers and of tokens, whose nodes read any values before them."""
    rows, tokens, nodes = [*ROW, "t4"], ["context"], ["t = Unsqueeze (timestep, one)  t4 = Mul (t, row)"]
    for i in range(draw(st.integers(2, 14))):
        name, kind = f"v{i}", draw(st.integers(0, 8))
        row, other = draw(st.sampled_from(rows)), draw(st.sampled_from(rows))
        token = draw(st.sampled_from(tokens))
        made, text = rows, {
            0: f"Sigmoid ({row})", 1: f"Neg ({row})", 2: f"Add ({row}, {other})", 3: f"Mul ({row}, {other})",
            4: f"MatMul ({row}, w)", 5: f"ReduceMean <keepdims = 0> ({token}, one)"}.get(kind, "")
        if kind == 6:
            made, text = tokens, f"MatMul ({token}, w)"
        elif kind == 7:
            nodes.append(f"u{i} = Unsqueeze ({row}, one)")
            made, text = tokens, f"Mul ({token}, u{i})"
        elif kind == 8:
            nodes.append(f"h{i} = Shape ({row})")
            text = f"Expand ({other}, h{i})"
        nodes.append(f"{name} = {text}")
        made.append(name)
    nodes.append(f"last = ReduceMean <keepdims = 0> ({tokens[-1]}, one)  sum = Add ({rows[-1]}, last)")
    nodes.append("mixed = Add (sum, sample)  out = Tanh (mixed)")
    inputs = f"{SAMPLE}, {TIMESTEP}, {CONTEXT}, float[batch, 4] pooled, float[batch, 4] time_ids"
    numbers = ", ".join(str((i * 7 % 16 - 8) / 9) for i in range(16))
    return graph("\n".join(nodes), inputs, weights=(
        f"{TWO}, float[4] row = {{0.1, 0.2, 0.3, 0.4}}, float[4, 4] w = {{{numbers}}}"))


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from([ANYTHING, CPU, GPU, Speeds(1.0, 1.0, 1e3, 1e3, 0.1, 0.3)]))
def test_taken_apart_any_graph_computes_the_same(content: bytes, speeds: Speeds):
    feeds = feeds_for(content)
    found, steps = composed(content, feeds, speeds)
    np.testing.assert_array_equal(found["out"], run(content, feeds)["out"])
    assert "sample" in {value.name for value in steps.graph.inputs}
