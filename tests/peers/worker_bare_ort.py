"""Yardstick "bare ORT": the U-Net as `export` wrote it, in an InferenceSession with default settings. One call only."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploy.bench.worker_messages import arguments, repeated, serve

GRAPH, THREADS = arguments(__doc__, "GRAPH", "THREADS")


def prepare() -> dict[str, Any]:
    """Load the graph."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = int(THREADS)
    session = ort.InferenceSession(GRAPH, options, providers=["CPUExecutionProvider"])
    dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64}

    def component(name: str, feeds: str, times: int) -> dict[str, Any]:
        arrays = dict(np.load(feeds))
        wanted = {i.name: arrays[i.name].astype(dtypes[i.type]) for i in session.get_inputs()}
        return repeated(lambda: session.run(None, wanted), times)

    return {"component": component}


if __name__ == "__main__":
    serve(prepare)
