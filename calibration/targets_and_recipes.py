"""Tables: which integers each target's kernels take, and which recipe each component gets. No graph is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtimes.bundle.roles import Role

INT4 = "weight-only-4"  # of text encoders, asked for by --text-encoder-bits
SEARCHED = "auto"  # no recipe of its own: generated images decide layer by layer
NEEDS_RANGES = ("hybrid", "static", SEARCHED)
# target -> the integers its kernels take, fields of `calibration.integers.ranges.Scheme`.
SCHEMES: Mapping[str, dict[str, Any]] = {
    "onnxruntime": {"quantize_outputs": True},
    "openvino": {"give_biases": True},
    "tensorrt": {"signed": True},
    "tensorrt-rtx": {"signed": True},
}
# target -> how 4-bit weights are written, fields of `calibration.graphs.text_encoder_int4.BlockForm`.
BLOCKS: Mapping[str, dict[str, Any]] = {
    "onnxruntime": {"operator": "MatMulNBits"},
    "openvino": {"operator": "DequantizeLinear"},
    "tensorrt": {"operator": "DequantizeLinear", "positive": True, "embeddings": False},
    "tensorrt-rtx": {"operator": "DequantizeLinear", "positive": True, "embeddings": False},
}
CPU_TARGETS = ("onnxruntime", "openvino")
LIMIT_OF_16_BIT_SUMS = 63


def scheme_of(target: str, *, sums_in_32_bits: bool) -> dict[str, Any]:
    """The integers of a target, on CPUs as the processor that the bundle is for multiplies them.

    Args:
        target: of `SCHEMES`.
        sums_in_32_bits: whether that processor has VNNI. Without it, x86 adds pairs of products in 16 bits, which two
            full 8-bit weights overflow (VPMADDUBSW saturates).
    """
    scheme = SCHEMES[target]
    return {**scheme, "weight_limit": LIMIT_OF_16_BIT_SUMS} if target in CPU_TARGETS and not sums_in_32_bits else scheme


def recipe_of(role: Role, quantization: str, text_encoder_bits: int) -> str:
    """The recipe of a component of some role.

    The text encoder runs once for a prompt that the cache does not know: its time does not matter, its bytes do, and
    everything that is generated hangs on its output.

    Args:
        role: of the component.
        quantization: the recipe of the others.
        text_encoder_bits: 8 or 4, of a text encoder's weights.
    """
    if role is Role.TEXT_ENCODER:
        return INT4 if text_encoder_bits == 4 else "weight-only"
    return quantization
