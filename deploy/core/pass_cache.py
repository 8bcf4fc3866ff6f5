"""Caches the results of passes by content: the same inputs, config and library versions are never computed twice.

Layout: `<root>/passes/<key>/` holds component.json and the component's files at their paths within a bundle;
`<root>/facts/<key>.json` holds small measured facts such as parity figures. Time, host and paths never enter a key.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from deploy.core.plan import Pass, Step
from runtimes.bundle.folder import Bundle, link_or_copy, replacing, sha256_of
from runtimes.bundle.manifest import Component, Manifest, digest_of, from_json, to_json
from runtimes.errors import BundleError
from runtimes.system.cache_store import WORK, scratch, sweep, use

COMPONENT_FILE = "component.json"


def versions_of(libraries: tuple[str, ...]) -> dict[str, str]:
    """Installed versions; a library that is absent counts as such."""
    found = {}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "absent"
    return found


def key_of(instance: Pass, step: Step, name: str, source: Bundle) -> str:
    """Cache key of one component written by one step."""
    planned = step.after.components[name]
    # Only where it is read: another scheduler must not export every network again.
    pipeline = {"pipeline": pipeline_identity(source.manifest)} if instance.reads_pipeline else {}
    return digest_of(
        {
            **pipeline,
            "pass": [step.pass_name, step.version, to_json(step.config)],
            "component": [name, source.manifest.pipeline.role(name)],
            "specs": to_json([planned.inputs, planned.outputs, planned.axes]),
            "reads": {read: _contents(source.component(read)) for read in step.reads[name]},
            "libraries": versions_of(instance.libraries),
        }
    )


def pipeline_identity(manifest: Manifest) -> dict[str, Any]:
    """Everything about the sampling loop that decides what is generated with given networks, as JSON."""
    return {"facts": to_json(manifest.pipeline), "files": {n: r.sha256 for n, r in sorted(manifest.files.items())}}


def _contents(component: Component) -> dict[str, Any]:
    """A component by what its files hold; details too: a pass carries them on into the record that is cached."""
    record = to_json(component)
    return {"sha256": component.sha256, **{key: record[key] for key in
            ("format", "class_name", "precision", "inputs", "outputs", "axes", "details")}}


class Cache:
    """A folder of finished results; safe for several builds at once, since entries appear by rename."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, key: str) -> tuple[Component, Path] | None:
        """A finished component and the folder its paths are relative to; a damaged entry is dropped."""
        folder = self.root / "passes" / key
        if not use(folder):
            return None
        try:
            raw = json.loads((folder / COMPONENT_FILE).read_text(encoding="utf-8"))
            component: Component = from_json(Component, raw, key)
        except (OSError, ValueError, BundleError):
            return None
        for name, record in component.files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != record.bytes or sha256_of(path) != record.sha256:
                shutil.rmtree(folder, ignore_errors=True)
                return None
        return component, folder

    def store(self, key: str, produce: Callable[[Path], Component]) -> tuple[Component, Path]:
        """Let `produce` write into a temporary folder, then rename it to the key."""
        passes = self.root / "passes"
        passes.mkdir(parents=True, exist_ok=True)
        with scratch(self.root / WORK) as partial:
            component = produce(partial)
            (partial / COMPONENT_FILE).write_text(json.dumps(to_json(component)), encoding="utf-8")
            try:
                partial.rename(passes / key)
            except OSError:
                # Another build finished the same component first; its bytes are the same.
                if not use(passes / key):
                    raise
        return component, passes / key

    def find_fact(self, key_parts: Any) -> dict[str, Any] | None:
        """A small JSON fact stored before, or nothing."""
        if not use(self._fact_file(key_parts)):
            return None
        try:
            return dict(json.loads(self._fact_file(key_parts).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def store_fact(self, key_parts: Any, value: Mapping[str, Any]) -> None:
        """Keep a small JSON fact."""
        with replacing(self._fact_file(key_parts)) as partial:
            partial.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")

    def _fact_file(self, key_parts: Any) -> Path:
        return self.root / "facts" / f"{digest_of(key_parts)}.json"

    def drop_leftovers(self) -> None:
        """Remove what killed builds left half-written."""
        sweep(self.root / WORK)


def assemble(folder: Path, parts: Mapping[str, tuple[Component, Path]]) -> None:
    """Link the files of components, each from its own folder, into one bundle folder."""
    for component, root in parts.values():
        for name in component.files:
            destination = folder / name
            if not destination.exists():
                link_or_copy(root / name, destination)
