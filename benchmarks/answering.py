"""Answers through the engine, beside PyTorch one clip at a time: the part `answers` of `benchmarks.vs_pytorch`.

PyTorch's side does what the public code does for each question: mel, encoder, prefill, then a token at a time, with the
same token ids. Both sides draw greedily, and end no answer early.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.side_by_side import Comparison, compare
from moss_audio_jax import Engine, Request, load_model, load_processor
from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.processor import Processor
from moss_audio_jax.small_tokenizer import write_small_tokenizer

CLIPS, SHORTEST, LONGEST = 32, 2.0, 30.0
QUESTIONS = [f"Question {number}: what is heard there?" for number in range(10)]
QUESTION_SECONDS = 60.0
NEW_TOKENS = 64
SLOTS, MAX_LENGTH = 16, 1024


def rows(directory: Path, repeats: int) -> Iterator[Comparison]:
    """The rows, one by one. directory: a checkpoint, which gets a tokenizer. Repeats are three at most."""
    write_small_tokenizer(directory)
    processor, pytorch = load_processor(directory), _PyTorch(directory)
    lengths = np.linspace(SHORTEST, LONGEST, CLIPS)[np.random.default_rng(0).permutation(CLIPS)]
    clips = [_noise(seconds) for seconds in lengths]
    clip = _noise(LONGEST)
    options = {"max_new_tokens": NEW_TOKENS, "eos_ids": ()}
    repeats = min(repeats, 3)
    with Engine(load_model(directory), processor, slots=SLOTS, max_length=MAX_LENGTH) as engine:
        engine.warm_up()
        yield compare(
            f"{CLIPS} clips of {SHORTEST:g} to {LONGEST:g} s; PyTorch one at a time",
            lambda: [reply.ids for reply in engine.run(Request("Transcribe.", [clip], **options) for clip in clips)],
            lambda: [pytorch.answer(processor, "Transcribe.", clip, NEW_TOKENS) for clip in clips],
            repeats,
            check=_require_equal,
        )

        # Each run has a clip of its own, since an engine keeps what it has heard.
        heard = [_noise(QUESTION_SECONDS + run / 100) for run in range(repeats + 1)]
        ours, theirs = iter(heard), iter(heard)

        def ask() -> list[tuple[int, ...]]:
            session = engine.listen(next(ours), **options)
            return [handle.result().ids for handle in [session.submit(question) for question in QUESTIONS]]

        def ask_pytorch() -> list[tuple[int, ...]]:
            clip = next(theirs)
            return [pytorch.answer(processor, question, clip, NEW_TOKENS) for question in QUESTIONS]

        name = f"{len(QUESTIONS)} questions about a clip of {QUESTION_SECONDS:g} s; PyTorch afresh each time"
        yield compare(name, ask, ask_pytorch, repeats, check=_require_equal)
        yield compare(
            f"time to the first token, a clip of {LONGEST:g} s",
            lambda: [engine.run([Request("Transcribe.", [clip], max_new_tokens=1, eos_ids=())])[0].ids],
            lambda: [pytorch.answer(processor, "Transcribe.", clip, 1)],
            repeats,
            check=_require_equal,
        )


class _PyTorch:
    """The reference, as the public code uses it."""

    def __init__(self, directory: Path):
        from transformers import WhisperFeatureExtractor

        from convert.pytorch_reference import load_reference

        self._model = load_reference(directory)
        self._extractor = WhisperFeatureExtractor(feature_size=128)

    def answer(self, processor: Processor, question: str, clip: np.ndarray, count: int) -> tuple[int, ...]:
        """Returns the ids of `count` tokens."""
        import torch
        from transformers import DynamicCache

        model = self._model
        inputs = processor([question], [[clip]])
        ids = torch.from_numpy(inputs.tokens[:, : int((inputs.segment_ids != 0).sum())].astype(np.int64))
        is_audio = ids == processor.config.processor.audio_token_id
        cache, drawn = DynamicCache(config=model.language_model.config), []
        with torch.no_grad():
            mel = torch.from_numpy(self._extractor._np_extract_fbank_features(clip[None], "cpu"))[0]
            audio = model.encode_audio([mel.bfloat16().float()])
            embeds = model.language_model.embed_tokens(ids).index_put((is_audio,), audio.adapter_output)
            with model._deepstack(is_audio, audio.deepstack_merged):
                output = model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            while True:  # logits of the last token alone
                drawn.append(int(model.lm_head(output.last_hidden_state[:, -1]).argmax()))
                if len(drawn) == count:
                    return tuple(drawn)
                embeds = model.language_model.embed_tokens(torch.tensor([drawn[-1:]]))
                output = model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)


def _noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(int(seconds * 1000)).normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32)


def _require_equal(ours: Sequence[tuple[int, ...]], pytorch: Sequence[tuple[int, ...]]) -> None:
    same = sum(one == other for one, other in zip(ours, pytorch, strict=True))
    if same < 0.9 * len(ours):  # a tie between two tokens may go either way
        raise MossAudioError(
            f"all {len(ours)} answers must be PyTorch's, but {len(ours) - same} differ, so the times say nothing: "
            "run tests/parity"
        )
