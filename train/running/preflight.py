"""Checks of training data before training, without decoding audio.

Each line of a manifest must be valid and have labels for an objective of its group. Its audio file must exist and have
a valid header. By that header, labels must be within the clip. By the header and the tokens of its texts, the example
must be within the run's budget. A file that is damaged after its header or truncated is found when it is decoded:
training skips and counts it.
"""

import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from moss_audio_jax.audio import RELEASED_MEL, SAMPLE_RATE
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.storage.paths import AnyPath, is_remote, to_path
from moss_audio_jax.tokenizer import Tokenizer
from moss_audio_jax.weights.locate import locate
from train.config import LEARNED, RunConfig
from train.data.augment import Augmentation
from train.data.budget import TooLong
from train.data.config import ColumnsConfig, DataConfig
from train.data.manifest import Clip, Example, Message
from train.data.objectives import OBJECTIVES, applying, nothing_to_ask
from train.data.samples import SampleMaker, truncate_turns
from train.data.shards import damaged, examples_or_errors, is_shards
from train.running.sizes import Sizes

log = logging.getLogger(__name__)

SHOWN = 5  # problems listed in the error message
DATA_GROUP = "conversations"  # the group of `--data`


@dataclass
class Check:
    """Check of one manifest or other source. The counts are complete once `problems` is exhausted.

    group: group of the mixture that the manifest belongs to.
    objectives: group -> objective -> share. Every objective of `group` that applies to an example must be within the
        budget.
    maker: makes samples as the run does; None without a tokenizer, which counts clips only.
    columns: of a source that is no manifest.
    fetch: also check audio on gs://, which downloads the files.
    damaged: number of shards whose content is not what was written.
    unusable: number of lines that are invalid, have no labels for the objectives, or have unusable audio or labels.
    too_long, truncated: numbers of examples beyond the budget that are left out or lose their end.
    split: number of texts that become several sequences.
    audio_seconds: length of all clips, as cut.
    ignored: unknown key and its place -> number of times.
    sizes: of the examples that can be trained on.
    """

    path: AnyPath
    data: DataConfig
    chunk_frames: int
    group: str
    objectives: Mapping[str, Mapping[str, float]]
    maker: SampleMaker | None = None
    columns: ColumnsConfig | None = None
    fetch: bool = True
    damaged: int = field(default=0, init=False)
    examples: int = field(default=0, init=False)
    unusable: int = field(default=0, init=False)
    too_long: int = field(default=0, init=False)
    truncated: int = field(default=0, init=False)
    split: int = field(default=0, init=False)
    audio_seconds: float = field(default=0.0, init=False)
    ignored: Counter[str] = field(default_factory=Counter, init=False)
    sizes: Sizes = field(default_factory=Sizes, init=False)

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every example that can't be trained on, which begins with its file and line.

        Shards whose content is not what was written come first.
        """
        for problem in damaged(self.path) if is_shards(self.path) else ():
            self.damaged += 1
            yield problem
        for read in examples_or_errors(self.path, self.columns):
            self.examples += 1
            before = self.audio_seconds
            try:
                if isinstance(read, MossAudioError):
                    raise read
                self.ignored.update(read.ignored)
                objectives, silent = self._objectives(read), self._without_audio(read)
                if silent.clip is not None and self._is_known(read.clip):
                    read.require_labels_within(silent.clip.num_samples() / SAMPLE_RATE)
                self.truncated += self._is_truncated(silent, objectives)
                self.sizes.seconds.append(round(self.audio_seconds - before, 6))
            except TooLong as error:
                self.too_long += 1
                yield str(error)
            except StorageError:  # not the fault of the line
                raise
            except MossAudioError as error:
                self.unusable += 1
                yield str(error)

    def summary(self) -> str:
        """Returns the counts as one sentence."""
        beyond = {"skip": "skipped", "truncate": "skipped", "refuse": "refused"}[self.data.oversize]
        counted = "" if self.maker else " (counting audio only, without the tokens of texts)"
        damaged = f"; {self.damaged} shards are damaged" if self.damaged else ""
        return (
            f"{self.path}: {self.examples} examples, {self.audio_seconds / 3600:.2f} hours of audio; {self.unusable} "
            f"can't be used, {self.too_long} are too long and would be {beyond}, {self.truncated} truncated, "
            f"{self.split} texts split{counted}{damaged}; read as {_option(self.group)}"
        )

    def statistics(self) -> Iterator[str]:
        """Yields sentences about the sizes of the examples."""
        for sentence in self.sizes.sentences(self.data):
            yield f"{self.path}: {sentence}"

    def samples(self, count: int) -> Iterator[str]:
        """Yields the first examples as they are trained on, or why they are not; decodes their audio.

        Learned text is between ⟦ and ⟧.
        """
        assert self.maker is not None
        shares = self.objectives[self.group]
        for index, read in enumerate(itertools.islice(examples_or_errors(self.path, self.columns), count)):
            try:
                if isinstance(read, MossAudioError):
                    raise read
                yield self.maker.spelled(self.maker(read, np.random.default_rng([0, index]), shares))
            except StorageError:
                raise
            except MossAudioError as error:
                yield str(error)

    def notes(self) -> Iterator[str]:
        """Yields remarks that are no problems: unknown keys, which are ignored."""
        if self.ignored:
            counts = ", ".join(f"{key} ({count} times)" for key, count in sorted(self.ignored.items()))
            yield f"{self.path}: unknown keys are ignored: {counts}"

    def _objectives(self, example: Example) -> list[str]:
        """Returns the group's objectives that apply; raises NothingToAsk, which names groups whose objectives apply."""
        shares = self.objectives[self.group]
        found = list(applying(example, shares))
        if not found:
            others = [_option(name) for name, theirs in self.objectives.items() if applying(example, theirs)]
            advice = f"give the manifest as {' or '.join(others)}" if others else "add labels"
            raise nothing_to_ask(example, shares, advice)
        return found

    def _is_truncated(self, example: Example, objectives: list[str]) -> bool:
        """Returns True if an example is truncated in any of the objectives. Raises TooLong if it can't be trained on.

        Also counts texts that are split.
        """
        budget, truncate, truncated = self.data.budget, self.data.oversize == "truncate", False
        sizes: list[tuple[int, int]] = []
        for name in objectives:
            whole = OBJECTIVES[name].render(example, np.random.default_rng(0))
            if isinstance(whole, str):
                if self.maker is not None:
                    total = len(self.maker.extent(example.name, whole).loss_mask)
                    self.split += total > budget.tokens
                    sizes.append((total, 0))
                continue
            cut = truncate_turns(
                example.name, whole, budget, self.chunk_frames, truncate=truncate, answers=self.data.answers
            )
            truncated |= cut is not whole
            if self.maker is not None:
                extent = self.maker.extent(example.name, cut)
                kept = extent.within(budget, truncate=truncate)
                if kept is None:
                    total = len(extent.loss_mask)
                    raise budget.exceeded(example.name, f"{total} and {extent.chunks(total)}")
                truncated |= kept < len(extent.loss_mask)
                sizes.append((kept, extent.chunks(kept)))
        if sizes:  # those of the longest question and answer
            tokens, chunks = max(sizes)
            self.sizes.tokens.append(tokens)
            self.sizes.chunks.append(chunks)
        return truncated

    def _without_audio(self, example: Example) -> Example:
        """Replaces the clips of an example by silence of the lengths in their headers, which takes no memory."""
        if example.conversation:
            turns = tuple(
                Message(turn.role, tuple(self._silence(p) if isinstance(p, Clip) else p for p in turn.content))
                for turn in example.conversation
            )
            clips = [piece for turn in turns for piece in turn.content if isinstance(piece, Clip)]
            return replace(example, conversation=turns, clip=clips[0] if example.clip else None)
        return replace(example, clip=example.clip and self._silence(example.clip))

    def _silence(self, clip: Clip) -> Clip:
        """Returns silence of the clip's length, or of one mel frame if its header may not be read."""
        samples = clip.num_samples() if self._is_known(clip) else RELEASED_MEL.mel_hop_length
        self.audio_seconds += samples / SAMPLE_RATE
        return Clip(np.broadcast_to(np.float32(0), samples), name=clip.name)

    def _is_known(self, clip: Clip | None) -> bool:
        """Returns True if the clip's header may be read."""
        return clip is not None and (self.fetch or not (isinstance(clip.audio, str) and is_remote(clip.audio)))


def _option(group: str) -> str:
    return f"--mixture.{group}.paths"


def check_of(config: RunConfig, path: AnyPath, group: str | None = None) -> Check:
    """Makes the check of a manifest for a run, with the run's budget, model and tokenizer (if it names one).

    group: by default the group that has the manifest in its paths, or else the group of `--data`.
    """
    groups = config.mixture.manifest_groups()
    named = [name for name, their in groups.items() if to_path(path) in map(to_path, their.paths)]
    group = group or next(iter(named), DATA_GROUP)
    if group not in groups:
        raise MossAudioError(f"--group must be one of {', '.join(groups)}, not {group!r}")
    model = config.model_config()
    chunk_frames = model.audio_config.chunk_frames
    if chunk_frames is None:
        raise MossAudioError(f"{path} can't be checked for a model without audio chunks, which can't be trained")
    objectives = {name: their.shares(name) for name, their in groups.items()}
    return Check(path, config.data, chunk_frames, group, objectives, _maker(config, model), config.columns)


def with_bytes(check: Check, config: RunConfig) -> Check:
    """Returns the check with a tokenizer of bytes, if it has none: enough to show examples, but not to count tokens."""
    if check.maker is not None:
        return check
    with tempfile.TemporaryDirectory() as directory:
        write_small_tokenizer(directory)
        return replace(check, maker=sample_maker(config, Tokenizer.from_dir(directory), config.model_config()))


def _maker(config: RunConfig, model: MossAudioConfig) -> SampleMaker | None:
    """Makes samples as the run does; None if its tokenizer does not exist yet."""
    source = config.model.tokenizer_source
    if source in (None, LEARNED):
        return None
    tokenizer = Tokenizer.from_dir(locate(source, weights=False).files)
    return sample_maker(config, tokenizer, model)


def sample_maker(
    config: RunConfig, tokenizer: Tokenizer, model: MossAudioConfig, augmentation: Augmentation | None = None
) -> SampleMaker:
    """Creates the `SampleMaker` of a run with this configuration."""
    return SampleMaker(
        tokenizer,
        model,
        answers=config.data.answers,
        thoughts=config.data.thoughts,
        label_times=config.data.label_times,
        default_prompt=config.data.default_prompt,
        augmentation=augmentation,
    )


def require_usable(config: RunConfig) -> None:
    """Raises MossAudioError if a manifest of the mixture has an unusable example, or only examples that are too long.

    With `oversize` "refuse" any example that is too long is an error too. Otherwise these are counted in the log by
    their audio only: texts are not tokenised.
    """
    for name, group in config.mixture.manifest_groups().items():
        for path in group.paths:
            if not is_shards(path):  # they were decoded when they were made
                check = replace(check_of(config, path, name), fetch=False)
                _require_usable(check if config.data.oversize == "refuse" else replace(check, maker=None))


def _require_usable(check: Check) -> None:
    shown: list[str] = []
    stops = check.data.oversize == "refuse"
    for problem in check.problems():
        if len(shown) < SHOWN and (stops or check.unusable > len(shown)):
            shown.append(problem.rstrip("."))
    count = check.unusable + stops * check.too_long
    if count:
        raise MossAudioError(
            f"{count} of {check.examples} examples can't be trained on: {'; '.join(shown)}: repair the data; "
            f"`moss-audio-train check {check.path} --group {check.group}` lists all problems"
        )
    if check.too_long == check.examples:
        raise MossAudioError(f"every example is too long: {check.summary()}: raise --data.tokens or --data.chunks")
    notes = [check.summary()] if check.too_long or check.truncated else []
    for note in (*notes, *check.notes()):
        log.warning("%s", note)
