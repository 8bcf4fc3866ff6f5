"""Hostile requests as data: what is sent, and the status that answers it. `python -m tests.serving.hostile` prints it.

Each is answered without an image being generated, with OpenAI's error object, and without a path of this machine.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests.serving.http_server import serving

GENERATE, EDIT, JOBS, TEXT2IMAGE = "/v1/images/generations", "/v1/images/edits", "/v1/jobs", "/sdapi/v1/txt2img"
JSON = {"content-type": "application/json"}
MOST_BODY = 1_000_000  # of the server that they are sent to


@dataclass(frozen=True)
class Hostile:
    """One request.

    Attributes:
        what: it tries.
        status: that answers it; several where the protocol leaves a choice.
        path, method: where it goes.
        body: bytes, an iterator of them (sent in chunks, without a length), or JSON.
        files: of a form.
        headers: of it.
        code: of the error object; "" where there is none.
    """

    what: str
    status: int
    path: str = GENERATE
    method: str = "POST"
    body: Any = None
    files: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None


def png(width: int, height: int, *, data: bytes | None = None, mode: str = "RGB") -> bytes:
    """A PNG file; with `data`, one whose header says so and whose content is that."""
    if data is None:
        stream = io.BytesIO()
        Image.new(mode, (width, height)).save(stream, "PNG")
        return stream.getvalue()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts)


def animated() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def endless(size: int) -> Iterator[bytes]:
    """Chunks of a body whose size is not said before."""
    yield b'{"prompt": "'
    for _ in range(size // 65_536 + 1):
        yield b"a" * 65_536
    yield b'"}'


def form(image: bytes = png(32, 32), **more: bytes) -> dict[str, tuple[str, bytes, str]]:
    return {name: (f"{name}.png", content, "image/png") for name, content in {"image": image, **more}.items()}


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


ASK = {"prompt": "a", "num_inference_steps": 1}
REQUESTS = [
    Hostile("no JSON", 400, body=b"{'prompt': 'a'}", headers=JSON, code="invalid_json"),
    Hostile("cut JSON", 400, body=b'{"prompt": "a', headers=JSON, code="invalid_json"),
    Hostile("empty body", 400, body=b"", headers=JSON, code="invalid_json"),
    Hostile("a list", 400, body=[1, 2], code="invalid_json"),
    Hostile("nesting of 100,000", 400, body=b"[" * 100_000, headers=JSON, code="invalid_json"),
    Hostile("nesting of 4,000, closed", 400, body=b'{"prompt":' * 4000 + b"1" + b"}" * 4000, headers=JSON,
            code="invalid_json"),
    Hostile("100,000 members", 400, body=json.dumps({f"k{n}": 1 for n in range(50_000)}).encode()[:900_000],
            headers=JSON, code="invalid_json"),
    Hostile("not UTF-8", 400, body=b'{"prompt": "\xff\xfe"}', headers=JSON, code="invalid_json"),
    Hostile("half a surrogate pair", 400, body=b'{"prompt": "\\ud800"}', headers=JSON, code="invalid_json"),
    Hostile("NaN", 400, body=b'{"prompt": "a", "guidance_scale": NaN}', headers=JSON, code="invalid_json"),
    Hostile("Infinity", 400, body=b'{"prompt": "a", "guidance_scale": Infinity}', headers=JSON, code="invalid_json"),
    Hostile("1e999, which is infinite", 400, body=b'{"prompt": "a", "guidance_scale": 1e999}', headers=JSON),
    Hostile("a whole number of 5,000 digits", 400, body=b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
            headers=JSON),
    Hostile("a seed of 2**64", 400, body={"prompt": "a", "seed": 2**64}, code="invalid_value"),
    Hostile("a number as prompt", 400, body={"prompt": 7}, code="invalid_value"),
    Hostile("an object as prompt", 400, body={"prompt": {"$ne": ""}}, code="invalid_value"),
    Hostile("no prompt", 400, body={}, code="missing_field"),
    Hostile("a prompt of 100,000 characters", 400, body={"prompt": "a" * 100_000}, code="invalid_value"),
    Hostile("n as text", 400, body={**ASK, "n": "2"}, code="invalid_value"),
    Hostile("n as truth", 400, body={**ASK, "n": True}, code="invalid_value"),
    Hostile("n of 10**9", 400, body={**ASK, "n": 10**9}, code="invalid_value"),
    Hostile("n of 0", 400, body={**ASK, "n": 0}, code="invalid_value"),
    Hostile("a million steps", 400, body={"prompt": "a", "num_inference_steps": 10**6}, code="invalid_value"),
    Hostile("99999x99999 pixels", 400, body={**ASK, "size": "99999x99999"}, code="invalid_size"),
    Hostile("tiles up to 64 million pixels", 400, body={**ASK, "size": "8000x8000", "tile": 32},
            code="limit_exceeded"),
    Hostile("a size of two billion digits' worth", 400, body={**ASK, "size": "9" * 50 + "x1"}, code="invalid_value"),
    Hostile("a URL to fetch", 400, body={**ASK, "image_url": "http://169.254.169.254/latest"}, code="unknown_field"),
    Hostile("a URL as image of a job", 400, JOBS, body={**ASK, "image": "http://127.0.0.1:22/"}, code="invalid_image"),
    Hostile("a file: URL as image of a job", 400, JOBS, body={**ASK, "image": "file:///etc/passwd"},
            code="invalid_image"),
    Hostile("a path as image of a job", 400, JOBS, body={**ASK, "image": "/etc/passwd"}, code="invalid_image"),
    Hostile("a field of Request that names files", 400, body={**ASK, "latents": "/etc/passwd"}, code="unknown_field"),
    Hostile("another output", 400, body={**ASK, "output": "latents"}, code="unknown_field"),
    Hostile("a model out of the folder", 404, body={**ASK, "model": "../../etc/passwd"}, code="model_not_found"),
    Hostile("a model with a newline", 404, body={**ASK, "model": "a\r\nSet-Cookie: x"}, code="model_not_found"),
    Hostile("a body beyond the limit, with its length", 413, body=b'{"prompt": "' + b"a" * MOST_BODY + b'"}',
            headers=JSON, code="request_too_large"),
    Hostile("a body beyond the limit, in chunks", 413, body=endless(2 * MOST_BODY), headers=JSON,
            code="request_too_large"),
    Hostile("a form beyond the limit", 413, EDIT, body={"prompt": "a"}, files=form(b"a" * 2 * MOST_BODY),
            code="request_too_large"),
    Hostile("XML", 415, body=b"<prompt/>", headers={"content-type": "application/xml"}, code="unsupported_media_type"),
    Hostile("no type of body", 415, body=b'{"prompt": "a"}', code="unsupported_media_type"),
    Hostile("JSON where a form is expected", 415, EDIT, body=ASK, code="unsupported_media_type"),
    Hostile("a form without boundary", 400, EDIT, body=b"--x", headers={"content-type": "multipart/form-data"},
            code="invalid_form"),
    Hostile("a cut form", 400, EDIT, body=b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na',
            headers={"content-type": "multipart/form-data; boundary=x"}),
    Hostile("a form of 1,000 fields", 400, EDIT, body={f"k{n}": "v" for n in range(1000)}, files=form(),
            code="invalid_form"),
    Hostile("an edit without image", 400, EDIT, body=ASK, files={"mask": ("m.png", png(32, 32), "image/png")},
            code="missing_field"),
    Hostile("a text as image", 400, EDIT, body=ASK, files=form(b"GIF89a" + b"\0" * 50), code="invalid_image"),
    Hostile("an SVG as image", 400, EDIT, body=ASK, files=form(b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
            code="invalid_image"),
    Hostile("an empty image", 400, EDIT, body=ASK, files=form(b""), code="invalid_image"),
    Hostile("a cut PNG", 400, EDIT, body=ASK, files=form(png(32, 32)[:60])),
    Hostile("a PNG bomb: 60,000 x 60,000 by its header", 400, EDIT, body=ASK,
            files=form(png(60_000, 60_000, data=zlib.compress(b"\0" * 1000))), code="image_too_large"),
    Hostile("a PNG bomb: 12,000 x 12,000 in 420 kB", 400, EDIT, body=ASK,
            files=form(png(12_000, 12_000, data=zlib.compress(b"\0" * 36_012_000, 9))), code="image_too_large"),
    Hostile("a PNG whose content is too short", 400, EDIT, body=ASK,
            files=form(png(64, 64, data=zlib.compress(b"\0" * 10)))),
    Hostile("an animated WebP", 400, EDIT, body=ASK, files=form(animated()), code="invalid_image"),
    Hostile("a mask without alpha", 400, EDIT, body=ASK, files=form(mask=png(32, 32)), code="invalid_mask"),
    Hostile("a mask of another size", 400, EDIT, body=ASK, files=form(mask=png(16, 32, mode="RGBA")),
            code="invalid_mask"),
    Hostile("NaN in a form", 400, EDIT, body={**ASK, "guidance_scale": "nan"}, files=form(), code="invalid_value"),
    Hostile("an unknown file of a form", 400, EDIT, body=ASK, files=form(payload=b"x"), code="unknown_field"),
    Hostile("an image of A1111 that is a URL", 400, "/sdapi/v1/img2img",
            body={"init_images": ["https://127.0.0.1/x.png"]}, code="invalid_image"),
    Hostile("a script of A1111", 400, TEXT2IMAGE, body={"script_name": "run", "script_args": ["rm"]},
            code="unsupported_field"),
    Hostile("scripts of A1111 that are always on", 400, TEXT2IMAGE, body={"alwayson_scripts": {"controlnet": {}}},
            code="unsupported_field"),
    Hostile("settings of A1111", 400, TEXT2IMAGE, body={"override_settings": {"outdir_samples": "/etc"}},
            code="unsupported_field"),
    Hostile("an image whose name leaves the folder", 404, "/v1/images/..%2f..%2fetc%2fpasswd.png", "GET",
            code="not_found"),
    Hostile("an image whose name is no hash", 400, "/v1/images/passwd.png", "GET", code="invalid_value"),
    Hostile("a page whose name is too long", 404, f"/studio/{'a' * 5000}", "GET", code="not_found"),
    Hostile("an image without a signature", 403, f"/v1/images/{'0' * 64}.png", "GET", code="forbidden"),
    Hostile("an image with a wrong signature", 403, f"/v1/images/{'0' * 64}.png?until=9999999999&signature=AAAA",
            "GET", code="forbidden"),
    Hostile("a page out of the folder", 404, "/studio/..%2f..%2f..%2f..%2fetc%2fpasswd", "GET", code="not_found"),
    Hostile("a page with a NUL", 404, "/studio/a%00b", "GET", code="not_found"),
    Hostile("a job with an id that leaves the table", 400, "/v1/jobs/x'%20OR%201=1", "GET", code="invalid_value"),
    Hostile("a job that is not there", 404, f"/v1/jobs/{'0' * 32}", "GET", code="job_not_found"),
    Hostile("a key of 10,000 characters", 400, JOBS, body=ASK, headers={"Idempotency-Key": "k" * 10_000},
            code="invalid_value"),
    Hostile("an unknown path", 404, "/v1/chat/completions", body=ASK, code="not_found"),
    Hostile("another method", 405, GENERATE, "GET", code="method_not_allowed"),
    Hostile("another site's page", 403, body=ASK, headers={"Origin": "https://evil.example"}, code="forbidden"),
    Hostile("a name that was made to mean this machine", 421, body=ASK, headers={"Host": "evil.example"},
            code="wrong_host"),
    Hostile("headers of 200 kB", 431, body=ASK, headers={"X-Large": "a" * 200_000}, code=""),
]


def send(client: httpx.Client, hostile: Hostile) -> httpx.Response:
    """One of them."""
    options: dict[str, Any] = {"headers": dict(hostile.headers)}
    if hostile.files:
        options |= {"data": hostile.body, "files": dict(hostile.files)}
    elif isinstance(hostile.body, dict | list):
        options["json"] = hostile.body
    elif hostile.body is not None:
        options["content"] = hostile.body
    return client.request(hostile.method, hostile.path, **options)


def main() -> int:
    """Send all to a server of this process, and print a table; how many were answered otherwise than said."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), max_body=str(MOST_BODY)) as server:
        for number, hostile in enumerate(REQUESTS, 1):
            answer = send(server.anybody, hostile)
            error = answer.json()["error"] if answer.headers.get("content-type") == "application/json" else {}
            wrong += answer.status_code != hostile.status
            print(f"{number:2}  {answer.status_code}{'' if answer.status_code == hostile.status else ' (!)'}  "
                  f"{hostile.what:52}  {error.get('code') or '-':22}  {error.get('message', '')[:90]}")
    print(f"{len(REQUESTS)} hostile requests, {wrong} answered otherwise than said")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
