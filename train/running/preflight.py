"""What can be said against training data before it is trained on: everything but what decoding audio would show.

Of each line of a manifest: whether it is valid and has something for the objectives of its group, whether its audio is
there and has a header that makes sense, and, by that header and the tokens of its texts, whether its labels are within
the clip and all of it within a run's budget. A file that is damaged after its header,
or cut short, is found when it is decoded: training skips it and counts it.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from moss_audio_jax.audio import RELEASED_MEL, SAMPLE_RATE
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.storage.paths import AnyPath, is_remote, local_copy, to_path
from moss_audio_jax.tokens import Tokenizer
from moss_audio_jax.weights.locate import locate
from train.config import LEARNED, RunConfig
from train.data.augment import Augmentation
from train.data.budget import TooLong
from train.data.config import DataConfig
from train.data.manifest import Clip, Example, Message, checked_lines
from train.data.objectives import OBJECTIVES, applying, nothing_to_ask
from train.data.samples import SampleMaker, truncate_turns

log = logging.getLogger(__name__)

SHOWN = 5  # problems in the refusal of a run
DATA_GROUP = "conversations"  # of `--data`


@dataclass
class Check:
    """Of one manifest; `problems` does the work, and the counts are complete when it is at its end.

    group: of the mixture, that the manifest is for. objectives: of every group; each of this one's that applies to an
        example has to be within the budget.
    maker: makes samples as the run does; None counts clips alone, where there is no tokenizer.
    fetch: also look at audio on gs://, whose files are fetched whole for it.
    unusable: lines that are invalid, have nothing for the objectives, or whose audio or labels can't be used.
    too_long, truncated: what becomes of examples beyond the budget. split: texts that become several sequences.
    audio_seconds: of all clips, as cut. ignored: how often each key that means nothing here is there, by its place.
    """

    path: AnyPath
    data: DataConfig
    chunk_frames: int
    group: str
    objectives: Mapping[str, Mapping[str, float]]
    maker: SampleMaker | None = None
    fetch: bool = True
    examples: int = field(default=0, init=False)
    unusable: int = field(default=0, init=False)
    too_long: int = field(default=0, init=False)
    truncated: int = field(default=0, init=False)
    split: int = field(default=0, init=False)
    audio_seconds: float = field(default=0.0, init=False)
    ignored: Counter[str] = field(default_factory=Counter, init=False)

    def problems(self) -> Iterator[str]:
        """A sentence for every example that could not be trained on, beginning with its file and line."""
        path = to_path(self.path)
        for _, _, read in checked_lines(path, local_copy(path)):
            self.examples += 1
            try:
                if isinstance(read, MossAudioError):
                    raise read
                self.ignored.update(read.ignored)
                objectives, silent = self._objectives(read), self._without_audio(read)
                if silent.clip is not None and self._is_known(read.clip):
                    read.require_labels_within(silent.clip.num_samples() / SAMPLE_RATE)
                self.truncated += self._is_truncated(silent, objectives)
            except TooLong as error:
                self.too_long += 1
                yield str(error)
            except StorageError:  # no fault of the line
                raise
            except MossAudioError as error:
                self.unusable += 1
                yield str(error)

    def summary(self) -> str:
        beyond = {"skip": "skipped", "truncate": "skipped", "refuse": "refused"}[self.data.oversize]
        counted = "" if self.maker else " (by their audio alone, without the tokens of texts)"
        return (
            f"{self.path}: {self.examples} examples, {self.audio_seconds / 3600:.2f} hours of audio; {self.unusable} "
            f"can't be used, {self.too_long} are too long and would be {beyond}, {self.truncated} truncated, "
            f"{self.split} texts split{counted}; read as {_option(self.group)}"
        )

    def notes(self) -> Iterator[str]:
        """What is no fault: keys that are not read."""
        if self.ignored:
            counts = ", ".join(f"{key} ({count} times)" for key, count in sorted(self.ignored.items()))
            yield f"{self.path}: keys that mean nothing here are ignored: {counts}"

    def _objectives(self, example: Example) -> list[str]:
        """The objectives of the group that apply; raises NothingToAsk, which names the groups that have others."""
        shares = self.objectives[self.group]
        found = list(applying(example, shares))
        if not found:
            others = [_option(name) for name, theirs in self.objectives.items() if applying(example, theirs)]
            advice = f"give the manifest as {' or '.join(others)}" if others else "add labels"
            raise nothing_to_ask(example, shares, advice)
        return found

    def _is_truncated(self, example: Example, objectives: list[str]) -> bool:
        """Whether an example loses its end in one of the objectives; raises TooLong if it can't be trained on."""
        budget, truncate, truncated = self.data.budget, self.data.oversize == "truncate", False
        for name in objectives:
            whole = OBJECTIVES[name].render(example, np.random.default_rng(0))
            if isinstance(whole, str):
                self.split += (
                    self.maker is not None and len(self.maker.extent(example.name, whole).loss_mask) > budget.tokens
                )
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
        return truncated

    def _without_audio(self, example: Example) -> Example:
        """The example with silence for its clips, as long as their headers say, which takes no memory."""
        if example.conversation:
            turns = tuple(
                Message(turn.role, tuple(self._silence(p) if isinstance(p, Clip) else p for p in turn.content))
                for turn in example.conversation
            )
            clips = [piece for turn in turns for piece in turn.content if isinstance(piece, Clip)]
            return replace(example, conversation=turns, clip=clips[0] if example.clip else None)
        return replace(example, clip=example.clip and self._silence(example.clip))

    def _silence(self, clip: Clip) -> Clip:
        assert isinstance(clip.audio, str)  # a manifest holds paths
        samples = clip.num_samples() if self._is_known(clip) else RELEASED_MEL.mel_hop_length
        self.audio_seconds += samples / SAMPLE_RATE
        return Clip(np.broadcast_to(np.float32(0), samples), name=clip.name)

    def _is_known(self, clip: Clip | None) -> bool:
        """Whether the clip's header may be read."""
        return clip is not None and (self.fetch or not is_remote(str(clip.audio)))


def _option(group: str) -> str:
    return f"--mixture.{group}.paths"


def check_of(config: RunConfig, path: AnyPath, group: str | None = None) -> Check:
    """The check of a manifest for a run: its budget, its model's chunks and, if it names one, its tokenizer.

    group: by default the one that names the manifest among its paths, or else that of `--data`.
    """
    groups = config.mixture.manifest_groups()
    named = [name for name, their in groups.items() if to_path(path) in map(to_path, their.paths)]
    group = group or next(iter(named), DATA_GROUP)
    if group not in groups:
        raise MossAudioError(f"--group must be one of {', '.join(groups)}, not {group!r}")
    model = config.model_config()
    chunk_frames = model.audio_config.chunk_frames
    if chunk_frames is None:
        raise MossAudioError(f"{path} can't be checked for a model without chunks, which does not train")
    objectives = {name: their.shares(name) for name, their in groups.items()}
    return Check(path, config.data, chunk_frames, group, objectives, _maker(config, model))


def _maker(config: RunConfig, model: MossAudioConfig) -> SampleMaker | None:
    source = config.model.tokenizer_source
    if source in (None, LEARNED):
        return None
    tokenizer = Tokenizer.from_dir(locate(source).files)
    return sample_maker(config, tokenizer, model)


def sample_maker(
    config: RunConfig, tokenizer: Tokenizer, model: MossAudioConfig, augmentation: Augmentation | None = None
) -> SampleMaker:
    """Makes samples as a run with this configuration does."""
    return SampleMaker(
        tokenizer,
        model,
        answers=config.data.answers,
        thoughts=config.data.thoughts,
        default_prompt=config.data.default_prompt,
        augmentation=augmentation,
    )


def require_usable(config: RunConfig) -> None:
    """Raises MossAudioError if a manifest of the mixture has an example that can't be used, or none that can.

    That an example is too long is a reason where the run would be stopped by it, and else a line in the log, for which
    texts are not tokenised.
    """
    for name, group in config.mixture.manifest_groups().items():
        for path in group.paths:
            if not to_path(path).is_dir():  # shards were decoded when they were made
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
            f"{count} of {check.examples} examples can't be trained on, and nothing was begun: {'; '.join(shown)}. "
            f"`moss-audio-train check {check.path} --group {check.group}` lists all; repair the data."
        )
    if check.too_long == check.examples:
        raise MossAudioError(f"every example is too long: {check.summary()}; raise the budget.")
    notes = [check.summary()] if check.too_long or check.truncated else []
    for note in (*notes, *check.notes()):
        log.warning("%s", note)
