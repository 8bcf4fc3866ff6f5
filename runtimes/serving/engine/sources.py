"""Where the engine gets its pipelines from: what it asks of a pipeline and of whoever loads them; and given ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from runtimes.inputs.request import Request
    from runtimes.pipeline.job import Job


class Steppable(Protocol):
    """What the engine asks of a pipeline: `runtimes.Pipeline` is one."""

    @property
    def judges(self) -> bool:
        """Whether `flagged` can be asked."""

    def prepare(self, requests: list[Request]) -> list[Job]:
        """Requests as jobs."""

    def advance(self, jobs: list[Job]) -> None:
        """One step of each."""

    def finish(self, jobs: list[Job]) -> list[Any]:
        """Their images."""

    def preview(self, latents: Any) -> Any:
        """Latents as small images: (B, C, H/f, W/f) float32 to (B, H/f, W/f, 3) uint8."""

    def flagged(self, images: Sequence[Any]) -> list[bool]:
        """Which Pillow images the safety checker flags."""


@dataclass(eq=False)
class Loaded:
    """A bundle that can run.

    Attributes:
        bytes: of memory that it takes.
        users: requests that run on it.
        used: when it was asked for last, of `time.monotonic`.
    """

    name: str
    pipeline: Steppable
    digest: str = ""
    bytes: int = 0
    users: int = 0
    used: float = field(default_factory=monotonic)


class Offered(Protocol):
    """A bundle that can be loaded: `catalog.ServedModel` is one."""

    @property
    def folder(self) -> Path:
        """Of the bundle."""

    @property
    def digest(self) -> str:
        """That the bundle in the folder must have."""

    @property
    def bytes(self) -> int:
        """Of its components' files."""


class Source(Protocol):
    """Where the engine gets its pipelines from."""

    on_change: Callable[[], None]

    def names(self) -> tuple[str, ...]:
        """That requests may give."""

    def find(self, name: str) -> Loaded | None:
        """A bundle to run a request on, or None as long as it is not loaded."""

    def blocked(self, name: str) -> bool:
        """Whether a bundle can be loaded only once others run nothing."""

    def hold(self, loaded: Loaded) -> None:
        """A request runs on it."""

    def release(self, loaded: Loaded) -> None:
        """A request runs on it no more."""

    def loaded(self) -> list[Loaded]:
        """All, the one used last at the end."""

    def tidy(self) -> None:
        """Unload what was replaced and runs nothing."""


class GivenModels:
    """Pipelines of the caller, which stay loaded."""

    def __init__(self, pipelines: Mapping[str, Steppable]) -> None:
        """Take them as they are."""
        self.on_change: Callable[[], None] = lambda: None
        self._loaded = {name: Loaded(name, pipeline) for name, pipeline in pipelines.items()}

    def names(self) -> tuple[str, ...]:
        """That requests may give."""
        return tuple(self._loaded)

    def find(self, name: str) -> Loaded | None:
        """The pipeline of that name."""
        return self._loaded[name]

    def blocked(self, name: str) -> bool:
        """Never."""
        return False

    def hold(self, loaded: Loaded) -> None:
        """A request runs on it."""
        loaded.users += 1

    def release(self, loaded: Loaded) -> None:
        """A request runs on it no more."""
        loaded.users -= 1

    def loaded(self) -> list[Loaded]:
        """All."""
        return list(self._loaded.values())

    def tidy(self) -> None:
        """Nothing is to be done."""
