"""The catalog: names, pins, facts of a manifest without a session, and bundles that change under it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from runtimes.bundle.folder import Bundle
from runtimes.errors import BundleError, InputError, UnavailableError
from runtimes.inputs import quality_presets
from runtimes.inputs.quality_presets import Measured, Setting
from runtimes.inputs.request import Request
from runtimes.serving.engine.catalog import Catalog
from tests.serving.tiny_bundles import copied, remark, tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("catalog") / "tiny")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "cache"))


def test_a_bundle_is_served_under_its_folders_name_or_one_of_its_own(bundle, tmp_path):
    catalog = Catalog([bundle, f"other={copied(bundle, tmp_path / 'with=sign')}"])
    assert list(catalog) == ["tiny", "other"] and catalog["tiny"].digest == Bundle.open(bundle).manifest.digest


@pytest.mark.parametrize("name", ["", "a b", "../a", "a/b", ".hidden", "ä", "x" * 101, "a\n"])
def test_a_name_that_is_no_safe_one_is_refused(bundle, name):
    with pytest.raises(InputError):
        Catalog([f"{name}={bundle}"])


def test_two_of_one_name_and_none_at_all_are_refused(bundle):
    with pytest.raises(InputError, match="two bundles"):
        Catalog([bundle, f"tiny={bundle}"])
    with pytest.raises(InputError, match="no bundle"):
        Catalog([])


def test_the_facts_are_those_of_the_manifest(bundle):
    model = Catalog([bundle])["tiny"]
    assert (model.height, model.width, model.edits, model.inpaints, model.has_safety_checker) == (
        32, 32, True, False, False)
    assert (model.heights[0].min, model.heights[0].max, model.heights[1]) == (16, 64, 8)
    assert model.size_of("2:1")[1] > model.size_of("1:1")[1]
    assert "euler" in model.schedulers and model.bytes > 1000 and model.created > 1_600_000_000


def test_exact_is_what_was_measured_or_what_deterministic_makes_of_it(bundle):
    assert not Catalog([bundle])["tiny"].exact  # nothing was measured of this one
    assert Catalog([bundle], deterministic=True)["tiny"].exact


def test_no_library_that_runs_networks_is_loaded(bundle, run_python):
    code = """
import sys
from runtimes.serving.engine.catalog import Catalog
Catalog(sys.argv[1:])
print(sorted({"torch", "onnxruntime", "openvino", "fastapi"} & set(sys.modules)))
"""
    assert run_python(code, bundle).strip() == "[]"


def test_a_pin_allows_a_bundle_by_the_beginning_of_its_digest(bundle, tmp_path):
    digest = Catalog([bundle])["tiny"].digest
    assert Catalog([bundle], [digest[:12]])["tiny"].digest == digest
    assert Catalog([bundle], ["tiny=" + "0" * 8, f"tiny={digest.upper()}"])["tiny"].digest == digest
    with pytest.raises(InputError, match="the digest of tiny is"):
        Catalog([bundle], ["0" * 8])
    other = copied(bundle, tmp_path / "other")
    for pins, message in (([digest], "any of 2"), ([f"x={digest}"], "no bundle"), (["tiny=xyz"], "no digest"),
                          (["tiny=abc"], "no digest")):
        with pytest.raises(InputError, match=message):
            Catalog([bundle, other], pins)


def test_a_bundle_that_was_built_again_is_served_from_the_next_look_on(bundle, tmp_path):
    folder = copied(bundle, tmp_path / "m")
    catalog = Catalog([folder])
    before = catalog["m"]
    assert catalog.refresh() == []
    digest = remark(folder, "second")
    assert catalog.refresh() == ["m"] and catalog["m"].digest == digest != before.digest
    assert catalog.refresh() == []


def test_a_bundle_that_is_broken_or_half_copied_leaves_the_old_one_and_is_logged_once(bundle, tmp_path, caplog):
    folder = copied(bundle, tmp_path / "m")
    catalog = Catalog([folder])
    before = catalog["m"].digest
    decoder = folder / "components/vae_decoder/model.onnx"
    content = decoder.read_bytes()
    decoder.write_bytes(content[:-10])
    digest = remark_unchecked(folder)
    with caplog.at_level(logging.WARNING):
        assert catalog.refresh() == catalog.refresh() == []
    assert catalog["m"].digest == before and len(caplog.records) == 1 and "vae_decoder" in caplog.text
    decoder.write_bytes(content)
    assert catalog.refresh() == ["m"] and catalog["m"].digest == digest


def remark_unchecked(folder: Path) -> str:
    """As `remark`, of a folder that is not whole."""
    try:
        remark(folder, "second")
    except BundleError:
        pass
    from runtimes.bundle.manifest import parse

    return parse((folder / "manifest.json").read_text(encoding="utf-8"), "manifest.json").digest


def test_a_folder_that_is_gone_leaves_the_old_one(bundle, tmp_path, caplog):
    folder = copied(bundle, tmp_path / "m")
    catalog = Catalog([folder])
    folder.rename(tmp_path / "away")
    assert catalog.refresh() == [] and "m" in catalog
    (tmp_path / "away").rename(folder)
    assert catalog.refresh() == []


def test_a_pinned_bundle_is_not_replaced_by_another(bundle, tmp_path):
    folder = copied(bundle, tmp_path / "m")
    digest = Catalog([folder])["m"].digest
    catalog = Catalog([folder], [digest])
    remark(folder, "second")
    assert catalog.refresh() == [] and catalog["m"].digest == digest


def test_qualities_are_what_was_measured_also_after_the_start(bundle):
    catalog = Catalog([bundle])
    model = catalog["tiny"]
    assert model.preset("standard") == {}
    with pytest.raises(UnavailableError, match="tradeoffs") as caught:
        model.preset("draft")
    assert str(bundle) not in str(caught.value)
    with pytest.raises(InputError, match="unknown quality"):
        model.preset("ultra")
    quality_presets.save(model.digest, [Measured(Setting(4), 10, 25, None), Measured(Setting(25), 60, 40, None),
                                        Measured(Setting(10), 24, 30, None)])
    assert catalog.refresh() == []
    steps = [Request(**catalog["tiny"].preset(quality)).steps for quality in ("draft", "standard", "high")]
    assert steps == [4, 10, 25]
