"""A fake Hugging Face Hub on loopback, which the real huggingface_hub and datasets libraries read from and write to.

Repositories are plain files, so that a test writes what is read and looks at what was written: ``models/OWNER/NAME``
and ``datasets/OWNER/NAME`` hold ``main``, and ``OWNER/NAME@BRANCH`` another branch. The id of a commit is a hash of
the contents; earlier commits stay readable by their ids, from ``commits``, and ``lfs`` has the large files by hash.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+))?(?:/([^/]+))?(?:/(.*))?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Refusal(Exception):  # noqa: N818
    """An answer that is an error; the client chooses its exception by ``code``."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        self.answer = status, code, {"error": message} | more


def is_large(sample: bytes, size: int) -> bool:
    """Whether a file goes through LFS: a binary one, by git's own rule, or a long one.

    The contents of the others come inside the commit. A dataset's shards must not: ``push_to_hub`` deletes each when
    it has announced it, which uploads the large ones.
    """
    return b"\0" in sample[:512] or size > 10_000_000


def blob(file: Path) -> tuple[str, str | None]:
    """The git id of a file's contents, and its SHA-256 if it is a large file."""
    data = file.read_bytes()
    large = hashlib.sha256(data).hexdigest() if is_large(data, len(data)) else None
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), large


def commit_id(folder: Path) -> str:
    """The id of the commit that a folder holds, a hash of all its files."""
    files = sorted((p.relative_to(folder).as_posix(), blob(p)[0]) for p in folder.rglob("*") if p.is_file())
    return hashlib.sha1(json.dumps(files).encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with some requests."""

    requests: str
    """A pattern for the beginning of ``METHOD /path``."""
    times: float = 1
    """So many of them; ``inf``: for ever."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    """The connection breaks after so many bytes of the body."""
    body: bytes | None = None
    """Sent in the place of what is right."""
    seconds: float = 0
    """That it takes."""


class FakeHub:
    """What :func:`fake_hub` yields: the address, the repositories, and what has been asked."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url, self.lock = root, url, threading.Lock()
        self.requests: list[str] = []  #: "METHOD /path" of every request; a whole URL is one that was to leave loopback
        self.tokens: list[str | None] = []  #: what each request says who asks
        self.faults: list[Fault] = []  #: of several, the first that is left counts
        self.at_once = self.most_at_once = 0  #: requests that are answered
        self.private: set[str] = set()  #: "datasets/OWNER/NAME" of the repositories that need a token to be read

    def environment(self, home: Path, token: str | None = "hf_fake") -> dict[str, str]:
        """The environment of a process that uses this Hub; without a token, that of a user who has not logged in."""
        # the caches and the token of whoever runs the tests come before what HF_HOME says
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        # datasets asks http://datasets-server.<endpoint> for a description; no name is looked up when there is a proxy
        environment |= {"http_proxy": self.url, "https_proxy": self.url, "no_proxy": "127.0.0.1"}
        return environment if token is None else environment | {"HF_TOKEN": token}

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = None) -> None:
        """Have this process use this Hub, with an empty cache."""
        from huggingface_hub import constants

        from saekit import hub

        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        monkeypatch.setattr(hub, "_reached", set())
        monkeypatch.setattr(hub, "_unreached", {})
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)

    def fault(self, request: str) -> Fault:
        """What goes wrong with a request."""
        for fault in self.faults:
            if fault.times and re.match(fault.requests, request):
                fault.times -= 1
                return fault
        return Fault("")

    def branch(self, kind: str, name: str, branch: str = "main") -> Path:
        """The folder of a branch of a repository, whether or not it exists."""
        return self.root / kind / (name if branch == "main" else f"{name}@{quote(branch, safe='')}")

    def revision(self, kind: str, name: str, revision: str) -> Path:
        """The folder of a branch or of a commit."""
        main, old = self.branch(kind, name), self.root / "commits" / kind / name / revision
        for folder in (self.branch(kind, name, revision), old):
            if folder.is_dir():
                return folder
        for folder in (main, *main.parent.glob(f"{main.name}@*")):  # files that a test wrote itself have a commit too
            if commit_id(folder) == revision:
                return folder
        raise Refusal(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")

    def keep(self, kind: str, name: str, folder: Path) -> str:
        """Copy the present state of a branch, so that its commit can be read later; the commit's id."""
        commit = commit_id(folder)
        shutil.copytree(folder, self.root / "commits" / kind / name / commit, dirs_exist_ok=True)
        return commit

    def address(self, kind: str, name: str) -> str:
        """The address of a repository's page."""
        return f"{self.url}/{name if kind == 'models' else f'{kind}/{name}'}"

    def create(self, kind: str, name: str, private: bool) -> str:
        """Make a repository, with the one file that new ones have; its address."""
        folder, url = self.branch(kind, name), self.address(kind, name)
        if folder.exists():
            raise Refusal(HTTPStatus.CONFLICT, f"You already created this {kind[:-1]} repo", url=url)
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")
        self.keep(kind, name, folder)
        if private:
            self.private.add(f"{kind}/{name}")
        return url

    def commit(self, kind: str, name: str, branch: str, lines: list[dict[str, Any]]) -> str:
        """Apply the operations of a commit request; the new commit's id."""
        folder = self.branch(kind, name, branch)
        if not folder.is_dir():
            raise Refusal(HTTPStatus.NOT_FOUND, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = self.keep(kind, name, folder)
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                if value.get("parentCommit", parent) != parent:
                    raise Refusal(HTTPStatus.PRECONDITION_FAILED, "A commit has happened since. Please refresh")
                continue
            path = folder / value["path"]
            if key.startswith("deleted"):
                if not path.exists():
                    raise Refusal(HTTPStatus.NOT_FOUND, "A file with this name doesn't exist", "EntryNotFound")
                shutil.rmtree(path) if key == "deletedFolder" else path.unlink()
                while (path := path.parent) != folder and not any(path.iterdir()):
                    path.rmdir()  # git has no empty folders
                continue
            inline, lfs = value.get("content"), self.root / "lfs" / value.get("oid", "")
            data = lfs.read_bytes() if inline is None else base64.b64decode(inline)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return self.keep(kind, name, folder)


def describe(folder: Path, path: Path) -> dict[str, Any]:
    """The entry of a file or a folder in a listing."""
    entry: dict[str, Any] = {"type": "directory", "path": path.relative_to(folder).as_posix(), "size": 0, "oid": "0"}
    if path.is_file():
        oid, large = blob(path)
        entry |= {"type": "file", "size": path.stat().st_size, "oid": oid}
        if large:
            entry["lfs"] = {"oid": large, "size": entry["size"], "pointerSize": 130}
    return entry


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request; each has its own connection, so that none is left open at the end."""

    timeout = 60
    hub: FakeHub  # set on a subclass by :func:`fake_hub`
    extra: dict[str, str]  # headers of the answer

    def answer(self) -> None:
        """Read the request, find the answer to it and send that."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
            self.hub.tokens.append(self.headers.get("Authorization"))
            fault = self.hub.fault(self.hub.requests[-1])
            self.hub.at_once += 1
            self.hub.most_at_once = max(self.hub.most_at_once, self.hub.at_once)
        time.sleep(fault.seconds)
        status, self.extra = 200, {}
        try:
            with self.hub.lock:
                self.hub.at_once -= 1
                if fault.status != 200:
                    raise Refusal(fault.status, "refused")
                found = self.find()
        except Refusal as refusal:
            status, self.extra["X-Error-Code"], found = refusal.answer
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        data = data if fault.body is None else fault.body
        self.extra |= fault.headers
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and wanted:
            start, size = int(wanted[1]), len(data)
            data = data[start : int(wanted[2] or size) + 1]
            status, span = (206, f"{start}-{start + len(data) - 1}") if data else (416, "*")
            self.extra["Content-Range"] = f"bytes {span}/{size}"
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | self.extra).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: fault.cut])

    do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = answer  # noqa: N815

    def find(self) -> Any:
        """The answer to a request, from all that this Hub knows."""
        path = urlsplit(self.path).path
        if not self.path.startswith("/"):
            raise Refusal(HTTPStatus.FORBIDDEN, f"{self.path} is not on loopback")
        if ".." in unquote(path).split("/"):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Invalid path")
        if found := FILE.fullmatch(path):
            folder = self.repository("datasets" if found[1] else "models", found[2], unquote(found[3]))
            file = folder / unquote(found[4])
            if not file.is_file():
                raise Refusal(HTTPStatus.NOT_FOUND, "Entry not found", "EntryNotFound")
            oid, large = blob(file)
            self.extra["ETag"] = f'"{large or oid}"'
            return file.read_bytes()
        if path == "/api/repos/create":
            self.need_token()
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            private = asked.get("private", False) or asked.get("visibility") == "private"
            return {"url": self.hub.create(asked.get("type", "model") + "s", name, private)}
        if path == "/api/whoami-v2":
            self.need_token()
            return {"type": "user", "name": "somebody", "orgs": []}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            self.need_token()
            return {"transfer": "basic", "objects": [self.upload(x) for x in json.loads(self.body)["objects"]]}
        if self.command == "PUT" and path.startswith("/lfs/"):
            (self.hub.root / path[1:]).write_bytes(self.body)
            return {}
        if found := API.fullmatch(path):
            return self.api(found[1], found[2], found[3] or "revision", unquote(found[4] or "main"), found[5] or "")
        raise Refusal(HTTPStatus.NOT_FOUND, f"the fake Hub has no {self.command} {path}")

    def api(self, kind: str, name: str, action: str, revision: str, path: str) -> Any:
        """The answer to a request about one repository."""
        if action in ("preupload", "commit", "branch"):
            self.need_token("RepoNotFound")
        folder = self.repository(kind, name, "main" if action == "branch" else revision)
        match action:
            case "revision":
                files = [{"rfilename": x["path"]} for x in self.listing(folder, "", True) if x["type"] == "file"]
                about = {"id": name, "sha": self.extra["X-Repo-Commit"], "tags": [], "siblings": files}
                return about | {"private": f"{kind}/{name}" in self.hub.private}
            case "tree":
                return self.listing(folder, unquote(path), "recursive=true" in self.path.lower())
            case "preupload":
                return {"files": [self.announced(folder, file) for file in json.loads(self.body)["files"]]}
            case "commit":
                oid = self.hub.commit(kind, name, revision, [json.loads(line) for line in self.body.splitlines()])
                return {"commitOid": oid, "commitUrl": f"{self.hub.address(kind, name)}/commit/{oid}"}
            case "branch":
                new, start = self.hub.branch(kind, name, revision), json.loads(self.body).get("startingPoint", "main")
                if new.exists():
                    raise Refusal(HTTPStatus.CONFLICT, f"Reference already exists: refs/heads/{revision}")
                shutil.copytree(self.hub.revision(kind, name, start), new)
                return {}
        raise Refusal(HTTPStatus.NOT_FOUND, f"the fake Hub has no {self.command} {self.path}")

    def need_token(self, code: str = "") -> None:
        """Refuse somebody who has not logged in; as on the real Hub, the API calls that a repository not found."""
        if not self.headers.get("Authorization"):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "Invalid username or password.", code)

    def repository(self, kind: str, name: str, revision: str) -> Path:
        """The folder of a revision of a repository; that of a private one only with a token."""
        missing = not self.hub.branch(kind, name).is_dir()
        if missing or f"{kind}/{name}" in self.hub.private:
            self.need_token("RepoNotFound")  # who has no token is not told which of the two it is
        if missing:
            raise Refusal(HTTPStatus.NOT_FOUND, "Repository not found", "RepoNotFound")
        folder = self.hub.revision(kind, name, revision)
        self.extra["X-Repo-Commit"] = commit_id(folder)
        return folder

    def listing(self, folder: Path, path: str, recursive: bool) -> list[dict[str, Any]]:
        """The entries of a folder of a repository."""
        if not (folder / path).is_dir():
            raise Refusal(HTTPStatus.NOT_FOUND, f"{path} does not exist", "EntryNotFound")
        return [describe(folder, p) for p in sorted((folder / path).glob("**/*" if recursive else "*"))]

    def announced(self, folder: Path, file: dict[str, Any]) -> dict[str, Any]:
        """How to upload a file, and the hash of the one that it replaces: an unchanged file is not sent."""
        mode = "lfs" if is_large(base64.b64decode(file["sample"]), file["size"]) else "regular"
        old = blob(folder / file["path"]) if (folder / file["path"]).is_file() else None
        oid = {"oid": old[1] or old[0]} if old else {}
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | oid

    def upload(self, item: dict[str, Any]) -> dict[str, Any]:
        """Where to send a large file, unless it is here already."""
        actions = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
        there = (self.hub.root / "lfs" / item["oid"]).exists()
        return {"oid": item["oid"], "size": item["size"]} | ({} if there else actions)

    def log_message(self, *args: object) -> None:
        """Log nothing; :attr:`FakeHub.requests` has it."""


@contextmanager
def fake_hub(root: Path) -> Iterator[FakeHub]:
    """Serve the repositories under ``root`` until the end of the ``with`` block."""
    (root / "lfs").mkdir(parents=True, exist_ok=True)
    hub = FakeHub(root, "")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = False  # closing the server waits for what it still answers
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
