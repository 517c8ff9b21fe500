"""Objectives: labels of an example -> question and answer, as in the published pretraining.

    transcribe            speech as text                      hello there
    transcribe_words      with times of words                 [0.00]hello[0.31][0.35]there[0.80]
    transcribe_sentences  with times of sentences             [0.00]hello there[2.01][2.01]the weather is nice[4.32]
    caption               description                         Rain on a roof, then thunder.
    events                sounds and their times              [2.7]tone[3.5][3.7]noise[4.5]
    time_qa               one question about a time           When does the tone start? -> 2.7
    conversation          the example's own turns
    plain_text            the example's text, not as a conversation

In a mixture, `labels` stands for those of the first five that a clip without a conversation has labels for. Each has
several prompts; the random generator of the example draws one.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moss_audio_jax.errors import MossAudioError
from train.data.manifest import Example, Message, TimedText

Rendered = tuple[Message, ...] | str  # turns of a conversation, or plain text
LABELS = "labels"


class NothingToAsk(MossAudioError):
    """No objective applies to an example."""


@dataclass(frozen=True)
class Objective:
    """applies: True if an example has the labels. render: makes question and answer, or plain text."""

    applies: Callable[[Example], bool]
    render: Callable[[Example, np.random.Generator], Rendered]


def render(example: Example, rng: np.random.Generator, shares: Mapping[str, float] | None = None) -> Rendered:
    """Draws an objective that applies to the example, and renders it.

    shares: weights of the objectives; None: all the same. Raises NothingToAsk if none applies.
    """
    shares = dict.fromkeys(OBJECTIVES, 1.0) if shares is None else shares
    possible = applying(example, shares)
    if not possible:
        raise nothing_to_ask(example, shares, "add labels or choose other objectives")
    weights = np.array(list(possible.values()))
    name = list(possible)[rng.choice(len(possible), p=weights / weights.sum())]
    return OBJECTIVES[name].render(example, rng)


def applying(example: Example, shares: Mapping[str, float]) -> dict[str, float]:
    """Returns the shares of the objectives that apply to an example; the share of `labels` is divided evenly."""
    found: dict[str, float] = {}
    for name, share in shares.items():
        asked: Iterable[str] = (name,)
        if name == LABELS:
            asked = () if example.conversation else PROMPTS
        possible = [one for one in asked if share > 0 and OBJECTIVES[one].applies(example)]
        found |= {one: found.get(one, 0.0) + share / len(possible) for one in possible}
    return found


def nothing_to_ask(example: Example, objectives: Iterable[str], advice: str) -> NothingToAsk:
    """Makes the error for an example that no objective applies to; it lists what the example has."""
    keys = {"audio": example.clip and not example.conversation, **vars(example)}
    kinds = ("conversation", "audio", "text", "caption", "words", "segments", "events")
    found = ", ".join(repr(kind) for kind in kinds if keys[kind])
    return NothingToAsk(
        f"{example.name}: expected what the objectives {', '.join(objectives)} ask about, found only {found}; {advice}."
    )


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises MossAudioError unless `shares` names objectives and gives at least one of them a share."""
    known = (*OBJECTIVES, LABELS)
    unknown = sorted(set(shares) - set(known))
    if unknown:
        raise MossAudioError(f"expected objectives out of {', '.join(known)}, found {unknown[0]!r}; correct it.")
    if not all(0 <= share < np.inf for share in shares.values()) or sum(shares.values()) == 0:
        raise MossAudioError(
            f"expected shares of objectives of 0 or more, and one above 0, found {dict(shares)}; correct them."
        )


def timeline(labels: Sequence[TimedText], decimals: int) -> str:
    """Formats labels as `[start]text[end]`, times in seconds, the format in which MOSS-Audio's authors evaluate."""
    return "".join(f"[{label.start:.{decimals}f}]{label.text}[{label.end:.{decimals}f}]" for label in labels)


# Questions with several wordings and one answer

SPEECH_DECIMALS = 2  # an encoder token is 0.08 s
EVENT_DECIMALS = 1

PROMPTS: dict[str, tuple[str, ...]] = {
    "transcribe": (
        "Transcribe the audio.",
        "Write down what is said.",
        "What is said in this recording?",
        "Give the transcript of the speech.",
        "Turn the speech into text.",
    ),
    "transcribe_words": (
        "Transcribe the audio with the start and end time of every word.",
        "Write down each word with its timestamps.",
        "Give the transcript with word-level timestamps.",
        "When is each word spoken? Put the times around the words.",
    ),
    "transcribe_sentences": (
        "Transcribe the audio with the start and end time of every sentence.",
        "Write down each sentence with its timestamps.",
        "Give the transcript with sentence-level timestamps.",
        "When is each sentence spoken? Put the times around the sentences.",
    ),
    "caption": (
        "Describe the audio.",
        "What can be heard?",
        "Describe the sounds of this recording.",
        "Write a caption for this clip.",
    ),
    "events": (
        "List the sounds with their start and end times.",
        "Which sounds are heard, and when?",
        "Give a timeline of the sound events.",
        "When does each sound start and end?",
    ),
}


def _asked(name: str, answer: Callable[[Example], str]) -> Objective:
    """Makes an objective that applies if `answer` is not empty, and asks one of its prompts."""

    def ask(example: Example, rng: np.random.Generator) -> Rendered:
        return _dialogue(example, str(rng.choice(PROMPTS[name])), answer(example))

    return Objective(lambda example: example.clip is not None and answer(example) != "", ask)


def _dialogue(example: Example, question: str, answer: str) -> Rendered:
    assert example.clip is not None
    return Message("user", (example.clip, question)), Message("assistant", (answer,))


# Questions about a time

TIME_QUESTIONS: dict[str, tuple[str, ...]] = {
    "start": ("When does {0} start?", "At what second does {0} begin?", "How many seconds in does {0} start?"),
    "end": ("When does {0} end?", "At what second does {0} stop?", "Until what second is {0} heard?"),
    "duration": ("How long does {0} last?", "For how many seconds is {0} heard?"),
    "what_at": ("What is heard at {0} seconds?", "Which sound is there {0} seconds in?"),
    "first": ("Which starts first, {0} or {1}?", "Which of the two comes first: {0} or {1}?"),
}


_CLEARLY_LATER = 0.1  # seconds


def _time_qa(example: Example, rng: np.random.Generator) -> Rendered:
    labels = example.events or example.segments or example.words
    quote = (lambda text: f"the {text}") if example.events else (lambda text: f'"{text}"')
    texts = [label.text for label in labels]
    unique = [label for label in labels if texts.count(label.text) == 1]
    pairs = [(a, b) for a, b in itertools.pairwise(unique) if b.start - a.start >= _CLEARLY_LATER]
    kinds = ["what_at"] + ["start", "end", "duration"] * bool(unique) + ["first"] * bool(pairs)
    kind = str(rng.choice(kinds))
    if kind == "what_at":
        label = labels[rng.integers(len(labels))]
        time = float(f"{rng.uniform(0.25, 0.75) * (label.end - label.start) + label.start:.2f}")
        heard = [other.text for other in labels if other is label or other.start <= time <= other.end]
        named, answer = [f"{time:.2f}"], ", ".join(heard)
    elif kind == "first":
        pair = pairs[rng.integers(len(pairs))]
        named, answer = [quote(pair[i].text) for i in rng.permutation(2)], pair[0].text
    else:
        label = unique[rng.integers(len(unique))]
        seconds = {"start": label.start, "end": label.end, "duration": label.end - label.start}[kind]
        named, answer = [quote(label.text)], f"{seconds:.{EVENT_DECIMALS}f}"
    return _dialogue(example, str(rng.choice(TIME_QUESTIONS[kind])).format(*named), answer)


OBJECTIVES: dict[str, Objective] = {
    "transcribe": _asked("transcribe", lambda example: example.text),
    "transcribe_words": _asked("transcribe_words", lambda example: timeline(example.words, SPEECH_DECIMALS)),
    "transcribe_sentences": _asked("transcribe_sentences", lambda example: timeline(example.segments, SPEECH_DECIMALS)),
    "caption": _asked("caption", lambda example: example.caption),
    "events": _asked("events", lambda example: timeline(example.events, EVENT_DECIMALS)),
    "time_qa": Objective(
        lambda example: example.clip is not None and bool(example.events or example.segments or example.words), _time_qa
    ),
    "conversation": Objective(lambda example: bool(example.conversation), lambda example, _: example.conversation),
    "plain_text": Objective(
        lambda example: example.clip is None and bool(example.text), lambda example, _: example.text
    ),
}
