"""A choice among given answers, by their likelihood: nothing else can be answered."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moss_audio_jax.compilation import jit
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.slots import ReadPrompts, read_prompts
from moss_audio_jax.inputs import ModelInputs, bucket
from moss_audio_jax.kv_cache import KVCache
from moss_audio_jax.model import MossAudio, check_positions
from moss_audio_jax.processor import ClipLike, Processor
from moss_audio_jax.sharding import on_automatic_mesh, on_host, on_mesh_of

MIN_OPTIONS, MIN_OPTION_TOKENS = 4, 8  # the smallest buckets


class Choice(NamedTuple):
    """The likeliest option, its place, and the logprob of each option."""

    option: str
    index: int
    logprobs: tuple[float, ...]


def choose(
    model: MossAudio,
    processor: Processor,
    text: str,
    options: Sequence[str],
    audio: Sequence[ClipLike] = (),
    **prompt_options: Any,
) -> Choice:
    """Returns the option that is the likeliest whole answer.

    Compares the sums of the logprobs of each option's tokens and the end token. The prompt is read once. A longer
    option is less likely than a shorter one, all else being equal: letters are fairer options than sentences.
    prompt_options: as of `Processor`.
    """
    inputs = processor([text], [list(audio)], **prompt_options)
    logprobs = option_logprobs(model, inputs, [processor.tokenizer.encode(option) for option in options])
    index = int(np.argmax(logprobs))
    return Choice(options[index], index, tuple(logprobs))


def option_logprobs(model: MossAudio, prompt: ModelInputs, options: Sequence[Sequence[int]]) -> list[float]:
    """Returns the logprob of each option, as ids without an end token, as the answer to a batch of one prompt."""
    if not options or not all(options):
        raise MossAudioError("a choice needs options that are not empty: give two or more")
    whole = [[*option, *model.config.eos_ids[:1]] for option in options]
    counts = np.array([len(ids) for ids in whole], np.int32)
    check_positions(prompt, model.config, int(counts.max()))
    rows, length = bucket(len(whole), MIN_OPTIONS), bucket(int(counts.max()), MIN_OPTION_TOKENS)
    tokens = np.zeros((rows, length), np.int32)
    for row, ids in zip(tokens, whole, strict=False):
        row[: len(ids)] = ids
    graphdef, state = nnx.split(model)
    state = on_automatic_mesh(state)
    with on_mesh_of(state):
        read = read_prompts(graphdef, state, prompt)
        found = _option_logprobs(graphdef, state, read, tokens, np.pad(counts, (0, rows - len(counts))))
    return on_host(found)[: len(whole)].tolist()


@functools.partial(jit, static_argnames="graphdef")
def _option_logprobs(
    graphdef: nnx.GraphDef, state: nnx.State, read: ReadPrompts, tokens: Int[Any, "o t"], counts: Int[Any, " o"]
) -> Float[Array, " o"]:
    """Returns the sum of the logprobs of the first `counts` tokens of each option."""
    model, (rows, length) = nnx.merge(graphdef, state), tokens.shape
    keys, values = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=1), (read.cache.keys, read.cache.values))
    cache = KVCache(keys, values, jnp.repeat(read.cache.lengths, rows))
    hidden, _ = model.language_model.extend(model.language_model.embed_tokens(tokens), counts, cache)
    before = jnp.broadcast_to(read.hidden[:, None], (rows, 1, read.hidden.shape[1]))
    hidden = jnp.concatenate([before, hidden[:, :-1]], axis=1)

    def of_option(given: tuple[Float[Array, "t hidden"], Int[Array, " t"]]) -> Float[Array, " t"]:
        logits = model.logits(given[0])
        drawn = jnp.take_along_axis(logits, given[1][:, None], axis=1)[:, 0]
        return drawn - jax.nn.logsumexp(logits, axis=-1)

    logprobs = jax.lax.map(of_option, (hidden, tokens))  # the logits of one option at a time
    return jnp.where(jnp.arange(length) < counts[:, None], logprobs, 0).sum(1)
