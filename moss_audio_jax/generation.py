"""Generates text: one prefill, then a compiled loop of cached single-token steps.

`make_inputs` pads the prompt to a bucket of lengths, and the answer has buckets here, so a new length seldom compiles;
other sampling options never do. The loop runs on the device until every sequence has stopped; the host reads tokens
once, or every few tokens when streaming.
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
from moss_audio_jax.kv_cache import KVCache
from moss_audio_jax.language_model import DecoderLayer
from moss_audio_jax.layers import by_output, unstacked
from moss_audio_jax.model import MossAudio, check_positions
from moss_audio_jax.sampling import SamplingArrays, row_keys, row_seeds
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.sharding import constrain, on_automatic_mesh, on_cpu, on_host, on_mesh_of
from moss_audio_jax.steering import STOP, WARM_TEMPERATURE, Steering
from moss_audio_jax.weights.finite import first_nonfinite

GREEDY = Sampling()
MIN_NEW_TOKENS = 16  # the smallest bucket of an answer's length
MIN_EOS_IDS = 8  # the smallest bucket of their number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawing:
    """Arrays that tokens are drawn by; a leading axis of 1 serves all rows.

    seeds: high and low 32 bits. eos_ids: an answer stops after any of them; padded with -1.
    limits: tokens of an answer at most. fill: the token after an answer's end. steering: None steers nothing.
    as_drawn: True where the logprobs are those that the tokens are drawn with, not the model's own.
    """

    sampling: SamplingArrays
    seeds: UInt32[Any, "b 2"]
    eos_ids: Int[Any, "b n"]
    limits: Int[Any, " b"]
    fill: Int[Any, " b"]
    steering: Steering | None = None
    as_drawn: Bool[Any, " b"] | bool = False


def make_drawing(
    batch: int,
    sampling: Sampling,
    eos_ids: Sequence[int],
    limit: int,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    steering: Steering | None = None,
) -> Drawing:
    """Makes NumPy arrays for rows that differ by their seeds alone; their shapes come from a few buckets."""
    return Drawing(
        SamplingArrays.of(sampling),
        row_seeds(batch, seed, seeds),
        padded_eos(eos_ids, bucket(len(eos_ids), MIN_EOS_IDS))[None],
        np.array([limit], np.int32),
        np.array([eos_ids[0] if eos_ids else 0], np.int32),
        steering,
    )


def padded_eos(eos_ids: Sequence[int], length: int) -> Int[np.ndarray, " n"]:
    return np.array([*eos_ids, *[-1] * (length - len(eos_ids))], np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of a batch while they are generated. Row r has drawn `tokens[r, :counts[r]]`, which are in the cache.

    hidden: the last hidden states, from which the next tokens are drawn.
    stopped: ends at one of its eos ids, at its limit, or at logits that are not finite.
    finite: True while all logits of a sequence were finite.
    seen: tokens of the prompt and of the answer so far.
    logprobs: of the drawn tokens, see `Drawing.as_drawn`.
    warmed: number of tokens after which the answer was warmed up, to leave a loop; 0 if it was not.
    """

    cache: KVCache
    hidden: Float[Array, "b hidden"]
    tokens: Int[Array, "b new"]
    counts: Int[Array, " b"]
    stopped: Bool[Array, " b"]
    finite: Bool[Array, " b"]
    seen: Bool[Array, "b vocab"]
    logprobs: Float[Array, "b new"]
    warmed: Int[Array, " b"]


def generate(
    model: MossAudio,
    inputs: ModelInputs,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    **options: float,
) -> Int[np.ndarray, "b new"]:
    """Generates answers to a batch of prompts; `new` is the longest answer's length.

    sampling, options: the fields of `Sampling`, as an object or one by one: `generate(..., temperature=0.7)`.
    eos_ids: a sequence stops after any of these; it is part of the answer, and the first of `eos_ids` fills the rest of
        the row. None takes the checkpoint's; `()` never stops early.
    seed, seeds: a row draws by its own seed alone, so it draws the same in any batch. The rows' seeds are `seeds`, or
        `seed` + row, so that equal prompts of a batch get different answers.
    Raises MossAudioError for invalid options, for prompts and answers beyond the model's positions, and for logits that
    are not finite; then it names the tensor of the weights that is not finite, if there is one.
    """
    sampling = dataclasses.replace(sampling, **options)
    pieces = list(_answers(model, inputs, max_new_tokens, max_new_tokens, sampling, eos_ids, seed, seeds))
    return np.concatenate([np.zeros((len(inputs.tokens), 0), np.int32), *pieces], axis=1)


def stream(
    model: MossAudio,
    inputs: ModelInputs,
    *,
    max_new_tokens: int,
    every: int = 8,
    sampling: Sampling = GREEDY,
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    steering: Steering | None = None,
    **options: float,
) -> Iterator[Int[np.ndarray, "b piece"]]:
    """Yields the answers of `generate` as they are produced, in pieces of up to `every` tokens.

    steering: further options, a row for each prompt.
    """
    sampling = dataclasses.replace(sampling, **options)
    return _answers(model, inputs, max_new_tokens, every, sampling, eos_ids, seed, seeds, steering)


def _answers(
    model: MossAudio,
    inputs: ModelInputs,
    max_new_tokens: int,
    every: int,
    sampling: Sampling,
    eos_ids: Sequence[int] | None,
    seed: int,
    seeds: Sequence[int] | None,
    steering: Steering | None = None,
) -> Iterator[Int[np.ndarray, "b piece"]]:
    """Checks the request at once, and returns an iterator over the pieces."""
    check_request(model.config, inputs, max_new_tokens, seed, seeds)
    if every < 1:
        raise MossAudioError(f"every must be 1 or more, not {every}")
    batch = len(inputs.tokens)
    eos = tuple(model.config.eos_ids if eos_ids is None else eos_ids)
    drawing = make_drawing(batch, sampling, eos, max_new_tokens, seed, seeds, steering)
    return _pieces(model, inputs, max_new_tokens, every, drawing) if batch else iter(())


def check_request(
    config: MossAudioConfig,
    inputs: ModelInputs,
    max_new_tokens: int,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
) -> None:
    """Raises MossAudioError for a request that `generate` can't serve; needs no weights."""
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
        answers = prefill_prompts(graphdef, state, inputs, drawing.fill, bucket(max_new_tokens, MIN_NEW_TOKENS))
        layers = copied_layers(graphdef, state)
    done, stopped = 0, np.zeros(1, bool)
    while not stopped.all():
        with on_mesh_of(state):  # not while the caller has the piece
            answers = decode_answers(graphdef, state, layers, answers, drawing, every)
        results = answers.tokens, answers.counts, answers.stopped, answers.finite
        tokens, counts, stopped, finite = map(on_host, results)
        if not finite.all():
            row = int(finite.argmin())
            raise MossAudioError(why_not_finite(model, row, int(counts[row])))
        longest = int(counts.max())
        yield tokens[:, done:longest]
        done = longest


@functools.partial(jit, static_argnames=("graphdef", "new_slots"))
def prefill_prompts(
    graphdef: nnx.GraphDef, state: nnx.State, inputs: ModelInputs, fill: Int[Any, " b"], new_slots: int
) -> Answers:
    """Runs the prompts through the model, and makes room for `new_slots` tokens of each answer."""
    model = nnx.merge(graphdef, state)
    batch, length = inputs.tokens.shape
    hidden, cache = model.prefill(inputs, length + new_slots)
    vocab = model.config.language_config.vocab_size
    valid = inputs.segment_ids != 0
    seen = jnp.zeros((batch, vocab), bool).at[jnp.arange(batch)[:, None], inputs.tokens].max(valid)
    return Answers(
        cache,
        hidden,
        tokens=jnp.broadcast_to(jnp.asarray(fill)[:, None], (batch, new_slots)),
        counts=jnp.zeros(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        finite=jnp.ones(batch, bool),
        seen=seen,
        logprobs=jnp.zeros((batch, new_slots), jnp.float32),
        warmed=jnp.zeros(batch, jnp.int32),
    )


def copied_layers(graphdef: nnx.GraphDef, state: nnx.State) -> list[DecoderLayer] | None:
    """Returns a copy of the decoder layers, each with arrays of its own, where `decode_answers` needs it; else None.

    XLA's CPU backend copies a layer's float32 weights out of the stack to multiply: here once, not for every token.
    The copy has its kernels `by_output`.
    """
    embedding = nnx.merge(graphdef, state).language_model.embed_tokens.embedding
    return _unstacked_layers(graphdef, state) if on_cpu() and embedding.dtype == jnp.float32 else None


@functools.partial(jax.jit, static_argnames="graphdef")
def _unstacked_layers(graphdef: nnx.GraphDef, state: nnx.State) -> list[DecoderLayer]:
    return [by_output(layer) for layer in unstacked(nnx.merge(graphdef, state).language_model.layers)]


@functools.partial(jit, static_argnames="graphdef", donate_argnames="answers")
def decode_answers(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    layers: list[DecoderLayer] | None,
    answers: Answers,
    drawing: Drawing,
    steps: Int[Any, ""],
    until_one_stops: Bool[Any, ""] = False,
) -> Answers:
    """Draws up to `steps` tokens of each answer that has not stopped.

    layers: of `copied_layers`. until_one_stops: return early once one of them has.
    """
    model = nnx.merge(graphdef, state)
    stopped_before = answers.stopped

    def step(carry: tuple[Int[Array, ""], Answers]) -> tuple[Int[Array, ""], Answers]:
        done, answers = carry
        active = ~answers.stopped
        answers, token = _draw(model, answers, drawing)
        hidden, cache = model.decode(token, active, answers.cache, layers)
        return done + 1, dataclasses.replace(answers, cache=cache, hidden=hidden)

    def unfinished(carry: tuple[Int[Array, ""], Answers]) -> Bool[Array, ""]:
        done, answers = carry
        one_stopped = (answers.stopped & ~stopped_before).any()
        return (done < steps) & ~answers.stopped.all() & ~(one_stopped & until_one_stops)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), answers))[1]


def _draw(model: MossAudio, answers: Answers, drawing: Drawing) -> tuple[Answers, Int[Array, " b"]]:
    """Draws one token of each answer; returns the answers with them, and the tokens."""
    counts, active = answers.counts, ~answers.stopped
    seeds = jnp.broadcast_to(jnp.asarray(drawing.seeds), (len(counts), 2))
    keys = jax.vmap(jax.random.fold_in)(row_keys(seeds), counts)
    # The hidden states of one token are far smaller than the head, so they move to the shards of the head. The logits
    # come back sharded over the vocabulary first; otherwise XLA would all-gather the head's columns.
    logits = constrain(model.logits(constrain(answers.hidden, None, "embed")), None, "vocab")
    logits = constrain(logits, "batch", None)
    chosen, as_drawn = _chosen(logits, answers, drawing, keys)
    token = jnp.where(active, chosen, drawing.fill)
    own = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    logprobs = jnp.where(drawing.as_drawn, as_drawn, own)
    finite = answers.finite & (~active | jnp.isfinite(logits).all(-1))
    at_count = active[:, None] & (jnp.arange(answers.tokens.shape[1]) == counts[:, None])
    counts, warmed = counts + active, answers.warmed
    tokens = jnp.where(at_count, token[:, None], answers.tokens)
    ended = (token[:, None] == drawing.eos_ids).any(-1) | (counts >= drawing.limits) | ~finite
    if drawing.steering is not None:
        looping = drawing.steering.looping(tokens, counts, warmed) & active
        ended |= looping & ((drawing.steering.loops == STOP) | (warmed > 0))
        warmed = jnp.where(looping & (warmed == 0), counts, warmed)
    answers = dataclasses.replace(
        answers,
        tokens=tokens,
        counts=counts,
        stopped=answers.stopped | ended,
        finite=finite,
        seen=answers.seen.at[jnp.arange(token.shape[0]), token].set(True),
        logprobs=jnp.where(at_count, logprobs[:, None], answers.logprobs),
        warmed=warmed,
    )
    return answers, token


def _chosen(
    logits: Float[Array, "b vocab"], answers: Answers, drawing: Drawing, keys: jax.Array
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """Returns the next token of each answer, and the logprob that it was drawn with: 0 if it was forced."""
    sampling, steering = drawing.sampling, drawing.steering
    if steering is None:
        return sampling.draw(logits, answers.seen, keys)
    warm = jnp.maximum(sampling.temperature, WARM_TEMPERATURE)
    sampling = dataclasses.replace(sampling, temperature=jnp.where(answers.warmed > 0, warm, sampling.temperature))
    banned = steering.banned(drawing.eos_ids, answers.counts)
    drawn, logprobs = sampling.draw(steering.with_bias(logits), answers.seen, keys, banned)
    token = steering.forced(drawn, answers.tokens, answers.counts)
    return token, jnp.where(token == drawn, logprobs, 0)


def why_not_finite(model: MossAudio, row: int, count: int) -> str:
    found = f"the logits of sequence {row} are not finite at token {count} of its answer"
    tensor = first_nonfinite(model)
    if tensor is not None:
        return f"{found}, since {tensor} of the weights holds NaN or infinity: take another checkpoint"
    return f"{found}, though all weights are: check its audio, or load the model with dtype float32"


def _is_packed(segment_ids: np.ndarray | jax.Array) -> bool:
    """Returns True if a row of this process holds several examples."""
    if isinstance(segment_ids, jax.Array):
        return any(np.asarray(shard.data).max(initial=0) > 1 for shard in segment_ids.addressable_shards)
    return bool(segment_ids.max(initial=0) > 1)
