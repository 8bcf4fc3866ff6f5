"""Keeps messages of torch, diffusers, transformers and onnx off the terminal; warnings not listed here pass."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

_LOGGERS = ("torch", "torch.onnx", "torch.export", "torch.fx", "diffusers", "transformers", "onnxscript", "onnx_ir",
            "onnxruntime", "accelerate", "fusion_base", "onnx_model", "onnxruntime.transformers")
# (category, start of the message as a regular expression, why it says nothing to our user)
_HARMLESS = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),  # inside torch.export, copying its own trees
    (UserWarning, r"# The axis name: .* will not be used"),  # we name the axes of the graph ourselves
    (UserWarning, r"Dynamo does not know how to trace"),  # a logging call inside a model
    (DeprecationWarning, r".*torch\.jit"),  # onnx export helpers inside torch
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence loggers and known warnings for the duration; errors are raised as usual.

    The streams themselves are left alone: a progress display in another thread goes on.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for category, message in _HARMLESS:
            warnings.filterwarnings("ignore", message=message, category=category)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def one_line(error: BaseException) -> str:
    """What a library raised, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
