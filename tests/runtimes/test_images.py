"""Images and masks are read as diffusers' own processors read them; what they cannot read is one clear line."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtimes.codec import pixels
from runtimes.codec.pixels import open_image, open_mask, to_mask, to_pil, to_pixels
from runtimes.errors import InputError

RAMP = np.linspace(0, 255, 16).round().astype(np.uint8)
IMAGES, MASKS = (VaeImageProcessor(vae_scale_factor=8, **options) for options in
                 ({}, {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}))
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16",
         "I;16B", "F")
SIDES, EIGHTS = st.integers(1, 40), st.integers(1, 20)


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))


def made(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Random bytes in a mode, with a palette of random colours, one of them transparent, where it has one."""
    rng = np.random.default_rng(seed)
    size = {"I": 4, "F": 4, "I;16": 2, "I;16B": 2}.get(mode, len(Image.new(mode, (1, 1)).getbands()))
    if mode == "F":
        data = (rng.random((height, width)) * rng.choice([1, 300])).astype(np.float32).tobytes()
    elif mode == "I":
        data = rng.integers(-10, rng.choice([300, 70000]), (height, width), np.int32).tobytes()
    else:
        data = rng.bytes(size * width * height)
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width), np.uint8) * 255).convert("1")
    image = Image.frombytes(mode, (width, height), data)
    if mode in ("P", "PA"):
        image.putpalette(rng.bytes(768))
        image.info["transparency"] = 3
    return image


def theirs_of(function):
    """What diffusers makes of it as an array, or None where it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = function()
        except Exception:
            return None
    return np.concatenate([np.array(result.to(torch.float32))])


def ours_of(function):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()[None]
    except InputError as error:
        assert "\n" not in str(error)
        return None


def assert_equal_or_both_refused(mine, wanted) -> None:
    assert (mine is None) == (wanted is None)
    if wanted is not None:
        assert mine.dtype == np.float32 and mine.flags.c_contiguous
        np.testing.assert_array_equal(mine, wanted)


def of_three(pixels):
    """Upstream's encoder fails on any other number of channels, but for four, which it takes for latents."""
    assert pixels.shape[1] == 3
    return pixels


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(MODES), SIDES, SIDES, st.integers(0, 99), st.integers(1, 5), st.integers(1, 5))
def test_pillow_images_of_every_mode_are_read_as_diffusers_does(mode, width, height, seed, rows, columns):
    image = made(mode, width, height, seed)
    assert_equal_or_both_refused(
        ours_of(lambda: to_pixels(open_image(image), 8 * rows, 8 * columns)),
        theirs_of(lambda: of_three(IMAGES.preprocess(image, 8 * rows, 8 * columns))))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(MODES), SIDES, SIDES, st.integers(0, 99), st.integers(1, 5), st.integers(1, 5))
def test_pillow_masks_of_every_mode_are_read_as_diffusers_does(mode, width, height, seed, rows, columns):
    mask = made(mode, width, height, seed)
    assert_equal_or_both_refused(ours_of(lambda: to_mask(open_mask(mask), 8 * rows, 8 * columns)),
                                 theirs_of(lambda: MASKS.preprocess(mask, 8 * rows, 8 * columns)))


FILES = {"png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "jpg": ("L", "RGB", "CMYK"), "webp": ("RGB", "RGBA"),
         "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"), "gif": ("P", "L")}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from([(kind, mode) for kind, modes in FILES.items() for mode in modes]), SIDES, SIDES,
       st.integers(0, 99), st.integers(0, 8), st.integers(1, 4), st.integers(1, 4))
def test_files_are_read_as_load_image_reads_them(tmp_path_factory, file, width, height, seed, turn, rows, columns):
    kind, mode = file
    path = tmp_path_factory.getbasetemp() / f"image.{kind}"
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    made(mode, width, height, seed).save(path, exif=exif)
    size = 8 * rows, 8 * columns
    assert_equal_or_both_refused(ours_of(lambda: to_pixels(open_image(path), *size)),
                                 theirs_of(lambda: IMAGES.preprocess(load_image(str(path)), *size)))
    assert_equal_or_both_refused(ours_of(lambda: to_mask(open_mask(str(path)), *size)),
                                 theirs_of(lambda: MASKS.preprocess(load_image(str(path)), *size)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([np.float16, np.float32, np.float64]), SIDES, SIDES, st.integers(0, 99), EIGHTS, EIGHTS)
def test_arrays_are_read_as_diffusers_does(dtype, height, width, seed, rows, columns):
    array = np.random.default_rng(seed).random((height, width, 3)).astype(dtype)
    assert_equal_or_both_refused(to_pixels(open_image(array), 8 * rows, 8 * columns)[None],
                                 theirs_of(lambda: IMAGES.preprocess(array, 8 * rows, 8 * columns)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(["u1", "f2", "f4", "f8", "b1", "i4", "i8", "u2"]), st.sampled_from([1, 2, 255]), SIDES, SIDES,
       st.booleans(), st.integers(0, 99), EIGHTS, EIGHTS)
def test_arrays_of_masks_are_read_as_diffusers_does(dtype, top, height, width, axis, seed, rows, columns):
    mask = (np.random.default_rng(seed).random((height, width, 1) if axis else (height, width)) * top).astype(dtype)
    assert_equal_or_both_refused(ours_of(lambda: to_mask(open_mask(mask), 8 * rows, 8 * columns)),
                                 theirs_of(lambda: MASKS.preprocess(mask, 8 * rows, 8 * columns)))


def test_alpha_is_dropped_from_a_file_and_refused_in_memory(tmp_path):
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[:, :4] = 10, 20, 30, 0
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), pixels[..., :3])
    with pytest.raises(InputError, match=r'mode is RGBA, expected RGB \(image.convert\("RGB"\)'):
        open_image(image)


def test_a_file_is_turned_upright_and_an_image_in_memory_is_not(image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), image.transpose(Image.Transpose.ROTATE_270))
    with Image.open(tmp_path / "a.png") as opened:
        np.testing.assert_array_equal(open_image(opened), image)


def test_a_16_bit_png_in_colour_is_scaled(tmp_path):
    """Pillow writes none: three numbers of two bytes for each pixel, by hand."""
    row = b"\0" + (np.stack([RAMP, RAMP[::-1], RAMP], axis=1).astype(np.uint16) * 257).astype(">u2").tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", len(RAMP), 1, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                                     + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png"))[0, :, 1], RAMP[::-1])


def test_resizing_is_lanczos_into_minus_one_to_one(image):
    pixels = to_pixels(image, 12, 16)
    assert pixels.shape == (3, 12, 16) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    expected = np.asarray(image.resize((16, 12), Image.Resampling.LANCZOS)).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert to_pixels(Image.new("RGB", (4, 4), "white"), 4, 4).max() == 1


def test_arrays_become_images():
    made = to_pil(np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3))
    assert len(made) == 2 and made[0].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(made[1]).ravel(), np.arange(12, 24))


def write(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("opened", [open_image, open_mask])
@pytest.mark.parametrize(("source", "message"), [
    (lambda p: p / "none.png", "no such image"),
    (lambda p: p, "no such image"),
    (lambda p: write(p / "a.png", b"no image at all"), "not an image"),
    (lambda p: write(p / "a.png", b""), "not an image"),
    (lambda p: np.zeros((4, 4, 2), np.uint8), "shape"),
    (lambda p: np.zeros((0, 4, 3), np.float32), "shape"),
    (lambda p: np.zeros(4, np.float32), "shape"),
    (lambda p: b"bytes", "bytes is not an image"),
    (lambda p: Image.new("RGB", (0, 3)), "the image is empty"),
])
def test_what_is_no_image_is_said(opened, source, message, tmp_path):
    with pytest.raises(InputError, match=message):
        opened(source(tmp_path))


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros((4, 4, 3), np.int64), "int64"), (np.zeros((4, 4, 3), np.uint8), r"uint8.*image / np.float32\(255\)"),
    *((np.full((4, 4, 3), value), r"0\.\.1") for value in (2.0, -1.0, np.nan)),
    (np.zeros((4, 4)), r"shape \(4, 4\)"), (np.zeros((4, 4, 4)), r"shape \(4, 4, 4\)"),
])
def test_an_array_that_upstream_would_misread_or_fail_on_is_refused(array, message):
    with pytest.raises(InputError, match=message):
        open_image(array)


def test_a_mask_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="NaN"):
        open_mask(np.full((4, 4), np.nan))


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_truncated_image_is_said(image, tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    image.resize((200, 200)).save(file)
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(InputError, match="cannot read the image"):
        open_image(file)
    with Image.open(file) as opened, pytest.raises(InputError, match="cannot read the image"):
        open_mask(opened)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (4000, 4000)).save(tmp_path / "a.png")
    monkeypatch.setattr(pixels, "MAX_PIXELS", 1_000_000)
    with pytest.raises(InputError, match="more than 1,000,000 pixels"):
        open_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit raises
    with pytest.raises(InputError, match="more than"):
        open_image(tmp_path / "a.png")
    with pytest.raises(InputError, match="more than"):
        open_image(np.broadcast_to(np.float32(0), (2000, 2000, 3)))
