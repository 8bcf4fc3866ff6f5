"""OpenVINO behind the Session protocol; without the package, what is said instead."""

from __future__ import annotations

import dataclasses
import threading
from importlib import util
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from runtimes.backends.openvino_session import OpenVinoSession, available_device, cache_folder, properties
from runtimes.backends.session import SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.errors import BundleError, DeployError, InputError, UnavailableError
from runtimes.system.device import Device
from tests.runtimes.fakes import AFFINE, affine_model, write_bundle

INSTALLED = util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not INSTALLED, reason="the first test says what is missing")
CPU = SessionOptions(threads=1)
PART = dataclasses.replace(AFFINE, format="openvino", file="components/affine/model.xml")
X = np.arange(8, dtype=np.float32).reshape(2, 4)
Y = X @ np.arange(12, dtype=np.float32).reshape(4, 3) + np.array([1, 2, 3], np.float32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    folder = tmp_path / "b" / "components" / "affine"
    folder.mkdir(parents=True)
    if INSTALLED:
        from exporters.openvino.openvino_files import convert_openvino

        onnx.save(affine_model(), tmp_path / "affine.onnx")
        convert_openvino(tmp_path / "affine.onnx", folder / "model.xml", PART.inputs, PART.outputs)
    else:
        (folder / "model.xml").write_text("<net/>")
    return write_bundle(tmp_path / "b", {"affine": PART})


def test_without_openvino_its_package_is_named(bundle):
    if INSTALLED:
        assert OpenVinoSession(bundle, "affine", CPU).run({"x": X})
        return
    with pytest.raises(UnavailableError, match=r"openvino is not installed .*ldm-deploy\[openvino\]"):
        OpenVinoSession(bundle, "affine", CPU)


@needs_openvino
def test_outputs_are_right_fresh_and_named(bundle):
    session = OpenVinoSession(bundle, "affine", CPU)
    first = session.run({"x": X})
    np.testing.assert_allclose(first["y"], Y, rtol=1e-6)
    first["y"][:] = 0  # the caller owns it
    np.testing.assert_allclose(session.run({"x": X})["y"], Y, rtol=1e-6)
    np.testing.assert_allclose(session.run({"x": np.tile(X, (4, 1))})["y"], np.tile(Y, (4, 1)), rtol=1e-6)
    np.testing.assert_allclose(session.run({"x": np.asfortranarray(X)})["y"], Y, rtol=1e-6)


@needs_openvino
def test_an_earlier_result_is_not_overwritten_by_a_later_call(bundle):
    session = OpenVinoSession(bundle, "affine", CPU)
    first = session.run({"x": X})["y"]
    session.run({"x": X + 1})
    np.testing.assert_allclose(first, Y, rtol=1e-6)


@needs_openvino
@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_threads_may_share_a_session(bundle, hint):
    options = SessionOptions(threads=1, hint=hint)
    session = OpenVinoSession(bundle, "affine", options)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not np.allclose(session.run({"x": X * number})["y"], (Y - [1, 2, 3]) * number + [1, 2, 3], rtol=1e-5):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_openvino
def test_what_was_compiled_is_stored_for_the_next_process(bundle, tmp_path):
    for _ in range(2):
        OpenVinoSession(bundle, "affine", CPU).run({"x": X})
    assert len(list((tmp_path / "xdg" / "ldm-deploy" / "openvino").rglob("*.blob"))) == 1


@needs_openvino
@pytest.mark.parametrize(("device", "kind", "message"), [
    ("cuda", InputError, "a bundle for OpenVINO does not run on 'cuda'.*one of cpu, gpu"),
    ("npu", UnavailableError, "finds no NPU here, only CPU"),
    ("gpu:1", UnavailableError, r"finds no GPU\.1 here, only CPU"),
    ("GPU.0", UnavailableError, "finds no GPU here, only CPU"),
])
def test_a_device_that_is_not_there_is_named(bundle, device, kind, message):
    with pytest.raises(kind, match=message):
        OpenVinoSession(bundle, "affine", SessionOptions(Device.parse(device)))


@needs_openvino
@pytest.mark.parametrize(("device", "name"), [("gpu", "GPU"), ("gpu:0", "GPU"), ("gpu:1", "GPU.1"), ("auto", "AUTO")])
def test_devices_are_named_as_openvino_names_them(monkeypatch, device, name):
    """openvino docs, GPU device: "GPU is an alias for GPU.0"; with several, available_devices has GPU.0 and GPU.1."""
    monkeypatch.setattr("runtimes.backends.openvino_session.openvino_core",
                        lambda: SimpleNamespace(available_devices=["CPU", "GPU.0", "GPU.1"]))
    assert available_device(Device.parse(device)) == name


@needs_openvino
def test_a_closed_session_says_so_and_has_let_go_of_its_model(bundle):
    session = OpenVinoSession(bundle, "affine", CPU)
    session.run({"x": X})
    session.close()
    session.close()
    assert not {"_compiled", "_requests"} & set(vars(session))
    with pytest.raises(DeployError, match="the session is closed"):
        session.run({"x": X})


@needs_openvino
def test_a_damaged_file_is_a_bundle_error(bundle):
    file = bundle.path / PART.file
    file.chmod(0o644)
    file.write_text(file.read_text()[:300])
    with pytest.raises(BundleError, match="OpenVINO cannot load it"):
        OpenVinoSession(bundle, "affine", CPU)


@needs_openvino
def test_names_that_are_not_the_manifests_are_refused(bundle):
    part = dataclasses.replace(PART, inputs=(dataclasses.replace(PART.inputs[0], name="z"),))
    changed = Bundle(bundle.path, dataclasses.replace(bundle.manifest, components={"affine": part}))
    with pytest.raises(BundleError, match=r"the model has \['x'\], the manifest \['z'\]"):
        OpenVinoSession(changed, "affine", CPU)


def test_float32_is_computed_in_float32_on_every_cpu():
    assert properties(PART, CPU)["INFERENCE_PRECISION_HINT"] == "f32"
    assert "INFERENCE_PRECISION_HINT" not in properties(dataclasses.replace(PART, precision="bf16"), CPU)


def test_threads_and_hints_reach_openvino():
    made = properties(PART, SessionOptions(threads=3, hint="throughput", pin_threads=True))
    assert (made["INFERENCE_NUM_THREADS"], made["PERFORMANCE_HINT"]) == (3, "THROUGHPUT")
    assert made["ENABLE_CPU_PINNING"] is True
    assert {"INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING"}.isdisjoint(properties(PART, SessionOptions()))
    with pytest.raises(InputError, match="unknown hint 'fast'"):
        properties(PART, SessionOptions(hint="fast"))


def test_a_home_that_cannot_be_written_only_costs_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder(PART) is None
    assert "CACHE_DIR" not in properties(PART, CPU)
