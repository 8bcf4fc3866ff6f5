"""Our noise is PyTorch's to the last bit: every seed, every size, sample after sample."""

from __future__ import annotations

import hashlib
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.errors import InputError
from runtimes.inputs import noise
from runtimes.inputs.noise import NoiseStreams, NormalGenerator, resolve_seeds

SEEDS = (0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1, -1, -7, -(2**63))
like_torch = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="this CPU runs PyTorch's scalar form, which rounds otherwise; the golden hash below is checked everywhere")


def theirs(generator: torch.Generator, size: int) -> np.ndarray:
    return torch.randn(size, generator=generator).numpy()


def assert_same_bits(mine: np.ndarray, wanted: np.ndarray) -> None:
    assert mine.dtype == wanted.dtype == np.float32
    assert mine.tobytes() == wanted.tobytes()


@like_torch
@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_generates_what_torch_generates(seed):
    assert_same_bits(NormalGenerator(seed).randn(1 << 16), theirs(torch.Generator().manual_seed(seed), 1 << 16))


@like_torch
@pytest.mark.parametrize("size", [0, 1, 2, 3, 8, 14, 15, *range(16, 34), 47, 48, 49, 255, 1000, 4 * 9 * 11, 16387])
def test_every_size_generates_what_torch_generates(size):
    """Fewer than 16 numbers are made one by one in double precision; a rest makes the last 16 anew."""
    for seed in range(40):
        assert_same_bits(NormalGenerator(seed).randn(size), theirs(torch.Generator().manual_seed(seed), size))


@like_torch
def test_a_stream_goes_on_where_torchs_does():
    """Odd small samples leave a number behind, which larger ones pass over and the next small one takes."""
    sizes = np.random.default_rng(0).choice([1, 2, 3, 5, 15, 16, 17, 31, 33, 256, 4000], 300)
    for seed in (0, 2**32 - 1, -5):
        mine, generator = NormalGenerator(seed), torch.Generator().manual_seed(seed)
        for size in sizes:
            assert_same_bits(mine.randn(int(size)), theirs(generator, int(size)))


@like_torch
def test_millions_of_numbers_have_the_same_bits():
    size = 1 << 22
    assert_same_bits(NormalGenerator(3).randn(size), theirs(torch.Generator().manual_seed(3), size))


def test_the_bits_are_torchs_on_every_machine():
    """`hashlib.md5(torch.randn(65536, generator=torch.Generator().manual_seed(5)).numpy().tobytes())`, torch 2.13, AVX2
    and AVX-512."""
    assert hashlib.md5(NormalGenerator(5).randn(65536).tobytes()).hexdigest() == "84be59baedb8a73345e1d65671ad5e8c"


@pytest.mark.parametrize("name", ["SQRT_HALF", "LOG", "LN2_LOW", "LN2_HIGH", "FOUR_OVER_PI", "MINUS_QUARTER_PI", "SINE",
                                  "COSINE"])
def test_the_last_bit_of_a_coefficient_would_be_seen(name, monkeypatch):
    """But for two that only say where one polynomial takes over from another: there it takes a hundredth."""
    value, wanted = getattr(noise, name), NormalGenerator(3).randn(1 << 20)
    if isinstance(value, tuple):
        nudged = (*value[:-1], np.nextafter(value[-1], np.float32(9)))
    else:
        chooses = name in ("SQRT_HALF", "FOUR_OVER_PI")
        nudged = value * np.float32(1.01) if chooses else np.nextafter(value, np.float32(9))
    monkeypatch.setattr(noise, name, nudged)
    assert not np.array_equal(NormalGenerator(3).randn(1 << 20), wanted)


@pytest.mark.parametrize("halves", [0, 1])
def test_no_input_is_rounded_twice(halves, monkeypatch):
    """Of all 2^24 values that a uniform number can have, half by half: a sum in float64 that was rounded and lies just
    between two float32 would be rounded again, the wrong way in half of the cases. There is none."""
    wrong = 0

    def counting(a, b, c):
        nonlocal wrong
        product = np.multiply(a, b, dtype=np.float64)
        total = product + c
        other = total - product
        error = (product - (total - other)) + (c - other)  # Knuth's two-sum: exact
        rounded = total.astype(np.float32)
        beyond = np.nextafter(rounded, np.where(total > rounded, np.float32(np.inf), np.float32(-np.inf)))
        between = (total != rounded) & (total - rounded == beyond - total)
        wrong += int((between & (error != 0)).sum())
        return rounded

    monkeypatch.setattr(noise, "_fma", counting)
    for part in range(halves << 23, (halves + 1) << 23, 1 << 18):
        uniform = np.arange(part, part + (1 << 18), dtype=np.uint32).astype(np.float32) * np.float32(2**-24)
        noise._box_muller(np.stack([uniform.reshape(-1, 8)] * 2, axis=1).reshape(-1))
    assert wrong == 0


@like_torch
def test_a_stream_per_image_generates_as_torch_with_a_list_of_generators():
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 99)]
    streams = NoiseStreams((7, 8, 99))
    for shape in ((4, 8, 8), (4, 5, 7), (4, 1, 1)):
        assert_same_bits(streams.sample(shape), randn_tensor((3, *shape), generators).numpy())
    np.testing.assert_array_equal(NoiseStreams((7, 8)).sample((4, 8, 8))[1:], NoiseStreams((8,)).sample((4, 8, 8)))


@pytest.mark.parametrize(("shape", "milliseconds"), [((4, 64, 64), 5), ((4, 128, 128), 20)])
def test_generating_costs_next_to_nothing(shape, milliseconds):
    def taken() -> float:
        start = perf_counter()
        NoiseStreams([0]).sample(shape)
        return 1e3 * (perf_counter() - start)

    assert min(taken() for _ in range(20)) < milliseconds


@pytest.mark.parametrize("seed", [*SEEDS, 2**64, -(2**63) - 1, True, 1.0, 1.5, "1", None, [1]])
def test_seeds_are_refused_where_torch_refuses_them(seed):
    def taken(function) -> bool:
        try:
            function()
        except (InputError, ValueError, RuntimeError, TypeError):
            return False
        return True

    assert taken(lambda: resolve_seeds([seed], 1)) == taken(lambda: torch.Generator().manual_seed(seed))


def test_a_seed_counts_on_for_the_images_of_a_call():
    assert resolve_seeds(7, 3) == (7, 8, 9) and len(set(resolve_seeds(None, 3))) == 3
    assert resolve_seeds([4, 2], 2) == (4, 2)
    of_numpy: list[Any] = [np.array([-3, -2]), np.int64(-3)]
    for seeds in of_numpy:
        assert resolve_seeds(seeds, 2) == (-3, -2)
    with pytest.raises(InputError, match="18446744073709551616 is not a whole number"):
        resolve_seeds(2**64 - 1, 2)
    with pytest.raises(InputError, match="2 seeds for 3 images"):
        resolve_seeds([1, 2], 3)
