"""Answers in progress, one in each slot, on the devices: `generation.Answers` whose rows begin and end at any time.

read_prompt -> insert           a prompt that is read as a whole
read_prompt -> widen -> read_on, for each piece of the question -> insert         clips that are read apart from it
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moss_audio_jax.compilation import jit
from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig
from moss_audio_jax.generation import Answers
from moss_audio_jax.inputs import ModelInputs, bucket, coarse_buckets
from moss_audio_jax.kv_cache import STACK_AXES, KVCache, Slots, kept_as, sharded
from moss_audio_jax.sharding import batch_is_sharded, num_parts, partition_spec

MIN_PROMPT = 128  # tokens of the smallest prompt program
QUESTION_PIECES = (32, 128, 512)  # tokens that `read_on` reads at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadPrompts:
    """What the model has read of prompts: their caches, their last hidden states, and the tokens in them."""

    cache: KVCache
    hidden: Float[Array, "k hidden"]
    seen: Bool[Array, "k vocab"]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def empty_slots(
    config: MossAudioConfig, slots: int, length: int, new_tokens: int, dtype: Any, kv_dtype: Any = None
) -> Answers:
    """Makes `slots` slots without answers.

    length: tokens of a prompt and its answer. new_tokens: of an answer. kv_dtype: of the cache; None: `dtype`.
    """
    language = config.language_config
    return Answers(
        KVCache.empty(language, slots, length, kv_dtype or dtype),
        hidden=jnp.zeros((slots, language.hidden_size), dtype),
        tokens=jnp.zeros((slots, new_tokens), jnp.int32),
        counts=jnp.zeros(slots, jnp.int32),
        stopped=jnp.ones(slots, bool),
        finite=jnp.ones(slots, bool),
        seen=jnp.zeros((slots, language.vocab_size), bool),
        logprobs=jnp.zeros((slots, new_tokens), jnp.float32),
        warmed=jnp.zeros(slots, jnp.int32),
    )


@functools.partial(jit, static_argnames="graphdef")
def read_prompts(graphdef: nnx.GraphDef, state: nnx.State, inputs: ModelInputs) -> ReadPrompts:
    """Runs a batch of prompts through the model. inputs: of a shape of `prompt_shapes`."""
    model, (rows, length) = nnx.merge(graphdef, state), inputs.tokens.shape
    hidden, cache = model.prefill(inputs, length)
    seen = jnp.zeros((rows, model.config.language_config.vocab_size), bool)
    seen = seen.at[jnp.arange(rows)[:, None], inputs.tokens].max(inputs.segment_ids != 0)
    return ReadPrompts(cache, hidden, seen)


@functools.partial(jax.jit, static_argnames="length")
def widen(read: ReadPrompts, length: int) -> ReadPrompts:
    """Makes room in the cache, for `length` tokens and the padding of any piece that `read_on` reads."""
    read = jax.tree.map(jnp.copy, read)  # `read_on` takes the memory of its argument, and `read` may be kept
    widths = [(0, 0)] * 3 + [(0, length + QUESTION_PIECES[-1] - read.cache.slots), (0, 0)]
    keys, values = jax.tree.map(lambda x: jnp.pad(x, widths[: x.ndim]), (read.cache.keys, read.cache.values))
    return dataclasses.replace(read, cache=KVCache(keys, values, read.cache.lengths))


@functools.partial(jit, static_argnames="graphdef", donate_argnames="read")
def read_on(
    graphdef: nnx.GraphDef, state: nnx.State, read: ReadPrompts, tokens: Int[Any, "1 t"], count: Int[Any, "1"]
) -> ReadPrompts:
    """Reads `count` more tokens, all of text, of a prompt that `widen` has made room for; the rest is padding."""
    model = nnx.merge(graphdef, state)
    hidden, cache = model.language_model.extend(model.language_model.embed_tokens(tokens), count, read.cache)
    hidden = jnp.take_along_axis(hidden, count[:, None, None] - 1, axis=1)[:, 0]
    seen = read.seen.at[0, tokens[0]].max(jnp.arange(tokens.shape[1]) < count)
    return ReadPrompts(cache, hidden, seen)


@functools.partial(jit, donate_argnames="answers")
def insert(answers: Answers, read: ReadPrompts, slots: Int[Any, " n"], rows: Int[Any, " n"]) -> Answers:
    """Begins an answer to prompt `rows[i]` in slot `slots[i]`. The same pair may be there several times."""

    def put(stack: Array, prompts: Array) -> Array:
        prompts = prompts[:, :, :, : stack.shape[3]]
        return (_put_in_shards if _are_sharded(stack) else _put)(stack, prompts, slots, rows)

    def put_all(stack: Slots, prompts: Slots) -> Slots:
        return jax.tree.map(put, stack, kept_as(stack, prompts))

    cache = KVCache(
        put_all(answers.cache.keys, read.cache.keys),
        put_all(answers.cache.values, read.cache.values),
        answers.cache.lengths.at[slots].set(read.cache.lengths[rows]),
    )
    return dataclasses.replace(
        answers,
        cache=cache,
        hidden=answers.hidden.at[slots].set(read.hidden[rows]),
        counts=answers.counts.at[slots].set(0),
        stopped=answers.stopped.at[slots].set(False),
        finite=answers.finite.at[slots].set(True),
        seen=answers.seen.at[slots].set(read.seen[rows]),
        warmed=answers.warmed.at[slots].set(0),
    )


def _put(stack: Array, prompts: Array, slots: Int[Any, " n"], rows: Int[Any, " n"]) -> Array:
    """Writes row `rows[i]` of [layers, rows, kv, t, ...] over the slot `slots[i]` of a stack."""
    for slot, row in zip(slots, rows, strict=True):
        prompt = jax.lax.dynamic_slice_in_dim(prompts, row, 1, axis=1)
        stack = jax.lax.dynamic_update_slice(stack, prompt, (0, slot, 0, 0, 0)[: stack.ndim])
    return sharded(stack)


def _put_in_shards(stack: Array, prompts: Array, slots: Int[Any, " n"], rows: Int[Any, " n"]) -> Array:
    """Does the same where slots, and perhaps rows, are sharded over the mesh.

    One row at a time is sent to all devices, and once for slots that follow each other in `slots`. For `_put` XLA
    gathers all rows on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (axes,) = partition_spec(("batch",), mesh)
    spread = prompts.shape[1] % num_parts("batch", mesh) == 0
    names = STACK_AXES[: stack.ndim]
    of_stack = partition_spec(names, mesh)
    of_prompts = of_stack if spread else partition_spec([None if name == "batch" else name for name in names], mesh)

    def of_shard(stack: Array, prompts: Array, slots: Array, rows: Array) -> Array:
        part = jax.lax.axis_index(axes)

        def sent(row: Array) -> Array:
            if not spread:
                return jax.lax.dynamic_slice_in_dim(prompts, row, 1, axis=1)
            here, place = _within(row, part, prompts.shape[1])
            one = jax.lax.dynamic_slice_in_dim(prompts, place, 1, axis=1)
            return jax.lax.psum(jnp.where(here, one, jnp.zeros_like(one)), axes)

        def put(carry: tuple[Array, Array, Array], pair: tuple[Array, Array]) -> tuple[Any, None]:
            (stack, prompt, before), (slot, row) = carry, pair
            prompt = jax.lax.cond(row == before, lambda: prompt, lambda: sent(row))
            here, place = _within(slot, part, stack.shape[1])
            start = (0, place, 0, 0, 0)[: stack.ndim]
            old = jax.lax.dynamic_slice(stack, start, prompt.shape)
            return (jax.lax.dynamic_update_slice(stack, jnp.where(here, prompt, old), start), prompt, row), None

        nothing = jnp.zeros_like(prompts[:, :1])
        return jax.lax.scan(put, (stack, nothing, jnp.int32(-1)), (slots, rows))[0][0]

    specs = (of_stack, of_prompts, PartitionSpec(), PartitionSpec())
    # check_vma does not know that the row is the same on all devices after `psum`, in one branch of `cond` alone.
    return jax.shard_map(of_shard, in_specs=specs, out_specs=of_stack, check_vma=False)(stack, prompts, slots, rows)


def _are_sharded(stack: Array) -> bool:
    """Returns True if the mesh cuts the slots of a stack into several equal parts."""
    return batch_is_sharded() and stack.shape[1] % num_parts("batch", jax.sharding.get_abstract_mesh()) == 0


def _within(index: Array, part: Array, size: int) -> tuple[Array, Array]:
    """Returns whether an index of a sharded axis is in this part of it, and its place there, or any place if not."""
    place = index - part * size
    return (place >= 0) & (place < size), jnp.clip(place, 0, size - 1)


@functools.partial(jax.jit, static_argnames="count")
def newest(
    answers: Answers, begins: Int[Any, " slots"], count: int
) -> tuple[Int[Array, "slots count"], Float[Array, "slots count"]]:
    """Returns the ids and logprobs of each answer from its `begins` on; what is past its own count has no meaning."""
    places = jnp.minimum(begins[:, None] + jnp.arange(count), answers.tokens.shape[1] - 1)
    return jnp.take_along_axis(answers.tokens, places, axis=1), jnp.take_along_axis(answers.logprobs, places, axis=1)


def question_pieces(tokens: int) -> list[int]:
    """Returns the sizes of the pieces in which `read_on` reads this many tokens; the last one may be padded."""
    whole, rest = divmod(tokens, QUESTION_PIECES[-1])
    return [QUESTION_PIECES[-1]] * whole + [next(size for size in QUESTION_PIECES if size >= rest)] * (rest > 0)


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
