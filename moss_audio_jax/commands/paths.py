"""The type of path arguments: a path of this machine or of gs://."""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import Path, to_path


def _path(arguments: Sequence[str]) -> Path:
    """A path of an argument; a refusal ends the process, since tyro would put it into words of its own."""
    try:
        return to_path(arguments[0])
    except MossAudioError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# A path of this machine or of gs://, which pathlib.Path would make gs:/ of.
PathArgument = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_path,
        is_instance=lambda instance: isinstance(instance, Path),
        str_from_instance=lambda instance: [str(instance)],
    ),
]
