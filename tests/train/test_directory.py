"""A run's own copy of the model's configuration and tokenizer, and with it the run as a checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest

from moss_audio_jax import MossAudioConfig, MossAudioError, load_model, load_processor, save_model
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.weights.info import describe
from moss_audio_jax.weights.locate import locate
from train.config import ModelSource, model_config
from train.data import ExampleOrder
from train.data.config import SceneConfig
from train.data.mixture import Group, Source
from train.data.scenes import SceneExamples
from train.running.model_directory import write_model_files


@pytest.fixture(scope="module")
def order() -> ExampleOrder:
    scenes = SceneExamples(SceneConfig(seconds=(2.0, 2.0), events=(1, 1)), seed=0)
    return ExampleOrder([Group("scenes", 1.0, (Source("scenes", scenes, {"conversation": 1.0}),))], seed=0)


def test_a_learned_tokenizer_speaks_of_the_data(order: ExampleOrder, tmp_path: Path):
    config = MossAudioConfig.preset("small")
    write_model_files(ModelSource(preset="small", tokenizer="learned"), config, order, tmp_path / "model")
    processor = load_processor(tmp_path / "model")
    assert processor.config == config
    assert len(processor.tokenizer.encode("[1.2]tone[1.8]")) == 11  # "tone" is one
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"

    before = (tmp_path / "model" / "merges.txt").stat().st_mtime_ns
    write_model_files(ModelSource(preset="tiny", tokenizer="nowhere"), config, order, tmp_path / "model")
    assert (tmp_path / "model" / "merges.txt").stat().st_mtime_ns == before  # a resumed run keeps what is there


def test_the_files_of_a_checkpoint_are_copied(order: ExampleOrder, tmp_path: Path, tiny):
    save_model(tiny, tmp_path / "first")
    write_small_tokenizer(tmp_path / "first")
    source = ModelSource(checkpoint=str(tmp_path / "first"))
    write_model_files(source, tiny.config, order, tmp_path / "model")
    assert load_processor(tmp_path / "model").config == tiny.config
    assert (tmp_path / "model" / "vocab.json").read_bytes() == (tmp_path / "first" / "vocab.json").read_bytes()


def test_a_run_without_time_markers_says_so(order: ExampleOrder, tmp_path: Path, tiny):
    save_model(tiny, tmp_path / "first")
    write_small_tokenizer(tmp_path / "first")
    source = ModelSource(checkpoint=str(tmp_path / "first"), time_markers=False)
    write_model_files(source, model_config(source), order, tmp_path / "model")
    config = load_processor(tmp_path / "model").config
    assert tiny.config.processor.enable_time_marker and not config.processor.enable_time_marker
    assert config.audio_config == tiny.config.audio_config and config.language_config == tiny.config.language_config


def test_a_model_without_deepstack_can_be_read_back(order: ExampleOrder, tmp_path: Path):
    source = ModelSource(preset="small", tokenizer="learned", deepstack=0)
    config = model_config(source)
    write_model_files(source, config, order, tmp_path / "model")
    found = load_processor(tmp_path / "model").config
    assert found == config and found.num_deepstack == 0


def test_a_tokenizer_is_needed(order: ExampleOrder, tmp_path: Path):
    with pytest.raises(MossAudioError, match="must be a directory of tokenizer files, or learned"):
        write_model_files(ModelSource(preset="tiny"), MossAudioConfig.preset("tiny"), order, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_run_is_read_at_its_newest_checkpoint(tmp_path: Path, tiny):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(MossAudioError, match="is a training run without a checkpoint so far"):
        locate(run).layout()
    for step, scale in ((9, 1.0), (10, 2.0)):
        save_model(scaled(tiny, scale), run / "checkpoints" / str(step))
    (run / "model").mkdir()
    for file in ("config.json", "processor_config.json", "generation_config.json"):
        if (run / "checkpoints" / "9" / file).exists():
            (run / "checkpoints" / "9" / file).rename(run / "model" / file)
    write_small_tokenizer(run / "model")

    def kernel(path: Path) -> np.ndarray:
        return np.asarray(load_model(path).audio_adapter.up_proj.kernel[...])

    np.testing.assert_array_equal(kernel(run), 2 * kernel(run / "checkpoints" / "9"))
    np.testing.assert_array_equal(kernel(run), kernel(run / "checkpoints" / "10"))
    assert load_processor(run).config == load_processor(run / "checkpoints" / "9").config == tiny.config
    assert "Orbax" in describe(run)


def scaled(model, scale: float):
    from flax import nnx

    from moss_audio_jax.weights.parameters import build_model, parameters_of

    return build_model(model.config, {path: scale * leaf for path, leaf in parameters_of(nnx.clone(model)).items()})
