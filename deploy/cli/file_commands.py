"""`convert` and the exports, the commands that write one layout of files from another. Arguments only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli.derived_options import Option, described, from_dataclass


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=".safetensors file with all networks")],
    configs: Annotated[Path, described("diffusers folder of the same architecture, its weights not read")],
    output: Annotated[Path, described("folder to write, for `build`", "-o", "--output")],
) -> None:
    """Turn a single-file checkpoint (CompVis, A1111) into a diffusers folder. Nothing is downloaded."""
    from deploy.cli import console
    from exporters.source.single_file import convert_single_file

    with console.shown_progress():
        written = convert_single_file(checkpoint, configs, output)
    console.say(f"wrote {written}")


def export_triton(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="folder that `build` wrote")],
    output: Annotated[Path, described("folder of the model repository", "-o", "--output")],
    instances: Annotated[int, described("copies of each model that serve at the same time", default=1, least=1)] = 1,
    gpu: Annotated[bool, described("place the models on GPUs", "--gpu", default=False)] = False,
) -> None:
    """Write a model repository for the Triton Inference Server."""
    from deploy.building import triton_repository as repository
    from deploy.cli import console
    from runtimes.bundle.folder import Bundle

    options = repository.TritonOptions(instances=instances, gpu=gpu)
    console.show_repository(output, repository.export_triton(Bundle.open(bundle), output, options))


def kubernetes_options() -> list[Option]:
    """The bundles, the folder, and the fields of `KubernetesOptions`."""
    from deploy.kubernetes.kubernetes_options import KubernetesOptions

    return [Option("bundles", list[Path], "folders that `build` wrote", argument="BUNDLE...", required=True),
            Option("output", Path, "folder to write, required", flags=("-o", "--output"), required=True),
            *from_dataclass(KubernetesOptions)]


def export_kubernetes(given: dict[str, Any]) -> None:
    """Write manifests that serve bundles on Kubernetes: one server, scaled engines, or Ray Serve under KubeRay."""
    from deploy.cli import console
    from deploy.kubernetes.kubernetes_files import export_kubernetes
    from deploy.kubernetes.kubernetes_options import KubernetesOptions
    from runtimes.bundle.folder import Bundle

    bundles, output = given.pop("bundles"), given.pop("output")
    options = KubernetesOptions(**given)
    console.show_repository(output, export_kubernetes([Bundle.open(bundle) for bundle in bundles], output, options))
