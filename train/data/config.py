"""Options of training data: packing, augmentation and sound scenes.

Imports nothing heavy: `--help` needs these classes.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from moss_audio_jax.commands.options import require, require_choice, require_positive
from moss_audio_jax.errors import MossAudioError
from train.data.budget import Budget

Strategy = Literal["best_fit", "first_fit"]
Answers = Literal["all", "last"]
Thoughts = Literal["learn", "mask"]
Oversize = Literal["skip", "truncate", "refuse"]

LABELS = ("tone", "chirp", "click", "noise", "dial", "hum")  # of scenes, by default
DRUMS = ("kick", "tom", "snare", "clap", "hat")
SOUND_NAMES = (*LABELS, "siren", *DRUMS)
BACKGROUNDS = ("white", "pink", "brown")
TASK_NAMES = (
    *("timeline", "words", "transcript", "caption", "start", "duration", "what_at"),
    *("pitch", "fine_pitch", "loudness", "fine_loudness", "voice", "speaker", "drum"),
)
SHORTEST_EVENT = 0.1  # seconds
SEEDS = 2**32  # number of seeds that scenes can have
SPEED_STEPS = 100  # speeds are multiples of 1/100, so that resampling filters stay short


@dataclass(frozen=True)
class DataConfig:
    """Packing of examples into batches."""

    batch_size: int
    """Packed sequences in a global batch."""
    tokens: int
    """Tokens of a packed sequence."""
    chunks: int
    """Audio chunks (4 s each) of a packed sequence. `packing.balanced_chunks` computes the number that suits the
    tokens."""
    open_bins: int = 4
    """Sequences that each row of the batch fills at the same time. More bins leave less padding and read more examples
    ahead: this number of batches. docs/training.md has measured fill rates."""
    strategy: Strategy = "best_fit"
    """Open sequence that takes an example: best_fit: the fullest one with room; first_fit: the oldest one."""
    grow: tuple[str, ...] = ()
    """STEP=FACTOR: after this step a batch has FACTOR times as many sequences, in as many more microbatches. Give
    several in the order of their steps."""
    answers: Answers = "all"
    """Supervise all answers of a conversation, or only the last one."""
    thoughts: Thoughts = "learn"
    """Supervise the thoughts at the start of answers, or mask them: they are then input only."""
    label_times: bool = True
    """Auxiliary labels of audio tokens (--step.audio-label-weight) are also digits of the time, not events alone."""
    default_prompt: str = ""
    """Prompt of a conversation that has audio and a blank prompt, or none."""
    oversize: Oversize = "skip"
    """Handling of an example longer than a sequence. skip: leave it out and count it (`too_long`). truncate: cut it
    after the last supervised token that fits, drop clips after that, and count it (`truncated`); skip it if no
    supervised token is left. refuse: stop the run. Plain text is never too long: it is split."""
    max_skip_rate: float = 0.05
    """Stop the run if more than this share of a row's examples can't be read."""
    max_unused_rate: float = 0.5
    """Stop the run if more than this share of a row's examples is too long or has no labels for the objectives."""
    max_skips_in_a_row: int = 64
    """Stop the run if none of this many consecutive examples of a group, in one row of the batch, can be used."""

    def __post_init__(self):
        require_positive(self, "data.", "batch_size", "open_bins", "max_skips_in_a_row")
        for name, choices in (("oversize", Oversize), ("strategy", Strategy), ("answers", Answers)):
            require_choice(self, "data.", name, get_args(choices))
        require_choice(self, "data.", "thoughts", get_args(Thoughts))
        require(self, "data.", ("max_skip_rate", "max_unused_rate"), lambda rate: 0 <= rate <= 1, "from 0 to 1")
        _ = self._growth  # is checked

    @property
    def budget(self) -> Budget:
        """Budget of one packed sequence."""
        return Budget(self.tokens, self.chunks)

    @cached_property
    def _growth(self) -> list[tuple[int, int]]:
        """(batches before the change, factor), in order."""
        pairs = [text.partition("=") for text in self.grow]
        if any(not (step.isdecimal() and factor.isdecimal() and int(factor)) for step, _, factor in pairs):
            raise MossAudioError(f"--data.grow must be STEP=FACTOR, such as 1000=2, not {' '.join(self.grow)!r}")
        growth = [(int(step), int(factor)) for step, _, factor in pairs]
        if growth != sorted(set(growth)):
            raise MossAudioError(f"--data.grow must have its steps in order, not {' '.join(self.grow)}")
        return growth

    def growth(self, batches: int) -> int:
        """Factor of `batch_size` for the batch that follows this many batches."""
        return next((factor for begin, factor in reversed(self._growth) if batches >= begin), 1)


@dataclass(frozen=True)
class ColumnsConfig:
    """Names of columns of data that is no manifest: Parquet, Arrow, TSV, NeMo's JSON lines, WebDataset (docs/data.md).

    They are for all such data of a command. Data sets whose columns differ are made into shards first, by `prepare`.
    """

    audio: str | None = None
    """Column of the audio: paths, or bytes. Default: the first of audio, audio_filepath, path and file."""
    text: str | None = None
    """Column of the transcript. Default: the first of text, txt, sentence, transcription, transcript and
    normalized_text."""
    caption: str | None = None
    """Column of a description. Default: caption."""
    words: str | None = None
    """Column of the words with their times, a list of {word, start, end} or {text, start, end}. Default: words."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training audio, never of evaluation audio. Off by default."""

    speeds: tuple[float, ...] = ()
    """Speed factors from 0.5 to 2, such as 0.9 1.0 1.1; one is drawn uniformly for each example. Times of labels
    follow. Audio of a conversation keeps its speed, as does audio that would be too long if slower."""
    gain_db: tuple[float, float] = (0.0, 0.0)
    """Bounds of the change of level, drawn for each clip, in dB."""
    noise: tuple[str, ...] = ()
    """Sources of noise to add: `white`, `pink`, manifests and shard directories, drawn uniformly. Clips of a manifest
    are drawn uniformly too; a short one is repeated, a long one is cropped."""
    noise_probability: float = 0.5
    """Probability that an example gets noise, if there is any."""
    snr_db: tuple[float, float] = (5.0, 20.0)
    """Bounds of the signal-to-noise ratio, both as mean power, in dB."""
    frequency_masks: int = 0
    """Masks over mel bins for each clip; SpecAugment's LD policy has 2."""
    frequency_width: int = 27
    """Largest width of a frequency mask, in mel bins of 128."""
    time_masks: int = 0
    """Masks over time for each 10 s of a clip, or the rest of it; SpecAugment's LD policy comes to 1."""
    time_width: float = 1.0
    """Longest time mask, in seconds; at most a fifth of the clip."""
    mask_probability: float = 1.0
    """Probability that an example gets masks, if there are any."""

    def __post_init__(self):
        for speed in self.speeds:
            if not (0.5 <= speed <= 2 and math.isclose(speed * SPEED_STEPS, round(speed * SPEED_STEPS))):
                raise MossAudioError(f"--augment.speeds must be hundredths from 0.5 to 2, such as 0.95, not {speed}")
        levels = "a lower and an upper bound in dB"
        require(self, "augment.", ("gain_db", "snr_db"), lambda db: -100 <= db[0] <= db[1] <= 100, levels)
        require(
            self, "augment.", ("noise_probability", "mask_probability"), lambda share: 0 <= share <= 1, "from 0 to 1"
        )
        masks = ("frequency_masks", "frequency_width", "time_masks", "time_width")
        require(self, "augment.", masks, lambda value: 0 <= value < math.inf, "0 or more")

    @property
    def masks(self) -> bool:
        """True if the log-mel is masked."""
        return bool(self.frequency_masks or self.time_masks)

    @property
    def on(self) -> bool:
        """True if anything varies."""
        return bool(self.speeds or self.gain_db != (0, 0) or self.noise or self.masks)


def _is_background(name: str) -> bool:
    return name in BACKGROUNDS or "/" in name


@dataclass(frozen=True)
class SceneConfig:
    """Sound scenes. Pairs are the bounds of a uniform draw; equal bounds fix the value."""

    seconds: tuple[float, float] = (8.0, 8.0)
    """Length of a scene, drawn in steps of a mel frame (10 ms)."""
    events: tuple[int, int] = (1, 4)
    """Number of events. A scene too short for the number drawn has as many as fit. The timeline of a scene without
    events is `nothing`."""
    labels: tuple[str, ...] = LABELS
    """Classes to draw from; a class named twice is drawn twice as often. tone: steady; chirp: gliding; click: a row of
    clicks; noise: a burst; dial: DTMF digits; hum: a low buzz; siren: not in the default, for a model to learn
    later; kick, tom, snare, clap, hat: drums, which are not in the default either."""
    event_seconds: tuple[float, float] = (0.3, 1.5)
    """Length of an event, in seconds."""
    clips: str | None = None
    """Directory of short recordings, of any audio format, that are events too. They are decoded and resampled once, and
    kept in the cache directory."""
    label_from: str = "folder"
    """Source of a recording's label. folder: its directory's name. A pattern of its name without the ending, such as
    `{label}_*` or `{label}_{voice}_*`; one with `/` is of its path below the directory. Or a CSV file with the columns
    `file` (or filename, path) and `label` (or category, class), and `voice` (or speaker) if there is one."""
    label_names: tuple[str, ...] = ()
    """LABEL=NAME: text for a label that was found, such as 7=seven."""
    clips_only: tuple[str, ...] = ()
    """Globs over paths below the directory: take only recordings that match one. A directory's name takes its files."""
    clips_except: tuple[str, ...] = ()
    """Globs over paths below the directory: leave out recordings that match one."""
    clip_share: float = 1.0
    """Share of the events that are recordings, if there are any. The others are drawn from `labels`."""
    clip_trim_db: float = 40.0
    """Cut both ends of a recording where it is this much below its peak, in dB, so that its times are those of the
    sound. 0: cut nothing."""
    speed: tuple[float, float] = (1.0, 1.0)
    """Factor of the speed of a recording, which changes its pitch too."""
    gap: float = 0.2
    """Minimum seconds of background between two events and at both ends of a scene."""
    overlap: bool = False
    """Let events overlap. `gap` then holds only at the ends of the scene."""
    pause: tuple[float, float] | None = None
    """Seconds between an event and the next; below 0 they overlap. Default: events are anywhere. `gap` then holds only
    at the ends of the scene."""
    level_db: tuple[float, float] = (-24.0, -6.0)
    """Peak of an event, in dB of full scale."""
    reverberation: tuple[float, float] = (0.0, 0.0)
    """Seconds in which the reverberation of a scene's events falls by 60 dB. 0: none. Ends of events are without it."""
    background_db: tuple[float, float] = (-65.0, -50.0)
    """Root mean square of the background noise, in dB of full scale."""
    backgrounds: tuple[str, ...] = BACKGROUNDS
    """Backgrounds to draw from: colours of noise, and directories of recordings, which are cut or repeated."""
    tasks: tuple[str, ...] = ("timeline",)
    """Questions to draw from; a name given twice is drawn twice as often. timeline: of events, in tenths of a second;
    words: the events as words, in hundredths; transcript: without times; fine_pitch: which of two is higher by one or
    two semitones; fine_loudness: louder by 2.5 to 3.5 dB; voice: whether two recordings have the same voice; speaker:
    name of the first voice, or the second, and so on; drum: the same of drums."""
    questions: int = 1
    """Questions about one scene in a training example, one turn each; fewer if the scene has none left."""

    def __post_init__(self):
        pairs = ("seconds", "events", "event_seconds", "level_db", "background_db", "speed", "pause", "reverberation")
        require(self, None, pairs, lambda pair: pair[0] <= pair[1], "a lower and an upper bound")
        for name, known in (("labels", SOUND_NAMES), ("tasks", TASK_NAMES)):
            chosen = f"some of {', '.join(known)}"
            require(self, None, (name,), lambda found, known=known: bool(found) and set(found) <= set(known), chosen)
        require(self, None, ("events",), lambda events: events[0] >= 0 and events[1] >= 1, "0 or more, and 1 or more")
        require_positive(self, None, "questions")
        require(
            self, None, ("event_seconds",), lambda seconds: seconds[0] >= SHORTEST_EVENT, f"{SHORTEST_EVENT} or more"
        )
        require(self, None, ("gap",), lambda gap: gap >= 0, "0 or more")
        places = f"some of {', '.join(BACKGROUNDS)}, or directories of recordings, such as ./rain"
        require(self, None, ("backgrounds",), lambda names: bool(names) and all(map(_is_background, names)), places)
        require(self, None, ("speed",), lambda speed: speed[0] >= 0.5 and speed[1] <= 2, "from 0.5 to 2")
        require(self, None, ("clip_share",), lambda share: 0 <= share <= 1, "from 0 to 1")
        require(self, None, ("clip_trim_db",), lambda decibels: decibels >= 0, "0 or more")
        longest = "0 to 10, in seconds"
        require(self, None, ("reverberation",), lambda seconds: seconds[0] >= 0 and seconds[1] <= 10, longest)
        named = "LABEL=NAME, such as 7=seven"
        require(
            self, None, ("label_names",), lambda names: all(re.fullmatch("[^=]+=.+", name) for name in names), named
        )
        if self.clips is None:
            clip_options = ("label_names", "clips_only", "clips_except")
            given = next((name for name in clip_options if getattr(self, name)), None)
            given = "label_from" if self.label_from != "folder" else given
            if given:
                raise MossAudioError(f"{given} is about the recordings of clips: give clips too, or leave it out")
        shortest = self.event_seconds[1] + 2 * self.gap
        holds = f"{shortest:g} s or more, for the longest event of {self.event_seconds[1]} s and twice {self.gap} s"
        require(self, None, ("seconds",), lambda seconds: seconds[0] >= self.event_seconds[1] + 2 * self.gap, holds)
        require(self, None, ("level_db",), lambda level: level[1] <= 0, "0 or less, full scale")
