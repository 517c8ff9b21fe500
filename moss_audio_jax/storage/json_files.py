"""Reads JSON that others wrote; refuses files that are too large or deep, or that name a key twice."""

import json
import os
import re
import stat
from collections import Counter
from typing import Any

from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.storage.foreign_files import foreign_content
from moss_audio_jax.storage.paths import AnyPath, is_remote, read_bytes, reason, to_path
from moss_audio_jax.storage.retries import retried

MAX_BYTES = 1 << 28  # the largest of a released checkpoint, tokenizer.json, has 11 MB
MAX_DEPTH = 64  # later copies and writes are recursive too
_HALF_OF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: AnyPath) -> dict[str, Any]:
    """Reads a JSON object from a file; raises MossAudioError, which names the file, for anything else."""
    path = to_path(path)
    try:
        if not is_remote(path):
            found = retried(path, lambda: os.stat(path))
            if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for its writer
                raise MossAudioError(f"{path} must be a file, but is none: fetch it again")
            if found.st_size > MAX_BYTES:
                raise ValueError(f"it has {found.st_size:,} bytes, and at most {MAX_BYTES:,} are read")
        return parse_json(read_bytes(path))
    except MossAudioError:
        raise
    except PermissionError as error:
        raise MossAudioError(f"{path} can't be read ({reason(error)}): ask its owner for access") from error
    except OSError as error:
        raise MossAudioError(f"{path} can't be read ({reason(error)}): fetch the file again") from error
    except ValueError as error:
        if what := foreign_content(path):
            raise MossAudioError(f"{path} is {what}") from error
        raise MossAudioError(f"{path} can't be read as JSON ({error}): fetch the file again") from error


def parse_json(text: bytes) -> dict[str, Any]:
    """Parses a JSON object; raises ValueError, in one line, for anything else.

    A key must not occur twice in an object: Python, and safetensors, would take the last value.
    """
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        raise ValueError("it holds an integer of thousands of digits") from error
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a JSON object, but holds a {type(content).__name__}")
    _require_shallow(content)
    if _HALF_OF_A_PAIR.search(text):
        _require_text(content)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{', '.join(map(shown, doubled[:5]))} stands in it more than once")
    return content


def _require_shallow(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        inside = [value for node in level for value in (node.values() if isinstance(node, dict) else node)]
        level = [value for value in inside if isinstance(value, (dict, list))]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _require_text(content: Any) -> None:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair, which is no text") from error
