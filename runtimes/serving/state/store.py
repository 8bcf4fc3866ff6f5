"""`Store`: what a server asks of its state, of this process or of another; its records, and its errors.

`job_store.JobStore` keeps them on this host's disk; a proxy of one in another process answers the same calls. Every
call may block on a disk or a network: an event loop makes it in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from runtimes.errors import InputError, UnavailableError

QUEUED, RUNNING = "queued", "running"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
OPEN, ENDED = (QUEUED, RUNNING), (COMPLETED, FAILED, CANCELLED)
FORGOTTEN = "forgotten"  # no status: what `Changes` call a job that is there no more
LEASE_SECONDS, MOST_ATTEMPTS = 60.0, 3


class FullError(UnavailableError):
    """The disk has no room for another job; nothing that was accepted is lost."""


class IdempotencyError(InputError):
    """An idempotency key came again with another request."""


class NoJobError(InputError):
    """There is no such job, or it is another owner's."""


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
        attempts: how often an engine started it; the last one's number names the attempt.
        reason: why it failed or was cancelled; of a queued one, why it was put back.
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


@dataclass(frozen=True)
class JobProgress:
    """How far a job is. Not on disk: after a restart it is at its beginning again.

    Attributes:
        status: of the job; "queued" also while an engine has it without having started.
        position: how many come before it while it is queued.
        step, total: finished steps, and all; 0 before the first.
        preview: a small PNG of what its latents showed last, images side by side; None where there is none.
        preview_step: the step that it shows.
    """

    status: str
    position: int = 0
    step: int = 0
    total: int = 0
    preview: bytes | None = None
    preview_step: int = 0


@dataclass(frozen=True)
class Changes:
    """What changed in a store since somebody looked.

    Attributes:
        number: of the last change; the next call's `after`.
        jobs: id to status, "forgotten" where it is gone, of those that changed: accepted, went on, or ended.
        missed: earlier changes are not known any more: look at every job again.
    """

    number: int
    jobs: Mapping[str, str] = field(default_factory=dict)
    missed: bool = False


class Store(Protocol):
    """Jobs, their files and their images. Safe to share between threads."""

    def accept(self, request: Mapping[str, Any], *, model: str, owner: str = "", priority: int = 0,
               deadline: float | None = None, idempotency_key: str | None = None, fingerprint: str | None = None,
               files: Mapping[str, bytes] | None = None) -> StoredJob:
        """Take a job. When this returns, the job survives the end of the process, and so do its files.

        Args:
            request: JSON-able, with its seeds resolved.
            model: name of the bundle.
            owner: whose key it came with; idempotency keys are each owner's own.
            priority: higher ones run first; ten minutes of waiting make up for one.
            deadline: seconds since the epoch after which it is not started any more.
            idempotency_key: a second job under the same key is the first one.
            fingerprint: names what the client sent, before seeds were resolved; a key that comes again must come with
                the same. By default the request itself.
            files: what the client sent beside it, by sha256.

        Raises:
            FullError: the disk is full.
            IdempotencyError: the key came with another request before.
        """

    def accepted(self, owner: str, idempotency_key: str, fingerprint: str) -> StoredJob | None:
        """The job that a request with this key was accepted as; None for a new one.

        Args:
            owner: whose key of the server it came with.
            idempotency_key: of the request.
            fingerprint: of its body.

        Raises:
            IdempotencyError: the key came with another body.
        """

    def record(self, request: Mapping[str, Any], images: Sequence[tuple[bytes, str]], result: Mapping[str, Any], *,
               model: str, owner: str = "") -> StoredJob:
        """Store what was generated without a job as one that is completed, so that its images have an address.

        Raises:
            FullError: the disk is full.
        """

    def claim(self, engine: str, models: Sequence[str] | None, most: int, *, idle: bool = True,
              lease_seconds: float = LEASE_SECONDS) -> list[StoredJob]:
        """The next jobs for an engine, now running: by priority and age.

        A job whose deadline has passed is failed instead; one whose lease ran out, since its engine died, is taken.

        Args:
            engine: its name.
            models: bundles that it serves; None takes jobs of any.
            most: how many at most.
            idle: whether the engine runs nothing else. Only then it is given a job that has one attempt left, and that
                one alone: those after it wait, so that it is not overtaken for ever.
            lease_seconds: until another engine may take them, if `renew` does not say otherwise.
        """

    def renew(self, engine: str, identities: Sequence[str], *, lease_seconds: float = LEASE_SECONDS) -> None:
        """The engine lives: these running jobs stay its own."""

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

    def fail(self, identity: str, reason: str, *, attempt: int | None = None) -> bool:
        """End a job that cannot be done; whether this ended it.

        Args:
            identity: of the job.
            reason: for its client.
            attempt: do nothing unless it is in this attempt; None ends it in any.
        """

    def cancel(self, identity: str, reason: str = "cancelled by the client", *, owner: str | None = None) -> bool:
        """End a job that nobody wants any more; whether this ended it.

        Raises:
            NoJobError: there is none, or it is not of this owner.
        """

    def requeue(self, identity: str, reason: str = "", *, attempt: int | None = None, counts: bool = False) -> None:
        """Put a running job back.

        Args:
            identity: of the job.
            reason: why, for its client should it fail in the end.
            attempt: do nothing unless it is in this attempt; None puts it back from any.
            counts: whether the attempt counts, as one that ended its engine does: after the last it fails. One that
                was ended by a drain or a full disk does not.
        """

    def forget(self, identity: str, *, owner: str | None = None) -> bool:
        """Remove an ended job with its files and images; whether it was ended.

        Raises:
            NoJobError: there is none, or it is not of this owner.
        """

    def job(self, identity: str, *, owner: str | None = None) -> StoredJob:
        """A job by its id.

        Args:
            identity: of the job.
            owner: whose it must be; None for anybody's.

        Raises:
            NoJobError: there is none, or it is not of this owner.
        """

    def jobs(self, owner: str, *, most: int = 50, before: str | None = None,
             statuses: Sequence[str] = ()) -> list[StoredJob]:
        """An owner's jobs, the newest first.

        Args:
            owner: whose.
            most: how many at most.
            before: id of a job: only older ones, for the next page. An id that is gone gives an empty page.
            statuses: only of these; empty for all.
        """

    def files(self, identity: str) -> dict[str, bytes]:
        """What came with a job, by sha256.

        Raises:
            NoJobError: there is no such job.
            UnavailableError: a file of it is missing or damaged.
        """

    def image(self, sha256: str) -> tuple[bytes, str] | None:
        """An image that a job has, by its content's hash: its bytes and kind; None where there is none."""

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""

    def retain(self, *, seconds: float, image_bytes: int) -> int:
        """Forget ended jobs, the oldest first, until none is older and images and files of the ended take no more.

        Returns:
            how many jobs were forgotten.
        """

    def report(self, identity: str, progress: JobProgress) -> None:
        """Say how far a running job is. It is not written to disk; without effect on one that has ended."""

    def progress(self, identity: str, *, owner: str | None = None) -> JobProgress:
        """How far a job is.

        Raises:
            NoJobError: there is none, or it is not of this owner.
        """

    def changes(self, after: int, seconds: float) -> Changes:
        """Wait until something has changed, at most so long. One waiting thread serves any number of watchers.

        Args:
            after: the number of the changes seen last; -1 returns at once with the present number.
            seconds: to wait at most.
        """
