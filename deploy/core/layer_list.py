"""The file beside a quantized graph that lists the precision of its layers, which later passes carry along."""

from __future__ import annotations

from pathlib import Path

from runtimes.bundle.folder import Bundle, link_or_copy
from runtimes.bundle.manifest import Component

LAYERS_FILE = "quantization.json"


def carry_layers(source: Bundle, component: Component, out: Path) -> None:
    """Keep the list of layers beside what a later pass makes of a quantized graph; the report shows it."""
    for file in component.files:
        if Path(file).name == LAYERS_FILE:
            link_or_copy(source.path / file, out / file)
