"""What a training run is told: dataclasses with a default for everything, and recipes, which are values of them.

Every field is an option of `python -m train run`. What changes the parameters that come out is written to the run's
`config.json` and has to stay the same until the run ends; `FREE_TO_CHANGE` may be others each time it is resumed.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, Literal

import tyro

from moss_audio_jax.config import LoraConfig, MossAudioConfig, read_json
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.int8 import int8_kernels
from moss_audio_jax.paths import AnyPath, to_path, write_whole
from train.data.mixture import Group, Source
from train.data.pipeline import DataConfig
from train.data.scenes import SceneConfig, SceneExamples
from train.initial import ModelSource, model_config
from train.optimizer import OptimizerConfig, is_frozen
from train.step import StepConfig

CONFIG_FILE = "config.json"
FREE_TO_CHANGE = ("loop.", "mesh.", "data.max_skip_rate")


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Data sets that share a purpose."""

    share: float
    """Of all examples, relative to the groups that have paths."""
    objectives: tuple[str, ...]
    """What is asked, each alike often where an example has the labels for it."""
    paths: tuple[str, ...] = ()
    """Manifests, and directories of shards; each is drawn in proportion to the square root of its size."""
    begin: int = 0
    """The group takes part from this example of the run on."""
    end: int | None = None
    """And until this one."""

    def group(self, name: str, seed: int) -> Group | None:
        """The group, opened; None if it is given nothing."""
        if not self.paths:
            return None
        return Group(name, self.share, tuple(_open(path, self.objectives) for path in self.paths), self.begin, self.end)


@dataclasses.dataclass(frozen=True)
class SceneGroupConfig:
    """Sound scenes, made while training."""

    share: float = 0.0
    """Of all examples, relative to the other groups; 0 makes none."""
    scenes: SceneConfig = dataclasses.field(default_factory=SceneConfig)
    begin: int = 0
    """The group takes part from this example of the run on."""
    end: int | None = None
    """And until this one: so a curriculum begins with easier scenes."""

    def group(self, name: str, seed: int) -> Group | None:
        if not self.share:
            return None
        source = Source(name, SceneExamples(self.scenes, seed), {"conversation": 1.0})
        return Group(name, self.share, (source,), self.begin, self.end)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """MOSS-Audio's published mixture, and sound scenes."""

    speech: GroupConfig = GroupConfig(0.3, ("transcribe", "transcribe_words", "transcribe_sentences"))
    captions: GroupConfig = GroupConfig(0.4, ("caption", "events", "time_qa", "conversation"))
    text: GroupConfig = GroupConfig(0.3, ("plain_text",))
    conversations: GroupConfig = GroupConfig(1.0, ("conversation",))
    """To fine-tune on: `--data` is short for its paths."""
    scenes: SceneGroupConfig = SceneGroupConfig()
    easy_scenes: SceneGroupConfig = SceneGroupConfig()
    """Apart from the others, for a curriculum."""

    def groups(self, seed: int) -> list[Group]:
        """The groups that are given something, opened. seed: of the scenes."""
        named = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        opened = [group.group(name, seed) for name, group in named]
        used = [group for group in opened if group is not None]
        if not used:
            options = ", ".join(f"mixture.{name}.paths" for name, group in named if isinstance(group, GroupConfig))
            raise MossAudioError(f"there is nothing to train on: give one of {options}, or mixture.scenes.share")
        return used


def _open(path: str, objectives: tuple[str, ...]) -> Source:
    from train.data.manifest import Manifest
    from train.data.shards import Shards

    examples = Shards(path) if to_path(path).is_dir() else Manifest(path)
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
    wandb: str | None = None
    """A project in Weights & Biases to report to as well; needs `pip install 'moss-audio-jax[wandb]'`."""
    profile_first: int = 10
    """The first step of a profile."""
    profile_steps: int = 0
    """Record a trace of so many steps in profile/; 0 records none."""
    evaluate_every: int | None = None
    """Steps between evaluations on held-out data; none by default."""
    evaluate_data: tuple[str, ...] = ()
    """Manifests and directories of shards to evaluate on; by default sound scenes that are not in the training."""
    evaluate_objectives: tuple[str, ...] = ()
    """What is asked about their examples; by default all that they have labels for."""
    evaluate_count: int = 64
    """Examples of each to evaluate on."""
    evaluate_tokens: int = 256
    """The longest answer."""
    best_metric: str | None = None
    """Keep the checkpoint whose evaluation is best by this metric: loss, wer, cer, aas, f1, accuracy or another one of
    `train/best.py`, over all that is asked. Each evaluation makes a checkpoint then; another metric begins anew."""
    patience: int | None = None
    """End the run after so many evaluations in a row that were not better by that metric."""
    show_samples: int = 2
    """Answers of an evaluation to show and log, with a picture of their timelines."""
    check_data: bool = False
    """Look at all manifests first, as `python -m train check` does, and begin only if every example can be used. Audio
    on gs:// is not looked at."""
    workers: int = 0
    """Processes that decode and pack; 0 does so in the run's own process."""

    def __post_init__(self):
        for name in (
            "steps",
            "checkpoint_every",
            "keep_last",
            "keep_every",
            "max_skipped_in_a_row",
            "log_every",
            "evaluate_every",
            "evaluate_count",
            "evaluate_tokens",
            "patience",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MossAudioError(f"{name} must be 1 or more, not {value}")
        for name, needed in (("best_metric", "evaluate_every"), ("patience", "best_metric")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise MossAudioError(f"{name} needs {needed}: give both, or leave {name} out")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All of a run. seed: of the data's order, of random parameters and of dropout.

    lora: trains an adapter of LoRA on `model.checkpoint`, which is frozen in the compute dtype, instead of the model.
    """

    data: DataConfig
    optimizer: OptimizerConfig
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = LoopConfig()
    model: ModelSource = dataclasses.field(default_factory=ModelSource)
    mixture: MixtureConfig = MixtureConfig()
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    lora: tyro.conf.AvoidSubcommands[LoraConfig | None] = None
    mesh: MeshConfig = MeshConfig()
    microbatches: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.microbatches < 1 or self.data.batch_size % self.microbatches:
            raise MossAudioError(
                f"microbatches must divide the batch of {self.data.batch_size} sequences, not {self.microbatches}"
            )
        others = (self.model.encoder, self.model.language_model)
        if self.lora is not None and others != (None, None):
            raise MossAudioError(
                "lora adapts one checkpoint: leave model.encoder and model.language_model out, and put the parts "
                "together in a run without lora first"
            )

    def trained_model(self) -> MossAudioConfig:
        """Of the model that is trained, with its adapters if it has any."""
        return dataclasses.replace(model_config(self.model), lora=self.lora)

    def frozen_dtypes(self, paths: Iterable[str]) -> dict[str, str]:
        """The type of each of these parameters that is frozen: masters are float32, these need no more to compute."""
        frozen = [path for path in paths if is_frozen(path, self.optimizer.freeze, self.lora)]
        return dict.fromkeys(frozen, self.step.compute_dtype) | dict.fromkeys(int8_kernels(frozen), "int8")

    @property
    def last_step(self) -> int:
        return self.loop.steps or self.optimizer.total_steps


# Batch, lengths and rates were not published; these are ours.
_DATA = DataConfig(batch_size=64, tokens=4096, chunks=64)
_FINETUNE_DATA = DataConfig(batch_size=8, tokens=4096, chunks=64)
_EASY_SCENES = 12_800  # 400 steps

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
    # All of a released model, on conversations of one's own; the rate is a tenth of LoRA's.
    "finetune": RunConfig(
        data=_FINETUNE_DATA,
        optimizer=OptimizerConfig(learning_rate=2e-5, total_steps=500, warmup_steps=20, weight_decay=0.0),
        loop=LoopConfig(checkpoint_every=100, check_data=True),
    ),
    # An adapter for the language model alone. The authors' example learns at the same rate, with a 16th of the scale.
    "finetune_lora": RunConfig(
        data=_FINETUNE_DATA,
        optimizer=OptimizerConfig(learning_rate=2e-4, total_steps=500, warmup_steps=20, weight_decay=0.0),
        lora=LoraConfig(),
        loop=LoopConfig(checkpoint_every=100, check_data=True),
    ),
    # A small model from nothing: what is heard in a scene, and when. Minutes on two CPU cores. Short scenes come first,
    # then long ones among them; long ones alone teach it far more slowly.
    "time_events": RunConfig(
        model=ModelSource(preset="small", tokenizer="learned"),
        data=DataConfig(batch_size=16, tokens=208, chunks=2, lanes=2, open_bins=4),
        mixture=MixtureConfig(
            easy_scenes=SceneGroupConfig(0.2, SceneConfig(seconds=(4.0, 4.0), events=(1, 2))),
            scenes=SceneGroupConfig(1.0, SceneConfig(seconds=(6.0, 8.0), events=(1, 4)), begin=_EASY_SCENES),
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            schedule="wsd",
            total_steps=1060,
            warmup_steps=50,
            decay_steps=450,
            b2=0.98,
            weight_decay=0.01,
            final_fraction=0.05,
        ),
        step=StepConfig(compute_dtype="float32", remat="none", loss_chunk=208, heard_weight=0.5, spike_sigma=0.0),
        loop=LoopConfig(checkpoint_every=400),
        microbatches=2,
    ),
}
RecipeName = Literal["pretrain_stage1", "pretrain_stage2", "finetune", "finetune_lora", "time_events"]


def with_paths(
    config: RunConfig, init: str | None = None, data: tuple[str, ...] = (), eval_data: tuple[str, ...] = ()
) -> RunConfig:
    """The configuration with what `--init`, `--data` and `--eval-data` name, short for three of its fields.

    Where there is data to evaluate on and nothing says how often, that is at each checkpoint. Raises MossAudioError if
    a field already holds something else.
    """
    model, loop, group = config.model, config.loop, config.mixture.conversations
    checkpoint = _said_once("--init", init, "--model.checkpoint", model.checkpoint)
    paths = _said_once("--data", data, "--mixture.conversations.paths", group.paths)
    evaluate_data = _said_once("--eval-data", eval_data, "--evaluate-data", loop.evaluate_data)
    every = loop.checkpoint_every if eval_data and loop.evaluate_every is None else loop.evaluate_every
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, checkpoint=checkpoint),
        loop=dataclasses.replace(loop, evaluate_data=evaluate_data, evaluate_every=every),
        mixture=dataclasses.replace(config.mixture, conversations=dataclasses.replace(group, paths=paths)),
    )


def _said_once(short: str, value: Any, long: str, field: Any) -> Any:
    if value and field and value != field:
        shown = [" ".join(said) if isinstance(said, tuple) else said for said in (value, field)]
        raise MossAudioError(f"{short} {shown[0]} and {long} {shown[1]} name different things: give one of them")
    return value or field


def settle(config: Any, out: AnyPath, *, begun: bool) -> None:
    """Writes a configuration, a dataclass, into a run's directory, compared first with that of a run that has begun.

    Raises MossAudioError, naming what differs, if that is another one.
    """
    path = to_path(out) / CONFIG_FILE
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if begun:
        then = read_json(path)
        before, after = _by_path(then), _by_path(now)
        problems = [
            f"{name} is {after.get(name)!r} and was {before.get(name)!r}"
            for name in sorted(before.keys() | after.keys())
            if not name.startswith(FREE_TO_CHANGE)
            and after.get(name) != before.get(name)
            # Else an option that is newer than the run, and off or at its default.
            and (name in before or (after[name] and after[name] != _default(config, name)))
        ]
        if problems:
            raise MossAudioError(
                f"{out} holds a run of another configuration: {'; '.join(problems)}; "
                "give the options it was begun with, or another --out"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(now, indent=2) + "\n")


def _default(config: Any, path: str) -> Any:
    """What the class of a configuration gives an option that nobody sets."""
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent, None)
    if not dataclasses.is_dataclass(config):
        return None
    return next((field.default for field in dataclasses.fields(config) if field.name == name), None)


def _by_path(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one by dotted path."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _by_path(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
