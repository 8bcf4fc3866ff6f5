"""Jobs over HTTP: accepted once, followed by events, cancelled; their images with signed addresses."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from runtimes.inputs.request import Request
from runtimes.serving.http.failures import HttpError
from runtimes.serving.http.keys import HOUR, Signer
from tests.serving.hostile import b64, png
from tests.serving.http_server import Serving, serving, slow_pipeline, wait_for

ASK = {"prompt": "a cat", "seed": 7, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("state"), {"fake": slow_pipeline(0.002)}) as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> httpx.Client:
    return server.client()


def accepted(client: httpx.Client, body: dict[str, Any] | None = None, **headers: str) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json=body or ASK, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


def ended(client: httpx.Client, identity: str) -> dict[str, Any]:
    def job() -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/v1/jobs/{identity}").json()
        return found

    wait_for(lambda: job()["status"] not in ("queued", "running"))
    return job()


def events(client: httpx.Client, identity: str, **headers: str) -> list[tuple[str, dict[str, Any]]]:
    """All of a stream, to its end."""
    found = []
    with client.stream("GET", f"/v1/jobs/{identity}/events", headers=headers) as stream:
        assert stream.status_code == 200 and stream.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: "):
                found.append((kind, json.loads(line[6:])))
    return found


def test_a_job_is_accepted_carried_out_and_leaves_the_image_of_its_request(client):
    job = accepted(client)
    assert job["status"] == "queued" and job["request"]["seed"] == [7]
    done = ended(client, job["id"])
    assert done["status"] == "completed" and done["ended_at"] >= done["created_at"] and done["digest"] == "f" * 64
    image = client.get(done["images"][0]["url"])
    expected = slow_pipeline()(Request("a cat", seed=7, steps=4))[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.content))), np.asarray(expected))
    assert done["images"][0] | {"url": ""} == {"url": "", "sha256": done["images"][0]["sha256"], "kind": "png",
                                               "bytes": len(image.content), "seed": 7, "flagged": None}


def test_a_job_starts_from_an_image_sent_in_base64_or_as_a_form(client):
    image, mask = png(32, 32), Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 32))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    hole = stream.getvalue()
    first = accepted(client, ASK | {"image": b64(image), "mask": f"data:image/png;base64,{b64(hole)}", "strength": 0.9})
    answer = client.post("/v1/jobs", data={"prompt": "a cat", "seed": "7", "num_inference_steps": "4",
                                           "strength": "0.9"}, files={"image": image, "mask": hole})
    assert answer.status_code == 202, answer.text
    found = [ended(client, identity) for identity in (first["id"], answer.json()["id"])]
    assert [job["status"] for job in found] == ["completed"] * 2
    assert found[0]["images"][0]["sha256"] == found[1]["images"][0]["sha256"]


def test_an_idempotency_key_gives_the_same_job_and_refuses_another_request(client):
    first = accepted(client, {"prompt": "a cat", "num_inference_steps": 2}, **{"Idempotency-Key": "one"})
    again = accepted(client, {"prompt": "a cat", "num_inference_steps": 2}, **{"Idempotency-Key": "one"})
    assert first["id"] == again["id"] and first["request"]["seed"] == again["request"]["seed"]
    other = client.post("/v1/jobs", json={"prompt": "a dog"}, headers={"Idempotency-Key": "one"})
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_conflict"


def test_events_tell_position_steps_previews_and_the_end(tmp_path):
    gate = threading.Event()
    with serving(tmp_path, {"fake": slow_pipeline(0.15, gate)}, most_images=1) as server:
        client = server.client()
        first, second = accepted(client), accepted(client)
        threading.Timer(0.5, gate.set).start()
        found = events(client, second["id"])
        kinds = [kind for kind, _ in found]
        assert kinds[0] == "position" and kinds[-1] == "end" and kinds.count("end") == 1
        steps = [values["step"] for kind, values in found if kind == "step"]
        assert steps == sorted(steps) and steps and all(v["total"] == 4 for kind, v in found if kind == "step")
        previews = [values for kind, values in found if kind == "preview"]
        assert previews and Image.open(io.BytesIO(base64.b64decode(previews[0]["b64_json"]))).size == (8, 8)
        assert found[-1][1]["status"] == "completed" and found[-1][1]["images"]
        assert ended(client, first["id"])["status"] == "completed"


def test_who_connects_again_sees_the_end_and_is_then_sent_away(client):
    job = accepted(client)
    ended(client, job["id"])
    assert [kind for kind, _ in events(client, job["id"])] == ["end"]
    assert [kind for kind, _ in events(client, job["id"], **{"Last-Event-ID": "step-3"})] == ["end"]
    again = client.get(f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": "end"})
    assert again.status_code == 204 and not again.content


def test_streams_end_while_the_server_drains_so_that_it_can_end(tmp_path):
    gate = threading.Event()
    with serving(tmp_path, {"fake": slow_pipeline(gate=gate)}) as server:
        job = accepted(server.client())
        threading.Timer(0.3, server.service.drain).start()
        kinds = [kind for kind, _ in events(server.client(), job["id"])]
        assert "end" not in kinds and "error" not in kinds
        gate.set()


def test_jobs_are_listed_the_newest_first_page_by_page(tmp_path):
    with serving(tmp_path) as server:
        client = server.client()
        made = [accepted(client, {"prompt": f"cat {n}", "num_inference_steps": 1})["id"] for n in range(5)]
        page = client.get("/v1/jobs", params={"limit": 3}).json()
        assert [job["id"] for job in page["data"]] == made[:1:-1] and page["has_more"]
        rest = client.get("/v1/jobs", params={"limit": 3, "after": page["data"][-1]["id"]}).json()
        assert [job["id"] for job in rest["data"]] == made[1::-1] and not rest["has_more"]


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs_and_forgotten_afterwards(tmp_path):
    gate = threading.Event()
    with serving(tmp_path, {"fake": slow_pipeline(gate=gate)}, most_images=1) as server:
        client = server.client()
        running, waiting = accepted(client), accepted(client)
        wait_for(lambda: client.get(f"/v1/jobs/{running['id']}").json()["status"] == "running")
        for job in (waiting, running):
            answer = client.delete(f"/v1/jobs/{job['id']}")
            assert answer.status_code == 200 and answer.json()["status"] == "cancelled"
        gate.set()
        assert ended(client, running["id"])["status"] == "cancelled"
        assert client.delete(f"/v1/jobs/{running['id']}").json()["status"] == "cancelled"
        assert client.get(f"/v1/jobs/{running['id']}").status_code == 404
        assert client.delete(f"/v1/jobs/{running['id']}").status_code == 404


def test_a_job_that_cannot_be_done_fails_with_its_reason(client):
    job = ended(client, accepted(client, ASK | {"cache_interval": 2})["id"])
    assert job["status"] == "failed" and "step-cache" in job["reason"] and job["images"] == []
    assert [kind for kind, _ in events(client, job["id"])] == ["end"]


def test_a_full_queue_of_jobs_and_a_full_disk_are_refused(tmp_path, monkeypatch):
    gate = threading.Event()
    with serving(tmp_path, {"fake": slow_pipeline(gate=gate)}, most_images=1, queue=1) as server:
        client = server.client()
        for _ in range(40):  # the dispatcher takes some of them at once
            answer = client.post("/v1/jobs", json=ASK)
            if answer.status_code != 202:
                break
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        for job in client.get("/v1/jobs", params={"limit": 100}).json()["data"]:
            client.delete(f"/v1/jobs/{job['id']}")
        gate.set()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0, total=1, used=1))
            full = client.post("/v1/jobs", json=ASK)
        assert full.status_code == 507 and full.json()["error"]["code"] == "disk_full"
        assert str(tmp_path) not in full.text


def test_a_key_sees_its_own_jobs_alone(tmp_path):
    with serving(tmp_path, keys={"ann": "a" * 20, "bob": "b" * 20}) as server:
        ann, bob = server.client(), server.client("b" * 20)
        job = accepted(ann)
        ended(ann, job["id"])
        assert bob.get(f"/v1/jobs/{job['id']}").status_code == 404
        assert bob.get(f"/v1/jobs/{job['id']}/events").status_code == 404
        assert bob.delete(f"/v1/jobs/{job['id']}").status_code == 404
        assert bob.get("/v1/jobs").json()["data"] == [] and len(ann.get("/v1/jobs").json()["data"]) == 1
        assert server.anybody.get("/v1/jobs").status_code == 401


def test_an_image_may_be_held_by_caches_for_as_long_as_its_address_holds(server, client):
    job = ended(client, accepted(client)["id"])
    url, sha256 = job["images"][0]["url"], job["images"][0]["sha256"]
    image = server.anybody.get(url)
    assert image.headers["etag"] == f'"{sha256}"' and image.headers["content-type"] == "image/png"
    cache = image.headers["cache-control"]
    assert cache.startswith("public, max-age=") and cache.endswith(", immutable")
    assert 167 * HOUR < int(cache.split("=")[1].split(",")[0]) <= 169 * HOUR
    for tag in (f'"{sha256}"', f'W/"{sha256}"', f'"x", "{sha256}"', "*"):
        same = server.anybody.get(url, headers={"If-None-Match": tag})
        assert same.status_code == 304 and not same.content and same.headers["etag"] == f'"{sha256}"'
    assert server.anybody.get(url, headers={"If-None-Match": '"x"'}).status_code == 200
    head = server.anybody.head(url)
    assert head.status_code == 200 and int(head.headers["content-length"]) == len(image.content) and not head.content
    assert server.anybody.get(url.replace(".png", ".webp")).status_code == 403
    assert server.anybody.get(url.replace("signature=", "signature=x")).status_code == 403
    assert server.anybody.get(url.partition("?")[0]).status_code == 403


def test_images_are_public_where_the_server_says_so(tmp_path):
    with serving(tmp_path, public_images=True, keys={"ann": "a" * 20}) as server:
        job = ended(server.client(), accepted(server.client())["id"])
        url = job["images"][0]["url"]
        assert "?" not in url and server.anybody.get(url).status_code == 200
        assert server.anybody.get(url.replace(".png", ".webp")).status_code == 404
        assert "max-age=31536000" in server.anybody.get(url).headers["cache-control"]


def test_a_signature_holds_for_its_image_and_its_time_and_outlives_a_restart(tmp_path):
    now = [1_000_000.0]
    signer = Signer.of(tmp_path, hours=2)
    assert signer.query("a.png") == Signer.of(tmp_path, hours=2).query("a.png")
    assert (tmp_path / "signing.key").stat().st_mode & 0o777 == 0o600
    signer = Signer(b"k" * 32, hours=2, clock=lambda: now[0])
    until, signature = (part.partition("=")[2] for part in signer.query("a.png").split("&"))
    assert 2 * HOUR <= signer.check("a.png", until, signature) <= 3 * HOUR
    for name, when, signed in (("b.png", until, signature), ("a.png", str(int(until) + 1), signature),
                               ("a.png", until, signature[:-1]), ("a.png", until, "é"), ("a.png", "²", signature),
                               ("a.png", "9" * 30, signature), ("a.png", "", "")):
        with pytest.raises(HttpError, match="not signed"):
            signer.check(name, when, signed)
    with pytest.raises(HttpError, match="not signed"):
        Signer(b"l" * 32, clock=lambda: now[0]).check("a.png", until, signature)
    now[0] += 4 * HOUR
    with pytest.raises(HttpError, match="expired"):
        signer.check("a.png", until, signature)
