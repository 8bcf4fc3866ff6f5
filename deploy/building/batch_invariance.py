"""Measures whether a row's result depends on the other rows of its call, for each number of rows a network takes.

Matrix products choose kernels and tiles by the number of rows, and round otherwise with each; ranges of dynamic INT8
are those of all rows together. `runtimes.pipeline.batch_facts` reads what is measured here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.core.isolation import ABOVE_BYTES, call_isolated, from_request, to_request
from deploy.core.pass_cache import Cache
from runtimes.backends.batching import row_range
from runtimes.backends.session import FORMATS, Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import digest_of, from_json, to_json
from runtimes.bundle.roles import Role
from runtimes.bundle.tensors import DTYPES
from runtimes.errors import DeployError, UnavailableError
from runtimes.pipeline.bundle_sessions import open_session
from runtimes.system.compute_identity import runtime_identity

Arrays = Mapping[str, NDArray[Any]]
MEASURED_ROLES = (Role.TEXT_ENCODER, Role.DENOISER, Role.SHALLOW, Role.IMAGE_ENCODER, Role.IMAGE_DECODER)
VERSION = 1  # raised whenever the same key would mean other figures
IN_EVERY_VOCABULARY = 2  # token numbers below this
ENOUGH_SECONDS = 20.0  # of a component at the sizes that it is mostly called with; else at its smallest


def measure_batches(bundle: Bundle, cache: Cache, options: SessionOptions | None = None) -> dict[str, Any]:
    """What company does to the rows of each component that runs here.

    Args:
        bundle: whose components are run.
        cache: where what was measured of the same bytes is found.
        options: how they are run; by default on the CPU with all of its cores.

    Returns:
        for each component `exact` (equal bits at every number of rows, wherever the row stands), `fixed` (equal bits at
        its usual number of rows), `decibels` (the least ratio of a row's energy to its difference, where not exact),
        `rows` (the numbers that were tried), `sizes`, and `runtime`, a hash of what ran it.
    """
    found, options = {}, options or SessionOptions()
    for name, component in bundle.manifest.components.items():
        role = bundle.manifest.pipeline.role(name)
        if role not in MEASURED_ROLES or component.format not in FORMATS:
            continue
        runtime = digest_of(runtime_identity(options.device, component.format))
        key = {"kind": "rows", "version": VERSION, "component": component.sha256, "axes": to_json(component.axes),
               "inputs": to_json(component.inputs), "format": component.format, "runtime": runtime}
        if (fact := cache.find_fact(key)) is None:
            try:
                fact = _measured(bundle, name, options)
            except UnavailableError:
                continue  # nothing is known of what does not run on this machine
            cache.store_fact(key, fact)
        found[name] = {**fact, "runtime": runtime}
    return found


def _measured(bundle: Bundle, name: str, options: SessionOptions) -> dict[str, Any]:
    """Here or, if the network is large, in a process of its own, whose memory is given back."""
    if bundle.component(name).bytes <= ABOVE_BYTES:
        with open_session(bundle, name, options) as session:
            return measure_rows(session)
    request = {"bundle": to_request(bundle), "name": name, "options": to_json(options)}
    try:
        found, _ = call_isolated("deploy.building.batch_invariance:measure_request", request, name)
    except DeployError as error:
        raise UnavailableError(f"its rows could not be measured: {error.what}", where=name) from error
    return dict(found)


def measure_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a child process does for a large component: `measure_rows` of the one that is asked for."""
    options: SessionOptions = from_json(SessionOptions, request["options"], "options")
    with open_session(from_request(request["bundle"]), request["name"], options) as session:
        return measure_rows(session)


def measure_rows(session: Session) -> dict[str, Any]:
    """One component, at the sizes it is mostly called with, or where that takes too long at its smallest."""
    rows, axes = row_range(session), session.component.axes
    batch = session.component.inputs[0].shape[0]
    if rows.min == rows.max:
        return {**_compared(session, {n: a.range.opt for n, a in axes.items()}, [rows.min]), "rows": [rows.min]}
    numbers = list(range(rows.min, rows.max + 1))
    sizes = {name: axis.range.opt for name, axis in axes.items()}
    feeds = _feeds(session, {**sizes, str(batch): rows.min}, rows.min)
    session.run(feeds)  # a backend plans a shape when it first meets it
    start = time.perf_counter()
    session.run(feeds)
    if (time.perf_counter() - start) * sum(numbers) > ENOUGH_SECONDS * rows.min:
        sizes = {name: axis.range.min for name, axis in axes.items()}
    return {**_compared(session, sizes, numbers), "rows": numbers,
            "sizes": {name: size for name, size in sizes.items() if name != batch}}


def _compared(session: Session, sizes: Mapping[str, int], numbers: list[int]) -> dict[str, Any]:
    rows, most = row_range(session), numbers[-1]
    batch = str(session.component.inputs[0].shape[0])
    feeds = _feeds(session, {**sizes, batch: most}, most)

    def run(picked: list[int]) -> Arrays:
        return session.run({name: array[picked] for name, array in feeds.items()})

    def alone(row: int) -> Arrays:  # a network that takes no single row takes the same one again
        return {name: array[:1] for name, array in run([row] * rows.min).items()}

    lone = [alone(row) for row in range(most)]
    worst = min(_decibels(lone[row], outputs, place) for number in numbers
                for picked in (list(range(number)), [row % most for row in range(most - 1, most - 1 - number, -1)])
                for outputs in (run(picked),) for place, row in enumerate(picked))
    usual = min(max(rows.opt, rows.min), rows.max)
    first = run(list(range(usual)))
    moved = [[(row + shift) % most for row in range(usual)] for shift in range(1, usual + 1)]
    fixed = all(_decibels({n: a[row : row + 1] for n, a in first.items()}, outputs, picked.index(row)) == math.inf
                for picked in moved for outputs in (run(picked),) for row in range(usual) if row in picked)
    return {"exact": worst == math.inf, "fixed": fixed, **({} if worst == math.inf else {"decibels": round(worst, 1)})}


def _feeds(session: Session, sizes: Mapping[str, int], rows: int) -> dict[str, NDArray[Any]]:
    """Inputs of which no two rows are alike: noise, timesteps within the training schedule, small token numbers."""
    random = np.random.default_rng(0)

    def one(name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        if not dtype.startswith("float"):
            return random.integers(0, IN_EVERY_VOCABULARY, shape).astype(DTYPES[dtype])
        values = random.standard_normal(shape) if len(shape) > 1 else np.linspace(999, 1, max(shape[0], 1))
        return values.astype(DTYPES[dtype])

    return {spec.name: one(spec.name, spec.dtype, spec.resolve(sizes)) for spec in session.component.inputs}


def _decibels(lone: Arrays, outputs: Arrays, place: int) -> float:
    """Energy of a row's outputs over that of their difference from the row alone; infinite for equal bits."""
    least = math.inf
    for name, array in lone.items():
        alone, other = array[0].astype(np.float64), outputs[name][place].astype(np.float64)
        if not np.array_equal(alone, other):
            energy, error = np.square(alone).sum(), np.square(alone - other).sum()
            least = min(least, 10 * math.log10(energy / error) if energy > 0 else 0.0)
    return least
