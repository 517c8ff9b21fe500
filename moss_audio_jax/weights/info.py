"""What a checkpoint is made of, without reading its tensors."""

import math

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.weights.checkpoint import is_adapter, layout_of, orbax_paths, processor_directories, stored_shapes
from moss_audio_jax.weights.peft import PeftAdapter
from moss_audio_jax.weights.released import ReleasedCheckpoint

# The parts of the model, by the beginning of their parameters' paths.
MODEL_PARTS = ("audio_encoder", "audio_adapter", "deepstack_audio_merger_list", "language_model", "lm_head")


def describe(path: AnyPath) -> str:
    """A table of the model's parameters, stacked as this port stores them, with a sum for each part."""
    orbax = orbax_paths(path)
    if orbax is not None:
        layout, config, stored = "Orbax", MossAudioConfig.from_hf(orbax.files), stored_shapes(orbax.params)
        stored |= stored_shapes(orbax.averages) if orbax.averages is not None else {}
    else:
        if is_adapter(path):
            layout, base = "an adapter as PEFT lays it out", MossAudioConfig.from_hf(processor_directories(path)[1])
            released = PeftAdapter(path, base)
        else:
            layout_of(path)  # says what is there instead of a checkpoint
            layout, released = "released PyTorch layout", ReleasedCheckpoint(path)
        config = released.config
        dtypes = {name: released.tensors[leaf.names[0]].dtype for name, leaf in released.leaves.items()}
        stored = {name: (leaf.shape, dtypes[name]) for name, leaf in released.leaves.items()}

    rows: list[tuple[str, str, str, str, str]] = [("parameter", "shape", "dtype", "parameters", "bytes")]
    total_count = total_bytes = 0
    for part in MODEL_PARTS:
        leaves = {name: leaf for name, leaf in stored.items() if name.startswith(part + ".")}
        counts = {name: math.prod(shape) for name, (shape, _) in leaves.items()}
        sizes = {name: counts[name] * dtype.itemsize for name, (_, dtype) in leaves.items()}
        for name, (shape, dtype) in leaves.items():
            rows.append((name, "x".join(map(str, shape)), str(dtype), f"{counts[name]:,}", f"{sizes[name]:,}"))
        rows.append((f"{part}: sum", "", "", f"{sum(counts.values()):,}", f"{sum(sizes.values()):,}"))
        total_count, total_bytes = total_count + sum(counts.values()), total_bytes + sum(sizes.values())
    rows.append(("all", "", "", f"{total_count:,}", f"{total_bytes:,}"))

    audio, language = config.audio_config, config.language_config
    chunk = "whole clips" if audio.chunk_frames is None else f"chunks of {audio.chunk_frames} frames"
    heading = (
        f"{path}: {config.model_type}, {layout}\n"
        f"encoder: {audio.encoder_layers} layers of {audio.d_model}, {chunk}, "
        f"taps after layers {', '.join(map(str, audio.deepstack_encoder_layer_indexes))} (from 0)\n"
        f"language model: {language.num_hidden_layers} layers of {language.hidden_size}, "
        f"{config.num_deepstack} of them with DeepStack, vocabulary {language.vocab_size:,}\n"
    )
    return heading + align(rows)


def align(rows: list[tuple[str, ...]]) -> str:
    """Rows of equal length as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    return "\n".join(line.rstrip() for line in lines)
