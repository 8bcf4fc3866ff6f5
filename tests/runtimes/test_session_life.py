"""The life of a session: calls, close, wrappers around it; and that close gives the memory back."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtimes.backends.session import WrappedSession
from runtimes.bundle.tensors import TensorSpec
from runtimes.errors import DeployError, InputError
from tests.runtimes.fakes import AFFINE, FakeSession, component, graph, write_bundle

X = np.ones((2, 4), np.float32)


class Held(FakeSession):
    """A session that notes each time it gives back, and waits in its calls until it may go on."""

    def __init__(self) -> None:
        super().__init__("affine", AFFINE, self.answer)
        self.given_back: list[str] = []
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def answer(self, x: np.ndarray) -> np.ndarray:
        self.inside.set()
        assert self.go_on.wait(10) and not self.given_back
        return x[:, :3]

    def _close(self) -> None:
        self.given_back.append(self.name)


class Doubled(WrappedSession):
    def _run(self, feeds):
        return {name: 2 * array for name, array in super()._run(feeds).items()}


def test_with_closes_and_closing_again_does_nothing():
    with Held() as session:
        session.run({"x": X})
        assert not session.given_back
    session.close()
    assert session.given_back == ["affine"]
    with pytest.raises(DeployError, match="the session is closed"):
        session.run({"x": X})


def test_close_waits_for_calls_that_run_and_refuses_later_ones():
    session, results = Held(), list[np.ndarray]()
    session.go_on.clear()
    call = threading.Thread(target=lambda: results.append(session.run({"x": X})["y"]))
    call.start()
    assert session.inside.wait(10)
    closing = threading.Thread(target=session.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive() and not session.given_back
    with pytest.raises(DeployError, match="the session is closed"):
        session.run({"x": X})
    session.go_on.set()
    call.join()
    closing.join()
    assert session.given_back == ["affine"] and results[0].shape == (2, 3)


def test_a_call_that_fails_does_not_keep_a_session_from_closing():
    session = Held()
    with pytest.raises(InputError):
        session.run({"x": X[0]})
    session.close()
    assert session.given_back == ["affine"]


def test_a_wrapper_has_name_component_calls_and_life_of_what_it_wraps():
    inner = Held()
    with Doubled(inner) as outer:
        assert outer.name == inner.name and outer.component is inner.component
        np.testing.assert_array_equal(outer.run({"x": X})["y"], 2 * X[:, :3])
        with pytest.raises(InputError, match="has shape"):
            outer.run({"x": X[0]})
    assert inner.given_back == ["affine"]
    for session in (outer, inner):
        with pytest.raises(DeployError, match="the session is closed"):
            session.run({"x": X})


MEGABYTES, WIDTH = 48, 1024
OPEN_AND_CLOSE = """
import json, resource, sys
from pathlib import Path
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.tensors import example_feeds

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

bundle, held, closed = Bundle.open(sys.argv[1]), [], []
feeds = example_feeds(bundle.component("wide").inputs, {"batch": 2})
for _ in range(20):
    with Session.open(bundle, "wide", SessionOptions(threads=1)) as session:
        session.run(feeds)
        held.append(resident())
    closed.append(resident())  # `session` still refers to it
print(json.dumps([held, closed]))
"""


def wide_bundle(folder: Path, backend: str) -> None:
    """One matrix product of MEGABYTES of weights."""
    columns = MEGABYTES * 2**20 // 4 // WIDTH
    weights = np.random.default_rng(0).standard_normal((WIDTH, columns), np.float32)
    model = graph([("x", TensorProto.FLOAT, ["batch", WIDTH])], [("y", TensorProto.FLOAT, ["batch", columns])],
                  [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights})
    part = component((TensorSpec("x", "float32", ("batch", WIDTH)),), (TensorSpec("y", "float32", ("batch", columns)),),
                     AFFINE.axes, format=backend,
                     file=f"components/wide/model.{'xml' if backend == 'openvino' else 'onnx'}")
    (folder / part.file).parent.mkdir(parents=True)
    if backend == "onnx":
        onnx.save(model, folder / part.file)
    else:
        from exporters.openvino.openvino_files import convert_openvino

        onnx.save(model, folder.with_name("wide.onnx"))
        convert_openvino(folder.with_name("wide.onnx"), folder / part.file, part.inputs, part.outputs)
    write_bundle(folder, {"wide": part})


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_what_a_session_takes_it_gives_back_at_close(tmp_path: Path, monkeypatch, run_python, backend):
    """Twenty in a row, in a process of its own: each takes its weights, and none leaves them."""
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "cache"))
    wide_bundle(tmp_path / "b", backend)
    held, closed = json.loads(run_python(OPEN_AND_CLOSE, tmp_path / "b"))
    taken = [during - before for before, during in zip(closed[2:], held[3:], strict=False)]
    assert min(taken) > MEGABYTES / 2, "the weights are not in memory, so that nothing is shown"
    assert max(closed[2:]) - closed[2] < MEGABYTES / 4, [round(megabytes) for megabytes in closed]
