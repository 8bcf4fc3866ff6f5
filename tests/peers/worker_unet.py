"""One U-Net alone in a process: by eager PyTorch, torch.compile, or a bundle's session, or bare by a runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bench.worker_messages import arguments, serve

KIND, _SOURCE, _THREADS = arguments(__doc__, "KIND", "SOURCE", "THREADS")
SOURCE, THREADS = Path(_SOURCE), int(_THREADS)
Call = Callable[[dict[str, Any]], Any]


def torch_eager() -> Call:
    """SOURCE is the folder of a U-Net as diffusers writes it."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(THREADS)
    network = UNet2DConditionModel.from_pretrained(SOURCE, local_files_only=True).eval()
    called = torch.compile(network) if KIND == "compile" else network

    def call(feeds: dict[str, Any]) -> Any:
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with torch.no_grad():  # one timestep for all, as the pipeline passes it
            return called(tensors["sample"], tensors["timestep"][0].long(),
                          encoder_hidden_states=tensors["encoder_hidden_states"], return_dict=False)[0].numpy()

    return call


def bundle_session() -> Call:
    """SOURCE is a bundle."""
    from runtimes.backends.session import SessionOptions
    from runtimes.bundle.folder import Bundle
    from runtimes.pipeline.bundle_sessions import open_session

    session = open_session(Bundle.open(SOURCE), "unet", SessionOptions(threads=THREADS))
    return lambda feeds: next(iter(session.run(feeds).values()))


def bare_onnxruntime() -> Call:
    """SOURCE is the exported graph, untouched."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(str(SOURCE), options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def bare_openvino() -> Call:
    """SOURCE is the exported graph, untouched."""
    import openvino

    hints = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(SOURCE), "CPU", hints).create_infer_request()
    return lambda feeds: np.array(request.infer(feeds)[0])


KINDS: Mapping[str, Callable[[], Call]] = {
    "eager": torch_eager, "compile": torch_eager, "bundle": bundle_session,
    "bare-onnxruntime": bare_onnxruntime, "bare-openvino": bare_openvino,
}


def prepare() -> dict[str, Any]:
    """Load the network."""
    call = KINDS[KIND]()

    def once(feeds: str, save: str = "") -> dict[str, Any]:
        arrays = dict(np.load(feeds))
        began = time.perf_counter()
        output = call(arrays)
        seconds = time.perf_counter() - began
        if save:
            np.save(save, output)
        return {"seconds": seconds}

    return {"once": once}


if __name__ == "__main__":
    serve(prepare)
