"""Calibration of `estimate`: published measurements of similar models, and the estimates for them.

All are dense decoders trained in bfloat16 with parameters sharded over all chips. Rates are in tokens, since sources
count FLOPs differently; a published MFU, with attention counted whole, is converted to tokens. None is of this program:
the range shows how far such estimates are from measurements, no more.
"""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np

from moss_audio_jax.config import LanguageConfig, MossAudioConfig
from train.planning.chips import V5E, V5P, V6E, Chip
from train.planning.estimate import Slice, speed
from train.planning.flops import Content, forward_flops
from train.planning.hlo import Collective

_CONFIGS = "https://github.com/AI-Hypercomputer/maxtext/tree/main/MaxText/configs"
_GEMMA = "https://github.com/AI-Hypercomputer/maxtext/blob/main/getting_started/Run_Gemma.md"
_RECIPES = "https://github.com/AI-Hypercomputer/tpu-recipes/tree/main/training/trillium"
_WIKI = "https://github.com/vlasenkoalexey/tpu_performance_autoresearch_wiki"

LLAMA3_8B = LanguageConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
QWEN3_8B = LanguageConfig(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
MISTRAL_7B = dataclasses.replace(LLAMA3_8B, vocab_size=32000)
GEMMA_7B = LanguageConfig(
    vocab_size=256128,
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
)
# MaxText's default model with global_parameter_scale 16 and 32.
MAXTEXT_16B = LanguageConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=28672,
    num_hidden_layers=32,
    num_attention_heads=64,
    num_key_value_heads=64,
    head_dim=128,
)
MAXTEXT_32B = dataclasses.replace(MAXTEXT_16B, hidden_size=8192)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A published run.

    tokens: per sequence. sequences: per chip and step. recomputed: matmuls of a layer that are recomputed; attention
        always is. tensor: chips that a layer is sharded over.
    tokens_per_second: per chip; or else mfu, with attention counted whole.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    model: LanguageConfig
    tokens: int
    sequences: int
    recomputed: Literal["none", "gate and up", "all but down"]
    source: str
    tensor: int = 1
    tokens_per_second: float | None = None
    mfu: float | None = None

    @property
    def columns(self) -> float:
        """Parameters of a layer's matmuls divided by the hidden size."""
        heads = self.model.num_attention_heads + self.model.num_key_value_heads
        return 2 * heads * self.model.head_dim + 3 * self.model.intermediate_size

    @property
    def matmul_parameters(self) -> float:
        """Parameters of the matmuls of all layers and the head."""
        model = self.model
        return model.hidden_size * (model.num_hidden_layers * self.columns + model.vocab_size)

    @property
    def measured(self) -> float:
        """Measured tokens per second and chip."""
        if self.tokens_per_second is not None:
            return self.tokens_per_second
        assert self.mfu is not None
        queries = self.model.num_attention_heads * self.model.head_dim
        attention = 12 * self.model.num_hidden_layers * queries * self.tokens
        return self.mfu * self.chip.peak_flops / (6 * self.matmul_parameters + attention)

    @property
    def estimated(self) -> float:
        """Estimated tokens per second and chip.

        Parameters are all-gathered for the forward and the backward pass, gradients reduce-scattered, in bfloat16.
        """
        rows = self.sequences * self.tokens
        content = Content(rows, chunks=0, attention_pairs=rows * self.tokens)
        config = MossAudioConfig(language_config=self.model)
        forward = forward_flops(config, content)
        twice = {"none": 0, "gate and up": 2 * self.model.intermediate_size}
        columns = twice.get(self.recomputed, self.columns - self.model.intermediate_size)
        again = {"llm_matmuls": columns / self.columns, "llm_attention": 1.0}
        model_flops = {part: 3 * flops for part, flops in forward.items()}  # everything is trained
        executed = {part: (3 + again.get(part, 0.0)) * flops for part, flops in forward.items()}
        one_chip = Slice(self.chip, self.shape, tuple(np.ndindex(self.shape)), 1, self.chip.cores)
        exchanges = self._exchanges(len(one_chip.coordinates))
        report = speed(one_chip, exchanges, model_flops=model_flops, executed_flops=executed, moved={})
        return rows / report["estimated_step_seconds"]

    def _exchanges(self, chips: int) -> list[Collective]:
        """Collectives of a step: three times the parameters of a chip's tensor-parallel part; with tensor parallelism
        also the activations after attention and after the MLP, forward and backward."""
        model, rows = self.model, self.sequences * self.tokens
        everyone = (tuple(range(chips)),)
        gathered = 2.0 * (self.matmul_parameters + model.hidden_size * model.vocab_size) / self.tensor
        found = [Collective("all-gather", "", (), gathered, chips // self.tensor, times=3, groups=everyone)]
        if self.tensor > 1:
            payload, neighbours = 2.0 * self.tensor * rows * model.hidden_size, (tuple(range(self.tensor)),)
            times = 4 * model.num_hidden_layers
            found.append(Collective("all-reduce", "", (), payload, self.tensor, times, groups=neighbours))
        return found

    @property
    def ratio(self) -> float:
        return self.measured / self.estimated


# MaxText's recipes for v6e offload layer inputs and the results of attention's matmuls to host memory; its "minimal"
# policy saves the results of all matmuls, "full" saves none, as Flax's nothing_saveable. Gemma's length and policy are
# from the command beside its table, its batch is assumed. Llama's batch on 16x16 is from MaxText's configuration of
# this name.
MEASUREMENTS = (
    Measurement(
        "Llama 3.1 8B, MaxText",
        V6E,
        (2, 4),
        LLAMA3_8B,
        8192,
        3,
        "gate and up",
        f"{_RECIPES}/Llama3.1-8B-MaxText/v6e-8",
        tokens_per_second=7139,
    ),
    Measurement(
        "Llama 3.1 8B, MaxText",
        V6E,
        (16, 16),
        LLAMA3_8B,
        8192,
        4,
        "gate and up",
        "https://maxtext.readthedocs.io/en/latest/reference/models/tiering.html",
        tokens_per_second=7207,
    ),
    Measurement(
        "Mistral 7B, MaxText",
        V6E,
        (2, 4),
        MISTRAL_7B,
        8192,
        6,
        "gate and up",
        f"{_RECIPES}/Mistral-7B-MaxText",
        tokens_per_second=7777,
    ),
    Measurement("Qwen3 8B, MaxText", V6E, (2, 4), QWEN3_8B, 8192, 3, "gate and up", _WIKI, tokens_per_second=6883),
    Measurement("Llama 3 8B, Flax NNX", V6E, (2, 4), LLAMA3_8B, 8192, 4, "all but down", _WIKI, tokens_per_second=7700),
    Measurement("Gemma 7B, MaxText", V5E, (16, 16), GEMMA_7B, 8192, 2, "none", _GEMMA, mfu=0.5770),
    Measurement("16B, MaxText", V5E, (16, 16), MAXTEXT_16B, 2048, 6, "all but down", f"{_CONFIGS}/v5e", mfu=0.6110),
    Measurement("Gemma 7B, MaxText", V5P, (4, 4, 4), GEMMA_7B, 8192, 2, "none", _GEMMA, mfu=0.6016),
    Measurement("32B, MaxText", V5P, (4, 4, 4), MAXTEXT_32B, 2048, 7, "none", f"{_CONFIGS}/v5p", tensor=4, mfu=0.7147),
)


@functools.cache
def measured_over_estimated(chip: Chip) -> tuple[float, float]:
    """Returns the lowest and highest ratio of measured to estimated speed on this chip, or on all if it has none."""
    ratios = [run.ratio for run in MEASUREMENTS if run.chip == chip] or [run.ratio for run in MEASUREMENTS]
    return min(ratios), max(ratios)


def calibrated(chip: Chip, mfu: float) -> dict[str, Any]:
    """Returns the fields of a report that scale an estimated MFU by the measured ratios."""
    least, most = measured_over_estimated(chip)
    return {"measured_over_estimated": [least, most], "calibrated_mfu": [least * mfu, most * mfu]}
