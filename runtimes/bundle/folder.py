"""`Bundle`, a folder with its manifest: opening checks every file, committing is one rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.bundle.manifest import MANIFEST_FILE, Component, FileRecord, Manifest, dumps, parse, safe_path
from runtimes.errors import BundleError, DeployError, InputError, UnavailableError
from runtimes.system.checked_files import ABOVE_BYTES, remember, state_of, was_checked


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. Nothing in it is written after the commit."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, check_hashes: bool = True, trust_notes: bool = False) -> Bundle:
        """Open a bundle and check that every file is the one that was built.

        Args:
            path: folder with manifest.json.
            check_hashes: compare contents by sha256; otherwise only presence and size.
            trust_notes: do not read large files again that were compared before and not written to since.

        Raises:
            BundleError: not a bundle, another schema, or a file that is missing, changed or outside.
        """
        folder = Path(path)
        manifest_file = folder / MANIFEST_FILE
        if not folder.is_dir():
            raise BundleError("no such folder", where=str(folder), fix="give the folder that `build` wrote")
        if not manifest_file.is_file():
            raise BundleError("not a bundle: it holds no manifest.json", where=str(folder),
                              fix="give the folder that `build` wrote")
        try:
            text = manifest_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BundleError("not UTF-8 text", where=str(manifest_file)) from error
        bundle = cls(folder, parse(text, str(manifest_file)))
        records = bundle.manifest.all_files()
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
            for _ in pool.map(lambda name: bundle._check_file(name, records[name], check_hashes, trust_notes), records):
                pass
        return bundle

    def file(self, name: str) -> Path:
        """Absolute path of a file of the bundle; symbolic links may not lead out of it.

        In the cache of the Hugging Face Hub a bundle is a folder of links to the blobs of its own repository.

        Raises:
            BundleError: the path leaves the bundle.
        """
        path, folder = self.path / safe_path(name), self.path.resolve()
        target = path.resolve()
        if not target.is_relative_to(folder) and target.parent != _hub_blobs(folder):
            raise BundleError(f"{name} is a link out of the bundle", where=str(self.path))
        return path

    def component(self, name: str) -> Component:
        """The component of that name.

        Raises:
            BundleError: the bundle has none.
        """
        if name not in self.manifest.components:
            raise BundleError(f"the bundle has no {name}", where=str(self.path),
                              fix=f"it has {', '.join(sorted(self.manifest.components))}")
        return self.manifest.components[name]

    def _check_file(self, name: str, record: FileRecord, check_hash: bool, trust_notes: bool) -> None:
        path = self.file(name)
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != record.bytes:
            problem = f"has {path.stat().st_size} bytes, the manifest says {record.bytes}"
        elif check_hash and not _has_contents(path, record, trust_notes):
            problem = "was changed since the bundle was built (sha256 differs)"
        else:
            return
        raise BundleError(f"{name} {problem}", where=str(self.path), fix="copy the bundle again or rebuild it")


def _hub_blobs(folder: Path) -> Path | None:
    """Where the files of a snapshot in the hub's cache lie: REPOSITORY/blobs for REPOSITORY/snapshots/REVISION/..."""
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    return snapshots.parent / "blobs" if snapshots and snapshots.parent.name.startswith("models--") else None


def sha256_of(path: Path) -> str:
    """Content hash of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _has_contents(path: Path, record: FileRecord, trust_notes: bool) -> bool:
    if not trust_notes or record.bytes <= ABOVE_BYTES:
        return sha256_of(path) == record.sha256
    state = state_of(path)
    if was_checked(state, record.sha256):
        return True
    if sha256_of(path) != record.sha256:
        return False
    remember(state, record.sha256)
    return True


def record_of(path: Path) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(path.stat().st_size, sha256_of(path))


def records_below(folder: Path, root: Path, known: Mapping[Path, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Records of every file below `folder`, keyed by path relative to `root`, sorted.

    Args:
        folder: looked through with its subfolders.
        root: what the keys are relative to.
        known: files with their records; a hard link to one of them is not read again.
    """
    records = {_identity(path): record for path, record in (known or {}).items()}
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): records.get(_identity(p)) or record_of(p) for p in files}


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode, which hard links share."""
    status = path.stat()
    return status.st_dev, status.st_ino


def link_or_copy(source: Path, destination: Path) -> None:
    """Hard-link a file; across file systems, or where links are not allowed, copy it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), destination)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            raise
        shutil.copyfile(source, destination)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file of a bundle."""
    (folder / MANIFEST_FILE).write_text(dumps(manifest), encoding="utf-8")


def check_output(path: Path) -> None:
    """Refuse to replace anything that is not a bundle.

    Raises:
        InputError: the path exists and is neither empty nor a bundle, or lies below a file.
    """
    _check_parent(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError("the output exists and is not a folder", where=str(path), fix="choose another -o")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST_FILE).is_file():
        raise InputError("the output exists and is not a bundle; it is left as it was", where=str(path),
                         fix="choose another -o or remove it yourself")


def check_file(file: Path | None, option: str = "") -> None:
    """Refuse a file to write, before any work, where it cannot be one.

    Args:
        file: to be written or replaced; None is not asked for.
        option: that names it.

    Raises:
        InputError: it is a folder, or lies below a file.
    """
    if file is None:
        return
    if file.is_dir():
        raise InputError("a file is to be written, and this is a folder", where=f"{option} {file}".strip(),
                         fix="add the name of the file")
    _check_parent(file)


def _check_parent(path: Path) -> None:
    parent = next((folder for folder in path.parents if os.path.lexists(folder)), None)
    if parent is not None and not parent.is_dir():
        raise InputError("it is a file or a broken link, so nothing can be written below it", where=str(parent),
                         fix="choose another folder")


@contextmanager
def committed(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success rename it into place, on failure remove it.

    An existing bundle is moved aside first and restored if the rename fails.

    Raises:
        InputError: the path exists and is not a bundle, or cannot be written.
        UnavailableError: the disk is full.
    """
    check_output(path)
    with translated_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        partial.chmod(0o755)
        try:
            yield partial
            _swap(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary sibling of a file to write; on success rename it into place, on failure remove it.

    Raises:
        InputError: the file is a folder, or its folder cannot be written.
        UnavailableError: the disk is full.
    """
    check_file(file)
    with translated_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            yield partial
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a bundle.

    Raises:
        BundleError: missing, or not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read it: {error}", where=str(file), fix="build the bundle again") from error
    if not isinstance(content, dict):
        raise BundleError("expected a JSON object", where=str(file), fix="build the bundle again")
    return content


def _swap(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old / path.name)
    try:
        partial.rename(path)
    except OSError:
        (old / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def translated_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder, a missing permission or an impossible name into one clear line."""
    try:
        yield
    except DeployError:
        raise
    except OSError as error:
        if _is_full(error):
            raise UnavailableError("the disk is full", where=str(path), fix="free some space and run again; "
                                   "finished passes are kept in the cache") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise InputError(f"cannot write: {error.strerror}", where=str(path), fix="choose another folder") from error
        raise


def _is_full(error: OSError) -> bool:
    """Whether a disk or a quota has no room left; numpy's `tofile` says so in words, without a number."""
    if error.errno is None:
        return str(error).endswith("written") and "requested and" in str(error)
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
