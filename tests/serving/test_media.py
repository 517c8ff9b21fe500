"""Where clips come from: nothing leaves the directory, the allowed hosts or the limits."""

import asyncio
import base64
import http.server
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from moss_audio_jax.serving import fetching
from moss_audio_jax.serving.errors import ApiError
from moss_audio_jax.serving.limits import Limits
from moss_audio_jax.serving.media import Media, from_data_uri
from tests.serving.conftest import encoded, noise

LIMITS = Limits(body_seconds=2)
MOST = 100_000


def load(media: Media, url: str, most: int = MOST) -> bytes:
    async def in_thread(work: Any) -> bytes:
        return await asyncio.to_thread(work)

    return asyncio.run(media.load(url, "url", most, in_thread))


def refused(media: Media, url: str, most: int = MOST) -> str:
    with pytest.raises(ApiError) as error:
        load(media, url, most)
    assert error.value.status in (400, 413) and error.value.param == "url"
    return error.value.message


# Files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with files, and links that lead out of it and within it."""
    (tmp_path / "secret.wav").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "deep er").mkdir(parents=True)
    (root / "a.wav").write_bytes(b"content")
    (root / "deep er" / "ü.wav").write_bytes(b"deep")
    (root / "out.wav").symlink_to(tmp_path / "secret.wav")
    (root / "up").symlink_to(tmp_path)
    (root / "in.wav").symlink_to("a.wav")
    os.mkfifo(root / "pipe.wav")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "b.wav").write_bytes(b"secret")
    return root


def test_files_below_the_directory_are_read(tree):
    media = Media(LIMITS, files=str(tree))
    assert load(media, f"file://{tree}/a.wav") == b"content" == load(media, f"file://localhost{tree}/a.wav")
    assert load(media, (tree / "deep er" / "ü.wav").as_uri()) == b"deep"
    linked = tree.parent / "linked"
    linked.symlink_to(tree)  # the directory itself may be named by a link
    assert load(Media(LIMITS, files=str(linked)), f"file://{tree}/a.wav") == b"content"


def test_nothing_else_is_read(tree):
    media = Media(LIMITS, files=str(tree))
    names = ("out.wav", "in.wav", "up/secret.wav", "../secret.wav", "deep er/../../secret.wav", "%2e%2e/secret.wav")
    names += ("pipe.wav", "deep er", "", "absent.wav", "a.wav%00", "a.wav/b", "x" * 300)
    for name in names:
        assert "secret" not in refused(media, f"file://{tree}/{name}").replace(name, "")
    for url in (
        f"file://{tree}2/b.wav",
        "file:///etc/passwd",
        f"file://host{tree}/a.wav",
        f"file:{tree}",
        "file:a.wav",
    ):
        refused(media, url)
    assert "more than the 3 bytes" in refused(media, f"file://{tree}/a.wav", most=3)
    assert "allows none" in refused(Media(LIMITS), f"file://{tree}/a.wav")


# data: URIs


def test_data_uris():
    coded = base64.b64encode(b"sound").decode()
    for head in (
        "data:audio/wav;base64,",
        "data:;base64,",
        "data:audio/wav;codecs=1;base64,",
        "DATA:audio/wav;BASE64,",
    ):
        assert load(Media(LIMITS), head + coded) == b"sound"
    assert from_data_uri("data:,a%20b", "url") == b"a b"
    for url in ("data:audio/wav;base64", f"data:{'x' * 300},", f"data:;base64,{coded}!", "data:;base64,a"):
        with pytest.raises(ApiError):
            from_data_uri(url, "url")


# https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """Of clips.example, signed by itself."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=clips.example"
    names = ["-addext", "subjectAltName=DNS:clips.example", "-keyout", path, "-out", path.with_name("cert.pem")]
    subprocess.run(["openssl", "req", *options.split(), *names], check=True, capture_output=True)
    return path


class Handler(http.server.BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        status = 302 if self.path == "/moved" else 404 if self.path == "/gone" else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "https://127.0.0.1/secret")
        if self.path == "/zipped":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        content = {"/large": b"x" * (MOST + 1), "/endless": None}.get(self.path, b"sound")
        try:
            while content is None:
                self.wfile.write(b"x")
                threading.Event().wait(0.1)
            self.wfile.write(content)
        except OSError:
            pass  # the client has left

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def web(certificate: Path) -> Iterator[int]:
    """The port of an https server on the loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.with_name("cert.pem"), certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def resolved(monkeypatch, certificate: Path) -> dict[str, list[str]]:
    """Addresses of names; 127.0.0.1 counts as public, and the certificate is trusted."""
    addresses = {"clips.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
    resolutions: list[str] = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if host not in addresses:
            return original(host, port, *_, **__)
        resolutions.append(host)
        kinds = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(kinds[":" in each], socket.SOCK_STREAM, 6, "", (each, port)) for each in addresses[host]]

    original, is_public = socket.getaddrinfo, fetching.is_public
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    context = ssl.create_default_context(cafile=str(certificate.with_name("cert.pem")))
    monkeypatch.setattr(fetching, "tls_context", lambda: context)
    addresses["resolutions"] = resolutions
    Handler.seen.clear()
    return addresses


def test_a_clip_is_fetched_from_an_allowed_host(web, resolved):
    media = Media(LIMITS, frozenset([f"clips.example:{web}", f"other.example:{web}"]))
    assert load(media, f"https://clips.example:{web}/a.wav?x=1") == b"sound"
    assert load(media, f"https://CLIPS.example.:{web}/") == b"sound"
    assert Handler.seen == [("/a.wav?x=1", f"clips.example:{web}"), ("/", f"clips.example:{web}")]
    assert resolved["resolutions"] == ["clips.example"] * 2  # once for each: what was checked is what is connected to
    assert "can't be fetched" in refused(media, f"https://other.example:{web}/a.wav")  # the certificate names another


def test_redirects_sizes_and_slow_answers_are_bounded(web, resolved):
    media = Media(LIMITS, frozenset([f"clips.example:{web}"]))
    url = f"https://clips.example:{web}"
    assert "status 302; redirects are not followed" in refused(media, f"{url}/moved")
    assert "status 404" in refused(media, f"{url}/gone")
    assert "more than the 100,000 bytes" in refused(media, f"{url}/large")
    assert "compressed" in refused(media, f"{url}/zipped")
    assert "within 2 s" in refused(media, f"{url}/endless")
    assert not any(path == "/secret" for path, _ in Handler.seen)


def test_other_hosts_and_urls_are_refused(web, resolved):
    media = Media(LIMITS, frozenset(["clips.example"]))
    for url in (
        f"https://clips.example:{web}/",
        f"https://other.example:{web}/",
        f"https://127.0.0.1:{web}/",
        f"https://clips.example@127.0.0.1:{web}/",
        f"https://127.0.0.1:{web}/@clips.example",
        f"https://clips.example\\@127.0.0.1:{web}/",
        "https://",
        "https://[::1",
        "https://clips.example:port/",
        "https://clips.example/a b",
        "https://clips.example/\r\nHost:x",
        "https://clıps.example/",
        f"http://clips.example:{web}/",
        "ftp://clips.example/",
        "//clips.example/",
        "",
    ):
        refused(media, url)
    assert not Handler.seen and not resolved["resolutions"]
    assert "does not allow" in refused(Media(LIMITS), "https://clips.example/")


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.2",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"),
        *("2002:a00:1::1", "2001:0:a00:1::1", "::10.0.0.1", "255.255.255.255", "198.18.0.1"),
    ],
)
def test_addresses_that_are_not_public_are_refused(address, resolved):
    """Also if they are one of several."""
    media = Media(LIMITS, frozenset(["clips.example"]))
    for addresses in ([address], ["93.184.216.34", address]):
        resolved["clips.example"] = addresses
        assert "not public" in refused(media, "https://clips.example/")


def test_public_addresses_are_public():
    for address in ("93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"):
        assert fetching.is_public(address)


# Sound


def test_a_clip_is_decoded_within_its_seconds():
    media = Media(LIMITS)
    assert len(media.wave(encoded(noise(2)), "clip", 2.0)) == 32000
    for content in (encoded(noise(3)), encoded(noise(2.01), format="FLAC", subtype="PCM_16")):
        with pytest.raises(ApiError, match="at most 2 s of audio"):
            media.wave(content, "clip", 2.0)


def test_what_a_header_claims_is_not_allocated(monkeypatch):
    """Hundreds of channels, and two hours of samples that are not there."""
    sizes: list[int] = []
    empty = np.empty

    def counted(shape: Any, *arguments: Any, **options: Any) -> np.ndarray:
        found = empty(shape, *arguments, **options)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(np, "empty", counted)
    media = Media(LIMITS)
    many = encoded(np.zeros((8000, 90), np.float32), 8000, subtype="PCM_U8")
    assert len(media.wave(many, "clip", 60.0)) == 16000
    with pytest.raises(ApiError, match="at most 768,000 samples a second in all channels, not 200 times 16,000"):
        media.wave(encoded(np.zeros((16000, 200), np.float32), subtype="PCM_U8"), "clip", 60.0)
    claimed = bytearray(encoded(noise(1)))
    at = claimed.index(b"data") + 4
    claimed[at : at + 4] = (4 * 16000 * 7200).to_bytes(4, "little")
    assert len(media.wave(bytes(claimed), "clip", 60.0)) == 16000
    assert sizes and max(sizes) <= 32 << 20
