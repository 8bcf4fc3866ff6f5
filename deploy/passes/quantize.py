"""`quantize`: gives graphs 8-bit weights and activations, with ranges recorded along the model's own denoising."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from calibration.targets_and_recipes import BLOCKS, INT4, NEEDS_RANGES, SEARCHED, recipe_of, scheme_of
from deploy.core.doctor import sums_in_32_bits
from deploy.core.layer_list import LAYERS_FILE
from deploy.core.plan import Pass, Planned, Skip, Step
from runtimes.bundle.details import GraphDetails, Quantization
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component, Manifest, from_json
from runtimes.errors import InputError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

PRECISIONS = ("int8", "auto")
EXPLAINED_CALLS, EXPLAINED_LAYERS = 8, 3
WORTH_SAYING = 0.97  # of bytes or seconds: what is nearer to 1 is within the noise
TIMED_CALLS = 21


class Quantize(Pass):
    """float32 graphs to INT8 by the recipe of each component; runs before 16 bits, which take what is left."""

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = 6
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx-ir", "onnxruntime")
    verify: ClassVar[bool] = True
    reads_pipeline: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Every float32 graph, when the spec says int8, or auto, which searches the U-Net's precisions."""
        if spec.precision not in PRECISIONS:
            return Skip(f"the build is {spec.precision}")
        for name, component in before.components.items():
            if component.format != "onnx" or component.precision != "fp32":
                raise InputError(f"{name} is {component.format} in {component.precision}, expected onnx in fp32",
                                 where="pass quantize", fix="quantize comes after optimize and before precision")
        if spec.quantization == "dynamic" and spec.graph_target != "onnxruntime":
            raise InputError(f"{spec.graph_target} has no kernels for ranges found at run time", where="quantization",
                             fix="use hybrid or static")
        denoiser = before.pipeline.denoiser.component
        recipes = {name: recipe_of(before.pipeline.role(name), spec.quantization, spec.text_encoder_bits)
                   for name in before.components}
        if spec.precision == "auto" and denoiser in recipes:
            recipes[denoiser] = SEARCHED
        config = _config(before, spec, recipes)
        every = tuple(before.components)
        reads = {name: every if recipes[name] in NEEDS_RANGES else (name,) for name in every}
        components = {n: replace(c, precision="int4" if recipes[n] == INT4 else "int8", files={})
                      for n, c in before.components.items()}
        step = Step(self.name, self.version, config, reads, replace(before, components=components),
                    f"INT8, {'searched' if 'search' in config else spec.quantization}")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Quantize one graph; which layer became what, and every range, lies beside it."""
        from calibration.graphs.layers import check_patterns, quantizable
        from calibration.recipes.one_graph import Settings, quantize_by_recipe
        from deploy.quantization.calibration_data import record_calibration
        from deploy.quantization.precision_search import search_denoiser

        planned, config, recipe = step.after.components[name], step.config, step.config["recipes"][name]
        graphs = {part: source.file(component.file) for part, component in source.manifest.components.items()}
        check_patterns(config["keep"], {part: quantizable(graph) for part, graph in graphs.items()})
        folder = out / "components" / name
        folder.mkdir(parents=True)
        target, settings = folder / "model.onnx", Settings.from_config(config)
        recording = record_calibration(source, config["calibration"]) if recipe in NEEDS_RANGES else None
        if recording is not None and recipe == SEARCHED:
            found = search_denoiser(source, target, config, recording)
        else:
            role = source.manifest.pipeline.role(name)
            found = quantize_by_recipe(graphs[name], target, recipe, settings, name, role, recording)
        (folder / LAYERS_FILE).write_text(json.dumps(found.layers, sort_keys=True), encoding="utf-8")
        summary = from_json(Quantization, found.summary, name)
        return replace(planned, files=records_below(folder, out),
                       details=replace(source.component(name).details_as(GraphDetails), quantization=summary))

    def explain(self, step: Step, name: str, before: Bundle, after: Bundle) -> str:
        """The layers that add most of the error, by activations of the two graphs on recorded inputs."""
        if step.config["recipes"][name] == INT4:
            return "its weights have 4 bits: --text-encoder-bits 8 is about ten times as accurate"
        if "calibration" not in step.config:
            return ""
        from calibration.choice.layer_sensitivity import error_origins
        from deploy.quantization.calibration_data import record_calibration

        recording = record_calibration(before, step.config["calibration"])
        calls = recording.spread(name, EXPLAINED_CALLS)
        files = [bundle.file(bundle.component(name).file) for bundle in (before, after)]
        origins = error_origins(files[0], files[1], lambda: calls)[:EXPLAINED_LAYERS]
        if not origins:
            return ""
        return (f"relative L2 rises most at {', '.join(map(str, origins))}; "
                f"keep them with {' '.join(f'--keep {o.node}' for o in origins)}")

    def measure(self, step: Step, before: Bundle, after: Bundle) -> dict[str, Any]:
        """What it bought on this machine: bytes and time of a call against float32, from interleaved calls."""
        return {name: measured_gain(before, after, name) for name in step.reads}


def _config(before: Manifest, spec: BuildSpec, recipes: Mapping[str, str]) -> dict[str, Any]:
    """Everything that decides what is written, resolved.

    Raises:
        InputError: 4 bits for a model without a text encoder, or too few samples to calibrate with.
    """
    from deploy.core.budgets import budget_for
    from deploy.parity.comparison_options import options_for
    from deploy.quantization.calibration_data import plan_calibration

    budget = budget_for(spec.precision, spec.budget)
    vnni = sums_in_32_bits() if spec.cpu == "auto" else spec.cpu == "vnni"
    config: dict[str, Any] = {
        "recipes": recipes, "scheme": scheme_of(spec.graph_target, sums_in_32_bits=vnni),
        "estimator": spec.range_estimator, "keep": list(spec.keep), "methods": list(spec.quantization_methods),
        "relative_l2": budget.component_relative_l2,
    }
    if "smoothquant" in spec.quantization_methods:
        config["smoothquant_alpha"] = spec.smoothquant_alpha
    if spec.text_encoder_bits == 4:
        if INT4 not in recipes.values():
            raise InputError("the model has no text encoder", where="--text-encoder-bits", fix="leave it out")
        config["blocks"] = BLOCKS[spec.graph_target]
    if SEARCHED in recipes.values():
        generated = options_for(before.source.id, spec.prompts)
        config["search"] = {"budget": asdict(budget), "prompts": list(generated.prompts),
                            "retrieval": len(generated.retrieval_prompts)}
    if any(recipe in NEEDS_RANGES for recipe in recipes.values()):
        config["calibration"] = plan_calibration(before, spec)
    return config


def measured_gain(before: Bundle, after: Bundle, name: str) -> dict[str, Any]:
    """Bytes and seconds of one component before and after, and in a word what that makes it.

    Seconds are ONNX Runtime's on this CPU, so they are measured for what runs there: another runtime or a GPU
    compiles the graph anew.
    """
    from deploy.core.call_times import quotient, seconds_in_turns, usual_feeds
    from runtimes.backends.session import SessionOptions
    from runtimes.pipeline.bundle_sessions import open_session

    component = before.component(name)
    size = after.component(name).bytes / component.bytes
    if after.manifest.target != "onnxruntime" or "device" in after.manifest.spec:
        return {"bytes_ratio": round(size, 4), "verdict": "smaller" if size < WORTH_SAYING else "neither"}
    sessions = {part: open_session(b, name, SessionOptions()) for part, b in (("before", before), ("after", after))}
    seconds = seconds_in_turns(sessions, usual_feeds(component), TIMED_CALLS)
    times = quotient(seconds["after"], seconds["before"])
    words = [word for word, ratio in (("smaller", size), ("faster", times)) if ratio < WORTH_SAYING]
    return {"bytes_ratio": round(size, 4), "seconds_ratio": round(times, 3),
            "seconds": [float(f"{min(s):.3g}") for s in seconds.values()], "verdict": " and ".join(words) or "neither"}
