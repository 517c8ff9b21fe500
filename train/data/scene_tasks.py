"""Questions about sound scenes. A task maps a plan to a question and its answer, or None if it does not apply."""

from collections.abc import Callable, Sequence

import numpy as np

from train.data.config import DRUMS
from train.data.manifest import TimedText
from train.data.objectives import EVENT_DECIMALS, PROMPTS, SPEECH_DECIMALS, TIME_QUESTIONS, timeline
from train.data.scene_synthesis import Event, ScenePlan

Asked = tuple[str, str] | None

PITCH_RATIO = 1.2  # minimum between two compared pitches: three semitones
LOUDNESS_DB = 6.0  # minimum between two compared levels
FINE_PITCH_RATIOS = (2 ** (1 / 12), 2 ** (2 / 12))  # of a fine comparison
FINE_LOUDNESS_DB = (2.5, 3.5)
SPEECH_TASKS = ("words", "transcript")  # events are words
_COMPARISONS = {
    "pitch": ("Which {0} is higher, the first or the second?", "Is the first or the second {0} higher in pitch?"),
    "loudness": ("Which {0} is louder, the first or the second?", "Is the first or the second {0} louder?"),
}
_VOICE_QUESTIONS = ("Do both words have the same voice?", "Does one person say both words?")
_SPEAKER_QUESTIONS = ("Who says the {0} word?", "Whose voice is the {0} one?")
_DRUM_QUESTIONS = ("Which drum is the {0} one?", "What is the {0} drum?")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
NOTHING = "nothing"  # is heard
_MARGIN = 0.1  # minimum seconds between a time that is asked about and any onset or offset
_QUIET_SHARE = 0.25  # of `what_at` questions: the share whose answer is NOTHING


def _ask(wordings: tuple[str, ...], subject: str, rng: np.random.Generator) -> str:
    return str(rng.choice(wordings)).format(subject)


def _ask_timeline(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _ask(PROMPTS["events"], "", rng), timeline(plan.events, EVENT_DECIMALS) or NOTHING


def _ask_words(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    words = timeline(plan.events, SPEECH_DECIMALS)
    return (_ask(PROMPTS["transcribe_words"], "", rng), words) if words else None


def _ask_transcript(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    words = transcript(plan.events)
    return (_ask(PROMPTS["transcribe"], "", rng), words) if words else None


def transcript(words: Sequence[TimedText]) -> str:
    """Joins the texts of words."""
    return " ".join(word.text for word in words)


def _ask_caption(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _ask(PROMPTS["caption"], "", rng), caption(plan)


def _ask_start(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    if not plan.events:
        return None
    subject, event = _pick_event(plan, rng)
    return _ask(TIME_QUESTIONS["start"], subject, rng), f"{event.start:.{EVENT_DECIMALS}f}"


def _ask_duration(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    if not plan.events:
        return None
    subject, event = _pick_event(plan, rng)
    return _ask(TIME_QUESTIONS["duration"], subject, rng), f"{event.end - event.start:.{EVENT_DECIMALS}f}"


def _pick_event(plan: ScenePlan, rng: np.random.Generator) -> tuple[str, Event]:
    """Draws an event; returns its name in a question ("the tone", or "the second tone" of several) and the event."""
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
    # Candidate times [n] in tenths of a second, away from all edges; heard [n, events].
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
    return question, ", ".join(labels) or NOTHING


def _ask_pitch(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _compare("pitch", plan, _octaves, (float(np.log2(PITCH_RATIO)), np.inf), rng)


def _ask_fine_pitch(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    least, most = np.log2(FINE_PITCH_RATIOS)
    return _compare("pitch", plan, _octaves, (least, most), rng)


def _octaves(first: Event, second: Event) -> float:
    if first.text not in ("tone", "hum") or not first.pitch_hz or not second.pitch_hz:
        return 0.0
    return float(np.log2(first.pitch_hz[0] / second.pitch_hz[0]))


def _ask_loudness(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _compare("loudness", plan, _decibels, (LOUDNESS_DB, np.inf), rng)


def _ask_fine_loudness(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _compare("loudness", plan, _decibels, FINE_LOUDNESS_DB, rng)


def _decibels(first: Event, second: Event) -> float:
    return first.level_db - second.level_db


def _compare(
    name: str,
    plan: ScenePlan,
    excess: Callable[[Event, Event], float],
    bounds: tuple[float, float],
    rng: np.random.Generator,
) -> Asked:
    """Compares the only two sounds of a label, if `excess` of one over the other has a size within the bounds."""
    pairs = []
    for label in dict.fromkeys(event.text for event in plan.events):
        same = [event for event in plan.events if event.text == label]
        if len(same) == 2 and bounds[0] <= abs(excess(*same)) <= bounds[1]:
            pairs.append(same)
    if not pairs:
        return None
    first, second = pairs[rng.integers(len(pairs))]
    return _ask(_COMPARISONS[name], first.text, rng), "first" if excess(first, second) > 0 else "second"


def _ask_voice(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    voices = [event.voice for event in plan.events if event.voice]
    wanted = bool(rng.integers(2))
    if len(voices) != 2 or (voices[0] == voices[1]) != wanted:
        return None
    return _ask(_VOICE_QUESTIONS, "", rng), "yes" if wanted else "no"


def _ask_speaker(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _ask_which(_SPEAKER_QUESTIONS, [event.voice for event in plan.events if event.voice], rng)


def _ask_drum(plan: ScenePlan, rng: np.random.Generator) -> Asked:
    return _ask_which(_DRUM_QUESTIONS, [event.text for event in plan.events if event.text in DRUMS], rng)


def _ask_which(wordings: tuple[str, ...], names: Sequence[str], rng: np.random.Generator) -> Asked:
    """Asks for the first of the names, or the second, and so on."""
    if not names:
        return None
    index = int(rng.integers(min(len(names), len(_ORDINALS))))
    return _ask(wordings, _ORDINALS[index], rng), names[index]


TASKS: dict[str, Callable[[ScenePlan, np.random.Generator], Asked]] = {
    "timeline": _ask_timeline,
    "words": _ask_words,
    "transcript": _ask_transcript,
    "caption": _ask_caption,
    "start": _ask_start,
    "duration": _ask_duration,
    "what_at": _ask_what_at,
    "pitch": _ask_pitch,
    "fine_pitch": _ask_fine_pitch,
    "loudness": _ask_loudness,
    "fine_loudness": _ask_fine_loudness,
    "voice": _ask_voice,
    "speaker": _ask_speaker,
    "drum": _ask_drum,
}

BALANCED = ("voice",)  # the answer is drawn once, and scenes until one has it, so that a rare answer is as likely

_PHRASES = {
    "tone": "a tone",
    "click": "a row of clicks",
    "noise": "a burst of noise",
    "dial": "dialled digits",
    "hum": "a hum",
    "siren": "a siren",
    "kick": "a kick drum",
    "tom": "a tom",
    "snare": "a snare drum",
    "clap": "a clap",
    "hat": "a hi-hat",
}
_BACKGROUND_PHRASES = {"white": "a faint hiss", "pink": "a faint rushing", "brown": "a faint rumble"}


def caption(plan: ScenePlan) -> str:
    """Describes the events in order of their start: `A tone, then a hum, over a faint hiss.`"""
    background = _BACKGROUND_PHRASES.get(plan.background, "other sound")
    sentence = f"{', then '.join(map(_phrase, plan.events)) or NOTHING}, over {background}."
    return sentence[0].upper() + sentence[1:]


def _phrase(event: Event) -> str:
    if event.recording is not None:
        return event.text
    if event.text != "chirp":
        return _PHRASES[event.text]
    assert event.pitch_hz is not None
    return f"a {'rising' if event.pitch_hz[0] < event.pitch_hz[1] else 'falling'} chirp"
