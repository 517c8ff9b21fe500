"""`moss-audio timeline`: asks a checkpoint for times, or takes an answer, and writes it in any of the formats."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from moss_audio_jax.commands.options import MeshConfig
from moss_audio_jax.commands.paths import PathArgument
from moss_audio_jax.commands.progress import waiting
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.prompts import DEFAULT_SYSTEM_PROMPT
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.storage.paths import Path, atomic_write, read_bytes, require_writable
from moss_audio_jax.timelines.formats import one_line, stamp
from moss_audio_jax.timelines.prompts import PROMPTS
from moss_audio_jax.timelines.timeline import Timeline

if TYPE_CHECKING:
    import numpy as np

MOST_PROBLEMS = 10  # that are printed; the JSON has all
STDIN = "-"

WRITERS: Mapping[str, Callable[[Timeline], str]] = {
    ".audacity.txt": Timeline.to_audacity,  # before .txt
    ".csv": Timeline.to_csv,
    ".json": lambda timeline: json.dumps(timeline.to_json(), indent=2, ensure_ascii=False) + "\n",
    ".srt": Timeline.to_srt,
    ".tsv": Timeline.to_tsv,
    ".txt": Timeline.to_txt,
    ".vtt": Timeline.to_vtt,
}


@dataclasses.dataclass(frozen=True)
class Question:
    """What a checkpoint is asked, and how it answers."""

    ask: Literal["sentences", "words", "speakers", "events"] = "sentences"
    """What the times are of. Each has a prompt, which docs/timelines.md shows."""
    prompt: str | None = None
    """A question of your own instead."""
    adapter: PathArgument | None = None
    """LoRA adapter of the checkpoint: PEFT's directory, one of `from-peft`, or a training run."""
    system: str = DEFAULT_SYSTEM_PROMPT
    """System prompt."""
    max_new_tokens: int = 4096
    """Maximum tokens of the answer; a word with its times takes about ten. An answer that is cut off is reported."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sampling)
    """Sampling options."""
    seed: int = 0
    """Seed of the sampling, a whole number of 64 bits."""
    time_markers: bool | None = None
    """Insert time markers between audio tokens. Default: the checkpoint's setting."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of weights and computation. Default: bfloat16, on the CPU float32."""
    int8: tuple[str, ...] = ()
    """Globs over linear layers whose weights are rounded to int8, such as 'language_model.layers.*_proj'."""
    verify: bool = False
    """First compare the weights with the checksums that they were written with."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Device mesh."""


def run(
    source: Path,
    clip: Path | None,
    question: Question,
    *,
    out: tuple[Path, ...] = (),
    plot: Path | None = None,
    row_seconds: float | None = None,
) -> None:
    """Prints a timeline as a table, says on stderr what could not be read, and writes the files."""
    is_answer = str(source) == STDIN or source.is_file()
    writers = _checked(clip, question, is_answer, out, plot, row_seconds)
    wave = None if clip is None else _wave(clip)
    seconds = None if wave is None else _seconds(wave)
    if is_answer:
        timeline = _given(source, seconds)
    else:
        assert wave is not None
        timeline = Timeline.parse(answer(source, wave, question), seconds)
    if timeline.segments:
        print(table(timeline))
    _report(timeline)
    for path, write in zip(out, writers, strict=True):
        atomic_write(path, write(timeline))
    if plot is not None and clip is not None and wave is not None:
        from moss_audio_jax.timelines.picture import plot_timeline

        with waiting("drawing"):
            pictures = plot_timeline(plot, wave, timeline, title=clip.name, row_seconds=row_seconds)
        if len(pictures.paths) > 1:
            _say(f"drawn on {len(pictures.paths)} pages, {pictures.paths[0]} to {pictures.paths[-1].name}")
        if pictures.missing:
            _say(
                f"no font of this machine has {len(pictures.missing)} of the characters ({pictures.missing[:10]}): "
                "install one, such as fonts-noto-cjk, and draw again"
            )


def answer(checkpoint: Path, wave: "np.ndarray", question: Question) -> str:
    """Asks a checkpoint about a clip."""
    import numpy as np

    from moss_audio_jax.generation import check_request, generate
    from moss_audio_jax.inference.loading import Loading

    mesh = dataclasses.asdict(question.mesh)
    loading = Loading(
        checkpoint, question.adapter, question.dtype, question.int8, mesh, slots=1, verify=question.verify
    )
    processor = loading.processor()
    prompt = PROMPTS[question.ask] if question.prompt is None else question.prompt
    inputs = processor(prompt, wave, system_prompt=question.system, time_markers=question.time_markers)
    check_request(processor.config, inputs, question.max_new_tokens, seed=question.seed)
    model = loading.model()
    with waiting("answering"):
        ids = generate(
            model,
            inputs,
            max_new_tokens=question.max_new_tokens,
            sampling=question.sampling,
            seed=question.seed,
        )
    if not np.isin(ids, model.config.eos_ids).any():
        _say(
            f"the answer was not finished: it was cut off after --max-new-tokens {question.max_new_tokens}; give more "
            "of them"
        )
    return processor.decode(ids[0])


def table(timeline: Timeline) -> str:
    """Returns a line for each segment: begin and end in seconds, and the text."""
    times = [(stamp(segment.begin), "" if segment.end is None else stamp(segment.end)) for segment in timeline.segments]
    begin, end = (max(len(name), *(len(row[side]) for row in times)) for side, name in enumerate(("begin", "end")))
    lines = [f"{'begin':>{begin}}  {'end':>{end}}  text"]
    lines += [
        f"{row[0]:>{begin}}  {row[1]:>{end}}  {one_line(segment.text)}"
        for row, segment in zip(times, timeline.segments, strict=True)
    ]
    return "\n".join(lines)


def _checked(
    clip: Path | None,
    question: Question,
    is_answer: bool,
    out: tuple[Path, ...],
    plot: Path | None,
    row_seconds: float | None,
) -> list[Callable[[Timeline], str]]:
    """Raises MossAudioError for what would fail at the end; returns a writer for each file."""
    if clip is None and not is_answer:
        raise MossAudioError("a clip must be given after the checkpoint: what should it be asked about?")
    if clip is None and plot is not None:
        raise MossAudioError("--plot must have a clip to draw: give it after the answer")
    if is_answer and (question.prompt is not None or question.adapter is not None):
        raise MossAudioError(
            "--prompt and --adapter must be given with a checkpoint, not with an answer: leave them out"
        )
    if question.prompt == "":
        raise MossAudioError("--prompt must not be empty: leave it out, and choose with --ask")
    writers = [next((write for end, write in WRITERS.items() if path.name.lower().endswith(end)), None) for path in out]
    for path, write in zip(out, writers, strict=True):
        if write is None:
            raise MossAudioError(f"--out must end in one of {', '.join(WRITERS)}, not be {path.name}: rename it")
    if plot is not None:
        from moss_audio_jax.pictures import require_matplotlib
        from moss_audio_jax.timelines.picture import require_row

        require_matplotlib()
        require_row(row_seconds)
        if plot.suffix.lower() != ".png":
            raise MossAudioError(f"--plot must end in .png, not be {plot.name}: rename it")
    for path in (*out, *([] if plot is None else [plot])):
        require_writable(path)
    return [write for write in writers if write is not None]


def _wave(clip: Path) -> "np.ndarray":
    from moss_audio_jax.audio import load_audio

    with waiting("reading the clip"):
        return load_audio(clip)


def _seconds(wave: "np.ndarray") -> float:
    from moss_audio_jax.audio import SAMPLE_RATE

    return len(wave) / SAMPLE_RATE


def _given(source: Path, seconds: float | None) -> Timeline:
    """Reads an answer, or a timeline that this command has written as JSON."""
    content = sys.stdin.buffer.read() if str(source) == STDIN else read_bytes(source)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MossAudioError(
            f"{source} must be a checkpoint's directory or the text of an answer in UTF-8, not another file: give it "
            "before the clip"
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return Timeline.from_json(value) if isinstance(value, dict) else Timeline.parse(text, seconds)


def _report(timeline: Timeline) -> None:
    for piece in timeline.unread:
        _say(f"not read, for it has no time: {one_line(piece)}")
    for problem in timeline.problems[:MOST_PROBLEMS]:
        _say(problem)
    if len(timeline.problems) > MOST_PROBLEMS:
        _say(f"and {len(timeline.problems) - MOST_PROBLEMS} more such times")
    if not timeline.segments:
        _say("the answer holds no text with a time")


def _say(sentence: str) -> None:
    print(f"[{sentence}]", file=sys.stderr)
