"""Times in audio far longer than training: `python -m benchmarks.long_audio RUN [RUN ...] --out DIRECTORY`.

Runs are those of `moss-audio-train ablate --family times`, trained on clips of 4 to 30 s, with time markers or without.
Each is asked for the timeline of clips with three sounds in half a minute to ten minutes. It reads a clip whole, and
once more in windows of 30 s, whose times are moved to those of the clip. Writes results.jsonl, of which a repeated call
makes only what is missing, a table and a plot.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.model import MossAudio
from moss_audio_jax.pictures import COLORS, require_matplotlib, save_figure
from moss_audio_jax.processor import Processor, load_processor
from moss_audio_jax.text_table import align
from moss_audio_jax.weights.checkpoint import load_model
from train.ablation_config import FAMILIES
from train.data.manifest import Clip, Message, TimedText
from train.evaluation.answers import answers_by_index
from train.evaluation.config import AnswerConfig
from train.evaluation.metrics.events import score_events
from train.evaluation.metrics.timelines import parse_timeline
from train.evaluation.questions import Question, scene_questions

WINDOW = 30.0  # seconds, the longest clip of training
SEED = 2**31 + 2
TOLERANCES = (0.2, 1.0)  # seconds between a true and an answered onset
WAYS = ("whole", "windows")


def measure(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    *,
    out: Path,
    minutes: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0, 10.0),
    clips: int = 30,
) -> None:
    """Measures the times that models find in long audio.

    Args:
        runs: Training runs.
        out: Directory of the results.
        minutes: Lengths of the clips.
        clips: Clips of each length.
    """
    require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for run in runs:
        missing = [
            (length, way)
            for length in minutes
            for way in WAYS
            if not any((one["run"], one["minutes"], one["way"]) == (run.name, length, way) for one in done)
        ]
        if not missing:
            continue
        model, processor = load_model(run), load_processor(run)
        for length, way in missing:
            print(f"{run.name}: {length:g} min, {way}", file=sys.stderr, flush=True)
            found = {"run": run.name, "minutes": length, "way": way, "clips": clips}
            done.append(found | scores(model, processor, questions(length, clips), windows=way == "windows"))
            file.write_text("".join(f"{json.dumps(one)}\n" for one in done))
    names = [run.name for run in runs]
    shown = [one for one in done if one["run"] in names]
    print(table(shown))
    plot(shown, out / "long_audio.png")


def questions(minutes: float, count: int) -> list[Question]:
    """Returns questions about the timeline of clips of this length with three sounds."""
    seconds = 60 * minutes
    scenes = dataclasses.replace(FAMILIES["times"].test_scenes, tasks=("timeline",), events=(3, 3))
    return scene_questions(count, dataclasses.replace(scenes, seconds=(seconds, seconds)), seed=SEED)


def scores(
    model: MossAudio, processor: Processor, items: Sequence[Question], *, windows: bool
) -> dict[str, float | None]:
    """Returns F1 of events by tolerance, and the mean error of onsets within the larger one, in seconds."""
    parts = [_windows(item) if windows else [(0.0, item)] for item in items]
    asked = [question for of_clip in parts for _, question in of_clip]
    answers = answers_by_index(model, processor, asked, AnswerConfig(batch_size=4, max_new_tokens=96), progress=True)
    texts = iter(answers[index].text for index in range(len(asked)))
    predictions = [
        [
            TimedText(event.text, event.start + begin, event.end + begin)
            for begin, _ in of_clip
            for event in parse_timeline(next(texts)).items
        ]
        for of_clip in parts
    ]
    references = [item.labels for item in items]
    found = {f"f1_{tolerance:g}": score_events(predictions, references, tolerance).total.f1 for tolerance in TOLERANCES}
    onset_ms = score_events(predictions, references, TOLERANCES[-1]).onset_ms
    return found | {"onset_error": None if onset_ms is None else onset_ms / 1000}


def _windows(item: Question) -> list[tuple[float, Question]]:
    """Cuts the clip of a question into windows; returns their beginnings in seconds, and the question about each."""
    clip, text = item.clips[0], item.text
    seconds = clip.num_samples() / SAMPLE_RATE
    begins = np.arange(0, seconds, WINDOW).tolist()
    return [
        (begin, dataclasses.replace(item, turns=(Message("user", (_part(clip, begin, seconds), text)),)))
        for begin in begins
    ]


def _part(clip: Clip, begin: float, seconds: float) -> Clip:
    return Clip(clip.audio, begin, min(begin + WINDOW, seconds), f"{clip.name} from {begin:g} s")


def table(found: Sequence[dict]) -> str:
    """Formats a line per run, length and way."""
    rows: list[tuple[str, ...]] = [
        ("run", "minutes", "way", *(f"F1 within {tolerance:g} s" for tolerance in TOLERANCES), "onset error")
    ]
    for one in found:
        rates = [f"{100 * (one[f'f1_{tolerance:g}'] or 0):.1f}%" for tolerance in TOLERANCES]
        error = "-" if one["onset_error"] is None else f"{one['onset_error']:.2f} s"
        rows.append((one["run"], f"{one['minutes']:g}", one["way"], *rates, error))
    return align(rows)


def plot(found: Sequence[dict], path: Path) -> None:
    """Writes a PNG of F1 by length, a panel per tolerance."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    panels = figure.subplots(1, len(TOLERANCES), sharey=True)
    runs = list(dict.fromkeys(one["run"] for one in found))
    for axes, tolerance in zip(panels, TOLERANCES, strict=True):
        for color, run in zip(COLORS, runs, strict=False):
            for way, style in zip(WAYS, ("o-", "s--"), strict=True):
                of_line = [one for one in found if (one["run"], one["way"]) == (run, way)]
                points = sorted((one["minutes"], one[f"f1_{tolerance:g}"] or 0) for one in of_line)
                axes.plot(*zip(*points, strict=True), style, color=color, label=f"{run}, {way}")
        axes.set_xscale("log")
        lengths = sorted({one["minutes"] for one in found})
        axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axes.set_xlabel("minutes of audio (30 s at most in training)")
        axes.set_title(f"onsets within {tolerance:g} s")
        axes.grid(color="0.9")
    panels[0].set_ylabel("F1 of events")
    panels[0].set_ylim(0, 1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(measure, description=__doc__))
