"""`quantize`: 8-bit weights, and 8-bit activations with ranges recorded along the model's own denoising."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploy.plan import Pass, Planned, Skip, Step
from runtimes.bundle import Bundle, records_below
from runtimes.errors import InputError
from runtimes.manifest import Component, Manifest, digest_of

if TYPE_CHECKING:
    from calibration.ranges import Scheme
    from calibration.recorder import Recording
    from deploy.spec import BuildSpec

PRECISIONS = ("int8",)
DETAILS_FILE = "quantization.json"
# target -> the integers its kernels take, fields of calibration.ranges.Scheme.
SCHEMES: Mapping[str, dict[str, Any]] = {
    "onnxruntime": {"quantize_outputs": True},
    "openvino": {},
    "tensorrt": {"signed": True},
    "tensorrt-rtx": {"signed": True},
}
NEEDS_RANGES = ("hybrid", "static")
VAE = ("vae_encoder", "vae_decoder")
DEFAULT_PROMPTS = 64
TIMED_CALLS, TIMED_ROUNDS = 3, 7


class Quantize(Pass):
    """float32 graphs to INT8 by the recipe of each component; runs before 16 bits, which take what is left."""

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx-ir", "onnxruntime")
    verify: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Every float32 graph, when the spec says int8."""
        if spec.precision not in PRECISIONS:
            return Skip(f"the build is {spec.precision}")
        for name, component in before.components.items():
            if component.format != "onnx" or component.precision != "fp32":
                raise InputError(f"{name} is {component.format} in {component.precision}, expected onnx in fp32",
                                 where="pass quantize", fix="quantize comes after optimize and before precision")
        if spec.quantization == "dynamic" and spec.target != "onnxruntime":
            raise InputError(f"{spec.target} has no kernels for ranges found at run time", where="quantization",
                             fix="use hybrid or static")
        from deploy.parity.budgets import budget_for

        recipes = {name: recipe_of(name, spec.quantization) for name in before.components}
        config: dict[str, Any] = {
            "recipes": recipes, "scheme": SCHEMES[spec.target], "estimator": spec.range_estimator,
            "keep": list(spec.keep),
            "relative_l2": budget_for(spec.precision, spec.budget).component_relative_l2,
        }
        if any(recipe in NEEDS_RANGES for recipe in recipes.values()):
            config["calibration"] = plan_calibration(before, spec)
        every = tuple(before.components)
        reads = {name: every if recipes[name] in NEEDS_RANGES else (name,) for name in every}
        components = {n: replace(c, precision="int8", files={}) for n, c in before.components.items()}
        step = Step(self.name, self.version, config, reads, replace(before, components=components),
                    f"INT8, {spec.quantization}")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Quantize one graph; which layer became what, and every range, lies beside it."""
        from calibration.layers import check_patterns
        from calibration.ranges import Scheme

        planned, config = step.after.components[name], step.config
        check_patterns(config["keep"], names_in(source))
        folder = out / "components" / name
        folder.mkdir(parents=True)
        graph, scheme = source.file(source.component(name).file), Scheme(**config["scheme"])
        recipe, recording = config["recipes"][name], None
        if recipe in NEEDS_RANGES:
            recording = record_calibration(source, config["calibration"])
        found = quantize_component(graph, folder / "model.onnx", recipe, config, scheme, name, recording)
        if recording is not None and name in VAE and found["relative_l2"] > config["relative_l2"] / 2:
            # Its error goes into the picture directly; half of the budget is left for the latents'.
            lost = found["relative_l2"]
            found = quantize_component(graph, folder / "model.onnx", "weight-only", config, scheme, name, None)
            found["summary"]["instead_of"] = f"{recipe}, whose relative L2 was {lost:.2g}"
        (folder / DETAILS_FILE).write_text(json.dumps(found["layers"], sort_keys=True), encoding="utf-8")
        return replace(planned, files=records_below(folder, out),
                       details={**source.component(name).details, "quantization": found["summary"]})

    def measure(self, step: Step, before: Bundle, after: Bundle) -> dict[str, Any]:
        """What it bought on this machine: bytes and time of a call against float32, from interleaved calls."""
        return {name: measured_gain(before, after, name) for name in step.reads}


def recipe_of(component: str, quantization: str) -> str:
    """The recipe of one component.

    The text encoder runs once for a prompt that the cache does not know: its time does not matter, its bytes do, and
    everything that is drawn hangs on its output.
    """
    return "weight-only" if component.startswith("text_encoder") else quantization


def plan_calibration(before: Manifest, spec: BuildSpec) -> dict[str, Any]:
    """What will be recorded, resolved; refuses too few samples before any work."""
    from calibration.prompts import STEPS, STRENGTH, plan_episodes
    from deploy.parity.options import ParityOptions

    prompts = spec.calibration_prompts or default_prompts(before.source.id)
    episodes = plan_episodes(prompts, spec.calibration_samples)
    return {"prompts": list(prompts[: len(episodes) + 1]), "samples": spec.calibration_samples, "steps": STEPS,
            "strength": STRENGTH, "guidance_scale": ParityOptions.guidance_scale}


def default_prompts(source_id: str) -> tuple[str, ...]:
    """The reference model's subjects that its retrieval score does not ask for; everyday things for other models."""
    from deploy.gate import options_for

    options = options_for(source_id, ())
    if not options.retrieval_prompts:
        return options.prompts
    from deploy.reference_model import subject_names

    scored = {*options.retrieval_prompts, *options.prompts}
    names = [name for name in subject_names() if name not in scored]
    return tuple(names[i * len(names) // DEFAULT_PROMPTS] for i in range(DEFAULT_PROMPTS))


def record_calibration(source: Bundle, calibration: Mapping[str, Any]) -> Recording:
    """Record the float32 graphs' inputs, or find the recording of an earlier build of the same graphs."""
    from calibration.prompts import plan_episodes
    from calibration.recorder import record
    from deploy.cache import default_root
    from deploy.parity.drawing import assemble_pipeline
    from runtimes.loading import BundleSessions
    from runtimes.session import SessionOptions

    steps, strength = calibration["steps"], calibration["strength"]
    episodes = plan_episodes(calibration["prompts"], calibration["samples"], steps=steps, strength=strength)
    manifest = source.manifest
    identity = {"components": {n: c.sha256 for n, c in sorted(manifest.components.items())},
                "files": {n: r.sha256 for n, r in sorted(manifest.files.items())}}
    return record(dict(BundleSessions(source, SessionOptions())), lambda sessions: assemble_pipeline(sessions, source),
                  episodes, default_root() / "calibration", source=identity,
                  guidance_scale=calibration["guidance_scale"], steps=steps, strength=strength)


def quantize_component(graph: Path, destination: Path, recipe: str, config: Mapping[str, Any], scheme: Scheme,
                       name: str, recording: Recording | None) -> dict[str, Any]:
    """Quantize one graph by one recipe.

    Returns:
        "summary" for the manifest's details, "layers" for the file beside the graph, "relative_l2" of the outputs on
        the recorded calls, 0 where there are none.
    """
    import onnx_ir as ir

    from calibration.layers import assign, find_layers
    from calibration.observe import compare, observe
    from calibration.quantize import quantize, tensors_to_observe
    from calibration.ranges import drift, estimate

    model = ir.load(graph)
    assignment = assign(find_layers(model), recipe, config["keep"])
    tensors = tensors_to_observe(model, assignment, scheme)
    del model
    summary: dict[str, Any] = {"recipe": recipe, "scheme": asdict(scheme)}
    layers: dict[str, Any] = {}
    ranges, relative_l2 = {}, 0.0
    if recording is not None:
        seen = observe(graph, tensors, lambda: recording.calls(name), histograms=config["estimator"] != "minmax")
        ranges = estimate(seen, config["estimator"], scheme)
        rounded = {t: [float(f"{v:.6g}") for v in r] for t, r in sorted(ranges.items())}
        summary |= {"estimator": config["estimator"], "recording": recording.identity,
                    "ranges_sha256": digest_of(rounded)}
        layers |= {"ranges": rounded, "drift": drift(seen)}
    report = quantize(graph, destination, assignment, ranges, scheme).to_json()
    layers["precision_map"] = report.pop("precision_map")
    if recording is not None:
        relative_l2 = compare(graph, destination, lambda: recording.calls(name))
    return {"summary": {**summary, **report}, "layers": layers, "relative_l2": relative_l2}


def names_in(bundle: Bundle) -> dict[str, list[str]]:
    """Component -> everything that a pattern of `keep` may name."""
    import onnx_ir as ir

    from calibration.layers import find_layers, names_of

    return {name: [text for layer in find_layers(ir.load(bundle.file(component.file))) for text in names_of(layer)]
            for name, component in bundle.manifest.components.items()}


def measured_gain(before: Bundle, after: Bundle, name: str) -> dict[str, Any]:
    """Bytes and seconds of one component before and after, and in a word what that makes it."""
    import numpy as np

    from runtimes.session import SessionOptions, open_session
    from runtimes.tensors import DTYPES

    component = before.component(name)
    sizes = {axis: a.range.opt for axis, a in component.axes.items()}
    random = np.random.default_rng(0)
    feeds = {s.name: random.standard_normal(s.resolve(sizes)).astype(DTYPES[s.dtype]) if s.dtype.startswith("float")
             else np.zeros(s.resolve(sizes), DTYPES[s.dtype]) for s in component.inputs}
    sessions = [open_session(b, name, SessionOptions()) for b in (before, after)]
    seconds: list[list[float]] = [[], []]
    for _ in range(TIMED_ROUNDS):
        for session, taken in zip(sessions, seconds, strict=True):
            began = time.perf_counter()
            for _ in range(TIMED_CALLS):
                session.run(feeds)
            taken.append((time.perf_counter() - began) / TIMED_CALLS)
    times = float(np.median(np.array(seconds[1]) / np.array(seconds[0])))
    size = after.component(name).bytes / component.bytes
    words = [word for word, ratio in (("smaller", size), ("faster", times)) if ratio < 0.97]
    return {"bytes_ratio": round(size, 4), "seconds_ratio": round(times, 3),
            "seconds": [float(f"{min(s):.3g}") for s in seconds], "verdict": " and ".join(words) or "neither"}
