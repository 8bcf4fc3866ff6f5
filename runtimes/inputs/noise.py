"""Samples random numbers, bit for bit those of `torch.randn` with a CPU generator, in one stream for each image.

A seed means what it means in PyTorch and diffusers, and an image is the same alone or within a batch. The arithmetic is
ATen's (`native/cpu/DistributionTemplates.h`, `core/DistributionsHelper.h`), in its AVX2 form: what every x86 CPU since
2013 runs, with AVX-512 too. PyTorch's scalar form (other CPUs) rounds differently in the last bit of some numbers.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import InputError

Float32 = NDArray[np.float32]
F = np.float32
BLOCK = 16  # numbers of one Box-Muller block; ATen samples fewer than that one by one, in double precision
LEAST_SEED, MOST_SEED = -(2**63), 2**64 - 1

# Coefficients of ATen's avx_mathfun.h, which has them from Cephes' logf, sinf and cosf.
SQRT_HALF = F(0.707106781186547524)
LOG = tuple(map(F, (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
                    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)))
LN2_LOW, LN2_HIGH = F(-2.12194440e-4), F(0.693359375)
FOUR_OVER_PI = F(1.27323954473516)
MINUS_QUARTER_PI = tuple(map(F, (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)))
SINE = tuple(map(F, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)))
COSINE = tuple(map(F, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)))


class NoiseStreams:
    """A stream of standard-normal numbers for every image of a call: diffusers' list of one generator per image."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [NormalGenerator(seed) for seed in seeds]

    def sample(self, shape: tuple[int, ...]) -> Float32:
        """The next numbers of every stream: (images, *shape) float32, unit variance."""
        size = math.prod(shape)
        rows = [generator.randn(size) for generator in self._generators]
        return np.stack(rows).reshape(len(rows), *shape)


class NormalGenerator:
    """`torch.Generator("cpu").manual_seed(seed)`, as far as `torch.randn` in float32 goes."""

    def __init__(self, seed: int) -> None:
        """Start a stream.

        Args:
            seed: any whole number; its low 32 bits decide, as in PyTorch.
        """
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)  # a Mersenne Twister, seeded as PyTorch seeds its own
        self._next: float | None = None

    def randn(self, size: int) -> Float32:
        """The next numbers: (size,) float32, unit variance."""
        if size < BLOCK:
            return np.array([self._one() for _ in range(size)], F)
        rest = size % BLOCK
        uniform = self._uniform(size + (BLOCK if rest else 0))
        if not rest:
            return _box_muller(uniform)
        # The last 16 numbers, some of which the whole blocks had made, are replaced by a block of their own.
        made = _box_muller(np.concatenate([uniform[: size - rest], uniform[size:]]))
        return np.concatenate([made[: size - BLOCK], made[-BLOCK:]])

    def _uniform(self, size: int) -> Float32:
        """(size,) float32 in [0, 1): the low 24 bits of a word each."""
        words = self._words.randint(0, 1 << 32, size, np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(F) * F(2**-24)

    def _one(self) -> float:
        """A single number; every second one was made together with the one before.

        The `math` module calls the C library as PyTorch does; numpy's own functions differ in the last bit.
        """
        if self._next is not None:
            value, self._next = self._next, None
            return value
        first, second = (self._uniform_double() for _ in range(2))
        radius, angle = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
        self._next = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform_double(self) -> float:
        high, low = (int(word) for word in self._words.randint(0, 1 << 32, 2, np.uint32))
        return float((high << 32 | low) & (1 << 53) - 1) * 2.0**-53


def resolve_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """One seed per image.

    Args:
        seed: one per image; or that of the first image, the others counting on from it; or None for unpredictable ones.
        count: number of images.

    Raises:
        InputError: not whole numbers that `torch.Generator.manual_seed` takes, or another number of them than images.
    """
    if seed is None:
        first = secrets.randbits(32)
        return tuple(first + i for i in range(count))
    if (isinstance(seed, Sequence) and not isinstance(seed, str)) or (isinstance(seed, np.ndarray) and seed.ndim):
        seeds = tuple(checked_seed(s) for s in seed)
        if len(seeds) != count:
            raise InputError(f"{len(seeds)} seeds for {count} images", where="seed", fix="give one per image, or one")
        return seeds
    first = checked_seed(seed)
    return tuple(checked_seed(first + i) for i in range(count))


def checked_seed(seed: object) -> int:
    """One seed.

    Raises:
        InputError: not a whole number that `torch.Generator.manual_seed` takes.
    """
    try:
        if isinstance(seed, bool | np.bool_):
            raise TypeError
        value = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        value = None
    if value is None or not LEAST_SEED <= value <= MOST_SEED:
        raise InputError(f"the seed {seed!r} is not a whole number from -2**63 to 2**64 - 1", where="seed")
    return value


def _box_muller(uniform: Float32) -> Float32:
    """Blocks of 16 uniform numbers to as many normal ones, the first half of a block with the second: (n,) float32."""
    blocks = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(F(-2) * _log(F(1) - blocks[:, 0]))
    sine, cosine = _sine_cosine(F(2 * math.pi) * blocks[:, 1])
    normal = np.stack([radius * cosine, radius * sine], axis=1) + F(0)  # times 1 plus 0 in ATen: no -0 comes out
    return normal.reshape(-1)


def _log(x: Float32) -> Float32:
    """Natural logarithm for 2^-24 <= x <= 1."""
    bits = x.view(np.int32)
    exponent = ((bits >> 23) - 126).astype(F)
    x = (bits & 0x007FFFFF | 0x3F000000).view(F)  # the mantissa, 0.5 to 1
    small = x < SQRT_HALF
    x = (x - F(1)) + np.where(small, x, F(0))
    exponent -= small
    square = x * x
    y = _polynomial(LOG, x) * x
    y = _fma(y, square, exponent * LN2_LOW)
    y = _fma(square, F(-0.5), y)
    return _fma(exponent, LN2_HIGH, x + y)


def _sine_cosine(x: Float32) -> tuple[Float32, Float32]:
    """Sine and cosine for 0 <= x < 2 pi."""
    octant = (x * FOUR_OVER_PI).astype(np.int32) + 1 & ~1
    count = octant.astype(F)
    for part in MINUS_QUARTER_PI:
        x = _fma(count, part, x)
    square = x * x
    y = _polynomial(COSINE, square) * square
    near_one = _fma(y, square, square * F(-0.5)) + F(1)
    near_zero = _fma(_polynomial(SINE, square) * square, x, x)
    swapped = (octant & 2).astype(bool)
    sine, cosine = np.where(swapped, near_one, near_zero), np.where(swapped, near_zero, near_one)
    return np.where(octant & 4, -sine, sine), np.where(octant + 2 & 4, -cosine, cosine)


def _polynomial(coefficients: tuple[np.float32, ...], x: Float32) -> Float32:
    """Horner's rule, highest power first."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fma(y, x, coefficient)
    return y


def _fma(a: Float32, b: Float32 | np.float32, c: Float32 | np.float32) -> Float32:
    """a * b + c rounded once, as the processor's instruction does it, which compilers make of ATen's code.

    The product of two float32 is exact in float64. The sum is rounded there and again to float32. That this differs
    from one rounding for no input of `_box_muller` is seen by trying all 2^24 values of both halves
    (tests/runtimes/test_noise.py).
    """
    return (np.multiply(a, b, dtype=np.float64) + c).astype(F)
