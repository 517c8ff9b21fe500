"""What the command-line doors share: a user's mistake is one sentence and exit code 2, never a traceback."""

import difflib
import errno
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from moss_audio_jax.commands.compilation_cache import keep_compiled_programs
from moss_audio_jax.commands.interruption import INTERRUPTED, end, ends_on_ctrl_c
from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.storage.paths import Path, to_path
from moss_audio_jax.storage.retries import is_transient, summary

TRY_AGAIN = 75  # exit code, EX_TEMPFAIL: the same command may well work later


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


class Commands(tyro.extras.SubcommandApp):
    """The commands of a program. Takes `--version` too, and names the command that is nearest to one there is not."""

    def cli(self, *, prog: str, description: str | None, args: Sequence[str] | None = None, **options: Any) -> Any:
        args = sys.argv[1:] if args is None else args
        names = [name.replace("_", "-") for name in self._subcommands]
        if args and args[0] == "--version":
            return print(versions())
        if args and not args[0].startswith("-") and args[0].replace("_", "-") not in names:
            nearest = difflib.get_close_matches(args[0], names, n=1)
            advice = f"did you mean {nearest[0]}" if nearest else f"give one of {', '.join(names)}"
            raise MossAudioError(f"{prog} has no command {args[0]!r}: {advice}")
        description = (
            f"{description or ''}\n`{prog} --version` names the versions that a report of an error should have."
        )
        return super().cli(prog=prog, description=description, args=args, **options)


def versions() -> str:
    """This package's version, and those that a report of an error should name."""
    found = {"moss-audio-jax": "not installed, run from its source", "jax": "not installed"}
    for name in found:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"moss-audio-jax {found['moss-audio-jax']} (JAX {found['jax']}, Python {platform.python_version()})"


_FULL, _NO_ACCESS = "make room there, or name another place", "give access to it, or name another place"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.EROFS: _NO_ACCESS,
    errno.ENOTDIR: "a file stands where a directory is meant: name another place",
    errno.EEXIST: "a file stands where a directory is meant: name another place",
    errno.EISDIR: "a directory stands where a file is meant: name another place",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.ELOOP: "a link leads back to itself: correct it",
    errno.EMFILE: "raise the limit of open files, `ulimit -n`",
}


_PATH = re.compile(r"(?<![\w./])/[^\s\"';,]+")


def storage_refusal(error: Exception) -> str | None:
    """A sentence about what the disk refuses; None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        number, place = error.errno, error.filename2 or error.filename
    else:  # of libraries written in C++, whose errors have no number
        number = next((number for number in _REMEDIES if os.strerror(number) in str(error)), None)
        found = _PATH.search(str(error))
        place = found and found[0]
    if number not in _REMEDIES:
        return None
    return f"{os.fsdecode(place or 'the disk')} can't be used ({os.strerror(number)}): {_REMEDIES[number]}"


def run_cli(door: Callable[[], object]) -> None:
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
        if (refusal := storage_refusal(error)) is not None:
            print(f"error: {refusal}", file=sys.stderr)
            sys.exit(2)
        if not is_transient(error):
            raise
        print(f"error: storage or a connection failed ({summary(error)}); run the same command again", file=sys.stderr)
        sys.exit(TRY_AGAIN)
