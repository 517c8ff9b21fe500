"""Transcribes many recordings through one engine: `moss-audio transcribe`.

    paths -> recordings that are not done yet -> in order of length: windows -> engine -> transcripts -> files

Windows of all recordings, short and long, are answered together: at most twice as many as the engine has slots wait.
A recording that can't be read or answered is named and counted, and the others are processed.
"""

import contextlib
import dataclasses
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from moss_audio_jax.audio import SAMPLE_RATE, mel_frames, num_audio_tokens, num_samples
from moss_audio_jax.audio_stream import stream_audio
from moss_audio_jax.commands.interruption import stops_on_ctrl_c
from moss_audio_jax.commands.progress import waiting
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.engine import Request
from moss_audio_jax.inference.loading import Loading
from moss_audio_jax.inference.recording_files import RecordingFile, find_recordings
from moss_audio_jax.inference.recordings import Ask, Joiner, Transcript, answered
from moss_audio_jax.inference.requests import Loops
from moss_audio_jax.inference.transcript_files import Outputs, parse_formats
from moss_audio_jax.inference.windows import Cutting, Window, cut
from moss_audio_jax.processor import Processor
from moss_audio_jax.prompts import build_prompt
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.storage.paths import AnyPath, absolute, is_remote, local_copy, require_writable, to_path
from moss_audio_jax.timelines.prompts import PROMPTS
from moss_audio_jax.weights.locate import locate

TRANSCRIBE = "Transcribe the audio."
# Tokens that an answer may have for each second of its window: fast speech, and seven or eight tokens for each time.
TOKENS_PER_SECOND = {"none": 8, "sentences": 16, "words": 64, "speakers": 16, "events": 16}
_LEAST_TOKENS = 64
IN_FLIGHT = 2  # windows that wait for their answers, for each slot


def prompt_of(timestamps: str) -> str:
    """Returns the question that asks for these timestamps: `none`, or a key of `timelines.prompts.PROMPTS`."""
    return TRANSCRIBE if timestamps == "none" else PROMPTS[timestamps]


def _fixed(checkpoint: AnyPath) -> str:
    """Returns what names a checkpoint from any directory and at any time."""
    return str(locate(checkpoint, weights=False).hub or absolute(checkpoint))


def new_tokens(seconds: float, timestamps: str, given: int | None) -> int:
    """Returns the most tokens of the answer to a window: the given number, or one that grows with its length."""
    return _LEAST_TOKENS + math.ceil(seconds * TOKENS_PER_SECOND[timestamps]) if given is None else given


@dataclass
class Job:
    """A recording to transcribe. seconds: as its headers say. error: what went wrong with it."""

    recording: RecordingFile
    seconds: float
    joiner: Joiner = field(default_factory=Joiner)
    answered: float = 0.0  # seconds
    error: MossAudioError | None = None


@dataclass
class Tally:
    """What became of the recordings, and the seconds of audio that were answered."""

    written: int = 0
    failed: int = 0
    seconds: float = 0.0


def measure(recordings: Iterable[RecordingFile], outputs: Outputs, report: "Reporter") -> tuple[list[Job], int, int]:
    """Returns the recordings that are not done, the shortest first, and how many are done and can't be read."""
    jobs, done, failed = [], 0, 0
    for recording in recordings:
        try:
            if outputs.done(recording):
                done += 1
            else:
                jobs.append(Job(recording, num_samples(recording.path) / SAMPLE_RATE))
        except MossAudioError as error:
            failed += 1
            report.failure(error)
    return sorted(jobs, key=lambda job: job.seconds), done, failed


def transcribe_jobs(
    jobs: Sequence[Job], outputs: Outputs, ask: Ask, report: "Reporter", *, cutting: Cutting, in_flight: int
) -> Tally:
    """Transcribes recordings in the given order, and writes each as soon as it is answered.

    Ctrl-C of `report` ends it by KeyboardInterrupt: what is written is whole, and what is not is not there.
    """
    tally = Tally()

    def fail(job: Job, error: MossAudioError) -> None:
        if job.error is None:
            job.error = error
            tally.failed += 1
            report.failure(error, job.recording)
            report.passed(job.seconds - job.answered)

    def windows() -> Iterator[tuple[Job, Window]]:
        for job in jobs:
            try:
                with _local(job.recording) as path:
                    for window in cut(stream_audio(path, name=str(job.recording.path)), cutting):
                        if job.error is None:
                            yield job, window
            except MossAudioError as error:
                fail(job, error)

    report.begin(len(jobs), sum(job.seconds for job in jobs))
    for job, place, reply in answered(windows(), ask, in_flight, report.glance):
        if job.error is not None:
            continue
        if isinstance(reply, MossAudioError):
            fail(job, reply)
            continue
        seconds = place.end - place.begin - place.overlap
        job.answered += seconds
        tally.seconds += seconds
        report.passed(seconds)
        job.joiner.add(place, reply)
        if place.last:
            transcript = job.joiner.transcript()
            outputs.write(job.recording, transcript)
            tally.written += 1
            report.written(job.recording, transcript)
    return tally


@contextlib.contextmanager
def _local(recording: RecordingFile) -> Iterator[Any]:
    """Yields the recording itself or, for one of gs://, a copy on a disk, which is removed at the end."""
    if not is_remote(recording.path):
        yield recording.path
        return
    copy = local_copy(recording.path)
    try:
        yield copy
    finally:
        copy.unlink()


@dataclass(frozen=True)
class Answers:
    """How recordings are answered: options of `moss-audio transcribe`. prompt: None asks for the timestamps."""

    timestamps: str
    prompt: str | None
    system: str
    max_new_tokens: int | None
    sampling: Sampling
    seed: int
    time_markers: bool | None
    loops: Loops
    window: float

    @property
    def question(self) -> str:
        return prompt_of(self.timestamps) if self.prompt is None else self.prompt

    def record(self, loading: Loading) -> dict[str, Any]:
        """Returns what an answer depends on, for JSON."""
        model = {
            "checkpoint": _fixed(loading.checkpoint),
            "adapter": loading.adapter and _fixed(loading.adapter),
            "dtype": loading.dtype,
            "int8": list(loading.int8),
            "kv_int8": loading.kv_int8,
        }
        return {**model, **dataclasses.asdict(self), "prompt": self.question}

    def request(self, window: Window) -> Request:
        return Request(
            self.question,
            [window.wave],
            max_new_tokens=new_tokens(len(window.wave) / SAMPLE_RATE, self.timestamps, self.max_new_tokens),
            sampling=self.sampling,
            seed=self.seed,
            system_prompt=self.system,
            time_markers=self.time_markers,
            loops=self.loops,
        )

    def length(self, processor: Processor, seconds: float) -> int:
        """Returns the most tokens of a window's prompt and answer; raises MossAudioError for more than the model's."""
        audio = num_audio_tokens(mel_frames(max(math.ceil(seconds * SAMPLE_RATE), SAMPLE_RATE)))
        prompt = build_prompt(
            processor.tokenizer,
            self.question,
            [audio],
            system_prompt=self.system,
            time_markers=self.time_markers,
            processor=processor.config.processor,
        )
        length = len(prompt) + new_tokens(seconds, self.timestamps, self.max_new_tokens)
        limit = processor.config.language_config.max_position_embeddings
        if length > limit:
            raise MossAudioError(
                f"a window of {seconds:.0f} s and its answer have up to {length:,} tokens, more than the model's "
                f"{limit:,} positions: give a smaller --window or --max-new-tokens"
            )
        return length


def transcribe_paths(
    paths: Sequence[AnyPath],
    lists: Sequence[AnyPath],
    out: AnyPath,
    formats: str,
    answers: Answers,
    loading: Loading,
) -> None:
    """Transcribes recordings into a directory, and says what became of them; exits with code 1 if some were not.

    Raises MossAudioError for a mistake in the arguments, before the model is loaded.
    """
    cutting = Cutting.of(answers.window)
    outputs = Outputs(out, parse_formats(formats), answers.record(loading))
    check_question(answers)
    stop = threading.Event()
    report = Reporter(stop)
    with waiting("looking for recordings"):
        found = find_recordings(paths, lists)
        require_writable(to_path(out) / "transcripts.txt")
        jobs, done, failed = measure(found.recordings, outputs, report)
    if found.others:
        report.say(f"left out, as they are not named like recordings: {_few(found.others)}")
    tally = Tally()
    if jobs:
        processor = loading.processor()
        longest = min(max(job.seconds for job in jobs), cutting.window)
        length = answers.length(processor, longest)
        windows = sum(math.ceil(job.seconds / (cutting.window - cutting.search)) for job in jobs)
        engine = loading.engine(processor, windows, length)
        with stops_on_ctrl_c(stop.set):
            try:
                tally = transcribe_jobs(
                    jobs,
                    outputs,
                    lambda window: engine.submit(answers.request(window)),
                    report,
                    cutting=cutting,
                    in_flight=IN_FLIGHT * loading.slots,
                )
            except KeyboardInterrupt:
                report.say(f"{report.progress()[1:-1]}; the same command resumes from here")
                raise
        engine.close()
        report.say(f"{tally.written} of {len(jobs)} files transcribed, {report.summary()}")
    if done:
        report.say(f"{done} of {len(found.recordings)} files were transcribed before, with the same options")
    failed += tally.failed
    if failed:
        print(
            f"error: {failed} of {len(found.recordings)} files were not transcribed, and are named above: restore or "
            "convert them, or leave them out, and run the same command again",
            file=sys.stderr,
        )
        sys.exit(1)


def check_question(answers: Answers) -> None:
    """Raises MossAudioError for an option that no window could be answered with."""
    if answers.max_new_tokens is not None and answers.max_new_tokens < 1:
        raise MossAudioError(f"--max-new-tokens must be 1 or more, not {answers.max_new_tokens}")
    if answers.prompt is not None and not answers.prompt.strip():
        raise MossAudioError("--prompt must be a question, not be empty: leave it out to transcribe")


def _few(paths: Sequence[Any]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(str(path) for path in paths[:3]) + more


# What the user sees

_UNFINISHED = {
    "length": "cut off, give more --max-new-tokens",
    "loop": "ended as it repeated itself (--loops)",
    "cancelled": "cancelled",
}
SILENCE = 30.0  # seconds between lines where stderr is no terminal; then twice as many, and so on
BLINK = 0.5  # on a terminal


class Reporter:
    """Says on stderr how far the work is, what went wrong, and stops it after Ctrl-C: all from one thread.

    stop: once it is set, `glance` raises KeyboardInterrupt.
    """

    def __init__(self, stop: threading.Event):
        self._stop = stop
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._next, self._pause = math.inf, BLINK if self._terminal else SILENCE
        self._files = self._written = 0
        self._seconds = self._passed = 0.0

    def begin(self, files: int, seconds: float) -> None:
        self._files, self._seconds, self._start = files, seconds, time.monotonic()
        self._next = self._start + self._pause

    def passed(self, seconds: float) -> None:
        self._passed += seconds

    def written(self, recording: RecordingFile, transcript: Transcript) -> None:
        self._written += 1
        unfinished = [window for window in transcript.windows if window.finish_reason != "stop"]
        if unfinished:
            why = " and ".join(sorted({_UNFINISHED[window.finish_reason] for window in unfinished}))
            first = _clock(unfinished[0].place.begin)
            count = f"{len(unfinished)} of {len(transcript.windows)} answers"
            self.say(f"{recording.path}: {count} are unfinished, from {first} on: {why}")

    def glance(self) -> None:
        if self._stop.is_set():
            self._erase()
            raise KeyboardInterrupt
        if time.monotonic() >= self._next:
            self._pause *= 1 if self._terminal else 2
            self._next = time.monotonic() + self._pause
            line = self.progress()
            print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
            sys.stderr.flush()

    def progress(self) -> str:
        elapsed = time.monotonic() - self._start
        speed = self._passed / elapsed if elapsed else 0.0
        left = f"about {_duration((self._seconds - self._passed) / speed)} left" if speed else "no answer yet"
        return (
            f"[{self._written} of {self._files} files, {self._passed / 3600:.2f} of {self._seconds / 3600:.2f} h of "
            f"audio, {speed:.1f} times as fast as it plays, {left}]"
        )

    def summary(self) -> str:
        elapsed = time.monotonic() - self._start
        return f"{self._passed / 3600:.2f} h of audio in {_duration(elapsed)}"

    def failure(self, error: MossAudioError, recording: RecordingFile | None = None) -> None:
        name = "" if recording is None or str(recording.path) in str(error) else f"{recording.path}: "
        self.say(f"not transcribed: {name}{error}")

    def say(self, line: str) -> None:
        self._erase()
        print(f"[{line}]", file=sys.stderr, flush=True)

    def _erase(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
