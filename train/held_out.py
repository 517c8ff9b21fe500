"""Evaluation while a run trains: its model answers questions about held-out data every so many steps."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import jax

from moss_audio_jax.checkpoint import build_model
from moss_audio_jax.paths import Path
from moss_audio_jax.processor import Processor
from train.config import RunConfig
from train.evaluate import ask, has_events, measure
from train.metrics import parse_timeline
from train.optimizer import Parameters
from train.plots import plot_timeline
from train.questions import Item, manifest_items, scene_items
from train.report import ShownSample

HELD_OUT_SEED = 2**31  # of scenes: added to the run's own seed, which makes those it trains on
FIGURES = "figures"
BATCH = 16


class HeldOut:
    """The questions of a run's evaluations, the same each time."""

    def __init__(self, config: RunConfig, processor: Processor, out: Path):
        self._every, self._shown, self._tokens = (
            config.loop.evaluate_every,
            config.loop.show_samples,
            config.loop.evaluate_tokens,
        )
        self._dtype, self._processor, self._figures = config.step.compute_dtype, processor, out / FIGURES
        self._items = _items(config) if self._every else []

    def is_due(self, step: int) -> bool:
        return bool(self._items) and self._every is not None and step % self._every == 0

    def ask(self, step: int, parameters: Parameters) -> tuple[dict[str, float], list[ShownSample]]:
        """Measures by name, such as `eval/scenes/timeline/f1`, and some answers to show."""
        copies = {path: leaf.astype(self._dtype) for path, leaf in parameters.items()}
        model = build_model(self._processor.config, copies)
        answers = ask(model, self._processor, self._items, batch_size=BATCH, max_new_tokens=self._tokens)
        scores = dict(_numbers("eval", measure(self._items, answers)))
        pairs = list(zip(self._items, answers, strict=True))[: self._shown]
        return scores, [self._shown_sample(step, item, answer) for item, answer in pairs]

    def _shown_sample(self, step: int, item: Item, answer: str) -> ShownSample:
        figure = None
        # Pictures are an extra; a run doesn't end for want of them.
        if has_events(item) and importlib.util.find_spec("matplotlib") and jax.process_index() == 0:
            figure = self._figures / f"step {step} {item.name.replace('/', '_')}.png"
            figure.parent.mkdir(parents=True, exist_ok=True)
            plot_timeline(figure, item.clips[0].wave(), item.labels, parse_timeline(answer).items)
        return ShownSample(item.name, item.question, item.reference, answer, figure)


def _items(config: RunConfig) -> list[Item]:
    count = config.loop.evaluate_count
    if config.loop.evaluate_data:
        return [item for path in config.loop.evaluate_data for item in manifest_items(path, limit=count)]
    return scene_items(count, config.mixture.scenes.scenes, seed=config.seed + HELD_OUT_SEED)


def _numbers(prefix: str, measures: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Nested dicts to numbers by path; what there was nothing to measure of has no number."""
    found = []
    for name, value in measures.items():
        path = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            found += _numbers(path, value)
        elif isinstance(value, int | float):
            found.append((path, float(value)))
    return found
