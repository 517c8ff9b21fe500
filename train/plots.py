"""Pictures: of events in time, what is there and what a model says is there below the spectrogram; of compared runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE, log_mel
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.paths import AnyPath, reason, written_whole
from train.data.manifest import TimedText

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart, then a few of their shades.
_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442", "#8C8C8C", "#A6761D", "#7570B3")
_WIDTH = 11.0  # inches
_CHARACTER = 0.085  # inches of a letter on a bar
_SPECTROGRAM, _ROW, _AROUND = 1.7, 0.28, 0.5  # inches high: a spectrogram, a row of bars, what is around a clip's axes
_LANES = ("truth", "model")


@dataclass(frozen=True, eq=False)
class TimelinePlot:
    """One clip of a picture. wave: float32 [samples] at 16 kHz. Events: seconds from its start."""

    wave: np.ndarray
    true_events: Sequence[TimedText]
    predicted_events: Sequence[TimedText]
    title: str = ""

    @property
    def seconds(self) -> float:
        return len(self.wave) / SAMPLE_RATE


def require_matplotlib() -> None:
    """Raises MossAudioError that says how to install it, if it isn't there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MossAudioError(
            "plots need matplotlib, which is not installed: pip install 'moss-audio-jax[plot]'"
        ) from error


def plot_timeline(
    path: AnyPath,
    wave: np.ndarray,
    true_events: Sequence[TimedText],
    predicted_events: Sequence[TimedText],
    title: str = "",
) -> None:
    """Writes a picture of one clip; see `TimelinePlot` and `plot_timelines`."""
    plot_timelines(path, [TimelinePlot(wave, true_events, predicted_events, title)])


def plot_timelines(path: AnyPath, clips: Sequence[TimelinePlot]) -> None:
    """Writes a PNG of clips one below the other; equal labels have equal colours.

    Events beyond the clip's end are counted at the edge of their lane. Raises MossAudioError without matplotlib, for
    no clips, or for a file that can't be written.
    """
    require_matplotlib()
    if not clips:
        raise MossAudioError(f"{path}: expected clips to plot, found none; give at least one.")
    _save(_draw(clips), path)


def _save(figure: "Figure", path: AnyPath) -> None:
    try:
        with written_whole(path) as file:
            figure.savefig(file, dpi=150, format="png")
    except OSError as error:
        raise MossAudioError(
            f"{path}: expected a picture that can be written, found '{reason(error)}'; choose another."
        ) from error


Lanes = tuple[list[list[TimedText]], list[list[TimedText]]]  # rows of true and of predicted events


def _draw(clips: Sequence[TimelinePlot]) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no display, no state
    from matplotlib.patches import Patch

    labels = sorted({event.text for clip in clips for event in (*clip.true_events, *clip.predicted_events)})
    colors = {label: _COLORS[index % len(_COLORS)] for index, label in enumerate(labels)}
    lanes: list[Lanes] = [
        (_rows(clip.true_events, clip.seconds), _rows(clip.predicted_events, clip.seconds)) for clip in clips
    ]
    heights = [height for rows in lanes for height in (_SPECTROGRAM, _ROW * sum(max(1, len(lane)) for lane in rows))]
    figure = Figure((_WIDTH, sum(heights) + _AROUND * (len(clips) + 1)), layout="constrained")
    axes = figure.subplots(2 * len(clips), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for index, clip in enumerate(clips):
        spectrogram, timeline = axes[2 * index : 2 * index + 2]
        _draw_spectrogram(spectrogram, clip)
        _draw_lanes(timeline, clip, lanes[index], colors)
    axes[-1].set_xlabel("seconds")
    if 0 < len(labels) <= len(_COLORS):  # more would share colours; the bars say what they are
        patches = [Patch(color=colors[label], label=label) for label in labels]
        columns = int(_WIDTH / (0.6 + _CHARACTER * max(map(len, labels)))) or 1
        figure.legend(handles=patches, loc="outside upper center", ncols=min(columns, len(labels)), frameon=False)
    return figure


def _rows(events: Sequence[TimedText], seconds: float) -> list[list[TimedText]]:
    """The events that begin within the clip, dealt out to rows in which none hides another."""
    rows: list[list[TimedText]] = []
    for event in sorted(events, key=lambda event: event.start):
        if event.start < seconds:
            free = next((row for row in rows if max(row[-1].start, row[-1].end) <= event.start), None)
            if free is None:
                rows.append([event])
            else:
                free.append(event)
    return rows


def _draw_spectrogram(axes: "Axes", clip: TimelinePlot) -> None:
    mel = log_mel(clip.wave)
    axes.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=(0, clip.seconds, 0, len(mel)))
    axes.set_title(clip.title, loc="left", fontsize=10)
    axes.set_ylabel("mel bin")
    axes.set_yticks([0, len(mel) // 2, len(mel)])
    axes.tick_params(labelbottom=False)


def _draw_lanes(axes: "Axes", clip: TimelinePlot, lanes: Lanes, colors: dict[str, str]) -> None:
    top, centres = 0, []
    for rows, events in zip(lanes, (clip.true_events, clip.predicted_events), strict=True):
        for number, row in enumerate(rows):
            for event in row:
                _draw_event(axes, event, top + number + 0.5, clip.seconds, colors[event.text])
        outside = len(events) - sum(map(len, rows))
        if outside:
            note = f"{outside} after the end"
            axes.text(clip.seconds, top + 0.5, f"{note} ", ha="right", va="center", fontsize=8, style="italic")
        centres.append(top + max(1, len(rows)) / 2)
        top += max(1, len(rows))
        axes.axhline(top, color="0.8", linewidth=0.8)
    axes.set_xlim(0, clip.seconds)
    axes.set_ylim(top, 0)
    axes.set_yticks(centres, _LANES)
    axes.tick_params(left=False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_event(axes: "Axes", event: TimedText, middle: float, seconds: float, color: str) -> None:
    """A bar with the label on it, where there is space; one that ends before it begins is a line at its start."""
    length = max(0.0, min(event.end, seconds) - event.start)
    axes.barh(middle, length, left=event.start, height=0.8, color=color, edgecolor=color, linewidth=1)
    if len(event.text) * _CHARACTER < length / seconds * _WIDTH * 0.9:
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
        axes.text(event.start + length / 2, middle, event.text, ha="center", va="center", fontsize=9, color=ink)


# Compared runs


@dataclass(frozen=True, eq=False)
class DotPanel:
    """Axes of a picture of dots. row: panels of one row stand side by side. groups: name -> a value each dot."""

    row: str
    title: str
    groups: Mapping[str, Sequence[float]]


def plot_dots(path: AnyPath, panels: Sequence[DotPanel], *, unit: str) -> None:
    """Writes a PNG of panels with the same groups: every value a dot, a bar at the mean of each group.

    Raises MossAudioError without matplotlib and for a file that can't be written.
    """
    require_matplotlib()
    _save(_draw_dots(panels, unit), path)


_PANEL_WIDTH, _PANEL_HEIGHT = 1.7, 2.6  # inches


def _draw_dots(panels: Sequence[DotPanel], unit: str) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = list(dict.fromkeys(panel.row for panel in panels))
    by_row = {row: [panel for panel in panels if panel.row == row] for row in rows}
    columns = max(map(len, by_row.values()))
    figure = Figure((_PANEL_WIDTH * columns, _PANEL_HEIGHT * len(rows) + _AROUND), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey=True)
    for row, line in zip(rows, axes, strict=True):
        line[0].set_ylabel(f"{row}\n{unit}")
        for index, panel_axes in enumerate(line):
            if index < len(by_row[row]):
                _draw_panel(panel_axes, by_row[row][index])
            else:
                panel_axes.set_axis_off()
    names = list(panels[0].groups)
    handles = [Line2D([], [], marker="o", linestyle="", color=color) for color, _ in zip(_COLORS, names, strict=False)]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _draw_panel(axes: "Axes", panel: DotPanel) -> None:
    for place, (values, color) in enumerate(zip(panel.groups.values(), _COLORS, strict=False)):
        axes.plot([place] * len(values), values, "o", color=color, alpha=0.75)
        axes.hlines(float(np.mean(values)), place - 0.35, place + 0.35, color=color, linewidth=2)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlim(-0.6, len(panel.groups) - 0.4)
    axes.set_xticks([])
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
