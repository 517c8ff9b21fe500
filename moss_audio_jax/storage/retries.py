"""Retries storage operations that fail for a moment.

A network disk loses its server, a service answers 429 or 503, a connection is reset: the next attempt mostly works.
`retried` makes it, after a pause that doubles each time. Two environment variables, for all processes of a run:

    MOSS_AUDIO_STORAGE_ATTEMPTS=6    attempts in all; 1 never retries
    MOSS_AUDIO_STORAGE_BACKOFF=1     seconds of the first pause, plus or minus a half; no pause is above 30

gcsfs (about 6 times) and TensorStore (about 30) also retry each request to gs://. An operation may therefore run twice,
also after a success whose answer was lost, so all operations here are idempotent.
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
# Messages of libraries in C++, whose errors have no number.
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
    """Returns True if an error, or its cause, is about the storage and not the file, and may not occur again."""
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
    """Returns the HTTP status of an error of gcsfs, aiohttp or Google's libraries."""
    status = getattr(error, "code", None) or getattr(error, "status", None)
    try:
        return int(status) if isinstance(status, int | str) else None
    except ValueError:
        return None


def retried(path: object, work: Callable[[], Result]) -> Result:
    """Calls `work` until it raises no transient error, and returns its result.

    path: what it reads or writes, for the log and errors.
    Raises StorageError if all attempts fail, and every other error of `work` at once.
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
    """Returns the first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
