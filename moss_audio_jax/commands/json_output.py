"""The option `--json FILE` of commands that print a table."""

import json
from typing import Any

from moss_audio_jax.storage.paths import Path, atomic_write


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a file, or to stdout if the path is `-`."""
    text = json.dumps(value, indent=2)
    if str(path) == "-":
        print(text)
    else:
        atomic_write(path, text + "\n")
