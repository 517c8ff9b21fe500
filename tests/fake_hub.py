"""A stand-in for the Hugging Face hub, on loopback: what huggingface_hub asks for to download files of models."""

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self


class FakeHub:
    """Repositories of files by commit, and refusals on demand.

    asked: (method, path) of every request, in order. ranges: the `Range` headers of downloads.
    refused: repository -> status and X-Error-Code of each answer about it. token: what gated repositories ask for.
    cut: name of a file -> bytes after which the next download of it breaks off.
    """

    def __init__(self):
        self.commits: dict[str, dict[str, Path]] = {}  # commit -> name -> file
        self.revisions: dict[str, dict[str, str]] = {}  # repository -> branch or tag -> commit
        self.asked: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.refused: dict[str, tuple[int, str]] = {}
        self.gated: dict[str, str] = {}
        self.cut: dict[str, int] = {}
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.storage = self.url.replace("127.0.0.1", "localhost")  # another host than the hub's, as the real one

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, repository: str, directory: Path, revision: str = "main") -> str:
        """Serves all files below a directory, as a new commit; returns that."""
        files = {str(file.relative_to(directory)): file for file in sorted(directory.rglob("*")) if file.is_file()}
        content = [f"{repository}:{name}:{_digest(file)}" for name, file in files.items()]
        commit = hashlib.sha1("\n".join(content).encode()).hexdigest()
        self.commits[commit] = files
        self.revisions.setdefault(repository, {})[revision] = commit
        return commit

    @property
    def downloaded(self) -> set[str]:
        """Names of the files that were asked for."""
        return {path.partition("/resolve/")[2].partition("/")[2] for _, path in self.asked if "/resolve/" in path}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # clients keep their connections


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None: ...

    def _answer(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.hub.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[4:5] == ["revision"]:
            self._revision("/".join(parts[2:4]), "/".join(parts[5:]))
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            self._tree("/".join(parts[2:4]), parts[5])
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif parts[:1] == ["storage"]:
            self._send_file(self.hub.commits[parts[1]]["/".join(parts[2:])])
        else:
            self._send(404)

    def _is_refused(self, repository: str) -> bool:
        if repository in self.hub.refused:
            status, code = self.hub.refused[repository]
            self._send(status, {"X-Error-Code": code} if code else {})
        elif repository not in self.hub.revisions:
            self._send(401 if "Authorization" not in self.headers else 404, {"X-Error-Code": "RepoNotFound"})
        elif self.headers.get("Authorization") != f"Bearer {self.hub.gated.get(repository)}" and (
            repository in self.hub.gated
        ):
            status = 403 if "Authorization" in self.headers else 401
            self._send(status, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        else:
            return False
        return True

    def _revision(self, repository: str, revision: str) -> None:
        if self._is_refused(repository):
            return
        commit = self.hub.revisions[repository].get(revision, revision)
        if commit not in self.hub.commits:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in self.hub.commits[commit]]
        self._send_json({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})

    def _tree(self, repository: str, commit: str) -> None:
        """The list of files that huggingface_hub 2 asks for."""
        if self._is_refused(repository):
            return
        files = []
        for name, file in self.hub.commits[commit].items():
            digest, size = _digest(file), file.stat().st_size
            files.append({"type": "file", "path": name, "oid": digest[:40], "size": size})
            if name.endswith(".safetensors"):
                files[-1]["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
        self._send_json(files)

    def _send_json(self, content: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _resolve(self, repository: str, commit: str, name: str) -> None:
        if self._is_refused(repository):
            return
        file = self.hub.commits.get(commit, {}).get(name)
        if file is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit}
        if name.endswith(".safetensors"):  # in LFS: kept elsewhere
            headers |= {"X-Linked-ETag": f'"{_digest(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            return self._send(302, headers | {"Location": f"{self.hub.storage}/storage/{commit}/{name}"})
        self._send_file(file, headers | {"ETag": f'"{_digest(file)[:40]}"'})

    def _send_file(self, file: Path, headers: dict[str, str] | None = None) -> None:
        content, begin = file.read_bytes(), 0
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        cut = self.hub.cut.pop(file.name, None) if self.command == "GET" else None
        self._send(206 if wanted else 200, headers, content[begin:], cut)

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", cut: int | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
