"""Execution contexts of one TensorRT engine: sets shapes, checks bounds, records calls as CUDA graphs."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtimes.backends.tensorrt.cuda_device import CudaDevice
from runtimes.backends.tensorrt.engine_errors import TensorRtErrors
from runtimes.backends.tensorrt.engine_plan import MOST_GRAPHS, BufferPlan, Shape, Shapes, shape_key
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import DTYPES
from runtimes.errors import BundleError, DeployError

Key = tuple[int, tuple[tuple[str, Shape], ...]]


@dataclass
class _Prepared:
    """One context with what is set in it; `graph` replays its last enqueue, so its shapes never change again.

    `memory` counts which block of activation memory it was given.
    """

    context: Any
    profile: int = -1
    memory: int = -1
    shapes: Shapes = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)
    graph: Any = None


class Contexts:
    """Runs an engine at any shapes its profiles hold.

    One context serves whatever comes. Shapes that come a second time get a context of their own, are enqueued in it
    once, and are then recorded: TensorRT defers work to the first enqueue after a change of shapes, and changing a
    context that a graph was captured from is undefined. All contexts share one block of activation memory, as large as
    the largest shapes so far need, because calls follow each other on one stream. Where recording fails, calls are
    enqueued as before, and `not_recorded` says why.

    Attributes:
        not_recorded: why calls are no longer recorded; empty while they are.
    """

    def __init__(self, component: Component, device: CudaDevice, errors: TensorRtErrors, plan: BufferPlan,
                 make: Callable[[], Any], *, most_memory: int = 0, not_recorded: str = "") -> None:
        """Make the first context.

        Args:
            component: its inputs and outputs.
            device: where everything runs.
            errors: of the runtime.
            plan: where inputs and outputs lie, allocated here.
            make: creates a context.
            most_memory: bytes of activation memory that a context needs at most; 0 where it brings its own.
            not_recorded: a reason not to record calls at all.

        Raises:
            OutOfMemoryError: the GPU has too little memory for the context, or for inputs and outputs.
        """
        self.not_recorded = not_recorded
        self._component, self._device, self._errors, self._plan = component, device, errors, plan
        self._make, self._most_memory = make, most_memory
        self._scratch, self._scratch_bytes, self._blocks = 0, 0, 0
        self._base = device.allocate(plan.total_bytes)
        self._general = self._new()
        self._recorded: OrderedDict[Key, _Prepared] = OrderedDict()
        self._seen: set[Key] = set()

    def run(self, profile: int, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Run once and wait for the results.

        Args:
            profile: index of the optimization profile that holds the shapes.
            feeds: inputs by name, with shape and dtype as their TensorSpecs say.

        Returns:
            outputs by name, fresh arrays.

        Raises:
            OutOfMemoryError: this many rows of this size need more memory than the GPU has.
            BundleError: the engine would write more than the manifest says.
            DeployError: TensorRT or CUDA failed.
        """
        shapes = {spec.name: feeds[spec.name].shape for spec in self._component.inputs}
        key = shape_key(profile, shapes)
        prepared = self._recorded.get(key) or self._prepare(key, profile, shapes)
        for spec in self._component.inputs:
            self._device.upload(self.address(spec.name), np.ascontiguousarray(feeds[spec.name]))
        if prepared.graph is not None:
            self._recorded.move_to_end(key)
            self._device.launch(prepared.graph)
        else:
            self._errors.require(prepared.context.execute_async_v3(self._device.stream), "running")
        results = {}
        for spec in self._component.outputs:
            results[spec.name] = np.empty(prepared.outputs[spec.name], DTYPES[spec.dtype])
            self._device.download(results[spec.name], self.address(spec.name))
        self._device.synchronize()
        if prepared.graph is None and prepared is not self._general:
            self._record(key, prepared)
        self._seen.add(key)
        return results

    def address(self, name: str) -> int:
        """Of an input or output."""
        return self._base + self._plan.offsets[name]

    def close(self) -> None:
        """Give up graphs, then the contexts that they were captured from; memory is the device's to free."""
        self._drop_recorded()
        self._general.context = None

    def _new(self) -> _Prepared:
        prepared = _Prepared(self._errors.require(self._make(), "creating an execution context"))
        for spec in (*self._component.inputs, *self._component.outputs):
            self._errors.require(prepared.context.set_tensor_address(spec.name, self.address(spec.name)), spec.name)
        return prepared

    def _prepare(self, key: Key, profile: int, shapes: Shapes) -> _Prepared:
        """The context for shapes that no graph replays: one of their own from the second time on."""
        if key in self._seen and not self.not_recorded:
            try:
                own = self._new()
                self._set(own, profile, shapes)
                return own
            except DeployError as error:  # memory for one more context, most likely
                self._give_up_recording(error)
        self._set(self._general, profile, shapes)
        return self._general

    def _set(self, prepared: _Prepared, profile: int, shapes: Shapes) -> None:
        """Set profile and shapes where they changed: each change makes TensorRT plan its memory again.

        What was set is forgotten if anything fails, so that the next call sets all of it again.
        """
        if (profile, shapes, self._blocks) == (prepared.profile, prepared.shapes, prepared.memory):
            return
        before, prepared.shapes = prepared.shapes, {}
        if profile != prepared.profile:
            prepared.profile, before = -1, {}
            try:
                prepared.context.set_optimization_profile_async(profile, self._device.stream)
            except RuntimeError as error:
                raise self._errors.explained(f"profile {profile}", error) from error
            self._device.synchronize()
            prepared.profile = profile
        if before != shapes:
            for name, shape in shapes.items():
                if before.get(name) != shape:
                    self._errors.require(prepared.context.set_input_shape(name, shape), f"{name} {shape}")
            if missing := prepared.context.infer_shapes():
                raise self._errors.explained(f"shapes of {', '.join(missing)}")
            prepared.outputs = self._checked_outputs(prepared.context)
        self._provide_memory(prepared)
        prepared.shapes = dict(shapes)

    def _checked_outputs(self, context: Any) -> dict[str, Shape]:
        """Shapes of the outputs, none larger than the memory that it will be written to.

        Raises:
            BundleError: the manifest does not describe this engine.
        """
        outputs = {}
        for spec in self._component.outputs:
            shape = tuple(int(n) for n in context.get_tensor_shape(spec.name))
            size = math.prod(shape) * np.dtype(DTYPES[spec.dtype]).itemsize
            reserved = self._plan.reserved(spec.name)
            if min(shape, default=0) < 0 or max(size, context.get_max_output_size(spec.name)) > reserved:
                raise BundleError(f"{spec.name} would have shape {shape}, more than the manifest's axes allow",
                                  where="engine", fix="build the bundle again")
            outputs[spec.name] = shape
        return outputs

    def _provide_memory(self, prepared: _Prepared) -> None:
        """Activation memory for the shapes that are set; growing it costs the graphs, which hold its address."""
        if self._most_memory:
            needed = int(prepared.context.update_device_memory_size_for_shapes()) or self._most_memory  # 0: it failed
            if needed > self._scratch_bytes:
                self._grow(needed)
            prepared.context.set_device_memory(self._scratch, self._scratch_bytes)
        prepared.memory = self._blocks

    def _grow(self, size: int) -> None:
        self._drop_recorded()
        self._blocks += 1
        if self._scratch:
            self._device.free(self._scratch)
        self._scratch, self._scratch_bytes = 0, 0
        self._scratch = self._device.allocate(size)
        self._scratch_bytes = size

    def _record(self, key: Key, prepared: _Prepared) -> None:
        """Capture a context whose shapes have been enqueued once; a failure leaves the call's results alone."""
        self._device.begin_capture()
        try:
            self._errors.require(prepared.context.execute_async_v3(self._device.stream), "recording a CUDA graph")
        except DeployError as error:
            self._device.abandon_capture()
            self._give_up_recording(error)
            return
        try:
            prepared.graph = self._device.end_capture()
        except DeployError as error:
            self._give_up_recording(error)
            return
        self._recorded[key] = prepared
        if len(self._recorded) > MOST_GRAPHS:
            self._device.release(self._recorded.popitem(last=False)[1].graph)

    def _give_up_recording(self, error: DeployError) -> None:
        self.not_recorded = str(error)
        self._seen.clear()

    def _drop_recorded(self) -> None:
        while self._recorded:
            self._device.release(self._recorded.popitem()[1].graph)
