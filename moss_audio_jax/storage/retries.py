"""Storage that fails for a moment: what is worth another try, and the tries.

A disk over a network loses its server, a service answers 429 or 503, a connection is reset: the next attempt mostly
works. `retried` makes it, after a pause that doubles each time. Two environment variables, which reach all processes of
a run, say how often and how long:

    MOSS_AUDIO_STORAGE_ATTEMPTS=6    attempts in all; 1 is none but the first
    MOSS_AUDIO_STORAGE_BACKOFF=1     seconds of the first pause, give or take a half; none is above 30

gcsfs and TensorStore make attempts of their own for each request to gs://, some six and some thirty. What is done here
may therefore be done twice, or have been done already when its answer was lost: so it has to end the same either way.
"""

import errno
import functools
import logging
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from moss_audio_jax.errors import MossAudioError, StorageError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ATTEMPTS, BACKOFF = "MOSS_AUDIO_STORAGE_ATTEMPTS", "MOSS_AUDIO_STORAGE_BACKOFF"
LONGEST_PAUSE = 30.0  # seconds

_ERRNOS = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EREMOTEIO,
    errno.EAGAIN,
)
# What libraries written in C++ say, whose errors have no number.
_TEXT = re.compile(
    r"\b(?:UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)\b|HTTP (?:response code|code|status)?:? ?(?:408|429|5\d\d)\b|"
    f"(?i:connection (?:was )?reset|{'|'.join(re.escape(os.strerror(number)) for number in _ERRNOS)})"
)
_NEVER = (
    MossAudioError,
    UnicodeError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)


def is_transient(error: BaseException) -> bool:
    """Whether an error, or the one it was raised from, says nothing about the file and may be gone the next time."""
    if isinstance(error, _NEVER):
        return False
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_transient, error.exceptions))
    if isinstance(error, ConnectionError | TimeoutError) or _status(error) in (408, 429, *range(500, 600)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _ERRNOS
    gcsfs = sys.modules.get("gcsfs.retry")  # it knows the errors of the libraries below it
    if (gcsfs is not None and gcsfs.is_retriable(error)) or _TEXT.search(str(error)):
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of gcsfs, aiohttp or Google's libraries holds."""
    status = getattr(error, "code", None) or getattr(error, "status", None)
    try:
        return int(status) if isinstance(status, int | str) else None
    except ValueError:
        return None


def retried(path: object, work: Callable[[], Result]) -> Result:
    """What `work` returns, called again as long as its error is transient; all other errors are its own.

    path: what it reads or writes, for the log and errors.
    Raises StorageError when all attempts have failed.
    """
    attempts, backoff = _settings(os.environ.get(ATTEMPTS, "6"), os.environ.get(BACKOFF, "1"))
    for attempt in range(1, attempts + 1):
        try:
            return work()
        except Exception as error:
            if not is_transient(error):
                raise
            if attempt == attempts:
                raise StorageError(
                    f"{path}: storage failed in each of {attempts} attempts ({summary(error)}); run the same command "
                    f"again when it is back, or set {ATTEMPTS} higher"
                ) from error
            pause = min(LONGEST_PAUSE, backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
            log.warning("%s: %s, attempt %d of %d, again in %.1f s", path, summary(error), attempt, attempts, pause)
            time.sleep(pause)
    raise AssertionError


@functools.lru_cache(maxsize=4)
def _settings(attempts: str, backoff: str) -> tuple[int, float]:
    if not (attempts.isdecimal() and int(attempts) >= 1):
        raise MossAudioError(f"{ATTEMPTS} must be a number of attempts, 1 or more, not {attempts!r}")
    try:
        seconds = float(backoff)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise MossAudioError(f"{BACKOFF} must be seconds, 0 or more, not {backoff!r}")
    return int(attempts), seconds


def summary(error: BaseException) -> str:
    """An error in a line of its own."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
