"""Bounds everything that is cached: the least recently used entry leaves first, never one that a live build uses.

An entry is a file or a folder below `cache_home()/<kind>`, and was last used at its modification time, which `use`
renews. A live process is one that holds the lock of a scratch folder: whatever was used since it made the folder is
held. Entries leave under the lock of their folder, by which `use` learns whether they are still there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runtimes.system.byte_sizes import parse_bytes
from runtimes.system.cache_root import cache_home

if sys.platform != "win32":
    import fcntl

LIMIT_VARIABLE = "LDM_DEPLOY_CACHE_LIMIT"
MOST_BYTES = 50 * 1000**3  # of the default limit: that of a disk with plenty of room
WORK, LOCK = "work", ".lock"
ABANDONED_SECONDS = 24 * 3600  # a scratch folder without a lock: of a release that had none
# kind -> what it is, and where its entries lie in its folder.
KINDS = {
    "passes": ("finished components of passes", "*"),
    "facts": ("measured facts, such as figures of parity", "*"),
    "parity": ("answers of the PyTorch reference", "*"),
    "calibration": ("recorded calls for calibration", "*"),
    "recover": ("half-done recoveries of pruned networks", "*"),
    "views": ("models with another autoencoder, links only", "*"),
    "onnxruntime": ("graphs and engines as ONNX Runtime left them", "*/*"),
    "openvino": ("models that OpenVINO compiled", "*"),
    "tensorrt": ("timing caches of the TensorRT builder", "*"),
    "tensorrt-rtx": ("kernels that TensorRT for RTX compiled", "*"),
    "inductor": ("kernels that torch.compile made for bench", "*"),
    "memory": ("memory models of bundles", "*"),
    "checked": ("notes of files that were hashed", "*"),
}

Inode = tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """One file or folder of the cache, which can be made again.

    Attributes:
        kind: key of `KINDS`.
        used_ns: when it was last used, nanoseconds since 1970.
        sizes: bytes of each of its files by device and inode; a file that several entries link to is stored once.
    """

    kind: str
    path: Path
    used_ns: int
    sizes: dict[Inode, int]


@dataclass(frozen=True)
class Trimmed:
    """What `trim` did: bytes before and after, and entries that left."""

    before_bytes: int
    after_bytes: int
    removed: int


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new folder below `parent`, removed at the end. While it is there, nothing removes it or what its process uses.

    Raises:
        OSError: it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with _new_lock(parent) as lock:
        folder = lock.with_suffix("")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def use(entry: Path) -> bool:
    """Renew an entry's time and say whether it is there. The live process that asked holds it from now on."""
    with _guarded(entry.parent, exclusive=False):
        try:
            os.utime(entry)
        except PermissionError:  # a cache that others fill
            return entry.exists()
        except OSError:
            return False
        return True


def sweep(parent: Path) -> None:
    """Remove the scratch folders of processes that are gone."""
    for lock in parent.glob("*.lock"):
        with suppress(OSError), lock.open("a") as stream:
            if lock_file(stream, exclusive=True, wait=False):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
    for folder in parent.glob("*"):
        with suppress(OSError):
            if folder.suffix != ".lock" and not folder.with_name(f"{folder.name}.lock").exists() and (
                    time.time() - folder.stat().st_mtime > ABANDONED_SECONDS):
                shutil.rmtree(folder, ignore_errors=True)


def entries(root: Path) -> list[Entry]:
    """Everything that may leave the cache, whatever its kind."""
    found = []
    for kind, (_, pattern) in KINDS.items():
        for path in (root / kind).glob(pattern):
            if path.name != LOCK:
                with suppress(OSError):  # it left meanwhile
                    found.append(Entry(kind, path, path.lstat().st_mtime_ns, _sizes(path)))
    return found


def total_bytes(found: list[Entry]) -> int:
    """Bytes that entries take together."""
    return sum({inode: size for entry in found for inode, size in entry.sizes.items()}.values())


def asked_limit_bytes() -> int | None:
    """`$LDM_DEPLOY_CACHE_LIMIT`, if it is set.

    Raises:
        InputError: it holds no size.
    """
    text = os.environ.get(LIMIT_VARIABLE)
    return parse_bytes(text, LIMIT_VARIABLE, least=0) if text else None


def limit_bytes(root: Path) -> int:
    """The bound of the cache: `$LDM_DEPLOY_CACHE_LIMIT`, else half of the disk's free space, at most 50 GB.

    Raises:
        InputError: the variable holds no size.
    """
    if (asked := asked_limit_bytes()) is not None:
        return asked
    place = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free + total_bytes(entries(root))
    return min(MOST_BYTES, free // 2)


def trim(root: Path, limit: int) -> Trimmed:
    """Remove the least recently used entries until the others take at most so many bytes.

    What a live process has used stays, and may keep the cache above the limit; so does what cannot be removed.
    """
    sweep(root / WORK)
    found = sorted(entries(root), key=lambda entry: entry.used_ns)
    owners: dict[Inode, int] = {}
    for entry in found:
        for inode in entry.sizes:
            owners[inode] = owners.get(inode, 0) + 1
    before = total = total_bytes(found)
    if total <= limit:
        return Trimmed(before, total, 0)
    held_since, removed = _held_since(root / WORK), 0
    with scratch(root / WORK) as bin_:
        for entry in found:
            if total <= limit or entry.used_ns >= held_since:
                break
            if not _taken_away(entry, bin_ / str(removed)):
                continue
            removed += 1
            for inode, size in entry.sizes.items():
                owners[inode] -= 1
                total -= 0 if owners[inode] else size
    return Trimmed(before, total, removed)


def summary(root: Path) -> dict[str, Any]:
    """What `cache show --json` prints: entries, bytes and last use of each kind, in all, and the limit."""
    found = entries(root)
    kinds = {}
    for kind, (about, _) in KINDS.items():
        of = [entry for entry in found if entry.kind == kind]
        if of:
            kinds[kind] = {"about": about, "entries": len(of), "bytes": total_bytes(of),
                           "used_seconds_ago": round(max(time.time() - max(e.used_ns for e in of) / 1e9, 0.0))}
    return {"root": str(root), "limit_bytes": limit_bytes(root), "bytes": total_bytes(found), "kinds": kinds,
            "live": _held_since(root / WORK) < float("inf")}


def keep_within_limit() -> None:
    """`trim` to the limit; where the cache cannot be trimmed, do nothing."""
    with suppress(OSError):
        root = cache_home()
        trim(root, limit_bytes(root))


def _sizes(path: Path) -> dict[Inode, int]:
    if path.is_symlink() or not path.is_dir():
        return {_inode(path.lstat()): path.lstat().st_size}
    statuses = [file.lstat() for file in path.rglob("*") if file.is_symlink() or not file.is_dir()]
    return {_inode(status): status.st_size for status in statuses}


def _inode(status: os.stat_result) -> Inode:
    return status.st_dev, status.st_ino


def _taken_away(entry: Entry, destination: Path) -> bool:
    """Move an entry that nobody has used since it was listed; whoever asks for it next finds none."""
    with _guarded(entry.path.parent, exclusive=True):
        try:
            if entry.path.lstat().st_mtime_ns != entry.used_ns:
                return False
            entry.path.rename(destination)
        except OSError:
            return False
        return True


def _held_since(parent: Path) -> float:
    """When the oldest live process made its scratch folder, in nanoseconds since 1970; infinity if there is none."""
    began = []
    for lock in parent.glob("*.lock"):
        with suppress(OSError), lock.open("a") as stream:
            if not lock_file(stream, exclusive=True, wait=False):
                began.append(lock.stat().st_mtime_ns)
    return min(began, default=float("inf"))


@contextmanager
def _new_lock(parent: Path) -> Iterator[Path]:
    """A new `<name>.lock`, held. One that was swept between its making and its locking is made again."""
    while True:
        lock = parent / f"{secrets.token_hex(8)}.lock"
        with lock.open("x") as stream:
            lock_file(stream, exclusive=True, wait=True)
            if lock.exists():
                yield lock
                return


@contextmanager
def _guarded(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Within, no entry of the folder leaves (shared), or is used (exclusive)."""
    try:
        stream = (folder / LOCK).open("a")
    except OSError:  # nothing can be written there, so nothing leaves; or there is no such folder
        yield
        return
    with stream:
        lock_file(stream, exclusive=exclusive, wait=True)
        yield


def lock_file(stream: IO[str], *, exclusive: bool, wait: bool) -> bool:
    """Lock an open file until it is closed; False if another process holds it, or the system has no such locks."""
    if sys.platform == "win32":
        return wait
    try:
        fcntl.flock(stream, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
