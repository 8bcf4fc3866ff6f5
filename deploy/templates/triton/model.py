"""The pipeline inside Triton: our sampling loop over the other models of this repository. Written by export-triton.

Needs `pip install ldm-deploy` in the Python that Triton's backend uses; no torch.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from runtimes.backends.session import Session
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import MANIFEST_FILE, parse
from runtimes.errors import DeployError, UnavailableError
from runtimes.inputs.request import Request
from runtimes.pipeline.diffusion import Pipeline
from runtimes.pipeline.loading import load_tokenizers, scheduler_config


class TritonSession(Session):
    """A component served by Triton, called within the server."""

    def __init__(self, name, component, model):
        """Remember the model's name."""
        super().__init__(name, component)
        self._model = model

    def _run(self, feeds):
        # One number per row travels as (rows, 1): Triton has no empty shapes.
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(a[:, None] if a.ndim == 1 else a))
                   for name, a in feeds.items()]
        request = pb_utils.InferenceRequest(
            model_name=self._model, inputs=tensors,
            requested_output_names=[spec.name for spec in self.component.outputs],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU))
        response = request.exec()
        if response.has_error():
            raise UnavailableError(response.error().message(), where=self.name, fix="see the log of the server")
        return {spec.name: np.array(pb_utils.get_output_tensor_by_name(response, spec.name).as_numpy())
                for spec in self.component.outputs}


class Sessions(Mapping):
    """Every component of the bundle."""

    def __init__(self, bundle, models):
        """Make the sessions; none is called yet."""
        self._sessions = {n: TritonSession(n, c, models[n]) for n, c in bundle.manifest.components.items()
                          if n in models}

    def __getitem__(self, name):
        return self._sessions[name]

    def __iter__(self):
        return iter(self._sessions)

    def __len__(self):
        return len(self._sessions)


def fields_of(request):
    """The fields of a request that are there, as `Request.from_mapping` takes them."""
    found = {}
    for declared in dataclasses.fields(Request):
        kind = declared.metadata["kind"]
        tensor = None if kind.tensor is None else pb_utils.get_input_tensor_by_name(request, declared.name)
        if tensor is None:
            continue
        array = tensor.as_numpy()
        if kind.array:
            found[declared.name] = array
            continue
        values = [v.decode() if isinstance(v, bytes) else v.item() if hasattr(v, "item") else v for v in array.flat]
        found[declared.name] = values[0] if len(values) == 1 else values
    return found


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args):
        """Read tokenizer, scheduler and manifest; the networks are other models of the server."""
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = (folder / "bundle" / MANIFEST_FILE).read_text(encoding="utf-8")
        bundle = Bundle(folder / "bundle", parse(manifest, MANIFEST_FILE))
        models = json.loads((folder / "triton.json").read_text(encoding="utf-8"))
        self.pipeline = Pipeline(Sessions(bundle, models), bundle.manifest.pipeline, scheduler_config(bundle),
                                 *load_tokenizers(bundle))

    def execute(self, requests):
        """Generate the images of each request; what is wrong with one does not touch the others."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """One request's images, (images, height, width, 3) uint8, or its error."""
        try:
            images = self.pipeline(Request.from_mapping(fields_of(request), files=False))
        except (DeployError, UnicodeDecodeError) as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        pixels = np.stack([np.asarray(image) for image in images])
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("images", pixels)])
