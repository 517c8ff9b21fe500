"""One example as ids, chunks and a mask: the same as the processor's prompt and the answer after it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_audio_jax.audio import load_audio
from moss_audio_jax.config import EncoderConfig, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.processor import Processor
from moss_audio_jax.tokenizer import Tokenizer
from train.config import with_paths
from train.data.budget import Budget, TooLong
from train.data.manifest import Clip, Example, Message, TimedText
from train.data.packing import pack_row
from train.data.samples import Sample, SampleMaker
from train.recipes import RECIPES

RNG = np.random.default_rng(0)


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
    assert sample.loss_mask.tolist() == [False] * len(prompt_ids) + [True] * len(answer)
    assert sample.num_chunks == (prompt.chunk_frames > 0).sum()
    for name in ("audio_chunks", "chunk_frames", "stem_frames"):
        np.testing.assert_array_equal(getattr(sample.inputs, name), getattr(prompt, name)[:, : sample.num_chunks])
    assert sample.audio_seconds == pytest.approx(sum(map(len, waves)) / 16000, abs=0.02)


def test_plain_text_is_learned_to_its_end(tokenizer: Tokenizer, maker: SampleMaker):
    sample = maker.sample("line 1", "hello")
    assert sample.inputs.tokens[0, : sample.num_tokens].tolist() == tokenizer.encode("hello<|endoftext|>")
    assert sample.loss_mask.all() and sample.num_tokens == 6 and sample.num_chunks == 0


def test_time_markers_can_be_left_out(corpus: Path, tokenizer: Tokenizer, maker: SampleMaker):
    turns = conversation(Clip(str(corpus / "long.wav")))
    without = SampleMaker(tokenizer, MossAudioConfig.preset("tiny"), time_markers=False)
    # 2, 4, 6, 8 and 10
    assert maker.sample("a", turns).num_tokens - without.sample("a", turns).num_tokens == 6


def test_truncated_keeps_audio_and_something_to_learn(corpus: Path, maker: SampleMaker):
    sample = maker.sample("line 1", conversation(Clip(str(corpus / "long.wav")), answer="A long answer."))
    answer_begins = int(sample.loss_mask.argmax())
    whole = Budget(answer_begins + 20, 3)
    assert sample.within(whole, truncate=True) is sample and not sample.truncated
    cut = sample.within(Budget(answer_begins + 3, 3), truncate=True)
    assert cut.num_tokens == answer_begins + 3 and cut.loss_mask.sum() == 3 and cut.truncated
    for budget, truncate in (
        (Budget(answer_begins + 3, 3), False),
        (Budget(answer_begins, 3), True),
        (Budget(40, 3), True),
        (Budget(answer_begins + 20, 2), True),
    ):
        with pytest.raises(TooLong, match=rf"^line 1: expected at most {budget.tokens} tokens and {budget.chunks} "):
            sample.within(budget, truncate=truncate)


def test_a_truncated_conversation_has_whole_clips_and_their_chunks_alone(corpus: Path, maker: SampleMaker):
    """The rest is the sample of the first turns: a later clip goes with its tokens, its chunks and its seconds."""
    long, short = Clip(str(corpus / "long.wav"), name="long"), Clip(str(corpus / "1.wav"), name="short")
    first, both = conversation(short), (*conversation(short), *conversation(long, answer="Two."))
    alone, whole = maker.sample("line 1", first), maker.sample("line 1", both)
    assert (alone.num_chunks, whole.num_chunks) == (1, 4)
    in_the_clip = alone.num_tokens + 60
    for budget in (Budget(in_the_clip, 4), Budget(whole.num_tokens, 3), Budget(whole.num_tokens, 1)):
        for cut in (
            whole.within(budget, truncate=True),
            maker.fitting(Example("line 1", conversation=both), RNG, {"conversation": 1}, budget, truncate=True)[0],
        ):
            assert cut.truncated and cut.num_chunks == alone.num_chunks and cut.audio_seconds == alone.audio_seconds
            np.testing.assert_array_equal(cut.loss_mask, alone.loss_mask)
            packed, expected = (pack_row([sample], Budget(200, 1)) for sample in (cut, alone))
            for name, array in expected.items():
                np.testing.assert_array_equal(packed[name], array)


def test_a_clip_beyond_the_budget_is_not_decoded(maker: SampleMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    soundfile.write(tmp_path / "three_hours.wav", np.zeros(3 * 3600 * 100, np.int16), 100)
    clip = Clip(str(tmp_path / "three_hours.wav"), name="line 1: three_hours.wav")
    monkeypatch.setattr(Clip, "wave", lambda clip: pytest.fail(f"decoded {clip.name}"))
    for truncate in (False, True):
        example = Example("line 1", conversation=conversation(clip))
        with pytest.raises(
            TooLong, match=r"^line 1: expected at most 100 tokens and 64 chunks of audio, found 2700 ch"
        ):
            maker.fitting(example, RNG, {"conversation": 1}, Budget(100, 64), truncate=truncate)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_headers_tell_the_extent(rate: int, maker: SampleMaker, tmp_path: Path):
    for samples in (rate // 20, rate // 3, rate * 4, rate * 9 + 7):
        soundfile.write(tmp_path / "a.wav", np.full(samples, 0.1), rate)
        turns = conversation(Clip(str(tmp_path / "a.wav")), Clip(str(tmp_path / "a.wav"), 0.001, 2.0039))
        sample, extent = maker.sample("a", turns), maker.extent("a", turns)
        np.testing.assert_array_equal(extent.loss_mask, sample.loss_mask)
        np.testing.assert_array_equal(extent.slots, sample.inputs.audio_slots[0, : sample.num_tokens])
        assert extent.chunks(sample.num_tokens) == sample.num_chunks


TEXT = "One two. Three four?\nFive ü 東京が好き。音楽を聴く😀😀😀 " * 9


@pytest.mark.parametrize("tokens", [2, 5, 40, 100, 10_000])
def test_a_long_text_is_split_into_samples_that_learn_all_of_it(tokens: int, tokenizer: Tokenizer, maker: SampleMaker):
    example, budget = Example("line 1", text=TEXT), Budget(tokens, 1)
    samples = maker.fitting(example, RNG, {"plain_text": 1}, budget, truncate=False)
    ids = [sample.inputs.tokens[0, : sample.num_tokens] for sample in samples]
    whole = maker.sample("line 1", TEXT)
    assert max(map(len, ids)) <= tokens and not any(sample.truncated for sample in samples)
    learned = [part[sample.loss_mask] for part, sample in zip(ids, samples, strict=True)]
    np.testing.assert_array_equal(np.concatenate(learned), whole.inputs.tokens[0, : whole.num_tokens])
    for before, after, sample in zip(ids, ids[1:], samples[1:], strict=False):
        assert before[-1] == after[0] and not sample.loss_mask[0] and sample.loss_mask[1:].all()
    rows = [pack_row([sample], budget) for sample in samples]
    assert sum(row["loss_mask"].sum() for row in rows) == whole.num_tokens - 1  # nothing predicts a text's first id
    if tokens >= 40:
        for part in learned:
            tokenizer.decode_bytes(part).decode()  # no character is cut
    again = maker.fitting(example, np.random.default_rng(9), {"plain_text": 1}, budget, truncate=True)
    for sample, other in zip(samples, again, strict=True):
        np.testing.assert_array_equal(sample.inputs.tokens, other.inputs.tokens)


def test_a_conversation_is_one_sample_as_before(corpus: Path, maker: SampleMaker):
    example = Example("line 1", conversation=conversation(Clip(str(corpus / "1.wav"))))
    for budget in (Budget(300, 3), Budget(100, 3)):
        if budget.tokens == 100:
            with pytest.raises(TooLong):
                maker.fitting(example, RNG, None, budget, truncate=False)
            continue
        (sample,) = maker.fitting(example, RNG, None, budget, truncate=False)
        expected = maker(example, RNG)
        np.testing.assert_array_equal(sample.inputs.tokens, expected.inputs.tokens)
        np.testing.assert_array_equal(sample.loss_mask, expected.loss_mask)


def test_labels_beyond_the_clip_are_not_learned(maker: SampleMaker):
    clip = Clip(np.full(32000, 0.1, np.float32), name="line 1: a.wav")
    for end, learned in ((2.05, True), (2.5, False)):
        example = Example("line 1", clip=clip, text="a word", words=(TimedText("word", 0.5, end),))
        for objective in ("transcribe", "transcribe_words"):
            if learned:
                assert maker.fitting(example, RNG, {objective: 1}, Budget(200, 2), truncate=False)
                continue
            with pytest.raises(
                MossAudioError, match=r"^line 1: expected labels within the clip, which ends at 2\.00 s"
            ):
                maker.fitting(example, RNG, {objective: 1}, Budget(200, 2), truncate=False)


def test_data_of_a_fine_tune_may_be_clips_with_their_text(corpus: Path, tokenizer: Tokenizer, maker: SampleMaker):
    group = with_paths(RECIPES["finetune"], data=(str(corpus / "clips.jsonl"),)).mixture.conversations.group("a", 0)
    assert group is not None
    (source,) = group.sources
    sample = maker(source.examples[0], RNG, source.objectives)  # a cut whose only label is its text
    assert learned_text(tokenizer, sample) == "a cut<|im_end|>" and sample.audio_seconds == pytest.approx(
        2.25, abs=0.02
    )


THOUGHT = "<think>\nA dog barks, <think> twice.\n</think>\n\nA dog."


def learned_text(tokenizer: Tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.inputs.tokens[0, : sample.num_tokens][sample.loss_mask], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ({}, f"One.<|im_end|>{THOUGHT}<|im_end|>{THOUGHT}<|im_end|>"),
        ({"thoughts": "mask"}, "One.<|im_end|>\n\nA dog.<|im_end|>\n\nA dog.<|im_end|>"),
        ({"answers": "last"}, f"{THOUGHT}<|im_end|>"),
        ({"answers": "last", "thoughts": "mask"}, "\n\nA dog.<|im_end|>"),
    ],
)
def test_which_answers_are_learned_and_what_of_them(tokenizer: Tokenizer, options: dict, learned: str):
    maker = SampleMaker(tokenizer, MossAudioConfig.preset("tiny"), **options)
    turns = (*conversation(), *conversation(answer=THOUGHT), *conversation(answer=THOUGHT))
    sample = maker.sample("line 1", turns)
    assert learned_text(tokenizer, sample) == learned
    read = tokenizer.decode(sample.inputs.tokens[0, : sample.num_tokens], skip_special_tokens=False)
    earlier = "A dog." if "answers" in options else THOUGHT
    question = "<|im_end|>\n<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n"
    assert read.endswith(f"One.{question}{earlier}{question}{THOUGHT}<|im_end|>")


def test_errors_name_the_example(corpus: Path, maker: SampleMaker):
    short = Clip(np.zeros(100, np.float32), name="line 4: a.wav")
    for read in (maker.extent, maker.sample):
        with pytest.raises(MossAudioError, match=r"^line 4: a\.wav: the wave must have at least 160 samples at"):
            read("line 4", conversation(short))
    with pytest.raises(MossAudioError, match=r"^line 5: "):
        maker.sample("line 5", conversation(answer="<|audio_bos|><|AUDIO|><|audio_eos|>"))
    with pytest.raises(MossAudioError, match=r"^line 6: expected what the objectives caption ask"):
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
        assert (sample.audio_labels[slots < 0] == -1).all()
        for slot, text in zip(slots[slots >= 0], map(decoded(tokenizer), sample.audio_labels[slots >= 0]), strict=True):
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
    assert (sample.audio_labels == -1).all()
