"""The cache: one folder, one limit in bytes; the least recently used leaves first, never what a live process holds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtimes.errors import InputError
from runtimes.system import cache_store
from runtimes.system.cache_root import cache_home, rooted
from runtimes.system.cache_store import WORK, entries, limit_bytes, scratch, sweep, total_bytes, trim, use


def entry(root: Path, kind: str, name: str, size: int = 100, age_seconds: float = 3600) -> Path:
    """A folder with one file, last used so long ago."""
    folder = root / kind / name
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"x" * size)
    return aged(folder, age_seconds)


def aged(path: Path, seconds: float) -> Path:
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def there(root: Path) -> list[str]:
    return sorted(e.path.name for e in entries(root))


@pytest.fixture
def live(tmp_path: Path):
    """Another process that builds, below the cache that it is given."""
    code = ("import sys; from pathlib import Path; from runtimes.system.cache_store import scratch\n"
            "with scratch(Path(sys.argv[1]) / 'work') as folder:\n"
            "    (folder / 'half').write_text('done'); print(folder, flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.communicate()


def test_one_rule_says_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "ldm-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "ldm-deploy"
    monkeypatch.setenv("LDM_DEPLOY_CACHE", "~/own")
    assert cache_home() == tmp_path / "own"
    monkeypatch.setenv("LDM_DEPLOY_CACHE", "")
    assert cache_home() == tmp_path / "xdg" / "ldm-deploy"
    with rooted(tmp_path / "given"):
        assert cache_home() == tmp_path / "given"


@pytest.mark.parametrize("module", ["session_ort", "session_openvino", "checked_files"])
def test_everything_that_is_cached_lies_below_it(monkeypatch, tmp_path, module):
    from runtimes.backends import onnxruntime_session, openvino_session
    from runtimes.system import checked_files
    from tests.runtimes.fakes import AFFINE

    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "own"))
    found = {"session_ort": onnxruntime_session.cache_place(),
             "session_openvino": openvino_session.cache_folder(AFFINE),
             "checked_files": checked_files._note("ab")}[module]
    assert found is not None and found.is_relative_to(tmp_path / "own")


def test_the_least_recently_used_leaves_first_whatever_its_kind(tmp_path):
    entry(tmp_path, "passes", "old", age_seconds=300)
    entry(tmp_path, "calibration", "oldest", age_seconds=400)
    entry(tmp_path, "onnxruntime/cpu", "new", age_seconds=100)
    done = trim(tmp_path, 250)
    assert (done.before_bytes, done.after_bytes, done.removed) == (300, 200, 1)
    assert there(tmp_path) == ["new", "old"]
    assert use(tmp_path / "passes" / "old"), "a hit makes it the youngest"
    trim(tmp_path, 100)
    assert there(tmp_path) == ["old"]


def test_a_file_that_several_entries_link_to_counts_once(tmp_path):
    first = entry(tmp_path, "passes", "first", age_seconds=300)
    second = entry(tmp_path, "passes", "second", 50, age_seconds=200)
    os.link(first / "file", second / "linked")
    aged(second, 200)
    assert total_bytes(entries(tmp_path)) == 150
    assert trim(tmp_path, 120).after_bytes == 0, "without the first, the second still holds its bytes"


def test_what_a_live_process_holds_stays_and_leaves_once_it_is_gone(tmp_path, live):
    entry(tmp_path, "passes", "unused")
    entry(tmp_path, "passes", "used")
    process, folder = live
    assert use(tmp_path / "passes" / "used")  # as that process would
    assert trim(tmp_path, 0).after_bytes == 100
    assert there(tmp_path) == ["used"] and (folder / "half").is_file()
    process.kill()
    process.communicate()
    assert trim(tmp_path, 0).after_bytes == 0
    assert not list((tmp_path / WORK).iterdir())


def test_a_live_workspace_stays_however_old_it_is(tmp_path, live):
    process, folder = live
    for path in (folder, folder.with_suffix(".lock")):
        aged(path, 30 * 24 * 3600)
    sweep(tmp_path / WORK)
    assert (folder / "half").is_file()
    process.kill()
    process.communicate()
    sweep(tmp_path / WORK)
    assert not folder.exists()


def test_an_ended_scratch_leaves_nothing_and_a_thread_of_the_same_process_holds_too(tmp_path):
    entry(tmp_path, "facts", "a")
    with scratch(tmp_path / WORK) as folder:
        aged(folder.with_suffix(".lock"), 7200)
        thread = threading.Thread(target=trim, args=(tmp_path, 0))
        thread.start()
        thread.join()
        assert folder.is_dir() and there(tmp_path) == ["a"], "used after the scratch began"
    assert not list((tmp_path / WORK).iterdir())


def test_a_scratch_of_a_release_without_locks_is_left_alone_for_a_day(tmp_path):
    (tmp_path / WORK / "young").mkdir(parents=True)
    (tmp_path / WORK / "old").mkdir()
    aged(tmp_path / WORK / "young", 2 * 3600)
    aged(tmp_path / WORK / "old", 2 * 24 * 3600)
    sweep(tmp_path / WORK)
    assert [p.name for p in (tmp_path / WORK).iterdir()] == ["young"]


def test_an_entry_that_is_used_while_others_leave_stays(tmp_path, monkeypatch):
    entry(tmp_path, "passes", "a", age_seconds=200)
    entry(tmp_path, "passes", "b", age_seconds=100)
    real = cache_store._taken_away

    def hit_meanwhile(found, destination):
        use(tmp_path / "passes" / "a")
        return real(found, destination)

    monkeypatch.setattr(cache_store, "_taken_away", hit_meanwhile)
    trim(tmp_path, 0)
    assert there(tmp_path) == ["a"]


def test_processes_that_trim_and_use_at_once_never_see_half_an_entry(tmp_path):
    """Whoever is told that an entry is there finds all of it for as long as its scratch lives."""
    code = ("import sys, random; from pathlib import Path\n"
            "from runtimes.system.cache_store import scratch, trim, use\n"
            "root, random_ = Path(sys.argv[1]), random.Random(int(sys.argv[2]))\n"
            "for i in range(40):\n"
            "    with scratch(root / 'work') as folder:\n"
            "        for name in random_.sample('abcdefgh', 4):\n"
            "            place = root / 'passes' / name\n"
            "            if not use(place):\n"
            "                with scratch(root / 'work') as made:\n"
            "                    (made / 'file').write_bytes(b'x' * 100)\n"
            "                    try: made.rename(place)\n"
            "                    except OSError: assert use(place)\n"
            "            assert (place / 'file').read_bytes() == b'x' * 100\n"
            "    trim(root, 200)\n")
    (tmp_path / "passes").mkdir()
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(seed)], stderr=subprocess.PIPE,
                                text=True) for seed in range(3)]
    for process in running:
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)


def test_the_limit_is_the_variables_else_a_share_of_the_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_DEPLOY_CACHE_LIMIT", "1.5GB")
    assert limit_bytes(tmp_path) == 1_500_000_000
    monkeypatch.setenv("LDM_DEPLOY_CACHE_LIMIT", "plenty")
    with pytest.raises(InputError, match="'plenty' is not a size") as caught:
        limit_bytes(tmp_path)
    assert caught.value.where == "LDM_DEPLOY_CACHE_LIMIT"
    monkeypatch.delenv("LDM_DEPLOY_CACHE_LIMIT")
    monkeypatch.setattr("runtimes.system.cache_store.shutil.disk_usage",
                        lambda _: type("", (), {"free": 10_000_000_000}))
    assert limit_bytes(tmp_path / "not" / "there") == 5_000_000_000


def test_a_cache_that_cannot_be_written_is_read_all_the_same(tmp_path):
    place = entry(tmp_path, "passes", "a")
    for folder in (tmp_path / "passes", tmp_path):
        folder.chmod(0o555)
    try:
        assert use(place)
        assert not use(tmp_path / "passes" / "b")
    finally:
        for folder in (tmp_path, tmp_path / "passes"):
            folder.chmod(0o755)
