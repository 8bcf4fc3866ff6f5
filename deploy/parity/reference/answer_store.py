"""Stores arrays on disk by content key, so that the reference runs once per source model and settings."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle.folder import replacing
from runtimes.bundle.manifest import digest_of
from runtimes.system.cache_store import use

Arrays = dict[str, np.ndarray[Any, Any]]


class Store:
    """`<root>/parity/<sha256 of what the arrays depend on>.npz`; safe for several processes, entries appear by rename.

    Every array is stored as it is, whatever its shape and dtype: network inputs and outputs, latents, pixels.

    Args:
        root: cache folder, or None to keep everything in memory for as long as the store lives.
    """

    def __init__(self, root: Path | None) -> None:
        self._folder = None if root is None else root / "parity"
        self._memory: dict[str, Arrays] = {}

    def get(self, key: Any, compute: Callable[[], Mapping[str, np.ndarray[Any, Any]]]) -> Arrays:
        """The arrays stored under `key`, computed and stored if there are none or the file is damaged.

        Args:
            key: any JSON value that the arrays depend on, and on nothing else.
            compute: makes them.

        Raises:
            UnavailableError: the disk is full.
            InputError: the folder cannot be written.
        """
        found = self.find(key)
        if found is None:
            found = dict(compute())
            self.put(key, found)
        return found

    def find(self, key: Any) -> Arrays | None:
        """The arrays stored under `key`; a damaged file counts as none and is replaced by the next `put`."""
        if self._folder is None:
            return self._memory.get(digest_of(key))
        file = self._file(self._folder, key)
        use(file)
        try:
            with file.open("rb") as stream:
                archive = np.load(stream, allow_pickle=False)
                return {name: archive[name] for name in archive.files}  # zip checks the CRC of each
        except (OSError, ValueError, EOFError, AttributeError, KeyError, zipfile.BadZipFile):
            return None

    def put(self, key: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Store arrays under `key`."""
        if self._folder is None:
            self._memory[digest_of(key)] = dict(arrays)
            return
        file = self._file(self._folder, key)
        with replacing(file) as partial, partial.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)

    @staticmethod
    def _file(folder: Path, key: Any) -> Path:
        return folder / f"{digest_of(key)}.npz"
