"""A Hub on loopback that keeps its commits on disk: enough of the API for the real clients to push to and load from.

`fail` orders an answer for later requests; a client does so by `POST /_test/fail`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repo import Repo

TOKEN, USER = "hf_loopback", "me"


class HubServer(ThreadingHTTPServer):
    """`with HubServer(folder) as hub:` serves at `hub.url`.

    Args:
        root: where the repositories are stored.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: list[dict[str, Any]] = []
        self.requests: list[str] = []

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def fail(self, path: str, status: int, times: int = 1) -> None:
        """Answer the next `times` requests whose path holds `path` with `status`; 0 cuts the connection."""
        self.faults.append({"path": path, "status": status, "times": times})

    def fault(self, path: str) -> int | None:
        """The status ordered for `path`, used up."""
        for fault in self.faults:
            if fault["times"] > 0 and fault["path"] in path:
                fault["times"] -= 1
                return fault["status"]
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""


class Handler(BaseHTTPRequestHandler):
    """The API's routes."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def serve(self) -> None:
        parts = urlsplit(self.path)
        path = [unquote(p) for p in parts.path.strip("/").split("/")]
        self.server.requests.append(f"{self.command} {parts.path}")
        body = self.body()
        if parts.path == "/_test/fail":
            self.server.fail(**json.loads(body))
            return self.answer({})
        status = self.server.fault(parts.path)
        if status == 0:
            self.close_connection = True
            return self.connection.close()
        if status is not None:
            return self.error(status, "", "ordered by the test")
        self.known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path[:2] == ["api", "whoami-v2"]:
            return self.answer({"name": USER, "type": "user"}) if self.known else self.error(401, "", "Invalid token")
        if path[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if path[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if path[:2] == ["api", "models"]:
            return self.api("/".join(path[2:4]), path[4:], body, parse_qs(parts.query))
        if len(path) > 4 and path[2] == "resolve":
            return self.resolve("/".join(path[:2]), path[3], "/".join(path[4:]))
        return self.error(404, "", "no such route")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def create(self, wanted: dict[str, Any]) -> None:
        if not self.known:
            return self.error(401, "", "Invalid username or password.")
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not name.startswith(f"{USER}/"):
            return self.error(403, "", "You don't have the rights to create a model under this namespace")
        repo, url = Repo(self.server.root, name), f"{self.server.url}/{name}"
        if repo.file.exists():
            return self.answer({"url": url, "error": "You already created this model repo"}, 409)
        repo.create(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return self.answer({"url": url, "id": name})

    def api(self, name: str, route: list[str], body: bytes, query: dict[str, list[str]]) -> None:
        repo = self.visible(name)
        if repo is None:
            return None
        verb, rest = (route or ["revision"])[0], route[1:]
        revision = rest[0] if rest else "main"
        if self.command == "POST" and verb != "paths-info" and not self.known:
            return self.error(401, "", "Invalid username or password.")
        if verb == "branch":
            data = repo.load()
            if revision in data["branches"]:
                return self.answer({"error": "Reference already exists"}, 409)
            data["branches"][revision] = data["branches"]["main"]
            repo.save(data)
            return self.answer({})
        commit = repo.commit_of(revision)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb == "preupload":
            files = json.loads(body)["files"]
            return self.answer({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        if verb == "commit":
            wants_pr = query.get("create_pr") == ["1"]
            new = repo.commit("refs/pr/1" if wants_pr else revision, body)
            url = f"{self.server.url}/{name}"
            pull = {"pullRequestUrl": f"{url}/discussions/1"} if wants_pr else {}
            return self.answer({"commitOid": new, "commitUrl": f"{url}/commit/{new}", "success": True, **pull})
        files = repo.files(commit)
        entries = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]
        if verb == "tree":
            return self.answer(entries)
        info = {"id": name, "sha": commit, "private": repo.load()["private"], "tags": [], "downloads": 0, "likes": 0}
        return self.answer({**info, "siblings": [{"rfilename": entry["path"]} for entry in entries]})

    def visible(self, name: str) -> Repo | None:
        """The repository, if this client may know of it; else the error is sent."""
        repo = Repo(self.server.root, name)
        if repo.file.is_file() and (self.known or not repo.load()["private"]):
            return repo
        self.error(404 if self.known else 401, "RepoNotFound", "Repository not found")
        return None

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.visible(name)
        if repo is None:
            return None
        commit = repo.commit_of(revision)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = dict(repo.files(commit)).get(path)
        if content is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
        wanted, status = self.headers.get("Range"), 200
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            last = int(end) if end else len(content) - 1
            headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
            content, status = content[int(start) : last + 1], 206
        return self.send(status, content, "application/octet-stream", headers)

    def answer(self, data: Any, status: int = 200) -> None:
        self.send(status, json.dumps(data).encode(), "application/json", {})

    def error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        given = {"X-Error-Code": code} if code else {}
        given |= {"X-Error-Message": message, **(headers or {})}
        self.send(status, json.dumps({"error": message}).encode(), "application/json", given)

    def send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
