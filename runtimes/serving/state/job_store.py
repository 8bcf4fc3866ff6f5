"""Jobs and their images on disk: what was accepted survives `kill -9`. One store a folder, SQLite beside image files.

The order of writes is the contract. A job's id is returned after the commit that holds its request, and that comes
after its files. An image is written, fsynced and renamed to its content's hash before the commit that calls its job
completed. A job has one end: every change of status names the statuses it may come from. The database runs in WAL mode
with `synchronous=FULL`.
"""

from __future__ import annotations

import secrets
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from runtimes.errors import UnavailableError
from runtimes.serving.state import job_rows as rows
from runtimes.serving.state.content_folder import ContentFolder
from runtimes.serving.state.order import sha256 as hash_of
from runtimes.serving.state.progress_board import ProgressBoard
from runtimes.serving.state.state_folder import connected, owned
from runtimes.serving.state.store import (
    CANCELLED,
    COMPLETED,
    ENDED,
    FAILED,
    FORGOTTEN,
    LEASE_SECONDS,
    MOST_ATTEMPTS,
    OPEN,
    QUEUED,
    RUNNING,
    Changes,
    FullError,
    JobProgress,
    StoredImage,
    StoredJob,
)

RESERVE_BYTES = 64_000_000  # accepting stops before the disk is full, so that what was accepted can still be finished


class JobStore:
    """The state of one installation: the `Store` of its host. A second process is refused the folder."""

    def __init__(self, folder: Path, *, reserve_bytes: int = RESERVE_BYTES, most_attempts: int = MOST_ATTEMPTS,
                 clock: Callable[[], float] = time.time, checkpoint: Callable[[str], None] = lambda name: None) -> None:
        """Open or make a store; jobs that were running when their engine died are queued again.

        Args:
            folder: holds jobs.sqlite3, images/ and inputs/; made if it is absent.
            reserve_bytes: accepting stops when the disk has less than this free.
            most_attempts: a job whose engine died so often while it ran fails: it may be what kills them.
            clock: seconds since the epoch.
            checkpoint: called between the writes of a change, with a name for the point: tests kill the process there.

        Raises:
            InputError: the folder belongs to a newer version.
            UnavailableError: another process has it open, or it cannot be written.
        """
        self.folder, self._reserve, self._most_attempts = folder, reserve_bytes, most_attempts
        self._clock, self._checkpoint = clock, checkpoint
        self._images = ContentFolder(folder / "images", "image", checkpoint)
        self._inputs = ContentFolder(folder / "inputs", "input", checkpoint)
        self._lock, self._board = threading.RLock(), ProgressBoard()
        self._in_use: Counter[tuple[str, str]] = Counter()  # files that a change under way has or will have
        with ExitStack() as opened:
            opened.enter_context(owned(folder, self._images.folder, self._inputs.folder))
            self._database = opened.enter_context(closing(connected(folder)))
            with self._change() as database:
                rows.put_back(database, most_attempts, clock())
            self._remove_strays()
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Give the folder back."""
        with self._lock:
            self._opened.close()

    def __enter__(self) -> JobStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- clients -------------------------------------------------------------------------------------------------

    def accept(self, request: Mapping[str, Any], *, model: str, owner: str = "", priority: int = 0,
               deadline: float | None = None, idempotency_key: str | None = None, fingerprint: str | None = None,
               files: Mapping[str, bytes] | None = None) -> StoredJob:
        """Take a job; see `Store`."""
        named = rows.as_text([model, request]) if fingerprint is None else fingerprint
        with self._lock:  # whoever asks again is answered by a full disk too
            if (before := rows.known(self._database, owner, idempotency_key, named)) is not None:
                return rows.read(self._database, before)
        self._check_room()
        job = StoredJob(secrets.token_hex(16), QUEUED, model, owner, dict(request), priority, self._clock(), deadline,
                        None, 0, "", {}, ())
        with self._writing([(content, rows.INPUT) for content in (files or {}).values()]) as written:
            self._checkpoint("before the job's commit")
            with self._change() as database:
                if (before := rows.known(database, owner, idempotency_key, named)) is not None:
                    return rows.read(database, before)
                rows.insert(database, job, [(file.sha256, file.bytes) for file in written], (idempotency_key, named))
            self._checkpoint("after the job's commit")
        self._board.note(job.id, QUEUED)
        return job

    def accepted(self, owner: str, idempotency_key: str, fingerprint: str) -> StoredJob | None:
        """The job that this key was accepted as; see `Store`."""
        with self._lock:
            before = rows.known(self._database, owner, idempotency_key, fingerprint)
            return None if before is None else rows.read(self._database, before)

    def record(self, request: Mapping[str, Any], images: Sequence[tuple[bytes, str]], result: Mapping[str, Any], *,
               model: str, owner: str = "") -> StoredJob:
        """Store what was generated without a job; see `Store`."""
        self._check_room()
        now = self._clock()
        with self._writing(images) as written:
            job = StoredJob(secrets.token_hex(16), COMPLETED, model, owner, dict(request), 0, now, None, now, 0, "",
                            dict(result), tuple(written))
            with self._change() as database:
                rows.insert(database, job)
        self._board.note(job.id, COMPLETED)
        return job

    def cancel(self, identity: str, reason: str = "cancelled by the client", *, owner: str | None = None) -> bool:
        """End a job that nobody wants any more; see `Store`."""
        with self._change() as database:
            rows.read(database, identity, owner)
            ended = rows.end(database, (identity, None), CANCELLED, self._clock(), reason=reason)
        return self._noted(identity, CANCELLED, ended)

    def forget(self, identity: str, *, owner: str | None = None) -> bool:
        """Remove an ended job; see `Store`."""
        with self._change() as database:
            if rows.read(database, identity, owner).status not in ENDED:
                return False
            unused = rows.forget(database, [identity])
        self._remove(unused)
        return self._noted(identity, FORGOTTEN, True)

    def job(self, identity: str, *, owner: str | None = None) -> StoredJob:
        """A job by its id; see `Store`."""
        with self._lock:
            return rows.read(self._database, identity, owner)

    def jobs(self, owner: str, *, most: int = 50, before: str | None = None,
             statuses: Sequence[str] = ()) -> list[StoredJob]:
        """An owner's jobs, the newest first; see `Store`."""
        with self._lock:
            return rows.listed(self._database, owner, most, before, statuses)

    def image(self, sha256: str) -> tuple[bytes, str] | None:
        """An image that a job has; see `Store`."""
        with self._lock:
            kind = rows.kind_of(self._database, sha256)
        if kind is None:
            return None
        try:
            return self._images.read(sha256, kind), kind
        except UnavailableError:
            with self._lock:  # forgotten meanwhile, or damaged
                if rows.kind_of(self._database, sha256) is None:
                    return None
            raise

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        with self._lock:
            found = rows.counts(self._database)
        return {status: found.get(status, 0) for status in (*OPEN, *ENDED)}

    def progress(self, identity: str, *, owner: str | None = None) -> JobProgress:
        """How far a job is; see `Store`."""
        with self._lock:
            status = rows.read(self._database, identity, owner).status
            if status == QUEUED:
                return JobProgress(QUEUED, self._board.waiting() + rows.position(self._database, identity))
        if status == RUNNING:
            return self._board.get(identity) or JobProgress(QUEUED)
        return JobProgress(status)

    def changes(self, after: int, seconds: float) -> Changes:
        """Wait until something has changed; see `Store`."""
        return self._board.changes(after, seconds)

    # ---- engines -------------------------------------------------------------------------------------------------

    def claim(self, engine: str, models: Sequence[str] | None, most: int, *, idle: bool = True,
              lease_seconds: float = LEASE_SECONDS) -> list[StoredJob]:
        """The next jobs for an engine, now running; see `Store`."""
        now = self._clock()
        with self._change() as database:
            ended = rows.expire(database, self._most_attempts, now)
            claimed = rows.next_ids(database, models, most, self._most_attempts - 1, idle=idle)
            for identity in claimed:
                database.execute("UPDATE jobs SET status=?, engine=?, lease=?, attempts=attempts+1 WHERE id=?",
                                 (RUNNING, engine, now + lease_seconds, identity))
            jobs = [rows.read(database, identity) for identity in claimed]
        self._checkpoint("after the claim")
        for identity in ended:
            self._board.note(identity, FAILED)
        for job in jobs:
            self._board.note(job.id, RUNNING)
        return jobs

    def renew(self, engine: str, identities: Sequence[str], *, lease_seconds: float = LEASE_SECONDS) -> None:
        """The engine lives: these running jobs stay its own."""
        until = self._clock() + lease_seconds
        with self._change() as database:
            for identity in identities:
                database.execute("UPDATE jobs SET lease=? WHERE id=? AND status=? AND engine=?",
                                 (until, identity, RUNNING, engine))

    def complete(self, identity: str, images: Sequence[tuple[bytes, str]], result: Mapping[str, Any]) -> bool:
        """Store the images of a running job, then call it completed; see `Store`."""
        with self._writing(images) as written:
            self._checkpoint("before the completion's commit")
            with self._change() as database:
                ended = rows.end(database, (identity, None), COMPLETED, self._clock(), result=rows.as_text(result),
                                 of=(RUNNING,))
                if ended:
                    rows.insert_images(database, identity, written)
            self._checkpoint("after the completion's commit")
        return self._noted(identity, COMPLETED, ended)

    def fail(self, identity: str, reason: str, *, attempt: int | None = None) -> bool:
        """End a job that cannot be done; see `Store`."""
        with self._change() as database:
            ended = rows.end(database, (identity, attempt), FAILED, self._clock(), reason=reason)
        return self._noted(identity, FAILED, ended)

    def requeue(self, identity: str, reason: str = "", *, attempt: int | None = None, counts: bool = False) -> None:
        """Put a running job back; see `Store`."""
        with self._change() as database:
            changed = database.execute(
                "UPDATE jobs SET reason=?, attempts=attempts-? WHERE id=? AND status=? AND (? IS NULL OR attempts=?)",
                (rows.clean(reason), 0 if counts else 1, identity, RUNNING, attempt, attempt)).rowcount
            if changed:
                rows.put_back(database, self._most_attempts, self._clock(), "AND id=?", identity)
                status = rows.read(database, identity).status
        if changed:
            self._board.note(identity, status)

    def files(self, identity: str) -> dict[str, bytes]:
        """What came with a job, by sha256; see `Store`."""
        with self._lock:
            rows.read(self._database, identity)
            had = rows.contents(self._database, identity)
        return {sha256: self._inputs.read(sha256, suffix) for sha256, suffix in had if suffix == rows.INPUT}

    def report(self, identity: str, progress: JobProgress) -> None:
        """Say how far a running job is; see `Store`."""
        with self._lock:  # not after the note of its end
            if rows.status_of(self._database, identity) == RUNNING:
                self._board.put(identity, progress)

    # ---- retention -----------------------------------------------------------------------------------------------

    def retain(self, *, seconds: float, image_bytes: int) -> int:
        """Forget ended jobs; see `Store`."""
        with self._change() as database:
            gone = rows.too_old(database, self._clock() - seconds)
            unused = rows.forget(database, gone)
            more = rows.too_many(database, image_bytes)
            unused |= rows.forget(database, more)
        self._checkpoint("before unused images are removed")
        self._remove(unused)
        for identity in (*gone, *more):
            self._board.note(identity, FORGOTTEN)
        return len(gone) + len(more)

    def _remove_strays(self) -> None:
        """Files that no job has: of changes that a dying process did not finish."""
        used = {f"{sha256}.{suffix}" for sha256, suffix in rows.all_used(self._database)}
        for folder in (self._images, self._inputs):
            folder.remove(folder.names() - used)

    def _remove(self, unused: Collection[tuple[str, str]]) -> None:
        """Remove files that no job has, unless one came to have them meanwhile or is about to."""
        with self._lock:
            for sha256, suffix in unused:
                if not self._in_use[sha256, suffix] and not rows.is_used(self._database, sha256, suffix):
                    folder = self._inputs if suffix == rows.INPUT else self._images
                    folder.remove([f"{sha256}.{suffix}"])

    # ---- both ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self, contents: Collection[tuple[bytes, str]]) -> Iterator[list[StoredImage]]:
        """Files on disk, which nobody removes until the change that names them was made, or was not.

        Raises:
            FullError: one does not fit.
        """
        named = [(hash_of(content), content, suffix) for content, suffix in contents]
        keys = {(sha256, suffix) for sha256, _, suffix in named}
        with self._lock:
            self._in_use.update(keys)
        try:
            for sha256, content, suffix in named:
                (self._inputs if suffix == rows.INPUT else self._images).write(sha256, content, suffix)
            yield [StoredImage(sha256, len(content), suffix) for sha256, content, suffix in named]
        finally:
            with self._lock:
                self._in_use.subtract(keys)
                for key in keys:
                    if not self._in_use[key]:
                        del self._in_use[key]
            self._remove(keys)

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
                self._checkpoint("before a commit")
                database.execute("COMMIT")
            except BaseException as error:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode in rows.NO_ROOM:
                    raise FullError("the disk is full", where=str(self.folder), fix="free space") from error
                raise
            self._checkpoint("after a commit")

    def _check_room(self) -> None:
        if shutil.disk_usage(self.folder).free < self._reserve:
            raise FullError("the disk is full", where=str(self.folder), fix="free space, or lower --keep-bytes")

    def _noted(self, identity: str, status: str, changed: bool) -> bool:
        if changed:
            self._board.note(identity, status)
        return changed
