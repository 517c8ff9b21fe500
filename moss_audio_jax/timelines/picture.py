"""Pictures of a timeline: waveform, mel, and below them a bar for each segment with its text.

A recording is drawn in rows of equal length, like the lines of a score, and rows make pages. Every text stands whole at
its segment, in as many lanes as it takes; no two texts overlap.
"""

import functools
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE, log_mel
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.pictures import COLORS, WRONG, draw_mel, label_colors, require_matplotlib, save_figure
from moss_audio_jax.storage.paths import AnyPath, Path, to_path
from moss_audio_jax.timelines.formats import one_line, stamp
from moss_audio_jax.timelines.segment import Segment
from moss_audio_jax.timelines.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

ROW_SECONDS = (60.0, 30.0, 20.0, 10.0, 5.0)
_MANY_LINES = 8  # a row is chosen so short that no more lines of text, each of a segment of its own, are below it
_MOST_LINES = 40  # more are counted instead of drawn
_MOST_LINES_OF_TEXT = 12  # then it is cut, with an ellipsis
_MOST_NOTES = 6

# Inches.
_WIDTH, _LEFT, _RIGHT = 12.0, 0.8, 0.2
_ACROSS = _WIDTH - _LEFT - _RIGHT
_TITLE, _WAVE, _MEL, _BETWEEN, _TICKS, _LABEL = 0.4, 0.55, 1.35, 0.05, 0.4, 0.2
_BAR, _LINE, _GAP = 0.09, 0.165, 0.08  # of a segment: its bar, a line of its text, the space below
_NOTE = 0.18
_PAGE = 30.0  # height of a page
_NARROW = 2.2  # a text may be this wide, however short its segment is
_MARGIN = 0.09  # between two texts side by side
_FONT_SIZE = 9  # points

_BY_TURNS = "#0072B2", "#56B4E9"  # colours of texts that are all different
_NO_SPEAKER = "#8C8C8C"
_BESIDES_LATIN = (  # fonts with Chinese, Japanese and Korean; those that are installed are used
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Droid Sans Fallback",
)


@dataclass(frozen=True)
class Pictures:
    """Files that were written. missing: characters that no installed font has; boxes stand for them."""

    paths: tuple[Path, ...]
    missing: str


def plot_timeline(
    path: AnyPath, wave: np.ndarray, timeline: Timeline, *, title: str = "", row_seconds: float | None = None
) -> Pictures:
    """Writes a PNG, or several if its rows need more than a page of 30 inches: `a-1.png`, `a-2.png`, ...

    wave: float32 [samples] at 16 kHz.
    row_seconds: length of a row; None takes the longest of 60, 30, 20, 10 and 5 s whose texts have room.

    A segment that ends before it begins is hatched. Segments past the end, and pieces that were not read, are noted
    below the last row. Raises MossAudioError without matplotlib, or if a file can't be written.
    """
    require_matplotlib()
    require_row(row_seconds)
    path = to_path(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pages = draw_pages(wave, timeline, title=title, row_seconds=row_seconds)
        paths = [
            path if len(pages) == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            for number in range(1, len(pages) + 1)
        ]
        for page, figure in zip(paths, pages, strict=True):
            save_figure(figure, page)
    glyphs = [(re.match(r"Glyph (\d+) .*missing from", str(warning.message)), warning) for warning in caught]
    for found, warning in glyphs:
        if found is None:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return Pictures(tuple(paths), "".join(dict.fromkeys(chr(int(found[1])) for found, _ in glyphs if found)))


def require_row(row_seconds: float | None) -> None:
    """Raises MossAudioError for a row that is too short to draw."""
    if row_seconds is not None and not (math.isfinite(row_seconds) and row_seconds >= 0.5):
        raise MossAudioError(f"row_seconds must be 0.5 or more, not {row_seconds}: give more, or leave it out")


def draw_pages(
    wave: np.ndarray, timeline: Timeline, *, title: str = "", row_seconds: float | None = None
) -> list["Figure"]:
    """Draws the pages of `plot_timeline`."""
    mel = log_mel(wave)
    recording = _Recording(wave, mel, float(np.abs(wave).max()) or 1.0, (float(mel.min()), float(mel.max())))
    rows = _rows(timeline.segments, recording.seconds, row_seconds)
    notes = _notes(timeline, recording.seconds)
    pages = _pages(rows)
    return [
        _draw_page(
            page,
            recording,
            _colors(timeline.segments),
            f"{title}, page {number} of {len(pages)}".removeprefix(", ") if len(pages) > 1 else title,
            notes if number == len(pages) else [],
        )
        for number, page in enumerate(pages, start=1)
    ]


@dataclass(frozen=True, eq=False)
class _Recording:
    wave: np.ndarray
    mel: np.ndarray
    peak: float
    levels: tuple[float, float]

    @property
    def seconds(self) -> float:
        return len(self.wave) / SAMPLE_RATE


# Where things stand


@dataclass(frozen=True)
class _Placed:
    """A segment in a row; inches from the left of the row and from its top."""

    index: int
    segment: Segment
    left: float
    right: float
    text_left: float
    lines: tuple[str, ...]
    top: float

    @property
    def bottom(self) -> float:
        return self.top + _height(self.lines)


@dataclass(frozen=True)
class _Row:
    begin: float
    seconds: float
    placed: tuple[_Placed, ...]
    left_out: int

    @property
    def height(self) -> float:
        """Inches of the segments below the mel."""
        return max((placed.bottom for placed in self.placed), default=_LINE) + (_LINE if self.left_out else 0) + _GAP

    @property
    def whole_height(self) -> float:
        return _WAVE + _BETWEEN + _MEL + self.height + _TICKS


def _pages(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Fills pages with rows."""
    pages: list[list[_Row]] = [[]]
    for row in rows:
        if pages[-1] and sum(other.whole_height for other in pages[-1]) + row.whole_height > _PAGE:
            pages.append([])
        pages[-1].append(row)
    return pages


def _height(lines: Sequence[str]) -> float:
    return _BAR + _LINE * len(lines) + _GAP


def _rows(segments: Sequence[Segment], seconds: float, row_seconds: float | None) -> list[_Row]:
    if row_seconds is not None:
        return _rows_of(segments, seconds, row_seconds)
    lengths = [length for length in ROW_SECONDS if length < seconds]
    if seconds <= ROW_SECONDS[0]:
        lengths.insert(0, seconds)
    best: list[_Row] = []
    for length in lengths:
        rows = _rows_of(segments, seconds, length)
        if not best or _crowding(rows) < _crowding(best):
            best = rows
        if _crowding(best) <= (0, _MANY_LINES * _height(" ")):
            break
    return best


def _crowding(rows: Sequence[_Row]) -> tuple[int, float]:
    """Returns the number of segments without room, and the height of the tallest row."""
    return sum(row.left_out for row in rows), max(row.height for row in rows)


def _rows_of(segments: Sequence[Segment], seconds: float, length: float) -> list[_Row]:
    count = max(1, math.ceil(round(seconds / length, 6)))
    return [_row(segments, number * length, length, seconds) for number in range(count)]


def _row(segments: Sequence[Segment], begin: float, length: float, seconds: float) -> _Row:
    """Puts each segment as high as it can stand without touching those before it."""
    placed: list[_Placed] = []
    left_out = 0
    end = min(begin + length, seconds)
    for index, segment in sorted(enumerate(segments), key=lambda pair: pair[1].span):
        first, last = segment.span
        if first >= end or (last <= begin and first < begin):
            continue
        left, right = ((min(max(time, begin), end) - begin) / length * _ACROSS for time in (first, last))
        text = one_line(segment.text)
        lines = _wrapped(f"… {text}" if first < begin else text, right - left)
        width = max(map(_text_width, lines))
        text_left = max(0.0, min(left, _ACROSS - width))
        reach = min(left, text_left), max(right, text_left + width) + _MARGIN
        others = [other for other in placed if _overlap(reach, _reach(other))]
        tops = sorted({0.0, *(other.bottom for other in others)})
        top = next(
            top
            for top in tops
            if not any(_overlap((top, top + _height(lines)), (other.top, other.bottom)) for other in others)
        )
        if top > _MOST_LINES * _LINE:
            left_out += 1
        else:
            placed.append(_Placed(index, segment, left, right, text_left, lines, top))
    return _Row(begin, length, tuple(placed), left_out)


def _reach(placed: _Placed) -> tuple[float, float]:
    width = max(map(_text_width, placed.lines))
    return min(placed.left, placed.text_left), max(placed.right, placed.text_left + width) + _MARGIN


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] < b[1] - 1e-9 and b[0] < a[1] - 1e-9


def _wrapped(text: str, width: float) -> tuple[str, ...]:
    """Wraps a text to the width of its segment in inches, wider if that would take many lines."""
    width = max(width, _NARROW)
    while len(lines := _lines(text, width)) > _MOST_LINES_OF_TEXT // 2 and width < _ACROSS:
        width = min(1.5 * width, _ACROSS)
    if len(lines) > _MOST_LINES_OF_TEXT:
        lines = [*lines[: _MOST_LINES_OF_TEXT - 1], f"{lines[_MOST_LINES_OF_TEXT - 1][:-1]}…"]
    return tuple(lines)


def _lines(text: str, width: float) -> list[str]:
    """Breaks a text at spaces, and where there are none, as in Chinese, between characters."""
    lines: list[str] = []
    while text:
        length, used = 0, 0.0
        while length < len(text) and used + _character_width(text[length]) <= width:
            used += _character_width(text[length])
            length += 1
        length = max(length, 1)
        if length < len(text):
            space = text.rfind(" ", 0, length + 1)
            # Where the line is Chinese but for a space at its beginning, the space is no good place.
            length = space if space > length // 2 else length
        lines.append(text[:length].rstrip())
        text = text[length:].lstrip()
    return lines or [""]


def _text_width(text: str) -> float:
    return sum(map(_character_width, text))


@functools.lru_cache(maxsize=100_000)
def _character_width(character: str) -> float:
    """Returns the inches to the next character."""
    from matplotlib.textpath import TextToPath

    def width(text: str) -> float:
        return TextToPath().get_text_width_height_descent(text, _font(), ismath=False)[0] / 72

    return 1.02 * (width(f"|{character}|") - width("||"))  # drawn, they are wider by up to half a pixel


@functools.cache
def _font() -> "FontProperties":
    from matplotlib.font_manager import FontProperties, get_font_names

    installed = set(get_font_names())
    return FontProperties(
        family=["DejaVu Sans", *(name for name in _BESIDES_LATIN if name in installed)], size=_FONT_SIZE
    )


def _colors(segments: Sequence[Segment]) -> list[str]:
    """Returns a colour for each segment: by speaker, by label if there are few, or else by turns."""
    speakers = {segment.speaker for segment in segments if segment.speaker}
    if speakers:
        by_speaker = dict(zip(sorted(speakers), (COLORS[index % len(COLORS)] for index in range(100)), strict=False))
        return [by_speaker.get(segment.speaker or "", _NO_SPEAKER) for segment in segments]
    if len({segment.text for segment in segments}) <= len(COLORS):
        by_label = label_colors(segment.text for segment in segments)
        return [by_label[segment.text] for segment in segments]
    return [_BY_TURNS[index % 2] for index in range(len(segments))]


def _notes(timeline: Timeline, seconds: float) -> list[str]:
    """Says what no row shows."""
    late = [segment for segment in timeline.segments if segment.span[0] >= seconds]
    notes = [f"past the end, at {stamp(segment.begin)} s: {one_line(segment.text)}" for segment in late]
    notes += [f"not read: {one_line(piece)}" for piece in timeline.unread]
    if len(notes) > _MOST_NOTES:
        notes = [*notes[: _MOST_NOTES - 1], f"and {len(notes) - _MOST_NOTES + 1} more"]
    return [note if _text_width(note) < _ACROSS else f"{_lines(note, _ACROSS - 0.2)[0]}…" for note in notes]


# Drawing


def _draw_page(
    rows: Sequence[_Row], recording: _Recording, colors: Sequence[str], title: str, notes: Sequence[str]
) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no display, no state

    height = _TITLE + sum(row.whole_height for row in rows) + _LABEL + _NOTE * len(notes)
    figure = Figure((_WIDTH, height))
    figure.text(_LEFT / _WIDTH, 1 - 0.6 * _TITLE / height, title, fontsize=11, va="center", parse_math=False)
    top = _TITLE

    def axes(inches: float) -> "Axes":
        """Adds axes of this height below what is there."""
        nonlocal top
        top += inches
        return figure.add_axes((_LEFT / _WIDTH, 1 - top / height, _ACROSS / _WIDTH, inches / height))

    for row in rows:
        _draw_wave(axes(_WAVE), row, recording)
        top += _BETWEEN
        _draw_row_of_mel(axes(_MEL), row, recording)
        _draw_segments(axes(row.height), row, recording.seconds, colors)
        top += _TICKS
    unit = "minutes:seconds" if recording.seconds > ROW_SECONDS[0] else "seconds"
    figure.text((_LEFT + _ACROSS / 2) / _WIDTH, 1 - (top + 0.2 * _LABEL) / height, unit, ha="center", va="center")
    for number, note in enumerate(notes, start=1):
        place = 1 - (top + _LABEL + _NOTE * (number - 0.5)) / height
        figure.text(_LEFT / _WIDTH, place, note, color=WRONG, va="center", font=_font(), parse_math=False)
    return figure


def _samples(row: _Row, rate: float) -> slice:
    return slice(round(row.begin * rate), round((row.begin + row.seconds) * rate))


def _draw_wave(axes: "Axes", row: _Row, recording: _Recording) -> None:
    """Draws the highest and lowest sample of each pixel."""
    wave = recording.wave[_samples(row, SAMPLE_RATE)]
    pixel = max(1, round(row.seconds * SAMPLE_RATE / (_ACROSS * 150)))
    starts = np.arange(0, len(wave), pixel)
    times = row.begin + starts / SAMPLE_RATE
    if len(wave):
        low, high = np.minimum.reduceat(wave, starts), np.maximum.reduceat(wave, starts)
        axes.fill_between(times, low, high, color="0.25", linewidth=0.4)
    axes.set_xlim(row.begin, row.begin + row.seconds)
    axes.set_ylim(-recording.peak, recording.peak)
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)


def _draw_row_of_mel(axes: "Axes", row: _Row, recording: _Recording) -> None:
    frames = recording.mel.shape[1] / recording.seconds
    mel = recording.mel[:, _samples(row, frames)]
    end = min(row.begin + row.seconds, recording.seconds)
    if mel.shape[1]:
        draw_mel(axes, mel, row.begin, end, levels=recording.levels)
    axes.set_xlim(row.begin, row.begin + row.seconds)
    axes.set_ylabel("Hz", fontsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False)


def _draw_segments(axes: "Axes", row: _Row, seconds: float, colors: Sequence[str]) -> None:
    """Draws in inches: x from the left of the row, y downwards."""
    axes.set_xlim(0, _ACROSS)
    axes.set_ylim(row.height, 0)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    end = min(row.begin + row.seconds, seconds)
    step = _step(row.seconds)
    times = np.arange(math.ceil(round(row.begin / step, 6)), math.floor(round(end / step, 6)) + 1) * step
    clock = _clock_label if seconds > ROW_SECONDS[0] else _seconds_label
    places = ((times - row.begin) / row.seconds * _ACROSS).tolist()
    axes.set_xticks(places, [clock(time) for time in times], fontsize=8)
    axes.grid(axis="x", color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    if end < row.begin + row.seconds:
        axes.spines["bottom"].set_bounds(0, (end - row.begin) / row.seconds * _ACROSS)
    for placed in row.placed:
        _draw_segment(axes, placed, colors[placed.index])
    if row.left_out:
        note = f"and {row.left_out} more here, for which there is no room"
        axes.text(0, row.height - _GAP, note, color=WRONG, va="bottom", font=_font())
    if not row.placed and row.begin == 0 and row.seconds >= seconds:
        axes.text(0, _GAP, "no segment", color="0.4", va="top", style="italic", fontsize=_FONT_SIZE)


def _draw_segment(axes: "Axes", placed: _Placed, color: str) -> None:
    from matplotlib.patches import Rectangle

    segment, middle = placed.segment, placed.top + _BAR / 2 + 0.02
    if segment.end is None:
        axes.plot(placed.left, middle, marker="v", color=color, markersize=6, clip_on=False)
    else:
        width = max(placed.right - placed.left, 0.02)
        face, hatch = ("white", "////////") if segment.is_backwards else (color, None)
        place = (placed.left, placed.top + 0.02)
        axes.add_patch(Rectangle(place, width, _BAR, facecolor=face, edgecolor=color, linewidth=0.8, hatch=hatch))
    for number, line in enumerate(placed.lines):
        y = placed.top + _BAR + 0.045 + _LINE * number
        axes.text(placed.text_left, y, line, va="top", ha="left", font=_font(), parse_math=False)


def _step(seconds: float) -> float:
    """Seconds between two ticks."""
    return next((step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10) if seconds / step <= 15), seconds / 15)


def _seconds_label(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def _clock_label(seconds: float) -> str:
    whole, rest = divmod(round(seconds, 3), 60)
    minutes = int(whole) if whole < 60 else f"{int(whole) // 60}:{int(whole) % 60:02}"
    return f"{minutes}:{rest:06.3f}".rstrip("0").rstrip(".") if rest % 1 else f"{minutes}:{int(rest):02}"
