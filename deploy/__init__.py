"""Compiles trained latent diffusion pipelines into bundles. From Python: `deploy.build(model, target=..., ...)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtimes.bundle.folder import Bundle

__all__ = ["build"]


def build(model: str | Path = "reference", *, output: Path | str | None = None, **options: Any) -> Bundle:
    """Build a bundle: what `python -m deploy build` does, under the same words.

    Args:
        model: folder in diffusers layout, or "reference" for the model that ships with the package.
        output: folder of the bundle; default `build/<model>-<target>-<precision>`.
        options: fields of `deploy.core.spec.BuildSpec`: target, precision, shapes, prune, lora, ...

    Returns:
        the finished bundle; `runtimes.load` generates with it.

    Raises:
        InputError: an unknown option, a bad model or output; nothing is written.
        ParityError: a pass broke the accuracy budget.
        UnavailableError: this machine lacks something.
    """
    from deploy.building.run_build import run_build
    from deploy.core.spec import make_spec

    return run_build(make_spec({"model": str(model), **options}), None if output is None else Path(output)).bundle
