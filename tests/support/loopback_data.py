"""A Hub on this machine's loopback with data sets to read, for a process whose HF_ENDPOINT is its `url`."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


class DataHub(ThreadingHTTPServer):
    """Start it with `with`; each data set has the branch `main` alone."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = repositories

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: DataHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        name = next((name for name in self.server.repositories if f"/datasets/{name}/" in f"{path}/"), None)
        if name is None:
            return self._send(404, {}, X_Error_Code="RepoNotFound")
        self.files = self.server.repositories[name]
        revision = rf"(?:main|{COMMIT})"
        if file := re.fullmatch(rf"/datasets/{name}/resolve/{revision}/(.+)", path):
            return self._file(self.files.get(file[1]))
        if re.fullmatch(rf"/api/datasets/{name}(/revision/{revision})?", path):
            listed = [{"rfilename": file} for file in self.files]
            return self._send(200, {"id": name, "sha": COMMIT, "private": False, "siblings": listed})
        if folder := re.fullmatch(rf"/api/datasets/{name}/tree/{revision}/?(.*)", path):
            return self._send(200, self._entries(folder[1]))
        if re.fullmatch(rf"/api/datasets/{name}/paths-info/{revision}", path):
            wanted = parse_qs(body.decode()).get("paths", [])
            return self._send(200, [entry for file in wanted for entry in self._entries("") if entry["path"] == file])
        return self._send(404, {}, X_Error_Code="RevisionNotFound")

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
            return self._send(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return self._send(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    def _send(self, status, content, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
