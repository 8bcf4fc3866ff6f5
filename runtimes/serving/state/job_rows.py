"""The statements of a job store, each within a transaction that its caller began."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Collection, Iterator, Sequence

from runtimes.errors import InputError
from runtimes.serving.state.store import (
    FAILED,
    OPEN,
    QUEUED,
    RUNNING,
    IdempotencyError,
    NoJobError,
    StoredImage,
    StoredJob,
)

AGING_SECONDS = 600.0  # of waiting count as one priority: no job waits for ever
NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)  # a quota's EDQUOT is the second
INPUT = "input"  # suffix of clients' files


def insert(database: sqlite3.Connection, job: StoredJob, files: Collection[tuple[str, int]] = (),
           idempotency: tuple[str | None, str | None] = (None, None)) -> None:
    """A new job.

    Args:
        database: in a transaction.
        job: as it is stored.
        files: sha256 and bytes of each.
        idempotency: key and fingerprint.
    """
    key, fingerprint = idempotency
    database.execute(
        "INSERT INTO jobs (id, status, model, owner, request, priority, deadline, created, rank, ended, result, "
        "idempotency, fingerprint) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (job.id, job.status, job.model, job.owner, as_text(job.request), job.priority, job.deadline, job.created,
         job.created - job.priority * AGING_SECONDS, job.ended, as_text(job.result), key, fingerprint))
    for sha256, size in files:
        database.execute("INSERT INTO files VALUES (?,?,?)", (sha256, job.id, size))
    insert_images(database, job.id, job.images)


def insert_images(database: sqlite3.Connection, identity: str, images: Sequence[StoredImage]) -> None:
    """The images of a job, in their order."""
    for place, image in enumerate(images):
        database.execute("INSERT INTO images VALUES (?,?,?,?,?)", (image.sha256, identity, place, image.bytes,
                                                                   image.kind))


def known(database: sqlite3.Connection, owner: str, key: str | None, fingerprint: str) -> str | None:
    """The id of the job that came under an idempotency key; None where there is none.

    Raises:
        IdempotencyError: it came with another request.
    """
    row = database.execute("SELECT id, fingerprint FROM jobs WHERE owner=? AND idempotency=?", (owner, key)).fetchone()
    if row is None:
        return None
    if row["fingerprint"] != fingerprint:
        raise IdempotencyError("this key was used for another request", where="Idempotency-Key",
                               fix="use a new key for a new request")
    return str(row["id"])


def read(database: sqlite3.Connection, identity: str, owner: str | None = None) -> StoredJob:
    """A job by its id.

    Raises:
        NoJobError: there is none, or it is not of this owner.
    """
    row = database.execute("SELECT * FROM jobs WHERE id=?", (identity,)).fetchone()
    if row is None or (owner is not None and row["owner"] != owner):
        raise NoJobError("there is no such job", where="id")
    images = database.execute("SELECT * FROM images WHERE job=? ORDER BY place", (identity,)).fetchall()
    return StoredJob(
        row["id"], row["status"], row["model"], row["owner"], json.loads(row["request"]), row["priority"],
        row["created"], row["deadline"], row["ended"], row["attempts"], row["reason"], json.loads(row["result"]),
        tuple(StoredImage(i["sha256"], i["bytes"], i["kind"]) for i in images))


def listed(database: sqlite3.Connection, owner: str, most: int, before: str | None,
           statuses: Sequence[str]) -> list[StoredJob]:
    """An owner's jobs, the newest first."""
    condition, values = "owner=?", [owner]
    if before is not None:
        condition += " AND number < (SELECT number FROM jobs WHERE id=? AND owner=?)"
        values += [before, owner]
    if statuses:
        condition += f" AND status IN ({_marks(statuses)})"
        values += statuses
    rows = database.execute(f"SELECT id FROM jobs WHERE {condition} ORDER BY number DESC LIMIT ?", (*values, most))
    return [read(database, row["id"]) for row in rows.fetchall()]


def next_ids(database: sqlite3.Connection, models: Sequence[str] | None, most: int, suspect: int, *,
             idle: bool) -> list[str]:
    """Queued jobs whose turn is next.

    Args:
        database: in a transaction.
        models: of these bundles; None for all.
        most: how many at most.
        suspect: a job of so many attempts is alone, or where the engine is not `idle`, nobody's yet.
        idle: whether the engine runs nothing.
    """
    condition = "" if models is None else f"AND model IN ({_marks(models)})"
    found = database.execute(f"SELECT id, attempts FROM jobs WHERE status=? {condition} ORDER BY rank, number LIMIT ?",
                             (QUEUED, *(models or ()), most)).fetchall()
    if found and found[0]["attempts"] >= suspect:
        return [found[0]["id"]] if idle else []
    return [row["id"] for row in itertools.takewhile(lambda row: row["attempts"] < suspect, found)]


def position(database: sqlite3.Connection, identity: str) -> int:
    """How many queued jobs come before a queued one; 0 for any other."""
    row = database.execute("SELECT rank, number FROM jobs WHERE id=? AND status=?", (identity, QUEUED)).fetchone()
    if row is None:
        return 0
    before = database.execute("SELECT COUNT(*) FROM jobs WHERE status=? AND (rank, number) < (?, ?)",
                              (QUEUED, row["rank"], row["number"])).fetchone()
    return int(before[0])


def status_of(database: sqlite3.Connection, identity: str) -> str | None:
    """A job's status; None where there is no such job."""
    row = database.execute("SELECT status FROM jobs WHERE id=?", (identity,)).fetchone()
    return None if row is None else str(row["status"])


def kind_of(database: sqlite3.Connection, sha256: str) -> str | None:
    """The kind of an image that a job has; None where none has it."""
    row = database.execute("SELECT kind FROM images WHERE sha256=? LIMIT 1", (sha256,)).fetchone()
    return None if row is None else str(row["kind"])


def expire(database: sqlite3.Connection, most_attempts: int, now: float) -> list[str]:
    """Put back what an engine did not renew, and fail what waited beyond its deadline; the ids of those that failed."""
    spent = put_back(database, most_attempts, now, "AND lease<?", now)
    late = [row["id"] for row in database.execute("SELECT id FROM jobs WHERE status=? AND deadline<?", (QUEUED, now))]
    for identity in late:
        end(database, (identity, None), FAILED, now, reason="its deadline passed before it was started", of=(QUEUED,))
    return spent + late


def put_back(database: sqlite3.Connection, most_attempts: int, now: float, condition: str = "",
             *values: object) -> list[str]:
    """Queue running jobs again, all of them or those of a further condition; one without attempts left fails.

    Returns:
        ids of those that failed.
    """
    running = database.execute(f"SELECT id, attempts, reason FROM jobs WHERE status=? {condition}", (RUNNING, *values))
    spent = []
    for row in running.fetchall():
        if row["attempts"] < most_attempts:
            database.execute("UPDATE jobs SET status=?, engine='', lease=NULL WHERE id=?", (QUEUED, row["id"]))
        else:
            died = f"it was started {most_attempts} times, and each time its engine died"
            end(database, (row["id"], None), FAILED, now, reason=row["reason"] or died, of=(RUNNING,))
            spent.append(row["id"])
    return spent


def end(database: sqlite3.Connection, job: tuple[str, int | None], status: str, now: float, *, reason: str = "",
        result: str = "{}", of: Sequence[str] = OPEN) -> bool:
    """Give a job its one end.

    Args:
        database: in a transaction.
        job: its id, and the attempt that it must be in, or None.
        status: one of `ENDED`.
        now: seconds since the epoch.
        reason: of a failure.
        result: JSON.
        of: statuses that it may come from.

    Returns:
        whether it was in one of them.
    """
    identity, attempt = job
    changed = database.execute(
        f"UPDATE jobs SET status=?, ended=?, reason=?, result=?, engine='', lease=NULL WHERE id=? "
        f"AND status IN ({_marks(of)}) AND (? IS NULL OR attempts=?)",
        (status, now, clean(reason), result, identity, *of, attempt, attempt))
    return changed.rowcount == 1


def forget(database: sqlite3.Connection, identities: Sequence[str]) -> set[tuple[str, str]]:
    """Remove jobs; sha256 and suffix of the files that no other job has."""
    had: set[tuple[str, str]] = set()
    for identity in identities:
        had |= contents(database, identity)
        database.execute("DELETE FROM jobs WHERE id=?", (identity,))
    return {(sha256, suffix) for sha256, suffix in had if not is_used(database, sha256, suffix)}


def contents(database: sqlite3.Connection, identity: str) -> set[tuple[str, str]]:
    """Sha256 and suffix of a job's images and files."""
    images = database.execute("SELECT sha256, kind FROM images WHERE job=?", (identity,)).fetchall()
    files = database.execute("SELECT sha256 FROM files WHERE job=?", (identity,)).fetchall()
    return {(row["sha256"], row["kind"]) for row in images} | {(row["sha256"], INPUT) for row in files}


def is_used(database: sqlite3.Connection, sha256: str, suffix: str) -> bool:
    """Whether a job has this file."""
    query = "SELECT 1 FROM files WHERE sha256=?" if suffix == INPUT else "SELECT 1 FROM images WHERE sha256=?"
    return database.execute(f"{query} LIMIT 1", (sha256,)).fetchone() is not None


def all_used(database: sqlite3.Connection) -> set[tuple[str, str]]:
    """Sha256 and suffix of every file that a job has."""
    rows = database.execute(f"SELECT sha256, kind FROM images UNION SELECT sha256, '{INPUT}' FROM files").fetchall()
    return {(row[0], row[1]) for row in rows}


def too_old(database: sqlite3.Connection, before: float) -> list[str]:
    """Jobs that ended before a moment."""
    return [row["id"] for row in database.execute("SELECT id FROM jobs WHERE ended<?", (before,))]


def too_many(database: sqlite3.Connection, most_bytes: int) -> list[str]:
    """The ended jobs that have to go, the oldest first, so that the files of the others take no more than this.

    A file that a later job has too frees nothing.
    """
    last: dict[tuple[str, str], tuple[str, int]] = {}
    order: list[str] = []
    for identity, sha256, suffix, size in _ended_contents(database):
        if not order or order[-1] != identity:
            order.append(identity)
        last[sha256, suffix] = (identity, size)
    freed: dict[str, int] = {}
    for identity, size in last.values():
        freed[identity] = freed.get(identity, 0) + size
    total, gone = sum(freed.values()), []
    for identity in order:
        if total <= most_bytes:
            break
        total -= freed.get(identity, 0)
        gone.append(identity)
    return gone


def _ended_contents(database: sqlite3.Connection) -> Iterator[tuple[str, str, str, int]]:
    """Job, sha256, suffix and bytes of every file of an ended job, by the end."""
    rows = database.execute(
        "SELECT jobs.id, had.sha256, had.suffix, had.bytes FROM jobs JOIN (SELECT job, sha256, kind AS suffix, bytes "
        f"FROM images UNION ALL SELECT job, sha256, '{INPUT}', bytes FROM files) AS had ON had.job=jobs.id "
        "WHERE ended IS NOT NULL ORDER BY ended, number")
    yield from ((row[0], row[1], row[2], row[3]) for row in rows)


def counts(database: sqlite3.Connection) -> dict[str, int]:
    """Number of jobs by status, of those that occur."""
    return dict(database.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status").fetchall())


def as_text(values: object) -> str:
    """JSON, the same for equal values.

    Raises:
        InputError: no JSON, or NaN.
    """
    try:
        return json.dumps(values, sort_keys=True, allow_nan=False)  # ASCII: half of a surrogate pair is no UTF-8
    except (TypeError, ValueError) as error:
        raise InputError(f"it cannot be stored: {error}", where="request") from error


def clean(text: str) -> str:
    """Text that a database takes: without halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _marks(values: Collection[object]) -> str:
    return ",".join("?" * len(values))
