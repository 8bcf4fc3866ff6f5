"""The parity reference: runs components of a source bundle by PyTorch in float32."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from deploy.parity.reference.planned_shapes import spatial_spec
from deploy.parity.reference.session_pool import SessionPool
from exporters.adapters.lora_merging import merge
from exporters.source.networks import empty_module, load_module, torch_component
from runtimes.adapters.lora_inputs import own_file
from runtimes.backends.session import Arrays, Session
from runtimes.bundle.details import SourceDetails
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.errors import BundleError, DeployError, UnavailableError

SOURCE_FORMAT = "safetensors"


class TorchSession(Session):
    """A component before export: PyTorch on the CPU, float32, inference mode; equal feeds give equal bits.

    The ranges of the axes are not enforced: they are a promise of the bundle that is built, not of the source.

    Args:
        bundle: a bundle whose component has the format "safetensors".
        name: of the component; also says which half of a VAE is meant.

    Raises:
        BundleError: the bundle has no such component, or it is not in the source format.
        InputError: weights and config.json do not fit.
        UnavailableError: not enough memory.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        component = bundle.component(name)
        super().__init__(name, _unbounded(component))
        details = component.details
        if component.format != SOURCE_FORMAT or not isinstance(details, SourceDetails):
            raise BundleError(f"{component.format!r} is not a format that PyTorch runs", where=f"{bundle.path}: {name}",
                              fix="give the source model, a diffusers folder")
        folder = bundle.file(component.file).parent
        try:
            network = load_module(folder, details.library, component.class_name, check=False)  # the pass `load` did
            if details.lora:  # an input of the graphs; here it is merged
                merge(network, bundle.manifest.pipeline.adapter(name), bundle.file(own_file(name)), 1.0)
            self._module: Any = torch_component(bundle.manifest.pipeline.role(name), network, component.gives)
        except (MemoryError, RuntimeError) as error:
            raise _translated(error, name) from error

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        tensors = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in self.component.inputs]
        try:
            with torch.inference_mode():
                outputs = self._module(*tensors)
        except Exception as error:  # whatever the layers of a config that fits its weights raise when they meet
            raise _translated(error, self.name) from error
        pairs = zip(self.component.outputs, outputs, strict=True)
        return {spec.name: output.contiguous().numpy().copy() for spec, output in pairs}

    def _close(self) -> None:
        alive = weakref.ref(self._module)
        del self._module
        if alive() is not None:  # in a reference cycle; the next network needs its memory now
            gc.collect()


def reference_sessions(bundle: Bundle, *, capacity: int | None = None) -> dict[str, Session]:
    """Sessions of every component of a source bundle, loaded when first run.

    Args:
        bundle: all of its components have the format "safetensors".
        capacity: how many stay loaded at once, the least recently run being freed; all of them by default.
    """
    components = {name: _unbounded(component) for name, component in bundle.manifest.components.items()}
    limit = len(components) if capacity is None else capacity
    return SessionPool(components, lambda name: TorchSession(bundle, name), limit).sessions


class SizeTrial:
    """Which sizes the source's networks can run at all, found by running them without weights on PyTorch's device meta.

    A group norm refuses a single value in a group, for instance: a feature map of 1x1 with one channel a group and one
    row (torch.nn.functional.group_norm). Such sizes have no reference to be compared with.

    Args:
        bundle: the source bundle; components that are not in the source format are taken to run at any size.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._modules: dict[str, Any] = {}

    def possible(self, name: str, sizes: Mapping[str, int]) -> bool:
        """Whether a component runs at these sizes; True where the device meta cannot tell.

        Only networks of images or latents are tried; others are taken to run at any size.

        Args:
            name: of the component.
            sizes: axis -> size, of every axis.
        """
        component = self._bundle.manifest.components.get(name)
        if component is None or component.format != SOURCE_FORMAT or spatial_spec(component) is None:
            return True
        if name not in self._modules:
            self._modules[name] = self._empty(name, component)
            usual = {axis: a.range.opt for axis, a in component.axes.items()}
            if self._modules[name] is not None and not self._runs(name, component, usual):
                self._modules[name] = None  # an operator that has no form on meta, which says nothing about sizes
        return self._modules[name] is None or self._runs(name, component, sizes)

    def _empty(self, name: str, component: Component) -> Any:
        try:
            network, _ = empty_module(self._bundle.file(component.file).parent,
                                      component.details_as(SourceDetails).library, component.class_name)
            role = self._bundle.manifest.pipeline.role(name)
            return torch_component(role, network.to("meta"), component.gives).requires_grad_(False)
        except (KeyError, NotImplementedError, DeployError):
            return None  # loading it says what is wrong

    def _runs(self, name: str, component: Component, sizes: Mapping[str, int]) -> bool:
        if any(d not in sizes for spec in component.inputs for d in spec.shape if isinstance(d, str)):
            return True
        feeds = [torch.empty(spec.resolve(sizes), dtype=getattr(torch, spec.dtype), device="meta")
                 for spec in component.inputs]
        try:
            with torch.inference_mode():
                self._modules[name](*feeds)
        except (RuntimeError, ValueError, IndexError):
            return False
        return True


def _unbounded(component: Component) -> Component:
    return replace(component, axes={})


def _translated(error: BaseException, name: str) -> Exception:
    """Our error for one of PyTorch's: out of memory, else a shape that the network itself refuses."""
    text = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or "alloc" in text:
        return UnavailableError("not enough memory for the PyTorch reference", where=name,
                                fix="verify at smaller shapes, or on a machine with more memory")
    return BundleError(f"PyTorch cannot run it: {text}", where=name)
