"""What the contestants need on disk: our bundle, the plainly exported U-Net, the model in the old layout, a venv.

As a program (`python -m tests.peers.prepare bundle|unet FOLDER`) it does the torch work in a process that then ends.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.errors import UnavailableError
from runtimes.system.cache_root import cache_home

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy" / "reference_models" / "weights"
PEERS = cache_home() / "peers"
# optimum-onnx 0.1.0 wants optimum ~= 2.1 and transformers < 4.58. torch by its local version: PyPI's is a CUDA build.
OPTIMUM_PINS = (
    "torch==2.13.0+cpu", "optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "diffusers==0.35.2",
    "onnxruntime==1.32.0", "onnx==1.23.2", "accelerate==1.15.0", "numpy==2.4.6", "tokenizers==0.22.2",
    "huggingface-hub==0.36.2", "safetensors==0.8.0", "Pillow==13.0.0",
)


class PreparationError(UnavailableError):
    """A contestant cannot be made here; the text says why."""


def model_digest() -> str:
    """Identifies the model's bytes: what was derived from other weights is not used again."""
    digest = hashlib.sha256()
    for file in sorted(p for p in MODEL.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(MODEL)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def optimum_python() -> Path:
    """The interpreter of optimum-onnx's environment, made on first use.

    Raises:
        PreparationError: pip or venv failed.
    """
    venv = PEERS / "optimum-onnx-venv"
    stamp = venv / "pins.json"
    if not stamp.is_file() or json.loads(stamp.read_text()) != list(OPTIMUM_PINS):
        _checked([sys.executable, "-m", "venv", str(venv)])
        _checked([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *OPTIMUM_PINS])
        stamp.write_text(json.dumps(OPTIMUM_PINS))
    return venv / "bin" / "python"


def derived(task: str, timeout: float = 1800) -> Path:
    """Run one of this file's tasks in a process of its own.

    Raises:
        PreparationError: it failed; the last line of its output is the reason.
    """
    PEERS.mkdir(parents=True, exist_ok=True)
    output = _checked([sys.executable, "-W", "ignore", "-m", "tests.peers.prepare", task], timeout)
    return Path(output.strip().splitlines()[-1])


def _checked(command: list[str], timeout: float = 1800) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PreparationError(str(error)) from error
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        raise PreparationError(lines[-1] if lines else f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _bundle() -> Path:
    from deploy.building.run_build import run_build
    from deploy.core.spec import BuildSpec

    return run_build(BuildSpec()).bundle.path.resolve()


def _unet() -> Path:
    from deploy.core.spec import BuildSpec

    return exported_unet(BuildSpec(), PEERS / f"exported-{model_digest()}", PEERS / "cache")


def exported_unet(spec: BuildSpec, folder: Path, cache_root: Path) -> Path:
    """The U-Net's graph as our export pass writes it, before any optimization; made where it is missing.

    Args:
        spec: of a build; nothing of it after the export matters.
        folder: receives the graph.
        cache_root: keeps the loaded source.
    """
    from deploy.building.builder import load_source, workspace
    from deploy.core.pass_cache import Cache
    from deploy.model.source_bundle import open_origin
    from deploy.passes.export import Export

    graph = folder / "components" / "unet" / "model.onnx"
    if not graph.is_file():
        partial, cache = folder.with_suffix(".partial"), Cache(cache_root)
        for left in (partial, folder):
            shutil.rmtree(left, ignore_errors=True)
        with workspace(cache.root) as work:
            source = load_source(open_origin(spec), spec, cache, work)
            step: Any = Export().plan(source.manifest, spec)
            Export().run(step, "unet", source, partial)
        partial.rename(folder)
    return graph


def _old_layout() -> Path:
    """The model as transformers 4 writes it: float32, text-encoder keys below `text_model.`.

    A transformers 4 reader of the new layout fills the text encoder at random with only a warning.
    """
    from safetensors.numpy import load_file, save_file

    folder = PEERS / f"old-layout-{model_digest()}"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(MODEL, partial)
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)
        weights = {name: array.astype("float32") if array.dtype == "float16" else array
                   for name, array in load_file(file).items()}
        if file.parent.name == "text_encoder":
            weights = {n if n.startswith("text_model.") else f"text_model.{n}": a for n, a in weights.items()}
        save_file(weights, file, metadata={"format": "pt"})
    config = partial / "text_encoder" / "config.json"
    content = json.loads(config.read_text())
    content.pop("dtype", None)
    content["torch_dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2))
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    makers = {"bundle": _bundle, "unet": _unet, "old-layout": _old_layout}
    parser = argparse.ArgumentParser(prog="python -m tests.peers.prepare", description=__doc__,
                                     epilog="Called by the commands that measure; prints the path of what it made.")
    parser.add_argument("what", choices=makers)
    print(makers[parser.parse_args().what]())
