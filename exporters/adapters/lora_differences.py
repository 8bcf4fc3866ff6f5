"""Names the faults by which diffusers 0.42 with PEFT 0.21 reads a LoRA file wrongly.

We apply what the file says, so a comparison with diffusers' loader must expect a difference; docs/families.md lists
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from runtimes.adapters.lora_files import NETWORKS, read_keys
from runtimes.bundle.safetensors_reader import read_header, read_number

# name -> what diffusers does
DIFFERENCES = {
    "alphas": "diffusers gives the attention projections of the U-Net and all of a text encoder the most common alpha",
    "numbering": "diffusers leaves out what follows the original U-Net's numbering where other keys do not",
    "adapter-name": "diffusers loads nothing of keys with an adapter's name in them",
}
UNET = NETWORKS["lora_unet_"]
_ORIGINAL, _DIFFUSERS = r"(input|output)_blocks|middle_block", r"(down|up)_blocks|mid_block"


def differences(file: Path) -> tuple[str, ...]:
    """Names of `DIFFERENCES` that a file meets, without reading its matrices.

    Raises:
        InputError: as `runtimes.adapters.lora_files.read_keys`.
    """
    keys, header = read_keys(file), read_header(file)
    found = []
    kohya = all(key.startswith("lora_") for key in keys)
    if kohya:
        alphas: dict[str, dict[str, float | None]] = {}
        for key, what in keys.items():
            own = alphas.setdefault(what.network, {})
            if what.part == "alpha":
                own[what.place] = read_number(file, header, key)
            else:
                own.setdefault(what.place, None)
        if any(_mistaken(network, own) for network, own in alphas.items()):
            found.append("alphas")
        unet = [key for key, what in keys.items() if what.network == UNET]
        if all(any(re.search(pattern, key) for key in unet) for pattern in (_ORIGINAL, _DIFFUSERS)):
            found.append("numbering")
    if any(re.search(r"\.lora_[AB]\.[^.]+\.weight$", key) for key in keys):
        found.append("adapter-name")
    return tuple(found)


def _mistaken(network: str, alphas: Mapping[str, float | None]) -> bool:
    """Whether a network has several alphas where diffusers needs one. Without any, diffusers takes the ranks."""
    alike = len(set(alphas.values())) < 2
    projections = any(re.search(r"_to_(q|k|v|out_0)$", place) for place in alphas)
    return not alike and (network != UNET or projections or None in alphas.values())
