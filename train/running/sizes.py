"""Sizes of the examples of a data set: their lengths, and how full the sequences are that they are packed into."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moss_audio_jax.pictures import COLORS, require_matplotlib, save_figure
from moss_audio_jax.storage.paths import AnyPath
from train.data.config import DataConfig
from train.data.packing import Packer

_BINS = 40  # of a histogram


class _Size(NamedTuple):
    num_tokens: int
    num_chunks: int


@dataclass
class Sizes:
    """Sizes of examples, in their order.

    seconds: of all clips of an example. tokens, chunks: of its longest sample; empty if there was no tokenizer.
    """

    seconds: array = field(default_factory=lambda: array("d"))
    tokens: array = field(default_factory=lambda: array("q"))
    chunks: array = field(default_factory=lambda: array("q"))

    def sentences(self, config: DataConfig) -> Iterator[str]:
        """Yields sentences about seconds, tokens and fill."""
        heard = np.array(self.seconds)
        heard = heard[heard > 0]
        if len(heard):
            yield f"seconds of audio of an example: {_spread(heard, '.2f')}"
        if self.tokens:
            yield f"tokens of an example: {_spread(np.array(self.tokens), '.0f')}"
            tokens, chunks = self.fill(config)
            yield (
                f"packed in this order, {len(self.tokens)} examples make {len(tokens)} sequences of {config.tokens} "
                f"tokens and {config.chunks} chunks, of which {tokens.mean():.1%} and {chunks.mean():.1%} are filled"
            )

    def fill(self, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
        """Returns the filled shares of the tokens and of the chunks of each sequence, of one row of the batch.

        A text that is split counts as whole sequences and a rest.
        """
        packer: Packer[_Size] = Packer(config.budget, config.open_bins, config.strategy)
        full: list[tuple[float, float]] = []
        for tokens, chunks in zip(self.tokens, self.chunks, strict=True):
            whole, rest = divmod(tokens, config.tokens) if tokens > config.tokens else (0, tokens)
            full += [(1.0, 0.0)] * whole
            if rest and (closed := packer.add(_Size(rest, chunks))) is not None:
                full.append(_filled(closed.free_tokens, closed.free_chunks, config))
        full += [_filled(bin.free_tokens, bin.free_chunks, config) for bin in packer.bins]
        tokens, chunks = np.array(full).reshape(-1, 2).T
        return tokens, chunks

    def plot(self, path: AnyPath, config: DataConfig) -> None:
        """Writes a PNG of histograms. Raises MossAudioError without matplotlib, or if it can't be written."""
        require_matplotlib()
        from matplotlib.figure import Figure

        panels: list[tuple[str, Sequence[tuple[str, np.ndarray]]]] = [
            ("seconds of audio of an example", [("", np.array(self.seconds))])
        ]
        if self.tokens:
            tokens, chunks = self.fill(config)
            panels.append(("tokens of an example", [("", np.array(self.tokens))]))
            panels.append(("% of a packed sequence", [("tokens", 100 * tokens), ("chunks", 100 * chunks)]))
        figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
        for axes, (title, series) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
            for color, (label, values) in zip(COLORS[4:], series, strict=False):
                highest = 100 if label else max(values.max(initial=0), 1)
                axes.hist(values, bins=_BINS, range=(0, highest), color=color, alpha=0.7, label=label or None)
            axes.set_xlabel(title)
            axes.set_ylabel("number")
            if len(series) > 1:
                axes.legend(frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
        save_figure(figure, path)


def _filled(free_tokens: int, free_chunks: int, config: DataConfig) -> tuple[float, float]:
    return 1 - free_tokens / config.tokens, 1 - free_chunks / max(config.chunks, 1)


def _spread(values: np.ndarray, form: str) -> str:
    low, median, high, top = (format(value, form) for value in np.quantile(values, (0, 0.5, 0.95, 1)))
    return f"{low} to {top}, half of them at most {median}, 95% at most {high}"
