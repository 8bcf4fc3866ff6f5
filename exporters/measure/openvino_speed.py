"""`python -m exporters.measure.openvino_speed GRAPH.onnx` compares OpenVINO with ONNX Runtime on one CPU thread.

Time is CPU time of the process, the two interleaved call by call, median of many: unlike wall time, it holds still
while other programs run. Loading is measured three times: ONNX Runtime, OpenVINO, OpenVINO with its cache filled.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exporters.measure.tensorrt_engines import inputs_of, parse_axis
from exporters.openvino.openvino_files import convert_openvino
from runtimes.backends.openvino_session import new_core
from runtimes.bundle.tensors import TensorSpec, example_feeds
from runtimes.errors import DeployError

Feeds = dict[str, np.ndarray[Any, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, load, run and print."""
    parser = argparse.ArgumentParser(prog="python -m exporters.measure.openvino_speed", description=__doc__)
    parser.add_argument("graph", type=Path, help="ONNX file with float32 inputs")
    parser.add_argument("--axis", action="append", default=[], metavar="NAME=SIZE", help="size of a named axis")
    parser.add_argument("--calls", type=int, default=30)
    options = parser.parse_args(arguments)
    try:
        axes = dict(parse_axis(text) for text in options.axis)
        inputs = inputs_of(options.graph, axes)
        with tempfile.TemporaryDirectory(prefix="measure-openvino-") as folder:
            feeds = example_feeds(inputs, {n: a.range.opt for n, a in axes.items()})
            _measure(options.graph, inputs, feeds, Path(folder), options.calls)
    except DeployError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _measure(graph: Path, inputs: tuple[TensorSpec, ...], feeds: Feeds, folder: Path, calls: int) -> None:
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = 1
    ort_seconds, session = _timed(lambda: onnxruntime.InferenceSession(str(graph), threads))
    outputs = tuple(TensorSpec(o.name, "float32", ()) for o in session.get_outputs())
    report = convert_openvino(graph, folder / "model.xml", inputs, outputs)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    cached = {**settings, "CACHE_DIR": str(folder / "cache"), "CACHE_MODE": "OPTIMIZE_SIZE"}
    cold_seconds, compiled = _timed(lambda: new_core().compile_model(str(folder / "model.xml"), "CPU", settings))
    new_core().compile_model(str(folder / "model.xml"), "CPU", cached)
    warm_seconds, _ = _timed(lambda: new_core().compile_model(str(folder / "model.xml"), "CPU", cached))
    request = compiled.create_infer_request()
    name = outputs[0].name
    runs: dict[str, Callable[[], Any]] = {
        "onnxruntime": lambda: session.run([name], feeds)[0],
        "openvino": lambda: request.infer(feeds, share_inputs=True)[name],
    }
    reference, other = (np.array(run()) for run in runs.values())
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(calls):
        for key, run in runs.items():
            times[key].append(_timed(run)[0])
    ort_call, ov_call = (statistics.median(times[key]) for key in runs)
    error = float(np.linalg.norm(reference - other) / np.linalg.norm(reference))
    sys.stdout.write(
        f"onnxruntime {onnxruntime.__version__}, openvino {report.version}, one thread, CPU seconds\n"
        f"load      onnxruntime {ort_seconds:.2f}   openvino {cold_seconds:.2f}   openvino from its cache "
        f"{warm_seconds:.2f}\n"
        f"one call  onnxruntime {ort_call:.4f}   openvino {ov_call:.4f}   ratio {ort_call / ov_call:.2f}\n"
        f"relative L2 of {name} between the two: {error:.1e}\n")


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


if __name__ == "__main__":
    raise SystemExit(main())
