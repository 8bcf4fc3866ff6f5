"""Opens the components of a bundle as sessions, each when it is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from runtimes.adapters.lora_session import LoraSession
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.roles import Roles


def needed(roles: Roles, *, sparing: bool = False) -> tuple[str, ...]:
    """Components loaded with the bundle, so that a device or a graph that is missing shows at once; the encoder waits
    for an image.

    Args:
        roles: of the pipeline.
        sparing: leave out what runs once a prompt or request and is closed after it.
    """
    spared = {entry.component for entry in roles.denoiser.beforehand.values()} if sparing else set()
    return tuple(name for name in roles.generates_with if name not in spared)


def open_session(bundle: Bundle, name: str, options: SessionOptions) -> Session:
    """Load one component of a bundle, with its LoRA where that is an input of its graph.

    Raises:
        BundleError: no runtime runs its format, or its files are damaged.
        InputError: an option that the backend does not take, or a LoRA that does not fit.
        UnavailableError: the runtime or the device is missing on this machine.
    """
    opener = LoraSession if bundle.component(name).details.lora else Session.open
    return opener(bundle, name, options)


class BundleSessions(Mapping[str, Session]):
    """The components of a bundle, each loaded when first asked for, once for all threads."""

    def __init__(self, bundle: Bundle, options: SessionOptions) -> None:
        self._bundle, self._options = bundle, options
        self._loaded: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Session:
        if (loaded := self._loaded.get(name)) is not None:
            return loaded
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = open_session(self._bundle, name, self._options)
            return self._loaded[name]

    def release(self, name: str) -> None:
        """Close one component, after the calls that are running; it is loaded again when it is asked for."""
        with self._lock:
            session = self._loaded.pop(name, None)
        if session is not None:
            session.close()

    def close(self) -> None:
        """Close what is loaded, after the calls that are running; what is asked for later is loaded again."""
        with self._lock:
            while self._loaded:
                self._loaded.popitem()[1].close()

    def __contains__(self, name: object) -> bool:
        return name in self._bundle.manifest.components

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.manifest.components)

    def __len__(self) -> int:
        return len(self._bundle.manifest.components)
