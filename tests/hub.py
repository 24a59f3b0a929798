"""A model hub on this machine: that part of the Hub's HTTP interface that `huggingface_hub` asks for.

Repositories with commits, branches, tags, files of git and of LFS; private ones and gated ones.  Nothing of the client
is replaced: `HF_ENDPOINT` points it here, in a process of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

OWNER = "hf_owner"  # the token that may do everything; other tokens may read what is neither private nor gated
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch, and return the commit."""
        tree = {**self.files(branch), **files}
        content = repr((len(self.commits), sorted(tree.items()))).encode()
        self.refs[branch] = hashlib.sha1(content).hexdigest()
        self.commits[self.refs[branch]] = tree
        return self.refs[branch]

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits.get(self.resolve(revision) or "", {})


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def oid(path: str, content: bytes) -> str:
    """What the Hub gives as the ETag of a file: the id of git's blob, or of LFS's object."""
    return (
        hashlib.sha256(content) if is_lfs(path) else hashlib.sha1(b"blob %d\0%b" % (len(content), content))
    ).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server; in use as a context it runs in a thread.

    Attributes:
        repositories: by "owner/name".
        requests: method, path and status of each request, in their order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def add(self, name: str, files: dict[str, bytes], **kwargs: Any) -> Repository:
        repository = self.repositories[name] = Repository(**kwargs)
        repository.commit(files)
        return repository


class Refusal(Exception):  # noqa: N818
    """An answer that is an error of the Hub's."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.read()
        try:
            for methods, pattern, action in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in methods.split():
                    content, headers = action(self, **found.groupdict())
                    self.reply(200, content, headers)
                    return
            self.reply(501, f"{self.command} {path}".encode(), {})
        except Refusal as refusal:
            self.reply(refusal.status, json.dumps(refusal.body).encode(), refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.server.requests.append((self.command, unquote(urlsplit(self.path).path), status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # -- who may do what --

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def owner(self) -> None:
        if self.token() != OWNER:
            raise Refusal(403 if self.token() else 401, message="You may not write here.")

    def repository(self, name: str, content: bool = False) -> Repository:
        found = self.server.repositories.get(name)
        if found is None or (found.private and self.token() != OWNER):
            raise Refusal(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        if found.gated and content and self.token() != OWNER:
            raise Refusal(
                403 if self.token() else 401,
                "GatedRepo",
                f"Access to model {name} is restricted. You must have access to it and be authenticated to access it.",
            )
        return found

    def revision(self, name: str, revision: str, content: bool = False) -> tuple[Repository, str]:
        repository = self.repository(name, content)
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    # -- reading --

    def info(self, repo: str, revision: str = "main") -> Any:
        repository, commit = self.revision(repo, revision)
        siblings = [{"rfilename": path} for path in repository.files(commit)]
        return as_json({"id": repo, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> Any:
        repository, commit = self.revision(repo, revision)
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
            for path, content in repository.files(commit).items()
            if path.startswith(f"{folder}/" if folder else "")
        ]
        return as_json(entries)

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        repository, commit = self.revision(repo, revision, content=True)
        content = repository.files(commit).get(path)
        if content is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        etag = f'"{oid(path, content)}"'
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))} if is_lfs(path) else {}
        return content, {"ETag": etag, "X-Repo-Commit": commit, **linked}

    # -- writing --

    def create(self) -> Any:
        self.owner()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            raise Refusal(409, message="You already created this model repo", url=url)
        self.server.add(name, {}, private=asked.get("visibility") == "private")
        return as_json({"url": url, "id": name})

    def validate(self) -> Any:
        """As the Hub does: `base_model` must be the id of a model, or a list of such."""
        parts = json.loads(self.body)["content"].split("---\n", 2)
        data = (yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None) or {}
        bases = data.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", base):
                message = f'"base_model" with value "{base}" is not valid.'
                raise Refusal(400, errors=[{"message": message}])
        return as_json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> Any:
        self.owner()
        files = self.revision(repo, revision)[0].files(revision)
        return as_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": oid(file["path"], files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def batch(self, repo: str) -> Any:
        self.owner()
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        return as_json({"transfer": "basic", "objects": objects})

    def upload(self, sha: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != sha:
            raise Refusal(400, message="The content is not what its name says.")
        self.server.objects[sha] = self.body
        return b"", {}

    def commit(self, repo: str, revision: str) -> Any:
        self.owner()
        repository, _ = self.revision(repo, revision)
        files = {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] != "header":
                raise Refusal(501, message=line.decode())
        commit = repository.commit(files, revision)
        return as_json({"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})

    def branch(self, repo: str, name: str) -> Any:
        self.owner()
        refs = self.repository(repo).refs
        if name in refs:
            raise Refusal(409, message="Reference already exists")
        refs[name] = refs["main"]
        return as_json({})

    def tag(self, repo: str, revision: str) -> Any:
        self.owner()
        repository, commit = self.revision(repo, revision)
        repository.refs[json.loads(self.body)["tag"]] = commit
        return as_json({})


def as_json(value: Any) -> tuple[bytes, dict[str, str]]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


ROUTES = [
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", Handler.tree),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/(?P<sha>[0-9a-f]{64})", Handler.upload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", f"/api/models/{REPO}/branch/(?P<name>.+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/tag/(?P<revision>.+)", Handler.tag),
]
