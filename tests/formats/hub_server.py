"""A hub on localhost: the endpoints that `huggingface_hub` reads a model repository by."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files by commit, and what a branch or a tag stands for."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    token: str | None = None


@dataclass
class Hub:
    """A running hub and what it was asked."""

    repositories: dict[str, Repository]
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    fails_with: int | None = None

    def fetched(self) -> set[str]:
        """The files whose data was asked for."""
        paths = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return {path.split("/resolve/")[1].partition("/")[2] for path in paths}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        token = self.headers.get("Authorization")
        self.hub.tokens.add(token)
        if self.hub.fails_with is not None:
            return self._send(self.hub.fails_with, {}, b"")
        for name, repository in self.hub.repositories.items():
            for start in (f"/api/models/{name}", f"/{name}/resolve"):
                if path == start or path.startswith(start + "/"):
                    return self._read(repository, name, token, path.removeprefix(start), api=start.startswith("/api"))
        return self._refuse(404, "RepoNotFound")

    def _read(self, repository: Repository, name: str, token: str | None, rest: str, *, api: bool) -> None:
        if repository.gated:
            return self._refuse(403, "GatedRepo")
        if repository.token is not None and token != f"Bearer {repository.token}":
            return self._refuse(401, "RepoNotFound")
        parts = rest.strip("/").split("/")
        if api and parts[0] not in ("", "revision", "tree"):
            return self._refuse(404, "EntryNotFound")
        revision = parts[int(api)] if parts[0] else "main"
        commit = repository.refs.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if not api:
            return self._file(commit, files.get("/".join(parts[1:])))
        if parts[0] == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self._json(tree)
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False})

    def _file(self, commit: str, data: bytes | None) -> None:
        if data is None:
            return self._refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None:
            return self._send(200, headers, data)
        first, last = asked.removeprefix("bytes=").split("-")
        end = min(int(last or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
        return self._send(206, headers, data[int(first) : end + 1])

    def _json(self, document: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def _send(self, status: int, headers: Mapping[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve repositories on a free port of localhost."""
    hub = Hub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
