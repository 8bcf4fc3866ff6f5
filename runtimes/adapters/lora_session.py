"""Wraps any backend's session of a network that takes its LoRA as inputs, and feeds them in every call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from runtimes.adapters.lora_inputs import feeds_for, with_inputs
from runtimes.backends.session import Arrays, Session, SessionOptions, WrappedSession
from runtimes.bundle.folder import Bundle


class LoraSession(WrappedSession):
    """Takes the inputs that the pipeline knows; the LoRA's, (rank, ...) float32, are the same in every call.

    Args:
        bundle: of any format; the component was built with `--lora-mode swap`.
        name: of the component.
        options: of the backend; `lora` says which one, instead of the bundle's own.

    Raises:
        InputError: a LoRA that does not fit.
        DeployError: what the backend's session raises.
    """

    def __init__(self, bundle: Bundle, name: str, options: SessionOptions) -> None:
        component = bundle.component(name)
        self._lora = feeds_for(bundle, name, options.lora)
        components = {**bundle.manifest.components, name: with_inputs(component)}
        whole = replace(bundle, manifest=replace(bundle.manifest, components=components))
        super().__init__(Session.open(whole, name, options), component)

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        return super()._run({**feeds, **self._lora})
