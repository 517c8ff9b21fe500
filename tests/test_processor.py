"""Questions and sounds to inputs: the recorded prompt and mel, several clips, and mistakes by name."""

import io
import json
from dataclasses import fields

import jax.numpy as jnp
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


class Tensor:
    """A wave that NumPy can read, as PyTorch's tensors are, or can't, as on a GPU."""

    def __init__(self, values: np.ndarray | None):
        self.values = values

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if self.values is None:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.values


class Decoder(dict):
    """As datasets 4 give it."""

    def get_all_samples(self):
        raise NotImplementedError


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


def test_a_clip_in_every_form_is_the_same_clip(processor, tmp_path):
    path, samples = tmp_path / "clip.wav", wave(1.0)
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    content = path.read_bytes()
    expected = processor(["?"], [[samples]])
    with open(path, "rb") as opened:
        forms = [
            path, str(path), content, bytearray(content), memoryview(content), io.BytesIO(content), opened,
            samples, samples[None], samples[:, None], samples.astype(np.float64), jnp.asarray(samples), Tensor(samples),
            (samples, 16000), (Tensor(samples[None]), 16000.0),
            {"array": samples, "sampling_rate": 16000, "path": "elsewhere.wav"},
            {"array": samples.tolist(), "sampling_rate": np.int64(16000)},
            {"bytes": content, "path": "elsewhere.wav"}, {"bytes": None, "path": str(path)},
            Decoder(array=samples, sampling_rate=16000),
        ]  # fmt: skip
        for form in forms:
            assert same(processor("?", form), expected), form
            if hasattr(form, "seek"):
                form.seek(0)
            assert same(processor("?", [form]), expected), form
            if hasattr(form, "seek"):
                form.seek(0)
            assert same(processor(["?"], [[form]]), expected), form


def test_a_wave_is_resampled_from_its_own_rate(processor, tmp_path):
    path, samples = tmp_path / "clip.wav", wave(1.0, 44100)
    soundfile.write(path, samples, 44100, subtype="FLOAT")
    for form in ((samples, 44100), {"array": samples, "sampling_rate": 44100}):
        np.testing.assert_array_equal(processor.mel(form), processor.mel(path))


def test_lists_of_clips_in_every_clear_form(processor):
    a, b = wave(1.0), wave(2.0, seed=1)
    both = processor(["?"], [[a, b]])
    assert same(processor("?", [a, b]), both) and same(processor("?", (a, b)), both)
    assert same(processor(["?"], [a, b]), both)
    assert same(processor(["?", "!"], [a, [b]]), processor(["?", "!"], [[a], [b]]))
    assert same(processor("?", []), processor("?")) and same(processor("?", [[]]), processor("?"))
    assert same(processor(["?", "!"], [None, a]), processor(["?", "!"], [[], [a]]))


@pytest.mark.parametrize(
    "texts, audio, found",
    [
        ("?", 3, "audio must be a clip, .* not int '3': give paths"),
        ("?", [0.1, 0.2], "the clips of a text must be a list, not float"),
        ("?", [[0.1, 0.2]], "a clip must be a sound, not float"),
        ("?", [[None]], "a clip must be a sound, not NoneType"),
        ("?", {"sound": "a.wav"}, "not dict"),
        ("?", {"array": wave(1.0)}, r"must hold 'sampling_rate', not only \['array'\]"),
        ("?", {"bytes": None, "path": None}, "must hold an array, bytes or a path"),
        ("?", (wave(1.0), 0), "from 100 to 384,000 Hz, not 0"),
        ("?", (wave(1.0), 44100.5), "a whole number .*, not 44100.5"),
        ("?", (wave(1.0), np.nan), "a whole number .*, not nan"),
        ("?", {"array": wave(1.0), "sampling_rate": "16 kHz"}, "a whole number .*, not 16 kHz"),
        ("?", (np.zeros((2, 100), np.float32), 8000), r"not float32 \[2, 100\]"),
        ("?", Tensor(None), "can't be converted to NumPy .*cuda:0"),
        ("?", io.StringIO("text"), "must be opened to read bytes, not str"),
        (["?", "!"], "a.wav", "2 texts but 1 lists of clips"),
    ],
)
def test_what_is_no_clip_is_refused_in_a_sentence(processor, texts, audio, found):
    with pytest.raises(MossAudioError, match=found) as error:
        processor(texts, audio)
    assert "\n" not in str(error.value)


def test_a_mel_that_is_not_finite_is_refused_by_the_name_of_its_file(processor, tmp_path):
    loud = tmp_path / "loud.wav"
    soundfile.write(loud, wave(1.0) * np.float32(1e38), 16000, subtype="FLOAT")
    with pytest.raises(MossAudioError, match=r"loud\.wav: the samples must be about -1 to 1, not up to"):
        processor("?", loud)


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
