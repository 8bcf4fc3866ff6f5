"""Bundles of one worker: loaded on demand, within a cap, replaced while requests run, and given back."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runtimes.errors import BundleError, DeployError, InputError, OutOfMemoryError, UnavailableError
from runtimes.inputs.request import Request
from runtimes.serving.engine import models as models_module
from runtimes.serving.engine.catalog import Catalog
from runtimes.serving.engine.engine import Engine
from runtimes.serving.engine.models import Models, opener, resident_bytes
from runtimes.serving.engine.sources import Loaded
from tests.serving.tiny_bundles import copied, remark, tiny_bundle
from tests.serving.worker_pipelines import fake


@dataclass
class Offer:
    digest: str
    bytes: int = 100
    folder: Path = Path("/somewhere")


class Opened:
    """A pipeline that knows whether it was closed."""

    def __init__(self, offered) -> None:
        self.digest, self.closed = offered.digest, False

    def close(self) -> None:
        self.closed = True


def opened_one(offered) -> Any:
    return Opened(offered)


def closed(loaded: Loaded) -> bool:
    pipeline: Any = loaded.pipeline
    return bool(pipeline.closed)


def found(models: Models, name: str) -> Loaded:
    """Ask until it is loaded, as the engine does."""
    until = time.monotonic() + 10
    while (loaded := models.find(name)) is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    return loaded


def names(models: Models) -> list[str]:
    return [loaded.name for loaded in models.loaded()]


def three(most_bytes: int = 250, **more) -> Models:
    return Models({name: Offer(name) for name in "abc"}, most_bytes=most_bytes, opened=opened_one, resident=lambda: 0,
                  **more)


def test_a_bundle_is_loaded_when_it_is_asked_for_and_once():
    opened = []

    def counted(offered):
        opened.append(offered)
        return opened_one(offered)

    models = Models({"a": Offer("1")}, opened=counted)
    assert models.loaded() == []
    assert found(models, "a") is found(models, "a") and len(opened) == 1
    with pytest.raises(InputError, match="no model 'x'"):
        models.find("x")


def test_the_one_used_longest_ago_makes_way_and_is_closed():
    models = three()
    a, b = found(models, "a"), found(models, "b")
    found(models, "a")
    found(models, "c")
    assert names(models) == ["a", "c"] and closed(b) and not closed(a)


def test_what_runs_is_not_unloaded_and_what_waits_for_its_room_is_known():
    models = three(most_bytes=150)
    a = found(models, "a")
    models.hold(a)
    assert models.find("b") is None and models.blocked("b") and not closed(a)
    models.release(a)
    found(models, "b")
    assert names(models) == ["b"] and closed(a) and not models.blocked("b")


def test_a_bundle_larger_than_the_cap_is_refused_with_both_numbers():
    models = Models({"a": Offer("1", 3_000_000)}, most_bytes=2_000_000, opened=opened_one)
    models.find("a")
    with pytest.raises(OutOfMemoryError, match="takes 3 MB, and loaded bundles may take 2 MB"):
        models.find("a")
    assert models.loaded() == []


def test_what_the_process_grew_by_counts_where_it_is_more_than_the_files():
    memory = [0]

    def opened(offered):
        memory[0] += 180
        return opened_one(offered)

    models = Models({name: Offer(name) for name in "ab"}, most_bytes=300, opened=opened, resident=lambda: memory[0])
    a = found(models, "a")
    assert a.bytes == 180
    found(models, "b")  # its files alone would fit beside the other: it was not known yet what it takes
    assert found(models, "a").bytes == 180 and names(models) == ["a"]
    grown = Models({"a": Offer("1")}, most_bytes=150, opened=opened, resident=lambda: memory[0])
    with pytest.raises(OutOfMemoryError):
        found(grown, "a")
    assert grown.loaded() == []


def test_a_bundle_that_cannot_be_loaded_says_why_and_is_tried_again_when_it_changes():
    offers = {"a": Offer("1")}
    tried = []

    def opened(offered):
        tried.append(offered.digest)
        if offered.digest == "1":
            raise BundleError("it is damaged", where="/somewhere/unet")
        return opened_one(offered)

    models = Models(offers, opened=opened)
    for _ in range(3):
        with pytest.raises(BundleError, match="it is damaged") as caught:
            found(models, "a")
    assert tried == ["1"] and "/somewhere" not in str(caught.value)
    offers["a"] = Offer("2")
    assert found(models, "a").digest == "2"


def test_what_the_machine_lacks_is_tried_again_after_a_while(monkeypatch):
    lacking = [True]

    def opened(offered):
        if lacking[0]:
            raise MemoryError
        return opened_one(offered)

    models = Models({"a": Offer("1")}, opened=opened)
    with pytest.raises(OutOfMemoryError):
        found(models, "a")
    lacking[0] = False
    with pytest.raises(OutOfMemoryError):
        models.find("a")
    monkeypatch.setattr(models_module, "RETRY_SECONDS", 0.0)
    assert found(models, "a").digest == "1"


def test_new_requests_get_the_new_bundle_while_running_ones_finish_on_the_old():
    offers = {"a": Offer("1")}
    models = Models(offers, opened=opened_one)
    old = found(models, "a")
    models.hold(old)
    offers["a"] = Offer("2")
    new = found(models, "a")
    assert new.digest == "2" and not closed(old) and len(models.loaded()) == 2
    models.release(old)
    assert closed(old) and models.loaded() == [new]


def test_a_replaced_bundle_that_runs_nothing_is_unloaded_and_its_successor_loaded_before_it_is_asked_for():
    offers = {"a": Offer("1")}
    models = Models(offers, opened=opened_one)
    old = found(models, "a")
    offers["a"] = Offer("2")
    models.tidy()
    until = time.monotonic() + 10
    while [one.digest for one in models.loaded()] != ["2"]:
        assert time.monotonic() < until
        time.sleep(0.002)
    assert closed(old)


def test_what_is_wished_for_is_loaded_only_into_free_room():
    models = three()
    for name in "abc":
        models.want(name)
    until = time.monotonic() + 10
    while names(models) != ["a", "b"]:
        models.tidy()
        assert time.monotonic() < until
        time.sleep(0.002)
    models.tidy()
    assert names(models) == ["a", "b"]
    models.close()
    assert models.loaded() == []


# ---- with the engine ---------------------------------------------------------------------------------------------


def pipelines(seconds: float = 0.0):
    return lambda offered: fake(seconds)


def test_models_that_do_not_fit_together_take_turns_and_none_starves():
    models = Models({name: Offer(name) for name in "ab"}, most_bytes=150, opened=pipelines(0.001), resident=lambda: 0)
    with Engine(models, most_images=2) as engine:
        first = [engine.submit(Request("x", steps=3, seed=n), "a") for n in range(6)]
        other = engine.submit(Request("x", steps=3, seed=0), "b")
        later = [engine.submit(Request("x", steps=3, seed=n), "a") for n in range(6)]
        assert other.result(20).digest == "b"
        assert {ticket.result(20).digest for ticket in first + later} == {"a"}
        assert other.ended is not None and later[-1].ended is not None and other.ended < later[-1].ended


def test_loading_does_not_hold_up_what_runs():
    loading = threading.Event()

    def opened(offered):
        if offered.digest == "b":
            assert loading.wait(20)
        return fake(0.001)

    with Engine(Models({name: Offer(name) for name in "ab"}, opened=opened)) as engine:
        engine.submit(Request("x", steps=2, seed=0), "a").result(20)
        other = engine.submit(Request("x", steps=2, seed=0), "b")
        assert engine.submit(Request("x", steps=20, seed=0), "a").result(20).digest == "a"
        assert other.status == "queued"
        loading.set()
        assert other.result(20).digest == "b"


def test_requests_of_a_bundle_that_cannot_be_loaded_fail_and_others_do_not():
    def opened(offered):
        if offered.digest == "b":
            raise UnavailableError("no such device", where="cuda:7")
        return fake(0.0)

    with Engine(Models({name: Offer(name) for name in "ab"}, opened=opened)) as engine:
        broken = [engine.submit(Request("x", steps=2), "b") for _ in range(3)]
        assert engine.submit(Request("x", steps=2), "a").result(20).digest == "a"
        for ticket in broken:
            with pytest.raises(UnavailableError, match="no such device"):
                ticket.result(20)


def test_a_bundle_that_is_replaced_under_load_fails_no_request_and_gives_back_its_memory(tmp_path):
    folder = copied(tiny_bundle(tmp_path / "source_bundle"), tmp_path / "m")
    catalog = Catalog([folder])
    models = Models(catalog, opened=opener(threads=1))
    digests = []
    with Engine(models) as engine:
        tickets = [engine.submit(Request("a cat", steps=6, seed=0, output="numpy"), "m")]
        tickets[0].result(60)
        for n in range(1, 31):
            tickets.append(engine.submit(Request("a cat", steps=6, seed=n % 3, output="numpy"), "m"))
            if n in (8, 18):
                tickets[-2].result(60)
                remark(folder, f"build {n}")
                time.sleep(0.05)  # requests meet the other bundle before the catalog does
                assert catalog.refresh() == ["m"]
            time.sleep(0.01)
            digests.append(catalog["m"].digest)
        results = [ticket.result(30) for ticket in tickets]
        assert len(engine.status().workers[0].models) == 1
    assert len(set(digests)) == 3 and {result.digest for result in results} == set(digests)
    for result, twin in zip(results, [results[n % 3] for n in range(31)], strict=True):
        assert (result.images == twin.images).all()  # only their digests differ
    models.close()
    assert models.loaded() == []


def test_a_bundle_that_changed_after_the_catalog_looked_is_waited_for_and_not_served_unseen(tmp_path, monkeypatch):
    monkeypatch.setattr(models_module, "AGAIN_SECONDS", 0.05)
    folder = copied(tiny_bundle(tmp_path / "source_bundle"), tmp_path / "m")
    catalog = Catalog([folder])
    remark(folder, "unseen")
    with Engine(Models(catalog, opened=opener(threads=1))) as engine:
        waiting = engine.submit(Request("a cat", steps=2, seed=0), "m")
        time.sleep(0.3)
        assert waiting.status == "queued"
        catalog.refresh()
        assert waiting.result(20).digest == catalog["m"].digest
    remark(folder, "never looked at")
    monkeypatch.setattr(models_module, "REPLACED_SECONDS", 0.0)
    with Engine(Models(catalog, opened=opener(threads=1))) as engine:
        with pytest.raises(DeployError, match="replaced a moment ago"):
            engine.submit(Request("a cat", steps=2, seed=0), "m").result(20)


def test_resident_memory_is_that_of_this_process():
    assert 10_000_000 < resident_bytes() < 1 << 40
