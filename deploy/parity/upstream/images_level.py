"""Level *images*: compares images of diffusers' pipeline with ours at float32, then with the compiled bundle's.

Imports torch; import it inside the function that needs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from deploy.parity.metrics import psnr_db
from deploy.parity.reference.trajectories import assemble_pipeline
from deploy.parity.upstream.asked_model import Upstream
from deploy.parity.upstream.asked_requests import Asked
from deploy.parity.upstream.diffusers_loading import (
    CannotLoadError,
    check_noise,
    load_loras,
    load_pipeline,
    load_words,
    loader_faults,
    part_of,
    source_of,
    upstream_errors,
)
from exporters.source.diffusers_pipeline import upstream_class
from runtimes.backends.session import Session
from runtimes.bundle.folder import Bundle
from runtimes.errors import DeployError

Array = np.ndarray[Any, Any]


@dataclass
class ImagesReport:
    """What was compared.

    Attributes:
        source_psnr_db: request -> worst image of our pipeline over PyTorch's networks against diffusers'.
        bundle_psnr_db: request -> worst image of the bundle against diffusers'; missing where it was not run.
        problems: request -> why ours does not generate what diffusers does.
        unverified: mode -> why nothing could be compared.
    """

    source_psnr_db: dict[str, float] = field(default_factory=dict)
    bundle_psnr_db: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    unverified: dict[str, str] = field(default_factory=dict)


def compare_images(upstream: Upstream, source: Bundle, networks: Mapping[str, Session], requests: Sequence[Asked],
                   bundle: Bundle | None = None, sessions: Mapping[str, Session] | None = None) -> ImagesReport:
    """Generate with all of them and compare.

    Args:
        upstream: the model as its user has it.
        source: the same model after the passes `load` and `adapters`.
        networks: of the source, by PyTorch.
        requests: what is generated.
        bundle: a bundle made from it, with its `sessions`; the source alone without.
    """
    report = ImagesReport()
    if faults := loader_faults(upstream):
        return ImagesReport(unverified={asked.mode: "; ".join(faults) for asked in requests})
    for asked in requests:
        try:
            expected, parameters = _theirs(upstream, source, asked)
        except CannotLoadError as error:
            report.unverified[asked.mode] = str(error)
            continue
        asked = asked.fitted(parameters)
        given = asked.to_ours(asked.images(), parameters)
        pairs = [(report.source_psnr_db, networks, source)]
        if bundle is not None and sessions is not None:
            pairs.append((report.bundle_psnr_db, sessions, bundle))
        for figures, side, of in pairs:
            try:
                images = assemble_pipeline(side, of)(**given, output="numpy")
            except DeployError as error:
                report.problems[asked.name] = str(error)
                break
            figures[asked.name] = min((psnr_db(a, b) for a, b in zip(expected, images, strict=True)),
                                      default=0.0) if images.shape == expected.shape else 0.0
    return report


def _theirs(upstream: Upstream, source: Bundle, asked: Asked) -> tuple[Array, frozenset[str]]:
    """diffusers' images, (B, H, W, 3) float32 in 0..1, and the parameters that its call knows.

    Raises:
        CannotLoadError: it has no pipeline for the mode, or refuses.
    """
    model = source_of(upstream)
    if upstream_class(model, asked.mode) is None:
        raise CannotLoadError("diffusers has no pipeline for it")
    pipe = load_pipeline(upstream, asked.mode, {}, read=tuple(model.components), dtype=torch.float32)
    check_noise(pipe)
    load_loras(upstream, pipe)
    for reader in source.manifest.pipeline.conditioner.encoders if upstream.embeddings else ():
        load_words(upstream, source, pipe, reader, getattr(pipe, part_of(source.component(reader.component))))
    parameters = frozenset(inspect.signature(pipe.__call__).parameters)
    asked = asked.fitted(parameters)
    generators = [torch.Generator().manual_seed(asked.seed + i) for i in range(len(asked.prompts))]
    with upstream_errors():
        images = pipe(**asked.to_theirs(asked.images(), generators, parameters), output_type="np").images
    return np.asarray(images, np.float32), parameters
