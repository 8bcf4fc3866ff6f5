"""A disk that takes no more, by the kernel: RLIMIT_FSIZE fails writes beyond a size as a full disk fails them."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtimes.serving.engine.contract import Generated
from runtimes.serving.state.dispatcher import Dispatcher
from runtimes.serving.state.job_store import JobStore
from runtimes.serving.state.store import COMPLETED, QUEUED, RUNNING, FullError
from tests.serving.test_dispatcher import MODELS, HeldPool, accept, ended, quick
from tests.serving.test_engine import wait_for

__all__ = ["quick"]  # a fixture
MOST = 400_000


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Python ignores SIGXFSZ, so that a write gives EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_does_not_fit_is_refused_and_what_was_accepted_is_there(tmp_path: Path):
    content = np.random.default_rng(1).bytes(2 * MOST)
    with JobStore(tmp_path, reserve_bytes=0) as store:
        job = accept(store)
        store.claim("e", None, 1)
        with no_file_beyond(MOST):
            with pytest.raises(FullError):
                store.accept({"prompt": "x"}, model="m", files={hashlib.sha256(content).hexdigest(): content})
            with pytest.raises(FullError):
                store.accept({"prompt": "x" * 2 * MOST}, model="m")  # the database's log
            with pytest.raises(FullError):
                store.complete(job.id, [(content, "png")], {})
            assert store.counts()[QUEUED] == 0 and store.job(job.id).status == RUNNING
        assert store.complete(job.id, [(content, "png")], {}) and accept(store, 2).status == QUEUED
    with JobStore(tmp_path, reserve_bytes=0) as store:
        assert store.job(job.id).status == COMPLETED
        assert len(list((tmp_path / "images").iterdir())) == 1 and list((tmp_path / "inputs").iterdir()) == []


def test_a_job_whose_image_does_not_fit_is_done_when_there_is_room(tmp_path: Path):
    pool, full = HeldPool(), []
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (512, 512, 3), np.uint8))
    with JobStore(tmp_path, reserve_bytes=0) as store, Dispatcher(store, pool, MODELS,
                                                                  on_full=lambda: full.append(1)):
        with no_file_beyond(MOST):
            job = accept(store)
            wait_for(lambda: len(pool.tickets) == 1)
            pool.tickets[0].end(Generated([noise], "d" * 64))
            wait_for(lambda: len(pool.tickets) == 2)
            assert full and store.job(job.id).attempts == 1
        pool.tickets[1].end(Generated([noise], "d" * 64))
        assert ended(store, job) == [COMPLETED] and len(store.job(job.id).images) == 1
