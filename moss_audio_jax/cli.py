"""What the command-line doors share: a user's mistake is one sentence and exit code 2, never a traceback."""

import os
import sys
from collections.abc import Callable

from moss_audio_jax.errors import MossAudioError


def run_door(door: Callable[[], object]) -> None:
    """Runs a door's commands and exits as a shell expects."""
    try:
        door()
    except MossAudioError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
