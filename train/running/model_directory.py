"""Writes model/ of a run: configuration and tokenizer of the model, in the released layout, for all checkpoints."""

import dataclasses

from moss_audio_jax.config import CONFIG_FILES, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.storage.hub import HubName
from moss_audio_jax.storage.paths import AnyPath, Path, absolute, children, exists, to_path
from moss_audio_jax.weights.locate import locate
from moss_audio_jax.weights.peft import write_adapter_config
from train.config import LEARNED, ModelSource
from train.data import ExampleOrder
from train.data.objectives import render

LEARNED_FROM = 300  # examples


def write_model_files(
    source: ModelSource, config: MossAudioConfig, order: ExampleOrder | None, directory: AnyPath
) -> None:
    """Writes the files, config.json last; keeps them if config.json is there, as in a resumed run.

    With LoRA also writes adapter_config.json: the adapter and its base. The base of a run is its newest checkpoint now.
    order: gives the texts of a learned tokenizer; None: there are none.
    """
    directory = to_path(directory)
    if exists(directory / "config.json"):
        return
    tokenizer = source.tokenizer_source
    if tokenizer is None:
        raise MossAudioError(
            f"without --model.checkpoint, --model.tokenizer must be a directory of tokenizer files, or {LEARNED}"
        )
    if tokenizer == LEARNED and order is None:
        raise MossAudioError(f"--model.tokenizer {LEARNED} is for `run`: name a checkpoint with a tokenizer")
    directory.rmtree(missing_ok=True)
    directory.mkdir(parents=True)
    if tokenizer == LEARNED and order is not None:
        write_small_tokenizer(directory, _texts(order), config.processor.audio_start_id)
    files = locate(source.checkpoint, weights=False).companion_files() if source.checkpoint else []
    for file in files + (locate(tokenizer, weights=False).tokenizer_files() if tokenizer != LEARNED else []):
        if file.name not in CONFIG_FILES:
            file.copy(directory / file.name, overwrite=True)
    if config.lora is not None:
        base = _base(source.checkpoint)
        if isinstance(base, HubName):
            write_adapter_config(directory, config, base.repository, base.revision)
        else:
            write_adapter_config(directory, config, str(base))
    else:  # the run's parameters are float32, whatever the dtype of the first checkpoint
        of_masters = {"config.json": config.raw["config.json"] | {"dtype": "float32"}}
        config = dataclasses.replace(config, raw={**config.raw, **of_masters})
    config.save_hf(directory)


def copy_model_files(run_model: AnyPath, directory: AnyPath) -> None:
    """Copies model/ of another run to that of its branch, config.json last."""
    directory = to_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(children(run_model), key=lambda file: file.name == "config.json"):
        file.copy(directory / file.name, overwrite=True)


def _base(checkpoint: str | None) -> Path | HubName:
    """The parameters themselves, which don't change.

    A commit of the hub, or the checkpoint's own directory: `RUN/best` and a run name others as training continues.
    """
    if checkpoint is None:
        raise MossAudioError("--lora adapts a checkpoint: name it with --model.checkpoint")
    found = locate(checkpoint, weights=False)  # other processes wait meanwhile
    return found.hub or absolute(found.averages or (found.path if found.params is None else found.params.parent))


def _texts(order: ExampleOrder) -> list[str]:
    """Returns the texts of the first examples, and the parts of every chat prompt."""
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    for number in range(LEARNED_FROM):
        drawn = order[number]
        rendered = render(drawn.example, drawn.rng, drawn.source.objectives)
        if isinstance(rendered, str):
            texts.append(rendered)
        else:
            texts += [piece for message in rendered for piece in message.content if isinstance(piece, str)]
    return texts
