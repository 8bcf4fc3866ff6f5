"""One pipeline of the reference model under many threads: the bits of a sequential run, and no growing memory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes

PROMPTS = ("red apple", "cat", "pizza", "blue car", "tree")


def resident_bytes() -> int:
    """Memory of this process now; the peak that `resource` gives never falls."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize(("threads", "requests", "steps"), [
    (4, 3, 2), pytest.param(8, 50, 3, marks=pytest.mark.slow)])
def test_threads_get_what_one_gets_and_memory_does_not_grow(reference_bundle, threads, requests, steps):
    pipeline = runtimes.load(reference_bundle, threads=1, check_hashes=False)
    jobs = [{"prompt": PROMPTS[i % len(PROMPTS)], "seed": i, "steps": steps, "output": "latents" if i % 3 else "numpy",
             "scheduler": (None, "euler-ancestral", "dpm++")[i % 3],
             "guidance_interval": (0, 1) if i % 2 else (0, 0.7)}
            for i in range(requests)]
    expected = [generate(pipeline, job) for job in jobs]
    memory: list[int] = []
    lock = threading.Lock()

    def work(worker: int) -> list[int]:
        wrong = []
        for k in range(requests):
            i = (k + 7 * worker) % requests  # threads are at different requests at any time
            if not np.array_equal(generate(pipeline, jobs[i]), expected[i]):
                wrong.append(i)
            with lock:
                memory.append(resident_bytes())
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        assert not any(pool.map(work, range(threads)))
    assert len(memory) == threads * requests
    first, last = memory[len(memory) // 5 : len(memory) // 2], memory[-len(memory) // 5 :]
    before, after = np.median(first), np.median(last)
    print(f"{len(memory)} requests bit-equal; resident {before / 1e6:.1f} MB, at the end {after / 1e6:.1f} MB")
    assert after <= 1.02 * before + (1 << 20)


def generate(pipeline: Any, job: dict[str, Any]) -> np.ndarray:
    return pipeline(**job)


@pytest.mark.parametrize("other", [1, 3])
def test_a_seed_generates_the_same_alone_and_in_a_batch(reference_bundle, other):
    """To the rounding of float32: matrix products of other sizes are summed in another order."""
    pipeline = runtimes.load(reference_bundle, threads=1, check_hashes=False)
    prompts, seeds = list(PROMPTS[: other + 1]), [11, 5, 7, 2][: other + 1]
    batch = pipeline(prompts, seed=seeds, steps=6, output="latents")
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = pipeline(prompt, seed=seed, steps=6, output="latents")
        assert np.linalg.norm(batch[i] - alone[0]) <= 1e-4 * np.linalg.norm(alone)
