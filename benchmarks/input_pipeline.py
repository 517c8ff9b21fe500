"""Input pipelines, ours and PyTorch's: `python -m benchmarks.input_pipeline [--json FILE]`.

From audio files and transcripts to what a training step reads, on one thread a side, in turns, over the same clips:

    ours      `train.data.TrainingData`: decode, resample, log-mel, chat prompt, labels, packed sequences, batches
    PyTorch   decode, resample, transformers' WhisperFeatureExtractor and Qwen2Tokenizer, labels; one tensor of each for
              every clip, as the released code, which trains one prompt at a time, wants them: nothing is packed

transformers decodes and resamples with libraries of the user's choice; here both sides do so with this port's
`load_audio`. That the ids and labels are equal, and the mels to a rounding, is checked before anything is timed.

Times are CPU seconds of the process, in all its threads, for an hour of audio: what a core does, whatever else the
machine does. They don't include waiting for a disk. Needs the extra `test` (PyTorch).
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything reads it

import numpy as np
import soundfile
import tyro

from benchmarks.side_by_side import Comparison, report
from moss_audio_jax.audio import SAMPLE_RATE, load_audio, num_audio_tokens
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.model import parameter_specs
from moss_audio_jax.prompts import DEFAULT_SYSTEM_PROMPT, audio_span
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.tokenizer import Tokenizer
from train.data import DataConfig, Example, ExampleOrder, Group, Manifest, SampleMaker, Source, TrainingData
from train.data.mixture import Drawn
from train.data.objectives import render
from train.planning.chips import V5E
from train.planning.flops import Content, step_flops
from train.recipes import RECIPES

CONFIG = MossAudioConfig.preset("4b")
# Sequences as in the recipe, in fewer open bins: what is read and not yet packed when the time ends is little then.
DATA = replace(RECIPES["pretrain_stage2"].data, batch_size=1, open_bins=2)
OBJECTIVE = {"transcribe": 1.0}
IGNORED_LABEL = -100
MEL_TOLERANCE = 2**-7  # a rounding of bfloat16 between 1 and 2
CHIPS, MFU = 8, 0.4  # of the estimate
HOUR = 3600

TEXT = """the weather was quiet in the mountain garden and the people at the station were talking about music before
they opened another letter from the river; perhaps she always listens by the kitchen window when it is morning,
and he never remembers the number of the question that nobody answered between yesterday and tomorrow"""
WORDS = TEXT.split()
WORDS_PER_SECOND = 2.5


@dataclass(frozen=True)
class Format:
    """A kind of audio file, as soundfile writes it."""

    extension: str
    rate: int
    channels: int

    def __str__(self) -> str:
        return f"{self.extension} {self.rate / 1000:g} kHz, {'mono' if self.channels == 1 else 'stereo'}"


FORMATS = (Format("wav", SAMPLE_RATE, 1), Format("flac", 44100, 2), Format("mp3", 44100, 2))


def write_corpus(directory: Path, kind: Format, clips: int, longest: float) -> Path:
    """A manifest of `clips` clips, of 1 to `longest` seconds, and their texts; the same ones at every call."""
    lines = []
    for number, seconds in enumerate(np.linspace(1.0, longest, clips)):
        rng = np.random.default_rng(number)
        name = f"{number}.{kind.extension}"
        soundfile.write(directory / name, sound(seconds, kind, rng), kind.rate)
        lines.append({"audio": name, "text": " ".join(rng.choice(WORDS, round(seconds * WORDS_PER_SECOND)))})
    manifest = directory / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return manifest


def sound(seconds: float, kind: Format, rng: np.random.Generator) -> np.ndarray:
    """A gliding voice of ten harmonics in syllables, over a little noise: float32 [samples, channels]."""
    t = np.arange(int(seconds * kind.rate)) / kind.rate
    phase = 2 * np.pi * (120 * t + 15 * np.sin(2 * np.pi * 0.4 * t))
    voice = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 11))
    syllables = np.clip(np.sin(2 * np.pi * 2 * t), 0, 1)
    noise = rng.standard_normal((len(t), kind.channels))
    return (0.1 * (voice * syllables)[:, None] + 0.005 * noise).astype(np.float32)


@dataclass
class Recorded:
    """An order of examples that remembers which were read."""

    order: ExampleOrder
    read: list[Drawn]

    def __getitem__(self, number: int) -> Drawn:
        drawn = self.order[number]
        self.read.append(drawn)
        return drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.order, name)


@dataclass(frozen=True)
class Reading:
    """A timed run of our pipeline: the examples it read, and the sums of its last batch."""

    cpu_seconds: float
    examples: list[Drawn]
    sums: dict[str, float]


def read_ours(order: ExampleOrder, maker: SampleMaker, data: DataConfig, batches: int) -> Reading:
    """So many batches of a new pipeline without workers, and what it read ahead of them."""
    recorded = Recorded(order, [])
    start = time.process_time()
    pipeline = TrainingData(recorded, maker, data)  # pyright: ignore[reportArgumentType]
    for _ in range(batches):
        next(pipeline)
    pipeline.close()  # and with it Grain's thread, which would read on at PyTorch's expense
    return Reading(time.process_time() - start, recorded.read, pipeline.sums)


class PyTorchReader:
    """An example as the released PyTorch code reads it, in its two ways to make a mel.

    numpy_mel: the extractor's NumPy method, in float64, which the released processor calls; else `torch.stft` in
        float32, which the extractor itself takes where PyTorch is installed.
    """

    def __init__(self, tokenizer_directory: Path, *, numpy_mel: bool):
        import transformers

        self._extractor = transformers.WhisperFeatureExtractor(feature_size=128)
        self._tokenizer = transformers.Qwen2Tokenizer.from_pretrained(tokenizer_directory)
        self._numpy_mel = numpy_mel

    def __call__(self, drawn: Drawn) -> dict[str, Any]:
        """input_ids and labels, int64 [tokens], and the mel, bfloat16 [128, frames]."""
        import torch

        clip, question, answer = asked(drawn.example, drawn.rng)
        mel = torch.from_numpy(self.mel(load_audio(clip))).bfloat16()
        processor = CONFIG.processor
        prompt = [
            *self._ids(f"<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"),
            processor.audio_start_id,
            *audio_span(num_audio_tokens(mel.shape[1]), processor=processor),
            processor.audio_end_id,
            *self._ids(f"\n{question}<|im_end|>\n<|im_start|>assistant\n"),
        ]
        learned = self._ids(f"{answer}<|im_end|>")
        labels = [IGNORED_LABEL] * len(prompt) + learned
        return {"input_ids": torch.tensor(prompt + learned), "labels": torch.tensor(labels), "mel": mel}

    def mel(self, wave: np.ndarray) -> np.ndarray:
        """float32 [128, frames], of the clip alone: nothing is padded."""
        if self._numpy_mel:
            return self._extractor._np_extract_fbank_features(wave[None], "cpu")[0]
        features = self._extractor(wave, sampling_rate=SAMPLE_RATE, padding="longest", truncation=False)
        return features["input_features"][0]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]


def asked(example: Example, rng: np.random.Generator) -> tuple[Any, str, str]:
    """Audio file, question and answer of an example, the ones that `SampleMaker` draws too."""
    rendered: Any = render(example, rng, OBJECTIVE)
    user, assistant = rendered
    clip, question = user.content
    return clip.audio, question, assistant.content[0]


def check_equal(reader: PyTorchReader, maker: SampleMaker, examples: Sequence[Drawn]) -> None:
    """Raises MossAudioError if an example is not the same on both sides."""
    for drawn in examples:
        sample, theirs = maker(drawn.example, drawn.rng, OBJECTIVE), reader(drawn)
        ids = sample.inputs.tokens[0, : sample.num_tokens]
        labels = np.where(sample.loss_mask, ids, IGNORED_LABEL)
        inputs, mel = sample.inputs, theirs["mel"].float().numpy().T
        frames = np.arange(inputs.audio_chunks.shape[2]) < inputs.chunk_frames[0, : sample.num_chunks, None]
        ours = inputs.audio_chunks[0][frames].astype(np.float32)
        differing = [
            name
            for name, equal in {
                "ids": np.array_equal(ids, theirs["input_ids"].numpy()),
                "labels": np.array_equal(labels, theirs["labels"].numpy()),
                "mel": ours.shape == mel.shape and np.abs(ours - mel).max() <= MEL_TOLERANCE,
            }.items()
            if not equal
        ]
        if differing:
            raise MossAudioError(
                f"{drawn.example.name}: expected the same on both sides, found other {', '.join(differing)}: "
                "their times say nothing about each other; run tests/parity."
            )


@dataclass(frozen=True)
class Timing:
    """A row in seconds of a core for an hour of audio, and what the estimate needs besides."""

    row: Comparison
    clip_seconds: float
    sums: dict[str, float]


def measure(
    name: str, order: ExampleOrder, maker: SampleMaker, reader: PyTorchReader, data: DataConfig, batches: int, runs: int
) -> Timing:
    """Medians over runs in turns, after one that is not counted."""
    ours, pytorch = [], []
    for run in range(runs + 1):
        reading = read_ours(order, maker, data, batches)
        if not run:
            check_equal(reader, maker, reading.examples[:: max(len(reading.examples) // 8, 1)])
        start = time.process_time()
        for drawn in reading.examples:
            reader(drawn)
        seconds = time.process_time() - start
        hours = sum(_length(drawn.example) for drawn in reading.examples) / HOUR
        if run:
            ours.append(reading.cpu_seconds / hours)
            pytorch.append(seconds / hours)
    clip_seconds = hours * HOUR / len(reading.examples)
    return Timing(Comparison.of_medians(name, ours, pytorch), clip_seconds, reading.sums)


def _length(example: Example) -> float:
    """Seconds of an example's file, which is not decoded for that."""
    assert example.clip is not None and isinstance(example.clip.audio, str)
    return soundfile.info(example.clip.audio).duration


def rows(
    scratch: Path, formats: Sequence[Format], data: DataConfig, *, clips: int, longest: float, batches: int, runs: int
) -> Iterator[Timing]:
    """Each format beside the released processor's mel; the first one beside `torch.stft` as well."""
    import torch

    torch.set_num_threads(1)
    words = scratch / "tokenizer"
    words.mkdir()
    write_small_tokenizer(words, [f" {word}" for word in WORDS] * 2, 1000)
    maker = SampleMaker(Tokenizer.from_dir(words), CONFIG)
    for kind in formats:
        directory = scratch / kind.extension
        directory.mkdir()
        manifest = Manifest(write_corpus(directory, kind, clips, longest))
        order = ExampleOrder([Group("clips", 1, (Source("clips", manifest, OBJECTIVE),))], seed=0)
        for numpy_mel in (True, False) if kind is formats[0] else (True,):
            reader = PyTorchReader(words, numpy_mel=numpy_mel)
            name = str(kind) if numpy_mel else f"{kind}, torch.stft"
            yield measure(name, order, maker, reader, data, batches, runs)


def cores_to_feed(measured: Timing) -> str:
    """An estimate: the cores that prepare what a host of CHIPS chips trains on, if only audio is trained on."""
    content = Content.of_sums(measured.sums)
    flops = step_flops(CONFIG, content, parameter_specs(CONFIG))
    steps_per_second = CHIPS * V5E.peak_flops * MFU / sum(flops.values())
    tokens = content.tokens
    audio = measured.sums["audio_seconds"] * steps_per_second
    cores = measured.row.ours_seconds / HOUR * audio
    return (
        f"ESTIMATE, {measured.row.name}: {cores:.2f} cores feed {CHIPS} {V5E.name} chips that train all of the 4B "
        f"(stage 2) at an assumed MFU of {MFU:.0%}: {tokens * steps_per_second / CHIPS:.0f} tokens/s a chip, "
        f"{audio:.0f} s of audio/s on all, {sum(flops.values()) / tokens:.3g} FLOPs a token, audio alone. "
        "No TPU was measured."
    )


def run(
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    clips: int = 60,
    batches: int = 24,
    repeats: int = 5,
) -> None:
    """Compares the input pipelines on this machine, on one thread each.

    Args:
        json_file: Write the rows there as a JSON list.
        clips: How many clips of 1 to 30 s there are; they are read in a shuffled order, again and again.
        batches: Sequences of 4096 tokens that a run reads.
        repeats: Timed runs of each side.
    """
    done: list[Timing] = []

    def each(measured: Iterator[Timing]) -> Iterator[Comparison]:
        for one in measured:
            done.append(one)
            yield one.row

    with tempfile.TemporaryDirectory() as scratch:
        found = rows(Path(scratch), FORMATS, DATA, clips=clips, longest=30.0, batches=batches, runs=repeats)
        report(each(found), "CPU s for an hour of audio", json_file)
    for one in done:
        ours, pytorch = 1 / one.row.ours_seconds, 1 / one.row.pytorch_seconds  # hours of audio
        clips_an_hour = HOUR / one.clip_seconds
        print(
            f"{one.row.name}, a core in a second: ours {ours * clips_an_hour:.0f} clips, {ours:.3f} h of audio; "
            f"PyTorch {pytorch * clips_an_hour:.0f} clips, {pytorch:.3f} h"
        )
    for one in done:
        if not one.row.name.endswith("torch.stft"):
            print(cores_to_feed(one))


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(run))
