"""A run's config.json: its configuration, the record of its starts, and the options that may change when it resumes.

    {...,        the configuration
     "starts":   number of starts of the run
     "versions": versions of this package, Python and the libraries
     "history":  [{"step": 0, "time": ..., "versions": {...}},                          first start
                  {"step": 500, "time": ..., "changes": {"loop.steps": [500, 900]}}]    one entry per later start
    }

`RULES` defines which options may change. Only the configuration is compared.
"""

import dataclasses
import fnmatch
import functools
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from moss_audio_jax.commands.renamed import current_path
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.hub import HubName, hub_name
from moss_audio_jax.storage.paths import AnyPath, atomic_write, to_path
from moss_audio_jax.weights.locate import locate
from train.config import LEARNED, ModelSource
from train.running.config import ResumeConfig
from train.running.config_file import is_group, is_option, options_of, read_back, read_content
from train.running.directory import CONFIG_FILE

Rule = Literal["free", "asked", "never"]
# Patterns of options; the first match applies. docs/training.md has the same table.
# free: may change. asked: may change if --allow-change names it. never: can't change.
RULES: tuple[tuple[str, Rule], ...] = (
    # Length of the run, its devices, and its output.
    ("recipe", "free"),
    ("loop.epochs", "asked"),
    ("loop.*", "free"),
    ("validation.*", "free"),
    ("mesh.*", "free"),
    ("data.max_*", "free"),
    ("data.grow", "free"),
    # Changes rounding and the random values of dropout only.
    ("microbatches", "free"),
    ("step.remat", "free"),
    ("step.loss_chunk", "free"),
    # Condition to skip a step.
    ("step.spike_*", "free"),
    # Source of the first parameters, which is not read again.
    ("model.allow_random_frozen", "free"),
    ("model.checkpoint", "free"),
    ("model.encoder", "free"),
    ("model.language_model", "free"),
    ("model.verify", "free"),
    # Trained parameters and the contents of checkpoints.
    ("model.*", "never"),
    ("lora.dropout", "asked"),
    ("lora.int8", "asked"),
    ("lora", "never"),
    ("lora.*", "never"),
    ("optimizer.freeze", "never"),
    ("optimizer.name", "never"),
    # Post-training by reward.
    ("rollout.slots", "free"),
    ("reward_seconds", "free"),
    ("questions.*", "asked"),
    ("rollout.*", "asked"),
    ("rewards", "asked"),
    ("objective.*", "asked"),
    # Everything else.
    ("optimizer.*", "asked"),
    ("step.*", "asked"),
    ("data.*", "asked"),
    ("mixture.*", "asked"),
    ("columns.*", "asked"),
    ("augment.*", "asked"),
    ("seed", "asked"),
)
# Options that determine the examples and their order.
DATA_OPTIONS = ("data.*", "mixture.*", "questions.*", "columns.*", "augment.*", "seed")
LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# The record


@dataclasses.dataclass(frozen=True)
class Record:
    """Contents of config.json beside the configuration."""

    starts: int
    versions: dict[str, str]
    history: list[dict[str, Any]]

    @classmethod
    def read(cls, out: AnyPath) -> "Record":
        """Reads the record of the run in this directory."""
        return cls.of(read_content(to_path(out) / CONFIG_FILE))

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Record":
        """Takes the record from the content of config.json. Runs older than the record have one start, at step 0."""
        return cls(content.get("starts", 1), content.get("versions", {}), content.get("history", [{"step": 0}]))

    @property
    def skipped_steps(self) -> set[int]:
        """Steps whose batches the run reads but does not train on."""
        stretches = (
            ResumeConfig(skip_steps=entry["skip_steps"]).skipped for entry in self.history if "skip_steps" in entry
        )
        return {step for stretch in stretches for step in stretch}

    def has_other_data_since(self, step: int) -> bool:
        """Returns True if options of the data changed after the checkpoint of this step.

        The data may still be the same up to there (`TrainingData.set_state`), if only others join later.
        """
        return any(
            entry["step"] >= step and any(_matches(name, DATA_OPTIONS) for name in entry.get("changes", ()))
            for entry in self.history
        )


def write_or_check_config(
    config: Any,
    out: AnyPath,
    *,
    begun: bool,
    step: int = 0,
    resume: ResumeConfig | None = None,
) -> Record:
    """Writes a configuration, a dataclass, to a run's config.json; first compares it with that of a run that has begun.

    begun: the run has a checkpoint. step: step of the checkpoint that it resumes from.
    Raises MossAudioError, which names the options that may not differ, before anything is written.
    """
    path, resume = to_path(out) / CONFIG_FILE, resume or ResumeConfig()
    then = read_content(path) if path.exists() else {}
    entry: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
    record = Record.of(then)
    if begun:
        if gone := _gone(config, then):
            print(f"{path}: {', '.join(gone)} are ignored: these options no longer exist", file=sys.stderr)
        differences = compare(config, out, step, resume)
        entry |= {"changes": differences} if differences else {}
        record = Record(record.starts + 1, versions(), [*record.history, entry])
    else:
        if resume.origin is not None:
            entry |= _branched(config, resume)
        record = Record(then.get("starts", 0) + 1, versions(), [entry])
    if not begun or then.get("versions") != record.versions:
        entry["versions"] = record.versions
    entry |= {name: value for name in ("from_step", "skip_steps") if (value := getattr(resume, name)) is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(_as_json(config) | dataclasses.asdict(record), indent=2) + "\n")
    return record


def with_commits(model: ModelSource, run: AnyPath | None) -> ModelSource:
    """Returns the source with the commit in each name of the hub: OWNER/NAME@COMMIT, so that it stays what it is.

    run: the run that resumes or begins a branch, whose names and commits stay; None for a new one.
    """
    before = {} if run is None else read_content(to_path(run) / CONFIG_FILE).get("model", {})
    changed = {}
    for option in ("checkpoint", "encoder", "language_model", "tokenizer"):
        given, name = getattr(model, option), hub_name(getattr(model, option) or LEARNED)
        stored = before.get(option)
        if name is None or given == stored:
            continue
        if stored and (then := hub_name(stored)) and then.is_commit and HubName(then.repository) == name:
            changed[option] = stored
        elif (found := locate(given, weights=False).hub) is not None:
            changed[option] = str(found)
    return dataclasses.replace(model, **changed)


def compare(config: Any, out: AnyPath, step: int, resume: ResumeConfig) -> dict[str, list[Any]]:
    """Returns option -> [old, new] for options that differ from the run's; raises MossAudioError if they may not."""
    _require_options(config, resume.allow_change)
    then = read_content(to_path(out) / CONFIG_FILE)
    begun_from = Record.of(then).history[0].get("branch")
    if resume.branch not in (None, begun_from):
        raise MossAudioError(
            f"--branch {resume.branch}: {out} holds a run that was begun from {begun_from or 'no other'}: name a new "
            "--out"
        )
    differences = _differences(config, then)
    _require_allowed(config, differences, resume.allow_change, step, f"{out} holds a run of another configuration")
    return differences


def _branched(config: Any, resume: ResumeConfig) -> dict[str, Any]:
    """Makes the entry in the history of a run that begins as a branch of another."""
    assert resume.origin is not None
    run, step = resume.origin
    differences = _differences(config, read_content(run / CONFIG_FILE))
    asked = {name.partition(".")[0] for name, rule in RULES if rule == "asked"}
    _require_allowed(config, differences, sorted(asked), step, f"{run} can't have a branch of another model")
    return {"branch": resume.branch, "branch_optimizer": resume.branch_optimizer, "changes": differences}


def rewinds(record: Record, resume: ResumeConfig) -> bool:
    """Returns True if `from_step` is still to be done. The same command, started again, does not repeat it."""
    return resume.from_step is not None and record.history[-1].get("from_step") != resume.from_step


# What may change


def rule_of(name: str, config: Any) -> Rule:
    """Returns the rule of an option by its dotted path. "never" if no pattern matches."""
    if name == "model.checkpoint" and getattr(config, "lora", None) is not None:
        return "never"  # an adapter's base is read again at each start
    for pattern, rule in RULES:
        if fnmatch.fnmatchcase(name, pattern):
            return rule
    return "never"


def _differences(config: Any, then: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns option -> [old value, new value] for options that differ."""
    before, after = options_of(then), options_of(_as_json(config))
    # An option that is newer than the run counts as unchanged if it is off or has its default.
    newer = options_of(_as_json(read_back(type(config), then))) if after.keys() - before.keys() else {}
    gone = _gone(config, then)
    return {
        name: [before.get(name), after.get(name)]
        for name in sorted(before.keys() | after.keys())
        if name not in gone
        and after.get(name) != before.get(name)
        and (name in before or (after[name] and after[name] != newer.get(name)))
    }


def _gone(config: Any, then: Mapping[str, Any]) -> list[str]:
    """Names of options in a stored configuration that no longer exist."""
    return [name for name in options_of(then) if not is_option(type(config), name)]


def _as_json(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _require_allowed(
    config: Any, differences: Mapping[str, Sequence[Any]], allowed: Iterable[str], step: int, problem: str
) -> None:
    """Raises MossAudioError if an option differs that may not change, or only with --allow-change.

    differences: of `_differences`. allowed: options or groups of --allow-change. problem: start of the message.
    """
    allowed = [current_path(name.replace("-", "_")) for name in allowed]
    free = ("optimizer.total_steps", "optimizer.decay_steps") if _decays_later(config, differences, step) else ()
    refused, asked = [], []
    for name, (before, after) in differences.items():
        rule = "free" if name in free else rule_of(name, config)
        permitted = rule == "asked" and any(name == group or name.startswith(f"{group}.") for group in allowed)
        if rule == "free" or permitted:
            continue
        refused.append(f"{name} is {after!r} and was {before!r}")
        asked += [name] if rule == "asked" else []
    if refused:
        others = "" if len(asked) == len(refused) else f" ({', '.join(_never(differences, config))} can't change)"
        remedy = f"give --allow-change {' '.join(asked)}, " if asked and not others else ""
        raise MossAudioError(
            f"{problem}: {'; '.join(refused)}{others}; {remedy}give the options it was begun with, or another --out"
        )


def _never(differences: Iterable[str], config: Any) -> list[str]:
    return [name for name in differences if rule_of(name, config) == "never"]


def _decays_later(config: Any, differences: Mapping[str, Sequence[Any]], step: int) -> bool:
    """Returns True if a wsd schedule has not begun to decay at `step`, neither as it was nor as it is now.

    A new end or length of the decay then changes no learning rate of a finished step.
    """
    optimizer = getattr(config, "optimizer", None)
    if optimizer is None or optimizer.schedule != "wsd" or "optimizer.schedule" in differences:
        return False
    ends = differences.get("optimizer.total_steps", [optimizer.total_steps] * 2)
    lengths = differences.get("optimizer.decay_steps", [optimizer.decay_steps] * 2)
    return all(step <= end - length for end, length in zip(ends, lengths, strict=True))


def _require_options(config: Any, allowed: Iterable[str]) -> None:
    """Raises MossAudioError for a name of `allow_change` that is not an option, or one that can't change."""
    for name in allowed:
        option = current_path(name.replace("-", "_"))
        if not is_option(type(config), option):
            raise MossAudioError(f"--allow-change {name}: there is no such option: name one such as optimizer.b1")
        if not is_group(type(config), option) and rule_of(option, config) == "never":
            raise MossAudioError(f"--allow-change {name}: it can't change in a run: start a new run with another --out")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# Versions


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, of the installed libraries and of this package, with its commit if it is in a repository."""
    found = {"python": platform.python_version(), "moss-audio-jax": _version("moss-audio-jax") or "not installed"}
    commit = _commit()
    found |= {"commit": commit} if commit else {}
    return found | {name: version for name in LIBRARIES if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the commit of the repository with this file, plus `-dirty` if files differ from it; None without one."""
    here = pathlib.Path(__file__)
    for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=12"]):
        try:
            git = ["git", "-C", str(here.parent), *command]
            done = subprocess.run(git, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None  # git is not installed, or hangs on a slow disk
        if done.returncode != 0:
            return None
    return done.stdout.strip()
