"""Files of generated images: their pixels, what they say of themselves, and what the safety policy makes of them."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from runtimes.errors import InputError
from runtimes.inputs.image_texts import MOST_EXIF, exif, texts_of
from runtimes.serving.engine.contract import Generated
from runtimes.serving.state.order import KINDS, Order, Output
from runtimes.serving.state.written_images import encoded, written

DIGEST = "d" * 64


def images(count: int = 2, side: int = 32) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(count)]


def order(written_as: Output | None = None, **fields: object) -> Order:
    values = {"prompt": "a red apple, 苹果", "seed": 7, "steps": 4, "images_per_prompt": 2, **fields}
    return Order.of("emoji", values, output=written_as)


def read(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_says_how_its_image_was_made_in_every_kind(kind):
    asked = order(Output(kind), negative_prompt="blurry", scheduler="euler", guidance_scale=3.5, height=64,
                  width=64)
    files = written(Generated(images(), DIGEST), asked)
    for number, file in enumerate(files):
        image = read(file.content)
        assert (image.format or "").lower() == kind == file.kind and image.size == (32, 32)
        assert hashlib.sha256(file.content).hexdigest() == file.sha256 and file.seed == 7 + number
        assert texts_of(image) == {
            "prompt": "a red apple, 苹果", "seed": str(7 + number), "negative_prompt": "blurry", "steps": "4",
            "scheduler": "euler", "guidance_scale": "3.5", "size": "32x32", "model": "emoji", "bundle": DIGEST,
            "software": "ldm-deploy"}


def test_png_is_lossless_and_jpeg_and_webp_take_their_quality():
    (image,) = images(1, 64)
    np.testing.assert_array_equal(np.asarray(read(encoded(image, "png"))), np.asarray(image))
    for kind in ("jpeg", "webp"):
        sizes = [len(encoded(image, kind, quality)) for quality in (0, 30, 60, 89, 90, 100)]
        assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    with pytest.raises(InputError, match="gif"):
        encoded(image, "gif")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_order_gives_the_same_bytes_and_metadata_can_be_left_out(kind):
    twice = [[f.content for f in written(Generated(images(), DIGEST), order(Output(kind)))] for _ in range(2)]
    assert twice[0] == twice[1] and twice[0][0] != twice[0][1]
    plain = [written(Generated(images(), DIGEST), order(Output(kind, metadata=False))),
             written(Generated(images(), DIGEST), order(Output(kind)), metadata=False)]
    assert plain[0] == plain[1]
    for file in plain[0]:
        assert texts_of(read(file.content)) == {} and b"apple" not in file.content


def test_flagged_images_are_marked_replaced_or_not_looked_at():
    made = Generated(images(), DIGEST, flagged=(False, True))
    files = {policy: written(made, order(), safety=policy) for policy in ("off", "flag", "replace")}
    assert [[f.flagged for f in of] for of in files.values()] == [[False, False], [False, True], [False, True]]
    assert [f.content for f in files["off"]] == [f.content for f in files["flag"]]
    assert files["replace"][0] == files["flag"][0]
    black = read(files["replace"][1].content)
    assert not np.asarray(black).any() and texts_of(black)["safety"] == "replaced"
    with pytest.raises(InputError, match="'never'"):
        written(made, order(), safety="never")


def test_arrays_are_no_image_files():
    with pytest.raises(InputError, match="numpy"):
        written(Generated(np.zeros((2, 8, 8, 3), np.float32)), order(output="numpy"))


def test_what_a_jpeg_cannot_hold_is_cut_and_says_so():
    said = exif({"prompt": "猫" * 30_000, "seed": "1"})
    file = io.BytesIO()
    images(1)[0].save(file, "JPEG", exif=said)
    found = texts_of(read(file.getvalue()))
    assert found["seed"] == "1" and found["cut"] == "prompt" and 0 < len(found["prompt"]) < MOST_EXIF / 6


def test_another_programs_comments_are_no_texts():
    (image,) = images(1)
    for comment in (b"ASCII\0\0\0nonsense", b"UNICODE\0\0a", b"ASCII\0\0\0[1]"):
        said = Image.Exif()
        said.get_ifd(0x8769)[0x9286] = comment
        file = io.BytesIO()
        image.save(file, "JPEG", exif=said)
        assert texts_of(read(file.getvalue())) == {}
