"""Records calibration data, inputs of running pipelines' components, in shards on disk, of which memory holds one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.trajectory.inpainting_masks import paint_mask
from calibration.trajectory.prompts import CALLS_PER_EPISODE, STEPS, STRENGTH, Episode, InpaintingEpisode
from runtimes.backends.session import Arrays, Session, WrappedSession
from runtimes.bundle.folder import replacing, translated_disk_errors
from runtimes.bundle.manifest import digest_of
from runtimes.pipeline.diffusion import Pipeline
from runtimes.system.cache_store import use
from runtimes.system.progress import listener

VERSION = 2  # raised whenever equal keys would give other recordings
Feeds = dict[str, np.ndarray[Any, Any]]
Assemble = Callable[[Mapping[str, Session]], Pipeline]


class _Tap(WrappedSession):
    """Passes calls through and keeps the inputs of those that are wanted."""

    def __init__(self, inner: Session) -> None:
        super().__init__(inner)
        self.recorded: list[Feeds] = []
        self.wanted: frozenset[int] | None = None
        self._count = 0

    def begin(self, wanted: tuple[int, ...] | None) -> None:
        """Count calls from 0 again; None keeps every call."""
        self.wanted, self._count = None if wanted is None else frozenset(wanted), 0

    def _run(self, feeds: Arrays) -> Feeds:
        if self.wanted is None or self._count in self.wanted:
            self.recorded.append({name: array.copy() for name, array in feeds.items()})
        self._count += 1
        return super()._run(feeds)


@dataclass(frozen=True)
class Recording:
    """Recorded inputs on disk.

    Attributes:
        folder: holds shard-NNNN.npz.
        shards: how many.
        identity: sha256 of everything that decides the content; what a quantized component's manifest names.
        timestep: input of the denoiser that says where in the schedule a call is.
    """

    folder: Path
    shards: int
    identity: str
    timestep: str = ""

    def calls(self, component: str) -> Iterator[Feeds]:
        """Recorded calls of one component in the order they were made, one shard in memory at a time.

        Each is input -> array with shape and dtype as the component's TensorSpec says, batch first.
        """
        for number in range(self.shards):
            with np.load(_shard(self.folder, number), allow_pickle=False) as archive:
                yield from _unpack(archive, component)

    def spread(self, component: str, count: int) -> list[Feeds]:
        """At most `count` of `calls`, shapes and dtypes as TensorSpecs say, from every part of the schedule.

        A plain stride would meet the same place in each episode, and so one part of the schedule alone.
        """
        calls = list(self.calls(component))
        if len(calls) <= count:
            return calls
        return [calls[min((i * len(calls)) // count + i % CALLS_PER_EPISODE, len(calls) - 1)] for i in range(count)]


def record(sessions: Mapping[str, Session], assemble: Assemble, episodes: tuple[Episode, ...], root: Path, *,
           source: Any, guidance_scale: float, timestep: str = "", steps: int = STEPS,
           strength: float = STRENGTH) -> Recording:
    """Run the pipeline and keep what its networks are fed; what was recorded before, also by a killed run, is kept.

    The U-Net's calls hold both guidance branches (rows: unconditional, then conditional). Text encoder and decoder are
    recorded at every call; the encoder sees the image that the second trajectory of an episode starts from, and where
    the episodes are for inpainting, the image without what its mask covers, and the grey that text to image starts
    from.

    Args:
        sessions: networks by name; they are wrapped, not changed.
        assemble: makes a pipeline over sessions. Called once an episode: an old one's prompt cache would hide calls.
        episodes: from `plan_episodes`.
        root: folder of all recordings, one folder in it for each identity.
        source: JSON value that identifies the networks, tokenizer and scheduler.
        guidance_scale: of classifier-free guidance.
        timestep: input of the denoiser that is one, for the recording.
        steps, strength: as given to `plan_episodes`.

    Raises:
        UnavailableError: the disk is full.
        DeployError: what the pipeline raises.
    """
    identity = digest_of({"version": VERSION, "source": source, "guidance": guidance_scale, "steps": steps,
                          "strength": strength, "episodes": [asdict(e) for e in episodes]})
    folder = root / identity
    recording = Recording(folder, len(episodes), identity, timestep)
    taps = {name: _Tap(session) for name, session in sessions.items()}
    listener().working("recording what the networks are fed, to calibrate with")
    with translated_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        use(folder)
        for number, episode in enumerate(episodes):
            if not _intact(_shard(folder, number)):
                for tap in taps.values():
                    tap.recorded = []
                _play(taps, assemble, episode, guidance_scale, steps, strength)
                _write(_shard(folder, number), _pack({name: tap.recorded for name, tap in taps.items()}))
            listener().advanced(number + 1, len(episodes), "episodes recorded")
    return recording


def _play(taps: Mapping[str, _Tap], assemble: Assemble, episode: Episode, guidance_scale: float, steps: int,
          strength: float) -> None:
    pipeline = assemble(taps)
    roles = pipeline.roles
    denoiser = roles.denoiser.component
    for name, tap in taps.items():
        tap.begin(episode.keep if name == denoiser else None)
    prompt, second_prompt = (episode.prompt, episode.second_prompt) if roles.encoders else ("", "")
    images = pipeline(prompt, steps=steps, guidance_scale=guidance_scale, seed=episode.seed)
    if not episode.second_keep or roles.codec.encoder.component not in taps:
        return
    taps[denoiser].begin(episode.second_keep)
    how: dict[str, Any] = {"image": images[0], "strength": strength}
    if isinstance(episode, InpaintingEpisode):
        width, height = images[0].size
        how = {"image": images[0], "strength": episode.strength, "mask": paint_mask(
            episode.mask, height, width, episode.painted, episode.seed, roles.codec.factor)}
    pipeline(second_prompt, steps=steps, guidance_scale=guidance_scale, seed=episode.seed + 1, **how)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:04d}.npz"


def _pack(calls: Mapping[str, list[Feeds]]) -> Feeds:
    return {f"{component}/{number}/{name}": array for component, recorded in calls.items()
            for number, feeds in enumerate(recorded) for name, array in feeds.items()}


def _unpack(archive: Mapping[str, Any], component: str) -> Iterator[Feeds]:
    names: dict[int, list[str]] = {}
    for key in archive:
        owner, number, name = key.split("/", 2)
        if owner == component:
            names.setdefault(int(number), []).append(name)
    for index, inputs in sorted(names.items()):
        yield {name: archive[f"{component}/{index}/{name}"] for name in inputs}


def _intact(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _write(file: Path, arrays: Feeds) -> None:
    with replacing(file) as partial, partial.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
