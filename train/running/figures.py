"""Figures of a run's data in metrics.jsonl, of a step and of the run so far, from sums over all hosts."""

from collections.abc import Iterable, Mapping
from typing import Any

from moss_audio_jax.config import MossAudioConfig
from train.data import DataConfig, ExampleOrder
from train.data.lanes import COUNTS
from train.data.pipeline import total_counts
from train.planning.flops import Content, step_flops

SECONDS_PER_HOUR = 3600


class DataFigures:
    """Computes figures from the sums of each batch in turn (`TrainingData.sums`, over all hosts). Keeps run totals.

    Per batch: data_wait (seconds, of the slowest host), packed_tokens, token_fill and chunk_fill (used shares of the
    budget), segment_length (mean over tokens of the length of the token's segment), examples, audio_seconds,
    tokens/<group>, model_flops.
    Since the start of the run: read, unreadable, unlabelled, too_long, truncated (numbers of examples), audio_hours,
    epoch/<source> (passes over the source, counting examples in batches and skipped ones) and epoch (their minimum).
    """

    def __init__(
        self,
        order: ExampleOrder,
        config: DataConfig,
        model: MossAudioConfig,
        trainable: Iterable[str],
        data_state: Mapping[str, Any],
    ):
        """data_state: of all hosts (`distributed.gather_data_state`), before the first batch."""
        self._order, self._config, self._model, self._trainable = order, config, model, tuple(trainable)
        self.groups = order.groups
        self._counts = total_counts(data_state)
        # Groups that join later -> number of their first example.
        self.joining = {name: begin for name, begin in order.begins.items() if begin > self._counts["read"]}

    def __call__(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Adds the sums of a batch to the totals and returns all figures by name."""
        for name in COUNTS:
            self._counts[name] += sums[name]
        content = Content.of_sums(sums)
        figures = {
            "data_wait": sums["data_wait"],
            "packed_tokens": content.tokens,
            "token_fill": content.tokens / (sums["rows"] * self._config.tokens),
            "chunk_fill": content.chunks / max(sums["rows"] * self._config.chunks, 1),
            "segment_length": content.attention_pairs / content.tokens,
            "examples": sums["examples"],
            "audio_seconds": sums["audio_seconds"],
            "model_flops": sum(step_flops(self._model, content, self._trainable).values()),
            "audio_hours": self._counts["audio_seconds"] / SECONDS_PER_HOUR,
        }
        figures |= {name: value for name, value in sums.items() if name.startswith("tokens/")}
        figures |= {name: self._counts[name] for name in COUNTS if name not in ("done", "audio_seconds")}
        epochs = self._order.epochs(round(self._counts["done"]))
        if epochs:
            figures["epoch"] = min(epochs.values())
        if len(epochs) > 1:
            figures |= {f"epoch/{source}": count for source, count in epochs.items()}
        return figures
