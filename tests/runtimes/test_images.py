"""Whatever picture a user has becomes upright RGB; what is not a picture is one clear line."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from runtimes import images
from runtimes.errors import InputError
from runtimes.images import open_image, to_pil, to_pixels

RAMP = np.linspace(0, 255, 16).round().astype(np.uint8)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))


def test_rgb_is_taken_as_it_is(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    for source in (picture, tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(picture)):
        np.testing.assert_array_equal(open_image(source), picture)
    np.testing.assert_array_equal(open_image(np.asarray(picture) / np.float32(255)), picture)


def test_transparent_parts_become_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    flat = np.asarray(open_image(Image.fromarray(pixels)))
    assert flat[0, :, 0].tolist() == [255, 127, 0]
    grey = Image.new("LA", (2, 1), (0, 0))
    assert np.asarray(open_image(grey)).tolist() == [[[255] * 3] * 2]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert np.asarray(open_image(palette)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_colour_modes_are_converted(picture, mode):
    converted = open_image(picture.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (8, 6)))
    assert converted.mode == "RGB" and converted.size == (8, 6)


def test_cmyk_jpegs_are_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red = np.asarray(open_image(tmp_path / "a.jpg"))[0, 0]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


@pytest.mark.parametrize("array", [
    RAMP.astype(np.uint16) * 257, RAMP.astype(np.int32) * 257, RAMP.astype(np.float32) / 255, RAMP.astype(np.float32)])
def test_deep_grey_is_scaled_not_clipped(array):
    result = np.asarray(open_image(Image.fromarray(np.atleast_2d(array))))
    np.testing.assert_array_equal(result[0, :, 0], RAMP)


def test_deep_grey_that_is_no_number_is_black():
    values = np.array([[np.nan, 0.0, 1.0], [np.nan, np.nan, -np.inf]], np.float32)
    assert np.asarray(open_image(Image.fromarray(values)))[..., 0].tolist() == [[0, 0, 255], [0, 0, 0]]
    assert not np.asarray(open_image(Image.new("F", (2, 2), float("nan")))).any()


def test_a_16_bit_png_is_scaled(tmp_path):
    Image.fromarray((RAMP.astype(np.uint16) * 257)[None]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png"))[0, :, 1], RAMP)


def test_a_16_bit_png_in_colour_is_scaled(tmp_path):
    """Pillow writes none: three numbers of two bytes for each pixel, by hand."""
    row = b"\0" + (np.stack([RAMP, RAMP[::-1], RAMP], axis=1).astype(np.uint16) * 257).astype(">u2").tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", len(RAMP), 1, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                                     + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png"))[0, :, 1], RAMP[::-1])


def test_exif_rotation_is_applied(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    np.testing.assert_array_equal(upright, picture.transpose(Image.Transpose.ROTATE_270))


def test_resizing_is_lanczos_into_minus_one_to_one(picture):
    pixels = to_pixels(picture, 12, 16)
    assert pixels.shape == (3, 12, 16) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    expected = np.asarray(picture.resize((16, 12), Image.Resampling.LANCZOS)).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert to_pixels(Image.new("RGB", (4, 4), "white"), 4, 4).max() == 1


def test_arrays_become_pictures():
    made = to_pil(np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3))
    assert len(made) == 2 and made[0].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(made[1]).ravel(), np.arange(12, 24))


def write(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("source", "message"), [
    (lambda p: p / "none.png", "no such image"),
    (lambda p: p, "no such image"),
    (lambda p: write(p / "a.png", b"no picture at all"), "not an image"),
    (lambda p: write(p / "a.png", b""), "not an image"),
    (lambda p: np.zeros((4, 4, 2), np.uint8), "shape"),
    (lambda p: np.zeros((0, 4, 3), np.uint8), "shape"),
    (lambda p: np.zeros((4, 4, 3), np.int64), "int64"),
    (lambda p: np.full((4, 4, 3), 2.0), "0..1"),
    (lambda p: np.full((4, 4, 3), np.nan), "0..1"),
    (lambda p: b"bytes", "bytes is not an image"),
])
def test_what_is_no_picture_is_said(source, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_image(source(tmp_path))


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_truncated_picture_is_said(picture, tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    picture.resize((200, 200)).save(file)
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(InputError, match="cannot read the image"):
        open_image(file)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (4000, 4000)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    with pytest.raises(InputError, match="more than 1,000,000 pixels"):
        open_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit raises
    with pytest.raises(InputError, match="more than"):
        open_image(tmp_path / "a.png")
    with pytest.raises(InputError, match="more than"):
        open_image(np.broadcast_to(np.uint8(0), (2000, 2000, 3)))
