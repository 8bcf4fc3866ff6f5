"""A folder of files that are named by their content's hash: whole and on disk once they are there, written once."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from runtimes.errors import UnavailableError
from runtimes.serving.state.state_folder import sync_folder
from runtimes.serving.state.store import FullError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTIAL = ".partial"


class ContentFolder:
    """Files by sha256 and suffix."""

    def __init__(self, folder: Path, noun: str, checkpoint: Callable[[str], None]) -> None:
        """Take a folder that exists.

        Args:
            folder: holds nothing else.
            noun: what a file is called in errors and checkpoints, as "image".
            checkpoint: called between the writes of a file, with a name for the point.
        """
        self.folder, self._noun, self._checkpoint = folder, noun, checkpoint

    def write(self, sha256: str, content: bytes, suffix: str) -> None:
        """A file on disk when this returns: its bytes and its name.

        Raises:
            FullError: it does not fit on the disk.
        """
        file = self.file(sha256, suffix)
        if not file.is_file() or file.stat().st_size != len(content):
            partial = file.with_name(f"{uuid.uuid4().hex}{PARTIAL}")
            try:
                with partial.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    self._checkpoint(f"before the {self._noun}'s fsync")
                    os.fsync(stream.fileno())
                self._checkpoint(f"before the {self._noun}'s rename")
                partial.rename(file)
            except OSError as error:
                partial.unlink(missing_ok=True)
                if error.errno in NO_ROOM:
                    raise FullError(f"an {self._noun} does not fit on the disk", where=str(self.folder),
                                    fix="free space") from error
                raise
        sync_folder(self.folder)  # also where another thread renamed it just now
        self._checkpoint(f"after the {self._noun}'s rename")

    def read(self, sha256: str, suffix: str) -> bytes:
        """What was written.

        Raises:
            UnavailableError: the file is missing, or its bytes are not those of its name.
        """
        try:
            content = self.file(sha256, suffix).read_bytes()
        except OSError as error:
            raise UnavailableError(f"an {self._noun} cannot be read: {error.strerror}", where=sha256) from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UnavailableError(f"an {self._noun} was changed on the disk", where=sha256)
        return content

    def file(self, sha256: str, suffix: str) -> Path:
        """Where a file is."""
        return self.folder / f"{sha256}.{suffix}"

    def remove(self, names: Collection[str]) -> None:
        """Remove files by sha256 and suffix."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def names(self) -> set[str]:
        """Every file, those that were never finished among them."""
        return {entry.name for entry in os.scandir(self.folder)}
