"""A Hugging Face Hub on loopback: what its client asks for when it downloads a repository, from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789" * 4


@dataclass
class SmallHub:
    """One repository.

    Attributes:
        name: OWNER/NAME.
        folder: its files.
        refused: status and X-Error-Code of every answer, instead of it.
        breaks_at: a file whose download ends in the middle.
        served: paths of the files that were asked for.
    """

    name: str
    folder: Path
    endpoint: str = ""
    refused: tuple[int, str] | None = None
    breaks_at: str = ""
    served: list[str] = field(default_factory=list)

    def files(self) -> dict[str, Path]:
        return {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}


@contextmanager
def small_hub(name: str, folder: Path) -> Iterator[SmallHub]:
    """Serve a folder as the repository `name`, at the commit COMMIT and the branch main."""
    hub = SmallHub(name, folder)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            if hub.refused is not None:
                return self.send(hub.refused[0], b"{}", body, {"X-Error-Code": hub.refused[1]})
            if path.startswith(f"api/models/{name}/revision/"):
                if path.rpartition("/")[2] not in ("main", COMMIT):
                    return self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
                return self.send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode(), body)
            if path.startswith(f"api/models/{name}/tree/"):
                tree = [{"type": "file", "path": p, "size": f.stat().st_size, "oid": self.tag(f)}
                        for p, f in hub.files().items()]
                return self.send(200, json.dumps(tree).encode(), body)
            if path.startswith(f"{name}/resolve/{COMMIT}/"):
                file = path.removeprefix(f"{name}/resolve/{COMMIT}/")
                if file in hub.files():
                    hub.served.append(file)
                    content = hub.files()[file].read_bytes()
                    headers = {"ETag": f'"{self.tag(hub.files()[file])}"', "X-Repo-Commit": COMMIT}
                    return self.send(200, content, body, headers, breaks=file == hub.breaks_at)
                return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

        def tag(self, file: Path) -> str:
            return hashlib.sha1(file.read_bytes()).hexdigest()

        def send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None,
                 breaks: bool = False) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if breaks else content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
