"""Export a component of a source and compare it with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporters.families import ComponentSpec, family_of
from exporters.source.model_folder import Source


def component_module(source: Source, spec: ComponentSpec) -> Any:
    from exporters.source.networks import load_module, torch_component

    origin = source.components[spec.source_component]
    role = family_of(source.pipeline_class).roles(source).role(spec.name)
    return torch_component(role, load_module(origin.folder, origin.library, origin.class_name))


def export_component(source: Source, name: str, folder: Path) -> Any:
    from exporters.onnx.trace import export_onnx

    spec = family_of(source.pipeline_class).components(source, {})[name]
    return export_onnx(component_module(source, spec), spec, folder)


def feeds_for(spec: ComponentSpec, batch: int, rows: int, columns: int, sequence: int) -> dict[str, np.ndarray]:
    """Random inputs; rows and columns count the axis' multiples."""
    sizes = {name: {"batch": batch, "sequence": sequence}.get(
        name, axis.multiple * (rows if "height" in name else columns)) for name, axis in spec.axes.items()}
    random = np.random.default_rng(batch + rows + columns + sequence)
    return {t.name: random.integers(0, 99, t.resolve(sizes)) if t.dtype == "int64"
            else random.standard_normal(t.resolve(sizes), dtype=np.float32) for t in spec.inputs}


def run_torch(module: Any, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    import torch

    with torch.no_grad():
        output: np.ndarray = module(*(torch.from_numpy(array) for array in feeds.values()))[0].numpy()
    return output


def run_onnx(file: Path, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    output: np.ndarray = onnxruntime.InferenceSession(file).run(None, dict(feeds))[0]
    return output


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    assert value.shape == reference.shape
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
