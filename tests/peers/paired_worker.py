"""One commit's pipeline behind a pipe: a JSON request a line in, seconds and a hash of the images out.

Run by tests/peers/paired_commits.py with the tree of any commit as PYTHONPATH: only what all of them have is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

import runtimes


def arrays(fields: dict[str, Any]) -> dict[str, Any]:
    """Images, masks and latents of a size in place of that size, and tuples in place of lists."""
    made = {name: tuple(value) if name in ("guidance_interval", "part") else value for name, value in fields.items()}
    for name in {"image", "mask", "latents"} & set(made):
        random, shape = np.random.default_rng(len(name)), made[name]
        if name == "latents":
            made[name] = random.standard_normal(shape, np.float32)
        else:
            made[name] = random.random(shape) if name == "image" else (random.random(shape) < 0.5).astype(np.float32)
    return made


def main() -> None:
    """Load the bundle, then answer requests until there are no more."""
    parser = argparse.ArgumentParser(prog="python tests/peers/paired_worker.py",
                                     description="Answer requests on stdin with seconds and hashes of images, for "
                                     "tests.peers.paired_commits.")
    parser.add_argument("tree", type=Path, help="the commit that PYTHONPATH must lead to")
    parser.add_argument("bundle", type=Path, help="bundle that it built")
    parser.add_argument("threads", type=int, help="CPU threads")
    options = parser.parse_args()
    assert Path(runtimes.__file__).is_relative_to(options.tree), f"{runtimes.__file__} is not of {options.tree}"
    pipeline = runtimes.load(options.bundle, threads=options.threads)
    for line in sys.stdin:
        fields = arrays(json.loads(line))
        start, used = perf_counter(), process_time()
        images = pipeline(fields.pop("prompt"), output="numpy", **fields)
        answer = {"wall": perf_counter() - start, "cpu": process_time() - used,
                  "sha256": hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
