"""The levels *weights* and *feeds* of a real-size model: seconds and peak memory, in a process of their own.

    python -m tests.parity.at_size              # Stable Diffusion 1.5's configuration, random float32 weights: 4.3 GB
    python -m tests.parity.at_size sdxl float16
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from deploy.building.against_diffusers import AgainstDiffusers, upstream_of
from deploy.building.builder import load_source
from deploy.core.pass_cache import Cache
from deploy.core.spec import make_spec
from deploy.model.source_bundle import open_origin
from deploy.parity.upstream.levels import in_words
from tests.deploy.real_size import write_model


def main() -> None:
    """Make the model, or take one that is there, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="sd15", help="sd15 or sdxl")
    parser.add_argument("dtype", nargs="?", default="float32", help="float32 or float16")
    parser.add_argument("--folder", type=Path, help="a model that was made before, by python -m tests.deploy.real_size")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ldm-at-size-") as temporary:
        work = Path(temporary)
        folder = asked.folder or write_model(asked.model, work / "model", asked.dtype)
        spec = make_spec({"model": str(folder)})
        (work / "work").mkdir()
        source = load_source(open_origin(spec), spec, Cache(work / "cache"), work / "work")
        diffusers = AgainstDiffusers(upstream_of(spec), source, Cache(work / "cache"))
        began = time.perf_counter()
        levels = diffusers.source_levels()
        seconds = time.perf_counter() - began
    for name, text, missing in in_words({name: level.to_json() for name, level in levels.items()}):
        print(f"{name}: {text}" + (f"; unverified: {missing}" if missing else ""))
    print(f"{folder.name}: {seconds:.1f} s, peak {diffusers.peak_rss_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
