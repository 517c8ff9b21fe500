"""One example as ids, chunks and a mask: the same as the processor's prompt and the answer after it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moss_audio_jax.audio import load_audio
from moss_audio_jax.config import EncoderConfig, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.processor import Processor
from moss_audio_jax.tokens import Tokenizer
from train.data.manifest import Clip, Example, Message, TimedText
from train.data.samples import SampleMaker


def conversation(*clips: Clip, answer: str = "One.") -> tuple[Message, ...]:
    return Message("user", (*clips, "Who is it?")), Message("assistant", (answer,))


def test_sample_is_the_prompt_and_the_learned_answer(corpus: Path, tokenizer: Tokenizer, maker: SampleMaker):
    clips = [Clip(str(corpus / "1.wav")), Clip(str(corpus / "long.wav"), 0.5, 9.25)]
    sample = maker.sample("line 1", conversation(*clips))
    waves = [load_audio(corpus / "1.wav"), load_audio(corpus / "long.wav", start=0.5, end=9.25)]
    prompt = Processor(tokenizer, MossAudioConfig.preset("tiny"))(["Who is it?"], [waves])
    ids = sample.inputs.tokens[0, : sample.num_tokens]
    prompt_ids = prompt.tokens[0][prompt.segment_ids[0] == 1]
    answer = tokenizer.encode("One.<|im_end|>")
    assert ids.tolist() == [*prompt_ids.tolist(), *answer]
    assert sample.learned.tolist() == [False] * len(prompt_ids) + [True] * len(answer)
    for name in ("chunk_frames", "stem_frames"):
        np.testing.assert_array_equal(getattr(sample.inputs, name), getattr(prompt, name))
    np.testing.assert_array_equal(sample.inputs.audio_chunks, prompt.audio_chunks[:, : sample.num_chunks])
    assert sample.num_chunks == (prompt.chunk_frames > 0).sum()
    assert sample.audio_seconds == pytest.approx(sum(map(len, waves)) / 16000, abs=0.02)


def test_plain_text_is_learned_to_its_end(tokenizer: Tokenizer, maker: SampleMaker):
    sample = maker.sample("line 1", "hello")
    assert sample.inputs.tokens[0, : sample.num_tokens].tolist() == tokenizer.encode("hello<|endoftext|>")
    assert sample.learned.all() and sample.num_tokens == 6 and sample.num_chunks == 0


def test_time_markers_can_be_left_out(corpus: Path, tokenizer: Tokenizer, maker: SampleMaker):
    turns = conversation(Clip(str(corpus / "long.wav")))
    without = SampleMaker(tokenizer, MossAudioConfig.preset("tiny"), time_markers=False)
    # 2, 4, 6, 8 and 10
    assert maker.sample("a", turns).num_tokens - without.sample("a", turns).num_tokens == 6


def test_truncated_keeps_audio_and_something_to_learn(corpus: Path, maker: SampleMaker):
    sample = maker.sample("line 1", conversation(Clip(str(corpus / "long.wav")), answer="A long answer."))
    answer_begins = int(sample.learned.argmax())
    cut = sample.truncated(answer_begins + 3)
    assert cut is not None and cut.num_tokens == answer_begins + 3 and cut.learned.sum() == 3
    assert sample.truncated(answer_begins) is None
    assert sample.truncated(40) is None


def test_errors_name_the_example(corpus: Path, maker: SampleMaker):
    short = Clip(np.zeros(100, np.float32), name="line 4: a.wav")
    with pytest.raises(MossAudioError, match=r"^line 4: a\.wav: expected at least 160 samples"):
        maker.sample("line 4", conversation(short))
    with pytest.raises(MossAudioError, match=r"^line 5: "):
        maker.sample("line 5", conversation(answer="<|audio_bos|><|AUDIO|><|audio_eos|>"))
    with pytest.raises(MossAudioError, match=r"^line 6: expected labels"):
        maker(Example("line 6", text="hi"), np.random.default_rng(0), {"caption": 1})


def test_chunks_of_a_fixed_length_are_needed(tokenizer: Tokenizer):
    with pytest.raises(MossAudioError, match="chunk_frames=None"):
        SampleMaker(tokenizer, MossAudioConfig(audio_config=EncoderConfig(chunk_frames=None)))


def test_what_is_heard_at_audio_tokens_and_when(tokenizer: Tokenizer, maker: SampleMaker):
    wave = np.random.default_rng(0).normal(0, 0.1, 16000 * 6).astype(np.float32)
    clip = Clip(wave, name="a clip")
    # Events from 0.8 to 2.0 s and from 4.4 s to the end: tokens 10 to 25 and 55 to 74, of 0.08 s each.
    events = (TimedText("tone", 0.8, 2.0), TimedText("hum", 4.4, 6.0))
    example = Example("an example", clip=clip, events=events)
    said, told = [set() for _ in range(75)], [set() for _ in range(75)]
    for seed in range(60):
        sample = maker(example, np.random.default_rng(seed), {"events": 1.0})
        slots = sample.inputs.audio_slots[0, : sample.num_tokens]
        assert (sample.heard[slots < 0] == -1).all()
        for slot, text in zip(slots[slots >= 0], map(decoded(tokenizer), sample.heard[slots >= 0]), strict=True):
            (told if text.isdecimal() else said)[slot].add(text)
    expected = ["."] * 10 + ["["] + ["t"] * 14 + ["]"] + ["."] * 29 + ["["] + ["h"] * 19  # a byte a token
    assert [found == {text} for found, text in zip(said, expected, strict=True)] == [True] * 75
    middles = [(slot + 0.5) * 0.08 for slot in range(75)]
    assert told == [{str(int(middle) % 10), str(int(middle * 10) % 10)} for middle in middles]


def decoded(tokenizer: Tokenizer) -> Callable[[int], str]:
    return lambda token_id: tokenizer.decode([int(token_id)])


def test_nothing_is_said_of_audio_without_labels(maker: SampleMaker):
    clip = Clip(np.ones(16000, np.float32), name="a clip")
    sample = maker(Example("an example", clip=clip, text="hi"), np.random.default_rng(0), {"transcribe": 1.0})
    assert (sample.heard == -1).all()
