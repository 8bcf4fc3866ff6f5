"""OpenAI's client, unmodified, against a real server: generate, edit, stream, models, and errors as its exceptions."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator

import numpy as np
import openai
import pytest
from PIL import Image

import runtimes
from runtimes.inputs.request import Request
from runtimes.serving.engine.catalog import Catalog
from runtimes.serving.engine.engine import Engine
from tests.serving.http_server import MODEL, Serving, serving, slow_pipeline, wait_for
from tests.serving.tiny_bundles import tiny_bundle


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("state"), {"fake": slow_pipeline(0.002)}) as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.openai()


def opened(b64_json: str | None) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(b64_json or "")))
    image.load()
    return image


def same(image: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(other))


def file_of(image: Image.Image, kind: str = "PNG") -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, kind)
    stream.name = f"image.{kind.lower()}"
    stream.seek(0)
    return stream


def noise(size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))


def hole(size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A mask whose left half is transparent."""
    alpha = np.full((size[1], size[0], 4), 255, np.uint8)
    alpha[:, : size[0] // 2, 3] = 0
    return Image.fromarray(alpha)


def test_an_image_is_what_the_pipeline_makes_of_the_same_request(client):
    answer = client.images.generate(prompt="a cat", size="40x24", extra_body={
        "seed": 7, "num_inference_steps": 5, "guidance_scale": 3.5, "scheduler": "euler", "negative_prompt": "a dog"})
    expected = slow_pipeline()(Request("a cat", negative_prompt="a dog", seed=7, steps=5, guidance_scale=3.5,
                                       scheduler="euler", width=40, height=24))[0]
    assert answer.data is not None and answer.data[0].b64_json is not None
    image = opened(answer.data[0].b64_json)
    assert image.size == (40, 24) and same(image, expected)
    assert (answer.size, answer.output_format, answer.quality) == ("40x24", "png", "medium")
    assert answer.background == "opaque"
    assert answer.usage is not None and answer.usage.output_tokens == 5
    assert answer.usage.input_tokens_details.text_tokens == 4
    assert answer.data[0].model_extra == {"seed": 7, "flagged": None}


def test_several_images_have_seeds_that_make_each_again(client):
    many = client.images.generate(prompt="a cat", n=3, extra_body={"num_inference_steps": 3})
    assert many.data is not None and len(many.data) == 3
    for image in many.data:
        assert image.model_extra is not None
        again = client.images.generate(prompt="a cat", extra_body={"num_inference_steps": 3,
                                                                   "seed": image.model_extra["seed"]})
        assert again.data is not None
        assert same(opened(image.b64_json), opened(again.data[0].b64_json))


@pytest.mark.parametrize(("kind", "shown"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_images_are_written_as_asked(client, kind, shown):
    answer = client.images.generate(prompt="a cat", output_format=kind, extra_body={"num_inference_steps": 2})
    assert answer.data is not None and opened(answer.data[0].b64_json).format == shown and answer.output_format == kind


def test_compression_makes_files_smaller(client):
    sizes = []
    for compression in (95, 10):
        answer = client.images.generate(prompt="a cat", output_format="jpeg", output_compression=compression,
                                        size="64x64", extra_body={"num_inference_steps": 2, "seed": 1})
        assert answer.data is not None and answer.data[0].b64_json is not None
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[1] < sizes[0]


def test_an_address_gives_the_image_to_whom_it_was_given(server, client):
    answer = client.images.generate(prompt="a cat", response_format="url", extra_body={"num_inference_steps": 2})
    assert answer.data is not None and answer.data[0].url is not None
    image = server.anybody.get(answer.data[0].url)
    assert image.status_code == 200 and image.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(image.content)).size == (32, 32)


@pytest.mark.parametrize(("steps", "asked", "expected"), [(6, 3, 3), (3, 3, 2), (1, 2, 0), (6, 0, 0)])
def test_a_stream_shows_as_many_previews_as_there_are_steps_between(client, steps, asked, expected):
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=asked,
                                         extra_body={"num_inference_steps": steps, "seed": 3}))
    assert [e.type for e in events] == ["image_generation.partial_image"] * expected + ["image_generation.completed"]
    assert [e.partial_image_index for e in events if e.type == "image_generation.partial_image"] == list(
        range(expected))
    last = events[-1]
    assert last.type == "image_generation.completed" and last.usage.output_tokens == steps
    assert all(opened(event.b64_json).size == (32, 32) for event in events)
    whole = client.images.generate(prompt="a cat", extra_body={"num_inference_steps": steps, "seed": 3})
    assert whole.data is not None and whole.data[0].b64_json == last.b64_json


def test_a_stream_of_several_images_says_which_each_event_is_of(client):
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=1, n=2,
                                         extra_body={"num_inference_steps": 4}))
    assert [(e.type.partition(".")[2], (e.model_extra or {})["image_index"]) for e in events] == [
        ("partial_image", 0), ("partial_image", 1), ("completed", 0), ("completed", 1)]


def test_an_edit_starts_from_the_image(client):
    image = noise()
    edit = client.images.edit(image=file_of(image), prompt="a cat", extra_body={
        "seed": 5, "num_inference_steps": 4, "strength": 0.5})
    expected = slow_pipeline()(Request("a cat", image=image, seed=5, steps=4, strength=0.5))[0]
    assert edit.data is not None and same(opened(edit.data[0].b64_json), expected)
    assert edit.usage is not None and edit.usage.input_tokens_details.image_tokens == 1


def test_only_what_is_transparent_in_the_mask_is_painted_anew(client):
    image = noise()
    edit = client.images.edit(image=[file_of(image)], mask=file_of(hole()), prompt="a cat", extra_body={
        "seed": 5, "num_inference_steps": 4})
    white = np.zeros((32, 32), np.uint8)
    white[:, :16] = 255
    expected = slow_pipeline()(Request("a cat", image=image, mask=Image.fromarray(white), seed=5, steps=4))[0]
    assert edit.data is not None
    assert same(opened(edit.data[0].b64_json), expected)
    other = client.images.edit(image=file_of(image), mask=file_of(hole().transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
                               prompt="a cat", extra_body={"seed": 5, "num_inference_steps": 4})
    assert other.data is not None and not same(opened(other.data[0].b64_json), opened(edit.data[0].b64_json))


def test_an_edit_is_streamed(client):
    with client.images.edit(image=file_of(noise()), prompt="a cat", stream=True, partial_images=2,
                            extra_body={"num_inference_steps": 8}) as stream:
        kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


@pytest.mark.parametrize("image", [
    noise().convert("RGBA"), noise().convert("L"), noise().quantize(16), noise((48, 40)), noise((100, 50)),
], ids=["alpha", "grey", "palette", "another size", "a size that is not made"])
def test_images_of_other_modes_and_sizes_are_taken(client, image):
    edit = client.images.edit(image=file_of(image), prompt="a cat", extra_body={"num_inference_steps": 2})
    made = {(48, 40): "48x40", (100, 50): "48x24"}.get(image.size, "32x32")
    assert edit.size == made


def test_models_are_listed_and_found_by_name(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["fake"] and listed[0].model_extra is not None
    assert listed[0].model_extra["digest"] == "f" * 64 and listed[0].model_extra["size"] == "32x32"
    assert client.models.retrieve("fake").created == MODEL.created


@pytest.mark.parametrize(("fields", "kind", "param", "says"), [
    ({"model": "dall-e-3"}, openai.NotFoundError, "model", "no model 'dall-e-3'"),
    ({"size": "33x32"}, openai.BadRequestError, "size", "nearest: 32x32, 40x32"),
    ({"size": "1000x8"}, openai.BadRequestError, "size", "nearest: 64x16"),
    ({"n": 9}, openai.BadRequestError, "n", "allows 8"),
    ({"background": "transparent"}, openai.BadRequestError, "background", "opaque"),
    ({"quality": "high"}, openai.BadRequestError, "quality", "was not measured"),
    ({"quality": "ultra"}, openai.BadRequestError, "quality", "'high'"),
    ({"style": "vivid"}, openai.BadRequestError, "style", "unknown field 'style'"),
    ({"output_compression": 50}, openai.BadRequestError, "output_compression", "png"),
    ({"extra_body": {"num_inference_steps": 151}}, openai.BadRequestError, "num_inference_steps", "allows 150"),
    ({"extra_body": {"scheduler": "magic"}}, openai.BadRequestError, "scheduler", "one of ddim"),
    ({"extra_body": {"seed": "7"}}, openai.BadRequestError, "seed", "integer"),
    ({"extra_body": {"image_url": "http://127.0.0.1/x.png"}}, openai.BadRequestError, "image_url", "unknown field"),
    ({"extra_body": {"aspect": "16:9"}, "size": "32x32"}, openai.BadRequestError, "aspect", "both"),
    ({"partial_images": 2}, openai.BadRequestError, "partial_images", "stream"),
])
def test_what_cannot_be_done_is_refused_by_its_field_as_the_clients_exception(client, fields, kind, param, says):
    with pytest.raises(kind) as caught:
        client.images.generate(**{"prompt": "a cat", **fields})
    assert caught.value.param == param and says in caught.value.message and caught.value.code


@pytest.mark.parametrize("fields", [
    {"user": "u"}, {"moderation": "low"}, {"background": "opaque"}, {"background": "auto"}, {"quality": "auto"},
    {"quality": "standard"}, {"size": "auto"}, {"extra_body": {"aspect": "2:1"}}, {"n": None},
    {"extra_body": {"guidance_interval": [0.2, 0.8], "eta": 0.5, "scheduler": "ddim", "guidance_rescale": 0.7}},
    {"extra_body": {"seed": [1, 2]}, "n": 2}, {"extra_body": {"tile": 32}, "size": "96x96"},
])
def test_what_openai_and_the_pipeline_know_is_accepted(client, fields):
    body = {"num_inference_steps": 2} | fields.pop("extra_body", {})
    answer = client.images.generate(prompt="a cat", extra_body=body, **fields)
    assert answer.data is not None and len(answer.data) == (fields.get("n") or 1)


@pytest.mark.parametrize(("files", "says"), [
    ({"image": noise(), "mask": noise()}, "has no transparency"),
    ({"image": noise(), "mask": hole((32, 40))}, "the mask is 32x40, the image 32x32"),
    ({"image": noise(), "mask": noise().convert("RGBA")}, "nothing of the mask"),
])
def test_a_mask_that_means_nothing_is_refused(client, files, says):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        client.images.edit(prompt="a cat", **{name: file_of(image) for name, image in files.items()})
    assert caught.value.param == "mask"


def test_two_images_are_refused_since_they_would_not_be_combined(client):
    with pytest.raises(openai.BadRequestError, match="one image is edited at a time"):
        client.images.edit(prompt="a cat", image=[file_of(noise()), file_of(noise())])


def test_a_full_queue_is_a_rate_limit_with_the_time_to_come_again(tmp_path):
    gate = threading.Event()
    with serving(tmp_path, {"fake": slow_pipeline(gate=gate)}, most_waiting=1, most_images=1) as server:
        client, pool = server.openai(), server.service.pool
        waiting = [threading.Thread(target=lambda: client.images.generate(prompt="a"), daemon=True) for _ in "12"]
        try:
            waiting[0].start()
            wait_for(lambda: pool.status().running == 1)
            waiting[1].start()
            wait_for(lambda: pool.status().waiting == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.images.generate(prompt="a")
            assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "queue_full"
        finally:
            gate.set()
            for thread in waiting:
                thread.join(20)


def test_a_draining_server_refuses_work_and_says_so(tmp_path):
    with serving(tmp_path) as server:
        server.service.state = "draining"
        with pytest.raises(openai.InternalServerError) as caught:
            server.openai().images.generate(prompt="a")
        assert caught.value.status_code == 503 and "draining" in caught.value.message


def test_a_wrong_key_is_an_authentication_error(tmp_path):
    with serving(tmp_path, keys={"lab": "0123456789abcdef"}) as server:
        server.openai().images.generate(prompt="a", extra_body={"num_inference_steps": 1})
        for key in ("wrong", "0123456789abcdeg", "lab:0123456789abcdef"):
            with pytest.raises(openai.AuthenticationError):
                server.openai(api_key=key).images.generate(prompt="a")


def test_a_fault_in_the_middle_of_a_stream_is_the_clients_exception(tmp_path):
    with serving(tmp_path) as server:
        events = server.openai().images.generate(prompt="a", stream=True, partial_images=1, extra_body={
            "guidance_scale": 10_000.0, "cache_interval": 2, "num_inference_steps": 4})
        with pytest.raises(openai.APIError, match="step-cache"):
            list(events)


def test_a_bundle_of_graphs_is_served(tmp_path):
    """The whole of it: a catalog that reads the manifest, ONNX Runtime, files with the bundle's digest in them."""
    folder = tiny_bundle(tmp_path / "bundle")
    catalog, pool = Catalog([f"tiny={folder}"]), Engine({"tiny": runtimes.load(folder)})
    with serving(tmp_path / "state", pool, models=catalog) as server:
        answer = server.openai().images.generate(prompt="a cat", extra_body={"seed": 3, "num_inference_steps": 3})
        assert answer.data is not None
        image = opened(answer.data[0].b64_json)
        assert catalog["tiny"].digest in str(image.info) and image.size == (32, 32)
        assert str(tmp_path) not in server.client().get("/v1/models").text
