"""`python -m exporters.measure.tensorrt_engines GRAPH.onnx` prints bytes, build seconds and peak memory by precision.

float32 and float16 are made from the graph given; graphs that are converted already (INT8 with Q/DQ) join with --also.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import onnx

from exporters.precision.sixteen_bits import convert_precision
from exporters.tensorrt.engine_builder import EngineReport, build_engine
from exporters.tensorrt.engine_options import EngineOptions
from exporters.tensorrt.optimization_profiles import make_profiles
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import DeployError, InputError

_DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.INT64: "int64",
           onnx.TensorProto.INT32: "int32", onnx.TensorProto.BOOL: "bool"}
_MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Build one engine per precision and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m exporters.measure.tensorrt_engines", description=__doc__)
    parser.add_argument("graph", type=Path, help="float32 ONNX file")
    parser.add_argument("--axis", action="append", default=[], metavar="NAME=MIN:OPT:MAX", help="range of a named axis")
    parser.add_argument("--precision", action="append", choices=("fp32", "fp16", "bf16"), help="default: fp32, fp16")
    parser.add_argument("--also", action="append", default=[], metavar="LABEL=FILE", help="another graph, as it is")
    parser.add_argument("--builder", default="tensorrt-rtx", choices=("tensorrt-rtx", "tensorrt"))
    parser.add_argument("--capabilities", default="", help="SM86+SM89; by default all")
    options = parser.parse_args(arguments)
    try:
        engine = EngineOptions.from_mapping({"capabilities": options.capabilities} if options.capabilities else {},
                                            options.builder)
        axes = dict(parse_axis(text) for text in options.axis)
        with tempfile.TemporaryDirectory(prefix="measure-tensorrt-") as folder:
            graphs = {p: options.graph for p in options.precision or ("fp32", "fp16")}
            for precision in [p for p in graphs if p != "fp32"]:
                graphs[precision] = Path(folder) / f"{precision}.onnx"
                convert_precision(options.graph, graphs[precision], precision)
            graphs.update({label: Path(file) for label, _, file in (text.partition("=") for text in options.also)})
            _print_table(graphs, Path(folder), axes, engine)
    except DeployError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _print_table(graphs: dict[str, Path], folder: Path, axes: dict[str, Axis], engine: EngineOptions) -> None:
    sys.stdout.write(f"{'graph':<8}{'weights MiB':>12}{'engine MiB':>12}{'of first':>10}{'overhead':>10}{'zipped':>9}"
                     f"{'seconds':>9}{'peak MiB':>10}  capabilities\n")
    first = 0
    for label, graph in graphs.items():
        report = build_engine(graph, folder / f"{label}.trt", make_profiles(inputs_of(graph, axes), axes), engine)
        first = first or report.engine_bytes
        zipped = zipped_bytes(folder / f"{label}.trt")
        sys.stdout.write(line_of(label, weight_bytes(graph), report, first, zipped))
        sys.stdout.flush()
        (folder / f"{label}.trt").unlink()


def line_of(label: str, weights: int, report: EngineReport, first: int, zipped: int) -> str:
    """One line of the table."""
    refused = "".join(f"; refused {name}" for name in report.refused_capabilities)
    size = report.engine_bytes
    return (f"{label:<8}{weights / _MIB:>12.1f}{size / _MIB:>12.1f}{size / first:>10.2f}"
            f"{(size - weights) / _MIB:>10.1f}{zipped / _MIB:>9.1f}"
            f"{report.seconds:>9.1f}{report.peak_rss_bytes / _MIB:>10.0f}"
            f"  {', '.join(report.capabilities) or 'this GPU'}{refused}\n")


def zipped_bytes(file: Path) -> int:
    """Size after the fastest zlib compression: shows how much of an engine is description rather than weights."""
    compressor, total = zlib.compressobj(1), 0
    with file.open("rb") as stream:
        while block := stream.read(_MIB):
            total += len(compressor.compress(block))
    return total + len(compressor.flush())


def parse_axis(text: str) -> tuple[str, Axis]:
    """Read NAME=MIN:OPT:MAX, or NAME=SIZE.

    Raises:
        InputError: not of that form.
    """
    name, _, value = text.partition("=")
    parts = value.split(":")
    if not name or len(parts) not in (1, 3) or not all(p.isdigit() for p in parts):
        raise InputError(f"{text!r} is not NAME=MIN:OPT:MAX", where="--axis", fix="for example --axis batch=1:2:8")
    low, common, high = (int(p) for p in (parts * 3)[:3])
    return name, Axis(name, ShapeRange(low, common, high))


def inputs_of(graph: Path, axes: dict[str, Axis]) -> tuple[TensorSpec, ...]:
    """Inputs of an ONNX file.

    Raises:
        InputError: an axis without a range; lists the axes.
    """
    model = onnx.load(str(graph), load_external_data=False).graph
    weights = {tensor.name for tensor in model.initializer}
    specs = []
    for value in model.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
        if missing := [d for d in shape if isinstance(d, str) and d not in axes]:
            raise InputError(f"{value.name} has the axis {missing[0]} without a range", where=str(graph),
                             fix=f"--axis {missing[0]}=MIN:OPT:MAX")
        specs.append(TensorSpec(value.name, _DTYPES[kind.elem_type], shape))
    return tuple(specs)


def weight_bytes(graph: Path) -> int:
    """Bytes of all initializers."""
    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    sizes = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.INT64: 8, onnx.TensorProto.INT32: 4,
             onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.BFLOAT16: 2}
    total = 0
    for tensor in tensors:
        count = 1
        for size in tensor.dims:
            count *= size
        total += count * sizes.get(tensor.data_type, 1)
    return total


if __name__ == "__main__":
    raise SystemExit(main())
