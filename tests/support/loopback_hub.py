"""A Hub on this machine's loopback: enough of its HTTP to create, preupload, upload through LFS, commit, and load."""

import base64
import hashlib
import json
import re
import socket
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

from tests.support.loopback import Handler, Server

TOKEN = "hf_" + "T0ken" * 7
_LFS = (".safetensors", ".pth", ".bin")


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    summaries: list[str] = field(default_factory=list)


class Hub(Server):
    """Start it with `with`; what arrived stands in `repositories`, what was asked for in `requests`."""

    def __init__(self):
        super().__init__(_Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.failures: dict[str, object] = {}
        self.remarks: list[str] = []

    def fail(self, pattern: str, what: object) -> None:
        """Answers requests "METHOD /path" that match with a status, (status, message or body), or "drop"."""
        self.failures[pattern] = what

    def received(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repository].branches[branch]

    def uploads(self) -> list[str]:
        return [line for line in self.requests if line.startswith("PUT ")]

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the tests."""


@contextmanager
def logged_in(monkeypatch, tmp_path):
    """A Hub that the client in this process talks to, logged in, by LFS and without waiting before a retry."""
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield server
    huggingface_hub.close_session()


class _Handler(Handler):
    server: Hub

    def _answer(self):
        address = urlsplit(self.path)
        self.route, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self._read_body()
        line = f"{self.command} {self.route}"
        self.server.requests.append(line)
        self.server.bodies.append(self.body)
        for pattern, what in self.server.failures.items():
            if re.search(pattern, line):
                return self._fail(what)
        for command, pattern, method in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if self.command in command and match:
                return method(self, *match.groups())
        return self.send(404, {"error": "Not Found"})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, what):
        if what == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, message = what if isinstance(what, tuple) else (what, "no")
        if isinstance(message, bytes):
            self.send(status, message)
        else:
            self.send(status, {"error": message}, X_Error_Message=message)

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _validate(self):
        content = json.loads(self.body)["content"]
        errors = [] if "license: [" not in content else [{"message": '"license" must be a string'}]
        warnings = [{"message": remark} for remark in self.server.remarks]
        self.send(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def _create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            return self.send(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return self.send(200, {"url": f"{self.server.url}/{name}", "name": name, "id": "1"})

    def _repository(self, name, branch="main"):
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._is_known()):
            self.send(404 if self._is_known() else 401, {}, X_Error_Code="RepoNotFound")
            return None
        if branch not in repository.branches and branch not in repository.commits:
            self.send(404, {}, X_Error_Code="RevisionNotFound")
            return None
        return repository

    def _info(self, name, _, branch):
        repository = self._repository(name, branch or "main")
        if repository:
            files = [{"rfilename": path} for path in repository.branches[branch or "main"]]
            content = {"id": name, "sha": repository.commits[-1], "private": repository.private, "siblings": files}
            self.send(200, content)

    def _tree(self, name, branch):
        repository = self._repository(name, branch)
        if repository:
            files = repository.branches[branch].items()
            oids = {path: hashlib.sha1(data).hexdigest() for path, data in files}
            entries = [{"type": "file", "path": path, "size": len(data), "oid": oids[path]} for path, data in files]
            self.send(200, entries)

    def _branch(self, name, branch):
        repository = self._repository(name)
        if repository:
            repository.branches[branch] = dict(repository.branches["main"])
            self.send(200, {})

    def _preupload(self, name, branch):
        if self._repository(name, branch):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LFS) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.send(200, {"files": modes})

    def _batch(self, name):
        answers = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.url}/store/{asked['oid']}?X-Signature=s3cret"}
                verify = {"href": f"{self.server.url}/{name}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self.send(200, {"transfer": "basic", "objects": answers})

    def _store(self, oid):
        assert "Authorization" not in self.headers  # the store is somebody else's
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, {"error": "sha256 differs"})
        self.server.objects[oid] = self.body
        return self.send(200, {})

    def _verify(self, name):
        asked = json.loads(self.body)
        right = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
        self.server.verified.add(asked["oid"])
        self.send(200 if right else 404, {})

    def _commit(self, name, branch):
        repository = self._repository(name, branch)
        if repository is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        pull_request = "create_pr" in self.query
        target = "refs/pr/1" if pull_request else branch
        files = dict(repository.branches[branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.server.verified
                files[value["path"]] = self.server.objects[value["oid"]]
        repository.branches[target] = files
        repository.summaries.append(lines[0]["value"]["summary"])
        oid = hashlib.sha1(self.body).hexdigest()
        repository.commits.append(oid)
        repository.branches[oid] = files
        answer = {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/1"
        self.send(200, answer)

    def _resolve(self, name, branch, path):
        repository = self._repository(name, branch)
        if repository is None:
            return
        content = repository.branches[branch].get(path)
        if content is None:
            self.send(404, {}, X_Error_Code="EntryNotFound")
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        commit = repository.commits[-1]
        self.send(200, content, ETag=etag, X_Repo_Commit=commit, X_Linked_Size=len(content), X_Linked_ETag=etag)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/validate-yaml", _Handler._validate),
    ("POST", r"/api/repos/create", _Handler._create),
    ("GET", rf"/api/models/{_NAME}(/revision/(.+))?", _Handler._info),
    ("GET", rf"/api/models/{_NAME}/tree/(.+)", _Handler._tree),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler._branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler._preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler._commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/verify", _Handler._verify),
    ("PUT", r"/store/(\w+)", _Handler._store),
    ("GET HEAD", rf"/{_NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", _Handler._resolve),
]
