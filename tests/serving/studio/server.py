"""The whole server with the studio page, over numpy functions whose steps a test lets through one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError
from runtimes.pipeline.diffusion import Pipeline
from runtimes.serving.engine.catalog import ServedModel
from runtimes.serving.engine.engine import Engine
from runtimes.serving.http.app import create_app
from runtimes.serving.http.keys import KeyRing, Signer
from runtimes.serving.http.service import Service
from runtimes.serving.options import ServerOptions
from runtimes.serving.state.dispatcher import Dispatcher
from runtimes.serving.state.job_store import JobStore
from tests.runtimes.fakes import DDIM, FACTS, fake_sessions, tokenize
from tests.serving.http_server import running_app

SIDE = ShapeRange(16, 32, 64)
MULTIPLE = 8


class Gate:
    """Lets denoising steps through: all of them, or as many as it was given.

    Attributes:
        refuses: texts whose length, as the fake text encoder has it, makes a step raise.
    """

    def __init__(self) -> None:
        self.refuses: set[str] = set()
        self._changed = threading.Condition()
        self._left: float = float("inf")

    def close(self) -> None:
        with self._changed:
            self._left = 0

    def let(self, steps: float = float("inf")) -> None:
        """Let so many more steps through, without a number all that come."""
        with self._changed:
            self._left += steps
            self._changed.notify_all()

    def step(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._left > 0, 60), "a test has left the gate closed"
            self._left -= 1


class StudioServer:
    """A running server.

    Attributes:
        url: of the page.
        gate: in front of every denoising step.
        refuses: prompts whose denoising raises; the fake text encoder knows them by their length.
        store: of its jobs.
    """

    def __init__(self, port: int, gate: Gate, store: JobStore) -> None:
        self.url, self.gate, self.store, self.refuses = f"http://127.0.0.1:{port}/", gate, store, gate.refuses

    def statuses(self) -> list[str]:
        """Of all jobs, the newest first."""
        return [job.status for job in self.store.jobs("")]


def pipeline(gate: Gate, *, inverted: bool = False) -> Pipeline:
    """Numpy functions; one that is inverted decodes to the colours' opposites."""
    sessions = fake_sessions(batch=16)
    unet, decoder = sessions["unet"].function, sessions["vae_decoder"].function

    def stepped(**feeds):
        gate.step()
        sessions["unet"].calls.clear()
        for text in gate.refuses:
            if (feeds["encoder_hidden_states"][:, 0, 0] == np.sin(np.float32(len(text)))).any():
                raise InputError("the device refuses", where="unet")
        return unet(**feeds)

    def decoded(**feeds):
        return -decoder(**feeds) if inverted else decoder(**feeds)

    sessions["unet"].function, sessions["vae_decoder"].function = stepped, decoded
    return Pipeline(sessions, FACTS, DDIM, tokenize)


def served(name: str, folder: Path, *, digest: str, presets: Mapping[str, Mapping[str, object]]) -> ServedModel:
    """What the catalog says of the fake pipelines, which have no bundle."""
    return ServedModel(
        name=name, folder=folder, digest=digest, created=1, family="stable-diffusion", precision="fp32",
        height=32, width=32, heights=(SIDE, MULTIPLE), widths=(SIDE, MULTIPLE), schedulers=("ddim", "euler"),
        edits=True, inpaints=False, takes_prompt=True, has_safety_checker=False, exact=True, bytes=1, presets=presets)


@contextmanager
def serving(folder: Path, catalog: Mapping[str, ServedModel], pool: Engine, keys: Mapping[str, str] | None = None,
            gate: Gate | None = None) -> Iterator[StudioServer]:
    """Serve models from a folder for the state; the engine is closed at the end."""
    gate, store = gate or Gate(), JobStore(folder / "state")
    service = Service(catalog, pool, store, ServerOptions(port=0), Signer(b"k" * 32), KeyRing(keys))
    with Dispatcher(store, pool, catalog), running_app(create_app(service)) as (_, port):
        yield StudioServer(port, gate, store)
        gate.let()
    pool.close(drain=False)
    store.close()


@contextmanager
def serving_fakes(folder: Path, keys: Mapping[str, str] | None = None) -> Iterator[StudioServer]:
    """Serve two models of numpy functions, `plain` and `inverted`."""
    gate = Gate()
    catalog = {
        "plain": served("plain", folder, digest="a1" * 32, presets={"standard": {}, "draft": {"steps": 3}}),
        "inverted": served("inverted", folder, digest="b2" * 32, presets={"standard": {}}),
    }
    pool = Engine({"plain": pipeline(gate), "inverted": pipeline(gate, inverted=True)})
    with serving(folder, catalog, pool, keys, gate) as server:
        yield server


def red_square(side: int = 40) -> np.ndarray:
    """(side, side, 3) uint8: an image to start from."""
    colours = np.zeros((side, side, 3), np.uint8)
    colours[side // 4: -side // 4, side // 4: -side // 4, 0] = 220
    return colours
