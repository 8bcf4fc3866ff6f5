"""Translations of single PyTorch operators to ONNX that are shorter than torch's own.

Imports torch and onnxscript; imported by `exporters.onnx.trace` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20

op: Any = opset20  # used as a tracer: its Python type signatures are for eager evaluation


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """PyTorch operator -> function that writes ONNX nodes."""
    return {torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention}


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:
    """softmax(Q K^T * scale + mask) V in five nodes.

    torch's translation reshapes K to three dimensions for the transpose and guards fully masked rows with IsNaN:
    nine nodes more, and a pattern that no runtime recognizes as attention.

    Args:
        query: (B, heads, L, D) float.
        key: (B, heads, S, D) float.
        value: (B, heads, S, D) float.
        attn_mask: bool (True attends) or float (added), broadcast to (B, heads, L, S), or None.
        dropout_p: ignored, the module is in eval mode.
        is_causal: a row attends to columns up to its own; then L = S.
        scale: 1 / sqrt(D) if None.
        enable_gqa: refused, no model of these families has grouped queries.

    Returns:
        (B, heads, L, D) float.
    """
    if enable_gqa:
        raise NotImplementedError("torch.ops.aten.scaled_dot_product_attention with grouped queries")
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.MatMul(op.Mul(query, op.Constant(value_float=factor)), op.Transpose(key, perm=[0, 1, 3, 2]))
    if is_causal:
        lower = op.Trilu(op.Expand(op.Constant(value_float=1.0), op.Shape(scores, start=-2)), upper=0)
        attn_mask = op.Cast(lower, to=9)
    if attn_mask is not None:
        if is_causal or (attn_mask.dtype is not None and attn_mask.dtype.name == "BOOL"):
            attn_mask = op.Where(attn_mask, op.Constant(value_float=0.0), op.Constant(value_float=-math.inf))
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)
