"""What a training run is told: dataclasses with a default for everything, and recipes, which are values of them.

Every field is an option of `python -m train run`. What changes the parameters that come out is written to the run's
`config.json` and has to stay the same until the run ends; `FREE_TO_CHANGE` may be others each time it is resumed.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import tyro

from moss_audio_jax.config import PRESETS, read_json
from moss_audio_jax.errors import MossAudioError
from train.data.mixture import Group, Source
from train.data.pipeline import DataConfig
from train.optimizer import OptimizerConfig
from train.step import StepConfig

CONFIG_FILE = "config.json"
FREE_TO_CHANGE = ("loop.", "mesh.", "data.max_skip_rate")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the first parameters come from."""

    checkpoint: str | None = None
    """A MOSS-Audio directory, released or Orbax: its configuration, parameters and tokenizer."""
    preset: str = "4b"
    """Without a checkpoint: random parameters of this size (4b, 8b or tiny)."""
    tokenizer: str | None = None
    """A directory of tokenizer files, if they are not those of the checkpoint."""

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise MossAudioError(f"model.preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")

    @property
    def tokenizer_directory(self) -> str:
        directory = self.tokenizer or self.checkpoint
        if directory is None:
            raise MossAudioError("without model.checkpoint, model.tokenizer must name a directory of tokenizer files")
        return directory


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Data sets that share a purpose."""

    share: float
    """Of all examples, relative to the groups that have paths."""
    objectives: tuple[str, ...]
    """What is asked, each alike often where an example has the labels for it."""
    paths: tuple[str, ...] = ()
    """Manifests, and directories of shards; each is drawn in proportion to the square root of its size."""


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """MOSS-Audio's published mixture."""

    speech: GroupConfig = GroupConfig(0.3, ("transcribe", "transcribe_words", "transcribe_sentences"))
    captions: GroupConfig = GroupConfig(0.4, ("caption", "events", "time_qa", "conversation"))
    text: GroupConfig = GroupConfig(0.3, ("plain_text",))

    def groups(self) -> list[Group]:
        """The groups that have paths, opened."""
        named = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        used = [(name, group) for name, group in named if group.paths]
        if not used:
            options = ", ".join(f"mixture.{name}.paths" for name, _ in named)
            raise MossAudioError(f"there is nothing to train on: give one of {options}")
        return [
            Group(name, group.share, tuple(_open(path, group.objectives) for path in group.paths))
            for name, group in used
        ]


def _open(path: str, objectives: tuple[str, ...]) -> Source:
    from train.data.manifest import Manifest
    from train.data.shards import Shards

    examples = Shards(path) if Path(path).is_dir() else Manifest(path)
    return Source(path, examples, dict.fromkeys(objectives, 1.0))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out: `replica` whole copies, `fsdp` data-parallel parts, `tensor` within a layer.

    -1 takes the devices that are left.
    """

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How far a run goes and what it leaves behind."""

    steps: int | None = None
    """Stop after this step; by default where the optimizer's schedule ends."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step and a SIGTERM make one too."""
    keep_last: int = 3
    """The newest checkpoints to keep."""
    keep_every: int | None = None
    """Keep those at multiples of this many steps for good."""
    max_skipped_in_a_row: int = 20
    """Give up after so many steps without a usable gradient."""
    log_every: int = 10
    """Steps between lines of progress; metrics.jsonl has a line for every step."""
    workers: int = 0
    """Processes that decode and pack; 0 does so in the run's own process."""

    def __post_init__(self):
        for name in ("steps", "checkpoint_every", "keep_last", "keep_every", "max_skipped_in_a_row", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MossAudioError(f"{name} must be 1 or more, not {value}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All of a run. seed: of the data's order, of random parameters and of dropout."""

    data: DataConfig
    optimizer: OptimizerConfig
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = LoopConfig()
    model: ModelSource = ModelSource()
    mixture: MixtureConfig = MixtureConfig()
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshConfig = MeshConfig()
    microbatches: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.microbatches < 1 or self.data.batch_size % self.microbatches:
            raise MossAudioError(
                f"microbatches must divide the batch of {self.data.batch_size} sequences, not {self.microbatches}"
            )

    @property
    def last_step(self) -> int:
        return self.loop.steps or self.optimizer.total_steps


# Batch, lengths and rates were not published; these are ours.
_DATA = DataConfig(batch_size=64, tokens=4096, chunks=64)

RECIPES: dict[str, RunConfig] = {
    # Stage 1: adapter and DeepStack mergers only. Give it no text-only data, which teaches them nothing.
    "pretrain_stage1": RunConfig(
        data=_DATA,
        optimizer=OptimizerConfig(
            learning_rate=1e-3, total_steps=10_000, freeze=("audio_encoder.*", "language_model.*", "lm_head.*")
        ),
    ),
    # Stage 2: everything, text included.
    "pretrain_stage2": RunConfig(
        data=_DATA, optimizer=OptimizerConfig(learning_rate=1e-4, total_steps=100_000, warmup_steps=1000)
    ),
}
RecipeName = Literal["pretrain_stage1", "pretrain_stage2"]


def settle(config: RunConfig, out: Path, *, begun: bool) -> None:
    """Writes the configuration into a run's directory, compared first with that of a run that has begun.

    Raises MossAudioError, naming what differs, if that is another one.
    """
    path = out / CONFIG_FILE
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if begun:
        then = read_json(path)
        before, after = _by_path(then), _by_path(now)
        problems = [
            f"{name} is {after.get(name)!r} and was {before.get(name)!r}"
            for name in sorted(before.keys() | after.keys())
            if not name.startswith(FREE_TO_CHANGE) and after.get(name) != before.get(name)
        ]
        if problems:
            raise MossAudioError(
                f"{out} holds a run of another configuration: {'; '.join(problems)}; "
                "give the options it was begun with, or another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(now, indent=2) + "\n", "utf-8")
    partial.replace(path)


def _by_path(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one by dotted path."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _by_path(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
