"""JAX's compilation cache on disk: the next call of a command finds its compiled programs there."""

import hashlib
import logging
import os
import pathlib
import platform
import re

from moss_audio_jax.storage.user_cache import user_cache

# JAX reads both when it is imported.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MIN_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
# Programs that are compiled in less are not worth a file each.
MIN_COMPILE_SECONDS = 0.1

log = logging.getLogger(__name__)


def keep_compiled_programs() -> None:
    """Sets $JAX_COMPILATION_CACHE_DIR to the user's cache directory unless it is set. To be called before JAX's import.

    An empty variable turns the cache off. It stays off if the directory can't be written.
    """
    if VARIABLE in os.environ:
        return
    directory = user_cache() / "compiled" / cpu_name()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(directory, os.W_OK | os.X_OK)
    except OSError as error:
        log.info("no compiled programs are kept: %s", error)
        return
    if not writable:
        log.info("no compiled programs are kept: %s can't be written", directory)
        return
    os.environ[VARIABLE] = str(directory)
    os.environ.setdefault(MIN_VARIABLE, str(MIN_COMPILE_SECONDS))


def cpu_name() -> str:
    """Returns a name of this kind of CPU: a program compiled for one may have instructions that another lacks.

    JAX's own cache key does not hold the CPU, and machines may share a home directory.
    """
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
        # On x86 and on Arm, of all cores.
        parts = re.findall(
            r"^(?:vendor_id|cpu family|model|flags|Features|CPU (?:implementer|part))\s*:.*$", text, re.M
        )
        known = "\n".join(sorted(set(parts)))
    except OSError:
        known = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
