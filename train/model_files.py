"""What goes with all checkpoints of a run: the model's configuration and its tokenizer, in the released layout."""

import json
import shutil
from pathlib import Path

from moss_audio_jax.checkpoint import companion_files, orbax_paths, tokenizer_files
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.peft_files import write_adapter_config
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from train.data import ExampleOrder
from train.data.objectives import render
from train.initial import ModelSource

LEARNED = "learned"  # in place of a directory
LEARNED_FROM = 300  # examples


def write_model_files(source: ModelSource, config: MossAudioConfig, order: ExampleOrder, directory: Path) -> None:
    """Writes them once, into a directory that appears when it is whole; a resumed run keeps what is there.

    With LoRA also what the adapter is, and the checkpoint that it is for: of a run, the one that is its newest now.
    order: where a learned tokenizer takes its texts from.
    """
    if directory.is_dir():
        return
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = source.tokenizer_source
    if tokenizer is None:
        raise MossAudioError(
            f"without model.checkpoint, model.tokenizer must name a directory of tokenizer files, or be {LEARNED}"
        )
    if tokenizer == LEARNED:
        write_small_tokenizer(partial, _texts(order), config.processor.audio_start_id)
    files = companion_files(source.checkpoint) if source.checkpoint else []
    for file in files + (tokenizer_files(tokenizer) if tokenizer != LEARNED else []):
        shutil.copyfile(file, partial / file.name)
    config.save_hf(partial)
    if config.lora is None:
        _set_dtype(partial / "config.json")
    else:
        write_adapter_config(partial, config, str(_settled(source.checkpoint)))
    partial.replace(directory)


def _settled(checkpoint: str | None) -> Path:
    """The directory of a checkpoint that will not become another one when training goes on there."""
    if checkpoint is None:
        raise MossAudioError("lora adapts a checkpoint: name it with model.checkpoint")
    paths = orbax_paths(checkpoint)
    return Path(checkpoint).absolute() if paths is None else paths.params.absolute().parent


def _texts(order: ExampleOrder) -> list[str]:
    """What is said in the first examples, and the frame of every conversation."""
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    for number in range(LEARNED_FROM):
        drawn = order[number]
        rendered = render(drawn.example, drawn.rng, drawn.source.objectives)
        if isinstance(rendered, str):
            texts.append(rendered)
        else:
            texts += [piece for message in rendered for piece in message.content if isinstance(piece, str)]
    return texts


def _set_dtype(path: Path) -> None:
    """Masters are float32, whatever the checkpoint was that a run began with."""
    config = json.loads(path.read_text("utf-8"))
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
