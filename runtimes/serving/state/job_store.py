"""Jobs and their images on disk: what was accepted survives `kill -9`. One store a folder, SQLite beside image files.

The order of writes is the contract. A job's id is returned after the commit that holds its request. An image is
written, fsynced and renamed to its content's hash before the commit that calls its job completed. A job has one end:
every change of status names the statuses it may come from. The database runs in WAL mode with `synchronous=FULL`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import InputError, UnavailableError
from runtimes.serving.state.state_folder import connected, owned, sync_folder

QUEUED, RUNNING = "queued", "running"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
OPEN, ENDED = (QUEUED, RUNNING), (COMPLETED, FAILED, CANCELLED)
RESERVE_BYTES = 64_000_000  # accepting stops before the disk is full, so that what was accepted can still be finished


class FullError(UnavailableError):
    """The disk has no room for another job; nothing that was accepted is lost."""


class IdempotencyError(InputError):
    """An idempotency key came again with another request."""


@dataclass(frozen=True)
class StoredImage:
    """One image of a job.

    Attributes:
        sha256: of the file's bytes, which names it.
        bytes: size of the file.
        kind: "png", "jpeg" or "webp".
    """

    sha256: str
    bytes: int
    kind: str


@dataclass(frozen=True)
class StoredJob:
    """A job as the store has it.

    Attributes:
        id: unguessable.
        status: "queued", "running", "completed", "failed" or "cancelled".
        model: name under which the bundle is served.
        owner: whose key it came with.
        request: everything that decides the images, seeds included: running it again gives the same ones.
        priority: higher ones run first.
        created, ended, deadline: seconds since the epoch.
        attempts: how often an engine started it.
        reason: why it failed or was cancelled.
        result: what was measured of it.
        images: once it is completed.
    """

    id: str
    status: str
    model: str
    owner: str
    request: Mapping[str, Any]
    priority: int
    created: float
    deadline: float | None
    ended: float | None
    attempts: int
    reason: str
    result: Mapping[str, Any]
    images: tuple[StoredImage, ...]


class JobStore:
    """The state of one installation. Safe to share between threads; a second process is refused the folder."""

    def __init__(self, folder: Path, *, reserve_bytes: int = RESERVE_BYTES, clock: Callable[[], float] = time.time,
                 checkpoint: Callable[[str], None] = lambda name: None) -> None:
        """Open or make a store; jobs that were running when their engine died are queued again.

        Args:
            folder: holds jobs.sqlite3 and images/; made if it is absent.
            reserve_bytes: accepting stops when the disk has less than this free.
            clock: seconds since the epoch.
            checkpoint: called between the writes of a change, with a name for the point: tests kill the process there.

        Raises:
            InputError: the folder belongs to a newer version.
            UnavailableError: another process has it open, or it cannot be written.
        """
        self.folder, self._images = folder, folder / "images"
        self._reserve, self._clock, self._checkpoint = reserve_bytes, clock, checkpoint
        self._lock = threading.RLock()
        with ExitStack() as opened:
            opened.enter_context(owned(folder, self._images))
            self._database = opened.enter_context(closing(connected(folder)))
            with self._change() as database:
                _put_back(database)
            for partial in self._images.glob("*.partial"):
                partial.unlink(missing_ok=True)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Give the folder back."""
        with self._lock:
            self._opened.close()

    def __enter__(self) -> JobStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accept(self, request: Mapping[str, Any], *, model: str, owner: str = "", priority: int = 0,
               deadline: float | None = None, idempotency_key: str | None = None) -> StoredJob:
        """Take a job. When this returns, the job survives the end of the process.

        Args:
            request: JSON-able, with its seeds resolved.
            model: name of the bundle.
            owner: whose key it came with; idempotency keys are each owner's own.
            priority: higher ones run first.
            deadline: seconds since the epoch after which it is not started any more.
            idempotency_key: a second job under the same key is the first one.

        Raises:
            FullError: the disk is full.
            IdempotencyError: the key came with another request before.
        """
        if shutil.disk_usage(self.folder).free < self._reserve:
            raise FullError("the disk is full", where=str(self.folder), fix="free space, or lower --keep-bytes")
        text = json.dumps(request, sort_keys=True, ensure_ascii=False, allow_nan=False)
        with self._change() as database:
            known = database.execute("SELECT id, request, model FROM jobs WHERE owner=? AND idempotency=?",
                                     (owner, idempotency_key)).fetchone()
            if known is not None:
                if (known["request"], known["model"]) != (text, model):
                    raise IdempotencyError("this key was used for another request", where="Idempotency-Key",
                                           fix="use a new key for a new request")
                return self._read(known["id"])
            identity = uuid.uuid4().hex
            self._checkpoint("before the job's commit")
            database.execute("INSERT INTO jobs (id, status, model, owner, request, priority, deadline, created, "
                             "idempotency) VALUES (?,?,?,?,?,?,?,?,?)",
                             (identity, QUEUED, model, owner, text, priority, deadline, self._clock(), idempotency_key))
        self._checkpoint("after the job's commit")
        return self.job(identity)

    def claim(self, engine: str, models: Sequence[str], most: int, *, lease_seconds: float = 60.0) -> list[StoredJob]:
        """The next jobs for an engine, now running: by priority, then by age.

        A job whose deadline has passed is failed instead; one whose lease ran out, since its engine died, is taken.

        Args:
            engine: its name.
            models: bundles that it serves.
            most: how many at most.
            lease_seconds: until another engine may take them, if `renew` does not say otherwise.
        """
        now, marks = self._clock(), ",".join("?" * len(models))
        with self._change() as database:
            _put_back(database, "AND lease<?", now)
            database.execute("UPDATE jobs SET status=?, ended=?, reason=? WHERE status=? AND deadline<?",
                             (FAILED, now, "its deadline passed before it was started", QUEUED, now))
            rows = database.execute(f"SELECT id FROM jobs WHERE status=? AND model IN ({marks}) "
                                    "ORDER BY priority DESC, number LIMIT ?", (QUEUED, *models, most)).fetchall()
            for row in rows:
                database.execute("UPDATE jobs SET status=?, engine=?, lease=?, attempts=attempts+1 WHERE id=?",
                                 (RUNNING, engine, now + lease_seconds, row["id"]))
        self._checkpoint("after the claim")
        return [self.job(row["id"]) for row in rows]

    def renew(self, engine: str, *, lease_seconds: float = 60.0) -> None:
        """The engine lives: its running jobs stay its own."""
        with self._change() as database:
            database.execute("UPDATE jobs SET lease=? WHERE status=? AND engine=?",
                             (self._clock() + lease_seconds, RUNNING, engine))

    def complete(self, identity: str, images: Sequence[tuple[bytes, str]], result: Mapping[str, Any]) -> bool:
        """Store the images of a running job, then call it completed.

        Args:
            identity: of the job.
            images: the bytes of each file, and its kind ("png", "jpeg", "webp").
            result: what was measured.

        Returns:
            whether this ended it; False for one that was cancelled or ended meanwhile, whose images are dropped.

        Raises:
            FullError: an image did not fit on the disk; the job is still running and may be put back with `requeue`.
        """
        with self._lock:  # `retain` must not remove files that no job has until the commit
            stored = [self._write(content, kind) for content, kind in images]
            self._checkpoint("before the completion's commit")
            with self._change() as database:
                if not self._end(database, identity, COMPLETED, (RUNNING,), "", result):
                    return False
                for place, image in enumerate(stored):
                    database.execute("INSERT INTO images VALUES (?,?,?,?,?)",
                                     (image.sha256, identity, place, image.bytes, image.kind))
        self._checkpoint("after the completion's commit")
        return True

    def fail(self, identity: str, reason: str) -> bool:
        """End a job that cannot be done; whether this ended it."""
        with self._change() as database:
            return self._end(database, identity, FAILED, OPEN, reason, {})

    def cancel(self, identity: str, reason: str = "cancelled by the client") -> bool:
        """End a job that nobody wants any more; whether this ended it."""
        with self._change() as database:
            return self._end(database, identity, CANCELLED, OPEN, reason, {})

    def requeue(self, identity: str) -> None:
        """Put a running job back: its engine drains, or found no room for its images."""
        with self._change() as database:
            _put_back(database, "AND id=?", identity)

    def job(self, identity: str) -> StoredJob:
        """A job by its id.

        Raises:
            InputError: there is none.
        """
        with self._lock:
            return self._read(identity)

    def position(self, identity: str) -> int:
        """How many queued jobs come before a queued one; 0 for any other."""
        with self._lock:
            row = self._database.execute("SELECT * FROM jobs WHERE id=? AND status=?", (identity, QUEUED)).fetchone()
            if row is None:
                return 0
            before = self._database.execute(
                "SELECT COUNT(*) FROM jobs WHERE status=? AND (priority>? OR (priority=? AND number<?))",
                (QUEUED, row["priority"], row["priority"], row["number"])).fetchone()
        return int(before[0])

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        with self._lock:
            found = dict(self._database.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in (*OPEN, *ENDED)}

    def image_file(self, sha256: str) -> Path | None:
        """The file of an image that a job has, by its content's hash."""
        with self._lock:
            row = self._database.execute("SELECT kind FROM images WHERE sha256=? LIMIT 1", (sha256,)).fetchone()
        return None if row is None else self._file(sha256, row["kind"])

    def retain(self, *, seconds: float, image_bytes: int) -> int:
        """Forget ended jobs, the oldest first, until none is older and their images take no more than this.

        Returns:
            how many jobs were forgotten.
        """
        with self._change() as database:
            old = [row["id"] for row in database.execute(
                "SELECT id FROM jobs WHERE ended<? ORDER BY ended", (self._clock() - seconds,))]
            for identity in old:
                database.execute("DELETE FROM jobs WHERE id=?", (identity,))
            forgotten = len(old) + self._drop_beyond(database, image_bytes)
        self._checkpoint("before unused images are removed")
        self._remove_unused()
        return forgotten

    def _drop_beyond(self, database: sqlite3.Connection, image_bytes: int) -> int:
        """Forget the oldest jobs with images until the distinct images fit; how many."""
        count, total = 0, "SELECT TOTAL(bytes) FROM (SELECT MAX(bytes) AS bytes FROM images GROUP BY sha256)"
        while database.execute(total).fetchone()[0] > image_bytes:
            oldest = database.execute("SELECT id FROM jobs WHERE status=? AND id IN (SELECT job FROM images) "
                                      "ORDER BY ended LIMIT 1", (COMPLETED,)).fetchone()
            database.execute("DELETE FROM jobs WHERE id=?", (oldest["id"],))
            count += 1
        return count

    def _remove_unused(self) -> None:
        """Files that no job has: of forgotten jobs, and of completions that were never committed."""
        with self._lock:
            used = {row["sha256"] for row in self._database.execute("SELECT DISTINCT sha256 FROM images")}
            for file in self._images.iterdir():
                if file.suffix != ".partial" and file.stem not in used:
                    file.unlink(missing_ok=True)

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it on disk at the end, or none.

        Raises:
            FullError: the disk is full.
        """
        with self._lock:
            database = self._database
            try:
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
            except BaseException as error:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
                    raise FullError("the disk is full", where=str(self.folder), fix="free space") from error
                raise

    def _end(self, database: sqlite3.Connection, identity: str, status: str, of: Sequence[str], reason: str,
             result: Mapping[str, Any]) -> bool:
        marks = ",".join("?" * len(of))
        changed = database.execute(
            f"UPDATE jobs SET status=?, ended=?, reason=?, result=?, engine='', lease=NULL WHERE id=? "
            f"AND status IN ({marks})", (status, self._clock(), reason, json.dumps(result), identity, *of))
        return changed.rowcount == 1

    def _write(self, content: bytes, kind: str) -> StoredImage:
        """An image under its hash, on disk when this returns: the file and its name."""
        sha256 = hashlib.sha256(content).hexdigest()
        file = self._file(sha256, kind)
        if not file.is_file():
            partial = file.with_name(f"{uuid.uuid4().hex}.partial")
            try:
                with partial.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    self._checkpoint("before the image's fsync")
                    os.fsync(stream.fileno())
                self._checkpoint("before the image's rename")
                partial.rename(file)
                sync_folder(self._images)
            except OSError as error:
                partial.unlink(missing_ok=True)
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise FullError("an image does not fit on the disk", where=str(self._images),
                                    fix="free space") from error
                raise
        self._checkpoint("after the image's rename")
        return StoredImage(sha256, len(content), kind)

    def _file(self, sha256: str, kind: str) -> Path:
        return self._images / f"{sha256}.{kind}"

    def _read(self, identity: str) -> StoredJob:
        row = self._database.execute("SELECT * FROM jobs WHERE id=?", (identity,)).fetchone()
        if row is None:
            raise InputError("there is no such job", where=identity)
        images = self._database.execute("SELECT * FROM images WHERE job=? ORDER BY place", (identity,)).fetchall()
        return StoredJob(
            row["id"], row["status"], row["model"], row["owner"], json.loads(row["request"]), row["priority"],
            row["created"], row["deadline"], row["ended"], row["attempts"], row["reason"], json.loads(row["result"]),
            tuple(StoredImage(i["sha256"], i["bytes"], i["kind"]) for i in images))


def _put_back(database: sqlite3.Connection, condition: str = "", *values: object) -> None:
    """Queue running jobs again: all of them, or those of a further condition."""
    database.execute(f"UPDATE jobs SET status=?, engine='', lease=NULL WHERE status=? {condition}",
                     (QUEUED, RUNNING, *values))
