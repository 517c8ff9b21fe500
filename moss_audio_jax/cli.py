"""What the command-line doors share: a user's mistake is one sentence and exit code 2, never a traceback."""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import tyro

from moss_audio_jax.compiled import keep_compiled_programs
from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.interruption import INTERRUPTED, end, ends_on_ctrl_c
from moss_audio_jax.paths import Path, to_path
from moss_audio_jax.retries import is_transient, summary

TRY_AGAIN = 75  # exit code, EX_TEMPFAIL: the same command may well work later

# A path of this machine or of gs://, which pathlib.Path would make gs:/ of.
PathArgument = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda arguments: to_path(arguments[0]),
        is_instance=lambda instance: isinstance(instance, Path),
        str_from_instance=lambda instance: [str(instance)],
    ),
]


def run_door(door: Callable[[], object]) -> None:
    """Runs a door's commands and exits as a shell expects."""
    try:
        with ends_on_ctrl_c():
            keep_compiled_programs()
            door()
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    except MossAudioError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        end(INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if not is_transient(error):
            raise
        print(f"error: storage or a connection failed ({summary(error)}); run the same command again", file=sys.stderr)
        sys.exit(TRY_AGAIN)
