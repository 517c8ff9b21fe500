"""Where the commands keep compiled programs, so that the next call of one starts sooner: JAX's cache on disk."""

import hashlib
import logging
import os
import pathlib
import platform
import re
import sys

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX reads it by itself
# Programs that are compiled in less are not worth a file each.
MIN_COMPILE_SECONDS = 0.1

log = logging.getLogger(__name__)


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in the user's cache directory, unless $JAX_COMPILATION_CACHE_DIR is set.

    Where that is set, JAX uses what it names; empty switches the cache off. A directory that can't be written leaves it
    off too: the programs are then compiled each time.
    """
    if VARIABLE in os.environ or jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    directory = user_cache() / "moss-audio-jax" / "compiled" / cpu_name()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(directory, os.W_OK | os.X_OK)
    except OSError as error:
        log.info("no compiled programs are kept: %s", error)
        return
    if not writable:
        log.info("no compiled programs are kept: %s can't be written", directory)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def user_cache() -> pathlib.Path:
    """$XDG_CACHE_HOME, or what the platform has for it."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(given)
    home = pathlib.Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return pathlib.Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return home / ".cache"


def cpu_name() -> str:
    """Names this kind of CPU: a program that XLA compiled for one may hold instructions that another lacks.

    JAX's own key has no part of it, and a home directory may be shared by machines.
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
