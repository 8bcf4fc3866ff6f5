"""Health, metrics, logs, the page, the description of the API, proxies, and other sites' pages."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from runtimes.errors import UnavailableError
from runtimes.serving.engine.contract import PoolStatus
from runtimes.serving.http import app as app_module
from runtimes.serving.http.app import STUDIO
from runtimes.serving.http.observed import ACCESS
from runtimes.serving.logs import JsonFormatter, RequestIdFilter, TextFormatter, set_up_logs
from tests.serving.http_server import MODEL, Serving, serving, slow_pipeline, wait_for

ASK = {"prompt": "a secret cat", "num_inference_steps": 2}
GENERATE = "/v1/images/generations"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("state")) as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> httpx.Client:
    return server.client()


def test_ready_is_said_while_requests_are_taken_alone(tmp_path, monkeypatch):
    with serving(tmp_path) as server:
        client, service = server.client(), server.service
        for state, status in (("starting", 503), ("serving", 200), ("draining", 503)):
            service.state = state
            assert client.get("/health/ready").status_code == status
            assert client.get("/health/live").status_code == 200
            assert client.post("/v1/images/generations", json=ASK).status_code == status
            # A job waits on disk until the workers are there.
            assert client.post("/v1/jobs", json=ASK).status_code == (503 if state == "draining" else 202)
        service.state = "serving"
        monkeypatch.setattr(service.pool, "status", PoolStatus)
        assert client.get("/health/ready").json() == {"status": "no worker lives"}


def test_figures_of_requests_jobs_and_failures_are_counted(tmp_path):
    with serving(tmp_path) as server:
        client = server.client()
        client.post(GENERATE, json=ASK | {"n": 2})
        client.post(GENERATE, json=ASK | {"cache_interval": 2})
        job = client.post("/v1/jobs", json=ASK).json()["id"]
        wait_for(lambda: client.get(f"/v1/jobs/{job}").json()["status"] == "completed")
        wait_for(lambda: 'ldm_images_total{of="jobs"}' in client.get("/metrics").text)
        answer = client.get("/metrics")
        samples = {(s.name, *sorted(s.labels.items())): s.value
                   for family in text_string_to_metric_families(answer.text) for s in family.samples}
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert samples["ldm_images_total", ("of", "requests")] == 2
        assert samples["ldm_steps_total", ("of", "requests")] == 4
        assert samples["ldm_steps_total", ("of", "jobs")] == 2
        assert samples["ldm_failures_total", ("reason", "invalid_value")] == 1
        assert samples["ldm_jobs", ("status", "completed")] == 1 and samples["ldm_queue_depth",] == 0
        assert samples["ldm_wait_seconds_count",] >= 2 and samples["ldm_batch_images_count",] >= 1
        assert samples["ldm_job_write_seconds_count",] == 1
        assert samples["ldm_http_requests_total", ("method", "POST"), ("route", GENERATE), ("status", "200")] == 1
        assert any(name[0] == "ldm_worker_memory_bytes" and value > 0 for name, value in samples.items())


def test_unknown_paths_and_methods_do_not_swell_the_figures(server, client):
    for number, method in enumerate(("GET", "PATCH", "SEARCH")):
        client.request(method, f"/unknown/{number}")
    text = client.get("/metrics").text
    assert 'route="other"' in text and "/unknown" not in text and "SEARCH" not in text


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the access log writes, as JSON."""
    stream = io.StringIO()
    handler, level = logging.StreamHandler(stream), ACCESS.level
    handler.setFormatter(JsonFormatter())
    handler.addFilter(RequestIdFilter())
    ACCESS.addHandler(handler)
    ACCESS.setLevel(logging.INFO)
    yield stream
    ACCESS.removeHandler(handler)
    ACCESS.setLevel(level)


def test_a_request_has_a_line_with_its_id_and_without_its_prompt(client, lines):
    answer = client.post(GENERATE, json=ASK, headers={"X-Request-ID": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    wait_for(lambda: lines.getvalue().endswith("\n"))
    line = json.loads(lines.getvalue())
    assert line["message"] == f"POST {GENERATE}" and line["request_id"] == "abc-1" and line["status"] == 200
    assert line["model"] == "fake" and line["images"] == 1 and line["ms"] > 0 and "secret" not in lines.getvalue()


@pytest.mark.parametrize("given", ["a b", "x" * 65, "é", 'a"b', ""])
def test_an_id_that_is_not_sane_is_replaced(client, given):
    answer = client.get("/health/live", headers={"X-Request-ID": given.encode()})
    assert answer.headers["x-request-id"] != given and len(answer.headers["x-request-id"]) == 32


def test_signatures_are_not_logged_and_nobody_writes_a_line_of_the_log(client, lines):
    client.get(f"/v1/images/{'0' * 64}.png?until=1&signature=SECRET")
    client.get("/a%0aINFO%20forged")
    wait_for(lambda: lines.getvalue().count("\n") == 2)
    assert "SECRET" not in lines.getvalue()
    record = logging.LogRecord("x.access", logging.INFO, "", 0, "GET /a\nINFO forged", (), None)
    assert "\n" not in TextFormatter().format(record)


def test_logs_are_set_up_as_text_or_json_with_tracebacks():
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    level = root.level
    try:
        for form in ("text", "json"):
            stream = io.StringIO()
            set_up_logs(form, stream)
            try:
                raise ValueError("broken")
            except ValueError:
                logging.getLogger("runtimes.x").exception("it failed")
            text = stream.getvalue()
            assert "it failed" in text and "ValueError: broken" in text
            assert form == "text" or json.loads(text)["level"] == "error"
    finally:
        root.handlers[:], root.level = before, level


# ---- pages -------------------------------------------------------------------------------------------------------


def test_the_page_and_its_files_are_served_with_a_strict_policy(client, tmp_path, monkeypatch):
    monkeypatch.setattr(app_module, "STUDIO", tmp_path)
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "js").mkdir()
    (tmp_path / "js" / "main.js").write_text("export {}")
    page, script = client.get("/"), client.get("/studio/js/main.js")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.text == "<!doctype html>"
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and page.headers["x-content-type-options"]
    assert client.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    assert client.get("/studio/js").status_code == 404 and client.get("/studio/none.js").status_code == 404


def test_the_description_is_served_and_read_without_network(client):
    page = client.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert "src=" not in page.text and "href=http" not in page.text and "@import" not in page.text
    assert "<script" not in page.text and "/v1/images/generations" in page.text and "num_inference_steps" in page.text


def test_every_endpoint_is_described_with_its_errors_and_examples(client):
    specification = client.get("/openapi.json").json()
    assert specification["openapi"].startswith("3.")
    for path, methods in specification["paths"].items():
        for method, said in methods.items():
            assert said.get("summary") and said["tags"], (method, path)
            if path.startswith("/v1/"):
                error = said["responses"]["500"]["content"]["application/json"]
                assert error["example"]["error"]["message"] and error["schema"]["$ref"].endswith("ErrorAnswer")
    body = specification["paths"][GENERATE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["num_inference_steps"]["description"].startswith("Denoising steps")
    assert body["examples"] and body["additionalProperties"] is False
    form = specification["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert form["schema"]["properties"]["image"]["format"] == "binary"


# ---- proxies and other sites -------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [True, False])
def test_a_proxy_may_show_the_server_below_a_path_that_it_removes_or_leaves(tmp_path, removed):
    with serving(tmp_path, root_path="/ai/images") as server:
        client, below = server.client(), "" if removed else "/ai/images"
        headers = {"Host": "backend:1", "X-Forwarded-Host": "shop.example", "X-Forwarded-Proto": "https"}
        answer = client.post(f"{below}{GENERATE}", json=ASK | {"response_format": "url"}, headers=headers)
        assert answer.status_code == 200, answer.text
        url = answer.json()["data"][0]["url"]
        assert url.startswith("https://shop.example/ai/images/v1/images/")
        image = client.get(url.replace("https://shop.example/ai/images", below), headers=headers)
        assert Image.open(io.BytesIO(image.content)).size == (32, 32)
        assert client.get(f"{below}/health/ready").status_code == 200


def test_an_address_names_the_host_that_was_asked_for_and_no_forged_one(client):
    url = client.post(GENERATE, json=ASK | {"response_format": "url"}).json()["data"][0]["url"]
    assert url.startswith(f"http://127.0.0.1:{client.base_url.port}/v1/images/")
    for forged in ('evil"><script>', "a b", "x/y"):
        again = client.post(GENERATE, json=ASK | {"response_format": "url"}, headers={"X-Forwarded-Host": forged})
        assert forged not in again.json()["data"][0]["url"]


def test_pages_of_other_sites_may_use_it_only_where_the_server_says_so(tmp_path, client):
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "content-type"}
    assert "access-control-allow-origin" not in client.options(GENERATE, headers=asked).headers
    assert client.post(GENERATE, json=ASK, headers={"Origin": "https://shop.example"}).status_code == 403
    own = f"http://127.0.0.1:{client.base_url.port}"
    assert client.post(GENERATE, json=ASK, headers={"Origin": own}).status_code == 200
    with serving(tmp_path, cors=("https://shop.example",)) as server:
        before = server.anybody.options(GENERATE, headers=asked)
        assert before.status_code == 200 and before.headers["access-control-allow-origin"] == "https://shop.example"
        answer = server.anybody.post(GENERATE, json=ASK, headers={"Origin": "https://shop.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        refused = server.anybody.post(GENERATE, json=ASK, headers={"Origin": "https://evil.example"})
        assert refused.status_code == 403


def test_qualities_are_the_bundles_measured_settings_and_fields_beside_them_overrule(tmp_path):
    presets: dict[str, dict[str, Any]] = {"draft": {"steps": 3}, "standard": {"steps": 5, "scheduler": "euler"},
                                          "high": {"steps": 9}}
    with serving(tmp_path, models={"fake": replace(MODEL, presets=presets)}) as server:
        client = server.client()
        for quality, steps, shown in (("low", 3, "low"), ("draft", 3, "low"), ("auto", 5, "medium"),
                                      ("medium", 5, "medium"), ("standard", 5, "medium"), (None, 5, "medium"),
                                      ("high", 9, "high"), ("hd", 9, "high")):
            answer = client.post(GENERATE, json={"prompt": "a", "quality": quality}).json()
            assert (answer["usage"]["output_tokens"], answer["quality"]) == (steps, shown)
        over = client.post(GENERATE, json={"prompt": "a", "quality": "high", "num_inference_steps": 2}).json()
        assert over["usage"]["output_tokens"] == 2


def test_a_judged_image_is_marked_or_replaced_by_the_policy(tmp_path, monkeypatch):
    pipeline = slow_pipeline()
    monkeypatch.setattr(type(pipeline), "judges", True)
    monkeypatch.setattr(type(pipeline), "flagged", lambda self, images: [True] * len(images))
    models = {"fake": replace(MODEL, has_safety_checker=True)}
    found = {}
    for safety in ("off", "flag", "replace"):
        with serving(tmp_path / safety, {"fake": pipeline}, models=models, safety=safety) as server:
            answer = server.client().post(GENERATE, json=ASK | {"seed": 1, "response_format": "url"}).json()["data"][0]
            image = Image.open(io.BytesIO(server.anybody.get(answer["url"]).content))
            found[safety] = answer["flagged"], image.getextrema() == ((0, 0),) * 3
    assert found == {"off": (None, False), "flag": (True, False), "replace": (True, True)}


def test_spans_are_sent_where_an_address_is_given(tmp_path, monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with serving(tmp_path, telemetry=address) as server:
            assert server.client().post(GENERATE, json=ASK).status_code == 200
            wait_for(lambda: any(GENERATE.encode() in content for content in received))
        collector.shutdown()
    assert not any(b"secret" in content for content in received)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UnavailableError, match="exporter of OpenTelemetry is not installed"), \
            serving(tmp_path / "other", telemetry=address):
        pass


def test_the_studio_is_below_the_package():
    assert STUDIO.name == "studio" and STUDIO.parent.name == "serving"
