"""A Hub on this machine's loopback with data sets to read, for a process whose HF_ENDPOINT is its `url`."""

import hashlib
import re
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.loopback import Handler, Server

COMMIT = "c0ffee" * 6 + "c0ff"


class DataHub(Server):
    """Start it with `with`; each data set has the branch `main` alone."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(_Handler)
        self.repositories = repositories


class _Handler(Handler):
    server: DataHub

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        name = next((name for name in self.server.repositories if f"/datasets/{name}/" in f"{path}/"), None)
        if name is None:
            return self.send(404, {}, X_Error_Code="RepoNotFound")
        self.files = self.server.repositories[name]
        revision = rf"(?:main|{COMMIT})"
        if file := re.fullmatch(rf"/datasets/{name}/resolve/{revision}/(.+)", path):
            return self._file(self.files.get(file[1]))
        if re.fullmatch(rf"/api/datasets/{name}(/revision/{revision})?", path):
            listed = [{"rfilename": file} for file in self.files]
            return self.send(200, {"id": name, "sha": COMMIT, "private": False, "siblings": listed})
        if folder := re.fullmatch(rf"/api/datasets/{name}/tree/{revision}/?(.*)", path):
            return self.send(200, self._entries(folder[1]))
        if re.fullmatch(rf"/api/datasets/{name}/paths-info/{revision}", path):
            wanted = parse_qs(body.decode()).get("paths", [])
            return self.send(200, [entry for file in wanted for entry in self._entries("") if entry["path"] == file])
        return self.send(404, {}, X_Error_Code="RevisionNotFound")

    do_GET = do_HEAD = do_POST = _answer

    def _entries(self, folder):
        """The files and folders directly in a folder."""
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for name, content in self.files.items():
            head, deeper, _ = name.removeprefix(prefix).partition("/")
            if name.startswith(prefix):
                kind = {"type": "directory"} if deeper else {"type": "file", "size": len(content)}
                entries[head] = {**kind, "path": prefix + head, "oid": hashlib.sha1(content).hexdigest()}
        return list(entries.values())

    def _file(self, content):
        if content is None:
            return self.send(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return self.send(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)
