"""Shared by the commands: a user's mistake is one sentence and exit code 2, never a traceback."""

import difflib
import errno
import importlib.metadata
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from moss_audio_jax.commands.compilation_cache import keep_compiled_programs
from moss_audio_jax.commands.interruption import INTERRUPTED, end, ends_on_ctrl_c
from moss_audio_jax.commands.mistakes import mistakes_in_one_sentence
from moss_audio_jax.commands.paths import PathArgument as PathArgument
from moss_audio_jax.commands.renamed import current_arguments
from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.storage.retries import is_transient, summary

TRY_AGAIN = 75  # exit code, EX_TEMPFAIL: the same command may work later


class Commands(tyro.extras.SubcommandApp):
    """The commands of a program. Takes `--version` too, and names the command that is nearest to an unknown one."""

    def cli(self, *, prog: str, description: str | None, args: Sequence[str] | None = None, **options: Any) -> Any:
        args = sys.argv[1:] if args is None else args
        names = [name.replace("_", "-") for name in self._subcommands]
        if not args:
            raise MossAudioError(f"{prog} needs a command: give one of {', '.join(names)}, or --help")
        if args[0] == "--version":
            return print(versions())
        if not args[0].startswith("-") and args[0].replace("_", "-") not in names:
            nearest = difflib.get_close_matches(args[0], names, n=1)
            advice = f"did you mean {nearest[0]}" if nearest else f"give one of {', '.join(names)}"
            raise MossAudioError(f"{prog} has no command {args[0]!r}: {advice}")
        description = f"{description or ''}\n`{prog} --version` prints the versions that a bug report should have."
        args = current_arguments(args)
        markers = (tyro.conf.PositionalMetavarFromFieldName, *options.pop("config", ()))
        with mistakes_in_one_sentence(args, lambda: self.option_names(args[0], markers)):
            return super().cli(prog=prog, description=description, args=args, config=markers, **options)

    def option_names(self, command: str, markers: Sequence[Any]) -> list[str]:
        """Returns the options of a command, for suggestions."""
        return [name for action in self.parser(command, markers)._actions for name in action.option_strings]

    def parser(self, command: str, markers: Sequence[Any]) -> Any:
        """Returns an argparse parser with the options of a command."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            target: Any = self._subcommands[command.replace("-", "_")].target
            return tyro.extras.get_parser(target, config=tuple(markers))


def versions() -> str:
    """Returns the versions of this package, of JAX and of Python."""
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
    """Returns a sentence about a file or disk that can't be used; None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        number, place = error.errno, error.filename2 or error.filename
    else:  # errors of C++ libraries have no number
        number = next((number for number in _REMEDIES if os.strerror(number) in str(error)), None)
        found = _PATH.search(str(error))
        place = found and found[0]
    if number not in _REMEDIES:
        return None
    return f"{os.fsdecode(place or 'the disk')} can't be used ({os.strerror(number)}): {_REMEDIES[number]}"


def run_cli(command: Callable[[], object]) -> None:
    """Runs a command. Prints errors as one sentence, and exits with the code that a shell expects."""
    try:
        with ends_on_ctrl_c():
            keep_compiled_programs()
            command()
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    except MossAudioError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        end(INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
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
