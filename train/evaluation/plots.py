"""Plots: true and predicted timelines of events below a spectrogram; ranges of compared runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE, log_mel
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.pictures import COLORS, WRONG, draw_mel, label_colors, require_matplotlib, save_figure, text_color
from moss_audio_jax.storage.paths import AnyPath
from train.data.manifest import TimedText
from train.data.scene_synthesis import SOUNDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 11.0  # inches
_CHARACTER = 0.085  # inches per letter on a bar
_SPECTROGRAM, _ROW, _AROUND = 1.7, 0.28, 0.5  # heights in inches: spectrogram, row of bars, margin of a clip
_LANES = ("truth", "model")
_BACKWARDS = "ends before it starts"


@dataclass(frozen=True, eq=False)
class TimelinePlot:
    """One clip of a plot.

    wave: float32 [samples] at 16 kHz. true_events, predicted_events: times in seconds from its start.
    unreadable: number of pieces of the answer that are not events (`ParsedTimeline.malformed`).
    answer: text of the answer, shown if it has no events at all.
    """

    wave: np.ndarray
    true_events: Sequence[TimedText]
    predicted_events: Sequence[TimedText]
    title: str = ""
    unreadable: int = 0
    answer: str = ""

    @property
    def seconds(self) -> float:
        return len(self.wave) / SAMPLE_RATE


def plot_timelines(path: AnyPath, clips: Sequence[TimelinePlot]) -> None:
    """Writes a PNG of clips, one below the other. Colours are by label (`pictures.label_colors`).

    An event that ends before it starts is hatched from its end to its start. Unreadable pieces of an answer are counted
    below it; events after the end of the clip are counted at the edge. Raises MossAudioError without matplotlib,
    without clips, or if the file can't be written.
    """
    require_matplotlib()
    if not clips:
        raise MossAudioError(f"{path}: expected clips to plot, found none; give at least one.")
    save_figure(_draw(clips), path)


Rows = list[list[TimedText]]


def _draw(clips: Sequence[TimelinePlot]) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no display, no state

    events = [event for clip in clips for event in (*clip.true_events, *clip.predicted_events)]
    colors = label_colors((event.text for event in events), SOUNDS)
    lanes = [(_rows(clip.true_events, clip.seconds), _rows(clip.predicted_events, clip.seconds)) for clip in clips]
    rows = [  # unreadable pieces have a row of their own
        [max(1, len(true)), max(not clip.unreadable, len(said)) + bool(clip.unreadable)]
        for clip, (true, said) in zip(clips, lanes, strict=True)
    ]
    heights = [height for count in rows for height in (_SPECTROGRAM, _ROW * sum(count))]
    figure = Figure((_WIDTH, sum(heights) + _AROUND * (len(clips) + 1)), layout="constrained")
    axes = figure.subplots(2 * len(clips), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for index, clip in enumerate(clips):
        spectrogram, timeline = axes[2 * index : 2 * index + 2]
        _draw_spectrogram(spectrogram, clip)
        _draw_lanes(timeline, clip, lanes[index], rows[index], colors)
    axes[-1].set_xlabel("seconds")
    _draw_legend(figure, events, colors)
    return figure


def _draw_legend(figure: "Figure", events: Sequence[TimedText], colors: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    labels = [label for label in colors if any(event.text == label for event in events)]
    if not 0 < len(labels) <= len(COLORS):  # more labels would share colours; bars show labels too
        return
    patches = [Patch(color=colors[label], label=label) for label in labels]
    if any(event.end < event.start for event in events):
        patches.append(Patch(facecolor="white", edgecolor="0.3", hatch="////", label=_BACKWARDS))
    columns = int(_WIDTH / (0.6 + _CHARACTER * max(len(str(patch.get_label())) for patch in patches))) or 1
    figure.legend(handles=patches, loc="outside upper center", ncols=min(columns, len(patches)), frameon=False)


def _rows(events: Sequence[TimedText], seconds: float) -> Rows:
    """Assigns the events that start within the clip to rows without overlap."""
    rows: Rows = []
    for event in sorted(events, key=lambda event: min(event.start, event.end)):
        if event.start < seconds:
            left = min(event.start, event.end)
            free = next((row for row in rows if max(row[-1].start, row[-1].end) <= left), None)
            if free is None:
                rows.append([event])
            else:
                free.append(event)
    return rows


def _draw_spectrogram(axes: "Axes", clip: TimelinePlot) -> None:
    draw_mel(axes, log_mel(clip.wave), 0, clip.seconds)
    axes.set_title(clip.title, loc="left", fontsize=10)


def _draw_lanes(
    axes: "Axes", clip: TimelinePlot, lanes: tuple[Rows, Rows], heights: Sequence[int], colors: dict[str, str]
) -> None:
    top, centres = 0, []
    for rows, events, height in zip(lanes, (clip.true_events, clip.predicted_events), heights, strict=True):
        for number, row in enumerate(rows):
            for event in row:
                _draw_event(axes, event, top + number + 0.5, clip.seconds, colors[event.text])
        outside = len(events) - sum(map(len, rows))
        if outside:
            note = f"{outside} after the end"
            axes.text(clip.seconds, top + 0.5, f"{note} ", ha="right", va="center", fontsize=8, style="italic")
        if not events and not (events is clip.predicted_events and clip.unreadable):
            axes.text(0, top + 0.5, " nothing", va="center", fontsize=8, style="italic", color="0.4")
        top += height
        centres.append(top - height / 2)
        axes.axhline(top, color="0.8", linewidth=0.8)
    if clip.unreadable:
        note = f" {clip.unreadable} piece{'s' if clip.unreadable > 1 else ''} of the answer can't be read"
        note += "" if clip.predicted_events else f": {_shortened(clip.answer)}"
        axes.text(0, top - 0.5, note, va="center", fontsize=8, style="italic", color=WRONG, parse_math=False)
    axes.set_xlim(0, clip.seconds)
    axes.set_ylim(top, 0)
    axes.set_yticks(centres, _LANES)
    axes.tick_params(left=False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _shortened(text: str, length: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}..."


def _draw_event(axes: "Axes", event: TimedText, middle: float, seconds: float, color: str) -> None:
    """Draws a bar, with its label if there is space."""
    left, right = sorted((event.start, event.end))
    length = min(right, seconds) - left
    backwards = event.end < event.start
    face, hatch = ("white", "////") if backwards else (color, None)
    axes.barh(middle, length, left=left, height=0.8, color=face, edgecolor=color, linewidth=1, hatch=hatch)
    if len(event.text) * _CHARACTER < length / seconds * _WIDTH * 0.9:
        shade = "black" if backwards else text_color(color)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if backwards else None
        style = {"ha": "center", "va": "center", "fontsize": 9, "color": shade, "bbox": box}
        axes.text(left + length / 2, middle, event.text, parse_math=False, **style)


# Compared runs


Ranges = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]  # section -> line -> group -> a value each run


def plot_ranges(path: AnyPath, values: Ranges, *, unit: str) -> None:
    """Writes a PNG with a line per measure; on it, for each group, a dot at the mean and a bar from lowest to highest.

    Raises MossAudioError without matplotlib or if the file can't be written.
    """
    require_matplotlib()
    save_figure(_draw_ranges(values, unit), path)


_LINE, _APART = 0.42, 0.17  # height of a line in inches; distance of its groups, in lines


def _draw_ranges(values: Ranges, unit: str) -> "Figure":
    from matplotlib.figure import Figure

    groups = list(next(iter(next(iter(values.values())).values())))
    colors = dict(zip(groups, _group_colors(len(groups)), strict=True))
    height = sum(1 + len(lines) for lines in values.values())
    figure = Figure((9, height * _LINE + 1.0), layout="constrained")
    axes = figure.subplots()
    place, ticks = 0, []
    for section, lines in values.items():
        axes.text(0, place, f"{section} ", ha="left", va="center", weight="bold")
        ticks.append((place, ""))
        for name, found in lines.items():
            place += 1
            ticks.append((place, name))
            axes.axhspan(place - 0.5, place + 0.5, color="0.96" if place % 2 else "1", zorder=0)
            for number, group in enumerate(groups):
                y = place + (number - (len(groups) - 1) / 2) * _APART
                axes.plot([min(found[group]), max(found[group])], [y, y], color=colors[group], linewidth=2, alpha=0.6)
                label = group if len(ticks) == 2 else None  # once
                axes.plot(float(np.mean(found[group])), y, "o", color=colors[group], markersize=5, label=label)
        place += 1
    axes.set_ylim(place - 0.5, -0.7)
    axes.set_xlim(left=0)
    axes.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks])
    axes.set_xlabel(f"{unit}; a dot is the mean of the runs, a bar goes from the lowest to the highest")
    axes.tick_params(left=False)
    axes.grid(axis="x", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(groups), frameon=False)
    return figure


Curves = Mapping[str, Mapping[int, tuple[float, float, float]]]  # name -> step -> lowest, mean and highest score


def plot_learning_curves(path: AnyPath, curves: Curves) -> None:
    """Writes a PNG of scores (0 to 1) by step: a line at the mean, a band from lowest to highest.

    Raises MossAudioError without matplotlib or if the file can't be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure((9, 4), layout="constrained")
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), _group_colors(len(curves)), strict=True):
        steps = sorted(curve)
        lowest, mean, highest = (100 * np.array(part) for part in zip(*(curve[step] for step in steps), strict=True))
        axes.fill_between(steps, lowest, highest, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, "o-", color=color, markersize=4, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("score in validation, %")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(curves), frameon=False)
    save_figure(figure, path)


def _group_colors(count: int) -> list[str]:
    """Returns colours of compared runs that are far apart."""
    order = (4, 5, 2, 3, 0, 1)
    return [COLORS[order[index % len(order)] % len(COLORS)] for index in range(count)]
