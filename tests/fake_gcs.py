"""Google Cloud Storage as far as gcsfs, TensorStore, Orbax and ArrayRecord use it, in this process's memory.

    with FakeGcs() as storage:
        os.environ |= storage.environment    # before any of them is first used
        epath.Path("gs://bucket/a.txt").write_text("...")

A bucket exists as soon as it is named. The service's promises that they build on hold here too: an object appears
whole, its generation changes each time, preconditions on generations are kept, and a part of an upload or a move that
is sent twice counts once. Anyone is let in.

`FakeGcs(faults=0.01)` fails one request in a hundred, drawn by `seed`, in one of the ways of FAULTS. The last is the
nasty one: the work is done, and the client never hears of it.
"""

import base64
import itertools
import json
import os
import random
import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

FAULTS = ("429", "503", "reset before", "reset after")
MAX_COMPOSED = 32  # objects in one request


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has seen enough hangs up; all else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@dataclass(frozen=True)
class Stored:
    content: bytes
    generation: int


@dataclass
class Upload:
    """One in parts. stored: the object, once it is whole."""

    bucket: str
    name: str
    content: bytearray = field(default_factory=bytearray)
    stored: Stored | None = None


class FakeGcs:
    """The service.

    objects: what is stored, by (bucket, name). faults: share of requests that fail, which may be changed at any time.
    injected: how many have, by kind. requests, received: how many came in all, and bytes with them.
    """

    def __init__(self, faults: float = 0.0, seed: int = 0):
        self.faults, self._chance = faults, random.Random(seed)
        self.injected: Counter[str] = Counter()
        self.requests = self.received = 0
        self.objects: dict[tuple[str, str], Stored] = {}
        self.uploads: dict[str, Upload] = {}
        self.moved: dict[str, tuple[int, bytes, dict[str, str]]] = {}  # answers, by the client's token
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        self._server = _Server(("localhost", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send the libraries here."""
        url = f"http://localhost:{self._server.server_address[1]}"
        return {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs, and Google's library, which Orbax asks about the bucket
            "TENSORSTORE_GCS_HTTP_URL": url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # ArrayRecord
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC what kind of bucket it is
        }

    def __enter__(self) -> "FakeGcs":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def failing(self, faults: float, seed: int = 0) -> Iterator[None]:
        """Fails this share of requests meanwhile."""
        before, self.faults, self._chance = self.faults, faults, random.Random(seed)
        self.injected.clear()
        try:
            yield
        finally:
            self.faults = before

    def fault(self) -> str | None:
        """Draws the fate of a request: one of FAULTS, or None to serve it."""
        self.requests += 1
        if self._chance.random() >= self.faults:
            return None
        fault = self._chance.choice(FAULTS)
        self.injected[fault] += 1
        return fault

    def put(self, bucket: str, name: str, content: bytes) -> Stored:
        stored = Stored(content, next(self.generations))
        self.objects[bucket, name] = stored
        return stored


class _Refused(Exception):
    def __init__(self, status: int):
        self.status = status


def _handler(storage: FakeGcs) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None: ...

        def _dispatch(self) -> None:
            body = self._body()
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
            try:
                with storage.lock:
                    storage.received += len(body)
                    fault = storage.fault()
                    if fault in ("429", "503"):
                        raise _Refused(int(fault))
                    if fault == "reset before":
                        return self._reset()
                    answer = _serve(storage, self.command, url.path, query, self.headers, body)
                if fault == "reset after":
                    return self._reset()
                self._answer(*answer)
            except _Refused as refused:
                content = {"error": {"code": refused.status, "message": f"{self.command} {self.path}"}}
                self._answer(refused.status, json.dumps(content).encode(), {})

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _dispatch

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _reset(self) -> None:
            """Ends the connection without an answer, by a reset rather than an orderly end."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            has_body = status not in (204, 304)
            if has_body:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if has_body else b"")

    return Handler


def _serve(
    storage: FakeGcs, method: str, path: str, query: dict[str, str], headers: Message, body: bytes
) -> tuple[int, bytes, dict[str, str]]:
    if match := re.fullmatch(r"/batch/storage/v1", path):
        return _batch(storage, headers, body)
    if match := re.fullmatch(r"(?:/upload|/resumable/upload)/storage/v1/b/([^/]+)/o", path):
        return _upload(storage, unquote(match[1]), query, headers, body)
    if match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
        return _json({"name": match[1], "kind": "storage#bucket", "location": "here"})
    if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", path):
        return _json(_listing(storage, unquote(match[1]), query))
    if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", path):
        source, target = (unquote(match[1]), unquote(match[2])), (unquote(match[3]), unquote(match[4]))
        stored = storage.put(*target, _found(storage, source).content)
        size = str(len(stored.content))
        return _json({"done": True, "resource": _resource(*target, stored), "objectSize": size})
    if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path):
        source, target = ((unquote(match[1]), unquote(name)) for name in (match[2], match[3]))
        return _move(storage, source, target, headers.get("X-Goog-GCS-Idempotency-Token"))
    if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/compose", path):
        return _compose(storage, (unquote(match[1]), unquote(match[2])), query, body)
    if match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", path):
        return _object(storage, method, (unquote(match[1]), unquote(match[2])), query, headers)
    raise _Refused(404)


def _move(
    storage: FakeGcs, source: tuple[str, str], target: tuple[str, str], token: str | None
) -> tuple[int, bytes, dict[str, str]]:
    if token is not None and token in storage.moved:
        return storage.moved[token]
    answer = _json(_resource(*target, storage.put(*target, _found(storage, source).content)))
    del storage.objects[source]
    if token is not None:
        storage.moved[token] = answer
    return answer


def _compose(
    storage: FakeGcs, target: tuple[str, str], query: dict[str, str], body: bytes
) -> tuple[int, bytes, dict[str, str]]:
    sources = json.loads(body)["sourceObjects"]
    if not 0 < len(sources) <= MAX_COMPOSED:
        raise _Refused(400)
    parts = [_found(storage, (target[0], source["name"])).content for source in sources]
    _require(storage, target, query)
    return _json(_resource(*target, storage.put(*target, b"".join(parts))))


def _json(content: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}


def _resource(bucket: str, name: str, stored: Stored) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(stored.content)),
        "generation": str(stored.generation),
        "metageneration": "1",
        "crc32c": base64.b64encode(google_crc32c.Checksum(stored.content).digest()).decode(),
        "updated": "2026-01-01T00:00:00.000Z",
        "timeCreated": "2026-01-01T00:00:00.000Z",
    }


def _found(storage: FakeGcs, key: tuple[str, str]) -> Stored:
    if key not in storage.objects:
        raise _Refused(404)
    return storage.objects[key]


def _require(storage: FakeGcs, key: tuple[str, str], query: dict[str, str], refused: int = 412) -> None:
    """The preconditions of a request; an object that is absent has generation 0."""
    generation = storage.objects[key].generation if key in storage.objects else 0
    if int(query.get("ifGenerationMatch", generation)) != generation:
        raise _Refused(412)
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
        raise _Refused(refused)


def _listing(storage: FakeGcs, bucket: str, query: dict[str, str]) -> dict[str, Any]:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    items, prefixes = [], set()
    for (holder, name), stored in sorted(storage.objects.items()):
        if holder != bucket or not name.startswith(prefix) or name < query.get("startOffset", ""):
            continue
        if query.get("endOffset") and name >= query["endOffset"]:
            continue
        inner, slash, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        if slash:
            prefixes.add(prefix + inner + slash)
        else:
            items.append(_resource(bucket, name, stored))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


def _object(
    storage: FakeGcs, method: str, key: tuple[str, str], query: dict[str, str], headers: Message
) -> tuple[int, bytes, dict[str, str]]:
    if method == "DELETE":
        _found(storage, key)
        _require(storage, key, query)
        del storage.objects[key]
        return 204, b"", {}
    stored = _found(storage, key)
    _require(storage, key, query, refused=304)
    if query.get("alt") != "media":
        return _json(_resource(*key, stored))
    size, generation = len(stored.content), {"x-goog-generation": str(stored.generation)}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", ""))
    if match is None:
        return 200, stored.content, generation
    if match[1]:
        start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
    else:
        start, stop = max(0, size - int(match[2])), size
    if start >= size:
        return 416, b"", {"Content-Range": f"bytes */{size}"}
    return 206, stored.content[start:stop], generation | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}


def _upload(
    storage: FakeGcs, bucket: str, query: dict[str, str], headers: Message, body: bytes
) -> tuple[int, bytes, dict[str, str]]:
    kind = query.get("uploadType")
    if "upload_id" in query:
        return _resumed(storage, query["upload_id"], headers, body)
    if kind == "resumable":
        name = query.get("name") or json.loads(body)["name"]
        number = str(next(storage.generations))
        storage.uploads[number] = Upload(bucket, name)
        place = f"http://{headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
        return 200, b"", {"Location": place}
    name = query.get("name", "")
    if kind == "multipart":
        boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])
        assert boundary is not None
        _, metadata, content, _ = body.split(b"--" + boundary[1].encode())
        name = json.loads(re.split(rb"\r?\n\r?\n", metadata, maxsplit=1)[1])["name"]
        body = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
        body = body[: -2 if body.endswith(b"\r\n") else -1]
    _require(storage, (bucket, name), query)
    return _json(_resource(bucket, name, storage.put(bucket, name, body)))


def _resumed(storage: FakeGcs, number: str, headers: Message, body: bytes) -> tuple[int, bytes, dict[str, str]]:
    upload = storage.uploads[number]
    place, _, total = headers.get("Content-Range", "bytes */*").removeprefix("bytes ").partition("/")
    if upload.stored is None:
        start = len(upload.content) if place == "*" else int(place.partition("-")[0])
        upload.content[start:] = body
        if total == "*":
            return 308, b"", {"Range": f"bytes=0-{len(upload.content) - 1}"}
        upload.stored = storage.put(upload.bucket, upload.name, bytes(upload.content))
    return _json(_resource(upload.bucket, upload.name, upload.stored))


def _batch(storage: FakeGcs, headers: Message, body: bytes) -> tuple[int, bytes, dict[str, str]]:
    """Only DELETE is asked for in batches."""
    answers = []
    for path in re.findall(rb"DELETE (\S+) HTTP", body):
        url = urlsplit(path.decode())
        try:
            status, _, _ = _serve(storage, "DELETE", url.path, {}, headers, b"")
        except _Refused as refused:
            status = refused.status
        answers.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} Done\r\n\r\n")
    content = "".join(answers) + "--part--"
    return 200, content.encode(), {"Content-Type": "multipart/mixed; boundary=part"}
