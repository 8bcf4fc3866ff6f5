"""Recording, fitting, pooling and storing: the plumbing between a running pipeline and a comparison."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest

from deploy.parity.reference.answer_store import Store
from deploy.parity.reference.call_recorder import Recorder, spread
from deploy.parity.reference.sample_feeds import NoRealInputsError, cast, fit, pack, unpack
from deploy.parity.reference.session_pool import SessionPool
from runtimes.backends.session import Session
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import TensorSpec
from runtimes.errors import InputError

UNET = Component(
    "onnx", "unet.onnx", {},
    (TensorSpec("sample", "float32", ("batch", 1, "height", "width")), TensorSpec("timestep", "float32", ("batch",)),
     TensorSpec("hidden", "float32", ("batch", "sequence", 2))),
    (TensorSpec("out", "float32", ("batch", 1, "height", "width")),), {}, "Net", "fp32", 1)


class Doubling(Session):
    """out = 2 * sample, written into one buffer again and again, as a careless backend might."""

    def __init__(self, name: str = "unet") -> None:
        super().__init__(name, UNET)
        self.closed = False
        self._buffer = np.empty((2, 1, 4, 4), np.float32)

    def _run(self, feeds):
        np.multiply(feeds["sample"], 2, out=self._buffer)
        return {"out": self._buffer}

    def close(self):
        self.closed = True


def call(t: float, rows: int = 2, tokens: int = 5) -> dict[str, np.ndarray]:
    """Row r of the call at time t is filled with t + r / 10."""
    values = np.float32(t) + np.arange(rows, dtype=np.float32) / 10
    words = np.arange(tokens, dtype=np.float32)[None, :, None]
    return {
        "sample": np.broadcast_to(values[:, None, None, None], (rows, 1, 4, 4)).copy(),
        "timestep": values,
        "hidden": values[:, None, None] * 100 + words + np.zeros(2, np.float32),
    }


def test_recorder_returns_the_inner_result_and_keeps_copies():
    recorder, feeds = Recorder(Doubling()), call(1)
    outputs = recorder.run(feeds)
    np.testing.assert_array_equal(outputs["out"], 2 * feeds["sample"])
    recorder.run(call(2))
    feeds["sample"][:] = -1
    assert [c["sample"].flat[0] for c in recorder.calls] == [1, 2]
    assert [r["out"].flat[0] for r in recorder.results] == [2, 4]
    recorder.clear()
    assert recorder.calls == recorder.results == []


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(25, 3, [0, 12, 24]), (5, 3, [0, 2, 4]), (4, 3, [0, 1, 3]), (3, 3, [0, 1, 2]), (2, 3, [0, 1]), (9, 1, [0]),
     (1, 3, [0])],
)
def test_spread_has_first_middle_and_last(count, wanted, expected):
    assert spread(count, wanted) == expected


def test_spread_never_repeats():
    for count in range(1, 40):
        for wanted in range(1, 40):
            assert len(set(spread(count, wanted))) == min(count, wanted)


def test_first_middle_and_last_call_are_sampled():
    fitted = fit(UNET, [call(t) for t in range(5)], {"batch": 2, "height": 4, "width": 4, "sequence": 5})
    assert [f["timestep"][0] for f in fitted] == [0, 2, 4]


def test_a_smaller_odd_batch_holds_rows_of_both_guidance_branches():
    (fitted,) = fit(UNET, [call(1, rows=4)], {"batch": 3, "height": 4, "width": 4, "sequence": 5})
    np.testing.assert_allclose(fitted["timestep"], [1.0, 1.1, 1.3])
    np.testing.assert_array_equal(fitted["sample"][:, 0, 0, 0], fitted["timestep"])
    np.testing.assert_array_equal(fitted["hidden"][:, 0, 0], fitted["timestep"] * 100)


def test_a_larger_batch_borrows_rows_of_other_calls_then_repeats():
    fitted = fit(UNET, [call(1), call(2)], {"batch": 5, "height": 4, "width": 4, "sequence": 5})
    np.testing.assert_allclose(fitted[0]["timestep"], [1.0, 1.1, 2.0, 2.1, 1.0])
    np.testing.assert_allclose(fitted[1]["timestep"], [2.0, 2.1, 1.0, 1.1, 2.0])


def test_a_sequence_is_cut_to_its_first_tokens_or_repeated():
    short, long = (fit(UNET, [call(0)], {"batch": 2, "height": 4, "width": 4, "sequence": n})[0] for n in (3, 7))
    np.testing.assert_array_equal(short["hidden"][0, :, 0], [0, 1, 2])
    np.testing.assert_array_equal(long["hidden"][0, :, 0], [0, 1, 2, 3, 4, 0, 1])


def test_images_are_never_cut():
    with pytest.raises(InputError, match="height=6 was planned"):
        fit(UNET, [call(0)], {"batch": 2, "height": 6, "width": 4, "sequence": 5})


def test_nothing_recorded_is_said_so():
    with pytest.raises(NoRealInputsError, match="never calls it"):
        fit(UNET, [], {"batch": 2})


def test_cast_follows_the_component_and_leaves_unknown_names():
    feeds = cast({"sample": np.ones(2), "other": np.ones(2)}, UNET)
    assert feeds["sample"].dtype == np.float32
    assert feeds["other"].dtype == np.float64


def test_pack_and_unpack_are_inverse():
    calls = [call(t) for t in range(12)]
    back = unpack({**pack(calls, "feeds"), **pack([call(99)], "outputs")}, "feeds")
    assert [c["timestep"][0] for c in back] == list(range(12))


def test_pool_holds_no_more_than_its_capacity():
    opened: list[Doubling] = []

    def opener(name: str) -> Session:
        opened.append(Doubling(name))
        assert sum(not s.closed for s in opened) <= 2
        return opened[-1]

    pool = SessionPool({name: UNET for name in "abc"}, opener, capacity=2)
    assert not opened
    for name in "abacb":
        pool.sessions[name].run(call(1))
    assert [s.name for s in opened] == ["a", "b", "c", "b"]  # b was the least recently run when c came
    pool.close()
    assert all(s.closed for s in opened)


def test_pool_drops_its_reference_to_what_it_frees():
    pool = SessionPool({"a": UNET}, Doubling, capacity=1)
    pool.sessions["a"].run(call(1))
    alive = weakref.ref(pool.opened("a"))
    pool.free("a")
    assert alive() is None


def test_store_computes_once_per_key_and_survives_a_new_process(tmp_path):
    arrays: dict[str, np.ndarray] = {"a/b": np.arange(3), "c": np.array([[1.5]], np.float32)}
    Store(tmp_path).get({"k": 1}, lambda: arrays)
    again = Store(tmp_path).get({"k": 1}, lambda: pytest.fail("computed twice"))
    assert list(again) == list(arrays)
    np.testing.assert_array_equal(again["c"], arrays["c"])
    assert Store(tmp_path).find({"k": 2}) is None
    assert [p.suffix for p in (tmp_path / "parity").glob("[!.]*")] == [".npz"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not really", None])
def test_a_damaged_entry_is_computed_again(tmp_path, damage):
    store = Store(tmp_path)
    store.put("key", {"x": np.arange(1000)})
    (file,) = (tmp_path / "parity").glob("[!.]*")
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    assert store.find("key") is None
    np.testing.assert_array_equal(store.get("key", lambda: {"x": np.arange(2)})["x"], [0, 1])


def test_a_failed_computation_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Store(tmp_path).get("key", lambda: {"x": np.array(1 // 0)})
    assert not list(tmp_path.rglob("*.npz"))


def test_writers_of_one_key_do_not_disturb_each_other(tmp_path):
    def write() -> None:
        for _ in range(20):
            Store(tmp_path).put("key", {"x": np.arange(500)})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        found = Store(tmp_path).find("key")
        assert found is None or len(found["x"]) == 500
    assert len(list((tmp_path / "parity").glob("[!.]*"))) == 1


def test_without_a_folder_everything_stays_in_memory():
    store = Store(None)
    store.put("key", {"x": np.arange(2)})
    assert store.find("key") is not None and Store(None).find("key") is None
