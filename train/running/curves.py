"""Plots of the metrics of training runs, from the files that `record_files` writes."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.pictures import COLORS, require_matplotlib, save_figure
from moss_audio_jax.storage.paths import AnyPath, exists, read_bytes, to_path
from train.running.directory import METRICS_FILE, SCORES_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTHED_OVER = 50  # the smoothing window is 1/50 of a run's steps
_LOG_ABOVE = 8.0  # the loss axis is logarithmic if the highest loss is more than this times the lowest
_MOST_SCORES = 4  # panels of scores, at most
_TOKENS = "tokens/"
# Metrics of `reinforce` with a panel each, and their labels.
_OF_REWARD = {
    "reward": "reward",
    "groups_kept": "groups kept",
    "answer_tokens": "tokens of an answer",
    "entropy": "entropy",
}


@dataclass
class Curves:
    """Records of a run: name -> steps and values.

    joins: group -> first step with tokens of the group, for groups that join after the run's first step.
    """

    name: str
    metrics: Mapping[str, tuple[np.ndarray, np.ndarray]]
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]]
    joins: Mapping[str, int] = field(default_factory=dict)


def plot_curves(path: AnyPath, runs: Sequence[AnyPath]) -> None:
    """Writes a PNG with the curves of all runs in the same axes.

    Raises MossAudioError without matplotlib, without runs, for a directory without metrics, and if the file can't be
    written.
    """
    require_matplotlib()
    if not runs:
        raise MossAudioError("there is nothing to plot: name the directory of a run, or of several")
    names = _names([str(to_path(run)).rstrip("/") for run in runs])
    save_figure(_draw([read_curves(run, name) for run, name in zip(runs, names, strict=True)]), path)


def read_curves(run: AnyPath, name: str) -> Curves:
    """Reads the records of a run; raises MossAudioError if it has no metrics."""
    file = to_path(run) / METRICS_FILE
    steps = _lines(file)
    if not steps:
        raise MossAudioError(f"{file} must have a line for each step, and has none: name the directory of a run")
    metrics = _by_name(steps)
    first = steps[0]["step"]
    joins = {
        name.removeprefix(_TOKENS): int(taken[0])
        for name, (at, tokens) in metrics.items()
        if name.startswith(_TOKENS) and len(taken := at[tokens > 0]) and taken[0] > first
    }
    return Curves(name, metrics, _by_name(_lines(to_path(run) / SCORES_FILE)), joins)


def _names(paths: Sequence[str]) -> list[str]:
    """Shortens paths to their last parts, as few as keep different paths distinct."""
    parts = [path.split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def _lines(file: AnyPath) -> list[dict[str, Any]]:
    """Reads a file of JSON lines, without an incomplete last line; an empty list if there is no file."""
    if not exists(file):
        return []
    lines = read_bytes(file).split(b"\n")[:-1]
    try:
        found = [json.loads(line) for line in lines]
        return [line for line in found if isinstance(line["step"], int)]
    except (ValueError, KeyError, TypeError) as error:
        raise MossAudioError(f"{file} must be JSON lines with a step each, and is damaged ({error!r})") from error


def _by_name(lines: Iterable[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns name -> steps at which it was recorded, and its values; null becomes NaN."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if value is None or (isinstance(value, int | float) and name != "step"):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(np.nan if value is None else value)
    return {name: (np.array(steps), np.array(values, float)) for name, (steps, values) in found.items()}


def _smooth_loss(run: Curves) -> np.ndarray:
    """Smooths the loss of a run, separately between the steps at which groups join."""
    steps, values = run.metrics["loss"]
    window = max(len(values) // _SMOOTHED_OVER // 2, 1)
    borders = sorted({int(np.searchsorted(steps, step)) for step in run.joins.values()})
    return np.concatenate([_smoothed(part, window) for part in np.split(values, borders)])


def _smoothed(values: np.ndarray, half: int) -> np.ndarray:
    """Moving average: the mean of the finite values among each value and `half` neighbours on either side."""
    # Window sums are differences of cumulative sums; windows are cut at both ends.
    finite = np.isfinite(values)
    sums, counts = (np.cumsum(np.concatenate([[0], part])) for part in (np.where(finite, values, 0), finite))
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    first = np.maximum(np.arange(len(values)) - half, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def _draw(runs: Sequence[Curves]) -> "Figure":
    from matplotlib.figure import Figure

    scores = _shown_scores(runs)
    rewarded = [name for name in _OF_REWARD if any(name in run.metrics for run in runs)]
    heights = [3.2, 1.4] + [1.8] * (len(rewarded) + len(scores))
    figure = Figure((9, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for run, color in zip(runs, (COLORS[index] for index in _ORDER * len(runs)), strict=False):
        _draw_run(list(axes), run, rewarded, scores, color, alone=len(runs) == 1)
    _draw_joins(list(axes), runs)
    axes[0].set_ylabel("loss of training")
    axes[1].set_ylabel("learning rate")
    axes[1].set_ylim(bottom=0)
    axes[1].ticklabel_format(axis="y", scilimits=(-2, 3))
    for name, panel in zip([*map(_OF_REWARD.__getitem__, rewarded), *scores], axes[2:], strict=True):
        panel.set_ylabel(name)
    _scale(axes[0], runs)
    for panel in axes:
        panel.grid(color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    figure.align_ylabels(axes)
    axes[0].legend(frameon=False, loc="lower left")
    return figure


_ORDER = (4, 5, 2, 3, 0, 1, 6, 8, 7, 9)  # indices of COLORS, dark ones first: lines are thin


def _shown_scores(runs: Sequence[Curves]) -> list[str]:
    """Names of the overall scores to plot: those that most runs have first, then eval/loss, then by name."""
    names = {name for run in runs for name in run.scores if name.startswith("eval/")}
    counts = {name: sum(name in run.scores for run in runs) for name in names}
    overall = [name for name in names if name.count("/") == 1 and name not in ("eval/tokens", "eval/items")]
    return sorted(overall, key=lambda name: (-counts[name], name != "eval/loss", name))[:_MOST_SCORES]


def _draw_run(
    axes: Sequence["Axes"], run: Curves, rewarded: Sequence[str], scores: Sequence[str], color: str, *, alone: bool
) -> None:
    loss, rate, *panels = axes
    steps, values = run.metrics["loss"]
    loss.plot(steps, values, color=color, alpha=0.25, linewidth=0.7, label="each step" if alone else None)
    loss.plot(steps, _smooth_loss(run), color=color, linewidth=1.6, label="smoothed" if alone else run.name)
    if alone:
        loss.set_title(run.name, loc="left", fontsize=10)
    if "learning_rate" in run.metrics:
        rate.plot(*run.metrics["learning_rate"], color=color)
    for name, panel in zip(rewarded, panels, strict=False):
        if name in run.metrics:
            steps, values = run.metrics[name]
            panel.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
            panel.plot(steps, _smoothed(values, max(len(values) // _SMOOTHED_OVER // 2, 1)), color=color, linewidth=1.6)
    for name, panel in zip(scores, panels[len(rewarded) :], strict=True):
        if name in run.scores:
            panel.plot(*run.scores[name], "o-", color=color, markersize=4)


def _draw_joins(axes: Sequence["Axes"], runs: Sequence[Curves]) -> None:
    """Draws a vertical line where a group joins, once for all runs that share it."""
    for group, step in sorted({border for run in runs for border in run.joins.items()}):
        for panel in axes:
            panel.axvline(step, color="0.4", linestyle="--", linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "va": "top", "fontsize": 8, "color": "0.3"}
        axes[0].annotate(f" {group} joins:\n other examples from here on", (step, 1), **place)


def _scale(axes: "Axes", runs: Sequence[Curves]) -> None:
    """Makes the axis logarithmic if the losses span a wide range (_LOG_ABOVE)."""
    from matplotlib.ticker import LogLocator

    smooth = np.concatenate([_smooth_loss(run) for run in runs])
    smooth = smooth[np.isfinite(smooth)]
    if len(smooth) and smooth.min() > 0 and smooth.max() / smooth.min() > _LOG_ABOVE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
