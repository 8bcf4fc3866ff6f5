"""A large file is hashed once, and again whenever anything may have written to it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from runtimes.bundle import folder as bundles
from runtimes.bundle.folder import Bundle
from runtimes.errors import BundleError
from runtimes.system import checked_files
from tests.runtimes.fakes import affine_bundle

MODEL = "components/affine/model.onnx"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose files all count as large, and as written long ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "notes"))
    monkeypatch.setattr(bundles, "ABOVE_BYTES", 0)
    monkeypatch.setattr(checked_files, "SETTLED_SECONDS", 0)
    return affine_bundle(tmp_path / "b").path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    real = bundles.sha256_of

    def noted(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(bundles, "sha256_of", noted)
    return names


def test_it_is_hashed_once_where_notes_are_trusted_and_always_elsewhere(folder: Path, hashed: list[str]) -> None:
    Bundle.open(folder, trust_notes=True)
    assert "model.onnx" in hashed
    hashed.clear()
    Bundle.open(folder, trust_notes=True)
    assert not hashed
    Bundle.open(folder)
    assert "model.onnx" in hashed


def test_a_changed_byte_is_found_even_with_its_old_time(folder: Path) -> None:
    Bundle.open(folder, trust_notes=True)
    file = folder / MODEL
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match="was changed since the bundle was built"):
        Bundle.open(folder, trust_notes=True)


def test_a_copy_is_hashed(folder: Path, hashed: list[str], tmp_path: Path) -> None:
    Bundle.open(folder, trust_notes=True)
    hashed.clear()
    Bundle.open(shutil.copytree(folder, tmp_path / "copy"), trust_notes=True)
    assert "model.onnx" in hashed


def test_what_was_just_written_and_what_is_small_leaves_no_note(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_files, "SETTLED_SECONDS", 3600)
    Bundle.open(folder, trust_notes=True)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "notes"))
    Bundle.open(folder, trust_notes=True)
    assert not (tmp_path / "notes").exists()


def test_a_damaged_note_and_a_folder_that_cannot_be_written_cost_only_the_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bundle.open(folder, trust_notes=True)
    for note in (tmp_path / "notes").rglob("*.json"):
        note.write_text("[")
    Bundle.open(folder, trust_notes=True)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    Bundle.open(folder, trust_notes=True)


def test_generate_hashes_once_and_again_when_it_is_asked_to(folder: Path, hashed: list[str], monkeypatch) -> None:
    from deploy.cli import generate

    options = generate.GenerateOptions(bundle=folder, output=folder.parent / "out.png")
    monkeypatch.setattr(generate, "prompts_of", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    for check, read in ((False, True), (False, False), (True, True)):
        hashed.clear()
        with pytest.raises(KeyboardInterrupt):
            generate.generate_files(dataclasses.replace(options, check=check), {})
        assert ("model.onnx" in hashed) == read
