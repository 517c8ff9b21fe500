"""Cuts a recording into windows that the model can read, at quiet places near their ends.

    samples of a window -> energy of each 20 ms -> moving mean over 0.3 s -> the quietest place in the last 30 s

If that place is quiet, at least 10 dB below the window's own level, the recording is cut there. Otherwise the next
window begins a few seconds before the end of this one, and `seams` keeps once what both say.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.errors import MossAudioError

SHORTEST_WINDOW = 5.0  # seconds
_FRAME = SAMPLE_RATE // 50
_PAUSE = 15  # frames of the moving mean, 0.3 s
_QUIET = 10 ** (-10 / 10)  # of the window's mean energy
_LOUDEST = 0.99  # the loudest hundredth of a window counts as this quantile: one bang makes speech no pause
_ABOUT_AS_QUIET = 10 ** (3 / 10)  # the middle of the longest place that is this quiet is taken, not the very minimum


@dataclass(frozen=True)
class Cutting:
    """How a recording is cut.

    window: seconds of a window at most. search: seconds before its end in which a quiet place is looked for.
    overlap: seconds that two windows share where there is none.
    """

    window: float = 300.0
    search: float = 30.0
    overlap: float = 5.0

    def __post_init__(self):
        if not SHORTEST_WINDOW <= self.window < np.inf:
            raise MossAudioError(f"a window must have {SHORTEST_WINDOW:g} s or more, not {self.window:g}")
        if not (0 < self.search <= self.window / 2 and 0 < self.overlap <= self.window / 4):
            raise MossAudioError(
                f"search and overlap must be above 0 and at most a half and a quarter of the window's {self.window:g} "
                f"s, not {self.search:g} and {self.overlap:g}"
            )

    @classmethod
    def of(cls, window: float) -> "Cutting":
        """Returns the cutting for a length of windows: search and overlap are smaller for short ones."""
        return cls(window, min(cls.search, window / 3), min(cls.overlap, window / 5))


@dataclass(frozen=True)
class Place:
    """The place of a window in its recording, in seconds.

    overlap: how much of its beginning the window before holds too; 0 after a quiet place.
    last: True if the recording ends with it.
    """

    begin: float
    end: float
    overlap: float = 0.0
    last: bool = False


@dataclass(frozen=True)
class Window:
    """A part of a recording. wave: float32 [samples] at 16 kHz."""

    place: Place
    wave: np.ndarray


def cut(waves: Iterable[np.ndarray], cutting: Cutting) -> Iterator[Window]:
    """Yields the windows of a recording that comes in pieces, float32 [samples] at 16 kHz.

    Holds one window and one piece. A recording of at most one window is one window.
    """
    held = np.empty(_frames(cutting.window), np.float32)
    count, begin, overlap = 0, 0, 0

    def window(end: int, last: bool) -> Window:
        times = begin / SAMPLE_RATE, (begin + end) / SAMPLE_RATE, overlap / SAMPLE_RATE
        return Window(Place(*times, last), held[:end].copy())

    for wave in waves:
        while len(wave):
            if count == len(held):
                place = quiet_place(held, cutting)
                end, after = (len(held), len(held) - _frames(cutting.overlap)) if place is None else (place, place)
                yield window(end, last=False)
                count, begin, overlap = len(held) - after, begin + after, end - after
                held[:count] = held[after:].copy()
            taken = min(len(wave), len(held) - count)
            held[count : count + taken] = wave[:taken]
            count, wave = count + taken, wave[taken:]
    if count:
        yield window(count, last=True)


def _frames(seconds: float) -> int:
    """Returns seconds as samples of whole frames."""
    return int(seconds * SAMPLE_RATE) // _FRAME * _FRAME


def quiet_place(wave: np.ndarray, cutting: Cutting) -> int | None:
    """Returns the sample of a whole window at which to cut; None if no place near its end is clearly quieter."""
    frames = wave.reshape(-1, _FRAME)
    energy = np.einsum("ij,ij->i", frames, frames) / _FRAME - np.square(frames.mean(1))  # without a constant offset
    energy = np.maximum(energy, 0.0)
    level = np.minimum(energy, np.quantile(energy, _LOUDEST)).mean()
    smooth = np.convolve(energy, np.full(_PAUSE, 1 / _PAUSE), "valid")  # [i] is the mean of frames i to i + _PAUSE - 1
    first = max(0, len(frames) - _frames(cutting.search) // _FRAME)
    near_end = smooth[first:-_PAUSE]  # what follows the place is never shorter than a pause
    least = near_end.min()
    if least > _QUIET * level:
        return None
    quiet = np.concatenate([[False], near_end <= min(_ABOUT_AS_QUIET * least, _QUIET * level), [False]])
    begins, ends = np.flatnonzero(np.diff(quiet.astype(np.int8))).reshape(-1, 2).T
    longest = len(begins) - 1 - int(np.argmax((ends - begins)[::-1]))  # the last of those
    return (first + (int(begins[longest]) + int(ends[longest]) - 1) // 2 + _PAUSE // 2) * _FRAME
