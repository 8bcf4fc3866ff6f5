"""The gallery finds the image that was asked for, and refuses what it cannot score."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from deploy.reference_models.retrieval import Gallery
from runtimes.errors import InputError

NAMES = ("red apple", "cat", "yellow bus", "tree", "house")


@pytest.fixture
def gallery(tmp_path) -> Gallery:
    rng = np.random.default_rng(0)
    sheet = np.full((64, 96, 3), 255, np.uint8)  # 3 columns, 2 rows, the last tile unused
    for i in range(len(NAMES)):
        blocks = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        sheet[i // 3 * 32 : i // 3 * 32 + 32, i % 3 * 32 : i % 3 * 32 + 32] = blocks
    Image.fromarray(sheet).save(tmp_path / "gallery.png")
    return Gallery.load(tmp_path / "gallery.png", NAMES, columns=3)


def enlarged(gallery: Gallery) -> np.ndarray:
    return gallery.tiles.repeat(2, axis=1).repeat(2, axis=2)


def test_tiles_are_cut_row_by_row(gallery, tmp_path):
    sheet = np.asarray(Image.open(tmp_path / "gallery.png"), np.float32) / 255
    assert gallery.tiles.shape == (5, 32, 32, 3)
    np.testing.assert_array_equal(gallery.tiles[4], sheet[32:, 32:64])


def test_the_images_themselves_are_all_found(gallery):
    assert gallery.score(enlarged(gallery), NAMES) == 1.0


def test_a_shift_of_a_pixel_and_some_noise_cost_nothing(gallery):
    shifted = np.roll(enlarged(gallery), 1, axis=2) + np.random.default_rng(1).normal(0, 0.05, (5, 64, 64, 3))
    assert gallery.score(shifted, NAMES) == 1.0


def test_the_wrong_subject_is_a_miss(gallery):
    assert gallery.score(enlarged(gallery)[[1, 0, 2, 3, 4]], NAMES) == pytest.approx(0.6)


def test_a_image_that_is_not_finite_is_a_miss(gallery):
    images = enlarged(gallery)
    images[0, 0, 0, 0] = np.nan
    assert gallery.nearest(images).tolist() == [-1, 1, 2, 3, 4]
    assert gallery.score(images, NAMES) == pytest.approx(0.8)


def test_an_unknown_prompt_names_the_nearest(gallery):
    with pytest.raises(InputError, match="did you mean yellow bus"):
        gallery.score(enlarged(gallery)[:1], ["yelow bus"])


def test_bad_galleries_and_images_are_refused(gallery, tmp_path):
    with pytest.raises(InputError, match="9 names in 3 columns need 96x96"):
        Gallery.load(tmp_path / "gallery.png", list("abcdefghi"), columns=3)
    with pytest.raises(InputError, match="cannot read the gallery"):
        Gallery.load(tmp_path / "none.png", NAMES)
    with pytest.raises(InputError, match="given twice"):
        Gallery.load(tmp_path / "gallery.png", ["cat"] * 5, columns=3)
    with pytest.raises(InputError, match="40x64"):
        gallery.score(np.zeros((1, 64, 40, 3)), NAMES[:1])
    with pytest.raises(InputError, match="2 images for 1 prompts"):
        gallery.score(enlarged(gallery)[:2], NAMES[:1])
