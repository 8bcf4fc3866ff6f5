"""Computes the reference's answers once, and stores them: recorded component calls and generated images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from deploy.parity.comparison_options import ParityOptions
from deploy.parity.reference.answer_store import Store
from deploy.parity.reference.call_recorder import Recorder
from deploy.parity.reference.planned_shapes import Possible, Run, always
from deploy.parity.reference.sample_feeds import Feeds, Sample, cast, fit, pack, unpack
from deploy.parity.reference.trajectories import Trajectory, TrajectoryRequest, assemble_pipeline, generate
from runtimes.backends.session import Session
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component, to_json
from runtimes.bundle.roles import Role
from runtimes.codec.autoencoder import to_uint8
from runtimes.codec.pixels import to_pil
from runtimes.codec.safety_checker import CLIP_INPUT, SAFETY_CHECKER
from runtimes.errors import InputError
from runtimes.pipeline.bundle_sessions import BundleSessions
from runtimes.pipeline.loading import load_preprocessing

VERSION = 2  # raised whenever the same key would mean other arrays

Opener = Callable[[Bundle, int], Mapping[str, Session]]


class Reference:
    """The source model's answers.

    Networks are loaded by PyTorch only for what the store lacks, and freed before the next when they are large.

    Args:
        bundle: the source bundle, in the format "safetensors".
        cache: folder that answers are stored in across processes; None holds them in memory.
        keep_bytes: see `ParityOptions`.
        opener: gives the sessions of the bundle of which at most so many are loaded at once;
            `deploy.parity.reference.torch_sessions.reference_sessions` by default.
    """

    def __init__(
        self, bundle: Bundle, *, cache: Path | None = None, keep_bytes: int = 1 << 30, opener: Opener | None = None
    ) -> None:
        self.bundle = bundle
        self._store, self._opener = Store(cache), opener or _torch_sessions
        components = bundle.manifest.components
        self._capacity = len(components) if total_bytes(components) <= keep_bytes else 1

    @property
    def identity(self) -> dict[str, Any]:
        """Everything about the source that decides its answers, as JSON: weights, tokenizer, scheduler, facts."""
        manifest = self.bundle.manifest
        return {
            "version": VERSION,
            # By distribution: naming a version must not import torch.
            "libraries": {name: metadata.version(name) for name in ("numpy", "torch", "diffusers", "transformers")},
            "components": {n: [c.class_name, c.sha256] for n, c in sorted(manifest.components.items())},
            "files": {name: record.sha256 for name, record in sorted(manifest.files.items())},
            "facts": to_json(manifest.pipeline),
        }

    def samples(
        self, name: str, component: Component, runs: Sequence[Run], options: ParityOptions
    ) -> list[list[Sample]]:
        """Calls of one component with real inputs, for every run's shape.

        Args:
            name: of the component.
            component: the candidate's record: its dtypes and fixed sizes are fitted to.
            runs: from `planned_shapes.plan_runs`.
            options: prompts, guidance and steps of the recording.

        Raises:
            NoRealInputsError: text to image never calls this component.
            UnavailableError: the reference does not fit into memory.
        """
        recording = self._recording_key(runs, options)
        key = {**recording, "name": name, "inputs": to_json(component.inputs)}
        answers = self._store.get({**key, "kind": "samples"}, lambda: self._answer(name, component, runs, options))
        samples = []
        for index in range(len(runs)):
            part = {k.split(":", 1)[1]: v for k, v in answers.items() if k.startswith(f"{index}:")}
            pairs = zip(unpack(part, "feeds"), unpack(part, "outputs"), strict=True)
            samples.append([Sample(feeds, outputs) for feeds, outputs in pairs])
        return samples

    def possible(self) -> Possible:
        """Tells, for a component and sizes, whether the source runs there at all; see `torch_sessions.SizeTrial`."""
        if self._opener is not _torch_sessions:
            return always
        from deploy.parity.reference.torch_sessions import SizeTrial

        return SizeTrial(self.bundle).possible

    def generate(self, request: TrajectoryRequest) -> Trajectory:
        """The reference's latents and images for a request."""
        key = {"source": self.identity, "kind": "trajectory", "request": asdict(request)}
        return Trajectory.from_arrays(self._store.get(key, lambda: self._generate(request).to_arrays()))

    def _generate(self, request: TrajectoryRequest) -> Trajectory:
        sessions = self._opener(self.bundle, self._capacity)
        try:
            return generate(assemble_pipeline(sessions, self.bundle), request)
        finally:
            _close_all(sessions)

    def _recording_key(self, runs: Sequence[Run], options: ParityOptions) -> dict[str, Any]:
        settings = [options.prompts, options.recording_steps, options.guidance_scale, options.seed]
        return {"source": self.identity, "runs": to_json(runs), "settings": to_json(settings)}

    def _answer(self, name: str, component: Component, runs: Sequence[Run], options: ParityOptions) -> Feeds:
        """Fitted inputs and the reference's outputs, flat: `<run>:<call>/feeds|outputs/<tensor>`."""
        if name not in self.bundle.manifest.components:
            raise InputError(f"the source model has no {name}", where=str(self.bundle.path))
        flat: Feeds = {}
        fitted = [
            fit(component, self._recorded(name, index, runs, options), run.sizes[name])
            for index, run in enumerate(runs)
        ]
        sessions = self._opener(self.bundle, 1)
        try:
            for index, calls in enumerate(fitted):
                outputs = [sessions[name].run(cast(feeds, sessions[name].component)) for feeds in calls]
                flat |= {f"{index}:{k}": v for k, v in {**pack(calls, "feeds"), **pack(outputs, "outputs")}.items()}
        finally:
            _close_all(sessions)
        return flat

    def _recorded(self, name: str, index: int, runs: Sequence[Run], options: ParityOptions) -> list[Feeds]:
        key = {**self._recording_key(runs, options), "kind": "recording", "run": index}
        if self._store.find({**key, "name": name}) is None:
            self._record(runs, options)
        return unpack(self._store.find({**key, "name": name}) or {}, "feeds")

    def _record(self, runs: Sequence[Run], options: ParityOptions) -> None:
        """Run the pipeline at every planned size and store what each component was fed."""
        sessions = self._opener(self.bundle, self._capacity)
        recorders = {name: Recorder(session) for name, session in sessions.items()}
        try:
            for index, run in enumerate(runs):
                pipeline = assemble_pipeline(recorders, self.bundle)  # a new one: a cache would hide repeated prompts
                interval = 2 if self.bundle.manifest.pipeline.denoiser.shallow else 1  # so that both entries are called
                request = _recording_request(run, options)
                request = replace(request, cache_interval=interval, steps=max(request.steps, interval))
                generated = generate(pipeline, request)
                key = {**self._recording_key(runs, options), "kind": "recording", "run": index}
                for name in recorders:
                    self._store.put({**key, "name": name}, pack(self._fed(name, recorders, generated.images), "feeds"))
                for recorder in recorders.values():
                    recorder.clear()
        finally:
            _close_all(sessions)

    def _fed(self, name: str, recorders: Mapping[str, Recorder], images: np.ndarray[Any, Any]) -> list[Feeds]:
        """A component's calls; of those that text to image never calls, what they would be fed with its images."""
        roles = self.bundle.manifest.pipeline
        if name == SAFETY_CHECKER:
            return [{CLIP_INPUT: load_preprocessing(self.bundle)(to_pil(to_uint8(images)))}]
        decoder = recorders.get(roles.codec.decoder.component)
        if roles.role(name) is Role.IMAGE_ENCODER and not recorders[name].calls and decoder is not None:
            return _images(recorders[name].component, decoder)
        return recorders[name].calls


def total_bytes(components: Mapping[str, Component]) -> int:
    """Bytes of all networks; files that two components share count once."""
    return sum({name: r.bytes for c in components.values() for name, r in c.files.items()}.values())


def _recording_request(run: Run, options: ParityOptions) -> TrajectoryRequest:
    prompts = tuple(options.prompts[i % len(options.prompts)] for i in range(run.images))
    guidance = options.guidance_scale if run.guided else 1.0
    return TrajectoryRequest(prompts, options.schedulers[0], 1 if run.once else options.recording_steps, guidance,
                       options.seed, run.height, run.width, images_at_once=run.images)


def _images(encoder: Component, decoder: Recorder) -> list[Feeds]:
    """The decoder's images as the encoder's input, since text to image never encodes an image."""
    source, target = decoder.component.outputs[0].name, encoder.inputs[0].name
    return [{target: np.clip(result[source], -1, 1)} for result in decoder.results]


def _torch_sessions(bundle: Bundle, capacity: int) -> Mapping[str, Session]:
    from deploy.parity.reference.torch_sessions import reference_sessions

    return reference_sessions(bundle, capacity=capacity)


def _close_all(sessions: Mapping[str, Session]) -> None:
    if isinstance(sessions, BundleSessions):
        sessions.close()  # asking for each would load those that nobody has called
        return
    for session in sessions.values():
        session.close()

