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
"""

import dataclasses
import fnmatch
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import orbax.checkpoint as ocp

from moss_audio_jax.config import CONFIG_FILES
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.schema import TEXT, Rule, integer, none_or
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path, absolute, children, exists, file_in, to_path
from moss_audio_jax.weights.recognition import not_a_model, not_an_adapter

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

    path: as the user gave it. files: the directory of the configuration and tokenizer files.
    params: the directory of the Orbax tree; None in other layouts, and where there is no checkpoint.
    averages: an Orbax tree of some of the parameters, which replace those of the same names.
    """

    path: Path
    files: Path
    params: Path | None = None
    averages: Path | None = None

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
        if self.is_released:
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

    def base(self) -> "Location":
        """Locates the model that this adapter was made for; raises MossAudioError if it is not on this machine."""
        name = base_name(self.files)
        if name is None or not to_path(name).is_dir():
            raise MossAudioError(
                f"{self.path} holds an adapter for {name or 'a model that it does not name'}, which is no directory "
                "here: name the model's directory, and the adapter beside it (generate MODEL --adapter, convert --base)"
            )
        base = locate(name)
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


def locate(path: AnyPath) -> Location:
    """Resolves a path, given by the user, to the parts of the checkpoint there.

    path: a released directory, one that `convert to-orbax` wrote, an adapter, a training run, or one of its
        checkpoints. A run stands for its newest checkpoint. RUN/best stands for its best one, and `ema` in a run, a
        checkpoint or RUN/best for the same with moving averages: no directories have these names.
    A path without a checkpoint is no error here: `Location.layout` raises it.
    """
    path = to_path(path)
    if path.name == RUN_EMA and not (path / PARAMS).is_dir() and (averaged := locate(path.parent)).params is not None:
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


def processor_directories(path: AnyPath) -> tuple[Path, Path]:
    """Returns the directories of a checkpoint's tokenizer files and configuration.

    An adapter takes what it lacks from its base.
    """
    location = locate(path)
    own = location.files
    has_config = exists(own / CONFIG_FILES[0])
    has_tokenizer = any(exists(own / name) for name in ("vocab.json", "tokenizer.json"))
    if has_config and has_tokenizer:
        return own, own
    if not location.is_adapter:
        location.layout()  # raises what is there instead of a checkpoint
        return own, own
    base = location.base().files
    return own if has_tokenizer else base, own if has_config else base


def copy_tokenizer(source: AnyPath, target: AnyPath) -> None:
    """Copies a checkpoint's tokenizer files, byte for byte."""
    for file in locate(source).tokenizer_files():
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
    """Reads the name of the model that an adapter was made for: a directory, or a repository of a hub."""
    path = file_in(adapter, ADAPTER_CONFIG)
    name = read_json(path).get("base_model_name_or_path")
    if name:
        _BASE_NAME.check(f"{path}: base_model_name_or_path", name)
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
        if checkpoint.is_dir() and ocp.utils.is_checkpoint_finalized(absolute(checkpoint)):
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
