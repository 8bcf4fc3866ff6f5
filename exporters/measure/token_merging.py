"""`python -m exporters.measure.token_merging` measures whether token merging (ToMe for SD, arXiv 2303.17604) pays here.

Prints which share of the reference U-Net's operations self-attention has, and the time of one self-attention with half
of the tokens merged over that without, both in ONNX Runtime on one thread, from interleaved calls.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from exporters.quiet import quiet
from exporters.source.networks import load_module

ROWS, HEADS, ROUNDS, CALLS = 2, 4, 60, 20
SHAPES = ((64, 64), (1024, 64))  # tokens and width of the U-Net's first level, at 64x64 pixels and at 256x256


class SelfAttention(nn.Module):
    """Self-attention without a mask: x (B, N, C) float32, features of N tokens -> (B, N, C).

    Every array is (B, N, C) float32, features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Attend to all tokens: (B, N, C) float32 -> the same."""
        q, k, v = (p(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        result: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class MergedAttention(SelfAttention):
    """The same over half of the tokens: each of the even ones is merged into the odd one most like it, section 3."""

    def forward(self, x: Tensor) -> Tensor:
        """Merge, attend, and give each merged token what the one it was merged into got."""
        even, odd = x[:, ::2], x[:, 1::2]
        alike = nn.functional.normalize(even, dim=-1) @ nn.functional.normalize(odd, dim=-1).transpose(1, 2)
        into = alike.argmax(-1)[..., None].expand_as(even)
        attended = super().forward(odd.scatter_reduce(1, into, even, "mean"))
        return torch.stack([attended.gather(1, into), attended], 2).flatten(1, 2)


def share_of_self_attention(folder: Path, side: int) -> float:
    """Share, 0 to 1, of a U-Net's multiplications at latents of `side` rows and columns."""
    from torch.utils.flop_counter import FlopCounterMode

    unet = load_module(folder, "diffusers", "UNet2DConditionModel")
    width: int = unet.config.cross_attention_dim  # type: ignore[union-attr, assignment]
    channels: int = unet.config.in_channels  # type: ignore[union-attr, assignment]
    with torch.no_grad(), FlopCounterMode(depth=9, display=False) as counter:
        unet(torch.randn(1, channels, side, side), torch.tensor([5.0]), torch.randn(1, 16, width))
    counts = counter.get_flop_counts()
    own = sum(sum(operations.values()) for name, operations in counts.items() if name.endswith("attn1"))
    return float(own / sum(counts["Global"].values()))


def time_ratio(tokens: int, width: int) -> float:
    """Median over rounds of the merged attention's time over the plain one's."""
    x = torch.randn(ROWS, tokens, width, generator=torch.Generator().manual_seed(0))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        for kind in (MergedAttention, SelfAttention):
            program = torch.onnx.export(kind(width).eval(), (x,), input_names=["x"], dynamo=True, opset_version=20,
                                        verbose=False)
            assert program is not None
            program.save(f"{folder}/graph.onnx")
            sessions.append(ort.InferenceSession(f"{folder}/graph.onnx", options))
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for session, taken in zip(sessions, seconds, strict=True):
            began = time.perf_counter()
            for _ in range(CALLS):
                session.run(None, {"x": x.numpy()})
            taken.append(time.perf_counter() - began)
    return float(np.median(np.array(seconds[0]) / np.array(seconds[1])))


def main() -> None:
    """Print both for the reference model."""
    argparse.ArgumentParser(prog="python -m exporters.measure.token_merging", description=__doc__).parse_args()
    folder = Path(__file__).parents[2] / "deploy/reference_models/weights/unet"
    for side in (8, 32):
        sys.stdout.write(f"{side}x{side} latents: self-attention {share_of_self_attention(folder, side):.1%} of the "
                         "operations\n")
    for tokens, width in SHAPES:
        ratio = time_ratio(tokens, width)
        sys.stdout.write(f"{tokens} tokens of {width}: {ratio:.2f} of the time when half are merged\n")


if __name__ == "__main__":
    main()
