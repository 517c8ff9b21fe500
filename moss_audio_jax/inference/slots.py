"""Answers in progress, one in each slot, on the devices: `generation.Answers` whose rows begin and end at any time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from moss_audio_jax.compilation import jit
from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig
from moss_audio_jax.generation import Answers
from moss_audio_jax.inputs import ModelInputs, bucket, coarse_buckets
from moss_audio_jax.language_model import KVCache
from moss_audio_jax.sharding import constrain

MIN_PROMPT = 128  # tokens of the smallest prompt program


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_slots(config: MossAudioConfig, slots: int, length: int, new_tokens: int, dtype: Any) -> Answers:
    """Makes `slots` slots without answers. length: tokens of a prompt and its answer. new_tokens: of an answer."""
    language = config.language_config
    return Answers(
        KVCache.empty(language, slots, length, dtype),
        hidden=jnp.zeros((slots, language.hidden_size), dtype),
        tokens=jnp.zeros((slots, new_tokens), jnp.int32),
        counts=jnp.zeros(slots, jnp.int32),
        stopped=jnp.ones(slots, bool),
        finite=jnp.ones(slots, bool),
        seen=jnp.zeros((slots, language.vocab_size), bool),
    )


@functools.partial(jit, static_argnames="graphdef", donate_argnames="answers")
def admit(
    graphdef: nnx.GraphDef, state: nnx.State, answers: Answers, inputs: ModelInputs, slot: Int[Any, ""]
) -> Answers:
    """Runs one prompt through the model, and begins its answer in a slot.

    inputs: a batch of one, of a shape of `prompt_shapes`.
    """
    model = nnx.merge(graphdef, state)
    hidden, new = model.prefill(inputs, inputs.tokens.shape[1])

    def put(stack: Array, prompt: Array) -> Array:
        zero = jnp.zeros_like(slot)
        written = jax.lax.dynamic_update_slice(stack, prompt, (zero, slot, zero, zero, zero))
        return constrain(written, "layers", "batch", "heads", None, None)

    cache = KVCache(
        put(answers.cache.keys, new.keys),
        put(answers.cache.values, new.values),
        answers.cache.lengths.at[slot].set(new.lengths[0]),
    )
    seen = jnp.zeros(answers.seen.shape[1], bool).at[inputs.tokens[0]].max(inputs.segment_ids[0] != 0)
    return dataclasses.replace(
        answers,
        cache=cache,
        hidden=answers.hidden.at[slot].set(hidden[0]),
        counts=answers.counts.at[slot].set(0),
        stopped=answers.stopped.at[slot].set(False),
        finite=answers.finite.at[slot].set(True),
        seen=answers.seen.at[slot].set(seen),
    )


def prompt_shapes(config: MossAudioConfig, length: int) -> list[tuple[int, int]]:
    """Returns (tokens, chunks) of the prompt programs: 128, 192, 256, 384, ... tokens, with and without audio.

    The chunks are those of one clip that is the whole prompt.
    """
    tokens_of_chunk = (config.audio_config.chunk_frames or 400) // DOWNSAMPLE_RATE
    return [
        shape
        for tokens in coarse_buckets(MIN_PROMPT, length)
        for shape in ((tokens, 0), (tokens, tokens // tokens_of_chunk + 1))
    ]


def prompt_shape(shapes: list[tuple[int, int]], inputs: ModelInputs) -> tuple[int, int]:
    """Returns the smallest shape that holds an unpadded prompt.

    A prompt of many short clips may have more chunks than any: then a program is compiled for it.
    """
    tokens, chunks = inputs.tokens.shape[1], inputs.audio_chunks.shape[1]
    for shape in shapes:
        if tokens <= shape[0] and chunks <= shape[1]:
            return shape
    return shapes[-1][0], bucket(chunks, 1)
