"""Ten questions about one clip of 60 s, in a session and afresh: `python -m benchmarks.sessions [--preset 4b]`.

Random weights; the engine has one slot, all programs are compiled before, and every answer has `--new-tokens` tokens.
Times are CPU seconds of the process, in all its threads: what the machine does, whatever else it does meanwhile.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from convert.rehearse import write_random_checkpoint
from moss_audio_jax import Engine, MossAudioConfig, Request, load_model, load_processor
from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.config import EncoderConfig, LanguageConfig, ProcessorConfig
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.text_table import align

# Layers and widths between the presets `small` and `4b`.
MEDIUM = MossAudioConfig(
    audio_config=EncoderConfig(
        d_model=384,
        output_dim=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        downsample_hidden_size=64,
        deepstack_encoder_layer_indexes=(0, 1, 2),
    ),
    language_config=LanguageConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
    ),
    adapter_hidden_size=1024,
    deepstack_num_inject_layers=3,
    eos_ids=(258,),
    processor=ProcessorConfig(audio_token_id=4095, audio_start_id=4093, audio_end_id=4094),
)
QUESTIONS = [f"Question {number}: what is heard there?" for number in range(10)]


def measure(preset: Literal["small", "medium", "4b"] = "medium", seconds: float = 60, new_tokens: int = 16) -> None:
    """Prints CPU seconds of ten answers.

    Args:
        preset: Size of the model.
        seconds: Length of the clip.
        new_tokens: Tokens of each answer.
    """
    clip = np.random.default_rng(0).normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "checkpoint"
        write_random_checkpoint(MEDIUM if preset == "medium" else MossAudioConfig.preset(preset), directory)
        write_small_tokenizer(directory)
        model, processor = load_model(directory), load_processor(directory)
    options = {"max_new_tokens": new_tokens, "eos_ids": ()}
    with Engine(model, processor, slots=1, max_length=1024 + 256) as engine:
        engine.warm_up()
        afresh, expected = timed(lambda: [engine.run([Request(text, [clip], **options)])[0] for text in QUESTIONS])

        def in_a_session():
            session = engine.listen(clip, **options)
            return [session.ask(text) for text in QUESTIONS]

        together, found = timed(in_a_session)
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    rows = [
        ("ten questions", "CPU seconds", "afresh / this"),
        ("afresh", f"{afresh:.2f}", "1.0"),
        ("in a session", f"{together:.2f}", f"{afresh / together:.1f}"),
    ]
    print(align(rows))
    print(f"{same} of {len(found)} answers have the same ids")


def timed(run: Callable[[], list]) -> tuple[float, list]:
    """Returns CPU seconds and the result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(measure, description=__doc__))
