"""Applies all prunings of one network in their order, and writes the pruned network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deploy.pruning.shrink.whole_blocks import remove_blocks
from deploy.pruning.shrink.zeroed_weights import mask_textbook, mask_two_of_four
from deploy.pruning.teacher.denoising_runs import Batch
from deploy.pruning.teacher.original import Teacher, example_feeds, load_source_module
from runtimes.bundle.folder import Bundle
from runtimes.bundle.roles import Role

SCAN_BATCHES, SCAN_SIZE = 16, 8
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}


def prune_denoiser(source: Bundle, name: str, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Remove blocks, then channels, then single weights of a denoising network.

    Args:
        source: a bundle in the format "safetensors".
        name: of the network.
        config: of pass `prune`.

    Returns:
        the network, and what became of it, JSON-able.

    Raises:
        InputError: a ratio or a kind of blocks that this network cannot lose; names the level and what works.
    """
    network = load_source_module(source, source.component(name))
    details: dict[str, Any] = {"parameters_before": size_of(network)}
    if config["blocks"] != "none":
        network = remove_blocks(network, config["blocks"], name)
    if config["prune"]:
        network, details["channels"] = _narrowed(network, source, name, config)
    if config["mask"] != "none":
        {"textbook": mask_textbook, "2:4": mask_two_of_four}[config["mask"]](network)
        weights = [p for p in network.parameters() if p.ndim > 1]
        details["zeros"] = round(float(sum((w == 0).sum() for w in weights)) / sum(w.numel() for w in weights), 4)
    return network, details


def write_network(network: Any, file: Path, precision: str) -> None:
    """Write weights and config.json beside them.

    Args:
        network: a diffusers network.
        file: of the weights.
        precision: that the original is stored in, so that the pipeline stays of one dtype: "fp32", "fp16", "bf16".
    """
    from safetensors.torch import save_file

    dtype = STORED.get(precision, torch.float32)
    save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in network.state_dict().items()}, file)
    content = {k: v for k, v in json.loads(network.to_json_string()).items() if k != "_name_or_path"}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (file.parent / "config.json").write_text(text, encoding="utf-8")


def _narrowed(network: Any, source: Bundle, name: str, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from deploy.pruning.shrink.importance import accumulate_gradients, scorer_of
    from deploy.pruning.shrink.structured import prune_network
    from deploy.pruning.shrink.width_sensitivity import scan, sensitive_widths
    from deploy.pruning.shrink.widths import Widths, config_of, levels_of, uniform_widths

    levels, ratio = levels_of(config_of(network), name), config["prune"]
    widths = uniform_widths(levels, ratio, name)  # before any image is generated: it refuses impossible ratios
    feeds = {Role.DENOISER: example_feeds(source.component(name))}
    scorer = scorer_of(config["method"])
    by_generating = config["method"] == "taylor" or config["widths"] == "sensitivity"
    teacher = Teacher.load(source, name, config["prompts"], config["guidance_scale"]) if by_generating else None
    details: dict[str, Any] = {"method": config["method"]}
    if teacher is not None and config["method"] == "taylor":
        accumulate_gradients(network, teacher)
    if teacher is not None and config["widths"] == "sensitivity":
        stream = iter(teacher.trajectories(SCAN_SIZE, seed=1))
        batches = [next(stream) for _ in range(SCAN_BATCHES)]

        def error_of(widths: Widths) -> float:
            return relative_error(prune_network(network, feeds, widths, scorer, name), batches)

        errors = scan(levels, error_of)
        widths = sensitive_widths(levels, ratio, errors)
        details["sensitivity"] = [{str(w): round(e, 5) for w, e in sorted(level.items())} for level in errors]
    details |= {"before": [level.width for level in levels], "kept": list(widths.remaining),
                "heads": list(widths.heads), "removed": round(widths.removed, 4)}
    return prune_network(network, feeds, widths, scorer, name), details


@torch.no_grad()
def relative_error(network: Any, batches: list[Batch]) -> float:
    """||network - teacher|| / ||teacher|| over all batches."""
    wrong = true = 0.0
    for batch in batches:
        output = network(batch.sample, batch.timestep, batch.states, return_dict=False)[0]
        wrong += float((output - batch.output).square().sum())
        true += float(batch.output.square().sum())
    return math.sqrt(wrong / true)


def size_of(network: torch.nn.Module) -> int:
    """How many weights it has."""
    return sum(parameter.numel() for parameter in network.parameters())
