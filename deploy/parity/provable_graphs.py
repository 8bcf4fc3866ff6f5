"""Replaces 16-bit graphs by emulations: a CPU would compute the graphs in float32, which hides their rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from runtimes.bundle.folder import Bundle, link_or_copy, records_below
from runtimes.bundle.manifest import Component
from runtimes.system.cache_store import scratch


def computes_in_16_bits(component: Component) -> bool:
    """Whether ONNX Runtime's CPU provider hides this graph's rounding; see `exporters.precision.emulation`."""
    conversion = component.graph.conversion
    return component.format == "onnx" and conversion is not None and conversion.computes


@contextmanager
def provable(bundle: Bundle, names: Iterable[str], root: Path) -> Iterator[Bundle]:
    """The bundle with those of `names` that compute in 16 bits replaced by their emulation in float32.

    Args:
        bundle: any bundle; given back itself when nothing has to be replaced.
        names: components that will be run.
        root: folder for a temporary bundle of links and emulations; on the bundle's file system it costs the
            emulations alone.
    """
    wanted = [name for name in names if computes_in_16_bits(bundle.component(name))]
    if not wanted:
        yield bundle
        return
    from exporters.precision.emulation import emulate

    with scratch(root) as folder:
        components = dict(bundle.manifest.components)
        replaced = {file for name in wanted for file in components[name].files}
        for file in bundle.manifest.all_files():
            if file not in replaced:
                link_or_copy(bundle.path / file, folder / file)
        for name in wanted:
            component = components[name]
            emulate(bundle.file(component.file), folder / component.file)
            components[name] = replace(component, files=records_below(folder / "components" / name, folder))
        yield Bundle(folder, replace(bundle.manifest, components=components))
