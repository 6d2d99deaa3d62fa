"""A hub of Hugging Face on loopback that takes uploads: what huggingface_hub asks of it, and no more."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standin"


class StandInHub(ThreadingHTTPServer):
    """Attributes: the repositories by name, with the content of their files; which are private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}  # of large files, by hash

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StandInHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.server.url}/blob/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            large = [
                (f["path"], f["path"].endswith(".safetensors")) for f in json.loads(body)["files"]
            ]
            files = [
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": False,
                }
                for path, is_large in large
            ]
            return self._answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                self._add(repo, json.loads(line))
            url = f"{self.server.url}/{repo}/commit/abc"
            return self._answer(200, {"commitUrl": url, "commitOid": "abc", "success": True})
        return self._answer(404, {"error": f"not known: {self.path}"})

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        self.server.blobs[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {})

    def do_GET(self) -> None:
        repo = "/".join(self.path.split("/")[3:5])
        known = repo in self.server.repos
        self._answer(200 if known else 404, {"id": repo, "sha": "abc", "siblings": []})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.repos:
            url = f"{self.server.url}/{name}"
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        self.server.repos[name] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(name)
        return self._answer(200, {"url": f"{self.server.url}/{name}"})

    def _add(self, repo: str, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            self.server.repos[repo][value["path"]] = self.server.blobs[value["oid"]]

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    hub = StandInHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
