"""The child process that builds one engine: `python -m exporters.tensorrt.engine_worker REQUEST.json`.

A process of its own gives the builder's memory back when it ends, and a builder that the kernel kills, or that aborts
inside, then costs one error message and not the whole build. Works with `tensorrt` 10
and 11 and with `tensorrt_rtx`, whose modules share their interface. Answers with a JSON file; its words:
`ok`, or `error` = refused (by the parser) | failed (in the builder) | disk | missing (package).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from runtimes.backends.tensorrt.engine_errors import error_recorder
from runtimes.system.child_process import as_child
from runtimes.system.process_memory import peak_rss_bytes
from runtimes.system.progress import listener

# Freeing a network whose build failed crashes TensorRT-RTX 1.7.1; the process ends right after, without clean-up.
_NEVER_FREED: list[Any] = []
_LEVELS = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


def main() -> None:
    """Read the request, build, write the answer beside it."""
    request_file = Path(sys.argv[1])
    with as_child():
        request = json.loads(request_file.read_text())
        answer = build(request)
        request_file.with_suffix(".answer").write_text(json.dumps(answer))
        os._exit(0)


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build one engine into `request["partial"]` for the capabilities of the request, by default all on offer."""
    try:
        trt = importlib.import_module(request["module"])
    except (ImportError, OSError) as error:
        return {"error": "missing", "message": str(error).partition("\n")[0], "capabilities": []}
    capabilities = list(request["options"]["capabilities"])
    if not capabilities:
        refused = request["refused"]
        capabilities = [name for name in offered(trt) if name not in refused]
    answer = _attempt(trt, error_recorder(trt), request, capabilities)
    return {**answer, "capabilities": capabilities, "version": trt.__version__}


def offered(trt: Any) -> list[str]:
    """Compute capabilities that the builder can compile for ahead of time; empty for `tensorrt`."""
    known = getattr(trt, "ComputeCapability", None)
    names = [] if known is None else [n for n in known.__members__ if n.startswith("SM")]
    return sorted(names, key=lambda n: int(n[2:]))


def _attempt(trt: Any, recorder: Any, request: dict[str, Any], capabilities: list[str]) -> dict[str, Any]:
    options = request["options"]
    # TensorRT <= 10 types networks weakly by default; later releases know strong typing alone.
    typed = int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    builder.error_recorder = recorder
    _NEVER_FREED.extend((logger, recorder, builder, network := builder.create_network(1 << typed)))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        return {"error": "refused", "nodes": [_refusal(parser.get_error(i)) for i in range(parser.num_errors)]}
    config = builder.create_builder_config()
    if (problem := _configure(trt, config, options, capabilities)) is not None:
        return {"error": "failed", "message": problem}
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, common, high) in shapes.items():
            profile.set_shape(name, low, common, high)
        if config.add_optimization_profile(profile) < 0:
            return {"error": "failed", "message": _first(recorder, "the builder does not take the profile")}
    _NEVER_FREED.append(_watch(trt, config))
    cache_file = Path(request["timing_cache"]) if request["timing_cache"] else None
    if cache_file is not None:
        stored = cache_file.read_bytes() if cache_file.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False)
    began = time.perf_counter()
    answer = _write_engine(trt, recorder, builder, network, config, Path(request["partial"]))
    if "ok" not in answer:
        return answer
    if cache_file is not None:
        _replace(cache_file, bytes(config.get_timing_cache().serialize()))
    return {**answer, "seconds": round(time.perf_counter() - began, 3), "peak_rss_bytes": peak_rss_bytes(),
            "layers": _layers(network)}


def _watch(trt: Any, config: Any) -> Any:
    """Report the steps of the builder's outermost phase; gives what must live as long as the build."""
    to, lengths = listener(), dict[str, int]()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # one of two modules, chosen at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                lengths[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in lengths:
                to.advanced(step + 1, lengths[phase_name], f"steps of the builder ({phase_name})")
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            lengths.pop(phase_name, None)

    config.progress_monitor = monitor = Monitor()
    return monitor


def _configure(trt: Any, config: Any, options: dict[str, Any], capabilities: list[str]) -> str | None:
    """Set every option; returns what the builder does not have."""
    flags = {"tf32": "TF32", "version_compatible": "VERSION_COMPATIBLE", "refittable": "REFIT",
             "stripped": "STRIP_PLAN", "weight_streaming": "WEIGHT_STREAMING", "sparse_weights": "SPARSE_WEIGHTS",
             "graph_capturable": "REQUIRE_USER_ALLOCATION"}
    for option, name in flags.items():
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None and options[option]:
            return f"this builder has no {name}"
        if flag is not None:
            (config.set_flag if options[option] else config.clear_flag)(flag)
    if options["workspace_bytes"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_bytes"])
    if options["optimization_level"] >= 0:
        config.builder_optimization_level = options["optimization_level"]
    if options["auxiliary_streams"] >= 0:
        config.max_aux_streams = options["auxiliary_streams"]
    if options["hardware"] != "none":
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, _LEVELS[options["hardware"]])
    if options["tiling"] != "none":
        config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options["tiling"].upper())
    if capabilities:
        if unknown := [c for c in capabilities if c.upper() not in trt.ComputeCapability.__members__]:
            return f"no compute capability {', '.join(unknown)}; this builder offers {', '.join(offered(trt))}"
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[name.upper()], index)
    return None


def _write_engine(trt: Any, recorder: Any, builder: Any, network: Any, config: Any, partial: Path) -> dict[str, Any]:
    """Build and write; the engine goes straight to the file where the builder can stream."""
    try:
        with partial.open("wb") as file:
            if hasattr(builder, "build_serialized_network_to_stream"):
                writer = _writer(trt, file)
                built = builder.build_serialized_network_to_stream(network, config, writer)
                if writer.error is not None:
                    raise writer.error
            else:
                engine = builder.build_serialized_network(network, config)
                built = engine is not None
                if built:
                    file.write(engine)
    except OSError as error:
        return {"error": "disk", "errno": error.errno, "message": error.strerror}
    if not built:
        return {"error": "failed", "message": _first(recorder, "the builder gave no reason")}
    return {"ok": True}


def _writer(trt: Any, file: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Python exceptions do not cross the builder, and it takes a short write for success: the error is stored."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                file.write(data)
                file.flush()
            except OSError as error:
                self.error = error
                return 0
            return len(data)

    return Writer()


def _refusal(error: Any) -> dict[str, Any]:
    description = error.desc()
    return {"node": error.node(), "name": error.node_name(), "op": error.node_operator(),
            "code": str(error.code()).rpartition(".")[2], "message": description}


def _first(recorder: Any, otherwise: str) -> str:
    """The first error: what follows comes of it (a failed build to a stream ends with an unrelated CUDA error)."""
    return str(recorder.errors[0][1]) if recorder.errors else otherwise


def _layers(network: Any) -> dict[str, int]:
    """Layers of the network per type of their first result: what precision the graph asks for."""
    counts: dict[str, int] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        output = layer.get_output(0) if layer.num_outputs else None
        name = str(output.dtype).rpartition(".")[2] if output is not None else "NONE"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(file)


if __name__ == "__main__":
    main()
