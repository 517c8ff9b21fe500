"""What the pictures share: colours of labels, the spectrogram, the file. They need matplotlib, the extra `plot`."""

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from moss_audio_jax.audio import RELEASED_MEL
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, atomic_file, reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinguishable with colour blindness, and a few of their shades.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#7570B3", "#8C8C8C", "#A6761D", "#F0E442")
WRONG = "#B00020"  # of what can't be read or can't be right
DOTS_PER_INCH = 150
_HERTZ = (250, 500, 1000, 2000, 4000, 8000)  # ticks of a spectrogram


def require_matplotlib() -> None:
    """Raises MossAudioError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MossAudioError(
            "plots need matplotlib, which is not installed: pip install 'moss-audio-jax[plot]'"
        ) from error


def save_figure(figure: "Figure", path: AnyPath) -> None:
    """Writes a PNG. Raises MossAudioError if it can't be written."""
    try:
        with atomic_file(path) as file:
            figure.savefig(file, dpi=DOTS_PER_INCH, format="png")
    except OSError as error:
        raise MossAudioError(
            f"{path}: expected a picture that can be written, found '{reason(error)}'; choose another."
        ) from error


def label_colors(labels: Iterable[str], known: Iterable[str] = ()) -> dict[str, str]:
    """Returns a colour for each label: fixed for the known ones, usually the same across plots for others."""
    labels = sorted(set(labels))
    colors = {label: color for label, color in zip(known, COLORS, strict=False) if label in labels}
    for label in labels:
        if label not in colors:
            first = zlib.crc32(label.encode()) % len(COLORS)
            free = [color for color in (*COLORS[first:], *COLORS[:first]) if color not in colors.values()]
            colors[label] = free[0] if free else COLORS[first]
    return colors


def draw_mel(
    axes: "Axes", mel: np.ndarray, begin: float, end: float, *, levels: tuple[float, float] | None = None
) -> None:
    """Draws a log-mel [mel bins, frames] from `begin` to `end` seconds, with frequencies at its side.

    levels: lowest and highest value of its colours; None takes those of this mel.
    """
    lowest, highest = levels or (None, None)
    extent = (begin, end, 0, len(mel))
    axes.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=extent, vmin=lowest, vmax=highest)
    axes.set_ylabel("Hz (mel scale)")
    axes.set_yticks([mel_bin(hertz) for hertz in _HERTZ], [f"{hertz:,}" for hertz in _HERTZ], fontsize=8)
    axes.tick_params(labelbottom=False)


def mel_bin(hertz: float) -> float:
    """Position of a frequency on an axis of mel bins; bin i is centred at i + 0.5."""
    highest, bins = RELEASED_MEL.mel_sr / 2, RELEASED_MEL.mel_dim
    return min(_slaney_mel(hertz) / _slaney_mel(highest) * (bins + 1) - 0.5, bins)


def _slaney_mel(hertz: float) -> float:
    """Slaney's mel scale: linear up to 1 kHz, then 27 mel per factor of 6.4."""
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * float(np.log(hertz / 1000) / np.log(6.4))


def text_color(background: str) -> str:
    """Returns black or white, whichever is readable on a colour `#RRGGBB`."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
