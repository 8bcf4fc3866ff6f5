"""What a process may use of its machine: cores and memory, as affinity and control groups (v1, v2) leave them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CORES_EACH = 8
SHARE_OF_MEMORY = 0.8
UNLIMITED = 1 << 60  # control groups of version 1 write "no limit" as a number near 2^63


@dataclass(frozen=True)
class CoreGroup:
    """Cores of one worker.

    Attributes:
        threads: that compute.
        cores: numbers of the cores that it is kept on; empty where it may use any.
    """

    threads: int
    cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        cores: numbers of those that this process may run on, neighbours of one socket beside each other.
        quota: cores' worth of time that the control group allows; None for no limit.
        memory_bytes: of the machine, or what the control group allows if that is less.
    """

    cores: tuple[int, ...]
    quota: float | None
    memory_bytes: int

    @classmethod
    def here(cls, root: Path = Path("/"), cores: tuple[int, ...] | None = None) -> Machine:
        """Read it from the system.

        Args:
            root: of the file system that holds proc and sys.
            cores: instead of this process's affinity.
        """
        if cores is None:
            allowed = getattr(os, "sched_getaffinity", None)
            cores = tuple(allowed(0)) if allowed else tuple(range(os.cpu_count() or 1))
        groups = list(_groups(root))
        quotas = [quota for group in groups if (quota := _quota(group)) is not None]
        limits = [limit for group in groups if (limit := _limit(group)) is not None]
        return cls(tuple(sorted(cores, key=lambda core: _place(root, core))), min(quotas, default=None),
                   min([*limits, _total(root)]))

    @property
    def threads(self) -> int:
        """How many may compute at once without being slowed down by the control group."""
        return max(1, len(self.cores) if self.quota is None else min(len(self.cores), int(self.quota)))

    def workers(self) -> int:
        """How many workers the CPU has by default: one for every 8 cores."""
        return max(1, self.threads // CORES_EACH)

    def core_groups(self, workers: int) -> list[CoreGroup]:
        """The cores divided among so many workers.

        A single worker is not kept on its cores, nor are those of a container that has a share of time instead of
        cores of its own: others use the same cores.
        """
        sizes = [self.threads // workers + (i < self.threads % workers) for i in range(workers)]
        if workers == 1 or self.threads < max(len(self.cores), workers):
            return [CoreGroup(max(size, 1)) for size in sizes]
        ends = [sum(sizes[: i + 1]) for i in range(workers)]
        return [CoreGroup(size, self.cores[end - size : end]) for size, end in zip(sizes, ends, strict=True)]

    def memory_each(self, workers: int) -> int:
        """Bytes that the loaded bundles of one of so many workers may take by default."""
        return int(SHARE_OF_MEMORY * self.memory_bytes / workers)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, with those around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(",") if controllers else [""]:
            if name not in ("", "cpu", "memory"):
                continue
            # Version 1 mounts each controller below its name, cpu often together with another.
            mounts = [root / "sys/fs/cgroup" / mount for mount in {name, controllers}]
            for mount in filter(Path.is_dir, mounts):
                parts = Path(path.lstrip("/")).parts
                # In a container the path is the host's, and what is mounted is the container's own group.
                for end in range(len(parts), -1, -1):
                    if (folder := mount.joinpath(*parts[:end])).is_dir():
                        yield folder


def _quota(group: Path) -> float | None:
    words = _words(group / "cpu.max")
    if not words:
        words = [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
    try:
        quota, period = (float(word) for word in words)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _limit(group: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        words = _words(group / name)
        if words and words[0].isdigit() and int(words[0]) < UNLIMITED:
            return int(words[0])
    return None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []


def _total(root: Path) -> int:
    words = _words(root / "proc/meminfo")
    if "MemTotal:" in words:
        return int(words[words.index("MemTotal:") + 1]) * 1024
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _place(root: Path, core: int) -> tuple[int, int, int]:
    """Where a core sits: its socket, its number there, its own; threads of one core are neighbours."""
    topology = root / f"sys/devices/system/cpu/cpu{core}/topology"
    package, number = (_words(topology / name) for name in ("physical_package_id", "core_id"))
    return int(package[0]) if package else 0, int(number[0]) if number else core, core
