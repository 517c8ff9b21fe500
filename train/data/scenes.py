"""Synthetic sound scenes, made on the fly: audio, timed events, and questions with answers.

    scene = make_scene(seed=0, index=7, config=SceneConfig())
    scene.wave, scene.events            # float32 [128000]; (Event("tone", 2.703, 3.512, ...), ...)
    task = make_task(seed=0, index=7, config=SceneConfig(tasks=("timeline", "start")))
    task.question, task.answer          # "When does the tone start?", "2.7"

A scene depends on the seed, its index and the configuration alone: any worker can make any scene, in any order.
One core makes hundreds of 8-second scenes per second.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.errors import MossAudioError
from train.data.config import BACKGROUNDS, SceneConfig
from train.data.manifest import Clip, Example, Message
from train.data.mixture import ENDLESS
from train.data.recordings import Recordings, open_recordings
from train.data.scene_synthesis import Event, Scene, ScenePlan, log_uniform, synthesize
from train.data.scene_tasks import BALANCED, SPEECH_TASKS, TASKS, caption, transcript


@dataclass(frozen=True, eq=False)
class SceneTask:
    """A scene, a question and its answer. name: a key of `TASKS`. more: further questions and answers."""

    name: str
    scene: Scene
    question: str
    answer: str
    more: tuple[tuple[str, str], ...] = ()

    def example(self, name: str = "a scene") -> Example:
        """Returns an example as from a manifest: a conversation about the clip, and labels."""
        clip = Clip(self.scene.wave, name=name)
        turns = [Message("user", (clip, self.question)), Message("assistant", (self.answer,))]
        for question, answer in self.more:
            turns += [Message("user", (question,)), Message("assistant", (answer,))]
        words = self.scene.events if self.name in SPEECH_TASKS else ()
        return Example(
            name=name,
            conversation=tuple(turns),
            clip=clip,
            caption=caption(self.scene),
            text=transcript(words),
            words=words,
            events=self.scene.events,
        )


@dataclass(frozen=True)
class SceneExamples(Sequence[Example]):
    """Data set of scenes with questions, made when they are read."""

    config: SceneConfig
    seed: int
    count: int = ENDLESS  # no scene is repeated

    def __len__(self) -> int:
        return self.count

    @property
    def facts(self) -> dict[str, str]:
        """Facts of the data beside the configuration, which a resumed run compares."""
        recordings = event_recordings(self.config)
        return {} if recordings is None else {"recordings": recordings.sha256}

    def __getitem__(self, index: int) -> Example:
        return make_task(self.seed, index, self.config).example(f"scene {index} of seed {self.seed}")


def make_scene(seed: int, index: int, config: SceneConfig) -> Scene:
    """Makes scene number `index` of a seed; both are 0 or more."""
    rng = _generator(seed, index, stream=0)
    return _synthesize(_draw_plan(config, rng), config, rng)


def _synthesize(plan: ScenePlan, config: SceneConfig, rng: np.random.Generator) -> Scene:
    noise = None if plan.background in BACKGROUNDS else open_recordings(plan.background)
    return synthesize(plan, rng, event_recordings(config), noise)


@lru_cache(maxsize=8)
def event_recordings(config: SceneConfig) -> Recordings | None:
    """Opens the recordings of a configuration; None if it has none.

    Raises MossAudioError if there are none, one has no label, or one is too long for a scene.
    """
    if config.clips is None:
        return None
    recordings = open_recordings(
        config.clips,
        config.label_from,
        names=config.label_names,
        only=config.clips_only,
        without=config.clips_except,
        trim_db=config.clip_trim_db,
    )
    longest = int(np.argmax(recordings.lengths))
    seconds = recordings.lengths[longest] / SAMPLE_RATE / config.speed[0]
    if seconds + 2 * config.gap > config.seconds[0]:
        raise MossAudioError(
            f"{recordings.names[longest]} takes {seconds:.2f} s, and with {config.gap:g} s at both ends it does not "
            f"fit into scenes of {config.seconds[0]:g} s: make scenes longer, or leave it out by clips_except"
        )
    return recordings


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, stream)))


_ATTEMPTS = 1000


def make_task(seed: int, index: int, config: SceneConfig) -> SceneTask:
    """Draws a task, then scenes until the task applies to one (the first is that of `make_scene`), then more questions.

    Raises MossAudioError if the task applies to no scene.
    """
    rng = _generator(seed, index, stream=_ATTEMPTS)
    name = str(rng.choice(config.tasks))
    for attempt in range(_ATTEMPTS):
        scene_rng = _generator(seed, index, stream=attempt)
        plan = _draw_plan(config, scene_rng)
        asking = copy.deepcopy(rng) if name in BALANCED else rng
        asked = TASKS[name](plan, asking)
        if asked is not None:
            more = [TASKS[str(asking.choice(config.tasks))](plan, asking) for _ in range(config.questions - 1)]
            others = tuple(dict.fromkeys(pair for pair in more if pair is not None and pair != asked))
            return SceneTask(name, _synthesize(plan, config, scene_rng), *asked, more=others)
    raise MossAudioError(
        f"scenes: no scene in {_ATTEMPTS} of this configuration can be asked the task {name!r}; "
        "allow the events it needs or leave it out."
    )


# Plans: what sounds when

_FRAME = SAMPLE_RATE // 100
_TONE_HZ = (300.0, 3000.0)
_HUM_HZ = (60.0, 160.0)
_CHIRP_HZ = (400.0, 1600.0)  # the lower end
_CHIRP_RATIO = (1.8, 4.0)


def _draw_plan(config: SceneConfig, rng: np.random.Generator) -> ScenePlan:
    samples = round(rng.uniform(*config.seconds) * SAMPLE_RATE / _FRAME) * _FRAME
    count = int(rng.integers(config.events[0], config.events[1] + 1))
    recordings = event_recordings(config)
    chosen = _draw_recordings(recordings, count, config, rng)
    lengths = np.round(rng.uniform(*config.event_seconds, count) * SAMPLE_RATE).astype(int)
    if recordings is not None:
        played = np.round(recordings.lengths[chosen] / rng.uniform(*config.speed, count)).astype(int)
        lengths = np.where(chosen >= 0, played, lengths)
    starts, order = _place(samples, lengths, config, rng)
    drawn = zip(starts, lengths[order], chosen[order].tolist(), rng.choice(config.labels, len(starts)), strict=True)
    events = []
    for start, length, number, label in drawn:
        times = float(start / SAMPLE_RATE), float((start + length) / SAMPLE_RATE)
        level_db = float(rng.uniform(*config.level_db))
        if number < 0 or recordings is None:
            events.append(Event(str(label), *times, level_db, _draw_pitch(label, rng)))
        else:
            found = recordings.labels[number], *times, level_db
            events.append(Event(*found, recording=number, voice=recordings.voices[number]))
    background = str(rng.choice(config.backgrounds)), float(rng.uniform(*config.background_db))
    return ScenePlan(samples, tuple(events), *background, float(rng.uniform(*config.reverberation)))


def _draw_recordings(
    recordings: Recordings | None, count: int, config: SceneConfig, rng: np.random.Generator
) -> np.ndarray:
    """Draws the recordings of events, labels uniformly; -1 for synthetic sounds."""
    if recordings is None:
        return np.full(count, -1)
    chosen = [recordings.draw(rng) for _ in range(count)]
    return np.where(rng.random(count) < config.clip_share, chosen, -1)


def _place(
    samples: int, lengths: np.ndarray, config: SceneConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted starts, in samples, and which of the events they are of: those that fit.

    Without pauses all arrangements are equally likely.
    """
    gap = round(config.gap * SAMPLE_RATE)
    if config.pause is not None and len(lengths):
        pauses = np.round(rng.uniform(*config.pause, len(lengths)) * SAMPLE_RATE).astype(int)
        steps = np.maximum(lengths + pauses, 0)[:-1]  # an event does not begin before the last one
        starts = np.concatenate([[0], np.cumsum(steps)])
        ends = np.maximum.accumulate(starts + lengths)
        fitting = int(np.sum(ends <= samples - 2 * gap))
        free = samples - 2 * gap - int(ends[fitting - 1])
        return starts[:fitting] + gap + rng.integers(0, free + 1), np.arange(fitting)
    if config.overlap:
        starts = gap + np.floor(rng.random(len(lengths)) * (samples - 2 * gap - lengths + 1)).astype(int)
        order = np.argsort(starts, kind="stable")
        return starts[order], order
    fitting = int(np.sum(np.cumsum(lengths + gap) + gap <= samples))
    lengths = lengths[:fitting]
    free = samples - gap - int(np.sum(lengths + gap))
    before = np.sort(rng.integers(0, free + 1, fitting))  # free samples before each event
    return before + gap + np.cumsum(lengths + gap) - (lengths + gap), np.arange(fitting)


def _draw_pitch(label: str, rng: np.random.Generator) -> tuple[float, float] | None:
    if label == "chirp":
        low, ratio = log_uniform(_CHIRP_HZ, rng), log_uniform(_CHIRP_RATIO, rng)
        return (low, low * ratio) if rng.random() < 0.5 else (low * ratio, low)
    if label in ("tone", "hum"):
        pitch = log_uniform(_TONE_HZ if label == "tone" else _HUM_HZ, rng)
        return pitch, pitch
    return None
