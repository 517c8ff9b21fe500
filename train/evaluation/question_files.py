"""Question files of four public benchmarks, as released.

    MMAU      mmau-test-mini.json (its test split withholds the answers), github.com/Sakshi113/MMAU
    MMAU-Pro  the rows of test.parquet as JSON, huggingface.co/datasets/gamma-lab-umd/MMAU-Pro
    MMAR      MMAR-meta.jsonl, github.com/ddlBoJack/MMAR
    MMSU      the entries its mmsu_inference.py reads, github.com/dingdongwang/MMSU_Bench

A file is a JSON list or JSON lines. The right answer is given as the text of an option, not as a letter.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, Path, to_path
from train.evaluation.metrics.choices import LETTERS


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question of a benchmark about one or more clips.

    audio: paths of the clips, in order.
    choices: the options, A first; empty for an open question.
    answer: letter of the right option (the first, if two have the same text). None for an open question, or if the
        released answer is not an option.
    groups: categories that accuracy is also reported by, under the released names: task, category, difficulty ...
    """

    id: str
    audio: tuple[Path, ...]
    question: str
    choices: tuple[str, ...]
    answer: str | None
    groups: Mapping[str, str]

    def prompt(self) -> str:
        """Returns the question, its lettered options, and a request to answer with the letter."""
        if not self.choices:
            return self.question
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, *options, "Answer with the letter of the right option."])


@dataclass(frozen=True)
class FileFormat:
    """Field names of a benchmark's entries.

    choices: one field that holds a list, or one field per option; fields after the second may be null or absent.
    groups: fields that may be null.
    allows_open: questions without options are valid.
    """

    audio: str
    choices: str | tuple[str, ...]
    answer: str
    groups: tuple[str, ...]
    allows_open: bool = False


FILE_FORMATS = {
    "mmau": FileFormat("audio_id", "choices", "answer", ("task", "category", "sub-category", "difficulty")),
    "mmau_pro": FileFormat("audio_path", "choices", "answer", ("category", "length_type"), allows_open=True),
    "mmar": FileFormat("audio_path", "choices", "answer", ("modality", "category", "sub-category")),
    "mmsu": FileFormat(
        "audio_path",
        ("choice_a", "choice_b", "choice_c", "choice_d"),
        "answer_gt",
        ("task_name", "category", "sub-category", "sub-sub-category"),
    ),
}


def read_benchmark(name: str, path: AnyPath, audio_dir: AnyPath | None = None) -> list[BenchmarkQuestion]:
    """Reads all questions of a benchmark's file, open ones included.

    Args:
      name: one of `FILE_FORMATS`.
      path: the question file. Other fields are ignored.
      audio_dir: directory of the audio paths in the file. Default: the directory of the file.

    Raises:
      MossAudioError: the name is unknown; the file can't be read; an entry (named by its number) has a missing field,
        a field of another type, or an audio path outside `audio_dir`.
    """
    if name not in FILE_FORMATS:
        raise MossAudioError(f"benchmark {name!r} is unknown: choose one of {', '.join(FILE_FORMATS)}.")
    path = to_path(path)
    audio_dir = path.parent if audio_dir is None else to_path(audio_dir)
    return [
        _Entry(f"{path}: entry {number}", fields).question(FILE_FORMATS[name], audio_dir)
        for number, fields in enumerate(_read_entries(path), start=1)
    ]


def _read_entries(path: Path) -> list[Any]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MossAudioError(f"{path}: expected a readable JSON file, found none ({error}); check the path.") from error
    try:
        is_list = text.lstrip().startswith("[")
        # not splitlines(): JSON strings may contain U+2028 and other separators
        entries = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise MossAudioError(
            f"{path}: expected a JSON list or one JSON object a line, found neither ({error}); fetch the file again."
        ) from error
    if not entries:
        raise MossAudioError(f"{path}: expected questions, found an empty file; fetch it again.")
    return entries


class _Entry:
    """One entry; its methods check the fields that they read."""

    def __init__(self, name: str, fields: Any):
        if not isinstance(fields, dict):
            raise MossAudioError(f"{name}: expected a JSON object, found {_shown(fields)}; correct the file.")
        self.name = name
        self.fields: dict[str, Any] = fields

    def question(self, format_: FileFormat, audio_dir: Path) -> BenchmarkQuestion:
        choices = self._choices(format_)
        answer = self._text_or_null(format_.answer) if format_.allows_open else self._text(format_.answer)
        groups = {field: self._group(field) for field in format_.groups}
        return BenchmarkQuestion(
            id=self._id(),
            audio=tuple(audio_dir / self._inside(clip, format_.audio) for clip in self._texts(format_.audio)),
            question=self._text("question"),
            choices=choices,
            answer=_letter(answer, choices),
            groups={field: value for field, value in groups.items() if value},
        )

    def _choices(self, format_: FileFormat) -> tuple[str, ...]:
        if isinstance(format_.choices, str):
            choices = self._value(format_.choices)
            if choices is None and format_.allows_open:
                choices = []
        else:
            required, optional = format_.choices[:2], format_.choices[2:]
            choices = [self._text(field) for field in required]
            choices += [self.fields[field] for field in optional if self.fields.get(field) is not None]
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise MossAudioError(
                f"{self.name}: expected a list of texts as options, found {_shown(choices)}; correct it."
            )
        if len(choices) < 2 and format_.allows_open:
            return ()  # MMAU-Pro's own evaluation leaves these out of its accuracy
        if not 2 <= len(choices) <= len(LETTERS):
            raise MossAudioError(
                f"{self.name}: expected 2 to {len(LETTERS)} options, found {len(choices)}; correct the file."
            )
        return tuple(choice.strip() for choice in choices)  # MMAR has an empty one

    def _id(self) -> str:
        value = self._value("id")
        return str(value) if isinstance(value, int) else self._checked(value, "id")

    def _group(self, field: str) -> str:
        value = self._value(field)
        return "" if value is None else ", ".join(self._texts(field))

    def _texts(self, field: str) -> list[str]:
        """Reads a text or a list of texts; the released files have both."""
        value = self._value(field)
        values = value if isinstance(value, list) and value else [value]
        return [self._checked(text, field) for text in values]

    def _text(self, field: str) -> str:
        return self._checked(self._value(field), field)

    def _text_or_null(self, field: str) -> str:
        return "" if self._value(field) is None else str(self._value(field))

    def _value(self, field: str) -> Any:
        if field not in self.fields:
            raise MossAudioError(
                f"{self.name}: expected the field {field!r}, found {', '.join(self.fields) or 'none'}; "
                "use the released file, of a split with answers."
            )
        return self.fields[field]

    def _checked(self, value: Any, field: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise MossAudioError(f"{self.name}: expected text for {field!r}, found {_shown(value)}; correct the file.")
        return value.strip()

    def _inside(self, clip: str, field: str) -> PurePosixPath:
        clip_path = PurePosixPath(clip)
        if clip_path.is_absolute() or ".." in clip_path.parts:
            raise MossAudioError(
                f"{self.name}: expected a path inside the audio directory for {field!r}, found {clip!r}; "
                "make it relative."
            )
        return clip_path


def _letter(answer: str, choices: Sequence[str]) -> str | None:
    """Letter of the first option with the answer's text, or else with that text up to case and white space."""
    for fold in (str.strip, lambda text: " ".join(text.casefold().split())):
        folded = [fold(choice) for choice in choices]
        if fold(answer) in folded:
            return LETTERS[folded.index(fold(answer))]
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
