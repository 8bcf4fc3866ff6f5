"""What several files share: small diffusion networks, made when first asked for, and a CUDA of numpy."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.backends.tensorrt import cuda_device


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where `networks` leaves its tokenizer, as the runtime reads it, in ours/."""
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="session")
def networks(folder) -> dict[str, Any]:
    from tests.runtimes.diffusers_reference import make_networks

    return make_networks(folder)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
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


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The fake CUDA runtime; whatever a test does, nothing may stay behind on the GPU."""
    from tests.runtimes.fake_gpu import FakeCuda

    fake = FakeCuda()
    monkeypatch.setattr(cuda_device, "load_runtime", lambda: fake)
    monkeypatch.setattr(cuda_device, "find_gpu", fake.find_gpu)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    yield fake
    gc.collect()
    assert fake.leaks() == []


@pytest.fixture
def engine(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine of the fake TensorRT, which sessions load from any engine file."""
    from tests.runtimes.engine_bundles import LIMITS, use
    from tests.runtimes.fake_engine import ICudaEngine, module

    made = ICudaEngine(cuda, LIMITS)
    use(monkeypatch, module(made))
    return made
