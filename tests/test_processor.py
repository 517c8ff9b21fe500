"""Questions and sounds to inputs: the recorded prompt and mel, several clips, and mistakes by name."""

import json

import numpy as np
import pytest
import soundfile

from moss_audio_jax import MossAudioConfig, MossAudioError, Processor, load_processor
from moss_audio_jax.small_tokenizer import write_small_tokenizer


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    directory = tmp_path_factory.mktemp("tiny")
    MossAudioConfig.preset("tiny").save_hf(directory)
    write_small_tokenizer(directory)
    return load_processor(directory)


def wave(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)).astype(np.float32)


def test_the_recorded_prompt_and_mel(goldens_dir):
    recorded = np.load(goldens_dir / "e2e_test_en.npz")
    processor = load_processor(goldens_dir / "tiny-hf")
    inputs = processor([str(recorded["text"])], [[recorded["waveform_16k"]]])
    length = recorded["input_ids"].shape[1]
    np.testing.assert_array_equal(inputs.tokens[0, :length], recorded["input_ids"][0])
    assert (inputs.segment_ids[0] != 0).sum() == length
    frames = inputs.audio_chunks[0].reshape(-1, 128)[:1000].T
    np.testing.assert_array_equal(frames, recorded["mel_bf16_as_f32"][0])


def test_paths_bytes_and_waves_are_the_same_clip(processor, tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, wave(1.0), 16000, subtype="FLOAT")
    mels = [processor.mel(clip) for clip in (wave(1.0), path, str(path), path.read_bytes())]
    for mel in mels[1:]:
        np.testing.assert_array_equal(mel, mels[0])


def test_several_clips_and_sequences(processor):
    inputs = processor(["Which is louder?", "Hello"], [[wave(5.0), wave(0.3, seed=1)], []])
    assert inputs.chunk_frames[0].tolist() == [400, 100, 30] and inputs.chunk_frames[1].sum() == 0
    assert (inputs.audio_slots >= 0).sum(1).tolist() == [63 + 4, 0]
    assert "Which is louder?" in processor.decode(inputs.tokens[0][inputs.segment_ids[0] != 0])


def test_time_markers_and_the_system_prompt_are_options(processor):
    def ids(**options):
        inputs = processor("?", [[wave(2.5)]], **options)
        return inputs.tokens[0][inputs.segment_ids[0] != 0].tolist()

    with_markers, without = ids(), ids(time_markers=False)
    two = processor.tokenizer.encode("2")
    assert len(with_markers) == len(without) + 1 and with_markers.count(two[0]) == without.count(two[0]) + 1
    assert processor.decode(ids(system_prompt="Be brief.")).startswith("system\nBe brief.")


def test_mistakes_are_named(processor, tmp_path):
    with pytest.raises(MossAudioError, match="2 texts but 1 lists of clips"):
        processor(["a", "b"], [[wave(1.0)]])
    short = tmp_path / "short.wav"
    soundfile.write(short, wave(0.005), 16000)
    with pytest.raises(MossAudioError, match=r"short\.wav"):
        processor(["a"], [[short]])
    with pytest.raises(MossAudioError, match="given as an array"):
        processor(["a"], [[np.zeros((2, 16000), np.float32)]])
    with pytest.raises(MossAudioError, match="2 audio span"):
        processor(["<|audio_bos|><|AUDIO|><|audio_eos|>" * 2], [[wave(1.0)]])


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    MossAudioConfig.preset("tiny").save_hf(tmp_path)
    write_small_tokenizer(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"ab": 512}), "utf-8")
    with pytest.raises(MossAudioError, match=r"ids up to 512, and the vocab_size of .* is 512"):
        load_processor(tmp_path)
