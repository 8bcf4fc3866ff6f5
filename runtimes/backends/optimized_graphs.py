"""Stores large graphs as ONNX Runtime optimized them for this processor, so that the next session maps them instead.

Level ALL rewrites every convolution weight into the processor's own layout, which for the U-Net of Stable Diffusion
takes 8 of the 9 seconds of a load. The result suits this processor and this release alone: no bundle could hold it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import onnxruntime as ort

from runtimes.bundle.manifest import Component, digest_of
from runtimes.system.cache_root import cache_home
from runtimes.system.cache_store import WORK, keep_within_limit, scratch, use
from runtimes.system.compute_identity import processor

ABOVE_BYTES = 128 << 20  # smaller ones load in half a second
MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"

Open = Callable[[Path, ort.SessionOptions], ort.InferenceSession]


def open_stored(graph: Path, component: Component, options: Callable[[], ort.SessionOptions], open_graph: Open,
              root: Path) -> ort.InferenceSession:
    """A session of a large graph, from what an earlier one stored, else stored for later ones.

    A folder that cannot be written, a disk with too little room and a damaged entry cost the time of a plain load.

    Args:
        graph: of the bundle.
        component: its record; the stored graph is found again by its hash.
        options: makes the options of a plain load.
        open_graph: opens a session; what it raises for the bundle's own graph reaches the caller.
        root: folder of all stored graphs.
    """
    wanted = options()
    level = int(wanted.graph_optimization_level.value)
    entry = root / digest_of([component.sha256, ort.__version__, level, processor()])
    if use(entry):
        wanted.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = open_graph(entry / MODEL_FILE, wanted)
        except Exception:  # whatever is wrong with it: the bundle's own graph is still there
            shutil.rmtree(entry, ignore_errors=True)
        else:
            return session
    with ExitStack() as stack:
        try:
            partial = stack.enter_context(_room(root, 2 * component.bytes))
        except OSError:
            return open_graph(graph, options())
        session = open_graph(graph, _writing(options(), partial))
        with suppress(OSError):  # another process was faster
            partial.rename(entry)
    keep_within_limit()
    return session


def _writing(options: ort.SessionOptions, folder: Path) -> ort.SessionOptions:
    """The same options, with the optimized graph written on the way; its weights beside it, so that they are mapped."""
    options.optimized_model_filepath = str(folder / MODEL_FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA_FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    return options


@contextmanager
def _room(root: Path, size: int) -> Iterator[Path]:
    """A folder to write into.

    Raises:
        OSError: it cannot be made, or the disk has no room for so many bytes.
    """
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < size:
        raise OSError(f"{root} has no room")
    with scratch(cache_home() / WORK) as folder:
        yield folder
