"""A Hub on loopback that keeps its commits on disk: enough of the API for the real clients to push to and load from.

Model repositories lie at `root/user/name`, kernels at `root/kernels/user/name`. Weights go by LFS, as on the real Hub.
`fail` orders an answer for later requests; a client does so by `POST /_test/fail`, and `/_test/clear` ends it.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repo import Repo

TOKEN, USER = "hf_loopback", "me"
LARGE = (".safetensors",)
"""Names' ends of what a client must send by LFS."""
CUT = 0
"""A fault in place of a status: the connection ends within the request, or before the answer."""
SLOW = -1
"""A fault in place of a status: the answer comes after `DELAY` seconds."""
DELAY = 2.0


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

    def fail(self, path: str, status: int, times: int = 1, retry_after: int | None = None) -> None:
        """Answer the next `times` requests whose path holds `path` with `status`, or do as `CUT` and `SLOW` say."""
        self.faults.append({"path": path, "status": status, "times": times, "retry_after": retry_after})

    def fault(self, path: str) -> dict[str, Any]:
        """What was ordered for `path`, used up."""
        for fault in self.faults:
            if fault["times"] > 0 and fault["path"] in path:
                fault["times"] -= 1
                return fault
        return {"status": None}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""


class Handler(BaseHTTPRequestHandler):
    """The API's routes."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def serve(self) -> None:
        parts = urlsplit(self.path)
        path = [unquote(p) for p in parts.path.strip("/").split("/")]
        self.server.requests.append(f"{self.command} {parts.path}")
        fault = self.server.fault(parts.path)
        if fault["status"] == CUT:
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1000))
            self.close_connection = True
            return self.connection.close()
        body = self.body()
        if parts.path == "/_test/fail":
            self.server.fail(**json.loads(body))
            return self.answer({})
        if parts.path == "/_test/clear":
            self.server.faults.clear()
            return self.answer({})
        if fault["status"] == SLOW:
            time.sleep(DELAY)
        elif fault["status"] is not None:
            wait = {} if fault["retry_after"] is None else {"Retry-After": str(fault["retry_after"])}
            return self.error(fault["status"], "", "ordered by the test", wait)
        self.known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path[:2] == ["api", "whoami-v2"]:
            return self.answer({"name": USER, "type": "user"}) if self.known else self.error(401, "", "Invalid token")
        if path[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if path[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if path[:1] == ["api"] and path[1] in ("models", "kernels"):
            kind = "" if path[1] == "models" else "kernels/"
            return self.api(kind + "/".join(path[2:4]), path[4:], body, parse_qs(parts.query))
        if path[:1] == ["_lfs"]:
            return self.store(path[1], body)
        if path[-3:] == ["lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        kind, path = ("kernels/", path[1:]) if path[0] == "kernels" else ("", path)
        if len(path) > 4 and path[2] == "resolve":
            return self.resolve(kind + "/".join(path[:2]), path[3], "/".join(path[4:]))
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
        name = f"kernels/{name}" if wanted.get("type") == "kernel" else name
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
        if verb == "refs":
            branches = repo.load()["branches"]
            named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in branches.items()]
            return self.answer({"branches": named, "tags": [], "converts": []})
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
            modes = ["lfs" if f["path"].endswith(LARGE) else "regular" for f in files]
            planned = [{**f, "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes, strict=True)]
            return self.answer({"files": planned})
        if verb == "commit":
            wants_pr = query.get("create_pr") == ["1"]
            new = repo.commit("refs/pr/1" if wants_pr else revision, body, self.server.root / "lfs")
            url = f"{self.server.url}/{name}"
            pull = {"pullRequestUrl": f"{url}/discussions/1"} if wants_pr else {}
            return self.answer({"commitOid": new, "commitUrl": f"{url}/commit/{new}", "success": True, **pull})
        files = repo.files(commit)
        entries = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]
        if verb == "tree":
            return self.answer(entries if "true" in query.get("recursive", []) else _level(entries, rest[1:]))
        info = {"id": name, "sha": commit, "private": repo.load()["private"], "tags": [], "downloads": 0, "likes": 0}
        return self.answer({**info, "siblings": [{"rfilename": entry["path"]} for entry in entries]})

    def batch(self, wanted: dict[str, Any]) -> None:
        """Where each LFS object is to be put."""
        if not self.known:
            return self.error(401, "", "Invalid username or password.")
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.server.url}/_lfs/{o['oid']}"}}} for o in wanted["objects"]
        ]
        return self.answer({"transfer": "basic", "objects": objects})

    def store(self, name: str, content: bytes) -> None:
        """An LFS object, if it is what its name says."""
        if hashlib.sha256(content).hexdigest() != name:
            return self.error(422, "", "the content is not what was announced")
        (self.server.root / "lfs").mkdir(exist_ok=True)
        (self.server.root / "lfs" / name).write_bytes(content)
        return self.answer({})

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


def _level(entries: list[dict[str, Any]], folder: list[str]) -> list[dict[str, Any]]:
    """What lies directly in a folder: its files, and its folders once."""
    found = {}
    for entry in entries:
        parts = entry["path"].split("/")
        if parts[: len(folder)] != folder or len(parts) == len(folder):
            continue
        path = "/".join(parts[: len(folder) + 1])
        is_file = len(parts) == len(folder) + 1
        found[path] = entry if is_file else {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
    return list(found.values())
