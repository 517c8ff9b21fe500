"""Options of a run: dataclasses with a default for everything. Recipes are values of them.

Every field is an option of `moss-audio-train`; its help is the docstring under the field. `config.json` of a run holds
all fields; `running/resume.py` says which of them may change when the run resumes.

Imports nothing heavy: `--help` needs these classes.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, get_args

import tyro

from moss_audio_jax.commands.options import MeshConfig, option, require, require_choice, require_positive
from moss_audio_jax.config import PRESETS, LoraConfig, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from train.data.config import AugmentConfig, ColumnsConfig, DataConfig, SceneConfig
from train.data.mixture_config import MixtureConfig

Schedule = Literal["cosine", "wsd"]
OptimizerName = Literal["adamw", "adafactor", "muon"]
Remat = Literal["none", "dots", "attention", "full", "offload"]
ComputeDtype = Literal["bfloat16", "float32"]

LEARNED = "learned"  # --model.tokenizer: make one from the first texts of the mixture
# Option of ModelSource -> prefixes of the paths of the parameters that it gives.
GIVES: dict[str, tuple[str, ...]] = {
    "checkpoint": ("",),
    "encoder": ("audio_encoder.",),
    "language_model": ("language_model.", "lm_head."),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer with decoupled weight decay, a learning-rate schedule and clipping by the global norm."""

    name: OptimizerName = "adamw"
    """adamw; adafactor: no first moment and a factored second moment, which takes almost no memory; updates are clipped
    to an RMS of 1 and not scaled by the parameters. muon: Newton-Schulz orthogonalized momentum for the kernels of the
    layers, scaled to AdamW's usual RMS of 0.2, so that AdamW's rates and decay suit it; AdamW for embeddings, head,
    convolutions, LoRA adapters, norms and biases. muon keeps one moment of a kernel instead of two and communicates
    more on a mesh."""
    learning_rate: float = 1e-4
    """Peak of the schedule."""
    encoder_rate: float = 1.0
    """Factor of the learning rate for the audio encoder."""
    adapter_rate: float = 1.0
    """Factor of the learning rate for the adapter and the DeepStack mergers."""
    language_model_rate: float = 1.0
    """Factor of the learning rate for the language model and its head."""
    freeze: tuple[str, ...] = ()
    """Globs over paths of parameters to freeze, such as `audio_encoder.*` or `*.embed_tokens.embedding`."""
    schedule: Schedule = "cosine"
    """Both rise linearly in the warm-up. cosine: falls from there to the end. wsd (warm-up, stable, decay): stays at
    the peak and falls linearly in the last decay_steps; it can be prolonged until the decay begins."""
    total_steps: int = 10_000
    """Length of the schedule, in steps. The run ends there unless --steps or --epochs says otherwise."""
    warmup_steps: int = 100
    """Steps of the linear warm-up."""
    decay_steps: int = 1_000
    """Steps of the linear decay at the end of wsd."""
    final_fraction: float = 0.1
    """Learning rate at the end of the schedule and after it, as a fraction of the peak."""
    b1: float = 0.9
    """AdamW: decay of the first moment."""
    b2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the denominator of the update."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate. Norm scales and biases do not decay."""
    clip_norm: float = 1.0
    """Scale gradients down to this global norm, taken over all trainable parameters."""
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment. bfloat16 saves 2 bytes a parameter; the second moment is always float32."""
    muon_momentum: float = 0.95
    """Muon: Nesterov momentum; b1 and b2 are AdamW's."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the trainable parameters in float32 (4 bytes a parameter), which
    evaluations while training use and RUN/ema names. After each accepted step: decay * average + (1 - decay) *
    parameters, with a decay of at most (1 + steps) / (10 + steps), so that the first parameters soon fade. 0: off."""

    def __post_init__(self):
        require_choice(self, "optimizer.", "name", get_args(OptimizerName))
        require_choice(self, "optimizer.", "schedule", get_args(Schedule))
        require_choice(self, "optimizer.", "first_moment_dtype", ("float32", "bfloat16"))
        falling = self.decay_steps if self.schedule == "wsd" else 1
        if min(self.warmup_steps, falling) < 0 or self.warmup_steps + falling > self.total_steps:
            raise MossAudioError(
                f"--optimizer.total-steps must hold the warm-up of {self.warmup_steps} steps and a decay of {falling}, "
                f"not {self.total_steps}: make the schedule longer"
            )
        require(self, "optimizer.", ("learning_rate", "clip_norm", "eps"), lambda value: value > 0, "above 0")
        factors = ("encoder_rate", "adapter_rate", "language_model_rate", "weight_decay", "final_fraction")
        require(self, "optimizer.", factors, lambda value: value >= 0, "0 or more")
        decays = ("ema_decay", "muon_momentum")
        require(self, "optimizer.", decays, lambda value: 0 <= value < 1, "0 or more and below 1")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Computation of a training step."""

    compute_dtype: ComputeDtype = "bfloat16"
    """Dtype of the forward and backward pass. Master parameters are always float32."""
    remat: Remat = "full"
    """Activations that the backward pass recomputes, to save memory. none: nothing; dots: all but the weight matmuls;
    attention: all but what splash attention keeps; full: everything; offload: everything, with the inputs of the layers
    in host memory."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss. 0: off."""
    loss_chunk: int = 512
    """Tokens of a block of the loss. The logits of one block are in memory at a time."""
    audio_label_weight: float = 0.0
    """Weight of an auxiliary cross-entropy at audio tokens that predicts the event label, or a digit of the time, from
    the adapter output and from the hidden states after half of the language model's layers. Speeds up training from
    scratch. 0: off. The metrics audio_label_loss and audio_label_accuracy are those of the hidden states."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the gradients that are kept and summed over microbatches, after they were summed over devices. bfloat16
    saves 2 bytes a trainable parameter and rounds at every microbatch."""
    reduce_dtype: ComputeDtype = "bfloat16"
    """Dtype of the sums of gradients over devices where the compute dtype is bfloat16: each device's gradient is that
    of the bfloat16 copies, rounded before it is sent. float32 sends twice the bytes and rounds nothing. The gradient of
    the head is always summed in float32."""
    encoder_dropout: bool = True
    """Dropout in the audio encoder, at the rates of the model's configuration. Off if the whole encoder is frozen."""
    spike_sigma: float = 6.0
    """Skip a step whose loss or gradient norm is this many standard deviations above its mean. 0: skip none."""
    spike_window: int = 128
    """Steps of that mean. No step is a spike before half of them. The mean restarts where the mixture enters a new
    phase."""
    spike_patience: int = 10
    """Spikes in a row after which the next one is accepted as a lasting rise, and the mean restarts. Must be below
    --max-skipped-in-a-row, or the run ends first. A step that is not finite is never accepted, and resets this
    count."""

    def __post_init__(self):
        for name in ("compute_dtype", "gradient_dtype", "reduce_dtype"):
            require_choice(self, "step.", name, get_args(ComputeDtype))
        require_choice(self, "step.", "remat", get_args(Remat))
        for name, least in (("loss_chunk", 1), ("spike_window", 2), ("spike_patience", 1)):
            require(self, "step.", (name,), lambda value, least=least: value >= least, f"{least} or more")
        weights = ("z_loss", "audio_label_weight", "spike_sigma")
        require(self, "step.", weights, lambda value: value >= 0, "0 or more")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Source of the first parameters. Parameters that no checkpoint gives are random."""

    checkpoint: str | None = None
    """MOSS-Audio directory (released, Orbax or a training run), or OWNER/NAME on the Hugging Face hub, that gives
    configuration, parameters and tokenizer."""
    preset: str = "4b"
    """Size of the model if there is no checkpoint: 4b, 8b, small, deep or tiny."""
    encoder: str | None = None
    """MOSS-Audio checkpoint that gives the audio encoder, without adapter and DeepStack mergers."""
    language_model: str | None = None
    """MOSS-Audio checkpoint or stock Qwen3 weights that give the language model and its head."""
    tokenizer: str | None = None
    """Directory of tokenizer files. Default: those of the checkpoint, else of the language model. `learned` makes a
    tokenizer for a small model: bytes, and merges from the first texts of the mixture."""
    time_markers: bool | None = None
    """Insert time markers between audio tokens. Default: the setting of the checkpoint or the preset."""
    deepstack: int | None = None
    """Number of encoder taps of the preset that reach the language model. 0 trains a model without DeepStack."""
    allow_random_frozen: bool = False
    """Allow frozen parameters that no checkpoint gives: they are random and stay so."""
    verify: bool = False
    """First compare the checkpoints' weights with the checksums that they were written with."""

    def __post_init__(self):
        require_choice(self, "model.", "preset", PRESETS)
        if self.deepstack is None:
            return
        if self.checkpoint is not None:
            raise MossAudioError(
                f"--model.deepstack is for a model of a preset: leave it out, as {self.checkpoint} has its own taps"
            )
        taps = MossAudioConfig.preset(self.preset).num_deepstack
        within = f"0 to {taps}, the taps of {self.preset}"
        require(self, "model.", ("deepstack",), lambda value: 0 <= value <= taps, within)

    @property
    def tokenizer_source(self) -> str | None:
        """Directory of the tokenizer, or `learned`; None if no option names any."""
        return self.tokenizer or self.checkpoint or self.language_model

    def require_given(self, frozen: Iterable[str]) -> None:
        """Raises MossAudioError if no checkpoint gives one of these parameters, unless that is allowed."""
        given = [prefix for name, prefixes in GIVES.items() if getattr(self, name) for prefix in prefixes]
        random = [path for path in frozen if not path.startswith(tuple(given))]
        if not random or self.allow_random_frozen:
            return
        parts = dict.fromkeys(path.partition(".")[0] for path in random)
        options = [
            option(f"model.{name}")
            for name, prefixes in GIVES.items()
            if any(f"{part}.".startswith(prefixes) for part in parts)
        ]
        raise MossAudioError(
            f"the frozen parameters of {', '.join(parts)} would stay random, as no checkpoint gives them: name one by "
            f"{', '.join(options)}, or give --model.allow-random-frozen to train so"
        )


def model_config(source: ModelSource) -> MossAudioConfig:
    """Returns the configuration of the checkpoint or the preset, with what other options of the source change in it."""
    from moss_audio_jax.weights.locate import locate

    if source.checkpoint is None:
        config = MossAudioConfig.preset(source.preset)
    else:
        checkpoint = locate(source.checkpoint, weights=False)
        checkpoint.layout()  # raises an error that says what the directory lacks
        config = MossAudioConfig.from_hf(checkpoint.files)
    if source.deepstack is not None:
        config = dataclasses.replace(config, deepstack_num_inject_layers=source.deepstack)
    if source.time_markers is not None:
        processor = dataclasses.replace(config.processor, enable_time_marker=source.time_markers)
        config = dataclasses.replace(config, processor=processor)
    return config


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length of a run, its checkpoints and its reports."""

    steps: int | None = None
    """Stop after this step. Default: the end of the optimizer's schedule."""
    epochs: int | None = None
    """Stop when each example was read this many times. The schedule then spans these epochs, and
    --optimizer.total-steps is not used. Data sets of larger shares are read more often."""
    checkpoint_every: int = 500
    """Steps between checkpoints. The last step, SIGTERM and Ctrl-C also save one."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints, in addition to those by steps. Several processes check the time every tenth step."""
    stuck_after: float | None = 1800.0
    """Exit with code 75 (start again) if no step was finished for this many seconds. The start, the first step, an
    evaluation and a checkpoint may take four times as long. None: never."""
    keep_last: int = 3
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also keep the checkpoints at multiples of this many steps."""
    max_skipped_in_a_row: int = 20
    """Stop the run after this many skipped steps in a row."""
    log_every: int = 10
    """Steps between lines of progress. metrics.jsonl has a line for every step."""
    wandb: str | None = None
    """Weights & Biases project to report to as well. Needs `pip install 'moss-audio-jax[wandb]'`."""
    profile_first: int = 10
    """First step of the profile."""
    profile_steps: int = 0
    """Record a trace of this many steps in profile/. 0: none. A file profile_now in the run's directory, or SIGUSR1 to
    the first process, records the next steps too: this many, or 3 if this is 0."""
    best_metric: str | None = None
    """Keep the checkpoint whose evaluation is best by this metric over all questions: loss, wer, cer, aas, f1, accuracy
    or another one of `train/running/best.py`. Each evaluation then saves a checkpoint. A new metric starts over."""
    patience: int | None = None
    """Stop the run after this many evaluations in a row that were not better by that metric."""
    check_data: bool = False
    """Check all manifests first, as `moss-audio-train check` does, and begin only if every example can be used. Audio
    on gs:// is not checked."""
    workers: int = 0
    """Worker processes that decode and pack. 0: none, the run's own process does."""

    def __post_init__(self):
        counts = ("steps", "epochs", "checkpoint_every", "keep_last", "keep_every", "max_skipped_in_a_row", "log_every")
        require_positive(self, "", *counts, "stuck_after", "patience")
        require(self, "", ("checkpoint_minutes",), lambda value: value > 0, "above 0")
        if self.patience is not None and self.best_metric is None:
            raise MossAudioError("--patience needs --best-metric: give both, or leave --patience out")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Evaluation while training, on data that is not trained on."""

    every: int | None = None
    """Steps between evaluations. Default: none."""
    data: tuple[str, ...] = ()
    """Manifests, shard directories and data of other kinds to evaluate on. Default: sound scenes that training does not
    use."""
    objectives: tuple[str, ...] = ()
    """Objectives to ask about their examples. Default: all that they have labels for."""
    count: int = 64
    """Examples of each manifest or directory to evaluate on."""
    max_new_tokens: int = 256
    """Maximum tokens of an answer."""
    batch_size: int = 16
    """Questions per batch, and the most sequences in a batch of eval/loss (never more than a microbatch). Rounded up to
    a multiple of the data-parallel devices. Lower it if an evaluation runs out of device memory."""
    show_samples: int = 2
    """Answers of an evaluation to show and log, with a picture of their timelines."""

    def __post_init__(self):
        require_positive(self, "validation.", "every", "count", "max_new_tokens", "batch_size")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Configuration of a run.

    lora: trains a LoRA adapter of `model.checkpoint`, which is frozen in the compute dtype, instead of the model.
    recipe: name or file of the recipe that gave the defaults.
    """

    data: DataConfig
    optimizer: OptimizerConfig
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = LoopConfig()
    validation: ValidationConfig = ValidationConfig()
    model: ModelSource = dataclasses.field(default_factory=ModelSource)
    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    columns: ColumnsConfig = dataclasses.field(default_factory=ColumnsConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    step: StepConfig = StepConfig()
    lora: tyro.conf.AvoidSubcommands[LoraConfig | None] = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    microbatches: int = 1
    """Microbatches of a step, whose gradients are summed. Must divide the batch."""
    seed: int = 0
    """Seed of the order of the data, of random parameters and of dropout."""
    recipe: tyro.conf.Suppress[str | None] = None

    def __post_init__(self):
        if self.microbatches < 1 or self.data.batch_size % self.microbatches:
            raise MossAudioError(
                f"--microbatches must divide the batch of {self.data.batch_size} sequences, not {self.microbatches}"
            )
        others = (self.model.encoder, self.model.language_model)
        if self.lora is not None and others != (None, None):
            raise MossAudioError(
                "--lora adapts one checkpoint: leave --model.encoder and --model.language-model out, and put the parts "
                "together in a run without LoRA first"
            )

    def with_named_groups(self, arguments: Iterable[str]) -> "RunConfig":
        """Adds an empty group to the mixture for each new name in arguments such as `--mixture.NAME.paths`."""
        return dataclasses.replace(self, mixture=self.mixture.with_named_groups(arguments))

    def model_config(self) -> MossAudioConfig:
        """Returns the configuration of the trained model, with its LoRA adapters if it has any."""
        return dataclasses.replace(model_config(self.model), lora=self.lora)

    @property
    def held_out_scenes(self) -> SceneConfig:
        """Scenes that the run is evaluated on if it has no other data for that."""
        return self.mixture.with_clips(self.mixture.scenes.scenes)

    @property
    def last_step(self) -> int | None:
        """Last step of the run; None if it ends with its data."""
        return self.loop.steps or (self.optimizer.total_steps if self.loop.epochs is None else None)


Config = TypeVar("Config", bound=RunConfig)


def with_paths(
    config: Config,
    init: str | None = None,
    data: tuple[str, ...] = (),
    eval_data: tuple[str, ...] = (),
    *,
    default: RunConfig | None = None,
) -> Config:
    """Returns the configuration with the paths of `--init`, `--data` and `--eval-data`, short for three of its fields.

    default: configuration of a run that is resumed. Its fields give way to the paths.
    `--eval-data` evaluates at each checkpoint unless `--validation.every` is given. Raises MossAudioError if a field
    has another value.
    """
    model, validation, group = config.model, config.validation, config.mixture.conversations
    known: Any = (None, (), ())
    if default is not None:
        known = (default.model.checkpoint, default.mixture.conversations.paths, default.validation.data)
    checkpoint = said_once("--init", init, "--model.checkpoint", model.checkpoint, known[0])
    paths = said_once("--data", data, "--mixture.conversations.paths", group.paths, known[1])
    held_out = said_once("--eval-data", eval_data, "--validation.data", validation.data, known[2])
    every = config.loop.checkpoint_every if eval_data and validation.every is None else validation.every
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, checkpoint=checkpoint),
        validation=dataclasses.replace(validation, data=held_out, every=every),
        mixture=dataclasses.replace(config.mixture, conversations=dataclasses.replace(group, paths=paths)),
    )


def said_once(short: str, value: Any, long: str, field: Any, default: Any) -> Any:
    """Returns the value of an option or of the field that it is short for; raises MossAudioError if they differ."""
    if value and field and value != field and field != default:
        shown = [" ".join(said) if isinstance(said, tuple) else said for said in (value, field)]
        raise MossAudioError(f"{short} {shown[0]} and {long} {shown[1]} name different things: give one of them")
    return value or field
