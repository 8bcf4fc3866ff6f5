"""The folder of a server's state: held by one process, with a database whose commits are on disk when they return."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtimes.errors import InputError, UnavailableError
from runtimes.system.cache_store import lock_file

SCHEMA_VERSION = 1
TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL, model TEXT NOT NULL,
    owner TEXT NOT NULL, request TEXT NOT NULL, priority INTEGER NOT NULL, deadline REAL, created REAL NOT NULL,
    rank REAL NOT NULL, ended REAL, engine TEXT NOT NULL DEFAULT '', lease REAL, attempts INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '', result TEXT NOT NULL DEFAULT '{}', idempotency TEXT, fingerprint TEXT) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS by_idempotency ON jobs (owner, idempotency) WHERE idempotency IS NOT NULL;
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, rank, number);
CREATE INDEX IF NOT EXISTS by_owner ON jobs (owner, number);
CREATE INDEX IF NOT EXISTS by_end ON jobs (ended) WHERE ended IS NOT NULL;
CREATE TABLE IF NOT EXISTS images (
    sha256 TEXT NOT NULL, job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, place INTEGER NOT NULL,
    bytes INTEGER NOT NULL, kind TEXT NOT NULL, PRIMARY KEY (job, place)) STRICT;
CREATE INDEX IF NOT EXISTS by_sha256 ON images (sha256);
CREATE TABLE IF NOT EXISTS files (
    sha256 TEXT NOT NULL, job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, bytes INTEGER NOT NULL,
    PRIMARY KEY (job, sha256)) STRICT;
CREATE INDEX IF NOT EXISTS by_content ON files (sha256);
"""


def sync_folder(folder: Path) -> None:
    """The names in a folder on disk, as `os.fsync` puts a file's bytes there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def owned(folder: Path, *parts: Path) -> Iterator[None]:
    """Make the folder and folders in it, and hold them against every other process.

    Raises:
        UnavailableError: another process holds them, or they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # prompts are nobody else's
        for part in parts:
            part.mkdir(exist_ok=True)
        lock = (folder / "lock").open("a")
        sync_folder(folder)
        with suppress(PermissionError):  # a folder that others made, and that may not be listed
            sync_folder(folder.parent)
    except OSError as error:
        raise UnavailableError(f"it cannot be written: {error.strerror}", where=str(folder)) from error
    with lock:
        if not lock_file(lock, exclusive=True, wait=False):
            raise UnavailableError("another server has it open", where=str(folder),
                                   fix="stop that one, or give this one another --state")
        yield


def connected(folder: Path) -> sqlite3.Connection:
    """The database of a folder, made if it is absent: WAL mode, `synchronous=FULL`.

    Raises:
        InputError: a newer version wrote it.
    """
    database = sqlite3.connect(folder / "jobs.sqlite3", isolation_level=None, check_same_thread=False)
    database.row_factory = sqlite3.Row
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        database.execute(f"PRAGMA {pragma}")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        database.close()
        raise InputError(f"it was written by a newer version (schema {version})", where=str(folder),
                         fix="upgrade ldm-deploy, or give another --state")
    database.executescript(TABLES)
    database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    return database
