"""Cores and memory as affinity and control groups leave them, read from made-up file systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.errors import InputError
from runtimes.serving.options import EngineOptions
from runtimes.serving.workers.machine import CoreGroup, Machine
from runtimes.serving.workers.placement import placed

GB = 1000**3


def tree(root: Path, **files: str) -> Path:
    """Write files by their path, beside those of a machine of 64 GB."""
    for name, content in {"proc/meminfo": f"MemTotal:  {64 * GB // 1024} kB\n", **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


def test_without_control_groups_it_is_the_machine(tmp_path):
    machine = Machine.here(tree(tmp_path), tuple(range(16)))
    assert machine.threads == 16 and machine.quota is None and machine.memory_bytes == 64 * GB // 1024 * 1024
    assert machine.workers() == 2


@pytest.mark.parametrize(("quota", "threads"), [("max 100000", 16), ("400000 100000", 4), ("250000 100000", 2),
                                                ("50000 100000", 1), ("3200000 100000", 16)])
def test_version_2_limits_time_and_memory(tmp_path, quota, threads):
    root = tree(tmp_path, **{"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/pod/box/cpu.max": quota + "\n",
                             "sys/fs/cgroup/pod/box/memory.max": "max\n",
                             "sys/fs/cgroup/pod/memory.max": f"{8 * GB}\n"})
    machine = Machine.here(root, tuple(range(16)))
    assert machine.threads == threads and machine.memory_bytes == 8 * GB


def test_version_2_in_a_container_that_sees_its_own_group_as_the_root(tmp_path):
    root = tree(tmp_path, **{"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "200000 100000\n",
                             "sys/fs/cgroup/memory.max": f"{2 * GB}\n"})
    machine = Machine.here(root, tuple(range(16)))
    assert machine.threads == 2 and machine.memory_bytes == 2 * GB


def test_version_1_limits_time_and_memory(tmp_path):
    root = tree(tmp_path, **{
        "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/box\n",
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{4 * GB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    machine = Machine.here(root, tuple(range(16)))
    assert machine.threads == 3 and machine.memory_bytes == 4 * GB
    unlimited = tree(tmp_path / "u", **{"proc/self/cgroup": "4:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                                        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"})
    assert Machine.here(unlimited, (0, 1)).quota is None


def test_damaged_files_are_no_limits(tmp_path):
    root = tree(tmp_path, **{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "nonsense",
                             "sys/fs/cgroup/a/memory.max": ""})
    machine = Machine.here(root, (0, 1))
    assert machine.threads == 2 and machine.memory_bytes > 60 * GB


def test_cores_are_divided_without_overlap_and_neighbours_stay_together(tmp_path):
    files = {}
    for core in range(8):  # two sockets, even numbers on the first
        files[f"sys/devices/system/cpu/cpu{core}/topology/physical_package_id"] = f"{core % 2}\n"
        files[f"sys/devices/system/cpu/cpu{core}/topology/core_id"] = f"{core // 2}\n"
    machine = Machine.here(tree(tmp_path, **files), tuple(range(8)))
    assert machine.core_groups(2) == [CoreGroup(4, (0, 2, 4, 6)), CoreGroup(4, (1, 3, 5, 7))]
    groups = machine.core_groups(3)
    assert [group.threads for group in groups] == [3, 3, 2]
    assert sorted(core for group in groups for core in group.cores) == list(range(8))


def test_cores_are_not_taken_from_others_where_only_time_is_limited(tmp_path):
    root = tree(tmp_path, **{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"})
    assert Machine.here(root, tuple(range(16))).core_groups(2) == [CoreGroup(2), CoreGroup(2)]
    assert Machine((0, 1), None, GB).core_groups(1) == [CoreGroup(2)]
    assert Machine((0, 1), None, GB).core_groups(3) == [CoreGroup(1)] * 3


def test_this_machine_can_be_read():
    machine = Machine.here()
    assert machine.threads >= 1 and machine.memory_bytes > 100_000_000


def test_one_worker_a_device_and_of_the_cpu_one_a_group():
    machine = Machine(tuple(range(16)), None, 100 * GB)
    workers = placed(EngineOptions(device="cpu,cuda:0,cuda:1", batch=4), machine)
    assert [worker.name for worker in workers] == ["cpu-0", "cpu-1", "cuda:0", "cuda:1"]
    assert workers[0].cores == tuple(range(8)) and workers[0].threads == 8 and workers[2].cores == ()
    assert {worker.most_bytes for worker in workers} == {20 * GB} and {worker.batch for worker in workers} == {4}
    [one] = placed(EngineOptions(workers=1, memory="6GB"), machine)
    assert one.most_bytes == 6 * GB and one.cores == () and one.threads == 16


@pytest.mark.parametrize(("options", "where"), [
    ({"device": "cuda:0,cuda"}, "--device"), ({"device": "warp"}, "device"), ({"device": ""}, "device"),
    ({"device": "cuda", "workers": 2}, "--workers"), ({"workers": 1000}, "--workers"), ({"memory": "much"}, "--memory"),
])
def test_what_cannot_be_placed_is_refused(options, where):
    with pytest.raises(InputError) as caught:
        placed(EngineOptions(**options), Machine((0, 1), None, GB))
    assert caught.value.where == where
