"""Writes a directory that appears complete, or not at all."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, require_empty, require_local

# Conversions hold a few pieces of `blocks.PIECE_BYTES`, for a model of any size. Measured at 4B: 0.43 to 0.80.
PEAK_MEMORY_GB = 0.8


def check_target(target: AnyPath) -> Path:
    """Returns the absolute path of a directory to write; raises MossAudioError unless it is new or empty."""
    target = require_local(target, "converted weights are written to").resolve()
    require_empty(target)
    if os.path.ismount(target):
        raise MossAudioError(f"{target} is a mount point and can't be replaced: name a new directory inside it")
    return target


@contextlib.contextmanager
def staged(target: Path, required_bytes: int) -> Iterator[Path]:
    """Yields a new directory beside `target`, which is renamed to `target` at the end, or removed after an error.

    Prints the disk space and memory that are needed; raises MossAudioError if the disk has too little.
    """
    existing = next(parent for parent in target.parents if os.path.exists(parent))
    free = shutil.disk_usage(existing).free
    required = required_bytes + required_bytes // 50 + (1 << 20)  # headers, manifests, padding
    print(
        f"writing {target}: needs up to {required / 1e9:.3g} GB of disk ({free / 1e9:.3g} GB are free) "
        f"and about {PEAK_MEMORY_GB} GB of memory",
        file=sys.stderr,
    )
    if required > free:
        raise MossAudioError(
            f"{target} would take up to {required / 1e9:.3g} GB and {existing} has {free / 1e9:.3g} GB free: "
            "make room, or choose another disk"
        )
    work = target.with_name(f"{target.name}.partial-{os.getpid()}")
    made = [parent for parent in target.parents if not os.path.exists(parent)]  # innermost first
    try:
        work.mkdir(parents=True)
        yield work
        os.rename(work, target)  # over an empty directory, too
    except OSError as error:
        raise MossAudioError(f"{target} can't be written ({error}): nothing was left behind") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not target.exists():
            with contextlib.suppress(OSError):
                for parent in made:
                    parent.rmdir()
