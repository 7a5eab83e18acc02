"""A Hugging Face Hub on this machine: the real `huggingface_hub` client talks to it over HTTP.

Model repositories of one user, one branch ("main"), in memory. Status codes, error headers and what is stored as LFS
follow the real Hub, as far as pushing and loading need them. It does not check tokens and permissions.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment})
        assert "config.json" in hub.repositories["tester/model"].files
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


Tree = dict[str, bytes]

LFS_SUFFIXES = (".safetensors", ".bin", ".pth")
USER, TOKEN = "tester", "hf_test"
REPO, REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []


class Refusal(Exception):
    """An answer with an error status. The client chooses its exception by `code`."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repository:
    commits: list[Tree] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    uploads: Tree = field(default_factory=dict)  # LFS objects by SHA-256, committed or not

    @property
    def files(self) -> Tree:
        return self.commits[-1]

    def commit(self, files: Tree) -> str:
        self.commits.append(files)
        self.hashes.append(hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest())
        return self.hashes[-1]

    def at(self, revision: str) -> tuple[str, Tree]:
        if revision == "main":
            return self.hashes[-1], self.commits[-1]
        if revision in self.hashes:
            return revision, self.commits[self.hashes.index(revision)]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def describe(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    entry = {"type": "file", "path": path, "size": len(content)}
    if path.endswith(LFS_SUFFIXES):
        sha256 = hashlib.sha256(content).hexdigest()
        return {**entry, "oid": sha256, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 134}}
    return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


def route(method: str, pattern: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub = self.server.hub
        status, headers = 200, {}
        try:
            reply = self.dispatch(path)
            content, headers = reply if isinstance(reply, tuple) else (json.dumps(reply).encode(), {})
        except Refusal as refusal:
            status, content = refusal.status, json.dumps({"error": str(refusal)}).encode()
            headers = {"X-Error-Message": str(refusal), "X-Error-Code": refusal.code}
        self.send_response(status)
        headers = {"Content-Type": "application/json", **headers, "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def dispatch(self, path: str) -> Any:
        for method, pattern, function in ROUTES:
            if self.command in method.split() and (match := pattern.fullmatch(path)):
                return function(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise Refusal(404, f"Nothing answers {self.command} {path}")

    def log_message(self, *arguments: Any) -> None:
        """Prints nothing."""

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.hub.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo_id]

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Any:
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create(self) -> Any:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if repo_id in self.hub.repositories:
            raise Refusal(409, "You already created this model repo")
        self.hub.add_repository(repo_id, {".gitattributes": b""})
        return {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}

    @route("GET", f"/api/models/{REPO}(/revision/{REVISION})?")
    def model_info(self, repo_id: str, revision: str) -> Any:
        commit, files = self.repository(repo_id).at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": repo_id, "sha": commit, "private": False, "tags": [], "siblings": siblings}

    @route("GET", f"/api/models/{REPO}/tree/{REVISION}")
    def tree(self, repo_id: str, revision: str) -> Any:
        return [describe(path, content) for path, content in self.repository(repo_id).at(revision)[1].items()]

    @route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
    def preupload(self, repo_id: str, revision: str) -> Any:
        modes = [
            {"path": path, "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular", "shouldIgnore": False}
            for path in (file["path"] for file in json.loads(self.body)["files"])
        ]
        return {"files": modes}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> Any:
        store = f"{self.hub.endpoint}/storage/{repo_id}"
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{store}/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    @route("PUT", f"/storage/{REPO}/(?P<oid>[^/]+)")
    def lfs_upload(self, repo_id: str, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "XAmzContentSHA256Mismatch")
        self.hub.repositories[repo_id].uploads[oid] = self.body
        return {}

    @route("POST", f"/api/models/{REPO}/commit/main")
    def commit(self, repo_id: str) -> Any:
        repository = self.repository(repo_id)
        files = dict(repository.files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = repository.uploads[value["oid"]]
        oid = repository.commit(files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}

    @route("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, repo_id: str, revision: str, path: str) -> Any:
        commit, files = self.repository(repo_id).at(revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        etag = f'"{describe(path, files[path])["oid"]}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(files[path]))}
        return files[path], headers


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: "HubServer"):
        self.hub = hub
        super().__init__(("127.0.0.1", 0), Handler)


class HubServer:
    """The server, from `with` to the end of its block."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}

    def __enter__(self) -> "HubServer":
        self.server = Server(self)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to use this server. They read it when they import `huggingface_hub`."""
        switches = ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_UPDATE_CHECK", "DISABLE_PROGRESS_BARS")
        settings = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        return settings | {f"HF_HUB_{name}": "1" for name in switches}

    def add_repository(self, repo_id: str, files: Tree) -> Repository:
        """Adds a repository of any user with `files` as its first commit."""
        self.repositories[repo_id] = Repository()
        self.repositories[repo_id].commit(files)
        return self.repositories[repo_id]
