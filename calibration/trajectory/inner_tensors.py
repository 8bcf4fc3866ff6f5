"""Runs a graph on recorded inputs with inner tensors as outputs: for statistics, and for errors between graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from calibration.integers.ranges import Observed, stratum_of
from runtimes.bundle.folder import link_or_copy

Feeds = dict[str, np.ndarray[Any, Any]]
Calls = Callable[[], Iterable[Feeds]]


@contextmanager
def probed(file: Path, tensors: Sequence[str], threads: int = 0) -> Iterator[Callable[[Feeds], Feeds]]:
    """A function that runs the graph and gives those inner tensors by name, outputs of the graph among them.

    ONNX Runtime fuses nothing across a tensor that is an output, so the float32 graph runs as it is written.
    """
    model = ir.load(file)
    values = {v.name: v for node in model.graph for v in node.outputs}
    values.update({v.name: v for v in model.graph.inputs})
    present = {v.name for v in model.graph.outputs}
    fed = {v.name for v in model.graph.inputs}
    for name in tensors:
        if name not in present and name not in fed:
            values[name].dtype = values[name].dtype or ir.DataType.FLOAT
            model.graph.outputs.append(values[name])
            present.add(name)
    with tempfile.TemporaryDirectory(prefix="ldm-probe-") as scratch:
        session = plain_session(beside(model, file, Path(scratch)), threads)
        wanted = [name for name in dict.fromkeys(tensors) if name not in fed]

        def run(feeds: Feeds) -> Feeds:
            given = {name: feeds[name] for name in tensors if name in fed}
            # asked for no output, ONNX Runtime gives all of them
            return {**given, **dict(zip(wanted, session.run(wanted, feeds), strict=True))} if wanted else given

        yield run


def observe(file: Path, tensors: Sequence[str], calls: Calls, *, histograms: bool, timestep: str = "",
            threads: int = 0) -> dict[str, Observed]:
    """Statistics of inner tensors over recorded calls, which are gone through once, or twice with histograms.

    Args:
        file: ONNX graph.
        tensors: names.
        calls: gives the recorded feeds anew each time it is called.
        histograms: fill `Observed.counts`; min-max needs none.
        timestep: input (B,) that says where in the schedule a call is; "" for a graph that has none.
    """
    seen = {name: Observed() for name in tensors}
    if not seen:
        return seen
    with probed(file, tensors, threads) as run:
        for feeds in calls():
            at = feeds.get(timestep)
            stratum = None if at is None else stratum_of(float(at.flat[0]))
            for name, values in run(feeds).items():
                seen[name].extend(values, stratum)
        for feeds in calls() if histograms else ():
            for name, values in run(feeds).items():
                seen[name].count(values)
    return seen


def compare(reference: Path, candidate: Path, calls: Calls, threads: int = 0) -> float:
    """Largest relative L2 of any output of a graph against another's, over recorded calls; NaN counts as infinite."""
    worst = 0.0
    sessions = [plain_session(file, threads) for file in (reference, candidate)]
    names = [o.name for o in sessions[0].get_outputs()]
    for feeds in calls():
        expected, found = (session.run(names, feeds) for session in sessions)
        for a, b in zip(expected, found, strict=True):
            worst = max(worst, relative_l2(a, b))
    return worst


def relative_l2(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """Error ||found - expected|| / ||expected|| of two arrays of the same shape, any dtype; infinite for NaN."""
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    error = float(np.linalg.norm(found.astype(np.float64) - expected))
    ratio = error / norm if norm else (0.0 if error == 0 else np.inf)
    return ratio if np.isfinite(ratio) else float("inf")


def beside(model: ir.Model, file: Path, folder: Path) -> Path:
    """Save a model that was loaded from `file` and changed, with links to the weights that it still shares."""
    for data in file.parent.glob(f"{file.name}.*"):
        if not (folder / data.name).exists():
            link_or_copy(data, folder / data.name)
    ir.save(model, folder / file.name)
    return folder / file.name


def plain_session(file: Path, threads: int) -> ort.InferenceSession:
    """A CPU session on a file, without the checks of `runtimes.backends.onnxruntime_session`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
