"""A hub of models on loopback that speaks what huggingface_hub and modelscope_hub ask: one repository, files cut off on demand, and a list of
what was asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

REPOSITORY = "baidu/ERNIE-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_this_test"


class Hub:
    """Serves the files of `folder`. `cut`: names of files whose first download ends in the middle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cut: set[str] = set()
        self.downloads: list[tuple[str, str | None]] = []
        """Name and range of each GET of a file."""
        self.url = ""
        self.asked_enough = threading.Event()
        """Until then baidu/silent answers nobody."""

    def entries(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                name, size = str(path.relative_to(self.folder)), path.stat().st_size
                found.append({"type": "file", "path": name, "size": size, "oid": self.tag(name)})
        return found

    def sha256(self, name: str) -> str:
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()

    def tag(self, name: str) -> str:
        return hashlib.sha1((self.folder / name).read_bytes()).hexdigest()


@contextmanager
def open_hub(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path, _, query = self.path.partition("?")
            if path.startswith("/api/v1/models/"):
                self._answer_modelscope(path.removeprefix("/api/v1/models/"), dict(parse_qsl(query)))
                return
            repository, _, rest = path.removeprefix("/api/models/").removeprefix("/").partition("/")
            name, _, rest = rest.partition("/")
            repository = f"{repository}/{name}"
            if repository == "baidu/closes":
                self.close_connection = True
            elif repository == "baidu/garbage":
                self.wfile.write(b"\x00\xff\r\n\r\n")
                self.close_connection = True
            elif repository == "baidu/page":
                self._send(200, b"<html>no JSON</html>", {"content-type": "text/html"})
            elif repository == "baidu/silent":
                hub.asked_enough.wait()
            elif repository == "baidu/gated" and TOKEN not in self.headers.get("authorization", ""):
                self._error(403, "GatedRepo")
            elif repository not in (REPOSITORY, "baidu/gated"):
                self._error(404, "RepoNotFound")
            elif path.startswith("/api/"):
                kind, _, revision = rest.partition("/")
                if revision not in ("main", COMMIT):
                    self._error(404, "RevisionNotFound")
                elif kind == "revision":
                    siblings = [{"rfilename": entry["path"]} for entry in hub.entries()]
                    self._json({"id": repository, "sha": COMMIT, "siblings": siblings})
                else:
                    self._json(hub.entries())
            else:
                self._file(rest.removeprefix("resolve/").partition("/")[2])

        def _answer_modelscope(self, path: str, query: dict[str, str]) -> None:
            owner, name, *rest = path.split("/")
            repository = f"{owner}/{name}"
            if repository == "baidu/gated" and TOKEN not in str(self.headers):
                self._error(403, "no access")
            elif repository not in (REPOSITORY, "baidu/gated") or query.get("Revision", "master") != "master":
                self._error(404, "not found")
            elif rest == ["repo", "files"]:
                files = [
                    {"Path": entry["path"], "Size": entry["size"], "Sha256": hub.sha256(entry["path"]), "Type": "blob"}
                    for entry in hub.entries()
                ]
                self._json({"Code": 200, "Success": True, "Data": {"Files": files}})
            elif rest == ["repo"]:
                self._file(query["FilePath"])
            else:
                self._json({"Code": 200, "Success": True, "Data": {}})

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"content-type": "application/json"})

        def _error(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"x-error-code": code, "x-error-message": code})

        def _file(self, name: str) -> None:
            content = (hub.folder / name).read_bytes()
            asked = self.headers.get("range")
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            headers = {"etag": f'"{hub.tag(name)}"', "x-repo-commit": COMMIT, "accept-ranges": "bytes"}
            if start:
                headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if self.command == "GET":
                hub.downloads.append((name, asked))
            if self.command == "GET" and name in hub.cut and not start:
                hub.cut.discard(name)
                self._send(200, content[: len(content) // 2], headers, len(content))
                self.close_connection = True
            else:
                self._send(206 if start else 200, content[start:], headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body) if length is None else length)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.asked_enough.set()
        server.shutdown()
        server.server_close()
        thread.join(30)
