"""Manifests: JSON lines of audio, labels, conversations and texts, read as checked examples.

A line is one of three kinds. A conversation in the format of MOSS-Audio's fine-tuning data; it may have a system
message, several turns, and several clips, each of which may be cut:

    {"conversation": [{"role": "user", "message_type": "audio", "content": "a.wav", "start": 1.5, "end": 9},
                      {"role": "user", "message_type": "text", "content": "Transcribe the audio."},
                      {"role": "assistant", "message_type": "text", "content": "Hello."}]}

A clip and its labels, at least one of them; `objectives` makes conversations from them:

    {"audio": "a.wav", "start": 1.5, "end": 9, "text": "what is said", "caption": "what is heard",
     "words": [{"text": "what", "start": 1.6, "end": 1.8}], "segments": [...], "events": [...]}

Or text without audio: {"text": "..."}.

An answer may begin with a thought, `<think>...</think>`. Clips are in the order of the messages; texts have no
placeholders for them. A conversation about one clip may have labels too. All times are seconds from the start of the
file, also for a cut clip. Words and segments are sorted by start; events need not be. Other keys, such as `duration`,
are ignored and counted by `train check`; `id` and `meta` are reserved for the user. Errors are: a key that looks like a
misspelling or a cut (`evnts`, `start_time`, `offset`), a key given twice, and an unknown key in a line without audio.

As in MOSS-Audio's fine-tuning script, a user's text may be blank or absent beside a clip (`samples.with_prompt` inserts
a default prompt), and an audio message may lack its role.

Paths are relative to the manifest's directory, or gs://bucket/file; other URLs are refused. Absolute paths and `..` are
allowed, as in the released format: review the paths of a manifest from strangers before `prepare` copies the files they
name. Shards contain the audio and no paths.
"""

import difflib
import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from moss_audio_jax.audio import SAMPLE_RATE, load_audio, num_samples
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.prompts import AUDIO_SPAN, ROLES
from moss_audio_jax.storage.paths import AnyPath, Path, is_remote, join, local_copy, read_lines, reason, to_path
from moss_audio_jax.storage.retries import retried
from train.data.line_index import content_hash, index_lines, line_name

THOUGHT_BEGIN, THOUGHT_END = "<think>", "</think>"  # begin and end of a Thinking model's thought
AUDIO_MARKS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
TIME_TOLERANCE = 0.1  # seconds of rounding allowed in times, about one encoder token


@dataclass(frozen=True, eq=False)
class Clip:
    """Audio that is decoded when needed.

    audio: a path, the bytes of an audio file, or a mono wave, float32 [samples] at 16 kHz.
    start, end: of the part to use, in seconds; None is the start or end of the file.
    name: in errors.
    """

    audio: str | bytes | np.ndarray
    start: float | None = None
    end: float | None = None
    name: str = "a clip"

    def wave(self) -> np.ndarray:
        """Decodes to float32 [samples] at 16 kHz. Raises MossAudioError if it can't be read."""
        if not isinstance(self.audio, np.ndarray):
            return load_audio(self.audio, start=self.start, end=self.end, name=self.name)
        first = 0 if self.start is None else round(self.start * SAMPLE_RATE)
        last = len(self.audio) if self.end is None else round(self.end * SAMPLE_RATE)
        return self.audio[first:last]

    def num_samples(self) -> int:
        """Length of `wave` according to the file's header, without decoding. Raises MossAudioError if unreadable."""
        if not isinstance(self.audio, np.ndarray):
            return num_samples(self.audio, start=self.start, end=self.end, name=self.name)
        return len(self.wave())


@dataclass(frozen=True)
class AudioBytes:
    """Bytes of an audio file in place of its path, in rows that hold them. name: of the file, in errors."""

    content: bytes
    name: str


@dataclass(frozen=True)
class TimedText:
    """A word, sentence or sound label, and its times in seconds from the start of the clip."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: texts and clips of one role."""

    role: str
    content: tuple[str | Clip, ...]


@dataclass(frozen=True)
class Example:
    """One checked line of a manifest. Absent fields are empty.

    name: place of origin, for errors and logs.
    conversation: turns; the last one is an answer.
    clip: the audio that the labels describe.
    text: transcript of the clip; without a clip, plain text to train on.
    ignored: unknown keys, each with its place in the line.
    """

    name: str
    conversation: tuple[Message, ...] = ()
    clip: Clip | None = None
    text: str = ""
    caption: str = ""
    words: tuple[TimedText, ...] = ()
    segments: tuple[TimedText, ...] = ()
    events: tuple[TimedText, ...] = ()
    ignored: tuple[str, ...] = ()

    def require_labels_within(self, seconds: float) -> None:
        """Raises MossAudioError if a label ends after the clip. seconds: length of the clip."""
        labels = (*self.words, *self.segments, *self.events)
        latest = max(labels, key=lambda label: label.end, default=None)
        if latest is not None and latest.end > seconds + TIME_TOLERANCE:
            first = (self.clip and self.clip.start) or 0.0
            raise MossAudioError(
                f"{self.name}: expected labels within the clip, which ends at {first + seconds:.2f} s, found "
                f"{latest.text!r} from {first + latest.start:g} to {first + latest.end:g} s; correct the times."
            )


class Manifest(Sequence[Example]):
    """Examples of a JSON-lines file. Lines stay on disk; memory holds their places only (`line_index`).

    A manifest on gs:// is copied to a local disk, its audio is not.

    The first opening checks every line, by all processors (about 60,000 lines per second on each). Raises
    MossAudioError for the first invalid one.
    """

    def __init__(self, path: AnyPath):
        self.path = to_path(path)
        self._directory = str(self.path.parent)
        with _readable(self.path):
            self.local = local_copy(path)
            _require_lines(self.path, self.local)
            self._lines = index_lines(self.path, self.local, functools.partial(parse_line, directory=self._directory))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        line, name = self.line(index)
        return parse_line(line, name, self._directory)

    def digest(self) -> str:
        """Returns a hash of the file."""
        return content_hash(self.local)

    def line(self, index: int) -> tuple[bytes, str]:
        """Returns a line as bytes, and its name in errors."""
        return retried(self.path, lambda: self._line(index)), line_name(self.path, self._lines.number(index))

    def _line(self, index: int) -> bytes:
        with open(self.local, "rb") as file:
            file.seek(self._lines.begin(index))
            return file.readline()


def checked_lines(path: Path, local: pathlib.Path) -> Iterator[Example | MossAudioError]:
    """Yields the example or the error of each line that is not blank.

    local: the manifest or a copy of it. Raises MossAudioError if it can't be read or has no lines.
    """
    directory = str(path.parent)
    with _readable(path):
        _require_lines(path, local)
        for number, line in enumerate(read_lines(local), start=1):
            if line.strip():
                try:
                    yield parse_line(line, line_name(path, number), directory)
                except MossAudioError as error:
                    yield error


def _require_lines(path: Path, local: pathlib.Path) -> None:
    """Raises MossAudioError for a file without lines, and for a JSON array or an object over several lines."""
    first = next((line for line in read_lines(local) if line.strip()), None)
    if first is None:
        raise MossAudioError(f"{path}: expected a manifest of JSON lines, found no line; check the path.")
    begins = first.removeprefix(b"\xef\xbb\xbf").strip()
    kind, program = ("an array", ".[]") if begins.startswith(b"[") else ("an object over several lines", ".")
    if begins.startswith(b"[") or begins == b"{":
        raise MossAudioError(
            f"{path} must be JSON lines, one object in each, not {kind}: convert it with "
            f"`jq -c '{program}' {path.name} > {path.stem}.jsonl`"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MossAudioError(
            f"{path}: expected a readable manifest, found '{reason(error)}'; check the path."
        ) from error


def parse_line(line: bytes, name: str, directory: str) -> Example:
    """Parses a line of a manifest in `directory`. Raises MossAudioError that begins with `name`."""
    return _Line(name, directory).example(parse_json(line, name))


def parse_content(content: dict[str, Any], name: str, directory: str) -> Example:
    """Checks a row that has the keys of a manifest's line; `audio` may be AudioBytes. Errors are as of `parse_line`."""
    return _Line(name, directory, kind="row").example(content)


def parse_json(line: bytes, name: str) -> Any:
    """Parses a line of JSON lines. Raises MossAudioError that begins with `name`."""
    try:
        text = line.decode("utf-8-sig")
        content = _DECODER.decode(text)
        if "\\u" in text:  # an escape may be half a character
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeError as error:
        raise MossAudioError(
            f"{name}: expected text in UTF-8, found none ({error}); save the file as UTF-8."
        ) from error
    except _RepeatedKey as error:
        raise MossAudioError(
            f"{name}: expected each key once in an object, found {error}; correct the line."
        ) from error
    except (ValueError, RecursionError) as error:
        raise MossAudioError(f"{name}: expected a JSON object, found none ({error}); correct the line.") from error


class _RepeatedKey(ValueError):
    """A key occurs twice in a JSON object. Python's parser would silently keep the last value."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(f"{next(key for key in keys if keys.count(key) > 1)!r} twice")
    return content


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


class _PathText:
    """Type of a value: the path of a file."""


class _Prompt:
    """Type of a value: a text that may be blank."""


# Keys and types of their values, by kind of line or message.
_LABELS: dict[str, type] = {"text": str, "caption": str, "words": list, "segments": list, "events": list}
_CUT: dict[str, type] = {"start": float, "end": float}
_IGNORED: dict[str, type] = {"id": object, "meta": object}
_CONVERSATION_LINE = {"conversation": list, **_LABELS, **_IGNORED}
_AUDIO_LINE = {"audio": _PathText, **_CUT, **_LABELS, **_IGNORED}
_TEXT_LINE = {"text": str, **_IGNORED}
_TIMED_TEXT = {"text": str, **_CUT}
_TEXT_MESSAGE = {"role": str, "message_type": str, "content": str}
_AUDIO_MESSAGE = {**_TEXT_MESSAGE, "content": _PathText, **_CUT}
_PROMPT_MESSAGE = {**_TEXT_MESSAGE, "content": _Prompt}
_IN_ORDER = ("words", "segments")  # speech; events are often listed by kind
_DATA_URL = re.compile(r"data:[^,]*;base64,")
_PLACEHOLDER = re.compile(f"{AUDIO_SPAN.pattern}|{'|'.join(map(re.escape, AUDIO_MARKS))}")

_TYPE_NAMES = {
    str: "a text that is not blank",
    _Prompt: "a text",
    _PathText: "the path of one audio file (of several clips each has a message of its own)",
    list: "a list that is not empty",
    float: "a time of 0 s or more",
}


class _Line:
    """Parser of a line. Every method raises MossAudioError if the content is invalid."""

    def __init__(self, name: str, directory: str, kind: str = "line"):
        self.name = name
        self.kind = kind
        self.directory = directory
        self.ignored: list[str] = []

    def fail(self, expected: str, found: str) -> NoReturn:
        raise MossAudioError(f"{self.name}: expected {expected}, found {found}; correct the {self.kind}.")

    def example(self, content: Any) -> Example:
        if not isinstance(content, dict):
            self.fail("a JSON object", _shortened(content))
        if "conversation" in content:
            self.check(content, "the line", _CONVERSATION_LINE, required=("conversation",))
            conversation = tuple(self.turns(content["conversation"]))
            clips = [piece for turn in conversation for piece in turn.content if isinstance(piece, Clip)]
            if len(clips) != 1 and any(label in content for label in _LABELS):
                self.fail("labels beside a conversation about one clip", f"{len(clips)} clips")
            return self.labelled(content, conversation, clips[0] if len(clips) == 1 else None)
        if "audio" in content:
            self.check(content, "the line", _AUDIO_LINE, required=("audio",))
            if not any(label in content for label in _LABELS):
                self.fail(f"labels beside 'audio' ({', '.join(_LABELS)})", f"only {', '.join(content)}")
            return self.labelled(content, (), self.clip(content, "audio"))
        if "text" in content:
            self.check(content, "a line without audio", _TEXT_LINE, required=("text",), only=True)
            return Example(self.name, text=content["text"])
        self.fail("'conversation', 'audio' or 'text'", f"the keys {_shortened(list(content))}")

    def labelled(self, content: dict, conversation: tuple[Message, ...], clip: Clip | None) -> Example:
        return Example(
            self.name,
            conversation,
            clip,
            content.get("text", "").strip(),
            content.get("caption", "").strip(),
            *(tuple(self.timed_texts(content, key, clip)) for key in ("words", "segments", "events")),
            ignored=tuple(self.ignored),
        )

    def turns(self, messages: list) -> Iterator[Message]:
        """Joins consecutive messages of one role into turns; checks that the last one is an answer."""
        turns: list[tuple[str, list[str | Clip]]] = []
        for number, message in enumerate(messages, start=1):
            where = f"message {number}"
            message = self.message(message, where)
            role, kind = message["role"], message["message_type"]
            is_audio = kind == "audio"
            if role not in ROLES or kind not in ("audio", "text"):
                found = f"{role!r} and {kind!r} in {where}"
                self.fail(f"a role of {', '.join(ROLES)} and a message_type of audio, text", found)
            if is_audio and role != "user":
                self.fail("audio from the user only", f"{where} with audio from {role}")
            if role == "system" and turns and turns[0][0] != "system":
                self.fail("system messages first", f"{where} from system")
            if not turns or turns[-1][0] != role:
                turns.append((role, []))
            # White space at both ends is stripped, as in MOSS-Audio's fine-tuning script.
            piece = self.clip(message, "content") if is_audio else message["content"].strip()
            turns[-1][1].extend([piece] if piece else [])
        roles = [role for role, _ in turns if role != "system"]
        if roles[:1] != ["user"] or roles[-1] != "assistant":
            found = ", ".join(roles) or "none"
            self.fail("a conversation from a user's message to an assistant's", f"the roles {found}")
        for role, content in turns:
            if role == "user" and not content:
                self.fail("a text or audio from the user", "a blank text alone")
            if role == "user" and not any(isinstance(piece, str) for piece in content):
                content.append("")  # an empty line after the clip, as for a blank prompt
            if role == "assistant":
                self.thought("\n".join(map(str, content)))
        self.placeholders([piece for _, content in turns for piece in content])
        return (Message(role, tuple(content)) for role, content in turns)

    def message(self, message: Any, where: str) -> dict:
        """Checks a message; adds an absent role or text."""
        if isinstance(message, dict) and message.get("message_type") == "audio":
            message = {"role": "user"} | message
            types = _AUDIO_MESSAGE
        elif isinstance(message, dict) and message.get("role") == "user":
            message = {"content": ""} | message
            types = _PROMPT_MESSAGE
        else:
            types = _TEXT_MESSAGE
        self.check(message, where, types, required=_TEXT_MESSAGE)
        return message

    def thought(self, answer: str) -> None:
        """Checks that a thought has an end, and text after it."""
        _, end, after = answer.rpartition(THOUGHT_END)
        if end and not after.strip():
            self.fail(f"an answer after {THOUGHT_END}", "none")
        if THOUGHT_BEGIN in answer and not end:
            self.fail(f"{THOUGHT_END} after {THOUGHT_BEGIN}", "none")

    def placeholders(self, pieces: list[str | Clip]) -> None:
        found = sum(len(_PLACEHOLDER.findall(piece)) for piece in pieces if isinstance(piece, str))
        if found:
            clips = sum(isinstance(piece, Clip) for piece in pieces)
            self.fail(
                "clips in messages of their own and no placeholder in a text", f"{clips} clips, {found} placeholders"
            )

    def clip(self, content: dict, key: str) -> Clip:
        start, end = content.get("start"), content.get("end")
        if end is not None and end <= (start or 0):
            self.fail("start < end", f"start={start} and end={end}")
        path = content[key]
        if isinstance(path, AudioBytes):
            return Clip(path.content, start, end, name=f"{self.name}: {path.name}")
        if "\0" in path:
            self.fail("a path", repr(path))
        if (is_remote(path) and not path.startswith("gs://")) or _DATA_URL.match(path):
            self.fail(
                "the path of a file or gs://bucket/file (nothing is fetched from elsewhere: download it first)",
                f"the URL {_shortened(path)}",
            )
        return Clip(join(self.directory, path), start, end, name=f"{self.name}: {path}")

    def timed_texts(self, content: dict, key: str, clip: Clip | None) -> Iterator[TimedText]:
        """Labels of a key, sorted, with times from the start of the clip."""
        first = clip.start or 0.0 if clip else 0.0
        last = clip.end if clip and clip.end is not None else math.inf
        labels = []
        for number, label in enumerate(content.get(key, ()), start=1):
            self.check(label, f"{key}[{number}]", _TIMED_TEXT, required=_TIMED_TEXT)
            if not first <= label["start"] <= label["end"] <= last:
                self.fail(f"times in order and within the clip, {first} to {last} s", f"{key}[{number}] {label}")
            labels.append(TimedText(label["text"].strip(), label["start"] - first, label["end"] - first))
            if key in _IN_ORDER and number > 1 and labels[-1].start < labels[-2].start - TIME_TOLERANCE:
                times = f"{label['start']:g} s after one at {labels[-2].start + first:g} s"
                self.fail(f"{key} in the order in which they begin", f"{key}[{number}] at {times}")
        return iter(sorted(labels, key=lambda label: (label.start, label.end)))

    def check(
        self,
        content: Any,
        where: str,
        types: dict[str, type],
        required: Sequence[str] | dict,
        only: bool = False,
    ) -> None:
        """Checks that `content` is an object with the required keys and values of the given types.

        only: no other keys are allowed. Otherwise they are added to `ignored`, unless they look like misspelled keys.
        """
        if not isinstance(content, dict):
            self.fail(f"{where} to be a JSON object", _shortened(content))
        for key in required:
            if key not in content:
                self.fail(f"{key!r} in {where}", f"the keys {_shortened(list(content))}")
        for key, value in content.items():
            if key in types:
                if not _is_valid(value, types[key]):
                    self.fail(f"{key!r} in {where} to be {_TYPE_NAMES[types[key]]}", _shortened(value))
            elif only or _looks_known(key, tuple(types)):
                self.fail(f"the keys {', '.join(types)} in {where}", repr(key))
            else:
                self.ignored.append(f"{key!r} in {_NUMBER.sub('', where)}")


_NUMBER = re.compile(r" \d+|\[\d+\]")  # of a message, of a label
_LIKE_A_CUT = ("start", "end", "begin", "offset")
_ALIKE = 0.8  # of difflib's ratio: "txt" and "text" have 0.86


@functools.lru_cache(1024)
def _looks_known(key: str, known: tuple[str, ...]) -> bool:
    """True if a key looks like a misspelling of a known key, or like another format's name for a cut."""
    if key.lower().startswith(_LIKE_A_CUT):
        return True
    return bool(difflib.get_close_matches(key.lower(), [name for name in known if name not in _IGNORED], 1, _ALIKE))


def _is_valid(value: Any, expected: type) -> bool:
    if expected is _Prompt:
        return isinstance(value, str)
    if expected is _PathText and isinstance(value, AudioBytes):
        return True
    if expected in (str, _PathText):
        return isinstance(value, str) and bool(value.strip())
    if expected is float:  # Python counts True among the integers
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    return isinstance(value, expected) and value != []


def _shortened(value: Any, length: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
