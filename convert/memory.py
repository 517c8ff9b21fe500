"""Reads the memory of this machine and process; None except on Linux."""

from pathlib import Path


def available_memory() -> int | None:
    """Returns the bytes that are available without swapping."""
    return _field("/proc/meminfo", "MemAvailable:")


def peak_memory() -> int | None:
    """Returns the peak bytes of this process. (getrusage would include its parent's.)"""
    return _field("/proc/self/status", "VmHWM:")


def _field(file: str, name: str) -> int | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
