"""Draws pictures with a bundle in a process of its own, prints what it needed: `BUNDLE SIDE TILE STEPS COUNT OUT.npy`.

Not a test: peak memory belongs to a process, so `test_large_pictures` starts one for each size.
"""

from __future__ import annotations

import json
import sys

import numpy as np

PROMPTS = ("flowers and leaves", "a red apple", "clouds", "pebbles on a beach", "a blue car", "grass")


def main() -> None:
    """Draw one after the other, save (COUNT, H, W, 3) float32 in 0..1, print peak RSS as JSON."""
    import runtimes
    from deploy.observers import peak_rss_bytes

    bundle, side, tile, steps, count, out = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
    pipeline = runtimes.load(bundle, threads=1, check_hashes=False)
    pixels = [pipeline(prompt, seed=seed, steps=steps, height=side, width=side, tile=tile or None, output="numpy")[0]
              for seed, prompt in enumerate(PROMPTS[:count])]
    np.save(out, np.stack(pixels))
    print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
