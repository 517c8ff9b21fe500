"""What Linux tells about memory; None elsewhere."""

from pathlib import Path


def available_memory() -> int | None:
    """Bytes that could be had without swapping."""
    return _field("/proc/meminfo", "MemAvailable:")


def peak_memory() -> int | None:
    """The most bytes this program has held. (getrusage would count what started it, too.)"""
    return _field("/proc/self/status", "VmHWM:")


def _field(file: str, name: str) -> int | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
