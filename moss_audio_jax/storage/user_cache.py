"""Directory of what is kept for later calls and can be made again: compiled programs, places of lines."""

import os
import pathlib
import sys


def user_cache() -> pathlib.Path:
    """Returns moss-audio-jax in $XDG_CACHE_HOME, or in the directory that the platform has for it."""
    return _of_all_programs() / "moss-audio-jax"


def _of_all_programs() -> pathlib.Path:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(given)
    home = pathlib.Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return pathlib.Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return home / ".cache"
