"""Who may ask, how much, and how the server refuses: hostile requests, keys, rates, disconnects, slow clients."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from runtimes.errors import InputError
from runtimes.serving.http import connections
from runtimes.serving.http.failures import HttpError, without_paths
from runtimes.serving.http.keys import KeyRing, RateLimiter, loopback_host
from runtimes.serving.options import ServerOptions
from runtimes.serving.state.result_cache import ResultCache
from tests.serving.hostile import MOST_BODY, REQUESTS, Hostile, send
from tests.serving.http_server import Serving, serving, slow_pipeline, wait_for

ASK = {"prompt": "a cat", "num_inference_steps": 1}
GENERATE = "/v1/images/generations"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("state"), max_body=str(MOST_BODY)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> httpx.Client:
    return server.client()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("hostile", REQUESTS, ids=lambda h: h.what.replace(" ", "-").replace("/", "_"))
def test_a_hostile_request_is_refused_without_work_and_without_a_word_of_this_machine(server, hostile: Hostile):
    with server.client() as client:
        answer = send(client, hostile)
    assert answer.status_code == hostile.status, answer.text
    assert str(server.service.store.folder) not in answer.text and "/nowhere" not in answer.text
    assert "Traceback" not in answer.text
    if hostile.code != "":
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert hostile.code is None or error["code"] == hostile.code
        assert answer.headers["x-request-id"]


def test_hostile_requests_generated_nothing_and_left_the_server_well(server, client):
    before = server.service.metrics.registry.get_sample_value("ldm_wait_seconds_count")
    for hostile in REQUESTS[:10]:
        send(client, hostile)
    assert server.service.metrics.registry.get_sample_value("ldm_wait_seconds_count") == before
    assert client.post(GENERATE, json=ASK).status_code == 200
    assert client.get("/v1/jobs").json()["data"] == []


def test_there_are_forty_hostile_requests_and_more():
    assert len(REQUESTS) >= 40 and len({hostile.what for hostile in REQUESTS}) == len(REQUESTS)


def test_a_fault_of_ours_says_nothing_of_itself_but_its_id(tmp_path, caplog, monkeypatch):
    def broken() -> None:
        raise RuntimeError("secret of /srv/secret/path")

    with serving(tmp_path) as server:
        monkeypatch.setattr(server.service.store, "counts", broken)
        answer = server.client().post("/v1/jobs", json=ASK, headers={"X-Request-ID": "my-id.1"})
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error" and answer.headers["x-request-id"] == "my-id.1"
    assert "secret of /srv/secret/path" in caplog.text


@pytest.mark.parametrize(("text", "clean"), [
    ("/srv/a/b.json is broken", "... is broken"), ("see C:\\models\\x", "see ..."), ("16:9, 1/2, and/or", None),
    ("(images, channels, height / f)", None), ("read '/home/u/x y'", "read '... y'"),
])
def test_paths_are_taken_out_of_messages(text, clean):
    assert without_paths(text) == (text if clean is None else clean)


# ---- keys and rates ----------------------------------------------------------------------------------------------


def test_any_endpoint_but_the_pages_and_probes_needs_a_key(tmp_path):
    with serving(tmp_path, keys={"ann": "a" * 20}) as server:
        specification = server.anybody.get("/openapi.json").json()
        open_to_all = {"/health/live", "/health/ready", "/v1/images/{sha256}.{kind}"}
        for path, methods in specification["paths"].items():
            for method in methods:
                answer = server.anybody.request(method, path.format(
                    name="fake", identity="0" * 32, sha256="0" * 64, kind="png"))
                assert (answer.status_code == 401) == (path not in open_to_all), (method, path, answer.status_code)
                if answer.status_code == 401:
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_key_comes_as_a_bearers_or_as_the_password_that_clients_of_a1111_send(tmp_path):
    key = "a" * 20
    basic = base64.b64encode(f"user:{key}".encode()).decode()
    with serving(tmp_path, keys={"ann": key, "bob": "b" * 20}) as server:
        for header, status in ((f"Bearer {key}", 200), (f"bearer {key}", 200), (f"Basic {basic}", 200), ("", 401),
                               ("Basic !", 401), (f"Basic {basic[:-4]}", 401), (key, 401), (f"Bearer {key}x", 401)):
            answer = server.anybody.get("/v1/models", headers={"Authorization": header})
            assert answer.status_code == status, header


def test_keys_are_read_from_a_file_and_short_double_or_missing_ones_are_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the lab\n\nann:aaaaaaaaaaaaaaaaaaaa\nbbbbbbbbbbbbbbbbbbbb\n")
    ring = KeyRing.read(file)
    assert ring.owner("Bearer aaaaaaaaaaaaaaaaaaaa") == "ann"
    assert ring.owner("Bearer bbbbbbbbbbbbbbbbbbbb").startswith("key-")
    for text, says in (("", "no key"), ("ann:short", "16 or more"), ("a:" + "x" * 16 + "\na:" + "y" * 16, "second"),
                       ("a:" + "x" * 16 + "\nb:" + "x" * 16, "second"), (":" + "x" * 16, "no name")):
        file.write_text(text)
        with pytest.raises(InputError, match=says):
            KeyRing.read(file)
    with pytest.raises(InputError, match="cannot be read"):
        KeyRing.read(tmp_path / "absent")
    with pytest.raises(InputError, match="no key is asked for"):
        ServerOptions(host="0.0.0.0")


def test_a_key_has_a_rate_of_its_own_and_is_told_when_to_come_again(tmp_path):
    with serving(tmp_path, keys={"ann": "a" * 20, "bob": "b" * 20}, rate_limit=2) as server:
        client = server.client()
        assert [client.post(GENERATE, json=ASK).status_code for _ in range(3)] == [200, 200, 429]
        refused = client.post("/v1/jobs", json=ASK)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        other = server.client("b" * 20).post(GENERATE, json=ASK)
        assert other.status_code == 200


def test_a_bucket_fills_evenly():
    now = [0.0]
    limiter = RateLimiter(6, lambda: now[0])
    limiter.take("a", 6)
    with pytest.raises(HttpError) as caught:
        limiter.take("a", 2)
    assert caught.value.status == 429 and caught.value.headers["Retry-After"] == "20"
    now[0] += 20
    limiter.take("a", 2)
    with pytest.raises(HttpError, match="more than the 6") as caught:
        limiter.take("b", 7)
    assert caught.value.status == 400


@pytest.mark.parametrize(("host", "local"), [
    ("127.0.0.1:80", True), ("localhost", True), ("[::1]:8000", True), ("[::1]", True), ("LOCALHOST:1", True),
    ("127.0.0.1.evil.example", False), ("", False), ("localhost:80:80", False), ("evil@localhost", False),
])
def test_names_of_this_machine(host, local):
    assert loopback_host(host) is local


# ---- clients that go, and that are slow --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_request_at_the_next_step(tmp_path, stream):
    with serving(tmp_path, {"fake": slow_pipeline(0.01)}, most_images=1) as server:
        pool, body = server.service.pool, json.dumps(ASK | {"num_inference_steps": 150, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               b"Content-Length: %d\r\n\r\n" % (GENERATE.encode(), len(body)) + body)
            wait_for(lambda: pool.status().running == 1)
        began = time.monotonic()
        wait_for(lambda: pool.status().running == 0)
        assert time.monotonic() - began < 1.4  # 150 steps take longer
        wait_for(lambda: server.service.metrics.registry.get_sample_value(
            "ldm_http_requests_total", {"route": GENERATE, "method": "POST", "status": "200" if stream else "499"}))
        assert server.service.metrics.registry.get_sample_value("ldm_images_total", {"of": "requests"}) is None


def test_a_stream_that_is_closed_early_cancels_its_request(tmp_path):
    with serving(tmp_path, {"fake": slow_pipeline(0.01)}) as server:
        stream = server.openai().images.generate(prompt="a", stream=True, partial_images=3,
                                                 extra_body={"num_inference_steps": 150})
        next(iter(stream))
        stream.close()
        wait_for(lambda: server.service.pool.status().running == 0, 2)


def reply(server: Serving, *parts: bytes, pause: float = 0.0, seconds: float = 5.0) -> bytes:
    """What comes back for bytes sent with pauses between them, until the connection ends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            found = b""
            while data := connection.recv(65536):
                found += data
        except (ConnectionResetError, BrokenPipeError):
            return b""
        return found


def test_a_head_without_end_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX-Endless: ")
        with pytest.raises(OSError):  # reset or broken pipe, whichever comes first
            for _ in range(10_000):
                connection.sendall(b"a" * 65_536)


@pytest.mark.parametrize("parts", [
    [], [b"GET /v1/mod"], [b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X-Slow: 1\r\n"],
    [b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"],
], ids=["nothing", "half a line", "half a head", "half a body"])
def test_a_client_that_sends_too_slowly_is_disconnected(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.3)
    with serving(tmp_path) as server:
        assert not reply(server, *parts, pause=0.05, seconds=5)  # a client that is waited for would time out here
        whole = reply(server, b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert whole.startswith(b"HTTP/1.1 200")


def test_two_requests_on_one_connection_are_both_answered(server):
    ask = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
    assert reply(server, ask % b"" + ask % b"Connection: close\r\n").count(b"HTTP/1.1 200") == 2


def test_garbage_is_answered_with_400(server):
    assert reply(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").startswith(b"HTTP/1.1 400")


# ---- the cache of finished images --------------------------------------------------------------------------------


def test_an_equal_request_comes_from_the_cache_without_previews(tmp_path):
    with serving(tmp_path, cache=ResultCache(10_000_000)) as server:
        client = server.openai()
        body = {"num_inference_steps": 4, "seed": 3}
        first = client.images.generate(prompt="a", extra_body=body)
        events = list(client.images.generate(prompt="a", stream=True, partial_images=2, extra_body=body))
        assert [event.type for event in events] == ["image_generation.completed"]
        last = events[0]
        assert first.data is not None and last.type == "image_generation.completed"
        assert last.b64_json == first.data[0].b64_json and last.usage.output_tokens == 0
        assert (last.model_extra or {})["cached"] is True
        value = server.service.metrics.registry.get_sample_value
        assert value("ldm_result_cache_total", {"result": "hit"}) == 1
        assert value("ldm_result_cache_total", {"result": "miss"}) == 1


def test_requests_of_many_threads_are_all_answered(tmp_path):
    with serving(tmp_path) as server:
        statuses: list[int] = []
        client = server.client()

        def ask(seed: int) -> None:
            statuses.append(client.post(GENERATE, json=ASK | {"seed": seed}).status_code)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert statuses == [200] * 24
