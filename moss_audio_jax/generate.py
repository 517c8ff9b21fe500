"""Text out of the model: one prefill, then a compiled loop of cached single-token steps.

The prompt's length is bucketed by `make_inputs`, the answer's here, so a new length seldom compiles anything. The loop
runs on the device until every sequence has stopped; the host hears of it once, or every few tokens when streaming.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from moss_audio_jax.compilation import jit
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs, bucket
from moss_audio_jax.language_model import KVCache
from moss_audio_jax.model import MossAudio
from moss_audio_jax.sharding import constrain

MIN_NEW_TOKENS = 16  # the smallest bucket of an answer's length


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits, in Hugging Face's order: penalty, temperature, top-k, top-p.

    temperature: 0 takes the most likely token (greedy), and top_k and top_p do nothing.
    top_k: draw from the k most likely tokens; 0 means all.
    top_p: draw from the fewest tokens whose probabilities reach it; 1 means all.
    repetition_penalty: logits of tokens in the prompt or the answer so far are divided by it where positive and
        multiplied where negative; 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        checks = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise MossAudioError(f"{name} must be {expected}, not {getattr(self, name)}")

    def __call__(
        self, logits: Float[Array, "b vocab"], seen: Bool[Array, "b vocab"], keys: jax.Array
    ) -> Int[Array, " b"]:
        """One token a sequence; `keys` [b] are its random keys."""
        log_weights, ids = self.candidates(logits, seen)
        choice = jax.vmap(jax.random.categorical)(keys, log_weights)
        return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]

    def candidates(
        self, logits: Float[Array, "b vocab"], seen: Bool[Array, "b vocab"]
    ) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
        """The tokens to draw from, and the logarithms of their weights: -inf where top-p rules a token out."""
        if self.repetition_penalty != 1.0:
            penalised = jnp.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = jnp.where(seen, penalised, logits)
        if self.temperature == 0.0:
            ids = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
            return jnp.zeros(ids.shape), ids
        logits = logits / self.temperature
        vocab = logits.shape[-1]
        if not self.top_k and self.top_p == 1.0:
            return logits, jnp.broadcast_to(jnp.arange(vocab), logits.shape)
        # Candidates in falling order, so that top-p is a prefix of them.
        logits, ids = jax.lax.top_k(logits, min(self.top_k or vocab, vocab))
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        return jnp.where(before < self.top_p, logits, -jnp.inf), ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The loop's carry. `tokens[:, :count]` are drawn; the last of them is not read yet."""

    cache: KVCache
    tokens: Int[Array, "b new"]
    count: Int[Array, ""]
    next_position: Int[Array, " b"]
    stopped: Bool[Array, " b"]
    seen: Bool[Array, "b vocab"]
    keys: jax.Array


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
) -> Int[np.ndarray, "b new"]:
    """Answers to a batch of prompts, `new` being the longest one's length.

    Sampling: see `Sampling`; the default is greedy. eos_ids: a sequence stops after any of these (which is part of its
    answer, and fills the rest of its row); None takes the checkpoint's, `()` never stops early. Equal seeds give equal
    answers.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    pieces = list(_steps(model, inputs, max_new_tokens, max_new_tokens, sampling, eos_ids, seed))
    return np.concatenate(pieces, axis=1)


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
) -> Iterator[Int[np.ndarray, "b piece"]]:
    """The same answers as `generate`, in pieces of up to `every` tokens as they are produced."""
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    return _steps(model, inputs, max_new_tokens, every, sampling, eos_ids, seed)


def _steps(
    model: MossAudio,
    inputs: ModelInputs,
    max_new_tokens: int,
    every: int,
    sampling: Sampling,
    eos_ids: Sequence[int] | None,
    seed: int,
) -> Iterator[Int[np.ndarray, "b piece"]]:
    if max_new_tokens < 1:
        raise MossAudioError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    if _is_packed(inputs.segment_ids):
        raise MossAudioError("inputs to generate hold several packed examples a row: give one prompt a row")
    eos = tuple(model.config.eos_ids if eos_ids is None else eos_ids)
    graphdef, state = nnx.split(model)
    with _on_mesh_of(state):
        loop = prefill_prompts(graphdef, state, inputs, bucket(max_new_tokens, MIN_NEW_TOKENS), sampling, eos, seed)
        done = 0
        while True:
            until = min(max_new_tokens, done + every)
            loop = decode_until(graphdef, state, loop, until, sampling, eos)
            count = int(loop.count)
            yield _on_host(loop.tokens[:, done:count])
            done = count
            if done >= max_new_tokens or bool(loop.stopped.all()):
                return


@functools.partial(jit, static_argnames=("graphdef", "new_slots", "sampling", "eos_ids"))
def prefill_prompts(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    inputs: ModelInputs,
    new_slots: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    seed: int,
) -> _State:
    """Reads the prompts and draws the first token."""
    model = nnx.merge(graphdef, state)
    batch, length = inputs.tokens.shape
    hidden, cache = model.prefill(inputs, length + new_slots)
    vocab = model.config.language_config.vocab_size
    valid = inputs.segment_ids != 0
    seen = jnp.zeros((batch, vocab), bool).at[jnp.arange(batch)[:, None], inputs.tokens].max(valid)
    keys = jax.random.split(jax.random.key(seed), batch)
    loop = _State(
        cache,
        jnp.full((batch, new_slots), eos_ids[0] if eos_ids else 0, jnp.int32),
        jnp.int32(0),
        valid.sum(1, dtype=jnp.int32),
        jnp.zeros(batch, bool),
        seen,
        keys,
    )
    return _draw(model, loop, hidden, sampling, eos_ids)


@functools.partial(jit, static_argnames=("graphdef", "sampling", "eos_ids"), donate_argnames="loop")
def decode_until(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    loop: _State,
    until: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> _State:
    """Draws tokens until there are `until`, or all sequences have stopped."""
    model = nnx.merge(graphdef, state)

    def step(loop: _State) -> _State:
        last = jax.lax.dynamic_index_in_dim(loop.tokens, loop.count - 1, axis=1, keepdims=False)
        hidden, cache = model.decode(last, loop.next_position, loop.cache)
        loop = dataclasses.replace(loop, cache=cache, next_position=loop.next_position + 1)
        return _draw(model, loop, hidden, sampling, eos_ids)

    return jax.lax.while_loop(lambda loop: (loop.count < until) & ~loop.stopped.all(), step, loop)


def _draw(
    model: MossAudio,
    loop: _State,
    hidden: Float[Array, "b hidden"],
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> _State:
    keys = jax.vmap(lambda key: jax.random.fold_in(key, loop.count))(loop.keys)
    # One token of each sequence is far less than the head: it goes to where the head's rows lie, and their sums return.
    logits = constrain(model.logits(constrain(hidden, None, "embed")), "batch", None)
    token = sampling(logits, loop.seen, keys)
    if eos_ids:
        token = jnp.where(loop.stopped, eos_ids[0], token)
    stopped = loop.stopped | jnp.isin(token, jnp.array(eos_ids, jnp.int32))
    return dataclasses.replace(
        loop,
        tokens=jax.lax.dynamic_update_index_in_dim(loop.tokens, token, loop.count, axis=1),
        count=loop.count + 1,
        stopped=stopped,
        seen=loop.seen.at[jnp.arange(token.shape[0]), token].set(True),
    )


def _on_host(array: jax.Array) -> np.ndarray:
    """All of an array; each of several processes gets it, also what lies with the others."""
    whole = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array if whole else multihost_utils.process_allgather(array, tiled=True))


def _is_packed(segment_ids: np.ndarray | jax.Array) -> bool:
    """Whether a row holds several examples, among those that this process has."""
    if isinstance(segment_ids, jax.Array):
        return any(np.asarray(shard.data).max() > 1 for shard in segment_ids.addressable_shards)
    return bool(segment_ids.max() > 1)


def mesh_of(model: MossAudio | nnx.State) -> jax.sharding.Mesh | None:
    """The mesh that the parameters are sharded over, if there is one."""
    sharding = jax.tree.leaves(nnx.state(model) if isinstance(model, nnx.Module) else model)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
        return sharding.mesh
    return None


def _on_mesh_of(state: nnx.State) -> contextlib.AbstractContextManager:
    """Makes the mesh that the parameters lie on the current one, so that activations are placed on it too."""
    mesh = mesh_of(state)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
