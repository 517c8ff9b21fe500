"""What a training run is told: dataclasses with a default for everything, and recipes, which are values of them.

Every field is an option of `python -m train run`. What changes the parameters that come out is written to the run's
`config.json`; `resume` says which fields may be others when it resumes.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import tyro

from moss_audio_jax.config import LoraConfig, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.int8 import int8_kernels
from moss_audio_jax.model import parameter_specs
from train.data.augment import AugmentConfig
from train.data.lanes import DataConfig
from train.data.mixture import Group, Source
from train.data.objectives import OBJECTIVES, check_shares
from train.data.scenes import SceneConfig, SceneExamples
from train.initialization import ModelSource, model_config
from train.optimizer import OptimizerConfig, is_frozen
from train.step import StepConfig

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Data sets that share a purpose."""

    share: float = 0.0
    """Of all examples, relative to the groups that have paths."""
    objectives: tuple[str, ...] = ()
    """What is asked where an example has the labels for it (`train/data/objectives.py` has them). A name may have a
    weight, as in `transcribe=2`; a bare one weighs 1. Without any, all weigh 1."""
    paths: tuple[str, ...] = ()
    """Manifests, and directories of shards."""
    weights: tuple[float, ...] = ()
    """How often each of the paths is drawn, relative to the others; by default the square root of its size."""
    begin: int = 0
    """The group takes part from this example of the run on."""
    end: int | None = None
    """And until this one."""

    def group(self, name: str, seed: int) -> Group | None:
        """The group, opened; None if it is given nothing."""
        from train.data.shards import open_examples

        if not self.paths:
            return None
        if self.weights and len(self.weights) != len(self.paths):
            raise MossAudioError(
                f"mixture.{name}.weights must be as many as its {len(self.paths)} paths, found {len(self.weights)}"
            )
        shares, weights = self.shares(name), self.weights or (None,) * len(self.paths)
        # Groups of one's own may ask different things about one data set.
        prefix = "" if name in _OWN_GROUPS else f"{name}: "
        sources = tuple(
            Source(prefix + path, open_examples(path), shares, weight)
            for path, weight in zip(self.paths, weights, strict=True)
        )
        return Group(name, self.share, sources, self.begin, self.end)

    def shares(self, name: str) -> dict[str, float]:
        """The weight of each objective. Raises MossAudioError that names the option of the group `name`."""
        option, shares = f"mixture.{name}.objectives", {}
        for entry in self.objectives:
            objective, equals, weight = entry.partition("=")
            if objective in shares:
                raise MossAudioError(f"{option} names {objective} twice: give it once, with one weight")
            try:
                shares[objective] = float(weight) if equals else 1.0
            except ValueError as error:
                raise MossAudioError(
                    f"{option} must be names, or names with weights such as transcribe=2, found {entry!r}"
                ) from error
        try:
            check_shares(shares or dict.fromkeys(OBJECTIVES, 1.0))
        except MossAudioError as error:
            raise MossAudioError(f"{option}: {error}") from error
        return shares or dict.fromkeys(OBJECTIVES, 1.0)


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
    """MOSS-Audio's published mixture, sound scenes, and groups of any other names."""

    speech: GroupConfig = GroupConfig(0.3, ("transcribe", "transcribe_words", "transcribe_sentences"))
    captions: GroupConfig = GroupConfig(0.4, ("caption", "events", "time_qa", "conversation"))
    text: GroupConfig = GroupConfig(0.3, ("plain_text",))
    conversations: GroupConfig = GroupConfig(1.0, ("conversation", "labels"))
    """To fine-tune on: `--data` is short for its paths. Of a clip without a conversation its labels are asked."""
    scenes: SceneGroupConfig = SceneGroupConfig()
    easy_scenes: SceneGroupConfig = SceneGroupConfig()
    """Apart from the others, for a curriculum."""
    named: Annotated[dict[str, GroupConfig], tyro.conf.arg(name="")] = dataclasses.field(default_factory=dict)
    """Groups of other names, each with the options of `speech`; see `with_named_groups`."""

    def manifest_groups(self) -> dict[str, GroupConfig]:
        """The groups of data sets by name."""
        return {name: group for name, group in self._by_name().items() if isinstance(group, GroupConfig)}

    def groups(self, seed: int) -> list[Group]:
        """The groups that are given something, opened. seed: of the scenes."""
        for name, group in self.named.items():
            _require_complete(name, group)
        opened = [group.group(name, seed) for name, group in self._by_name().items()]
        used = [group for group in opened if group is not None]
        if not used:
            options = ", ".join(f"mixture.{name}.paths" for name in self.manifest_groups())
            raise MossAudioError(f"there is nothing to train on: give one of {options}, or mixture.scenes.share")
        return used

    def _by_name(self) -> dict[str, "GroupConfig | SceneGroupConfig"]:
        """All groups. The order of examples depends on theirs, which is therefore not that of the command line."""
        return {name: getattr(self, name) for name in _OWN_GROUPS} | dict(sorted(self.named.items()))


_OWN_GROUPS = tuple(field.name for field in dataclasses.fields(MixtureConfig) if field.name != "named")
_GROUP_OPTION = re.compile(r"--mixture\.([^.=]+)\.")


def with_named_groups(config: "RunConfig", arguments: Iterable[str]) -> "RunConfig":
    """The configuration with an empty group for each new name in arguments such as `--mixture.NAME.paths`."""
    found = (match[1].replace("-", "_") for match in map(_GROUP_OPTION.match, arguments) if match)
    named = {name: GroupConfig() for name in found if name not in (*_OWN_GROUPS, "named")}
    mixture = dataclasses.replace(config.mixture, named=named | config.mixture.named)
    return dataclasses.replace(config, mixture=mixture)


def _require_complete(name: str, group: GroupConfig) -> None:
    """Of a group with a name of the user's, where nothing has a default."""
    if not re.fullmatch("[a-z0-9_]+", name):
        raise MossAudioError(f"mixture.{name} must be named with a-z, 0-9 and _, as its metrics are: rename it")
    missing = [option for option in ("paths", "share") if not getattr(group, option)]
    if missing:
        raise MossAudioError(
            f"mixture.{name} is a new group without mixture.{name}.{missing[0]}: give it, or name one of the groups "
            f"{', '.join(_OWN_GROUPS)}"
        )


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
    epochs: int | None = None
    """Stop when each example was read this many times. The schedule then spans these epochs, and
    optimizer.total-steps is not used. With several data sets, those of larger shares are read more often."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step, a SIGTERM and Ctrl-C make one too."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints, beside those by steps; several processes look at the time every tenth step."""
    stuck_after: float | None = 1800.0
    """End the process with code 75, to be started again, when no step was finished for this many seconds. The start,
    the first step, an evaluation and a checkpoint may take four times as long. None waits for ever."""
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
    """Record a trace of this many steps in profile/; 0 records none. A file profile_now in the run's directory, or
    SIGUSR1 to the first process, has the next steps recorded, 3 if this is 0."""
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
    evaluate_batch: int = 16
    """Questions answered at once, and the most sequences in a batch of eval/loss (which has no more than a microbatch);
    rounded up to what the devices share evenly. Lower it if an evaluation runs out of device memory."""
    best_metric: str | None = None
    """Keep the checkpoint whose evaluation is best by this metric: loss, wer, cer, aas, f1, accuracy or one of
    `train/running/best.py`, over all questions. Each evaluation then writes a checkpoint; a new metric starts over."""
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
            "epochs",
            "checkpoint_every",
            "stuck_after",
            "keep_last",
            "keep_every",
            "max_skipped_in_a_row",
            "log_every",
            "evaluate_every",
            "evaluate_count",
            "evaluate_tokens",
            "evaluate_batch",
            "patience",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MossAudioError(f"{name} must be 1 or more, not {value}")
        if self.checkpoint_minutes is not None and self.checkpoint_minutes <= 0:
            raise MossAudioError(f"checkpoint_minutes must be above 0, not {self.checkpoint_minutes}")
        for name, needed in (("best_metric", "evaluate_every"), ("patience", "best_metric")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise MossAudioError(f"{name} needs {needed}: give both, or leave {name} out")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All of a run. seed: of the data's order, of random parameters and of dropout.

    recipe: whose defaults it was made from.
    lora: trains an adapter of LoRA on `model.checkpoint`, which is frozen in the compute dtype, instead of the model.
    """

    data: DataConfig
    optimizer: OptimizerConfig
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = LoopConfig()
    model: ModelSource = dataclasses.field(default_factory=ModelSource)
    mixture: MixtureConfig = MixtureConfig()
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    lora: tyro.conf.AvoidSubcommands[LoraConfig | None] = None
    mesh: MeshConfig = MeshConfig()
    microbatches: int = 1
    seed: int = 0
    recipe: tyro.conf.Suppress[str | None] = None

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

    def model_config(self) -> MossAudioConfig:
        """Of the model that is trained, with its adapters if it has any."""
        return dataclasses.replace(model_config(self.model), lora=self.lora)

    def require_no_random_frozen(self, model: MossAudioConfig) -> None:
        """Raises MossAudioError if a frozen parameter is given by no checkpoint, unless that is allowed."""
        if self.lora is not None and self.model.checkpoint is None:
            raise MossAudioError("lora adapts a checkpoint: name it with --init or --model.checkpoint")
        self.model.require_given(self.frozen_dtypes(parameter_specs(model)))

    def frozen_dtypes(self, paths: Iterable[str]) -> dict[str, str]:
        """The type of each of these parameters that is frozen: masters are float32, these need no more to compute."""
        frozen = [path for path in paths if is_frozen(path, self.optimizer.freeze, self.lora)]
        return dict.fromkeys(frozen, self.step.compute_dtype) | dict.fromkeys(int8_kernels(frozen), "int8")

    @property
    def last_step(self) -> int | None:
        """The step that the run ends with; None if it ends with its data."""
        return self.loop.steps or (self.optimizer.total_steps if self.loop.epochs is None else None)


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
        data=DataConfig(batch_size=16, tokens=208, chunks=2, open_bins=2),
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
RECIPES = {name: dataclasses.replace(recipe, recipe=name) for name, recipe in RECIPES.items()}
RecipeName = Literal["pretrain_stage1", "pretrain_stage2", "finetune", "finetune_lora", "time_events"]


def with_paths(
    config: RunConfig,
    init: str | None = None,
    data: tuple[str, ...] = (),
    eval_data: tuple[str, ...] = (),
    *,
    default: RunConfig | None = None,
) -> RunConfig:
    """The configuration with what `--init`, `--data` and `--eval-data` name, short for three of its fields.

    default: the configuration of a run that is resumed, whose fields give way to what they name.
    Where there is data to evaluate on and nothing says how often, that is at each checkpoint. Raises MossAudioError if
    a field already holds something else.
    """
    model, loop, group = config.model, config.loop, config.mixture.conversations
    known: Any = (None, (), ())
    if default is not None:
        known = (default.model.checkpoint, default.mixture.conversations.paths, default.loop.evaluate_data)
    checkpoint = _said_once("--init", init, "--model.checkpoint", model.checkpoint, known[0])
    paths = _said_once("--data", data, "--mixture.conversations.paths", group.paths, known[1])
    evaluate_data = _said_once("--eval-data", eval_data, "--evaluate-data", loop.evaluate_data, known[2])
    every = loop.checkpoint_every if eval_data and loop.evaluate_every is None else loop.evaluate_every
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, checkpoint=checkpoint),
        loop=dataclasses.replace(loop, evaluate_data=evaluate_data, evaluate_every=every),
        mixture=dataclasses.replace(config.mixture, conversations=dataclasses.replace(group, paths=paths)),
    )


def _said_once(short: str, value: Any, long: str, field: Any, default: Any) -> Any:
    if value and field and value != field and field != default:
        shown = [" ".join(said) if isinstance(said, tuple) else said for said in (value, field)]
        raise MossAudioError(f"{short} {shown[0]} and {long} {shown[1]} name different things: give one of them")
    return value or field
