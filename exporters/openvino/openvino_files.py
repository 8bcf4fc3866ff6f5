"""Converts ONNX to OpenVINO's own files, `.xml` beside `.bin`, which load faster and are memory-mapped."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.bundle.folder import translated_disk_errors
from runtimes.bundle.tensors import TensorSpec
from runtimes.errors import DeployError, InputError, UnavailableError


@dataclass(frozen=True)
class OpenVinoReport:
    """What was written.

    Attributes:
        version: of OpenVINO.
        operations: number of operations per type, most frequent first.
        bytes: of both files.
    """

    version: str
    operations: dict[str, int]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """For the manifest's details."""
        return {"openvino_version": self.version, "operations": self.operations}


def convert_openvino(source: Path, destination: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...],
                     ) -> OpenVinoReport:
    """Convert a graph; weights keep the type they are stored in, float16 ones stay so on disk.

    Args:
        source: ONNX file with its external weights beside it.
        destination: the `.xml`; `.bin` goes beside it. Both appear by rename.
        inputs, outputs: of the component; the converted graph must have them under the same names.

    Raises:
        UnavailableError: OpenVINO is not installed, or the disk is full.
        InputError: an operator that OpenVINO does not know.
    """
    name = destination.stem
    try:
        import openvino
    except ImportError as error:
        raise UnavailableError("openvino is not installed", where=name,
                               fix="pip install 'ldm-deploy[openvino]'") from error
    try:
        model = openvino.Core().read_model(str(source))
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot read the graph: {_cause(error)}", where=name,
                         fix="build for --target onnxruntime, or report the operator") from error
    found = ({n for p in model.inputs for n in p.names}, {n for p in model.outputs for n in p.names})
    for names, specs in zip(found, (inputs, outputs), strict=True):
        if missing := sorted({s.name for s in specs} - names):
            raise DeployError(f"the converted graph has no {', '.join(missing)}, only {sorted(names)}", where=name)
    with translated_disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".openvino-", dir=destination.parent) as folder:
            partial = Path(folder) / destination.name
            try:
                openvino.save_model(model, str(partial), compress_to_fp16=False)
            except RuntimeError as error:
                raise UnavailableError(f"OpenVINO could not write: {_cause(error)}", where=name,
                                       fix="free some disk space") from error
            partial.with_suffix(".bin").replace(destination.with_suffix(".bin"))
            partial.replace(destination)
    counts: dict[str, int] = {}
    for operation in model.get_ordered_ops():
        counts[operation.get_type_name()] = counts.get(operation.get_type_name(), 0) + 1
    written = destination.stat().st_size + destination.with_suffix(".bin").stat().st_size
    return OpenVinoReport(openvino.__version__, dict(sorted(counts.items(), key=lambda i: (-i[1], i[0]))), written)


def _cause(error: BaseException) -> str:
    """The last line that says something; OpenVINO's messages begin with source files of its own."""
    lines = [line.strip() for line in str(error).splitlines()
             if line.strip() and not line.startswith(("Exception from", "Check "))]
    return (lines or [type(error).__name__])[-1][:300]
