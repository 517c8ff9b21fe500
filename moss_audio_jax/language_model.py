"""Qwen3 with DeepStack: features of the audio encoder's early layers are added to the outputs of its first layers."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from moss_audio_jax.attention import cached_attend, choose_slots, rotary_phases, rotate, self_attend
from moss_audio_jax.config import LanguageConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.kv_cache import KVCache
from moss_audio_jax.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    gradients_before,
    layer_at,
    parameter,
    row_major,
    scan_layers,
    take_layers,
    weighted,
)
from moss_audio_jax.sharding import constrain, on_cpu


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, features: int, std: float, *, rngs: nnx.Rngs):
        self.embedding = parameter(rngs, (vocab_size, features), ("vocab", "embed"), nnx.initializers.normal(std))

    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        return weighted(self, "embedding", _rows, tokens)


def _rows(tokens: Int[Array, "b s"], embedding: Float[Array, "vocab d"]) -> Float[Array, "b s d"]:
    return jnp.take(embedding, tokens, axis=0)


class SelfAttention(nnx.Module):
    """Projections of grouped-query attention with normed queries and keys; the caller attends between them."""

    def __init__(self, config: LanguageConfig, *, layers: int, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        common = {"std": config.initializer_range, "layers": layers, "rngs": rngs}
        self.q_proj = Linear(width, queries, ("embed", "heads"), **common)
        self.k_proj = Linear(width, keys, ("embed", "heads"), **common)
        self.v_proj = Linear(width, keys, ("embed", "heads"), **common)
        self.o_proj = Linear(queries, width, ("heads", "embed"), **common)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, layers=layers, rngs=rngs)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, layers=layers, rngs=rngs)

    def project(
        self, x: Float[Array, "b t hidden"], phases: tuple[jax.Array, jax.Array]
    ) -> tuple[Float[Array, "b t heads d"], Float[Array, "b t kv d"], Float[Array, "b t kv d"]]:
        """Returns rotated queries, rotated keys, and values."""
        projected = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        if x.shape[1] == 1:
            # While decoding. Otherwise a TPU's compiler copies the weights of all layers, transposed, before the loop.
            projected = [row_major(y) for y in projected]
        query, key, value = (y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in projected)
        return rotate(self.q_norm(query), phases), rotate(self.k_norm(key), phases), value


class DecoderLayer(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). Split at the attention, so that decoding can use a cache."""

    def __init__(self, config: LanguageConfig, *, layers: int, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = SelfAttention(config, layers=layers, rngs=rngs)
        self.mlp = GatedMLP(
            width, config.intermediate_size, width, std=config.initializer_range, layers=layers, rngs=rngs
        )
        self.input_layernorm = RMSNorm(width, eps, layers=layers, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(width, eps, layers=layers, rngs=rngs)

    def project(self, x: Float[Array, "b t hidden"], phases: tuple[jax.Array, jax.Array]):
        return self.self_attn.project(self.input_layernorm(x), phases)

    def finish(
        self, x: Float[Array, "b t hidden"], attended: Float[Array, "b t heads d"], *, frozen: bool = True
    ) -> Float[Array, "b t hidden"]:
        x, mlp = x + self.self_attn.o_proj(attended.reshape(*x.shape[:2], -1)), self.mlp
        if not frozen:
            x, mlp = gradients_before(x, mlp)
        return x + mlp(self.post_attention_layernorm(x))


class HiddenStates(NamedTuple):
    """Hidden states of one pass, each after the model's last norm: `MossAudio.logits` reads any of them.

    `middle` and `embedded` are None unless the pass is asked for a middle layer.
    """

    last: Float[Array, "b s hidden"]  # after all layers
    middle: Float[Array, "b s hidden"] | None = None  # after the first `middle` layers
    embedded: Float[Array, "b s hidden"] | None = None  # before the first layer


class LanguageModel(nnx.Module):
    """Embedded tokens -> hidden states."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.initializer_range, rngs=rngs)
        self.layers = DecoderLayer(config, layers=config.num_hidden_layers, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s hidden"],
        positions: Int[Array, "b s"],
        segment_ids: Int[Array, "b s"],
        deepstack: Float[Array, "injected b s hidden"],
        *,
        middle: int | None = None,
        frozen: bool = True,
        remat: str = "none",
    ) -> HiddenStates:
        """Runs all layers, for training and scoring.

        deepstack: deepstack[k] is added to the output of layer k; it is 0 at text.
        middle: number of layers before the middle hidden states; None returns only the last ones.
        frozen, remat: see `run_layers`.
        """
        rest = {"positions": positions, "segment_ids": segment_ids, "deepstack": deepstack}
        run = functools.partial(self.run_layers, **rest, frozen=frozen, remat=remat)
        total = self.config.num_hidden_layers
        if middle is None:
            return HiddenStates(self.norm(run(range(total), x)))
        early = run(range(middle), x)
        last = self.norm(run(range(middle, total), early))
        return HiddenStates(last, embedded=self.norm(x), middle=self.norm(early))

    def run_layers(
        self,
        layers: range,
        x: Float[Array, "b s hidden"],
        positions: Int[Array, "b s"],
        segment_ids: Int[Array, "b s"],
        deepstack: Float[Array, "injected b s hidden"],
        *,
        frozen: bool = True,
        remat: str = "none",
    ) -> Float[Array, "b s hidden"]:
        """Runs consecutive layers, without the last norm.

        frozen: True if no layer's own weight gets a gradient. Then all layers are scanned at once: a second scan would
            copy its layers' weights out of the stack. Otherwise the DeepStack layers and the rest are scanned
            separately: weights are copied anyway, to be cast, and the cotangent of `deepstack` stays short.
        remat: what the backward pass recomputes, a key of `layers.REMAT_POLICIES`.
        """
        phases = rotary_phases(positions, self.config.head_dim, self.config.rope_theta)
        count = deepstack.shape[0]

        def body(layer, x, injected):
            query, key, value = layer.project(x, phases)
            x = layer.finish(x, self_attend(query, key, value, segment_ids), frozen=frozen)
            x = x if injected is None else x + injected
            return constrain(x, "batch", "sequence", "features")

        def body_at(layer, x, index):
            return body(layer, x, jnp.where(index < count, deepstack[jnp.minimum(index, count - 1)], 0))

        x = constrain(x, "batch", "sequence", "features")
        if (frozen or on_cpu()) and count and layers == range(self.config.num_hidden_layers):
            return scan_layers(body_at, self.layers, x, jnp.arange(layers.stop), remat=remat)
        first, stop = layers.start, layers.stop
        injected = min(max(first, count), stop)  # the first layer without DeepStack
        if first < injected:
            stack = take_layers(self.layers, first, injected)
            x = scan_layers(body, stack, x, deepstack[first:injected], remat=remat)
        if injected < stop:
            x = scan_layers(body, take_layers(self.layers, injected, stop), x, remat=remat)
        return x

    def prefill(
        self,
        x: Float[Array, "b t hidden"],
        counts: Int[Array, " b"],
        slots: int,
        deepstack: Float[Array, "injected b t hidden"],
    ) -> tuple[Float[Array, "b t hidden"], KVCache]:
        """Runs all layers on whole prompts, and returns a new cache with their keys and values.

        counts: tokens of each prompt; the rest of its t tokens is padding.
        Raises MossAudioError if the cache has fewer slots than t.
        """
        batch, length = x.shape[:2]
        if slots < length:
            raise MossAudioError(
                f"a cache of {slots} slots has no room for prompts of {length} tokens: give `prefill` more slots, one "
                "for each token of the prompt and of the answer"
            )
        segment_ids = (jnp.arange(length) < counts[:, None]).astype(jnp.int32)
        x, (keys, values) = self._run_caching(
            x,
            jnp.broadcast_to(jnp.arange(length), (batch, length)),
            lambda layer, query, key, value: self_attend(query, key, value, segment_ids),
            deepstack,
            slots=slots,
        )
        return x, KVCache(keys, values, counts)

    def extend(
        self,
        x: Float[Array, "b t hidden"],
        counts: Int[Array, " b"],
        cache: KVCache,
        deepstack: Float[Array, "injected b t hidden"] | None = None,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> tuple[Float[Array, "b t hidden"], KVCache]:
        """Runs all layers on the next `t` tokens of each sequence: one more token, or a further question.

        counts: how many of the t are tokens; the rest is padding, which takes slots too, until they are written over.
            The hidden states of a sequence with none have no meaning.
        layers: the model's `unstacked` layers, for a loop that takes them out of the stack once.
        Raises MossAudioError if the cache has too few free slots, unless its lengths are traced.
        """
        filled = 0 if isinstance(cache.lengths, Tracer) else int(cache.lengths.max())
        if filled + x.shape[1] > cache.slots:
            raise MossAudioError(
                f"a cache of {cache.slots} slots, {filled} of them filled, has no room for {x.shape[1]} more tokens: "
                "give `prefill` more slots, one for each token of the prompt and of the answer"
            )
        choice = choose_slots(cache.slots, jnp.where(counts > 0, cache.lengths, 0))

        def attend(layer, query, key, value):
            return cached_attend(query, key, value, cache, layer, choice)

        positions = cache.lengths[:, None] + jnp.arange(x.shape[1])
        x, new = self._run_caching(x, positions, attend, deepstack, layers=layers)
        return x, cache.extended(*new, counts, read=x)

    def _run_caching(
        self,
        x: Float[Array, "b t hidden"],
        positions: Int[Array, "b t"],
        attend: Callable[..., Float[Array, "b t heads d"]],
        deepstack: Float[Array, "injected b t hidden"] | None,
        *,
        slots: int | None = None,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> tuple[Float[Array, "b t hidden"], tuple[Float[Array, "layers b kv s d"], Float[Array, "layers b kv s d"]]]:
        """Runs all layers and the last norm; returns hidden states, and keys and values for a cache.

        attend: (number of the layer, query, key, value) -> attended. slots: of the cache; None for the t of `x`.
        """
        phases = rotary_phases(positions, self.config.head_dim, self.config.rope_theta)
        padding = 0 if slots is None else slots - x.shape[1]

        def cached(y: Float[Array, "b t kv d"]) -> Float[Array, "b kv s d"]:
            y = jnp.pad(y.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
            # Otherwise a TPU's compiler may lay out the whole cache as suits these, and copy it before a loop.
            return constrain(row_major(y), "batch", "heads", None, None)

        def body(x, index, layer=None):
            layer = layer or layer_at(self.layers, index)
            query, key, value = layer.project(x, phases)
            x = layer.finish(x, attend(index, query, key, value))
            if deepstack is not None and len(deepstack):
                last = len(deepstack) - 1
                x = x + jnp.where(index <= last, deepstack[jnp.minimum(index, last)], 0)
            return constrain(x, "batch", "sequence", "features"), (cached(key), cached(value))

        count = self.config.num_hidden_layers
        if layers is None:
            x, new = jax.lax.scan(body, x, jnp.arange(count, dtype=jnp.int32))
        else:
            of_layers = []
            for index, layer in enumerate(layers):
                x, of_layer = body(x, jnp.int32(index), layer)
                of_layers.append(of_layer)
            new = jax.tree.map(lambda *x: jnp.stack(x), *of_layers)
        return self.norm(x), new
