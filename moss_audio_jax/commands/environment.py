"""`moss-audio env`: what a report of a problem should say about the machine."""

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

PROJECT = "moss-audio-jax"
# Environment variables that change what programs do, by their beginnings; nothing else is shown.
SETTINGS = ("JAX_", "XLA_", "LIBTPU_INIT_ARGS", "TPU_", "MEGASCALE_", "HF_", "OMP_NUM_THREADS", "MOSS_AUDIO_")
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")


def environment() -> dict[str, Any]:
    """Returns versions, devices and settings, for JSON. Values of secrets are not among them."""
    return {
        PROJECT: _version(PROJECT),
        "installed in": str(Path(__file__).parents[2]),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "processors": f"{os.cpu_count()}, memory {_memory()}",
        "packages": {name: _version(name) for name in _packages()},
        "devices": _devices(),
        "settings": {
            name: "(set)" if _SECRET.search(name) else value
            for name, value in sorted(os.environ.items())
            if name.startswith(SETTINGS)
        },
    }


def environment_table(found: dict[str, Any]) -> str:
    """Returns the environment as text to paste."""
    rows = [(name, str(value)) for name, value in found.items() if not isinstance(value, dict)]
    for group in ("packages", "devices", "settings"):
        rows += [(f"{group[:-1]} {name}", str(value)) for name, value in found[group].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _packages() -> list[str]:
    """Returns the names of the packages that the project and its extras name, and of JAX's own parts."""
    required = importlib.metadata.requires(PROJECT) or []
    names = {re.split(r"[\s\[<>=!~;@]", each, maxsplit=1)[0] for each in required}
    return sorted((names | {"jaxlib", "libtpu"}) - {PROJECT}, key=str.lower)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError):  # a system that does not say
        return "unknown"


def _devices() -> dict[str, Any]:
    """Returns what JAX finds, or why it finds nothing: another process may hold the TPU."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return {"none": " ".join(str(error).split())}
    kinds = sorted({device.device_kind for device in devices})
    return {
        "backend": jax.default_backend(),
        "kind": ", ".join(kinds),
        "count": f"{len(devices)}, {jax.local_device_count()} of them here, processes {jax.process_count()}",
    }
