"""`make setup` on Linux without a GPU takes PyTorch's CPU build where its index answers, and says what it did."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import socket
import subprocess
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

from runtimes.system.nvidia import Gpu

ROOT = Path(__file__).resolve().parents[1]
Serve = Callable[[int, dict[str, bytes]], str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on Linux without a GPU, in an environment without torch, with pip's own settings left out."""
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / ".ci" / "install_torch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module.metadata, "version", absent)
    monkeypatch.setattr(module, "gpu_or_none", lambda: None)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A package index on loopback, which answers each path with these bytes, or everything with the status."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(status: int, pages: dict[str, bytes]) -> str:
        class Index(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urllib.parse.unquote(self.path)
                self.send_response(status if path in pages or status != 200 else 404)
                self.send_header("Content-Type", "text/html" if path.endswith("/") else "application/zip")
                self.end_headers()
                self.wfile.write(pages.get(path, b""))

            def log_message(self, *_: object) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def a_wheel_of_torch(release: str, folder: Path) -> dict[str, bytes]:
    """Pages of an index that holds one empty distribution."""
    name = f"torch-{release}-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        info = f"torch-{release}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {release}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
                                        "Tag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    content = (folder / name).read_bytes()
    link = f'<a href="/{name}#sha256={hashlib.sha256(content).hexdigest()}">{name}</a>'
    return {"/torch/": f"<!DOCTYPE html><html><body>{link}</body></html>".encode(), f"/{name}": content}


def test_the_cpu_build_is_installed_where_its_index_answers(script: ModuleType, serve: Serve, tmp_path: Path):
    release = script.pinned(script.CONSTRAINTS.read_text())
    url = serve(200, a_wheel_of_torch(f"{release}+cpu", tmp_path))
    said = script.main(url, ["--target", str(tmp_path / "here")])
    assert said == f"torch: PyTorch's CPU build from {url}; no NVIDIA GPU here"
    assert (tmp_path / "here" / f"torch-{release}+cpu.dist-info").is_dir()
    assert SpecifierSet(f"=={release}").contains(f"{release}+cpu"), "pip would replace it"


def test_an_index_without_that_release_is_left_for_the_default_one(script: ModuleType, serve: Serve, tmp_path: Path):
    url = serve(200, a_wheel_of_torch("1.0+cpu", tmp_path))
    said = script.main(url, ["--target", str(tmp_path / "here")])
    assert "the default index's build" in said and "gigabytes" in said and f"{url} has no torch for here" in said
    assert not (tmp_path / "here").exists()


def test_an_index_that_hangs_costs_seconds(script: ModuleType, monkeypatch):
    monkeypatch.setattr(script, "SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are made and never answered
        start = time.perf_counter()
        said = script.main(f"http://127.0.0.1:{silent.getsockname()[1]}", [])
    assert time.perf_counter() - start < 10
    assert "does not answer within" in said or "cannot be reached (timed out)" in said


def test_an_index_that_is_absent_or_refuses_is_said_to_be(script: ModuleType, serve: Serve):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "cannot be reached" in script.main(f"http://127.0.0.1:{port}", [])
    assert "answers 403" in script.main(serve(403, {}), [])


def test_an_index_of_the_users_own_holds_for_torch_too(script: ModuleType, monkeypatch):
    monkeypatch.setattr(script, "why_not", lambda *_: pytest.fail("it was asked"))
    assert "that pip was given" in script.main("http://127.0.0.1:9", ["--index-url", "https://mirror"])
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror")
    assert "that pip was given" in script.main("http://127.0.0.1:9", [])


def test_with_a_gpu_or_on_another_system_or_with_torch_there_the_index_is_not_asked(script: ModuleType, monkeypatch):
    monkeypatch.setattr(script, "why_not", lambda *_: pytest.fail("it was asked"))
    monkeypatch.setattr(script, "gpu_or_none", lambda: Gpu("NVIDIA H100", (9, 0), 1))
    assert script.main("http://127.0.0.1:9", []) == "torch: the default index's build, for NVIDIA H100, 9.0"
    monkeypatch.setattr(script.sys, "platform", "darwin")
    assert script.main("http://127.0.0.1:9", []) == ""
    monkeypatch.setattr(script.metadata, "version", lambda _: script.pinned(script.CONSTRAINTS.read_text()) + "+cpu")
    assert script.main("http://127.0.0.1:9", []) == ""


def test_set_up_runs_it_before_everything_else_is_installed():
    printed = subprocess.run(["make", "--dry-run", "--always-make", "setup"], capture_output=True, text=True, cwd=ROOT,
                             check=True).stdout
    assert printed.index(".ci/install_torch.py") < printed.index("--editable")
