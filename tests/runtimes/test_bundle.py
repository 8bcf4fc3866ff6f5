"""Opening a bundle trusts nothing in it; committing one is all or nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from runtimes.bundle.folder import Bundle, check_file, check_output, committed, link_or_copy, records_below, replacing
from runtimes.bundle.manifest import MANIFEST_FILE, dumps, parse
from runtimes.errors import BundleError, InputError, UnavailableError
from tests.runtimes.fakes import affine_bundle
from tests.runtimes.hub_cache import as_hub_snapshot

MODEL = "components/affine/model.onnx"


@pytest.fixture
def folder(tmp_path) -> Path:
    return affine_bundle(tmp_path / "b").path


def edit(folder: Path, change) -> None:
    """Change the manifest's JSON."""
    file = folder / MANIFEST_FILE
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_a_good_bundle_opens_and_its_manifest_is_canonical(folder):
    opened = Bundle.open(folder)
    assert dumps(parse((folder / MANIFEST_FILE).read_text(), "m")) == (folder / MANIFEST_FILE).read_text()
    assert opened.component("affine").bytes == (folder / MODEL).stat().st_size
    assert len(opened.manifest.digest) == 64


def test_a_manifest_without_parity_opens(folder):
    edit(folder, lambda m: (m.update(parity=None), m["components"]["affine"].update(parity=None)))
    assert Bundle.open(folder).manifest.parity is None


def test_a_changed_byte_is_found_by_its_hash_only(folder):
    content = bytearray((folder / MODEL).read_bytes())
    content[5] ^= 1
    (folder / MODEL).write_bytes(content)
    with pytest.raises(BundleError, match=f"{MODEL} was changed"):
        Bundle.open(folder)
    Bundle.open(folder, check_hashes=False)


def test_another_size_is_found_without_hashing(folder):
    (folder / MODEL).write_bytes(b"short")
    with pytest.raises(BundleError, match="has 5 bytes, the manifest says"):
        Bundle.open(folder, check_hashes=False)


def test_a_missing_file_is_named(folder):
    (folder / MODEL).unlink()
    with pytest.raises(BundleError, match=f"{MODEL} is missing"):
        Bundle.open(folder)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "C:x", ""])
def test_a_path_that_leaves_the_bundle_is_refused(folder, path):
    edit(folder, lambda m: m["files"].update({path: {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(folder)


def test_a_component_may_not_hide_its_entry_file(folder):
    edit(folder, lambda m: m["components"]["affine"].update(file="../x.onnx"))
    with pytest.raises(BundleError, match="not among the files"):
        Bundle.open(folder)


def test_a_link_out_of_the_bundle_is_refused(folder, tmp_path):
    (tmp_path / "outside.onnx").write_bytes((folder / MODEL).read_bytes())
    (folder / MODEL).unlink()
    (folder / MODEL).symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(BundleError, match="is a link out of the bundle"):
        Bundle.open(folder)


def test_a_linked_folder_out_of_the_bundle_is_refused(folder, tmp_path):
    (folder / "components").rename(tmp_path / "moved")
    (folder / "components").symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match="is a link out of the bundle"):
        Bundle.open(folder)


def test_a_bundle_in_the_hubs_cache_is_read_through_its_links(folder, tmp_path):
    snapshot = as_hub_snapshot(folder, tmp_path / "hub" / "models--acme--tiny")
    assert Bundle.open(snapshot).file(MODEL).read_bytes() == (folder / MODEL).read_bytes()
    assert all(file.is_symlink() for file in snapshot.rglob("*") if file.is_file()), "nothing was changed"


@pytest.mark.parametrize("repository", ["models--acme--other", "other"])
def test_only_blobs_of_the_bundles_own_repository_are_read(folder, tmp_path, repository):
    hub = tmp_path / "hub"
    snapshot = as_hub_snapshot(folder, hub / repository)
    stranger = hub / "models--acme--stranger" / "blobs" / "0"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes((folder / MODEL).read_bytes())
    (snapshot / MODEL).unlink()
    (snapshot / MODEL).symlink_to(stranger)
    with pytest.raises(BundleError, match="is a link out of the bundle"):
        Bundle.open(snapshot)


@pytest.mark.parametrize(("schema", "fix"), [(3, "upgrade"), (0, "build the bundle again"), ("1", "again"), (None, "")])
def test_another_schema_says_what_to_do(folder, schema, fix):
    edit(folder, lambda m: m.update(schema=schema))
    with pytest.raises(BundleError, match="schema") as caught:
        Bundle.open(folder)
    assert fix in caught.value.fix


def test_a_bundle_of_the_first_schema_names_the_command_that_builds_it_again(folder):
    edit(folder, lambda m: m.update(
        schema=1, spec={"target": "openvino", "precision": "fp16", "shapes": {"batch": "1:2:8"}, "step_cache": True},
        measured={"source_path": "/models/my model", "adapters": {"lora": ["a.safetensors:0.5"]}}))
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert caught.value.fix.endswith("python -m deploy build '/models/my model' --target openvino --precision fp16 "
                                     "--shapes batch=1:2:8 --step-cache --lora a.safetensors:0.5")


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m.pop("family"), "missing family"),
    (lambda m: m.update(surprise=1), "unknown key surprise"),
    (lambda m: m["pipeline"]["codec"].update(height="64"), r"pipeline.codec.height: expected int, found '64'"),
    (lambda m: m["components"]["affine"]["axes"]["batch"].update(range=[1]), "axes.batch.range"),
    (lambda m: m.update(components=[]), "components"),
])
def test_a_key_that_does_not_fit_is_named_with_its_path(folder, change, message):
    edit(folder, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_what_is_no_bundle_is_said(tmp_path):
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no manifest.json")):
        with pytest.raises(BundleError, match=message):
            Bundle.open(path)
    (tmp_path / MANIFEST_FILE).write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST_FILE).write_bytes(b"\xff\xfe{")
    with pytest.raises(BundleError, match="not UTF-8"):
        Bundle.open(tmp_path)


def test_an_unknown_component_names_the_known(folder):
    with pytest.raises(BundleError, match="has no unet") as caught:
        Bundle.open(folder).component("unet")
    assert "affine" in caught.value.fix


# ---- committing --------------------------------------------------------------------------------------------------


def test_a_commit_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "deep" / "out"
    with committed(target) as partial:
        (partial / MANIFEST_FILE).write_text("{}")
        assert not target.exists() and partial.parent == target.parent
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_an_exception_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), committed(tmp_path / "out") as partial:
        (partial / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_old_bundle_is_replaced_on_success_and_kept_on_failure(folder):
    before = (folder / MANIFEST_FILE).read_text()
    with pytest.raises(ZeroDivisionError), committed(folder):
        raise ZeroDivisionError
    assert (folder / MANIFEST_FILE).read_text() == before
    with committed(folder) as partial:
        (partial / MANIFEST_FILE).write_text("new")
    assert [p.name for p in folder.iterdir()] == [MANIFEST_FILE]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_failing_rename_brings_the_old_bundle_back(folder, monkeypatch):
    before = (folder / MANIFEST_FILE).read_text()
    original = Path.rename

    def rename(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken disk")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="broken disk"), committed(folder) as partial:
        (partial / MANIFEST_FILE).write_text("new")
    assert (folder / MANIFEST_FILE).read_text() == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_what_is_not_a_bundle_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("mine", "file", "link"):
        with pytest.raises(InputError, match="exists"), committed(tmp_path / name):
            pytest.fail("the body must not run")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for path, words in ((tmp_path, "this is a folder"), (tmp_path / "file" / "a.png", "nothing can be written below"),
                        (tmp_path / "file" / "a" / "b.png", "below"), (tmp_path / "broken" / "a.png", "broken link")):
        with pytest.raises(InputError, match=words):
            check_file(path, "-o")
    for path in (tmp_path / "file", tmp_path / "new" / "folders" / "a.png", None):
        check_file(path, "-o")
    with pytest.raises(InputError, match="below"):
        check_output(tmp_path / "file" / "bundle")


@pytest.mark.parametrize(("number", "kind"), [
    (errno.ENOSPC, UnavailableError), (errno.EDQUOT, UnavailableError), (errno.EACCES, InputError),
    (errno.EROFS, InputError), (errno.ENOTDIR, InputError), (errno.ENAMETOOLONG, InputError),
])
def test_disk_errors_are_one_clear_line_and_leave_nothing(tmp_path, number, kind):
    with pytest.raises(kind) as caught, committed(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "out") in str(caught.value) and list(tmp_path.iterdir()) == []


def test_numpys_own_words_for_a_full_disk_are_known(tmp_path):
    with pytest.raises(UnavailableError, match="the disk is full"), committed(tmp_path / "out"):
        raise OSError("1920 requested and 224 written")
    with pytest.raises(OSError, match="something else"), committed(tmp_path / "out"):
        raise OSError("something else")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_an_array_that_does_not_fit_is_a_full_disk(tmp_path):
    with (pytest.raises(UnavailableError, match="the disk is full"), committed(tmp_path / "out"),
          Path("/dev/full").open("wb", buffering=0) as full):
        np.zeros(100_000).tofile(full)


def test_kept_files_are_linked_or_copied(folder, tmp_path, monkeypatch):
    link_or_copy(folder / MODEL, tmp_path / "x" / "linked.onnx")
    assert (tmp_path / "x" / "linked.onnx").stat().st_ino == (folder / MODEL).stat().st_ino

    def refuse(source, destination):
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(folder / MODEL, tmp_path / "x" / "copied.onnx")
    assert (tmp_path / "x" / "copied.onnx").read_bytes() == (folder / MODEL).read_bytes()
    assert list(records_below(tmp_path / "x", tmp_path)) == ["x/copied.onnx", "x/linked.onnx"]


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path):
    file = tmp_path / "deep" / "figures.json"
    with replacing(file) as partial:
        partial.write_text("first")
    with pytest.raises(ZeroDivisionError), replacing(file) as partial:
        partial.write_text("second")
        raise ZeroDivisionError
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]
