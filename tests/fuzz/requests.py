"""Calls of the pipeline: prompts, sizes, strengths, guidance, seeds, and images and masks of every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtimes.schedulers import CLASS_NAMES, SCHEDULERS
from tests.fuzz.case import Embedding, Model, Picture, Request
from tests.fuzz.choices import Choices

LONG = "a red apple under the tree near the house with a dog and a cat over the moon " * 3
PROMPTS = (
    "a red apple on the house", "", "grinning cat, 3d!", "(red:1.3) apple [blue] ((cat)) {dog}", LONG,
    "naïve café über straße", "cafe\u0301 A\u030angstro\u0308m", "кот на дереве 猫 الثور",
    "a \U0001f600 cat\u200d\ufe0f", "\ufeffa cat", "  a   cat \n\t dog ", "A RED APPLE",
    "it's they're don't we'll",
    "!!! ... ???", "&amp; &#39; <b>",
    "<|endoftext|> a cat", "cat<|startoftext|>dog", "1234567890 2024", "a\x00cat \x07", "İstanbul ﬁne ½ ǅ", "_a_b-c_",
    "a\u00a0cat\u3000dog", "\U0001d4d0\U0001d4eb\U0001d4ec", "<cat",
)
WITH_WORDS = ("a {} on the house", "{}", "{}{} cat", "a {}s, ({}:1.2)", "big{} {}_1", "{}!", "A {} B")
WITH_ETA = ("ddim", "tcd")
GUIDANCE = (4.0, None, 1.0, 0.0, 7.5, 1.5, -1.0)
# pixels: multiples of 8 that a U-Net halves evenly and others, and numbers that diffusers refuses
SIZES = (None, (32, 32), (48, 32), (40, 56), (24, 40), (64, 64), (16, 16), (8, 24))
BAD_SIZES = ((36, 32), (33, 32), (30, 30))
STRENGTHS = (None, 0.5, 0.8, 1.0, 0.3, 0.99)
BAD_PROMPTS = ("a lone surrogate \ud800", "word " * 1200)
IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "P with transparency", "1", "I;16", "CMYK", "I", "F")
IMAGE_SIZES = ((32, 32), (40, 48), (64, 32), (35, 33), (50, 50), (24, 24), (100, 20))
MASK_SHOWS = ("half", "box", "gradient", "white", "black", "grey 127", "grey 128", "noise")
SIZE_CONDITIONS = ("none", "original", "crop", "target", "all")


def choose(choices: Choices, model: Model, embeddings: tuple[Embedding, ...]) -> Request:
    """A call that the model's family knows."""
    plain = model.kind.startswith("ldm")
    mode = "text" if plain else choices.pick(f"request.mode of {model.kind}", _modes(model.kind), often=1)
    if choices.invalid == "mode of other networks" and not plain:
        mode = "text"
    prompts: tuple[str, ...] = ("",)
    if model.kind != "ldm":
        prompts = tuple(_prompt(choices, model, embeddings) for _ in range(choices.pick("request.prompts", (1, 2), 2)))
    copies = choices.pick("request.images per prompt", (1, 2), often=2)
    count = len(prompts) * copies
    image, mask, size = None, None, None
    if mode != "text":
        image = _picture(choices, "image", ("noise", "gradient"))
    if mode == "mask":
        mask = _picture(choices, "mask", MASK_SHOWS, None if choices.flag("mask.other size") else image)
    if mode != "image" and model.kind != "ldm":
        size = choices.pick("request.size", SIZES, often=2)
        if choices.invalid == "size":
            size = choices.pick("request.bad size", BAD_SIZES, counted=False)
    latents = choices.flag("request.latents") if mode == "text" and model.kind != "ldm" else False
    negative = None if model.kind == "ldm" else _negative(choices, model, embeddings, len(prompts))
    if model.kind == "ldm-text":
        negative = None
    scheduler = choices.pick("request.scheduler", (None, *SCHEDULERS), often=3 * len(SCHEDULERS))
    method = scheduler or CLASS_NAMES.get(model.edits["model_index.json"]["scheduler"][1])
    return Request(
        mode=mode, prompts=prompts, negative=negative, images_per_prompt=copies,
        steps=choices.pick("request.steps", (2, 1, 3, 5, 9)) + (0 if mode == "text" else 3),
        guidance=None if model.kind == "ldm" else choices.pick("request.guidance", GUIDANCE, often=2),
        rescale=choices.pick("request.guidance_rescale", (0.0, 0.7, 1.0), often=2)
        if mode == "text" and not plain else 0.0,
        eta=choices.pick("request.eta", (0.0, 1.0, 0.3), often=1)
        if choices.invalid == "eta" or method in WITH_ETA else 0.0,
        seeds=tuple(choices.pick("request.seed", (0, 1, 2**31, 2**40 + 7)) + i for i in range(count)),
        latents=latents, height=size and size[0], width=size and size[1],
        strength=None if mode == "text" else 0.0 if choices.invalid == "strength"
        else choices.pick("request.strength", STRENGTHS),
        image=image, mask=mask,
        scheduler=scheduler,
        output=choices.pick("request.output", ("numpy", "pil", *(() if plain else ("latents",))), often=2),
        sizes=choices.pick("request.sizes", SIZE_CONDITIONS) if model.kind in ("xl", "refiner") else "none",
        last=choices.pick("request.last", (1.0, 0.8, 0.5), often=3) if model.kind == "xl" and mode == "text" else 1.0)


def _modes(kind: str) -> tuple[str, ...]:
    return {"inpaint": ("mask",), "refiner": ("image", "mask")}.get(kind, ("text", "image", "mask"))


def _prompt(choices: Choices, model: Model, embeddings: tuple[Embedding, ...]) -> str:
    if choices.invalid == "prompt":
        return choices.pick("request.bad prompt", BAD_PROMPTS, counted=False)
    words = [*model.words, *(e.token for e in embeddings)]
    if not words or choices.flag("prompt.without the words", often=3):
        return choices.pick("prompt", PROMPTS)
    template = choices.pick("prompt.around the word", WITH_WORDS)
    return template.format(*(choices.pick("prompt.word", words, counted=False) for _ in range(template.count("{}"))))


def _negative(choices: Choices, model: Model, embeddings: tuple[Embedding, ...], count: int) -> tuple[str, ...] | None:
    form = choices.pick("request.negative prompt", ("none", "empty", "one", "one each"))
    if form == "none":
        return None
    if form == "empty":
        return ("",)
    return tuple(_prompt(choices, model, embeddings) for _ in range(1 if form == "one" else count))


def _picture(choices: Choices, what: str, shows: tuple[str, ...], like: Picture | None = None) -> Picture:
    mode = choices.pick(f"{what}.mode", IMAGE_MODES, often=3)
    form = choices.pick(f"{what}.form", ("pil", "png", "jpeg", "tiff", "array"), often=1)
    if form == "jpeg" and mode not in ("RGB", "L", "CMYK"):
        form = "png"
    if form == "png" and mode in ("CMYK", "F", "I"):
        form = "tiff"
    if form == "pil" and what == "image" and choices.invalid != "image mode":
        mode = "RGB"  # diffusers takes three channels only from a caller; files it converts
    if form == "array":
        mode = "RGB" if what == "image" else "L"
    return Picture(choices.pick(f"{what}.shows", shows), mode,
                   like.size if like else choices.pick(f"{what}.size", IMAGE_SIZES, often=2), form,
                   choices.pick(f"{what}.orientation", (1, 6, 3), often=4) if form != "array" else 1)


# ---- pixels -------------------------------------------------------------------------------------------------------


def make_picture(picture: Picture, folder: Path, name: str, seed: int) -> Any:
    """The image as a caller has it: a Pillow image, a path, or (H, W, 3) or (H, W) float32 in 0..1."""
    image = in_mode(_grey(picture, seed) if name == "mask" else _colours(picture, seed), picture.mode)
    if picture.form == "array":
        import numpy as np

        return np.asarray(image, np.float32) / np.float32(255)
    if picture.orientation != 1:
        from PIL import ExifTags

        image.getexif()[ExifTags.Base.Orientation] = picture.orientation
    if picture.form == "pil":
        return image
    file = folder / f"{name}.{picture.form}"
    image.save(file, exif=image.getexif())
    return file


def _colours(picture: Picture, seed: int) -> Any:
    """RGBA with contrast at every scale, transparent towards the right."""
    import numpy as np
    from PIL import Image

    width, height = picture.size
    if picture.shows == "noise":
        small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        rgb = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    else:
        down, right = np.mgrid[0:height, 0:width]
        rgb = np.stack([255 * right / max(width - 1, 1), 255 * down / max(height - 1, 1),
                        255 * ((right // 8 + down // 8) % 2)], axis=-1).astype(np.uint8)
    alpha = np.linspace(255, 0, width).astype(np.uint8)[None, :, None].repeat(height, 0)
    return Image.fromarray(np.concatenate([rgb, alpha], axis=2))


def _grey(picture: Picture, seed: int) -> Any:
    """A mask as RGBA, transparent towards the right."""
    import numpy as np
    from PIL import Image

    width, height = picture.size
    grey = np.zeros((height, width), np.uint8)
    if picture.shows == "half":
        grey[:, : width // 2] = 255
    elif picture.shows == "box":
        grey[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = 255
    elif picture.shows == "gradient":
        grey[:] = np.linspace(0, 255, width).astype(np.uint8)
    elif picture.shows == "noise":
        grey[:] = np.random.default_rng(seed + 1).integers(0, 256, grey.shape)
    else:
        grey[:] = {"white": 255, "black": 0, "grey 127": 127, "grey 128": 128}[picture.shows]
    alpha = np.linspace(255, 0, width).astype(np.uint8)[None].repeat(height, 0)
    return Image.fromarray(np.stack([grey, grey, grey, alpha], axis=-1))


def in_mode(image: Any, mode: str) -> Any:
    """An RGBA image in another of Pillow's modes; one with 16 bits or floats uses all of their range."""
    import numpy as np
    from PIL import Image

    if mode == "P with transparency":
        palette = image.convert("RGB").quantize(64)
        palette.info["transparency"] = 3
        return palette
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(image.convert("L"))
        wide: dict[str, np.ndarray[Any, Any]] = {"I;16": grey.astype(np.uint16) * 257, "F": grey.astype(np.float32),
                                                 "I": grey.astype(np.int32) * 257}
        return Image.fromarray(wide[mode])
    if mode == "LA":
        return image.convert("LA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)
