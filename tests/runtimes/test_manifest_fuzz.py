"""A manifest in which any one value has another type is refused by its key path, or is as good as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import dumps, parse
from runtimes.errors import BundleError, InputError
from tests.runtimes.fakes import affine_bundle, components, write_bundle

OTHERS: tuple[Any, ...] = (None, True, 0, -1, 1.5, 10**400, "x", "", [], ["x"], [1], [None], {}, {"x": 1}, {"file": 7})
PARITY = {"relative_l2": 1e-6, "max_abs": 1e-6, "cosine": 1.0, "nonfinite": 0, "shapes": [[1, 4]],
          "worst_output": "y", "worst_shape": [1, 4], "budget": 1e-4, "ok": True}
DETAILS = {
    "source_component": "unet", "opset": 20, "macs": 100, "not_fp16": "it overflows", "executed": False,
    "not_executed": "no GPU",
    "builder": "tensorrt", "builder_version": "10", "gpu": "", "compute_capabilities": ["SM86"],
    "refused_capabilities": {"SM75": "too old"}, "profiles": [{"x": [[1, 4], [1, 4], [2, 4]]}],
    "options": {"builder": "tensorrt", "stripped": True}, "layers": {"CONVOLUTION": 3}, "graph_sha256": "a",
    "compiled_component_sha256": "b", "weights": "components/unet/model.onnx",
    "shared_weights": {"file": "components/unet/w", "with": "unet", "tensors": 1, "bytes": 8, "own_bytes": 4},
    "quantizers": {"inputs": {"Conv": 3}, "attentions": 2, "broken_attentions": ["a"]},
    "quantization": {"recipe": "hybrid", "layers": {"w8a8": 3}, "scheme": {"signed": True, "weight_limit": 127},
                     "parameters": {"w8a8": 30}, "weight_bytes": [120, 30],
                     "relief": {"promoted": {"conv": "w8"}, "trials": 2, "relative_l2": [0.2, 0.1]}},
    "pruning": {"parameters_before": 9, "channels": {"method": "l2", "before": [8], "kept": [4], "removed": 0.5}},
    "recovery": {"steps": 3, "device": "cpu", "relative_l2_before": 0.2, "relative_l2_after": 0.1},
    "conversion": {"precision": "fp16", "mode": "compute", "converted": {"Conv": 3}, "kept_float32": {"a": {"b": 1}},
                   "kept_nodes": {"a": ["n"]}, "casts": 1, "weight_bytes_before": 4, "weight_bytes_after": 2},
}
MEASURED = {
    "passes": [{"name": "quantize", "seconds": 1.0, "peak_rss_bytes": 10, "reused": 0, "bytes_in": 5, "bytes_out": 4,
                "components": {"unet": {"seconds": 1.0, "bytes": 4, "peak_rss_bytes": 10}},
                "seconds_without_cache": 1.0, "relative_l2": {"unet": 1e-6},
                "gain": {"unet": {"bytes_ratio": 0.5, "seconds_ratio": 0.9, "verdict": "smaller"}}}],
    "prune_candidates": [{"prune": 0.3, "bytes": 4, "macs": 5, "seconds": 0.1, "trajectory_relative_l2": 0.1,
                          "psnr_db": 30.0, "ssim": 0.9, "retrieval": None, "broken": ""}],
    "build_key": "k", "source_path": "m", "adapters": {"lora": ["a.safetensors"], "vae": "v"},
    "files": {},
}
WHOLE = {
    "ok": True, "components": {"unet": PARITY}, "trajectory": {"relative_l2": [1e-6, 1e-5], "by_scheduler": {}},
    "images": {"count": 1, "psnr_db": 60.0, "psnr_db_mean": 60.0, "ssim": 1.0, "ssim_mean": 1.0},
    "retrieval": {"bundle": 0.9, "reference": 0.9}, "unverified": ["vae_decoder: no GPU"], "broken": [],
    "compared": {"level": "quick", "text": "quick: asked for"}, "budget": {"image_ssim": 0.9}, "culprit": None,
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> dict[str, Any]:
    """Every part that a manifest may have, as JSON."""
    folder = tmp_path_factory.mktemp("fuzz")
    parts = components()
    for name in parts:
        file = folder / "components" / name / "model.onnx"
        file.parent.mkdir(parents=True)
        file.write_bytes(name.encode())
    named = {n: _at(part, f"components/{n}/model.onnx") for n, part in parts.items()}
    found: dict[str, Any] = json.loads(dumps(write_bundle(folder, named).manifest))
    unet = found["components"]["unet"]
    unet.update(details=DETAILS, parity=PARITY, format="tensorrt")
    record = dict(next(iter(unet["files"].values())))
    found.update(parity=WHOLE, verified=True, measured={**MEASURED, "files": {"report/a.png": record}},
                 passes=[{"name": "quantize", "version": 1, "config": {}}])
    return found


def _at(part: Any, file: str) -> Any:
    import dataclasses

    return dataclasses.replace(part, file=file)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value, the innermost ones too."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from paths(part, (*path, key))


def replaced(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> str:
    changed = copy.deepcopy(manifest)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(changed)


def removed(manifest: dict[str, Any], path: tuple[Any, ...]) -> str:
    changed = copy.deepcopy(manifest)
    place = changed
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return json.dumps(changed)


def used(text: str) -> None:
    """What opening, inspecting and loading read of a manifest."""
    from deploy.cli.console import show_bundle

    found = parse(text, "manifest.json")
    found.all_files()
    assert found.digest
    show_bundle(Bundle(Path("nowhere"), found))


def test_the_manifest_itself_is_read_and_shown(manifest, capsys):
    used(json.dumps(manifest))
    out = capsys.readouterr().out
    assert "not executed here: no GPU" in out and "quantize v1" in out and "unverified: " in out


@pytest.mark.parametrize("part", ["components", "measured", "parity", ""])
def test_a_value_of_another_type_is_refused_by_its_key_path(manifest, part, capsys):
    refused = 0
    for path in paths(manifest):
        if (path[0] == part) != bool(part) or (not part and path[0] in ("components", "measured", "parity")):
            continue
        if len(path) > 1 and path[0] == "components" and path[1] != "unet":
            continue
        texts = [(value, replaced(manifest, path, value)) for value in OTHERS] + [("gone", removed(manifest, path))]
        for value, text in texts:
            try:
                used(text)
            except BundleError as error:
                assert error.where, error
                refused += 1
            except InputError as error:  # not the file's shape, but what it says: a height that fits no axis
                assert error.where in ("height", "width", "aspect"), error
            except Exception as error:
                raise AssertionError(f"{path} = {value!r}: {type(error).__name__}: {error}") from error
        capsys.readouterr()
    assert refused > 20


@pytest.mark.parametrize("text", ['{"schema": NaN}', '{"schema": 1, "x": Infinity}', "[" * 100_000, "", "null", "[]",
                                  "\ufeff{}", '{"schema": 1e999}', '{"schema": true}'])
def test_what_is_no_manifest_at_all_is_refused(text):
    with pytest.raises(BundleError):
        parse(text, "manifest.json")


def test_a_malformed_list_of_measured_files_is_named(tmp_path):
    bundle = affine_bundle(tmp_path / "b")
    content = json.loads(dumps(bundle.manifest))
    for files in (["a"], {"report/a": 7}, {"report/a": {"bytes": 1}}, {"report/a": {"bytes": "1", "sha256": "x"}}, "x"):
        content["measured"] = {"files": files}
        (tmp_path / "b" / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(BundleError, match=r"expected|missing") as caught:
            Bundle.open(tmp_path / "b")
        assert caught.value.where.startswith("manifest.json.measured.files")
