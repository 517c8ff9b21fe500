"""Sound scenes made on the fly: what can be heard, when it starts and ends, and questions about it.

    scene = make_scene(seed=0, index=7, config=SceneConfig())
    scene.wave, scene.events            # float32 [128000]; (Event("tone", 2.703, 3.512, ...), ...)
    task = make_task(seed=0, index=7, config=SceneConfig(tasks=("timeline", "start")))
    task.question, task.answer          # "When does the tone start?", "2.7"

Scene number `index` depends on the seed, its index and the configuration alone, so any worker can make any scene, in
any order. Some hundreds of 8-second scenes a second on one core.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.errors import MossAudioError
from train.data.config import SceneConfig
from train.data.manifest import Clip, Example, Message, TimedText
from train.data.mixture import ENDLESS
from train.data.objectives import EVENT_DECIMALS, PROMPTS, TIME_QUESTIONS, timeline


@dataclass(frozen=True)
class Event(TimedText):
    """A sound. `text` is its label; `start` and `end` are where its samples begin and end, to the sample.

    level_db: its peak, in dB of full scale.
    pitch_hz: at its start and at its end; None for sounds without pitch.
    """

    level_db: float
    pitch_hz: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class ScenePlan:
    """All that can be asked about a scene: events in order of their start, and the colour of the background."""

    samples: int
    events: tuple[Event, ...]
    background: str
    background_db: float

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE


@dataclass(frozen=True, eq=False)
class Scene(ScenePlan):
    """wave: float32 [samples], mono at 16 kHz, within [-1, 1]."""

    wave: np.ndarray


@dataclass(frozen=True, eq=False)
class SceneTask:
    """A scene with a question and its answer; `name` is one of `TASKS`. more: questions and answers that follow."""

    name: str
    scene: Scene
    question: str
    answer: str
    more: tuple[tuple[str, str], ...] = ()

    def example(self, name: str = "a scene") -> Example:
        """As a line of a manifest: a conversation about the clip, and the labels beside it."""
        clip = Clip(self.scene.wave, name=name)
        turns = [Message("user", (clip, self.question)), Message("assistant", (self.answer,))]
        for question, answer in self.more:
            turns += [Message("user", (question,)), Message("assistant", (answer,))]
        return Example(
            name=name, conversation=tuple(turns), clip=clip, caption=caption(self.scene), events=self.scene.events
        )


@dataclass(frozen=True)
class SceneExamples(Sequence[Example]):
    """Scenes with their questions as a data set, made when they are read. An epoch is `count` of them."""

    config: SceneConfig
    seed: int
    count: int = ENDLESS  # none is met twice

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return make_task(self.seed, index, self.config).example(f"scene {index} of seed {self.seed}")


def make_scene(seed: int, index: int, config: SceneConfig) -> Scene:
    """Scene number `index` of a seed; both are 0 or more."""
    rng = _generator(seed, index, stream=0)
    return _synthesize(_draw_plan(config, rng), rng)


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, stream)))


_ATTEMPTS = 1000


def make_task(seed: int, index: int, config: SceneConfig) -> SceneTask:
    """Draws one of the tasks, then scenes until one fits it (the first is that of `make_scene`), then more questions.

    Raises MossAudioError if no scene of this configuration does.
    """
    rng = _generator(seed, index, stream=_ATTEMPTS)
    name = str(rng.choice(config.tasks))
    for attempt in range(_ATTEMPTS):
        scene_rng = _generator(seed, index, stream=attempt)
        plan = _draw_plan(config, scene_rng)
        asked = TASKS[name](plan, rng)
        if asked is not None:
            more = [TASKS[str(rng.choice(config.tasks))](plan, rng) for _ in range(config.questions - 1)]
            others = tuple(dict.fromkeys(pair for pair in more if pair is not None and pair != asked))
            return SceneTask(name, _synthesize(plan, scene_rng), *asked, more=others)
    raise MossAudioError(
        f"scenes: no scene in {_ATTEMPTS} of this configuration can be asked the task {name!r}; "
        "allow the events it needs or leave it out."
    )


# Layouts

_FRAME = SAMPLE_RATE // 100
_TONE_HZ = (300.0, 3000.0)
_HUM_HZ = (60.0, 160.0)
_CHIRP_HZ = (400.0, 1600.0)  # its lower end
_CHIRP_RATIO = (1.8, 4.0)


def _draw_plan(config: SceneConfig, rng: np.random.Generator) -> ScenePlan:
    samples = round(rng.uniform(*config.seconds) * SAMPLE_RATE / _FRAME) * _FRAME
    count = rng.integers(config.events[0], config.events[1] + 1)
    lengths = np.round(rng.uniform(*config.event_seconds, count) * SAMPLE_RATE).astype(int)
    starts, lengths = _place(samples, lengths, round(config.gap * SAMPLE_RATE), config.overlap, rng)
    events = tuple(
        Event(
            text=label,
            start=float(start / SAMPLE_RATE),
            end=float((start + length) / SAMPLE_RATE),
            level_db=float(rng.uniform(*config.level_db)),
            pitch_hz=_draw_pitch(label, rng),
        )
        for start, length, label in zip(starts, lengths, map(str, rng.choice(config.labels, len(starts))), strict=True)
    )
    return ScenePlan(samples, events, str(rng.choice(config.backgrounds)), float(rng.uniform(*config.background_db)))


def _place(
    samples: int, lengths: np.ndarray, gap: int, overlap: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Starts, in order, and lengths of the events that fit, in samples; all arrangements are equally likely."""
    if overlap:
        starts = gap + np.floor(rng.random(len(lengths)) * (samples - 2 * gap - lengths + 1)).astype(int)
        order = np.argsort(starts, kind="stable")
        return starts[order], lengths[order]
    fitting = int(np.sum(np.cumsum(lengths + gap) + gap <= samples))
    lengths = lengths[:fitting]
    free = samples - gap - int(np.sum(lengths + gap))
    before = np.sort(rng.integers(0, free + 1, fitting))  # free samples before each event
    return before + gap + np.cumsum(lengths + gap) - (lengths + gap), lengths


def _draw_pitch(label: str, rng: np.random.Generator) -> tuple[float, float] | None:
    if label == "chirp":
        low, ratio = _log_uniform(_CHIRP_HZ, rng), _log_uniform(_CHIRP_RATIO, rng)
        return (low, low * ratio) if rng.random() < 0.5 else (low * ratio, low)
    if label in ("tone", "hum"):
        pitch = _log_uniform(_TONE_HZ if label == "tone" else _HUM_HZ, rng)
        return pitch, pitch
    return None


def _log_uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


# Waves


def _synthesize(plan: ScenePlan, rng: np.random.Generator) -> Scene:
    wave = _colored_noise(plan.samples, _SLOPES[plan.background], rng) * _gain(plan.background_db)
    for event in plan.events:
        first, last = round(event.start * SAMPLE_RATE), round(event.end * SAMPLE_RATE)
        sound = SOUNDS[event.text](event, last - first, rng)
        wave[first:last] += sound * (_gain(event.level_db) / np.abs(sound).max())
    loudest = np.abs(wave).max()
    if loudest > 1:  # events that overlap; scaled together, so that comparisons of loudness stay true
        wave /= loudest
    return Scene(**vars(plan), wave=wave)


def _gain(decibels: float) -> np.float32:
    return np.float32(10 ** (decibels / 20))


_SLOPES = {"white": 0.0, "pink": -0.5, "brown": -1.0}  # exponents of frequency, in amplitude
_LOWEST_NOISE_HZ = 20.0


def _colored_noise(samples: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of amplitude proportional to frequency ** slope and a root mean square of 1: float32 [samples]."""
    if slope:
        spectrum = rng.standard_normal((samples // 2 + 1, 2), np.float32).view(np.complex64)[:, 0]
        noise = np.asarray(scipy.fft.irfft(spectrum * _spectral_shape(samples, slope), samples))
    else:
        noise = rng.standard_normal(samples, np.float32)
    return noise / np.sqrt(np.mean(np.square(noise)))


@lru_cache(maxsize=64)
def _spectral_shape(samples: int, slope: float) -> np.ndarray:
    hertz = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    return (np.maximum(hertz, _LOWEST_NOISE_HZ) ** slope * (hertz >= _LOWEST_NOISE_HZ)).astype(np.float32)


_RAMP = 0.005  # seconds in which a sound rises and falls: no clicks, and an onset exact to a few ms


def _ramped(sound: np.ndarray) -> np.ndarray:
    ramp = np.linspace(0, 1, round(_RAMP * SAMPLE_RATE), dtype=np.float32)
    sound[: len(ramp)] *= ramp
    sound[-len(ramp) :] *= ramp[::-1]
    return sound


def _seconds(samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.float32) / SAMPLE_RATE


def _tone(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """A glide on a logarithmic scale from the first pitch to the second; a steady sine if they are equal."""
    assert event.pitch_hz is not None
    first, last = event.pitch_hz
    hertz = np.float32(first) * np.exp(np.linspace(0, np.log(last / first), samples, dtype=np.float32))
    cycles = np.cumsum(hertz, dtype=np.float64) / SAMPLE_RATE + rng.random()
    return _ramped(np.sin(2 * np.pi * (cycles % 1).astype(np.float32)))


_HARMONICS = 12


def _hum(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Harmonics that fall with 1 / k, at random phases."""
    assert event.pitch_hz is not None
    k = np.arange(1, _HARMONICS + 1, dtype=np.float32)[:, None]
    phases = rng.uniform(0, 2 * np.pi, k.shape).astype(np.float32)
    waves = np.sin(np.float32(2 * np.pi * event.pitch_hz[0]) * k * _seconds(samples) + phases)
    return _ramped((waves / k).sum(0))


def _noise(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    return _ramped(rng.standard_normal(samples, np.float32))


_CLICK = 0.02  # seconds
_CLICK_DECAY = 0.004
_CLICKS_PER_SECOND = (6.0, 14.0)


def _clicks(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Decaying bursts of noise, equally loud and evenly spaced; the first begins and the last ends with the event."""
    click = _seconds(round(_CLICK * SAMPLE_RATE))
    count = max(2, round(rng.uniform(*_CLICKS_PER_SECOND) * samples / SAMPLE_RATE))
    bursts = rng.standard_normal((count, len(click)), np.float32) * np.exp(-click / _CLICK_DECAY)
    bursts /= np.abs(bursts).max(axis=1, keepdims=True)
    starts = np.linspace(0, samples - len(click), count).astype(int)
    sound = np.zeros(samples, np.float32)
    sound[starts[:, None] + np.arange(len(click))] = bursts
    return sound


_KEY_ROWS = np.array([697, 770, 852, 941], np.float32)  # Hz, ITU-T Q.23
_KEY_COLUMNS = np.array([1209, 1336, 1477, 1633], np.float32)
_KEYS_PER_SECOND = 6
_KEY_PAUSE = 0.05  # seconds


def _dial(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Random DTMF keys, evenly spaced; the first begins and the last ends with the event."""
    seconds = _seconds(samples)
    count = max(1, round(_KEYS_PER_SECOND * samples / SAMPLE_RATE))
    period = (samples / SAMPLE_RATE + _KEY_PAUSE) / count
    key = np.minimum(seconds / period, count - 1).astype(int)
    since = seconds - (key * period).astype(np.float32)
    gate = np.clip(np.minimum(since, np.float32(period - _KEY_PAUSE) - since) / _RAMP, 0, 1)
    row, column = rng.choice(_KEY_ROWS, count)[key], rng.choice(_KEY_COLUMNS, count)[key]
    return gate * (np.sin(2 * np.pi * row * since) + np.sin(2 * np.pi * column * since))


_SIREN_HZ = (500.0, 1200.0)  # its lowest pitch
_SIREN_RATIO = (1.6, 2.4)
_SIREN_TURNS_PER_SECOND = (2.0, 5.0)


def _siren(event: Event, samples: int, rng: np.random.Generator) -> np.ndarray:
    """A pitch that goes up and down on a logarithmic scale."""
    lowest, octaves = _log_uniform(_SIREN_HZ, rng), np.log2(rng.uniform(*_SIREN_RATIO))
    turns = rng.uniform(*_SIREN_TURNS_PER_SECOND) * _seconds(samples) + rng.random()
    cycles = np.cumsum(lowest * 2 ** (octaves * (0.5 - 0.5 * np.cos(2 * np.pi * turns)))) / SAMPLE_RATE
    return _ramped(np.sin(2 * np.pi * (cycles % 1).astype(np.float32)))


SOUNDS: dict[str, Callable[[Event, int, np.random.Generator], np.ndarray]] = {
    "tone": _tone,
    "chirp": _tone,
    "click": _clicks,
    "noise": _noise,
    "dial": _dial,
    "hum": _hum,
    "siren": _siren,
}

# Tasks: a question and its answer, or None if the scene does not allow it

Asked = tuple[str, str] | None

PITCH_RATIO = 1.2  # at least, between two sounds whose pitch is compared: three semitones
LOUDNESS_DB = 6.0  # at least, between two whose loudness is compared
_COMPARISONS = {
    "pitch": ("Which {0} is higher, the first or the second?", "Is the first or the second {0} higher in pitch?"),
    "loudness": ("Which {0} is louder, the first or the second?", "Is the first or the second {0} louder?"),
}
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_MARGIN = 0.1  # seconds at least between a time that is asked about and the nearest onset or offset
_QUIET_SHARE = 0.25  # of the questions what is heard at a time


def _ask(wordings: tuple[str, ...], subject: str, rng: np.random.Generator) -> str:
    return str(rng.choice(wordings)).format(subject)


def _ask_timeline(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _ask(PROMPTS["events"], "", rng), timeline(plan.events, EVENT_DECIMALS)


def _ask_caption(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _ask(PROMPTS["caption"], "", rng), caption(plan)


def _ask_start(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    subject, event = _pick_event(plan, rng)
    return _ask(TIME_QUESTIONS["start"], subject, rng), f"{event.start:.{EVENT_DECIMALS}f}"


def _ask_duration(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    subject, event = _pick_event(plan, rng)
    return _ask(TIME_QUESTIONS["duration"], subject, rng), f"{event.end - event.start:.{EVENT_DECIMALS}f}"


def _pick_event(plan: ScenePlan, rng: np.random.Generator) -> tuple[str, Event]:
    """An event and its name in a question: "the tone", or "the second tone" where there are several."""
    names: list[tuple[str, Event]] = []
    labels = [event.text for event in plan.events]
    for index, event in enumerate(plan.events):
        earlier = labels[:index].count(event.text)
        if labels.count(event.text) == 1:
            names.append((f"the {event.text}", event))
        elif earlier < len(_ORDINALS):
            names.append((f"the {_ORDINALS[earlier]} {event.text}", event))
    return names[rng.integers(len(names))]


def _ask_what_at(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    times = np.arange(1, int(plan.seconds * 10)) / 10
    starts, ends = (np.array([getattr(event, side) for event in plan.events]) for side in ("start", "end"))
    edges = np.concatenate([starts, ends])
    times = times[(np.abs(times[:, None] - edges) > _MARGIN - 1e-6).all(1)]
    heard = (starts < times[:, None]) & (times[:, None] < ends)
    wanted = heard.any(1) != (rng.random() < _QUIET_SHARE)
    if not wanted.any():
        return None
    index = rng.choice(np.flatnonzero(wanted))
    labels = [event.text for event, is_heard in zip(plan.events, heard[index], strict=True) if is_heard]
    question = _ask(TIME_QUESTIONS["what_at"], f"{times[index]:.{EVENT_DECIMALS}f}", rng)
    return question, ", ".join(labels) or "nothing"


def _ask_pitch(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    def octaves(first: Event, second: Event) -> float:
        if first.text not in ("tone", "hum") or not first.pitch_hz or not second.pitch_hz:
            return 0.0
        return float(np.log2(first.pitch_hz[0] / second.pitch_hz[0]))

    return _compare("pitch", plan, octaves, float(np.log2(PITCH_RATIO)), rng)


def _ask_loudness(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _compare("loudness", plan, lambda first, second: first.level_db - second.level_db, LOUDNESS_DB, rng)


def _compare(
    task: str,
    plan: ScenePlan,
    excess: Callable[[Event, Event], float],
    least: float,
    rng: np.random.Generator,
) -> Asked:
    """Asks about two sounds that are the only ones of their label, and that differ by `least` or more."""
    pairs = []
    for label in dict.fromkeys(event.text for event in plan.events):
        same = [event for event in plan.events if event.text == label]
        if len(same) == 2 and abs(excess(*same)) >= least:
            pairs.append(same)
    if not pairs:
        return None
    first, second = pairs[rng.integers(len(pairs))]
    return _ask(_COMPARISONS[task], first.text, rng), "first" if excess(first, second) > 0 else "second"


TASKS: dict[str, Callable[[ScenePlan, np.random.Generator], Asked]] = {
    "timeline": _ask_timeline,
    "caption": _ask_caption,
    "start": _ask_start,
    "duration": _ask_duration,
    "what_at": _ask_what_at,
    "pitch": _ask_pitch,
    "loudness": _ask_loudness,
}

_PHRASES = {
    "tone": "a tone",
    "click": "a row of clicks",
    "noise": "a burst of noise",
    "dial": "dialled digits",
    "hum": "a hum",
    "siren": "a siren",
}
_BACKGROUND_PHRASES = {"white": "a faint hiss", "pink": "a faint rushing", "brown": "a faint rumble"}


def caption(plan: ScenePlan) -> str:
    """The events in words, in order of their start: `A tone, then a hum, over a faint hiss.`"""
    phrases = [_PHRASES.get(event.text) or _chirp_phrase(event) for event in plan.events]
    sentence = f"{', then '.join(phrases)}, over {_BACKGROUND_PHRASES[plan.background]}."
    return sentence[0].upper() + sentence[1:]


def _chirp_phrase(event: Event) -> str:
    assert event.pitch_hz is not None
    return f"a {'rising' if event.pitch_hz[0] < event.pitch_hz[1] else 'falling'} chirp"
