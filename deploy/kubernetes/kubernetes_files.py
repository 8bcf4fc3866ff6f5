"""Writes a folder that `kubectl apply -k` takes: a server of bundles on Kubernetes, with a README of what to do.

No key is ever written: a Secret is named, and the README has the command that makes it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from deploy.kubernetes.kubernetes_options import KubernetesOptions
from runtimes.bundle.folder import Bundle
from runtimes.errors import InputError, UnavailableError

TEMPLATES = Path(__file__).parents[1] / "templates" / "kubernetes"
MARKER = "# Written by `deploy export-kubernetes`"  # opens kustomization.yaml; only such a folder is ever replaced
MODEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")
EMPTY_LINES = re.compile(r"^ *\n", re.MULTILINE)  # what a macro without text leaves
PORT, ENGINE_PORT = 8000, 8001
KUBERNETES_VERSION, KUBERAY_VERSION = "1.37", "1.7.0"  # whose schemas tests/deploy/kubernetes compares with
QUEUE_METRIC = "ldm_queue_depth"
FRONT_CPUS = 0.5  # of a Ray worker pod: HTTP and Ray's own processes
RAY_VERSION = "2.60.0"  # in the containers: constraints.txt has it, and KubeRay's `rayVersion` must name it
PRE_STOP_SECONDS = 5  # until the Service sends nothing more to a pod that ends
# Which files a layout has; `host` adds ingress.yaml.
OF_LAYOUT: Mapping[str, tuple[str, ...]] = {
    "single": ("server.yaml", "service.yaml", "disruption-budget.yaml", "network-policy.yaml"),
    "engines": ("server.yaml", "engines.yaml", "autoscaler.yaml", "service.yaml", "disruption-budget.yaml",
                "network-policy.yaml"),
    "ray": ("ray-service.yaml", "state-claim.yaml", "disruption-budget.yaml", "network-policy.yaml"),
}


def export_kubernetes(bundles: Sequence[Bundle], out: Path, options: KubernetesOptions | None = None,
                      ) -> tuple[str, ...]:
    """Write the manifests; `kubectl apply -k OUT` makes them run.

    Args:
        bundles: that are served, each under its folder's name.
        out: a new folder, or one that this function wrote before and nothing was added to.
        options: how the server is laid out.

    Returns:
        the names of the files, in order.

    Raises:
        InputError: two bundles of one name, a name that cannot be one of a model, or an output folder that is something
            else.
        UnavailableError: jinja2 is not installed.
    """
    files = dict(rendered(bundles, options or KubernetesOptions()))
    check_replaceable(out, set(files))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return tuple(sorted(files))


def rendered(bundles: Sequence[Bundle], options: KubernetesOptions) -> Iterator[tuple[str, str]]:
    """Name and text of every file."""
    try:
        import jinja2
    except ImportError as error:
        raise UnavailableError("jinja2 is not installed", where="export-kubernetes",
                               fix="pip install 'ldm-deploy[build]'") from error
    # No value needs escaping: those of the options are checked, and a model's name is as narrow.
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["block"] = lambda text, width: indent(text.strip("\n"), " " * width).lstrip()
    values = facts(bundles, options)
    manifests = [*OF_LAYOUT[options.layout], *(["ingress.yaml"] if options.host else []),
                 *(["bundles-claim.yaml"] if options.bundles_in == "claim" else [])]
    for name in (*manifests, "kustomization.yaml", "README.md", "Dockerfile"):
        text = environment.get_template(f"{name}.j2").render(values, manifests=manifests)
        yield name, text if name == "README.md" else EMPTY_LINES.sub("", text)


def facts(bundles: Sequence[Bundle], options: KubernetesOptions) -> dict[str, Any]:
    """What the templates are given.

    Raises:
        InputError: two bundles of one name, or a name that cannot be one of a model.
    """
    models = {bundle.path.resolve().name: bundle for bundle in bundles}
    if len(models) < len(bundles):
        raise InputError("two bundles have the same name", where=", ".join(str(bundle.path) for bundle in bundles),
                         fix="rename a folder: its name is the model's name in requests")
    for name in models:
        if not MODEL.fullmatch(name):
            raise InputError("the folder's name is the model's name there: at most 40 small letters, digits and -",
                             where=name, fix="rename the folder")
    digests = {name: bundle.manifest.digest.removeprefix("sha256:") for name, bundle in models.items()}
    release = "-".join(digest[:12] for digest in list(digests.values())[:4])
    return {
        "o": options, "models": {name: bundle.path.resolve() for name, bundle in models.items()}, "digests": digests,
        "image": options.image or f"{options.name}:{release}", "secret": options.secret or f"{options.name}-keys",
        "bundles_from": options.bundles_from or f"{options.name}-bundles" + (
            f":{release}" if options.bundles_in == "image-volume" else ""),
        "extras": ",".join(["serve", *(["ray"] if options.layout == "ray" else []), *(["gpu"] if options.gpu else [])]),
        "port": PORT, "engine_port": ENGINE_PORT, "pre_stop": PRE_STOP_SECONDS, "marker": MARKER,
        "grace": PRE_STOP_SECONDS + options.drain_seconds + 15, "ray_version": RAY_VERSION,
        "kuberay_version": KUBERAY_VERSION, "kubernetes_version": KUBERNETES_VERSION, "queue_metric": QUEUE_METRIC,
        "engine_cpus": max(options.cpu - FRONT_CPUS, options.cpu / 2) / (options.gpu or 1),
        "in_namespace": f" -n {options.namespace}" if options.namespace else ""}


def check_replaceable(out: Path, names: set[str]) -> None:
    """Refuse a folder that is not of our making, or that somebody added files to.

    Raises:
        InputError: says which.
    """
    if not out.exists():
        return
    ours = out / "kustomization.yaml"
    if not out.is_dir() or (any(out.iterdir()) and not (
            ours.is_file() and ours.read_text(encoding="utf-8").startswith(MARKER))):
        raise InputError("the output exists and was not written by this command; it is left as it was", where=str(out),
                         fix="choose another -o or remove it yourself")
    every = names | {name for files in OF_LAYOUT.values() for name in files} | {"ingress.yaml", "bundles-claim.yaml"}
    if added := sorted(file.name for file in out.iterdir() if file.name not in every):
        raise InputError(f"it has files that this command did not write: {', '.join(added)}", where=str(out),
                         fix="keep your changes in an overlay of your own that names this folder as a resource")
