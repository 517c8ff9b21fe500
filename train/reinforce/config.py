"""Options of post-training by reward. Imports nothing heavy: `--help` needs these classes."""

import dataclasses
from typing import Annotated, Literal, get_args

import tyro

from moss_audio_jax.commands.options import require, require_choice, require_positive
from moss_audio_jax.commands.paths import PathArgument
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sampling_config import Sampling
from train.config import RunConfig, said_once, with_paths
from train.data.config import AugmentConfig, SceneConfig
from train.data.mixture_config import MixtureConfig

Algorithm = Literal["dapo", "grpo", "gspo"]
_CLIPS: dict[str, tuple[float, float]] = {"dapo": (0.2, 0.28), "grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}  # the papers'


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """Questions with known answers, which are trained on: whatever `evaluate` can judge."""

    data: tuple[str, ...] = ()
    """Manifests, shard directories, and data of other kinds (docs/data.md)."""
    objectives: tuple[str, ...] = ()
    """Objectives to ask about their examples. Default: all that they have labels for."""
    benchmark: tuple[str, ...] = ()
    """NAME=FILE: question file of mmau, mmau_pro, mmar or mmsu."""
    audio_dir: PathArgument | None = None
    """Directory that audio paths of the question files are relative to. Default: that of the question file."""
    scenes: int = 0
    """Number of sound scenes, made on the fly from the run's seed."""
    scene: Annotated[SceneConfig, tyro.conf.arg(name="scenes")] = dataclasses.field(default_factory=SceneConfig)

    def __post_init__(self):
        require(self, "questions.", ("scenes",), lambda count: count >= 0, "0 or more")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Answers of a step, drawn from the present model."""

    prompts: int = 128
    """Questions of a step that are trained on, once those whose answers all have the same reward are dropped."""
    samples: int = 16
    """Answers to each question: its group."""
    max_new_tokens: int = 2048
    """Tokens of an answer at most. A prompt and an answer must fit into --data.tokens."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: Sampling(temperature=1.0, top_k=50)
    )
    """Sampling of the answers."""
    slots: int = 256
    """Answers in progress at once, which share the devices. Each takes keys and values of `length` tokens."""
    length: int | None = None
    """Tokens of a prompt and its answer at most. Default: --data.tokens. Questions that are too long are left out."""
    most_prompts: float = 3.0
    """Questions that a step may ask in all, as a multiple of `prompts`, to replace those that are dropped."""
    overlong: int = 512
    """Tokens before `max_new_tokens` in which the reward `overlong` falls from 0 to -1."""

    def __post_init__(self):
        require_positive(self, "rollout.", "prompts", "max_new_tokens", "slots", "length", "most_prompts", "overlong")
        require(self, "rollout.", ("samples",), lambda count: count >= 2, "2 or more, to compare answers")
        if self.sampling.temperature == 0:
            raise MossAudioError("--rollout.temperature must be above 0, not 0: equal answers teach nothing")
        if self.sampling.repetition_penalty != 1:
            raise MossAudioError(
                "--rollout.repetition-penalty must be 1, off, as the objective compares probabilities without a "
                f"penalty, not {self.sampling.repetition_penalty}"
            )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is maximised: the clipped policy objective of DAPO (arXiv 2503.14476), or a relative of it."""

    algorithm: Algorithm = "dapo"
    """dapo: mean over all tokens of the update. grpo (arXiv 2402.03300): mean over answers of the mean over their
    tokens. gspo (arXiv 2507.18071): that of grpo, with one ratio of probabilities for each answer."""
    clip_low: float | None = None
    """The ratio of new to old probability stops to count below 1 - this. Default: 0.2; of gspo 0.0003."""
    clip_high: float | None = None
    """The ratio stops to count above 1 + this. Default: 0.28 of dapo, 0.2 of grpo, 0.0004 of gspo."""
    rollout_cap: float = 2.0
    """Largest ratio of the trainer's to the rollout's probability of a token, which weighs its term. 0: no weight."""
    kl: float = 0.0
    """Weight of the KL divergence from the first model, which is then kept in memory. 0: off."""
    minibatches: int = 1
    """Updates from the answers of a step, each on its share of the questions."""

    def __post_init__(self):
        require_choice(self, "objective.", "algorithm", get_args(Algorithm))
        require_positive(self, "objective.", "minibatches")
        require(self, "objective.", ("clip_low",), lambda value: value is None or 0 < value < 1, "above 0 and below 1")
        require(self, "objective.", ("clip_high",), lambda value: value is None or value > 0, "above 0")
        require(self, "objective.", ("rollout_cap", "kl"), lambda value: value >= 0, "0 or more")

    @property
    def ratios(self) -> tuple[float, float]:
        """Lowest and highest ratio of new to old probability that counts."""
        low, high = _CLIPS[self.algorithm]
        low = low if self.clip_low is None else self.clip_low
        high = high if self.clip_high is None else self.clip_high
        return 1 - low, 1 + high


@dataclasses.dataclass(frozen=True)
class ReinforceConfig(RunConfig):
    """Configuration of a run that is trained by reward: that of any run, without its mixture of data.

    data.batch_size: packed sequences of a microbatch; an update has as many microbatches as its answers need.
    """

    mixture: tyro.conf.Suppress[MixtureConfig] = dataclasses.field(default_factory=MixtureConfig)
    augment: tyro.conf.Suppress[AugmentConfig] = dataclasses.field(default_factory=AugmentConfig)
    microbatches: tyro.conf.Suppress[int] = 1
    questions: QuestionsConfig = dataclasses.field(default_factory=QuestionsConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    rewards: tuple[str, ...] = ("correct=1",)
    """NAME=WEIGHT: rewards whose weighted sum an answer gets. NAME is one of docs/reinforce.md, or FILE.py:FUNCTION."""
    reward_seconds: float = 60.0
    """Seconds that one reward may take for the answers of a step."""
    objective: ObjectiveConfig = ObjectiveConfig()

    def __post_init__(self):
        super().__post_init__()
        require(self, "", ("reward_seconds",), lambda seconds: seconds > 0, "above 0")
        if self.loop.epochs is not None:
            raise MossAudioError("--epochs is for `run`: give --steps to `reinforce`, which asks questions without end")
        if self.objective.minibatches > self.rollout.prompts:
            raise MossAudioError(
                f"--objective.minibatches must be at most the {self.rollout.prompts} of --rollout.prompts, not "
                f"{self.objective.minibatches}"
            )
        length = self.rollout.length or self.data.tokens
        if not self.rollout.max_new_tokens < length <= self.data.tokens:
            raise MossAudioError(
                f"--data.tokens, or --rollout.length up to it, must hold a prompt and --rollout.max-new-tokens "
                f"{self.rollout.max_new_tokens}, not {length} of {self.data.tokens}: raise it"
            )

    @property
    def held_out_scenes(self) -> SceneConfig:
        return self.questions.scene


def with_question_paths(
    config: ReinforceConfig,
    init: str | None = None,
    data: tuple[str, ...] = (),
    eval_data: tuple[str, ...] = (),
    *,
    default: ReinforceConfig | None = None,
) -> ReinforceConfig:
    """Returns the configuration with the paths of `--init`, `--data` and `--eval-data`; see `with_paths`."""
    known = () if default is None else default.questions.data
    paths = said_once("--data", data, "--questions.data", config.questions.data, known)
    config = dataclasses.replace(config, questions=dataclasses.replace(config.questions, data=paths))
    return with_paths(config, init, (), eval_data, default=default)
