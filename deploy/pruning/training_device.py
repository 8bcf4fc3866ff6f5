"""Where networks are trained: on the first GPU that CUDA shows, where this PyTorch can use it, else on the CPU."""

from __future__ import annotations

from runtimes.system.nvidia import gpu_or_none


def training_device() -> str:
    """PyTorch's name of it: "cuda" or "cpu". A GPU that `doctor` does not see is not used; nor is any by a PyTorch
    that was built without CUDA, or for a newer driver."""
    import torch

    return "cuda" if gpu_or_none() is not None and torch.cuda.is_available() else "cpu"
