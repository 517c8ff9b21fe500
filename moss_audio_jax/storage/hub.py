"""Models of the Hugging Face hub by name, OWNER/NAME or OWNER/NAME@REVISION, through huggingface_hub (extra `hub`).

huggingface_hub has the cache, HF_HOME, HF_TOKEN, HF_ENDPOINT, offline mode, progress and resume. It is imported when
a file is fetched, and not before.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

from moss_audio_jax.commands.progress import waiting
from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.storage.paths import AnyPath, to_path
from moss_audio_jax.storage.retries import summary

_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9](?:[\w-]{0,94}\w)?/[A-Za-z0-9](?:[\w.-]{0,94}\w)?)(?:@(?P<revision>\w[\w./+-]{0,199}))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Never fetched, whatever a pattern says: directories, code, pickles.
_NEVER = ("*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class HubError(MossAudioError):
    """A name that the hub does not give files for, now or ever."""


@dataclasses.dataclass(frozen=True)
class HubName:
    """A repository of the hub: OWNER/NAME. revision: branch, tag or commit; None is the branch `main`."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def is_commit(self) -> bool:
        """True if the files of this name never change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def command(self) -> str:
        """The command that downloads the repository without this package."""
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return f"hf download {self.repository}{revision} --local-dir {self.repository.partition('/')[2]}"


def hub_name(path: AnyPath) -> HubName | None:
    """Reads a path as a name of the hub; None if it is no such name. A path of this machine may have that form too."""
    found = _NAME.fullmatch(str(to_path(path)))
    if found is None or any(part in found[0] for part in ("..", "--", "//")) or found["repository"].endswith(".git"):
        return None
    return HubName(found["repository"], found["revision"])


def snapshot(name: HubName, patterns: Sequence[str]) -> tuple[pathlib.Path, HubName]:
    """Fetches the files of a repository that match the patterns and are not in the cache.

    Returns their directory in the cache and the name with the commit as revision. Only files of the repository's top
    are fetched, and neither code nor pickles. Several processes may call it at once: huggingface_hub locks each file.
    Without a network the cached files are taken, which may be none.
    Raises HubError without huggingface_hub, and for what the hub refuses; StorageError for a lost connection.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(
            f"{name} does not exist on this machine: to read it from the Hugging Face hub, `pip install "
            f"'moss-audio-jax[hub]'`, or run `{name.command}` and give {name.repository.partition('/')[2]}"
        ) from error
    with _sentences(name), _progress(name):
        directory = huggingface_hub.snapshot_download(
            name.repository, revision=name.revision, allow_patterns=list(patterns), ignore_patterns=list(_NEVER)
        )
    directory = pathlib.Path(directory)
    if not _COMMIT.fullmatch(directory.name):  # the hub's answer becomes a name of a directory
        raise HubError(f"{name}: the hub must answer with a commit, not {directory.name!r}: correct HF_ENDPOINT")
    return directory, HubName(name.repository, directory.name)


@contextlib.contextmanager
def _progress(name: HubName) -> Iterator[None]:
    """Shows huggingface_hub's bars on a terminal, and few lines elsewhere."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        with waiting(f"fetching {name}"):
            yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _sentences(name: HubName) -> Iterator[None]:
    """Raises HubError or StorageError, one sentence, for the errors of huggingface_hub."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{name} is gated on the hub, {_ACCESS}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name}: no such directory, and no such model on the hub: correct the name, or, if the model is private, "
            "set HF_TOKEN or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{name}: {name.repository} is on the hub, without a revision {name.revision or 'main'}: name a branch, a "
            "tag or a commit after the @"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        status = _status(error.__cause__)
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f"{name}: no such directory, and not, or not whole, in the cache {constants.HF_HUB_CACHE} of the "
                "Hugging Face hub, which is offline (HF_HUB_OFFLINE): fetch it with a network first, or set HF_HOME"
            ) from error
        if status in (401, 403):
            raise HubError(f"{name} can't be read, {_ACCESS}") from error
        raise StorageError(
            f"{name}: no such directory, and the hub can't be reached ({_reason(error.__cause__ or error)}): try again "
            f"later, or run `{name.command}` where there is a network"
        ) from error
    except errors.HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise HubError(f"{name} can't be read, {_ACCESS}") from error
        raise StorageError(f"{name}: the hub failed ({summary(error)}): try again later") from error
    except _connection_errors() as error:
        raise StorageError(
            f"{name}: the connection to the hub was lost ({_reason(error)}); run the same command again, which resumes "
            "the download"
        ) from error
    except (OSError, RuntimeError) as error:  # hf_xet raises the latter for everything
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), constants.HF_HUB_CACHE) from error
        if getattr(error, "errno", None) is None:  # huggingface_hub's own, for example for a file of another size
            raise StorageError(
                f"{name}: the download failed ({summary(error)}); run the same command again, which resumes it"
            ) from error
        assert isinstance(error, OSError)
        error.filename = error.filename or constants.HF_HUB_CACHE  # `run_cli` names it, for example when it is full
        raise


_ACCESS = (
    "and this token has no access, or there is none: accept the model's conditions on its page, and set HF_TOKEN or "
    "run `hf auth login`"
)


def _reason(error: BaseException) -> str:
    """Returns the system's words for a failed connection, out of the long ones of several libraries."""
    found = re.search(r"\[Errno -?\d+\] ([\w ]+)", str(error))
    return found[1] if found else summary(error)


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _connection_errors() -> tuple[type[Exception], ...]:
    """Returns the errors of the library that huggingface_hub downloads with, which differs between its versions."""
    libraries = (("requests.exceptions", "RequestException"), ("httpx", "HTTPError"), ("httpx2", "HTTPError"))
    return tuple(getattr(sys.modules[module], name) for module, name in libraries if module in sys.modules)
