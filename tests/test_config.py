"""Configurations are read and written back equal; what would compute something else is refused by name."""

import copy
import dataclasses
import json

import pytest

from moss_audio_jax import MossAudioConfig, MossAudioError
from moss_audio_jax.config import CONFIG_FILES, PRESETS, EncoderConfig


def write(directory, files: dict[str, dict]):
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), "utf-8")
    return directory


@pytest.fixture
def released() -> dict[str, dict]:
    return MossAudioConfig.preset("4b").to_hf()


def changed(files: dict[str, dict], section: str | None, **values) -> dict[str, dict]:
    files = copy.deepcopy(files)
    config = files["config.json"]
    (config if section is None else config[section]).update(values)
    return files


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_presets_are_the_released_files(size, goldens_dir):
    reference = goldens_dir.parent / "reference"
    files = MossAudioConfig.preset(size).to_hf()
    expected = {"config.json": f"config-{size}.json"} | {name: name for name in CONFIG_FILES[1:]}
    for name, recorded in expected.items():
        assert json.dumps(files[name]) == json.dumps(json.loads((reference / recorded).read_text())), name


@pytest.mark.parametrize("preset", PRESETS)
def test_files_come_back_equal(preset, tmp_path):
    config = MossAudioConfig.preset(preset)
    config.save_hf(tmp_path)
    again = MossAudioConfig.from_hf(tmp_path)
    assert again == config and hash(again) == hash(config)
    assert again.to_hf() == config.to_hf()


def test_keys_that_this_port_does_not_use_survive(released, tmp_path):
    files = changed(released, "audio_config", pretrained_path="elsewhere") | {"generation_config.json": {"top_k": 50}}
    config = MossAudioConfig.from_hf(write(tmp_path, files))
    assert config.to_hf() == files


def test_a_changed_field_is_written(released, tmp_path):
    config = MossAudioConfig.from_hf(write(tmp_path, released))
    language = dataclasses.replace(config.language_config, num_hidden_layers=4, rope_theta=5e5)
    audio = dataclasses.replace(config.audio_config, chunk_frames=800)
    smaller = dataclasses.replace(config, language_config=language, audio_config=audio, eos_ids=(7, 8))
    smaller.save_hf(tmp_path)
    again = MossAudioConfig.from_hf(tmp_path)
    assert again == smaller
    content = again.to_hf()["config.json"]
    assert content["num_hidden_layers"] == 4 and content["language_config"]["layer_types"] == ["full_attention"] * 4
    assert content["audio_config"]["n_window"] == 400 and content["language_config"]["eos_token_id"] == [7, 8]


def test_chunks_are_twice_n_window_and_400_frames_without_it(released, tmp_path):
    assert "n_window" not in released["config.json"]["audio_config"]
    assert MossAudioConfig.from_hf(write(tmp_path, released)).audio_config.chunk_frames == 400
    config = MossAudioConfig.from_hf(write(tmp_path, changed(released, "audio_config", n_window=100)))
    assert config.audio_config.chunk_frames == 200
    whole = MossAudioConfig.from_hf(write(tmp_path, changed(released, "audio_config", n_window=None)))
    assert whole.audio_config.chunk_frames is None
    assert whole.to_hf()["config.json"]["audio_config"]["n_window"] is None


def test_rope_parameters_of_newer_transformers(released, tmp_path):
    files = changed(released, "language_config", rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    del files["config.json"]["language_config"]["rope_theta"]
    config = MossAudioConfig.from_hf(write(tmp_path, files))
    assert config.language_config.rope_theta == 12345.0
    # Transformers 4 reads the older key alone.
    assert config.to_hf() == changed(files, "language_config", rope_theta=12345.0)


def test_deepstack_takes_the_first_taps_listed(released, tmp_path):
    files = changed(released, "audio_config", deepstack_encoder_layer_indexes=[24, 8])
    files["config.json"]["deepstack_num_inject_layers"] = None
    config = MossAudioConfig.from_hf(write(tmp_path, files))
    assert config.audio_config.deepstack_encoder_layer_indexes == (24, 8) and config.num_deepstack == 2
    capped = MossAudioConfig.from_hf(write(tmp_path, changed(files, None, deepstack_num_inject_layers=1)))
    assert capped.num_deepstack == 1


def test_moss_music_tied_heads_and_several_ends(released, tmp_path):
    files = changed(released, None, model_type="moss_music", tie_word_embeddings=True)
    files["generation_config.json"]["eos_token_id"] = [151645, 151643]
    config = MossAudioConfig.from_hf(write(tmp_path, files))
    assert config.tie_word_embeddings and config.eos_ids == (151645, 151643)
    assert config.to_hf() == files


def test_both_places_of_the_rotary_base_must_agree(released, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    files = changed(released, "language_config", rope_parameters=rope, rope_theta=12345)
    config = MossAudioConfig.from_hf(write(tmp_path, files))
    assert config.language_config.rope_theta == 12345 and config.to_hf() == files
    with pytest.raises(MossAudioError, match=r"rope_parameters has the rope_theta 12345.0 and .* itself 10000"):
        MossAudioConfig.from_hf(write(tmp_path, changed(files, "language_config", rope_theta=10000)))


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        (None, {"model_type": "whisper"}, "model_type"),
        (None, {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        (None, {"audio_config": None}, "audio_config"),
        (None, {"deepstack_num_inject_layers": -1}, "deepstack_num_inject_layers"),
        ("audio_config", {"activation_function": "relu"}, "activation_function"),
        ("audio_config", {"downsample_rate": 4}, "downsample_rate"),
        ("audio_config", {"n_window": 3}, "chunk_frames"),
        ("audio_config", {"d_model": 1281}, "d_model"),
        ("audio_config", {"encoder_layers": "many"}, "encoder_layers"),
        ("audio_config", {"deepstack_encoder_layer_indexes": [8, 32]}, "deepstack_encoder_layer_indexes"),
        ("audio_config", {"deepstack_encoder_layer_indexes": [8, 8]}, "deepstack_encoder_layer_indexes"),
        ("language_config", {"model_type": "llama"}, "language_config.model_type"),
        ("language_config", {"hidden_act": "gelu"}, "hidden_act"),
        ("language_config", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ("language_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type"),
        ("language_config", {"rope_parameters": {"rope_theta": 1e6, "factor": 2}}, "factor"),
        ("language_config", {"attention_bias": True}, "attention_bias"),
        ("language_config", {"use_sliding_window": True}, "use_sliding_window"),
        ("language_config", {"layer_types": ["sliding_attention"] * 36}, "layer_types"),
        ("language_config", {"hidden_size": None}, "hidden_size"),
        ("language_config", {"num_key_value_heads": 5}, "num_key_value_heads"),
        ("language_config", {"num_hidden_layers": 2}, "layer_types"),
    ],
)
def test_what_this_port_does_not_implement_is_refused(section, values, named, released, tmp_path):
    with pytest.raises(MossAudioError, match=named) as error:
        MossAudioConfig.from_hf(write(tmp_path, changed(released, section, **values)))
    assert str(tmp_path) in str(error.value)


NONE_OF_SIZE = (0, -1, 8.0, True, "8", [8], 2**40)


@pytest.mark.parametrize("value", NONE_OF_SIZE)
@pytest.mark.parametrize("field", ["encoder_layers", "encoder_attention_heads", "num_mel_bins"])
def test_sizes_are_positive_integers(field, value, released, tmp_path):
    with pytest.raises(MossAudioError, match=rf"{field} must be an integer from 1 to [\d,]+, not"):
        MossAudioConfig.from_hf(write(tmp_path, changed(released, "audio_config", **{field: value})))


@pytest.mark.parametrize(
    ("section", "field", "values", "expected"),
    [
        ("audio_config", "layer_norm_eps", (0, -1e-5, float("nan"), float("inf"), "1e-5"), "a number from 1e-20 to 1"),
        ("audio_config", "dropout", (1, -0.1, float("nan"), []), "a number from 0 to below 1"),
        ("audio_config", "n_window", (1.5, "200", -200, 0), "an integer from 1 to"),
        ("audio_config", "deepstack_encoder_layer_indexes", ("8", [8.0], [-1], {"8": 1}), "a list, and each"),
        ("language_config", "rms_norm_eps", (0, float("nan"), float("-inf"), True), "a number from 1e-20 to 1"),
        ("language_config", "rope_theta", (0, -1, float("nan"), float("inf"), "1e6"), "a number from 1 to 1e"),
        ("language_config", "max_position_embeddings", (0, -1, 4096.0, 2**31), "an integer from 1 to"),
        ("language_config", "head_dim", (0, "128", 1.5), "an integer from 1 to"),
        (None, "tie_word_embeddings", (1, "true", []), "true or false"),
        (None, "adapter_hidden_size", (0, 1.5, "x"), "an integer from 1 to"),
    ],
)
def test_numbers_are_in_their_range(section, field, values, expected, released, tmp_path):
    for value in values:
        with pytest.raises(MossAudioError, match=f"{field} must be {expected}"):
            MossAudioConfig.from_hf(write(tmp_path, changed(released, section, **{field: value})))


@pytest.mark.parametrize("eos", ["151645", 1.5, True, {"a": 1}, [151645, "x"], [1.0], -1, 2**31, [2**40], 10**400])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ids_of_ends_are_token_ids(name, eos, released, tmp_path):
    released["generation_config.json"].pop("eos_token_id")
    released[name]["eos_token_id"] = eos
    with pytest.raises(MossAudioError, match=r"eos_ids must be a list, and each in it an integer from 0"):
        MossAudioConfig.from_hf(write(tmp_path, released))


def test_ids_are_in_the_vocabulary(released, tmp_path):
    released["generation_config.json"]["eos_token_id"] = [151645, 151936]
    with pytest.raises(MossAudioError, match="eos_token_id must be below vocab_size 151936, not 151936"):
        MossAudioConfig.from_hf(write(tmp_path, released))
    released["generation_config.json"]["eos_token_id"] = 151645
    released["processor_config.json"]["audio_end_id"] = 151936
    with pytest.raises(MossAudioError, match="audio_end_id must be below vocab_size"):
        MossAudioConfig.from_hf(write(tmp_path, released))


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 2}, {"top_k": 1.5}, {"top_k": -1}]
)
def test_settings_of_generation_are_numbers_in_their_range(values, released, tmp_path):
    (name,) = values
    released["generation_config.json"] |= values
    with pytest.raises(MossAudioError, match=rf"generation_config\.json\.{name} must be"):
        MossAudioConfig.from_hf(write(tmp_path, released))
    released["generation_config.json"][name] = None
    MossAudioConfig.from_hf(write(tmp_path, released))


def test_what_config_json_says_twice_it_says_alike(released, tmp_path):
    with pytest.raises(MossAudioError, match="make both the same"):
        MossAudioConfig.from_hf(write(tmp_path, changed(released, None, vocab_size=151937)))


def test_there_are_as_many_layers_as_features(released):
    config = MossAudioConfig.preset("4b")
    with pytest.raises(MossAudioError, match="DeepStack"):
        dataclasses.replace(config, language_config=dataclasses.replace(config.language_config, num_hidden_layers=2))


def test_another_mel_is_refused(released, tmp_path):
    released["processor_config.json"]["mel_config"]["mel_n_fft"] = 512
    with pytest.raises(MossAudioError, match="mel_n_fft"):
        MossAudioConfig.from_hf(write(tmp_path, released))


def test_damaged_and_absent_files_are_named(tmp_path):
    with pytest.raises(MossAudioError, match=r"no config\.json"):
        MossAudioConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MossAudioError, match=r"config\.json can't be read as JSON"):
        MossAudioConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(MossAudioError, match="JSON object"):
        MossAudioConfig.from_hf(tmp_path)


def test_unknown_presets_are_named():
    with pytest.raises(MossAudioError, match=r"'70b'.*4b"):
        MossAudioConfig.preset("70b")


def test_the_encoder_of_the_preset_has_the_released_sizes():
    assert EncoderConfig().head_dim == 64 and EncoderConfig().stem_features == 7680
