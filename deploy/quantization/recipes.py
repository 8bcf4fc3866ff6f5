"""How one graph becomes INT8: calibration data, ranges, recipes, and the search behind `--precision auto`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Manifest, PipelineFacts, digest_of

if TYPE_CHECKING:
    from calibration.choice.layer_sensitivity import Relief
    from calibration.choice.quantization_noise import LayerNoise
    from calibration.integers.ranges import Scheme
    from calibration.trajectory.recorder import Recording
    from deploy.core.spec import BuildSpec

DEFAULT_PROMPTS = 64
NEEDS_RANGES = ("hybrid", "static", "auto")
VAE = ("vae_encoder", "vae_decoder")
NOISE_CALLS = 6  # that say which layers add most of the error, and how much is left


def plan_calibration(before: Manifest, spec: BuildSpec) -> dict[str, Any]:
    """What will be recorded, resolved; refuses too few samples before any work."""
    from calibration.trajectory.prompts import STEPS, STRENGTH, plan_episodes
    from deploy.parity.options import ParityOptions

    prompts = spec.calibration_prompts or default_prompts(before.source.id)
    episodes = plan_episodes(prompts, spec.calibration_samples)
    planned = {"prompts": list(prompts[: len(episodes) + 1]), "samples": spec.calibration_samples, "steps": STEPS,
               "strength": STRENGTH, "guidance_scale": ParityOptions.guidance_scale}
    # Only where it holds: what was made of other U-Nets stays in the cache.
    return {**planned, "inpaints": True} if takes_masks(before) else planned


def takes_masks(manifest: Manifest) -> bool:
    """Whether the U-Net is one for inpainting, which is calibrated with masks."""
    from runtimes.backends.batching import Listed
    from runtimes.pipeline.initial_latents import inpaints

    unet = manifest.components.get("unet")
    return unet is not None and inpaints(Listed("unet", unet), manifest.pipeline.latent_channels)


def default_prompts(source_id: str) -> tuple[str, ...]:
    """The reference model's subjects that its retrieval score does not ask for; everyday things for other models."""
    from deploy.parity.options import options_for

    options = options_for(source_id, ())
    if not options.retrieval_prompts:
        return options.prompts
    from deploy.reference_models import subject_names

    scored = {*options.retrieval_prompts, *options.prompts}
    names = [name for name in subject_names() if name not in scored]
    return tuple(names[i * len(names) // DEFAULT_PROMPTS] for i in range(DEFAULT_PROMPTS))


def record_calibration(source: Bundle, calibration: Mapping[str, Any]) -> Recording:
    """Record the float32 graphs' inputs, or find the recording of an earlier build of the same graphs.

    Images have the size that the build's shapes call the most common.
    """
    from calibration.trajectory.prompts import plan_episodes
    from calibration.trajectory.recorder import record
    from deploy.core.pass_cache import default_root, pipeline_identity
    from deploy.parity.reference.trajectories import assemble_pipeline
    from runtimes.backends.session import SessionOptions
    from runtimes.pipeline.bundle_sessions import BundleSessions

    steps, strength = calibration["steps"], calibration["strength"]
    episodes = plan_episodes(calibration["prompts"], calibration["samples"], steps=steps, strength=strength,
                             inpaints=calibration.get("inpaints", False))
    facts = at_common_size(source.manifest)
    manifest = replace(source.manifest, pipeline=facts)
    source = replace(source, manifest=manifest)
    identity = {"components": {n: c.sha256 for n, c in sorted(manifest.components.items())},
                **pipeline_identity(manifest)}
    return record(dict(BundleSessions(source, SessionOptions())), lambda sessions: assemble_pipeline(sessions, source),
                  episodes, default_root() / "calibration", source=identity,
                  guidance_scale=calibration["guidance_scale"], steps=steps, strength=strength)


def at_common_size(manifest: Manifest) -> PipelineFacts:
    """The pipeline's facts with the image size that is the `opt` of the U-Net's axes, where those are dynamic."""
    facts, unet = manifest.pipeline, manifest.components.get("unet")
    if unet is None or not {"height", "width"} <= unet.axes.keys():
        return facts
    height, width = (facts.vae_scale_factor * unet.axes[name].range.opt for name in ("height", "width"))
    return replace(facts, height=height, width=width)


def quantize_by_recipe(source: Bundle, destination: Path, config: Mapping[str, Any], scheme: Scheme, name: str,
                       recording: Recording | None) -> dict[str, Any]:
    """Quantize one component by its recipe, or by another where that does not fit: what and why stands in the summary.

    Returns:
        as `quantize_component` does.
    """
    graph, recipe = source.file(source.component(name).file), config["recipes"][name]
    needs_ranges = recipe in NEEDS_RANGES
    if needs_ranges and (recording is None or next(recording.calls(name), None) is None):
        found = quantize_component(graph, destination, "weight-only", config, scheme, name, None)
        found["summary"]["instead_of"] = f"{recipe}: the pipeline does not call it while calibrating"
        return found
    found = quantize_component(graph, destination, recipe, config, scheme, name, recording if needs_ranges else None)
    if name in VAE and found["relative_l2"] > config["relative_l2"] / 2:
        # Its error goes into the image directly; half of the budget is left for the latents'.
        lost = found["relative_l2"]
        found = quantize_component(graph, destination, "weight-only", config, scheme, name, None)
        found["summary"]["instead_of"] = f"{recipe}, whose relative L2 was {lost:.2g}"
    return found


def quantize_component(graph: Path, destination: Path, recipe: str, config: Mapping[str, Any], scheme: Scheme,
                       name: str, recording: Recording | None) -> dict[str, Any]:
    """Quantize one graph by one recipe.

    Returns:
        "summary" for the manifest's details, "layers" for the file beside the graph, "relative_l2" of the outputs on
        the recorded calls, 0 where there are none.
    """
    import onnx_ir as ir

    from calibration.graphs.layers import INT4, assign, find_layers
    from calibration.graphs.qdq_placement import quantize
    from calibration.graphs.transforms import ALPHA, channel_means, prepare
    from calibration.trajectory.inner_tensors import compare

    summary: dict[str, Any] = {"recipe": recipe, "scheme": asdict(scheme)}
    layers: dict[str, Any] = {}
    if recipe == INT4:
        report = store_in_4_bits(graph, destination, config, scheme)
        layers["precision_map"] = report.pop("precision_map")
        return {"summary": {**summary, **report}, "layers": layers, "relative_l2": 0.0}
    ranges: dict[str, tuple[float, float]] = {}
    lost, means, original = 0.0, {}, graph
    with tempfile.TemporaryDirectory(prefix="ldm-quantize-") as scratch:
        if recording is not None:
            graph = prepare(graph, config["methods"], lambda: recording.calls(name), Path(scratch) / graph.name,
                            config.get("smoothquant_alpha", ALPHA))
        assignment = assign(find_layers(ir.load(graph)), recipe, config["keep"])
        if recording is not None:
            ranges, layers = find_ranges(graph, assignment, config, scheme, name, recording)
            summary |= {"estimator": config["estimator"], "recording": recording.identity,
                        "methods": config["methods"], "ranges_sha256": digest_of(layers["ranges"])}
            if recipe == "hybrid":
                relief = relieved(graph, assignment, ranges, scheme, name, recording)
                before, after = (float(f"{error:.4g}") for error in relief.errors)
                summary["relief"] = {"promoted": relief.promoted, "trials": relief.trials,
                                     "relative_l2": [before, after]}
                assignment, layers["errors"] = relief.assignment, told(relief.noise)
            if "bias-correction" in config["methods"]:
                means = channel_means(graph, assignment, lambda: recording.calls(name))
        report = quantize(graph, destination, assignment, ranges, scheme, means).to_json()
    layers["precision_map"] = report.pop("precision_map")
    if recording is not None:
        lost = compare(original, destination, lambda: recording.calls(name))
    return {"summary": {**summary, **report}, "layers": layers, "relative_l2": lost}


def store_in_4_bits(graph: Path, destination: Path, config: Mapping[str, Any], scheme: Scheme) -> dict[str, Any]:
    """Store a text encoder's products in 4 bits and its embeddings in 8; what became of each layer, as JSON."""
    import onnx_ir as ir

    from calibration.graphs.layers import INT4, assign
    from calibration.graphs.text_encoder_int4 import BlockForm, find_stored, quantize_int4
    from calibration.integers.int4_blocks import GROUP

    form = BlockForm(**config["blocks"])
    assignment = assign(find_stored(ir.load(graph), form), INT4, config["keep"])
    report = quantize_int4(graph, destination, assignment, form, scheme).to_json()
    return {**report, "blocks": {"bits": 4, "inputs": GROUP, **config["blocks"]}}


def relieved(graph: Path, assignment: dict[str, str], ranges: Mapping[str, tuple[float, float]], scheme: Scheme,
             name: str, recording: Recording) -> Relief:
    """The assignment without the layers that add most of the output's error, and what that was worth."""
    from calibration.choice.layer_sensitivity import relieve

    calls = recording.spread(name, NOISE_CALLS)
    return relieve(graph, assignment, ranges, scheme, lambda: calls)


def told(noise: Mapping[str, LayerNoise]) -> dict[str, dict[str, float]]:
    """What each layer was predicted to cost in each precision, as JSON."""
    return {node: {precision: float(f"{error:.4g}") for precision, error in entry.errors.items()}
            for node, entry in sorted(noise.items())}


def find_ranges(graph: Path, assignment: Mapping[str, str], config: Mapping[str, Any], scheme: Scheme, name: str,
                recording: Recording) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Ranges of every activation that the assignment quantizes; the same rounded, and their drift, as JSON."""
    import onnx_ir as ir

    from calibration.graphs.qdq_placement import tensors_to_observe
    from calibration.integers.ranges import drift, estimate
    from calibration.trajectory.inner_tensors import observe

    tensors = tensors_to_observe(ir.load(graph), assignment, scheme)
    seen = observe(graph, tensors, lambda: recording.calls(name), histograms=config["estimator"] != "minmax")
    ranges = estimate(seen, config["estimator"], scheme)
    rounded = {tensor: [float(f"{end:.6g}") for end in ends] for tensor, ends in sorted(ranges.items())}
    return ranges, {"ranges": rounded, "drift": drift(seen)}


def names_in(bundle: Bundle) -> dict[str, list[str]]:
    """Component -> everything that a pattern of `keep` may name."""
    import onnx_ir as ir

    from calibration.graphs.layers import find_embeddings, find_layers, names_of

    graphs = {name: ir.load(bundle.file(component.file)) for name, component in bundle.manifest.components.items()}
    return {name: [text for layer in (*find_layers(graph), *find_embeddings(graph)) for text in names_of(layer)]
            for name, graph in graphs.items()}


def search_unet(source: Bundle, destination: Path, config: Mapping[str, Any], scheme: Scheme, recording: Recording,
                ) -> dict[str, Any]:
    """Find the cheapest assignment of precisions to the U-Net's layers that keeps the image-level budget.

    Every layer begins in integers. What each costs the output is predicted (`quantization_noise`); layers then go back
    to float32, the most error for the least bytes and time first, and halving finds how many must. Each trial generates
    what the gate will generate, with the other components quantized as well. The hybrid recipe is a trial too.

    Returns:
        as `quantize_component` does; the layers' file also holds the errors and the Pareto front.

    Raises:
        ParityError: the budget cannot be met; names the best found.
    """
    import onnx_ir as ir

    from calibration.choice.layer_sensitivity import assignment_after, promotions
    from calibration.choice.quantization_noise import predict_noise
    from calibration.graphs.layers import assign, find_layers
    from calibration.graphs.qdq_placement import quantize
    from calibration.graphs.transforms import ALPHA, channel_means, prepare
    from deploy.core.budgets import Budget
    from deploy.quantization.precision_search import Trials, search
    from runtimes.pipeline.bundle_sessions import needed

    with tempfile.TemporaryDirectory(prefix="ldm-search-") as scratch:
        graph = source.file(source.component("unet").file)
        graph = prepare(graph, config["methods"], lambda: recording.calls("unet"), Path(scratch) / "prepared.onnx",
                        config.get("smoothquant_alpha", ALPHA))
        layers = find_layers(ir.load(graph))
        start = assign(layers, "static", config["keep"])
        ranges, observed = find_ranges(graph, start, config, scheme, "unet", recording)
        calls = recording.spread("unet", NOISE_CALLS)
        noise = predict_noise(graph, start, ranges, scheme, lambda: calls)
        path = promotions(layers, noise, start)
        means = channel_means(graph, start, lambda: recording.calls("unet")) if (
            "bias-correction" in config["methods"]) else {}
        reports: dict[Path, dict[str, Any]] = {}

        def build(name: str, assignment: Mapping[str, str]) -> Path:
            file = Path(scratch) / name / "model.onnx"
            file.parent.mkdir(exist_ok=True)
            reports[file] = quantize(graph, file, assignment, ranges, scheme, means).to_json()
            return file

        low = {}
        for other in needed(source.manifest.pipeline):
            if other != "unet":
                low[other] = Path(scratch) / other / "model.onnx"
                low[other].parent.mkdir()
                quantize_by_recipe(source, low[other], config, scheme, other, recording)
        trials = Trials(source, low, Budget(**config["search"]["budget"]), tuple(config["search"]["prompts"]))
        hybrid = relieved(graph, assign(layers, "hybrid", config["keep"]), ranges, scheme, "unet", recording).assignment
        assignments = {"hybrid": hybrid}

        def promoted(count: int) -> Path:
            name = f"{count} promotions"
            assignments[name] = assignment_after(path, count, start)
            return build(str(count), assignments[name])

        best, name = search(trials, build("hybrid", hybrid), promoted, len(path))
        for part in best.parent.iterdir():
            shutil.copy(part, destination.parent / part.name)
    report = {key: value for key, value in reports[best].items() if key != "precision_map"}
    return {"summary": {"recipe": "auto", "scheme": asdict(scheme), "estimator": config["estimator"],
                        "recording": recording.identity, "methods": config["methods"],
                        "ranges_sha256": digest_of(observed["ranges"]), "chosen": name, "trials": len(trials.done),
                        **report},
            "layers": {**observed, "precision_map": dict(sorted(assignments[name].items())),
                       "errors": told(noise), "front": trials.front()},
            "relative_l2": 0.0}

