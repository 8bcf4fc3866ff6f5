"""Builds a TensorRT engine from ONNX: with `tensorrt` for this machine's GPU, with `tensorrt-rtx` without any GPU.

The build runs in a child process (`engine_worker`); what goes wrong there becomes one of our errors here. Networks
are strongly typed: the precision of an engine is the precision of its graph. We drive the builder directly rather
than through Polygraphy's loaders: those raise without the node that the parser refuses, choose between the two
modules by an environment variable read at import, and hold the engine in memory.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from exporters.tensorrt.engine_options import EngineOptions
from exporters.tensorrt.optimization_profiles import Profile
from runtimes.backends.tensorrt.engine_errors import OUT_OF_MEMORY
from runtimes.backends.tensorrt.engine_plan import MODULES, PACKAGES, check_header
from runtimes.bundle.folder import sha256_of, translated_disk_errors
from runtimes.errors import DeployError, InputError, OutOfMemoryError, UnavailableError
from runtimes.system.child_process import last_words, run_child

PARTIAL = "engine.partial"
_CAPABILITY = re.compile(r"\bsm_?(\d{2,3})\b", re.IGNORECASE)
_DRIVER = re.compile(r"cuda ?error ?(35|100)|insufficient for CUDA runtime|no CUDA-capable device|cudaErrorNoDevice",
                     re.IGNORECASE)
# What helps against an operator that the parser refuses.
_NO_FORM = "the operator has no TensorRT form: change the model, or use --target onnxruntime"
_FIXES = {
    "UNSUPPORTED_NODE_ATTR": "the operator is known, this setting of it is not: export with another opset",
    "UNSUPPORTED_NODE_DATATYPE": "build with --precision fp16 or fp32, or keep the node out of the conversion",
    "INVALID_NODE": "it is no standard ONNX operator: build with --target tensorrt so that no ONNX Runtime fusions "
                    "are in the graph, or register a TensorRT plugin of that name",
}


@dataclass(frozen=True)
class EngineReport:
    """What was built.

    Attributes:
        builder, version: "tensorrt" or "tensorrt-rtx", and its release.
        capabilities: compute capabilities it runs on; empty means the GPU of the build machine.
        refused_capabilities: those that the builder offers but refused for this graph, with its words.
        profiles: input -> smallest, most common, largest shape, per profile.
        layers: layers of the network per type of their result.
        graph_sha256: of the ONNX file (external weights excluded) that was compiled.
        engine_bytes: size of the file.
        seconds, peak_rss_bytes: cost of the build process.
    """

    builder: str
    version: str
    capabilities: tuple[str, ...]
    refused_capabilities: Mapping[str, str]
    profiles: tuple[Profile, ...]
    layers: Mapping[str, int]
    graph_sha256: str
    engine_bytes: int
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """What the engine *is*, for the manifest's details; seconds and memory are left to `measured`."""
        return {
            "builder": self.builder,
            "builder_version": self.version,
            "compute_capabilities": list(self.capabilities),
            "refused_capabilities": dict(self.refused_capabilities),
            "profiles": [{n: [list(s) for s in shapes] for n, shapes in p.items()} for p in self.profiles],
            "layers": dict(self.layers),
            "graph_sha256": self.graph_sha256,
        }


def installed(builder: str) -> bool:
    """Whether the builder's package can be found; imports nothing."""
    return util.find_spec(MODULES[builder]) is not None


def build_engine(source: Path, destination: Path, profiles: Sequence[Profile], options: EngineOptions, *,
                 timing_cache: Path | None = None) -> EngineReport:
    """Compile a graph.

    Args:
        source: ONNX file, with its external weights beside it.
        destination: the engine; appears by rename when it is whole.
        profiles: from `optimization_profiles.make_profiles`.
        options: how to build.
        timing_cache: of `tensorrt` only, a file that outlives the build. TensorRT-RTX tunes on the user's GPU, and a
            timing cache would force one on the build machine.

    Raises:
        InputError: an operator that the parser refuses, or options that do not fit the graph.
        UnavailableError: the package, the driver, memory or disk is missing, or the builder was killed.
    """
    name = destination.stem
    if not installed(options.builder):
        raise UnavailableError(f"{options.builder} is not installed", where=name, fix=PACKAGES[options.builder])
    with translated_disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".engine-", dir=destination.parent) as folder:
            partial = Path(folder) / PARTIAL
            request = {
                "module": MODULES[options.builder], "onnx": str(source.resolve()), "partial": str(partial),
                "profiles": [dict(p) for p in profiles], "options": dataclasses.asdict(options),
                "timing_cache": str(timing_cache) if timing_cache and options.builder == "tensorrt" else None,
            }
            answer, refused = _until_accepted(request, Path(folder), name)
            _raise_for(answer, name, source)
            check_engine_file(partial, name)
            partial.replace(destination)
    return EngineReport(options.builder, answer["version"], tuple(answer["capabilities"]), refused,
                        tuple(profiles), answer["layers"], sha256_of(source), destination.stat().st_size,
                        answer["seconds"], answer["peak_rss_bytes"])


def _until_accepted(request: Mapping[str, Any], folder: Path, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Build, leaving out and reporting the capabilities that the builder refuses the graph for.

    Only those that the user did not ask for by name (TensorRT-RTX 1.7: SM75 has no float32 matrix products and no
    bfloat16).
    """
    refused: dict[str, str] = {}
    while True:
        answer = run_worker({**request, "refused": list(refused)}, folder, name)
        message = answer.get("message", "")
        named = {f"SM{number}" for number in _CAPABILITY.findall(message)} & set(answer["capabilities"])
        asked = request["options"]["capabilities"]
        if answer.get("error") != "failed" or not named or asked or len(named) == len(answer["capabilities"]):
            return answer, refused
        refused.update({capability: _shown(message) for capability in named})


def run_worker(request: Mapping[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Run the child process and read its answer.

    Raises:
        UnavailableError: it was killed by a signal; says which, and what helps.
        DeployError: it ended without an answer.
    """
    file, log = folder / "request.json", folder / "log"
    file.write_text(json.dumps(request))
    code = run_child("exporters.tensorrt.engine_worker", file, log)
    answer = file.with_suffix(".answer")
    if code == 0 and answer.is_file():
        content: dict[str, Any] = json.loads(answer.read_text())
        return content
    if code < 0:
        killed = signal.Signals(-code).name
        fix = ("memory ran out, most likely: build with --precision fp16, smaller --shapes, or on a machine with more "
               "memory" if code == -signal.SIGKILL else "report it, with the graph, to NVIDIA")
        raise UnavailableError(f"the process that builds the engine was ended by {killed}: {last_words(log)}",
                               where=name, fix=fix)
    raise DeployError(f"the process that builds the engine ended with code {code}: {last_words(log)}", where=name)


def _raise_for(answer: Mapping[str, Any], name: str, source: Path) -> None:
    """The worker's answer as one of our errors, most specific first."""
    kind = answer.get("error")
    if kind is None:
        return
    if kind == "disk":
        raise OSError(answer["errno"], answer["message"])
    if kind == "missing":
        raise UnavailableError(f"the builder does not load: {answer['message']}", where=name,
                               fix="install the package again; its libraries are incomplete")
    if kind == "refused":
        raise _refusal(answer["nodes"], name, source)
    message = answer["message"]
    if _DRIVER.search(message):
        raise UnavailableError(f"no usable NVIDIA driver: {_shown(message)}", where=name,
                               fix="install the driver, or use --target tensorrt-rtx, which builds without a GPU")
    if OUT_OF_MEMORY.search(message):
        raise OutOfMemoryError(f"the builder ran out of memory: {_shown(message)}", where=name,
                               fix="build with --precision fp16 or smaller --shapes")
    if re.search(r"\bsm_?\d{2,3}\b|compute capability", message, re.IGNORECASE):
        raise InputError(f"the builder refuses this graph for a GPU asked for: {_shown(message)}", where=name,
                         fix="leave it out of capabilities, or build with --precision fp16")
    raise InputError(f"the builder refuses the graph: {_shown(message)}", where=name,
                     fix="the message names the layer; keep it at higher precision, or report it with the graph")


def _shown(message: str) -> str:
    return " ".join(message.split())[:400]


def _refusal(nodes: Sequence[Mapping[str, Any]], name: str, source: Path) -> InputError:
    if not nodes:
        return InputError("TensorRT cannot read the graph", where=f"{name}: {source.name}", fix="build it again")
    first = nodes[0]
    more = f", and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    detail = "" if first["message"] in ("", "false") else f": {_shown(first['message'])}"
    return InputError(f"TensorRT cannot compile node {first['node']}, {first['op']} {first['name']!r}{detail}{more}",
                      where=name, fix=_FIXES.get(first["code"], _NO_FORM))


def check_engine_file(file: Path, name: str) -> None:
    """Refuse what is no whole engine before it gets its name.

    Raises:
        BundleError: not an engine, or a cut one.
    """
    with file.open("rb") as stream:
        check_header(stream.read(64), file.stat().st_size, name)
