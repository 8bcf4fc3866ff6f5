"""`Order`: one client's request as a server carries it out, complete and storable: the same order, the same images."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from PIL import Image

from runtimes.errors import InputError
from runtimes.inputs.noise import resolve_seeds
from runtimes.inputs.request import Request

KINDS = ("png", "jpeg", "webp")


@dataclass(frozen=True)
class Output:
    """How the images are written.

    Attributes:
        kind: "png", "jpeg" or "webp".
        compression: quality of jpeg and webp, 0 to 100; without effect on png.
        metadata: whether prompt, seed and digest are written into them.
    """

    kind: str = "png"
    compression: int = 100
    metadata: bool = True


@dataclass(frozen=True)
class Order:
    """What is generated, with which bundle, and how it is written.

    Attributes:
        model: name under which the bundle is served.
        fields: of `runtimes.Request`, JSON-able, seeds resolved; image and mask are in `files`.
        files: contents of image files by the field that they fill ("image", "mask"), as they were sent.
        output: how the images are written.
    """

    model: str
    fields: Mapping[str, Any]
    files: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    output: Output = field(default_factory=Output)

    @classmethod
    def of(cls, model: str, fields: Mapping[str, Any], files: Mapping[str, tuple[bytes, ...]] | None = None,
           output: Output | None = None) -> Order:
        """An order whose fields were checked, with its seeds resolved.

        Raises:
            InputError: a field or file that cannot be used.
        """
        order = cls(model, dict(fields), dict(files or {}), output or Output())
        request = order.request()
        return replace(order, fields={**fields, "seed": list(resolve_seeds(request.seed, request.count))})

    def request(self) -> Request:
        """As a pipeline takes it.

        Raises:
            InputError: a field or file that cannot be used.
        """
        images = {name: [opened(content, name) for content in contents] for name, contents in self.files.items()}
        return Request.from_mapping({**self.fields, **images})

    def to_json(self) -> dict[str, Any]:
        """Everything but the files' contents, which are named by their sha256."""
        return {"model": self.model, "fields": dict(self.fields), "output": asdict(self.output),
                "files": {name: [sha256(content) for content in contents] for name, contents in self.files.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], contents: Mapping[str, bytes]) -> Order:
        """What `to_json` wrote.

        Args:
            values: of `to_json`.
            contents: of the files, by sha256.
        """
        files = {name: tuple(contents[key] for key in keys) for name, keys in values["files"].items()}
        return cls(values["model"], values["fields"], files, Output(**values["output"]))

    def key(self, digest: str) -> str:
        """Names the images that a bundle of this digest makes of it: 64 hexadecimal digits."""
        text = json.dumps([self.to_json(), digest], sort_keys=True, allow_nan=False)
        return sha256(text.encode())


def sha256(content: bytes) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def opened(content: bytes, where: str) -> Image.Image:
    """A file of a client as an image; of a size that was checked when it was received.

    Raises:
        InputError: not a whole image.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError("not a PNG, JPEG or WebP image", where=where) from error
    return image
