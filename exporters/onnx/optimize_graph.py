"""Optimizes an exported graph for its target: constant folding for all, then the fusions that were measured to pay.

Imports onnx and onnxscript; import it inside the function that needs it.

What `FUSIONS_FOR` holds was decided by `python -m exporters.measure.fusion_speed`, which prints these figures again:
speed of one call relative to the exported graph, by CPU time of one thread of an AMD EPYC (Zen 4), onnxruntime 1.32,
float32, the reference model's architecture at 8x8 latents (U-Net, text encoder: batch 2). Runs differ by about 0.015.

    alone                       unet   vae_encoder  vae_decoder  text_encoder
    attention                   1.019  0.982        0.997        1.018
    self_attention              1.021  0.994        1.007        1.029   hides three products from the quantizer: off
    skip_layer_norm             0.975  -            -            0.895   slower: off
    split_geglu                 1.005  -            -            -       nothing: off
    silu                        1.005  0.993        1.003        1.027   onnxruntime does it while loading: off
    channel_affine              1.036  1.006        1.011        -
    join_time_projections       1.022  -            -            -
    all of these                1.028  1.010        1.028        0.921
    the choice below            1.066  1.006        1.011        1.018   nodes of the U-Net: 863 -> 591
    onnxruntime.transformers    0.988  0.996        0.996        0.917   finds skip_layer_norm, QuickGelu; no attention
    choice, no NCHWc layout     0.871  0.787        0.825        1.028   so sessions must load at level ALL
    choice, saved at level ALL  1.089  1.014        1.033        1.054   loads in 41 instead of 64 ms of CPU time

A graph saved at level ALL suits only CPUs like the one that saved it, for 2 % and 23 ms a load: not done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxscript import optimizer

from exporters.onnx import canonical
from exporters.onnx.fusions import FUSIONS
from exporters.onnx.graph_edits import MICROSOFT, number_repeated_names
from exporters.onnx.stored_weights import unmap
from exporters.onnx.trace import count_nodes, save_model
from exporters.quiet import quiet
from runtimes.bundle.roles import Role
from runtimes.errors import BundleError, DeployError

# target -> role -> fusions, in this order. A target that is missing gets the target-independent part alone:
# OpenVINO and TensorRT fuse plain ONNX themselves and do not know onnxruntime's own operators.
FUSIONS_FOR: Mapping[str, Mapping[Role, tuple[str, ...]]] = {
    "onnxruntime": {
        Role.DENOISER: ("attention", "channel_affine", "join_time_projections"),
        Role.SHALLOW: ("attention", "channel_affine"),
        Role.IMAGE_ENCODER: ("channel_affine",),
        Role.IMAGE_DECODER: ("channel_affine",),
        Role.TEXT_ENCODER: ("attention",),
    },
}


@dataclass(frozen=True)
class OptimizeReport:
    """What changed. Holds no measurement, so that equal graphs give equal reports.

    Attributes:
        target: as asked for.
        fusions: name -> number of places it changed.
        nodes_before, nodes_after: op type -> number of nodes.
    """

    target: str
    fusions: Mapping[str, int]
    nodes_before: Mapping[str, int]
    nodes_after: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """For the manifest's details."""
        return {
            "target": self.target,
            "fusions": dict(self.fusions),
            "nodes_before": dict(self.nodes_before),
            "nodes_after": dict(self.nodes_after),
            "nodes": [sum(self.nodes_before.values()), sum(self.nodes_after.values())],
        }


def optimize_onnx(
    source_file: Path, out_file: Path, role: Role, target: str, *, where: str = "",
    fusions: tuple[str, ...] | None = None,
) -> OptimizeReport:
    """Optimize one component.

    Args:
        source_file: ONNX model; external weights lie beside it and are read when they are written.
        out_file: where to write; weights above 1 GiB go to `<out_file>.data`.
        role: of the component: selects the fusions, with the target.
        target: "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx".
        where: names the component in errors; its role by default.
        fusions: names in `exporters.onnx.fusions.FUSIONS`, instead of the table's.

    Raises:
        BundleError: the file is not ONNX.
        DeployError: the result is not valid ONNX; it is a bug of ours.
        UnavailableError: the disk is full.
    """
    where = where or role
    model = _load(source_file, where)
    before = count_nodes(model)
    chosen = fusions if fusions is not None else FUSIONS_FOR.get(target, {}).get(role, ())
    with quiet():
        places = apply(model, {name: FUSIONS[name] for name in chosen})
    save_model(model, out_file)
    try:
        onnx.checker.check_model(str(out_file))
    except onnx.checker.ValidationError as error:
        raise DeployError(f"the optimized graph is not valid ONNX: {str(error).splitlines()[0]}",
                          where=where) from error
    return OptimizeReport(target, places, before, count_nodes(model))


def _load(file: Path, where: str) -> ir.Model:
    try:
        model = ir.load(file)
    except (OSError, ValueError, DecodeError) as error:
        raise BundleError(f"not an ONNX model: {error}", where=f"{where}: {file}",
                          fix="export it again") from error
    unmap(model)
    return model


def apply(model: ir.Model, fusions: Mapping[str, Callable[[ir.Model], int]]) -> dict[str, int]:
    """Fold and clean a graph in place, then apply fusions in order.

    Returns:
        number of places that each fusion changed.
    """
    optimizer.optimize_ir(model)
    canonical.clean(model)
    places = {name: fuse(model) for name, fuse in fusions.items()}
    if any(places.values()):
        model.opset_imports.setdefault(MICROSOFT, 1)
        canonical.clean(model)
    if all(node.domain != MICROSOFT for node in model.graph):
        model.opset_imports.pop(MICROSOFT, None)
    number_repeated_names(model)
    canonical.forget(model)
    return places
