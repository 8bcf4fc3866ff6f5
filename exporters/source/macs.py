"""Counts the multiply-accumulates of a network at given sizes, from shapes alone."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def count_macs(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Multiply-accumulates of one call: convolutions, matrix products and attention; element-wise work is left out.

    Nothing is computed: torch's counter runs on fake tensors, so that a network of any size costs its trace.

    Args:
        module: in evaluation mode.
        inputs: in the order of the module's arguments; their shapes and dtypes count, any values.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*(fake.from_tensor(tensor) for tensor in inputs))
    return int(counter.get_total_flops()) // 2
