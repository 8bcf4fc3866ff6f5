"""The state of jobs as one actor on the node that has its volume, and `RemoteStore`, by which every front asks it.

The actor outlives what made it, and Ray starts it again when its process dies. Its folder is then as it was at the last
commit, and calls that were under way are made again: each either happened or did not, and happening twice does no harm.
"""

from __future__ import annotations

# What an actor answers is of any type to the checker; `Store` says of which.
# mypy: disable-error-code="no-any-return"
import logging
import secrets
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from runtimes.errors import DeployError, UnavailableError
from runtimes.serving.cluster.cluster_settings import NAMESPACE, STATE_ACTOR, STATE_RESOURCE, ClusterSettings
from runtimes.serving.state.job_store import JobStore
from runtimes.serving.state.store import LEASE_SECONDS, Changes, JobProgress, Store, StoredJob
from runtimes.system.byte_sizes import parse_bytes

logger = logging.getLogger(__name__)
# A job is put back whenever this service starts again, though its engine lives: that must not use up its attempts.
MOST_ATTEMPTS = 20
CALL_SECONDS = 30.0
# Without a word from a front its jobs go to another: fronts renew every 15 s. Shorter than in a server of one machine,
# whose jobs are put back when it starts again.
FRONT_SECONDS = LEASE_SECONDS / 2
RETAIN_SECONDS = 60.0
THREADS, WAITING_THREADS = 16, 64
# What a front may ask for: the `Store` protocol.
CALLS = frozenset({name for name in vars(Store) if not name.startswith("_")})


class StateService:
    """The actor. Errors are returned as values: Ray would wrap those that are raised."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Open the folder; it waits for nobody who has it open."""
        server = ClusterSettings.from_json(settings).server
        self._store = JobStore(Path(server.state), most_attempts=MOST_ATTEMPTS)
        self._secret = _secret(Path(server.state) / "signing.key")
        self._keep = server.keep_hours * 3600, parse_bytes(server.keep_bytes, "--keep-bytes")
        threading.Thread(target=self._retain, name="retain", daemon=True).start()

    def secret(self) -> bytes:
        """32 bytes that sign image addresses, the same for every front and after every restart."""
        return self._secret

    def call(self, name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """One call of `Store`."""
        try:
            return getattr(self._store, name)(*arguments, **named) if name in CALLS else _unknown(name)
        except DeployError as error:
            return error

    def wait(self, after: int, seconds: float) -> Any:
        """`Store.changes`, apart from the others: many may wait while the rest goes on."""
        return self.call("changes", (after, seconds), {})

    def _retain(self) -> None:
        while True:
            try:
                self._store.retain(seconds=self._keep[0], image_bytes=self._keep[1])
            except Exception:
                logger.exception("old jobs could not be forgotten; they are tried again")
            threading.Event().wait(RETAIN_SECONDS)


class RemoteStore:
    """`Store`, answered by the actor. Each call blocks for a round trip: an event loop makes it in a thread."""

    def __init__(self, actor: Any, *, call_seconds: float = CALL_SECONDS) -> None:
        """Hold the actor.

        Args:
            actor: handle of a `StateService`.
            call_seconds: after which a call without an answer fails; it may have happened all the same.
        """
        self._actor, self._seconds = actor, call_seconds

    def secret(self) -> bytes:
        """What image addresses are signed with."""
        return bytes(self._answer(self._actor.secret.remote(), self._seconds))

    def accept(self, request: Mapping[str, Any], *, model: str, owner: str = "", priority: int = 0,
               deadline: float | None = None, idempotency_key: str | None = None, fingerprint: str | None = None,
               files: Mapping[str, bytes] | None = None) -> StoredJob:
        """Take a job; see `Store`. Without a key it is given one, so that a call made again takes it once."""
        key = idempotency_key or f"once-{uuid.uuid4().hex}"
        return self._ask("accept", request, model=model, owner=owner, priority=priority, deadline=deadline,
                         idempotency_key=key, fingerprint=fingerprint, files=files)

    def accepted(self, owner: str, idempotency_key: str, fingerprint: str) -> StoredJob | None:
        """The job that this key was accepted as; see `Store`."""
        return self._ask("accepted", owner, idempotency_key, fingerprint)

    def record(self, request: Mapping[str, Any], images: Sequence[tuple[bytes, str]], result: Mapping[str, Any], *,
               model: str, owner: str = "") -> StoredJob:
        """Store what was generated without a job; see `Store`."""
        return self._ask("record", request, images, result, model=model, owner=owner)

    def claim(self, engine: str, models: Sequence[str] | None, most: int, *, idle: bool = True,
              lease_seconds: float = FRONT_SECONDS) -> list[StoredJob]:
        """The next jobs; see `Store`. Jobs of a claim whose answer was lost are claimed again after their lease."""
        return self._ask("claim", engine, models, most, idle=idle, lease_seconds=lease_seconds)

    def renew(self, engine: str, identities: Sequence[str], *, lease_seconds: float = FRONT_SECONDS) -> None:
        """The engine lives; see `Store`."""
        self._ask("renew", engine, identities, lease_seconds=lease_seconds)

    def complete(self, identity: str, images: Sequence[tuple[bytes, str]], result: Mapping[str, Any]) -> bool:
        """Store images and end the job; see `Store`. Made again after it happened, it says False."""
        return self._ask("complete", identity, images, result)

    def fail(self, identity: str, reason: str, *, attempt: int | None = None) -> bool:
        """End a job that cannot be done; see `Store`."""
        return self._ask("fail", identity, reason, attempt=attempt)

    def cancel(self, identity: str, reason: str = "cancelled by the client", *, owner: str | None = None) -> bool:
        """End a job that nobody wants any more; see `Store`."""
        return self._ask("cancel", identity, reason, owner=owner)

    def requeue(self, identity: str, reason: str = "", *, attempt: int | None = None, counts: bool = False) -> None:
        """Put a running job back; see `Store`."""
        self._ask("requeue", identity, reason, attempt=attempt, counts=counts)

    def forget(self, identity: str, *, owner: str | None = None) -> bool:
        """Remove an ended job; see `Store`."""
        return self._ask("forget", identity, owner=owner)

    def job(self, identity: str, *, owner: str | None = None) -> StoredJob:
        """A job by its id; see `Store`."""
        return self._ask("job", identity, owner=owner)

    def jobs(self, owner: str, *, most: int = 50, before: str | None = None,
             statuses: Sequence[str] = ()) -> list[StoredJob]:
        """An owner's jobs; see `Store`."""
        return self._ask("jobs", owner, most=most, before=before, statuses=statuses)

    def files(self, identity: str) -> dict[str, bytes]:
        """What came with a job; see `Store`."""
        return self._ask("files", identity)

    def image(self, sha256: str) -> tuple[bytes, str] | None:
        """An image by its content's hash; see `Store`."""
        return self._ask("image", sha256)

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        return self._ask("counts")

    def retain(self, *, seconds: float, image_bytes: int) -> int:
        """Forget ended jobs; the service does it by itself, too."""
        return self._ask("retain", seconds=seconds, image_bytes=image_bytes)

    def report(self, identity: str, progress: JobProgress) -> None:
        """Say how far a running job is; nobody waits for it, and it may be lost."""
        self._actor.call.options(num_returns=0).remote("report", (identity, progress), {})

    def progress(self, identity: str, *, owner: str | None = None) -> JobProgress:
        """How far a job is; see `Store`."""
        return self._ask("progress", identity, owner=owner)

    def changes(self, after: int, seconds: float) -> Changes:
        """Wait until something has changed; see `Store`. Numbers of a service that was started again are new ones."""
        return self._answer(self._actor.wait.remote(after, seconds), self._seconds + seconds)

    def _ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        return self._answer(self._actor.call.remote(name, arguments, named), self._seconds)

    def _answer(self, reference: Any, seconds: float) -> Any:
        try:
            answer = ray.get(reference, timeout=seconds)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            raise UnavailableError("the state service does not answer", where="state",
                                   fix="ask again; it is started again where its volume is") from error
        if isinstance(answer, DeployError):
            raise answer
        return answer


def state_actor(settings: ClusterSettings) -> Any:
    """The one actor of this cluster, started if it is not there: where the volume is, again whenever its process dies.

    Raises:
        UnavailableError: no node says that it has the volume.
    """
    if ray.cluster_resources().get(STATE_RESOURCE, 0) < 1:
        raise UnavailableError("no node has the volume of jobs and images", where=STATE_RESOURCE,
                               fix=f"start Ray on the node that has it with --resources '{{\"{STATE_RESOURCE}\": 1}}'")
    return ray.remote(StateService).options(
        name=STATE_ACTOR, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, max_restarts=-1,
        max_task_retries=-1, num_cpus=0, resources={STATE_RESOURCE: 0.001}, max_concurrency=THREADS + WAITING_THREADS,
    ).remote(settings.to_json())


def _secret(file: Path) -> bytes:
    """Of the folder, made at its first use; readable by its owner alone."""
    if not file.is_file():
        partial = file.with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_bytes(secrets.token_bytes(32))
        partial.rename(file)
    return file.read_bytes()


def _unknown(name: str) -> DeployError:
    return DeployError(f"no call {name!r}", where="state service", fix="please report it")
