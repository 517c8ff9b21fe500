"""Resolves the path of a checkpoint, once: which layout it has, and where its parts are.

`locate(path)` returns a `Location`, which everything that reads a checkpoint takes. Three layouts are read:

    released    config.json, model.safetensors or shards and their index, tokenizer files
    Orbax       config.json, params/ (the stacked tree), tokenizer files
    adapter     adapter_config.json, and adapter_model.safetensors (PEFT) or params/ (Orbax)

A training run holds many Orbax checkpoints:

    RUN/checkpoints/STEP/params    the parameters, with LoRA the adapter's alone
    RUN/checkpoints/STEP/ema       moving averages of the trained parameters, if the run keeps them
    RUN/model                      configuration and tokenizer files of all of them
    RUN/best.json                  the step of the best checkpoint

What is not on this machine, and has the form OWNER/NAME or OWNER/NAME@REVISION, is a model or an adapter of the Hugging
Face hub in the first or the last layout, which `locate` fetches into the hub's cache.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable
from functools import cache, cached_property
from typing import Any, Literal

import orbax.checkpoint as ocp

from moss_audio_jax.config import CONFIG_FILES, MODEL_TYPES
from moss_audio_jax.errors import MossAudioError, StorageError, shown
from moss_audio_jax.schema import TEXT, Rule, integer, none_or
from moss_audio_jax.storage.hub import HubError, HubName, hub_name, snapshot
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path, absolute, children, exists, file_in, is_plain_name, to_path
from moss_audio_jax.weights.recognition import nearest, not_a_model, not_an_adapter

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
PARAMS = "params"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
RUN_CHECKPOINTS, RUN_MODEL, RUN_EMA = "checkpoints", "model", "ema"
RUN_BEST = "best"  # in a checkpoint: the best one before this checkpoint's own evaluation
RUN_BEST_FILE = "best.json"  # in a run: the best one by its last evaluation
# Names and patterns of the files that are copied with the weights and the configuration, if they exist.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "chat_template*",
)


@dataclasses.dataclass(frozen=True)
class Location:
    """The parts of a checkpoint.

    path: as the user gave it; of a name of the hub its directory in the cache.
    files: the directory of the configuration and tokenizer files.
    params: the directory of the Orbax tree; None in other layouts, and where there is no checkpoint.
    averages: an Orbax tree of some of the parameters, which replace those of the same names.
    hub: the name and commit of the repository that the files are of, if they are of one.
    """

    path: Path
    files: Path
    params: Path | None = None
    averages: Path | None = None
    hub: HubName | None = None

    @cached_property
    def is_adapter(self) -> bool:
        """True for a LoRA adapter, in either layout, rather than a whole model."""
        return exists(self.files / ADAPTER_CONFIG)

    @cached_property
    def is_released(self) -> bool:
        return any(exists(self.path / name) for name in (INDEX_FILE, SINGLE_FILE))

    def layout(self) -> Literal["orbax", "released"]:
        """Returns the layout; raises MossAudioError that says what is there instead of a checkpoint."""
        if self.params is not None:
            return "orbax"
        if self.is_released or (self.hub is not None and not self.is_adapter):
            return "released"
        if (self.path / RUN_CHECKPOINTS).is_dir():
            raise MossAudioError(
                f"{self.path} is a training run without a checkpoint so far: wait until it has saved one"
            )
        raise MossAudioError(not_a_model(self.path))

    def require_adapter(self) -> None:
        """Raises MossAudioError that says what is there instead of a LoRA adapter."""
        if not self.is_adapter:
            raise MossAudioError(not_an_adapter(self.path, self.params is not None or self.is_released))

    def base(self, *, weights: bool = True) -> "Location":
        """Locates the model that this adapter was made for, on this machine or the hub; weights: see `locate`."""
        name, base, why, kind = base_name(self.files), None, "", MossAudioError
        try:
            base = None if name is None else locate(name, weights=weights)
        except (HubError, StorageError) as error:
            why, kind = f" ({error})", type(error)
        if name is None or base is None or (base.hub is None and not to_path(name).is_dir()):
            raise kind(
                f"{self.path} holds an adapter for {name or 'a model that it does not name'}, which is no directory "
                f"here{why}: name the model's directory, and the adapter beside it (generate MODEL --adapter, convert "
                "--base)"
            )
        if base.is_adapter:
            raise MossAudioError(
                f"{self.path} names {name} as its model, which holds an adapter itself: merge that one with "
                "`moss-audio-convert to-hf`, and name the model's directory and the adapter beside it"
            )
        return base

    def tokenizer_files(self) -> list[Path]:
        return _plain_files(self.files, TOKENIZER_FILES)

    def companion_files(self) -> list[Path]:
        """Lists the configuration files, then the tokenizer files."""
        return _plain_files(self.files, CONFIG_FILES) + self.tokenizer_files()


def locate(path: AnyPath, *, weights: bool = True) -> Location:
    """Resolves a path, given by the user, to the parts of the checkpoint there.

    path: a released directory, one that `convert to-orbax` wrote, an adapter, a training run, or one of its
        checkpoints. A run stands for its newest checkpoint. RUN/best stands for its best one, and `ema` in a run, a
        checkpoint or RUN/best for the same with moving averages: no directories have these names. What does not exist
        may be the name of a model on the hub, whose files are fetched.
    weights: of the hub, also fetch the weights, and not only configuration and tokenizer files.
    A path without a checkpoint is no error here: `Location.layout` raises it. A name that the hub does not have is one.
    """
    found = locate_here(path)
    name = hub_name(path) if found.params is None and not exists(found.path) else None
    # In a directory that exists the name may be a typing error, and asking the hub would take another model.
    if name is None or (name.revision is None and exists(found.path.parent)):
        return found
    try:
        return _on_hub(name, weights)
    except HubError as error:
        if meant := nearest(found.path):
            raise HubError(f"{error}; or did you mean {meant}?") from error
        raise


def locate_here(path: AnyPath) -> Location:
    """Resolves a path of this machine or of gs:// as `locate` does, and never asks the hub."""
    path = to_path(path)
    averaged = locate_here(path.parent) if path.name == RUN_EMA and not (path / PARAMS).is_dir() else None
    if averaged is not None and averaged.params is not None:
        return _with_averages(averaged, path)
    if (path / PARAMS).is_dir():
        run_model = absolute(path).parent.parent / RUN_MODEL
        in_run = absolute(path).parent.name == RUN_CHECKPOINTS and run_model.is_dir()
        return Location(path, run_model if in_run else path, path / PARAMS)
    newest = _newest_checkpoint(path)
    if newest is not None:
        return Location(path, path / RUN_MODEL, newest / PARAMS)
    run = absolute(path).parent
    if path.name == RUN_BEST and (run / RUN_CHECKPOINTS).is_dir():
        return Location(path, run / RUN_MODEL, _best_checkpoint(run) / PARAMS)
    return Location(path, path)


# Files of the hub that say what a repository is; its weights come after they were read.
_DESCRIBING = (*CONFIG_FILES, *TOKENIZER_FILES, INDEX_FILE, ADAPTER_CONFIG)


@cache  # one commit for all of a process, though a branch may move
def _described(name: HubName) -> Location:
    """Fetches what describes a repository of the hub; raises MossAudioError if that is no model that is read here."""
    directory, commit = snapshot(name, _DESCRIBING)
    location = Location(to_path(directory), to_path(directory), hub=commit)
    if location.is_adapter:
        return location
    if not exists(directory / CONFIG_FILES[0]):
        raise MossAudioError(
            f"{name} on the hub holds neither {CONFIG_FILES[0]} nor {ADAPTER_CONFIG}: name a model in the released "
            "layout, or an adapter of PEFT's"
        )
    kind = read_json(file_in(directory, CONFIG_FILES[0])).get("model_type")
    if kind not in (*MODEL_TYPES, "qwen3"):
        raise MossAudioError(
            f"{name} on the hub holds a model of type {shown(kind)}, and not MOSS-Audio: name one of its releases, or "
            "a model that was trained from one"
        )
    return location


def forget_names() -> None:
    """Makes the next `locate` ask the hub again, where a branch may have moved."""
    _described.cache_clear()


def _on_hub(name: HubName, weights: bool) -> Location:
    location = _described(name)
    assert location.hub is not None
    if weights and (missing := _missing_weights(location)):
        snapshot(location.hub, missing)
        if missing := _missing_weights(location):
            raise MossAudioError(
                f"{name} on the hub lacks {missing[0]}, or that is not in the cache and the hub can't be reached: name "
                "a model that is whole there, or run the same command again with a network"
            )
    return location


def _missing_weights(location: Location) -> list[str]:
    names = [ADAPTER_FILE if location.is_adapter else SINGLE_FILE]
    if not location.is_adapter and exists(location.path / INDEX_FILE):
        found = read_json(file_in(location.path, INDEX_FILE)).get("weight_map")
        # What is no name of a file is said when the index is read in earnest.
        names = sorted(set(filter(is_plain_name, found.values()))) if isinstance(found, dict) else []
    return [name for name in names if not exists(location.path / name)]


def processor_directories(path: AnyPath) -> tuple[Path, Path]:
    """Returns the directories of a checkpoint's tokenizer files and configuration.

    An adapter takes what it lacks from its base.
    """
    location = locate(path, weights=False)
    own = location.files
    has_config = exists(own / CONFIG_FILES[0])
    has_tokenizer = any(exists(own / name) for name in ("vocab.json", "tokenizer.json"))
    if has_config and has_tokenizer:
        return own, own
    if not location.is_adapter:
        location.layout()  # raises what is there instead of a checkpoint
        return own, own
    base = location.base(weights=False).files
    return own if has_tokenizer else base, own if has_config else base


def copy_tokenizer(source: AnyPath, target: AnyPath) -> None:
    """Copies a checkpoint's tokenizer files, byte for byte."""
    for file in locate(source, weights=False).tokenizer_files():
        file.copy(to_path(target) / file.name, overwrite=True)


def _plain_files(directory: Path, patterns: Iterable[str]) -> list[Path]:
    entries = children(directory)
    files = [file for pattern in patterns for file in entries if fnmatch.fnmatchcase(file.name, pattern)]
    for file in files:
        file_in(directory, file.name)
        if not file.is_file():
            raise MossAudioError(f"{file} must be a file, but is none: remove it, or copy the file itself there")
    return files


_BASE_NAME = Rule(
    "a name of at most 1,000 printable characters",
    lambda value: isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable(),
)


def base_name(adapter: AnyPath) -> str | None:
    """Reads the name of the model that an adapter was made for: a directory, or OWNER/NAME or OWNER/NAME@REVISION."""
    path = file_in(adapter, ADAPTER_CONFIG)
    content = read_json(path)
    name, revision = content.get("base_model_name_or_path"), content.get("revision")
    if name:
        _BASE_NAME.check(f"{path}: base_model_name_or_path", name)
    if name and revision and hub_name(f"{name}@{revision}") is not None and not to_path(name).is_dir():
        return f"{name}@{revision}"
    return name or None


# Checkpoints of a run


def _with_averages(checkpoint: Location, path: Path) -> Location:
    assert checkpoint.params is not None
    averages = checkpoint.params.parent / RUN_EMA
    if not averages.is_dir():
        raise MossAudioError(
            f"{path}: {checkpoint.params.parent} holds no moving averages, which a run keeps with "
            "--optimizer.ema-decay: name the run or the checkpoint itself"
        )
    return dataclasses.replace(checkpoint, path=path, averages=averages)


def _newest_checkpoint(run: Path) -> Path | None:
    steps = sorted(int(entry.name) for entry in children(run / RUN_CHECKPOINTS) if entry.name.isdecimal())
    for step in reversed(steps):
        checkpoint = run / RUN_CHECKPOINTS / str(step)
        # On gs://, which renames nothing, a checkpoint has its name already while it is being written.
        if checkpoint.is_dir() and ocp.path.step.is_path_finalized(absolute(checkpoint)):
            return checkpoint
    return None


def _best_checkpoint(run: Path) -> Path:
    newest = _newest_checkpoint(run)
    best = newest and _best_evaluation(run, newest)
    if not best or best["step"] is None:
        raise MossAudioError(
            f"{run} does not know its best checkpoint, since it trained without --best-metric or has not evaluated "
            "yet: name the run, whose newest is taken, or one of its checkpoints"
        )
    checkpoint = run / RUN_CHECKPOINTS / str(best["step"])
    if not checkpoint.is_dir():
        raise MossAudioError(
            f"{run}: its best checkpoint by {best['metric']} is that of step {best['step']}, which is not there: name "
            f"another in {RUN_CHECKPOINTS}/"
        )
    return checkpoint


def _best_evaluation(run: Path, newest: Path) -> dict[str, Any] | None:
    """Reads the JSON of the best evaluation, from the run's own file or its newest checkpoint.

    Runs of older versions lack that file, and it is ahead of the checkpoints if newer ones were removed.
    """
    file = run / RUN_BEST_FILE
    if file.exists() and ((best := read_best(file))["evaluated"] or 0) <= int(newest.name):
        return best
    file = newest / RUN_BEST / "metadata"  # Orbax's name for JSON
    return read_best(file) if exists(file) else None


_STEP = none_or(integer(0, 2**63 - 1))


def read_best(file: Path) -> dict[str, Any]:
    """Reads the JSON of a best evaluation; raises MossAudioError for a step that is no integer.

    The step becomes the name of a directory.
    """
    best = read_json(file)
    TEXT.check(f"{file}: metric", best.get("metric"))
    for name in ("step", "evaluated"):
        _STEP.check(f"{file}: {name}", best.get(name))
    return {"step": None, "evaluated": None} | best
