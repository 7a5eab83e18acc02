"""A Hugging Face Hub on this machine, for tests: the real `huggingface_hub` client talks to it over real HTTP.

Model repositories only, with one user and one branch ("main"), all in memory. The answers follow the real Hub where
it makes a difference to the client or its user: status codes, error headers, what is stored as LFS, what is refused.

    with HubServer(token="hf_test", user="tester") as hub:
        subprocess.run([...], env={**os.environ, **hub.environment})
        assert "config.json" in hub.repositories["tester/model"].files
"""

import base64
import contextlib
import hashlib
import json
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml


Tree = dict[str, bytes]

LFS_SUFFIXES = (".safetensors", ".bin", ".pth")
LARGEST_REGULAR_FILE = 10_000_000
# What every new repository of the Hub contains. The client never deletes it either.
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r\n|\r|\n|$)", re.DOTALL)
REPO, REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., "Reply"]]] = []

# What the metadata of a model card must look like, a small part of the rules of the Hub. `object` stands for anything.
RESULT = {
    "task": {"type": str},
    "dataset": {"type": str, "name": str},
    "metrics": [{"type": str, "value": object}],
}
CARD = {
    "license": str,
    "pipeline_tag": str,
    "base_model": [str],
    "datasets": [str],
    "tags": [str],
    "model-index": [{"name": str, "results": [RESULT]}],
}


@dataclass
class Fault:
    """Goes wrong in the next `times` requests with this method whose path has a match of `path_pattern`.

    `kind` is "status 500" (or any other status: the request is read, and refused before it has any effect) or "cut":
    the connection ends after half of the body, be it of the upload or of the download.
    """

    method: str
    path_pattern: str
    kind: str
    times: int = 1


@dataclass
class Reply:
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


class Refusal(Exception):
    """An answer other than a success. `code` is what the client picks its exception by."""

    def __init__(self, status: int, message: str, code: str | None = None, content: Any = None, **headers: str):
        super().__init__(message)
        self.headers = {"X-Error-Message": message.encode("ascii", "replace").decode()} | (
            {"X-Error-Code": code} if code else {}
        )
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.reply = Reply(json.dumps({"error": message, **(content or {})}).encode(), self.headers, status)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    """Whether the Hub keeps a file outside of git: by its name, its size, or because it is binary."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LARGEST_REGULAR_FILE or b"\0" in sample[:512])


@dataclass
class Repository:
    """`commits[i]` has the commit hash `hashes[i]`: each commit keeps its whole tree, so that all stay readable."""

    name: str
    private: bool = False
    commits: list[Tree] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by SHA-256: what was uploaded, committed or not
    descriptions: dict[tuple[str, bytes], dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> Tree:
        return self.commits[-1]

    def commit(self, files: Tree) -> str:
        """Add a commit. The list of trees grows last, in one step: no request ever sees half of a commit."""
        listing = "".join(f"{path} {self.describe(path, files[path])['oid']}\n" for path in sorted(files))
        parent = self.hashes[-1] if self.hashes else self.name
        self.hashes.append(hashlib.sha1(f"{parent}\n{len(self.commits)}\n{listing}".encode()).hexdigest())
        self.commits.append(files)
        return self.hashes[-1]

    def at(self, revision: str) -> tuple[str, Tree]:
        newest = len(self.commits) - 1
        if revision in ("main", "refs/heads/main"):
            return self.hashes[newest], self.commits[newest]
        if revision in self.hashes[: newest + 1]:
            return revision, self.commits[self.hashes.index(revision)]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def describe(self, path: str, content: bytes) -> dict[str, Any]:
        """A file as the tree listing of the Hub shows it. Hashing takes time, hence the dictionary."""
        if (path, content) not in self.descriptions:
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if is_lfs(path, content, len(content)):
                sha256 = hashlib.sha256(content).hexdigest()
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
                entry["oid"] = git_sha1(pointer.encode())
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
            self.descriptions[path, content] = entry
        return self.descriptions[path, content]


def mismatches(value: Any, rule: Any, where: str) -> Iterator[str]:
    """Where a part of the metadata differs from its rule in `CARD`."""
    kind: Any = type(rule) if isinstance(rule, (dict, list)) else rule
    if value is None or not isinstance(value, kind):
        yield f'"{where}" must be {"given" if kind is object else f"a {kind.__name__}"}'
    elif kind is dict:
        for key, inner in rule.items():
            yield from mismatches(value.get(key), inner, f"{where}.{key}")
    elif kind is list:
        for i, item in enumerate(value):
            yield from mismatches(item, rule[0], f"{where}[{i}]")


def check_card(content: str) -> list[str]:
    """Refuse a model card with wrong metadata, as the Hub does when asked to, and in commits. Returns warnings."""
    match = FRONT_MATTER.match(content)
    if match is None:
        return ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(match[1])
        errors = [] if isinstance(metadata, dict) else ["the metadata must be a mapping"]
    except yaml.YAMLError as error:
        errors = [f"not YAML: {error}"]
    for key, rule in CARD.items() if not errors else ():
        if key in metadata:
            value = [metadata[key]] if rule == [str] and isinstance(metadata[key], str) else metadata[key]
            errors += mismatches(value, rule, key)
            if key == "pipeline_tag" and "-" not in str(value):
                errors.append('"pipeline_tag" must be the name of a task')
    if errors:
        problems = {"errors": [{"message": error} for error in errors], "warnings": []}
        raise Refusal(400, "Invalid metadata in README.md", content=problems)
    return []


def to_json(value: Any) -> Reply:
    return Reply(json.dumps(value).encode())


def route(method: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    def register(function: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as those of the Hub do
    disable_nagle_algorithm = True
    server: "Server"

    def answer(self) -> None:
        """Read a request, have it answered, or have it fail as the next fault says."""
        self.hub = self.server.hub
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        fault = self.hub.note_request(self.command, path, self.headers.get("Range"))
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut" and length:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        try:
            if fault and fault != "cut":
                raise Refusal(int(fault.removeprefix("status ")), "This fault is part of a test")
            if "Transfer-Encoding" in self.headers:
                self.close_connection = True  # the body is still to be read
                raise Refusal(411, "Content-Length is required")
            reply = self.dispatch(path)
        except Refusal as refusal:
            reply = refusal.reply
        content = b"" if self.command == "HEAD" else reply.body
        if fault == "cut":
            self.close_connection = True
            if not content:
                return
            content = content[: len(content) // 2]
        self.send_response(reply.status)
        for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def dispatch(self, path: str) -> Reply:
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and self.command in method.split():
                groups = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                try:
                    return function(self, **groups)
                except (KeyError, TypeError, ValueError) as error:
                    raise Refusal(400, f"Malformed request: {error!r}") from error
        raise Refusal(404, f"Nothing answers {self.command} {path}")

    def log_message(self, *arguments: Any) -> None:
        """Silence: the tests look at `HubServer.requests`."""

    def knows_user(self) -> bool:
        """Whether the request has the token. As at the Hub, a wrong one is refused even for what is public."""
        if self.headers.get("Authorization", f"Bearer {self.hub.token}") != f"Bearer {self.hub.token}":
            raise Refusal(401, "Invalid credentials in Authorization header")
        return "Authorization" in self.headers

    def require_user(self, namespace: str, code: str | None = None) -> None:
        if not self.knows_user():
            raise Refusal(401, "Invalid username or password.", code)
        if namespace not in self.hub.namespaces:
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        """Like the Hub, do not tell a private repository from a missing one."""
        known, namespace = self.knows_user(), repo_id.split("/")[0]
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not (known and namespace in self.hub.namespaces)):
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_user(namespace, "RepoNotFound")
        return repository

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Reply:
        self.require_user(self.hub.user)
        organizations = [{"type": "org", "name": name} for name in self.hub.namespaces[1:]]
        rights = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return to_json({"type": "user", "name": self.hub.user, "orgs": organizations, "auth": rights})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Reply:
        warnings = check_card(json.loads(self.body)["content"])
        return to_json({"errors": [], "warnings": [{"message": warning} for warning in warnings]})

    @route("POST", "/api/repos/create")
    def create(self) -> Reply:
        wanted = json.loads(self.body)
        if wanted.get("type", "model") != "model":
            raise Refusal(400, "Only models are served here")
        namespace = wanted.get("organization") or self.hub.user
        self.require_user(namespace)
        repo_id = f"{namespace}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        private = wanted.get("private") is True or wanted.get("visibility") == "private"  # older and newer clients
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                raise Refusal(409, "You already created this model repo", content=answer)
            self.hub.add_repository(repo_id, {".gitattributes": GIT_ATTRIBUTES}, private)
        return to_json(answer)

    @route("GET", f"/api/models/{REPO}(/revision/{REVISION})?")
    def model_info(self, repo_id: str, revision: str) -> Reply:
        repository = self.repository(repo_id)
        commit, files = repository.at(revision or "main")
        siblings = []
        for path in sorted(files):
            sibling: dict[str, Any] = {"rfilename": path}
            if self.query.get("blobs", [""])[0].lower() in ("true", "1"):
                entry = repository.describe(path, files[path])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
            siblings.append(sibling)
        names = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit}
        return to_json({**names, "private": repository.private, "gated": False, "tags": [], "siblings": siblings})

    def entries(self, repository: Repository, revision: str) -> dict[str, dict[str, Any]]:
        """The files and the folders of a commit, by path."""
        commit, files = repository.at(revision)
        entries = {path: repository.describe(path, content) for path, content in files.items()}
        for path in files:
            for end in (match.start() for match in re.finditer("/", path)):
                oid = hashlib.sha1(f"{commit} {path[:end]}".encode()).hexdigest()
                entries[path[:end]] = {"type": "directory", "path": path[:end], "size": 0, "oid": oid}
        return dict(sorted(entries.items()))

    @route("GET", f"/api/models/{REPO}/tree/{REVISION}(/(?P<folder>.+))?")
    def tree(self, repo_id: str, revision: str, folder: str) -> Reply:
        entries = self.entries(self.repository(repo_id), revision)
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        listed = [entry for path, entry in entries.items() if path.startswith(prefix)]
        if self.query.get("recursive", [""])[0].lower() not in ("true", "1"):
            listed = [entry for entry in listed if "/" not in entry["path"][len(prefix) :]]
        return to_json(listed)

    @route("POST", f"/api/models/{REPO}/paths-info/{REVISION}")
    def paths_info(self, repo_id: str, revision: str) -> Reply:
        entries = self.entries(self.repository(repo_id), revision)
        paths = parse_qs(self.body.decode()).get("paths", [])
        return to_json([entries[path.rstrip("/")] for path in paths if path.rstrip("/") in entries])

    @route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
    def preupload(self, repo_id: str, revision: str) -> Reply:
        """How each file is to be uploaded. The hash of the one that is there lets the client skip what is the same."""
        repository = self.repository(repo_id, write=True)
        _, files = repository.at(revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, base64.b64decode(file["sample"]), file["size"]) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in files:
                entry = repository.describe(path, files[path])
                answer["oid"] = entry.get("lfs", entry)["oid"]
            answers.append(answer)
        return to_json({"files": answers})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> Reply:
        """Where to upload what. An object that is there already gets no action.

        As at the Hub, uploads go to another store: without the token, to a URL that is itself a secret.
        """
        repository = self.repository(repo_id, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repository.objects:
                verify = f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"
                upload = f"{self.hub.endpoint}/storage/{self.hub.secret}/{repo_id}/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        return to_json({"transfer": "basic", "objects": objects})

    @route("PUT", f"/storage/(?P<secret>[^/]+)/{REPO}/(?P<oid>[^/]+)")
    def lfs_upload(self, secret: str, repo_id: str, oid: str) -> Reply:
        if secret != self.hub.secret or repo_id not in self.hub.repositories:
            raise Refusal(403, "SignatureDoesNotMatch")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "XAmzContentSHA256Mismatch")
        self.hub.repositories[repo_id].objects[oid] = self.body
        return Reply()

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
    def lfs_verify(self, repo_id: str) -> Reply:
        wanted = json.loads(self.body)
        if len(self.repository(repo_id, write=True).objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(422, "The object is missing or has another size")
        return to_json({})

    @route("POST", f"/api/models/{REPO}/commit/{REVISION}")
    def commit(self, repo_id: str, revision: str) -> Reply:
        """Apply a commit to a copy of the newest tree: what is refused in the middle has changed nothing."""
        repository = self.repository(repo_id, write=True)
        if self.query.get("create_pr") or revision != "main":
            raise Refusal(400, "Only commits to main are served here")
        (_, header), *changes = ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines()))
        with self.hub.lock:
            newest, tree = repository.at("main")
            if not newest.startswith(header.get("parentCommit", "")):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(tree)
            for key, value in changes:
                self.apply(repository, files, key, value)
            if "README.md" in files:
                check_card(files["README.md"].decode())
            oid = repository.commit(files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        return to_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def apply(self, repository: Repository, files: Tree, key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"], validate=True)
            if is_lfs(path, content, len(content)):
                raise Refusal(400, f"Your push was rejected because {path} is binary or too large for git: use LFS")
            files[path] = content
        elif key == "lfsFile":
            if len(repository.objects.get(value["oid"], b"")) != value["size"]:
                raise Refusal(400, f"Your push was rejected because an LFS pointer pointed to a missing file: {path}")
            files[path] = repository.objects[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            prefix = path.rstrip("/") + "/"
            gone = [name for name in files if (name.startswith(prefix) if key == "deletedFolder" else name == path)]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation: {key}")

    @route("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, repo_id: str, revision: str, path: str) -> Reply:
        repository = self.repository(repo_id)
        commit, files = repository.at(revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit)
        content = files[path]
        entry = repository.describe(path, content)
        etag = f'"{entry.get("lfs", entry)["oid"]}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream" if "lfs" in entry else "text/plain; charset=utf-8"
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD" or wanted is None or not any(wanted.groups()):
            return Reply(content, headers)
        first, last = wanted.groups()
        start = int(first) if first else max(len(content) - int(last), 0)
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= end:
            raise Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{len(content)}")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return Reply(content[start:end], headers, 206)


class Server(ThreadingHTTPServer):
    """Keeps its connections, to end them when it stops: clients hold theirs open, and threads would wait for them."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, hub: "HubServer"):
        self.hub, self.connections = hub, set[socket.socket]()
        super().__init__(("127.0.0.1", 0), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests, any other error is a mistake in this file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """The server, from `with` to the end of its block. See the docstring of the module."""

    def __init__(self, token: str = "hf_test", user: str = "tester", organizations: Sequence[str] = ()):
        self.token, self.user, self.namespaces = token, user, (user, *organizations)
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []  # method, path without the query, header `Range`
        self.secret = secrets.token_hex(8)
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self.server = Server(self)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        for connection in list(self.server.connections):
            with contextlib.suppress(OSError):  # it has just ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def environment(self) -> dict[str, str]:
        """For the processes that are to use this server. They read it when they import `huggingface_hub`."""
        switches = ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_UPDATE_CHECK", "DISABLE_PROGRESS_BARS")
        settings = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "NO_PROXY": "127.0.0.1"}
        return settings | {"HF_HUB_OFFLINE": "0"} | {f"HF_HUB_{name}": "1" for name in switches}

    def add_repository(self, name: str, files: Tree, private: bool = False) -> Repository:
        """Put a repository there with `files` as its first commit, whoever's namespace it is in."""
        repository = Repository(name, private)
        for path, content in files.items():
            entry = repository.describe(path, content)
            if "lfs" in entry:
                repository.objects[entry["lfs"]["oid"]] = content
        repository.commit(dict(files))
        self.repositories[name] = repository
        return repository

    def note_request(self, method: str, path: str, byte_range: str | None) -> str | None:
        """Add to `requests`. Returns the kind of the first fault that applies, which is thereby used."""
        with self.lock:
            self.requests.append((method, path, byte_range))
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path_pattern, path):
                    fault.times -= 1
                    return fault.kind
        return None
