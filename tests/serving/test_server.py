"""`deploy serve` as a whole: a process that starts, says where it is, ends in order, and refuses in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from runtimes.errors import InputError
from runtimes.serving.options import ServerOptions
from tests.serving.server_process import ROOT, Server, free_port, serve_command
from tests.serving.tiny_bundles import tiny_bundle

LONG = {"prompt": "a cat", "num_inference_steps": 140, "seed": 1, "size": "64x64"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("served") / "tiny")


def refused(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a `serve` that does not start."""
    done = subprocess.run([sys.executable, "-m", "deploy", "serve", *arguments], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, env={**os.environ, "COLUMNS": "400"})
    return done.returncode, done.stderr


def events(url: str, identity: str, seen: list[str]) -> None:
    with httpx.stream("GET", f"{url}/v1/jobs/{identity}/events", timeout=60, trust_env=False) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                seen.append(line.removeprefix("event: "))


def test_a_signal_drains_it_and_the_next_start_goes_on(bundle, tmp_path):
    """What runs is answered or queued again, streams end, and the exit code is 0."""
    port, state = free_port(), tmp_path / "state"
    with Server(serve_command(bundle, port, state, "--batch", "1", "--max-images", "64"), port) as server:
        seen: list[str] = []
        answers: list[httpx.Response] = []
        asked = threading.Thread(target=lambda: answers.append(
            httpx.post(f"{server.url}/v1/images/generations", json={**LONG, "n": 64}, timeout=120, trust_env=False)))
        asked.start()
        until = time.monotonic() + 30
        while "ldm_running 0.0" in httpx.get(f"{server.url}/metrics", trust_env=False).text:
            assert time.monotonic() < until, "nothing runs"
        jobs = [httpx.post(f"{server.url}/v1/jobs", json={**LONG, "seed": n, "n": 64}, trust_env=False).json()["id"]
                for n in range(4)]
        followed = threading.Thread(target=events, args=(server.url, jobs[-1], seen))
        followed.start()
        while not seen:
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(server.pid, signal.SIGTERM)
        followed.join(60)
        asked.join(120)
        assert server.wait(60) == 0
        assert [answer.status_code for answer in answers] == [200]
        assert "end" not in seen
        assert "Traceback" not in server.last_lines(200)
    with Server(serve_command(bundle, port, state), port) as server:
        until = time.monotonic() + 60
        while {(job := httpx.get(f"{server.url}/v1/jobs/{one}", trust_env=False).json())["status"]
               for one in jobs} != {"completed"}:
            assert time.monotonic() < until, job
            time.sleep(0.1)


def test_two_servers_do_not_share_a_state_folder(bundle, tmp_path):
    port = free_port()
    with Server(serve_command(bundle, port, tmp_path), port):
        code, error = refused(str(bundle), "--port", "0", "--state", str(tmp_path))
    assert code == 4 and "another server has it open" in error and "--state" in error


def test_a_port_that_is_taken(bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, error = refused(str(bundle), "--port", str(taken.getsockname()[1]), "--state", str(tmp_path / "state"))
    assert code == 4 and "cannot listen on 127.0.0.1" in error
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--host", "0.0.0.0"], "--api-key-file"),
    (["--port", "70000"], "at most 65535"),
    (["--keep-hours", "0"], "above 0"),
    (["--keep-hours", "-1"], "above 0"),
    (["--safety", "maybe"], "off, flag, replace"),
    (["--keep-bytes", "much"], "--keep-bytes"),
    (["--max-body", "much"], "--max-body"),
    (["--memory", "much"], "--memory"),
    (["--device", "abacus"], "abacus"),
    (["--digest", "0000000000"], "digest"),
    (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
    (["--engine-port", "1234"], "--engine-key-file"),
    (["--telemetry", "nowhere"], "--telemetry"),
])
def test_an_option_that_cannot_be_is_refused_before_anything_starts(bundle, tmp_path, arguments, said):
    code, error = refused(str(bundle), "--port", "0", "--state", str(tmp_path / "state"), *arguments)
    assert code == 2 and said in error and "Traceback" not in error
    assert not (tmp_path / "state").exists()


def test_a_folder_that_is_no_bundle(tmp_path):
    code, error = refused(str(tmp_path), "--state", str(tmp_path / "state"))
    assert code == 2 and "manifest.json" in error
    assert not (tmp_path / "state").exists()


def test_the_log_is_json_in_every_process(bundle, tmp_path):
    port = free_port()
    with Server(serve_command(bundle, port, tmp_path, "--log-format", "json"), port) as server:
        httpx.post(f"{server.url}/v1/images/generations", json={**LONG, "num_inference_steps": 2}, timeout=60,
                   trust_env=False)
        server.stop()
        lines = server.last_lines(200).split(" | ")
    said = [json.loads(line) for line in lines if not line.startswith("serving ")]
    assert {line["logger"] for line in said} >= {"runtimes.serving.access", "runtimes.serving.engine.models"}


def test_options_say_what_goes_together():
    with pytest.raises(InputError, match="--api-key-file"):
        ServerOptions(host="::")
    assert ServerOptions(host="::1").port == 8000
