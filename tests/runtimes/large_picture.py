"""Draws one picture with a bundle in a process of its own and prints what it needed: `BUNDLE SIDE TILE STEPS OUT.npy`.

Not a test: peak memory belongs to a process, so `test_large_pictures` starts one for each size.
"""

from __future__ import annotations

import json
import sys

import numpy as np


def main() -> None:
    """Draw, save (H, W, 3) float32 in 0..1, print peak RSS as JSON."""
    import runtimes
    from deploy.observers import peak_rss_bytes

    bundle, side, tile, steps, out = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    pipeline = runtimes.load(bundle, threads=1, check_hashes=False)
    pixels = pipeline("flowers and leaves", seed=1, steps=steps, height=side, width=side, tile=tile or None,
                      output="numpy")
    np.save(out, pixels[0])
    print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
