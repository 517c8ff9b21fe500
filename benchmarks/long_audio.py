"""Times in audio far longer than training: `python -m benchmarks.long_audio RUN [RUN ...] --out DIRECTORY`.

Runs are those of `moss-audio-train ablate --family times`, trained on clips of 4 to 30 s, with time markers or without.
Each is asked when the one sound in a clip of half a minute to ten minutes begins. It reads a clip whole, and once more
in windows of 30 s: of their answers the most probable is taken, and moved to the clip's time. Writes results.jsonl, of
which a repeated call makes only what is missing, a table and a plot.
"""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.inference.engine import Engine, Reply, Request
from moss_audio_jax.inputs import bucket
from moss_audio_jax.model import MossAudio
from moss_audio_jax.pictures import COLORS, require_matplotlib, save_figure
from moss_audio_jax.processor import Processor, load_processor
from moss_audio_jax.text_table import align
from moss_audio_jax.weights.checkpoint import load_model
from train.ablation_config import FAMILIES
from train.data.manifest import Clip, Message
from train.evaluation.answers import encode_question
from train.evaluation.metrics.values import read_seconds
from train.evaluation.questions import Question, scene_questions

WINDOW = 30.0  # seconds, the longest clip of training
SEED = 2**31 + 2
TOLERANCES = (0.2, 1.0)  # seconds between a true and an answered time
WAYS = ("whole", "windows")
SLOTS, MAX_NEW_TOKENS = 4, 16


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
    """Returns questions about when the one sound in clips of this length begins."""
    seconds = 60 * minutes
    scenes = dataclasses.replace(FAMILIES["times"].test_scenes, seconds=(seconds, seconds))
    return scene_questions(count, scenes, seed=SEED)


def scores(model: MossAudio, processor: Processor, items: Sequence[Question], *, windows: bool) -> dict[str, float]:
    """Returns the share of right times by tolerance, and the median of the errors, in seconds."""
    parts = [_windows(item) if windows else [(0.0, item)] for item in items]
    replies = iter(_replies(model, processor, [question for of_clip in parts for _, question in of_clip]))
    errors = []
    for item, of_clip in zip(items, parts, strict=True):
        answers = [
            (sum(reply.logprobs), begin, read_seconds(reply.text))
            for (begin, _), reply in zip(of_clip, itertools.islice(replies, len(of_clip)), strict=True)
        ]
        _, begin, seconds = max(answers, key=lambda answer: answer[0])
        errors.append(math.inf if seconds is None else abs(begin + seconds - float(item.reference)))
    right = {f"within_{tolerance:g}": float(np.mean(np.array(errors) <= tolerance + 1e-6)) for tolerance in TOLERANCES}
    return right | {"median_error": float(np.median(errors))}


def _replies(model: MossAudio, processor: Processor, asked: Sequence[Question]) -> list[Reply]:
    """Asks greedily; all questions are about equally long."""
    longest = max(asked, key=lambda question: question.clips[0].num_samples())
    length = bucket(len(encode_question(processor, longest, None)[0]) + 2 * MAX_NEW_TOKENS, 256)
    request = Request("", max_new_tokens=MAX_NEW_TOKENS)
    with Engine(model, processor, slots=SLOTS, max_length=length) as engine:
        replies: list[Reply] = []
        for begin in tqdm(range(0, len(asked), SLOTS), unit="batch"):
            encoded = [encode_question(processor, question, None) for question in asked[begin : begin + SLOTS]]
            replies += [handle.result() for handle in engine.submit_all([(request, *prompt) for prompt in encoded])]
    return replies


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
    titles = (f"within {tolerance:g} s" for tolerance in TOLERANCES)
    rows: list[tuple[str, ...]] = [("run", "minutes", "way", *titles, "median error")]
    for one in found:
        shares = [f"{100 * one[f'within_{tolerance:g}']:.1f}%" for tolerance in TOLERANCES]
        rows.append((one["run"], f"{one['minutes']:g}", one["way"], *shares, f"{one['median_error']:.2f} s"))
    return align(rows)


def plot(found: Sequence[dict], path: Path) -> None:
    """Writes a PNG of the share of right times by length, a panel per tolerance."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    panels = figure.subplots(1, len(TOLERANCES), sharey=True)
    runs = list(dict.fromkeys(one["run"] for one in found))
    for axes, tolerance in zip(panels, TOLERANCES, strict=True):
        for color, run in zip(COLORS, runs, strict=False):
            for way, style in zip(WAYS, ("o-", "s--"), strict=True):
                of_line = [one for one in found if (one["run"], one["way"]) == (run, way)]
                points = sorted((one["minutes"], one[f"within_{tolerance:g}"]) for one in of_line)
                axes.plot(*zip(*points, strict=True), style, color=color, label=f"{run}, {way}")
        axes.set_xscale("log")
        lengths = sorted({one["minutes"] for one in found})
        axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axes.set_xlabel("minutes of audio (30 s at most in training)")
        axes.set_title(f"within {tolerance:g} s of the truth")
        axes.grid(color="0.9")
    panels[0].set_ylabel("share of sounds")
    panels[0].set_ylim(0, 1.02)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(measure, description=__doc__))
