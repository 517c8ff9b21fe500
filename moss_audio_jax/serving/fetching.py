"""Clips from https: of allowed hosts, from public addresses alone, without redirects, and of a bounded size."""

import asyncio
import ipaddress
import socket
import ssl
from urllib.parse import urlsplit

import httpx

from moss_audio_jax.serving.errors import ApiError

_PORT = 443
# Addresses of IPv4 within IPv6, which the property `is_global` says nothing about.
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")))


async def fetch(url: str, where: str, hosts: frozenset[str], most: int, seconds: float) -> bytes:
    """Returns what a URL holds, of `most` bytes at most.

    hosts: names that are allowed, in lower case, with a port if it is not 443. The name is resolved once, all its
    addresses are checked, and the connection is made to the first of them.
    """
    host, port, target = _parts(url, where)
    name = host if port == _PORT else f"{host}:{port}"
    if name not in hosts:
        raise _refused(f"names the host {name!r}, which this server does not allow", where)
    try:
        async with asyncio.timeout(seconds):
            address = await _public_address(host, port, where)
            return await _content(address, host, port, target, where, most)
    except TimeoutError as error:
        raise _refused(f"did not come within {seconds:g} s", where) from error
    except (httpx.HTTPError, OSError) as error:
        raise _refused(f"can't be fetched ({type(error).__name__})", where) from error


def _parts(url: str, where: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or _PORT
    except ValueError:
        parts, host, port = urlsplit(""), "", 0
    ok = parts.scheme == "https" and host and host.isascii() and "@" not in parts.netloc and "\\" not in url
    if not (ok and url.isascii() and url.isprintable() and " " not in url):
        raise _refused("must be a URL such as https://host/clip.wav, in ASCII and without a user", where)
    return host.lower(), port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


async def _public_address(host: str, port: int, where: str) -> str:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise _refused("leads to an address that is not public", where)
    return addresses[0]


def is_public(address: str) -> bool:
    """Returns True for an address of the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    translated = found.version == 6 and any(found in network for network in _TRANSLATED)
    return found.is_global and not found.is_multicast and not translated


def tls_context() -> ssl.SSLContext:
    """Trusts the certificates of the system, and those of SSL_CERT_FILE."""
    return ssl.create_default_context()


async def _content(address: str, host: str, port: int, target: str, where: str, most: int) -> bytes:
    literal = f"[{address}]" if ":" in address else address
    name = f"[{host}]" if ":" in host else host
    headers = {"Host": name if port == _PORT else f"{name}:{port}", "Accept-Encoding": "identity"}
    # Without the environment's proxies and passwords. The name in TLS is the host's, which the certificate must have.
    async with (
        httpx.AsyncClient(verify=tls_context(), trust_env=False, follow_redirects=False) as client,
        client.stream(
            "GET", f"https://{literal}:{port}{target}", headers=headers, extensions={"sni_hostname": host}
        ) as response,
    ):
        if response.status_code != 200:
            raise _refused(f"was answered with status {response.status_code}; redirects are not followed", where)
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _refused("was answered in a compressed encoding", where)
        content = bytearray()
        async for piece in response.aiter_raw():
            content += piece
            if len(content) > most:
                raise _refused(f"has more than the {most:,} bytes that are left for it", where)
        return bytes(content)


def _refused(message: str, where: str) -> ApiError:
    return ApiError(f"{where} {message}", param=where, code="invalid_url")
