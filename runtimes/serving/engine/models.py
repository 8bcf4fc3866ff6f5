"""`Models`: the bundles that one worker has loaded, within a memory cap; what was used longest ago makes way.

Loading runs in a thread of its own, so that what is denoised goes on. The engine's thread alone asks and holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from runtimes.bundle.folder import Bundle
from runtimes.errors import BundleError, DeployError, InputError, OutOfMemoryError, UnavailableError
from runtimes.serving.engine.sources import Loaded, Offered, Steppable

if TYPE_CHECKING:
    from runtimes.system.device import Device

logger = logging.getLogger(__name__)
RETRY_SECONDS = 30.0  # memory or a device may be there again, so that a bundle is tried again that could not be loaded
REPLACED_SECONDS, AGAIN_SECONDS = 15.0, 0.4  # how long a request waits for what replaced its bundle, looked at so often


class ReplacedError(UnavailableError):
    """Another bundle lies in the folder than the one that is offered: what is offered will soon be that one."""


class Models:
    """Bundles that are loaded when they are first asked for.

    A bundle takes what its files take, or what the process grew by while it was loaded if that is more. Where that
    does not fit below the cap beside the others, those are unloaded that run nothing, the one used longest ago first.
    A bundle whose digest changed is loaded anew; what runs on the old one finishes there.
    """

    def __init__(self, offered: Mapping[str, Offered], *, most_bytes: int | None = None,
                 opened: Callable[[Offered], Steppable] | None = None,
                 resident: Callable[[], int] | None = None) -> None:
        """Load nothing yet.

        Args:
            offered: names to bundles; looked up at every request, so that it may change.
            most_bytes: that loaded bundles may take together; None for no limit.
            opened: loads a bundle.
            resident: bytes that this process takes.
        """
        self.on_change: Callable[[], None] = lambda: None
        self._offered, self._most = offered, most_bytes
        self._opened, self._resident = opened or opener(), resident or resident_bytes
        self._all: list[Loaded] = []
        self._current: dict[str, Loaded] = {}
        self._failed: dict[str, tuple[str, float, float, Exception]] = {}  # digest, first and last time, reason
        self._taken: dict[str, int] = {}  # digest -> bytes that it took when it was loaded before
        self._loading: threading.Thread | None = None
        self._blocked, self._wanted = "", list[str]()
        self._lock = threading.RLock()

    def names(self) -> tuple[str, ...]:
        """That requests may give."""
        return tuple(self._offered)

    def loaded(self) -> list[Loaded]:
        """All, the one used last at the end; while the old one of two runs something, both."""
        with self._lock:
            return sorted(self._all, key=lambda one: one.used)

    def find(self, name: str) -> Loaded | None:
        """The bundle of that name, or None as long as it is not loaded: `on_change` is called once it is.

        Raises:
            InputError: nothing of that name is offered.
            DeployError: why it cannot be loaded.
        """
        offered = self._offered.get(name)
        if offered is None:
            raise InputError(f"no model {name!r:.120}", where="model", fix=f"one of {', '.join(self._offered)}")
        with self._lock:
            current = self._current.get(name)
            if current is not None and current.digest == offered.digest:
                current.used = monotonic()
                return current
            if self._may_load(name, offered) and self._loading is None and self._make_room(name, offered):
                self._loading = threading.Thread(target=self._load, args=(name, offered), name="load", daemon=True)
                self._loading.start()
            return None

    def blocked(self, name: str) -> bool:
        """Whether a bundle can be loaded only once others run nothing."""
        return self._blocked == name

    def hold(self, loaded: Loaded) -> None:
        """A request runs on it."""
        with self._lock:
            loaded.users += 1

    def release(self, loaded: Loaded) -> None:
        """A request runs on it no more; a bundle that was replaced is unloaded after the last one."""
        with self._lock:
            loaded.users -= 1
        self.tidy()

    def want(self, name: str) -> None:
        """Load a bundle before anybody asks for it, if nothing has to make way for it; any thread may wish so."""
        with self._lock:
            self._wanted.append(name)
        self.on_change()

    def tidy(self) -> None:
        """Unload what was replaced and runs nothing, and load its successor before anybody has to wait for it."""
        with self._lock:
            while self._wanted and self._loading is None:
                name = self._wanted.pop(0)
                offered = self._offered.get(name)
                if offered is not None and name not in self._current and self._fits(self._needed(offered)):
                    with contextlib.suppress(DeployError):  # whoever asks for it is given the reason
                        self.find(name)
            stale = [one for one in self._all if not self._is_offered(one)]
            for one in stale:
                if not one.users:
                    self._unload(one)
                with contextlib.suppress(DeployError):  # whoever asks for it is given the reason
                    self.find(one.name)

    def close(self) -> None:
        """Unload everything; nothing may run any more."""
        while (thread := self._loading) is not None:
            thread.join()
        with self._lock:
            for one in list(self._all):
                self._unload(one)

    # ---- under the lock ------------------------------------------------------------------------------------------

    def _is_offered(self, loaded: Loaded) -> bool:
        offered = self._offered.get(loaded.name)
        return offered is not None and offered.digest == loaded.digest

    def _may_load(self, name: str, offered: Offered) -> bool:
        """Whether it is time to try; raises the reason why it failed before, as long as that holds."""
        digest, first, last, error = self._failed.get(name, ("", 0.0, 0.0, None))
        if error is None or digest != offered.digest:
            self._failed.pop(name, None)
            return True
        now = monotonic()
        if isinstance(error, ReplacedError) and now - first < REPLACED_SECONDS:
            return now - last > AGAIN_SECONDS
        if isinstance(error, UnavailableError) and now - last > RETRY_SECONDS:
            return True
        raise error

    def _make_room(self, name: str, offered: Offered) -> bool:
        """Unload what must make way for a bundle; False where that still runs."""
        needed = self._needed(offered)
        if self._most is not None and needed > self._most:
            self._fail(name, offered.digest, _too_large(name, needed, self._most))
            return False
        while not self._fits(needed):
            idle = [one for one in self.loaded() if not one.users]
            if not idle:
                self._blocked = name
                return False
            self._unload(idle[0])
        self._blocked = ""
        return True

    def _needed(self, offered: Offered) -> int:
        """Bytes that a bundle should take, as far as is known."""
        return max(offered.bytes, self._taken.get(offered.digest, 0))

    def _fits(self, needed: int) -> bool:
        return self._most is None or sum(one.bytes for one in self._all) + needed <= self._most

    def _unload(self, loaded: Loaded) -> None:
        self._all.remove(loaded)
        if self._current.get(loaded.name) is loaded:
            del self._current[loaded.name]
        close = getattr(loaded.pipeline, "close", None)
        if close is not None:
            close()
        give_back_memory()
        logger.info("%s: unloaded the bundle %.12s", loaded.name, loaded.digest)

    def _fail(self, name: str, digest: str, error: Exception) -> None:
        known, now = self._failed.get(name), monotonic()
        again = known is not None and known[0] == digest
        first = known[1] if known is not None and again else now
        self._failed[name] = digest, first, now, _without_path(error, name, self._offered.get(name))
        self._blocked = "" if self._blocked == name else self._blocked
        if not again:
            logger.error("%s: the bundle %.12s cannot be loaded: %s", name, digest, error)
        self.on_change()

    # ---- in the thread that loads --------------------------------------------------------------------------------

    def _load(self, name: str, offered: Offered) -> None:
        before, began = self._resident(), monotonic()
        try:
            pipeline = self._opened(offered)
        except MemoryError:
            self._loaded(name, offered, OutOfMemoryError("no memory is left to load it", where=name,
                                                         fix="serve fewer bundles, or lower --memory"))
        except Exception as error:
            self._loaded(name, offered, error)
        else:
            taken = max(self._resident() - before, offered.bytes)
            self._loaded(name, offered, Loaded(name, pipeline, offered.digest, taken))
            logger.info("%s: loaded the bundle %.12s in %.1f s, %.0f MB", name, offered.digest, monotonic() - began,
                        taken / 1e6)

    def _loaded(self, name: str, offered: Offered, result: Loaded | Exception) -> None:
        with self._lock:
            self._loading = None
            if isinstance(result, Exception):
                self._fail(name, offered.digest, result)
                return
            self._failed.pop(name, None)
            self._taken[offered.digest] = result.bytes
            self._all.append(result)
            self._current[name] = result
            if self._most is not None and result.bytes > self._most:
                self._unload(result)
                self._fail(name, offered.digest, _too_large(name, result.bytes, self._most))
            others = [one for one in self.loaded() if one is not result and not one.users]
            while others and not self._fits(0):  # it takes more than its files did promise
                self._unload(others.pop(0))
        self.on_change()


def opener(device: str | Device = "cpu", threads: int = 0, *, deterministic: bool = False,
           memory_budget: int | None = None) -> Callable[[Offered], Steppable]:
    """How a bundle is loaded: the arguments are those of `runtimes.load`."""

    def opened(offered: Offered) -> Steppable:
        from runtimes.pipeline.loading import load

        try:
            bundle = Bundle.open(offered.folder, trust_notes=True)
        except (BundleError, OSError) as error:  # it was whole when it was offered
            raise ReplacedError(f"the bundle was changed: {getattr(error, 'what', error)}", where="model",
                                fix="ask again once it is whole") from error
        if bundle.manifest.digest != offered.digest:
            raise ReplacedError("the bundle was replaced a moment ago", where="model", fix="ask again")
        return load(bundle, device, threads, deterministic=deterministic, memory_budget=memory_budget)

    return opened


def _too_large(name: str, needed: int, most: int) -> OutOfMemoryError:
    return OutOfMemoryError(f"it takes {needed / 1e6:.0f} MB, and loaded bundles may take {most / 1e6:.0f} MB",
                            where=name, fix="raise --memory, or build the bundle in a lower precision")


def _without_path(error: Exception, name: str, offered: Offered | None) -> Exception:
    """An error as clients may read it, who need not know where a bundle lies; the log has the whole of it."""
    if not isinstance(error, DeployError) or offered is None:
        return error
    what, where, fix = (text.replace(str(offered.folder), name) for text in (error.what, error.where, error.fix))
    return type(error)(what, where=where, fix=fix)


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def give_back_memory() -> None:
    """Return what was freed to the system: glibc holds on to it otherwise."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
