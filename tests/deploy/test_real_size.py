"""Stable Diffusion 1.5 at its real size: seconds, peak memory, load time, and parity component by component.

    .venv/bin/python -m pytest tests/deploy/test_real_size.py -m large -s
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.observers import measured
from deploy.parity.options import ParityOptions
from runtimes.bundle import Bundle
from runtimes.session import SessionOptions
from tests.deploy.real_size import write_stable_diffusion

pytestmark = pytest.mark.large
UNET_BYTES = 3_438_000_000
SHAPES = "batch=1:1:1,height=64:64:512,width=64:64:512"
OPTIONS = ParityOptions(prompts=("a red apple",), recording_steps=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("real") / "sd15")


@pytest.fixture(scope="module")
def bundle(model: Path, build_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Built by the command, in a process whose cost is printed; 4.3 GB that go when the tests are done."""
    out = tmp_path_factory.mktemp("bundle") / "sd15"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "deploy", "build", model, "--no-verify", "--shapes", SHAPES, "-o", out],
                   check=True, env={**os.environ, "LDM_DEPLOY_CACHE": str(build_cache)})
    opened = Bundle.open(out)
    for cost in opened.manifest.measured["passes"]:
        print(f"{cost['name']:10} {cost['seconds']:7.1f} s  peak {cost['peak_rss_bytes'] / 1e9:.2f} GB")
    print(f"build      {time.perf_counter() - began:7.1f} s")
    yield opened


def test_memory_stays_below_one_and_a_half_unets(bundle: Bundle) -> None:
    peak = max(cost["peak_rss_bytes"] for cost in bundle.manifest.measured["passes"])
    assert peak <= 1.5 * UNET_BYTES


def test_every_component_equals_pytorch(bundle: Bundle, model: Path, build_cache: Path, tmp_path: Path) -> None:
    from deploy.builder import Silent, load_source
    from deploy.cache import Cache
    from deploy.origin import open_origin
    from deploy.parity.answers import Reference
    from deploy.parity.components import check_components
    from deploy.spec import BuildSpec, covering, parse_shapes

    spec = BuildSpec(model=str(model), shapes=covering(parse_shapes([SHAPES])))
    source = load_source(open_origin(spec), spec, Cache(build_cache), tmp_path, Silent())
    with measured() as spent:
        report = check_components(Reference(source, cache=tmp_path), bundle, OPTIONS)
    for name, figures in report.figures.items():
        print(f"{name:13} relative L2 {figures.relative_l2:.1e} at {len(figures.shapes)} shapes")
    print(f"parity {spent.seconds:.1f} s, peak {spent.peak_rss_bytes / 1e9:.2f} GB")
    assert not report.unverified
    assert set(report.figures) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert max(figures.relative_l2 for figures in report.figures.values()) <= 1e-4


def test_cold_start(bundle: Bundle) -> None:
    """Every network loaded, as the first call of a pipeline needs them."""
    from runtimes.session import open_session

    began = time.perf_counter()
    sessions = [open_session(bundle, name, SessionOptions()) for name in bundle.manifest.components]
    seconds = time.perf_counter() - began
    print(f"load {seconds:.1f} s")
    assert len(sessions) == 4 and seconds <= 20
