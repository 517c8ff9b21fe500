"""Text out of the model: one prefill, then a compiled loop of cached single-token steps.

The prompt's length is bucketed by `make_inputs`, the answer's here, so a new length seldom compiles anything, and other
options of sampling never do. The loop runs on the device until every sequence has stopped; the host hears of it once,
or every few tokens when streaming.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from moss_audio_jax.compilation import jit
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs, bucket
from moss_audio_jax.language_model import KVCache
from moss_audio_jax.model import MossAudio, check_positions
from moss_audio_jax.sampling import Sampling, SamplingArrays, row_keys, row_seeds
from moss_audio_jax.sharding import constrain, on_automatic_mesh, on_host, on_mesh_of
from moss_audio_jax.weights.finite import first_nonfinite

MIN_NEW_TOKENS = 16  # the smallest bucket of an answer's length
_MIN_EOS_IDS = 8  # the smallest bucket of their number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawing:
    """What the tokens of a batch are drawn by. eos_ids: -1 at the end is none. fill: what follows an answer's end."""

    sampling: SamplingArrays
    seeds: UInt32[Any, "b 2"]
    eos_ids: Int[Any, " n"]
    fill: Int[Any, ""]


def make_drawing(
    batch: int,
    sampling: Sampling,
    eos_ids: Sequence[int],
    seed: int = 0,
    seeds: Sequence[int] | None = None,
) -> Drawing:
    """Arrays of NumPy, of a few shapes."""
    padding = bucket(len(eos_ids), _MIN_EOS_IDS) - len(eos_ids)
    return Drawing(
        sampling.arrays(),
        row_seeds(batch, seed, seeds),
        np.array([*eos_ids, *[-1] * padding], np.int32),
        np.int32(eos_ids[0] if eos_ids else 0),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The loop's carry. `tokens[:, :count]` are drawn and read.

    hidden: what the next tokens are drawn from.
    finite: whether the logits of each sequence have been so; the loop ends where they are not.
    """

    cache: KVCache
    hidden: Float[Array, "b hidden"]
    tokens: Int[Array, "b new"]
    count: Int[Array, ""]
    next_position: Int[Array, " b"]
    stopped: Bool[Array, " b"]
    finite: Bool[Array, " b"]
    seen: Bool[Array, "b vocab"]


def generate(
    model: MossAudio,
    inputs: ModelInputs,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
) -> Int[np.ndarray, "b new"]:
    """Answers to a batch of prompts, `new` being the longest one's length.

    Sampling: see `Sampling`; the default is greedy. eos_ids: a sequence stops after any of these (which is part of its
    answer, and fills the rest of its row); None takes the checkpoint's, `()` never stops early.
    seed, seeds: a row's random numbers follow from its own seed alone, so it draws the same alone and in any batch. The
    rows' seeds are `seeds`, or else `seed` + row, so that equal prompts of a batch get different answers.
    Raises MossAudioError for options that can't be, for prompts and answers beyond the model's positions, and where
    logits are not finite; then it names the tensor of the weights that is not, if there is one.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    pieces = list(_answers(model, inputs, max_new_tokens, max_new_tokens, sampling, eos_ids, seed, seeds))
    return np.concatenate([np.zeros((len(inputs.tokens), 0), np.int32), *pieces], axis=1)


def stream(
    model: MossAudio,
    inputs: ModelInputs,
    *,
    max_new_tokens: int,
    every: int = 8,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
) -> Iterator[Int[np.ndarray, "b piece"]]:
    """The same answers as `generate`, in pieces of up to `every` tokens as they are produced."""
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    return _answers(model, inputs, max_new_tokens, every, sampling, eos_ids, seed, seeds)


def _answers(
    model: MossAudio,
    inputs: ModelInputs,
    max_new_tokens: int,
    every: int,
    sampling: Sampling,
    eos_ids: Sequence[int] | None,
    seed: int,
    seeds: Sequence[int] | None,
) -> Iterator[Int[np.ndarray, "b piece"]]:
    """Checks the request, now, and gives the pieces."""
    check_request(model.config, inputs, max_new_tokens, seed, seeds)
    if every < 1:
        raise MossAudioError(f"every must be 1 or more, not {every}")
    batch = len(inputs.tokens)
    eos = tuple(model.config.eos_ids if eos_ids is None else eos_ids)
    drawing = make_drawing(batch, sampling, eos, seed, seeds)
    return _pieces(model, inputs, max_new_tokens, every, drawing) if batch else iter(())


def check_request(
    config: MossAudioConfig,
    inputs: ModelInputs,
    max_new_tokens: int,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
) -> None:
    """Raises MossAudioError for what `generate` can't do; no weights are needed to know."""
    if max_new_tokens < 1:
        raise MossAudioError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    if _is_packed(inputs.segment_ids):
        raise MossAudioError("inputs to generate hold several packed examples a row: give one prompt a row")
    check_positions(inputs, config, max_new_tokens)
    row_seeds(len(inputs.tokens), seed, seeds)


def _pieces(
    model: MossAudio, inputs: ModelInputs, max_new_tokens: int, every: int, drawing: Drawing
) -> Iterator[Int[np.ndarray, "b piece"]]:
    graphdef, state = nnx.split(model)
    state = on_automatic_mesh(state)
    with on_mesh_of(state):
        loop = prefill_prompts(graphdef, state, inputs, drawing, bucket(max_new_tokens, MIN_NEW_TOKENS))
    done = 0
    while done < max_new_tokens:
        with on_mesh_of(state):  # and not while the caller has the piece
            loop = decode_until(graphdef, state, loop, min(max_new_tokens, done + every), drawing)
        results = loop.tokens, loop.count, loop.stopped, loop.finite
        tokens, count, stopped, finite = map(on_host, results)
        if not finite.all():
            raise MossAudioError(_why_not_finite(model, int(finite.argmin()), int(count)))
        yield tokens[:, done : int(count)]
        done = int(count) if not stopped.all() else max_new_tokens


@functools.partial(jit, static_argnames=("graphdef", "new_slots"))
def prefill_prompts(
    graphdef: nnx.GraphDef, state: nnx.State, inputs: ModelInputs, drawing: Drawing, new_slots: int
) -> _State:
    """Reads the prompts."""
    model = nnx.merge(graphdef, state)
    batch, length = inputs.tokens.shape
    hidden, cache = model.prefill(inputs, length + new_slots)
    vocab = model.config.language_config.vocab_size
    valid = inputs.segment_ids != 0
    seen = jnp.zeros((batch, vocab), bool).at[jnp.arange(batch)[:, None], inputs.tokens].max(valid)
    return _State(
        cache,
        hidden,
        tokens=jnp.full((batch, new_slots), drawing.fill, jnp.int32),
        count=jnp.int32(0),
        next_position=valid.sum(1, dtype=jnp.int32),
        stopped=jnp.zeros(batch, bool),
        finite=jnp.ones(batch, bool),
        seen=seen,
    )


@functools.partial(jit, static_argnames="graphdef", donate_argnames="loop")
def decode_until(graphdef: nnx.GraphDef, state: nnx.State, loop: _State, until: int, drawing: Drawing) -> _State:
    """Draws tokens until there are `until`, all sequences have stopped, or logits are not finite."""
    model = nnx.merge(graphdef, state)

    def step(loop: _State) -> _State:
        loop, token = _draw(model, loop, drawing)
        hidden, cache = model.decode(token, loop.next_position, loop.cache)
        return dataclasses.replace(loop, cache=cache, hidden=hidden, next_position=loop.next_position + 1)

    def unfinished(loop: _State) -> Bool[Array, ""]:
        return (loop.count < until) & ~loop.stopped.all() & loop.finite.all()

    return jax.lax.while_loop(unfinished, step, loop)


def _draw(model: MossAudio, loop: _State, drawing: Drawing) -> tuple[_State, Int[Array, " b"]]:
    """The state with one more token of each sequence, and those tokens."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys(drawing.seeds), loop.count)
    # One token of each sequence is far less than the head: it goes to where the head's rows and columns lie. The sums
    # return, first as they are cut there, or XLA would gather the columns.
    logits = constrain(model.logits(constrain(loop.hidden, None, "embed")), None, "vocab")
    logits = constrain(logits, "batch", None)
    token = jnp.where(loop.stopped, drawing.fill, drawing.sampling(logits, loop.seen, keys))
    loop = dataclasses.replace(
        loop,
        tokens=jax.lax.dynamic_update_index_in_dim(loop.tokens, token, loop.count, axis=1),
        count=loop.count + 1,
        stopped=loop.stopped | jnp.isin(token, drawing.eos_ids),
        finite=loop.finite & (loop.stopped | jnp.isfinite(logits).all(-1)),
        seen=loop.seen.at[jnp.arange(token.shape[0]), token].set(True),
    )
    return loop, token


def _why_not_finite(model: MossAudio, row: int, count: int) -> str:
    found = f"the logits of sequence {row} are not finite at token {count} of its answer"
    tensor = first_nonfinite(model)
    if tensor is not None:
        return f"{found}, since {tensor} of the weights holds NaN or infinity: take another checkpoint"
    return f"{found}, though all weights are: check its audio, or load the model with dtype float32"


def _is_packed(segment_ids: np.ndarray | jax.Array) -> bool:
    """Whether a row holds several examples, among those that this process has."""
    if isinstance(segment_ids, jax.Array):
        return any(np.asarray(shard.data).max(initial=0) > 1 for shard in segment_ids.addressable_shards)
    return bool(segment_ids.max(initial=0) > 1)
