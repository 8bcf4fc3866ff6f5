"""The components of a bundle as sessions, each loaded when it is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from runtimes.backends.session import Session, SessionOptions, open_session
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import PipelineFacts


def needed(facts: PipelineFacts) -> tuple[str, ...]:
    """Components loaded with the bundle, so that a device or a graph that is missing shows at once; the encoder waits
    for an image."""
    return (*facts.text_encoders, "unet", "vae_decoder")


class BundleSessions(Mapping[str, Session]):
    """The components of a bundle, each loaded when first asked for, once for all threads."""

    def __init__(self, bundle: Bundle, options: SessionOptions) -> None:
        self._bundle, self._options = bundle, options
        self._loaded: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Session:
        if name not in self._loaded:
            with self._lock:
                if name not in self._loaded:
                    self._loaded[name] = open_session(self._bundle, name, self._options)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._bundle.manifest.components

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.manifest.components)

    def __len__(self) -> int:
        return len(self._bundle.manifest.components)
