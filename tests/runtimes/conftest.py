"""Small diffusion networks that several files compare with diffusers; made when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where `networks` leaves its tokenizer, as the runtime reads it, in ours/."""
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="session")
def networks(folder) -> dict[str, Any]:
    from tests.runtimes.diffusers_reference import make_networks

    return make_networks(folder)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).resize((45, 38)) for _ in range(2)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other on several cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
