"""Data that join a run: makes examples of the run of the words `next-epoch` and `now` among the begins of a mixture.

A path gets its example at the start that first names it, and config.json keeps it: the same command, started again,
finds it there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path, exists, to_path
from moss_audio_jax.weights.locate import RUN_CHECKPOINTS, locate_here
from train.config import RunConfig
from train.data.mixture import ExampleOrder
from train.data.mixture_config import NEXT_EPOCH, GroupConfig
from train.data.places import difference, first_unread, place
from train.running.config import ResumeConfig
from train.running.config_file import stored_config
from train.running.directory import DATA, is_begun
from train.running.distributed import from_first_process, on_first_process
from train.running.resume import Record, rewinds


def with_begins(config: RunConfig, out: AnyPath, resume: ResumeConfig) -> RunConfig:
    """Returns the configuration with an example of the run in `out` for each begin of its data.

    Begins that the run has, or the one that it branches from, stay. Raises MossAudioError, before anything is written,
    for data that can't join. Every process must call it.
    """
    if not any(group.begins for group in config.mixture.manifest_groups().values()):
        return config
    begins: dict[str, list[int]] = {}
    # Only one process reads the place: another could already find what this one has written.
    on_first_process(lambda: begins.update(_begins(config, *_resumed(to_path(out), resume))))
    return dataclasses.replace(config, mixture=config.mixture.with_begins(from_first_process(begins)))


def _resumed(out: Path, resume: ResumeConfig) -> tuple[Path | None, int | None]:
    """Returns the run whose configuration goes on, and the step whose place in the data does; None for new ones."""
    if not is_begun(out):
        run, step = resume.origin or (None, None)
        return run, step if resume.branch_optimizer else None
    if resume.from_step is not None and rewinds(Record.read(out), resume):
        return out, resume.from_step
    newest = locate_here(out).params
    assert newest is not None  # it has begun
    return out, int(newest.parent.name)


def data_state(run: AnyPath, step: int) -> dict[str, Any]:
    """Reads the state of the data, of all processes, in a checkpoint of a run."""
    file = to_path(run) / RUN_CHECKPOINTS / str(step) / DATA / "metadata"  # Orbax's name for JSON
    if not exists(file):
        raise MossAudioError(f"{run} has no checkpoint of step {step} with the place in its data: name another step")
    return read_json(file)


def _begins(config: RunConfig, run: Path | None, step: int | None) -> dict[str, list[int]]:
    """Returns the begins of each group that has any; none where all are 0."""
    stored = {} if run is None else stored_config(run).mixture.manifest_groups()
    begins = {}
    for name, group in config.mixture.manifest_groups().items():
        group.require_complete(name)
        if group.begins:
            begins[name] = _kept(group, stored.get(name))
    joining = [
        (name, path, begin)
        for name, of_group in begins.items()
        for path, begin in zip(config.mixture.manifest_groups()[name].paths, of_group, strict=True)
        if begin and begin != _by_path(stored.get(name)).get(path)
    ]
    if joining:
        state = None if run is None or step is None else data_state(run, step)
        next_unread = 0 if state is None else place(state)
        _require_unread(joining, next_unread)
        # The words are left out of this order: it is that of the run until the new data join.
        groups = config.mixture.with_begins(begins).groups(config.seed, config.columns)
        order = ExampleOrder(groups, config.seed)
        if state is not None:
            _require_same(order, state, joining)
        for name, path, begin in joining:
            if isinstance(begin, str):
                paths = config.mixture.manifest_groups()[name].paths
                begins[name][paths.index(path)] = _example(begin, name, order, state, next_unread)
    return {name: of_group if any(of_group) else [] for name, of_group in begins.items()}


def _by_path(group: GroupConfig | None) -> dict[str, int | str]:
    return {} if group is None else dict(zip(group.paths, group.all_begins, strict=True))


def _kept(group: GroupConfig, stored: GroupConfig | None) -> list[Any]:
    """Returns the begins of a group: of a path of the stored group its example instead of a word."""
    before = _by_path(stored)
    return [
        before.get(path, begin) if isinstance(begin, str) else begin
        for path, begin in zip(group.paths, group.begins, strict=True)
    ]


def _require_unread(joining: list[tuple[str, str, Any]], next_unread: int) -> None:
    for name, path, begin in joining:
        if isinstance(begin, int) and begin < next_unread:
            raise MossAudioError(
                f"--mixture.{name}.begins {begin}: {path} can't join there, since the run has read on to example "
                f"{next_unread}: give next-epoch, now, or an example from {next_unread} on"
            )


def _require_same(order: ExampleOrder, state: Mapping[str, Any], joining: list[tuple[str, str, Any]]) -> None:
    found = difference(order, None, state)
    if found is not None:
        fact, then, now = found
        name, path, _ = joining[0]
        raise MossAudioError(
            f"--mixture.{name}.begins: {path} can't join, since the data before it are not those of the run "
            f"({fact} was {then!r} and is {now!r}): restore them, or leave out the begins, and all data start again"
        )


def _example(word: str, name: str, order: ExampleOrder, state: Mapping[str, Any] | None, next_unread: int) -> int:
    """Returns the example for a word. All examples before it are read by then, or will be before those from it on."""
    if word != NEXT_EPOCH:
        return next_unread
    try:
        # Where rows have passed the end of the epoch by different numbers of examples, that epoch has just ended.
        return max(next_unread, order.end_of_epoch(name, 0 if state is None else first_unread(state)))
    except MossAudioError as error:
        raise MossAudioError(f"--mixture.{name}.begins {word}: {error}") from error
