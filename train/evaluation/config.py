"""Options of an evaluation. Imports nothing heavy: `--help` needs these classes."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from moss_audio_jax.commands.options import MeshConfig, require, require_positive
from moss_audio_jax.commands.paths import PathArgument
from moss_audio_jax.sampling_config import Sampling
from train.data.config import SEEDS, ColumnsConfig, SceneConfig


@dataclass(frozen=True)
class AnswerConfig:
    """Options of generating answers."""

    batch_size: int = 8
    """Questions that are answered at once, rounded up to a multiple of the data-parallel devices."""
    max_new_tokens: int = 512
    """Maximum tokens of an answer. Longer answers are cut off and counted as unfinished."""
    time_markers: bool | None = None
    """Insert time markers between audio tokens. Default: the checkpoint's setting."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    """Sampling options. Default: greedy decoding, as measures should be taken."""
    choices: Literal["written", "likeliest"] = "written"
    """Multiple choice: the option that the model writes, or the one whose letter is the likeliest answer."""

    def __post_init__(self):
        require_positive(self, None, "batch_size", "max_new_tokens")


@dataclass(frozen=True)
class EvaluationConfig:
    """Questions of an evaluation, and how the model answers them."""

    data: tuple[PathArgument, ...] = ()
    """Manifests, shard directories, and data of other kinds (docs/data.md)."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    objectives: tuple[str, ...] = ()
    """Objectives to ask about their examples. Default: all that they have labels for."""
    default_prompt: str = ""
    """Prompt of a conversation that has audio and a blank prompt, or none."""
    scenes: int = 0
    """Number of sound scenes, made on the fly."""
    scene: Annotated[SceneConfig, tyro.conf.arg(name="scenes")] = field(default_factory=SceneConfig)
    benchmark: tuple[str, ...] = ()
    """NAME=FILE: question file of mmau, mmau_pro, mmar or mmsu."""
    audio_dir: PathArgument | None = None
    """Directory that audio paths of the benchmarks are relative to. Default: that of the question file."""
    limit: int | None = None
    """Use only the first examples of each manifest and the first questions of each benchmark: this many."""
    seed: int = 0
    """Seed of the scenes (not that of training), of questions about times, and of sampling."""
    answers: Annotated[AnswerConfig, tyro.conf.arg(name="")] = AnswerConfig()
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of weights and computation. Default: bfloat16, on the CPU float32."""
    verify: bool = False
    """First compare the weights with the checksums that they were written with."""
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        if self.objectives:
            from train.evaluation.questions import require_askable  # imports the readers of data

            require_askable(self.objectives)
        require(self, "", ("scenes",), lambda count: count >= 0, "0 or more")
        require(self, "", ("seed",), lambda seed: 0 <= seed < SEEDS, f"0 to {SEEDS - 1}")
        require_positive(self, "", "limit")
