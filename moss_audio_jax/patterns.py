"""Globs over dotted paths, such as `audio_encoder.*`: matching, and suggestions where nothing matches."""

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence

from moss_audio_jax.errors import MossAudioError


def matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def require_matches(kind: str, patterns: Sequence[str], paths: Collection[str], what: str = "parameter") -> None:
    """Raises MossAudioError, with similar paths, for a pattern that matches none of the paths."""
    for pattern in patterns:
        if not any(matches(path, [pattern]) for path in paths):
            close = ", ".join(_close_patterns(pattern, paths))
            raise MossAudioError(f"{kind} pattern {pattern!r} matches no {what}: did you mean one of {close}?")


def _close_patterns(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns existing paths, and patterns of everything below a name, that are spelt like `pattern`."""
    prefixes = {path.rsplit(".", depth)[0] + ".*" for path in paths for depth in range(1, path.count(".") + 1)}
    candidates = sorted(prefixes) + sorted(paths)
    return difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.0)
