"""A Hub on this machine: a server that answers the requests which huggingface_hub makes, for repositories in memory."""

import base64
import dataclasses
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_right"


@dataclasses.dataclass
class Repository:
    """Commits by their ids, each the files by name, and branches by name."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "") -> str:
        """Adds a commit with these files, and no others; returns its id."""
        identity = repr((sorted(files), message, len(self.commits))).encode()
        sha = hashlib.sha1(identity).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.messages.append(message)
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the branch main."""
        return self.commits[self.refs["main"]]


class FakeHub:
    """The server.

    Attributes:
        repositories: by name.
        requests: (method, path, bytes of the answer's body), in their order.
        fail: a word of a path whose requests are answered with 500 (of uploads: a connection that breaks).
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.uploaded: dict[str, bytes] = {}
        self.fail: str | None = None
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name: str, folder: Path, **properties: bool) -> Repository:
        """A repository with the files of a folder."""
        self.repositories[name] = repository = Repository(**properties)
        repository.commit(read_files(folder))
        return repository

    def fetched(self, name: str) -> list[str]:
        """Names of the files that were fetched of a repository, each time that they were."""
        begin = f"/{name}/resolve/"
        return [path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and begin in path]


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = None) -> None:
    """Makes huggingface_hub ask this Hub, emptied and not asked anything yet, with an empty cache of its own."""
    from huggingface_hub import constants

    hub.repositories.clear()
    hub.requests.clear()
    hub.fail = None
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    server_hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer_file()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not path.startswith("/api/"):
            return self._answer_file()
        words = [unquote(word) for word in path.removeprefix("/api/models/").split("/")]
        name, rest = "/".join(words[:2]), words[2:]
        found = self._commit(name, rest[1] if rest[:1] in (["revision"], ["tree"]) else "main")
        if found is None:
            return None
        sha, files = found
        if rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self._json(listed)
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def do_POST(self) -> None:
        path, hub = urlsplit(unquote(self.path)).path, self.server_hub
        body = self._body()
        if hub.fail is not None and hub.fail in path:
            return self._error(400, None, "it breaks")
        if not self._may_write():
            return None
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            if name in hub.repositories:
                return self._json({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
            hub.repositories[name] = repository = Repository(
                private=bool(wanted.get("private")) or wanted.get("visibility") == "private"
            )
            repository.commit({".gitattributes": b""})
            return self._json({"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {"upload": {"href": f"{hub.url}/upload/"}}
            for one in objects:
                one["actions"] = {"upload": {"href": upload["upload"]["href"] + one["oid"]}}
            return self._json({"transfer": "basic", "objects": objects})
        words = path.removeprefix("/api/models/").split("/")
        name, verb, revision = "/".join(words[:2]), words[2], "/".join(words[3:])
        if verb == "preupload":
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if is_large(one["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if verb == "branch":
            hub.repositories[name].refs[revision] = hub.repositories[name].refs["main"]
            return self._json({})
        assert verb == "commit", path
        return self._commit_files(name, revision, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        hub = self.server_hub
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self._body()
        if hub.fail is not None and hub.fail in self.path:
            return self._error(400, None, "it breaks")
        hub.uploaded[self.path.rsplit("/", 1)[1]] = body
        return self._json({})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _commit_files(self, name: str, revision: str, lines: list[dict]) -> None:
        repository, hub = self.server_hub.repositories[name], self.server_hub
        pull = "create_pr=1" in self.path
        files = dict(repository.commits[repository.refs[revision]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.uploaded[value["oid"]]
            else:
                del files[value["path"]]
        sha = repository.commit(files, "refs/pr/1" if pull else revision, lines[0]["value"]["summary"])
        answer = {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        if pull:
            answer["pullRequestUrl"] = f"{hub.url}/{name}/discussions/1"
        self._json(answer)

    def _answer_file(self) -> None:
        owner, name, _, rest = urlsplit(unquote(self.path)).path.lstrip("/").split("/", 3)
        repository = self.server_hub.repositories.get(f"{owner}/{name}")
        refs = [*repository.refs, *repository.commits] if repository is not None else []
        revision = next((ref for ref in sorted(refs, key=len, reverse=True) if rest.startswith(f"{ref}/")), "main")
        found = self._commit(f"{owner}/{name}", revision)
        if found is None:
            return
        sha, files = found
        path = rest.removeprefix(f"{revision}/")
        if path not in files:
            return self._error(404, "EntryNotFound", "no such file", sha)
        data, status, extra = files[path], 200, {}
        wanted = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if wanted[1] and data:
            start, stop = int(wanted[0]), min(int(wanted[2] or len(data)) + 1, len(data))
            extra = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            status, data = 206, data[start:stop]
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        self._send(status, data, {"ETag": etag, "X-Repo-Commit": sha, "Accept-Ranges": "bytes", **extra})

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision, if it may be read; answers with the error otherwise."""
        repository = self.server_hub.repositories.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return self._error(401, None, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and token != TOKEN):
            return self._error(401, "RepoNotFound", "Repository not found")
        if repository.gated and token != TOKEN:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def _may_write(self) -> bool:
        if self.headers.get("Authorization", "").removeprefix("Bearer ") == TOKEN or "lfs" in self.path:
            return True
        self._error(403, None, "You don't have the rights to create a model under this namespace")
        return False

    def _error(self, status: int, code: str | None, message: str, sha: str | None = None) -> None:
        headers = {"X-Error-Message": message}
        if code is not None:
            headers["X-Error-Code"] = code
        if sha is not None:
            headers["X-Repo-Commit"] = sha
        self._send(status, b"{}", headers)

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        body = self.command != "HEAD"
        self.server_hub.requests.append((self.command, urlsplit(unquote(self.path)).path, len(data) if body else 0))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))
