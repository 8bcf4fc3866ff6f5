"""A1111's endpoints as Open WebUI, SillyTavern and webuiapi use them, and what is refused of its many fields."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from runtimes.inputs.request import Request
from tests.serving.hostile import b64, png
from tests.serving.http_server import Serving, serving, slow_pipeline, wait_for

# What `webuiapi` sends for txt2img("a cat"), every field of it.
WEBUIAPI = {
    "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "hr_resize_x": 0,
    "hr_resize_y": 0, "denoising_strength": 0.7, "firstphase_width": 0, "firstphase_height": 0, "prompt": "a cat",
    "styles": [], "seed": 3, "subseed": -1, "subseed_strength": 0.0, "seed_resize_from_h": 0, "seed_resize_from_w": 0,
    "batch_size": 1, "n_iter": 1, "steps": 3, "cfg_scale": 7.0, "width": 32, "height": 32, "restore_faces": False,
    "tiling": False, "do_not_save_samples": False, "do_not_save_grid": False, "negative_prompt": "", "eta": 1.0,
    "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "override_settings": {}, "sampler_name": "Euler a",
    "override_settings_restore_afterwards": True, "script_args": [], "script_name": None, "send_images": True,
    "save_images": False, "alwayson_scripts": {}, "use_deprecated_controlnet": None, "sampler_index": "Euler a"}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Serving]:
    pipelines = {"fake": slow_pipeline(), "other": slow_pipeline()}
    with serving(tmp_path_factory.mktemp("state"), pipelines) as found:
        yield found


@pytest.fixture
def client(server) -> httpx.Client:
    server.service.chosen.clear()
    return server.client()


def text2image(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a cat", "steps": 2} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_open_webui_finds_the_models_chooses_one_and_generates(client):
    """The calls of its routers/images.py, in order."""
    headers = {"authorization": ""}  # what it sends where no password is set
    models = client.get("/sdapi/v1/sd-models", headers=headers).json()
    assert [(model["title"], model["model_name"]) for model in models] == [("fake", "fake"), ("other", "other")]
    options = client.get("/sdapi/v1/options", headers=headers).json()
    assert options["sd_model_checkpoint"] == "fake"
    options["sd_model_checkpoint"] = models[1]["title"]
    client.post("/sdapi/v1/options", json=options, headers=headers).raise_for_status()
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "other"
    answer = client.post("/sdapi/v1/txt2img", headers=headers, json={
        "prompt": "a cat", "batch_size": 2, "width": 32, "height": 40, "steps": 2, "negative_prompt": "a dog",
        "cfg_scale": 5, "sampler_name": "Euler"}).json()
    assert len(answer["images"]) == 2 and opened(answer["images"][0]).size == (32, 40)
    info = json.loads(answer["info"])
    assert info["sd_model_name"] == "other" and len(info["all_seeds"]) == 2 and len(info["infotexts"]) == 2


def test_everything_that_webuiapi_sends_is_accepted_and_honoured(client):
    answer = client.post("/sdapi/v1/txt2img", json=WEBUIAPI)
    assert answer.status_code == 200, answer.text
    expected = slow_pipeline()(Request("a cat", seed=3, steps=3, guidance_scale=7.0, scheduler="euler-ancestral"))[0]
    assert np.array_equal(np.asarray(opened(answer.json()["images"][0])), np.asarray(expected))
    assert answer.json()["parameters"]["sampler_name"] == "Euler a"


def test_an_image_is_started_from_and_white_of_the_mask_painted(client):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    white = Image.new("L", (32, 32))
    white.paste(255, (0, 0, 16, 32))
    stream, other = io.BytesIO(), io.BytesIO()
    noise.save(stream, "PNG")
    white.save(other, "PNG")
    image, mask = b64(stream.getvalue()), b64(other.getvalue())
    fields = {"prompt": "a cat", "seed": 3, "steps": 4, "denoising_strength": 0.6, "init_images": [image]}
    plain = client.post("/sdapi/v1/img2img", json=fields)
    expected = slow_pipeline()(Request("a cat", image=noise, seed=3, steps=4, strength=0.6))[0]
    assert plain.status_code == 200 and np.array_equal(np.asarray(opened(plain.json()["images"][0])),
                                                       np.asarray(expected))
    masked = client.post("/sdapi/v1/img2img", json=fields | {
        "init_images": [f"data:image/png;base64,{image}"], "mask": mask, "mask_blur": 0, "inpainting_fill": 1,
        "inpaint_full_res": False})
    expected = slow_pipeline()(Request("a cat", image=noise, mask=white, seed=3, steps=4, strength=0.6))[0]
    assert masked.status_code == 200, masked.text
    assert np.array_equal(np.asarray(opened(masked.json()["images"][0])), np.asarray(expected))
    inverted = client.post("/sdapi/v1/img2img", json=fields | {"mask": mask, "inpainting_mask_invert": 1})
    assert inverted.json()["images"] != masked.json()["images"]


@pytest.mark.parametrize(("fields", "param"), [
    ({"enable_hr": True}, "enable_hr"), ({"restore_faces": True}, "restore_faces"), ({"tiling": True}, "tiling"),
    ({"styles": ["oil"]}, "styles"), ({"subseed_strength": 0.5}, "subseed_strength"),
    ({"seed_resize_from_w": 64}, "seed_resize_from_w"), ({"s_churn": 0.3}, "s_churn"), ({"s_noise": 0.9}, "s_noise"),
    ({"script_name": "x/y plot"}, "script_name"), ({"scheduler": "Karras"}, "scheduler"),
    ({"refiner_checkpoint": "xl"}, "refiner_checkpoint"), ({"alwayson_scripts": {"a": {}}}, "alwayson_scripts"),
    ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "override_settings"),
    ({"sampler_name": "DPM++ 2M Karras"}, "scheduler"), ({"new_field": 1}, "new_field"), ({"width": 33}, "width"),
    ({"steps": 151}, "num_inference_steps"), ({"batch_size": 4, "n_iter": 3}, "n"), ({"seed": -2}, "seed"),
    ({"tiling": 0}, "tiling"), ({"sampler_name": "Euler a", "eta": 0.5}, "eta"),
])
def test_what_changes_the_image_and_is_not_done_is_refused_by_name(client, fields, param):
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a cat", "steps": 2} | fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize("field", [{"mask_blur": 4}, {"inpainting_fill": 0}, {"inpaint_full_res": True},
                                   {"denoising_strength": 0}, {"resize_mode": 1}])
def test_what_is_not_done_under_a_mask_is_refused_by_name(client, field):
    image, mask = b64(png(32, 32)), b64(png(32, 32, mode="L"))
    answer = client.post("/sdapi/v1/img2img", json={"init_images": [image], "mask": mask} | field)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(field)), answer.text


def test_fields_without_effect_are_accepted_and_an_override_chooses_the_model(client):
    answer = text2image(client, save_images=True, force_task_id="t", hr_scale=4, scheduler="Automatic", s_tmax=None,
                        override_settings={"sd_model_checkpoint": "other"}, comments={}, send_images=False)
    assert answer["images"] == [] and json.loads(answer["info"])["sd_model_name"] == "other"
    missing = client.post("/sdapi/v1/txt2img", json={"override_settings": {"sd_model_checkpoint": "x"}})
    assert missing.status_code == 404


@pytest.mark.parametrize(("body", "status"), [
    ({"sd_model_checkpoint": "absent"}, 404), ({"CLIP_stop_at_last_layers": 2}, 400), ({"samples_format": "jpg"}, 400),
    ({"sd_checkpoint_hash": "0" * 64}, 400), ({"sd_model_checkpoint": None}, 200),
])
def test_settings_that_there_are_not_cannot_be_changed(client, body, status):
    assert client.post("/sdapi/v1/options", json=body).status_code == status


def test_samplers_have_the_names_that_clients_know_and_each_can_be_used(client):
    names = [sampler["name"] for sampler in client.get("/sdapi/v1/samplers").json()]
    assert {"Euler", "Euler a", "DPM++ 2M", "DDIM"} <= set(names)
    for name in names:
        text2image(client, sampler_name=name, steps=4, eta=1)
    assert client.get("/sdapi/v1/schedulers").json()[0]["label"] == "Automatic"


def test_progress_is_shown_and_a_request_is_interrupted(tmp_path):
    gate = threading.Event()
    gate.set()
    with serving(tmp_path, {"fake": slow_pipeline(0.03, gate)}) as server:
        client, found = server.client(), []
        assert client.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0
        thread = threading.Thread(target=lambda: found.append(
            client.post("/sdapi/v1/txt2img", json={"prompt": "a", "steps": 100})))
        thread.start()

        def progress() -> dict[str, Any]:
            shown: dict[str, Any] = server.anybody.get("/sdapi/v1/progress").json()
            return shown

        wait_for(lambda: progress()["current_image"])
        gate.clear()
        now = progress()
        assert 0 < now["progress"] < 1 and now["state"]["sampling_steps"] == 100 and now["eta_relative"] > 0
        assert opened(now["current_image"]).size == (32, 32)
        without = server.anybody.get("/sdapi/v1/progress", params={"skip_current_image": True}).json()
        assert without["current_image"] is None
        assert server.anybody.post("/sdapi/v1/interrupt").json() == {}
        gate.set()
        thread.join(20)
        assert found[0].status_code == 503 and found[0].json()["error"]["code"] == "cancelled"
        assert progress()["state"]["job_count"] == 0
