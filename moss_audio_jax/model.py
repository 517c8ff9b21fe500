"""MOSS-Audio: Qwen3 on text tokens with the audio encoder's features at audio positions.

    features, taps = audio_encoder(chunks)
    x = tokens' embeddings, audio_adapter(features) at audio positions
    x = language_model(x), deepstack_audio_merger_list[k](taps[k]) added to the output of layer k at audio positions
    logits = lm_head(x)

Module and parameter names follow the released checkpoint.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moss_audio_jax.compilation import jit
from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig
from moss_audio_jax.encoder import AudioEncoder
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inputs import ModelInputs
from moss_audio_jax.int8 import declare_scales
from moss_audio_jax.kv_cache import KVCache
from moss_audio_jax.language_model import DecoderLayer, HiddenStates, LanguageModel
from moss_audio_jax.layers import GatedMLP, Linear, map_layers, rematerialized, with_masters
from moss_audio_jax.lora import add_adapters, linear_layers, with_adapter_dropout
from moss_audio_jax.sharding import constrain, on_automatic_mesh, on_cpu, on_mesh_of
from moss_audio_jax.tree import dotted

TOKENS_PER_SECOND = 100 / DOWNSAMPLE_RATE  # of audio: a mel frame each 10 ms
CHUNKS_TOGETHER = 4  # of a sequence, at most, that are encoded together while prompts are read
ADAPTER_DROPOUT = 1  # folded into a dropout key, to draw for the adapters independently of the encoder


class MossAudio(nnx.Module):
    """The whole network. `model(inputs)` returns logits; see `generate` for text and `hidden_states` for training."""

    def __init__(self, config: MossAudioConfig, *, rngs: nnx.Rngs):
        self.config = config
        audio, language = config.audio_config, config.language_config
        sizes = (audio.output_dim, config.adapter_hidden_size, language.hidden_size)
        self.audio_encoder = AudioEncoder(audio, rngs=rngs)
        self.audio_adapter = GatedMLP(*sizes, rngs=rngs)
        if config.num_deepstack:
            self.deepstack_audio_merger_list = GatedMLP(*sizes, layers=config.num_deepstack, rngs=rngs)
        self.language_model = LanguageModel(language, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(language.hidden_size, language.vocab_size, ("embed", "vocab"), rngs=rngs)
        if config.int8_layers:
            declare_scales(linear_layers(self), config)
        if config.lora is not None:
            add_adapters(self, config.lora, rngs)

    def __call__(self, inputs: ModelInputs) -> Float[Array, "b s vocab"]:
        """Computes logits in float32, compiled once for each shape of `inputs`; at padding they have no meaning.

        Raises MossAudioError for a sequence longer than the model's positions.
        """
        check_positions(inputs, self.config)
        graphdef, state = nnx.split(self)
        with on_mesh_of(state, inputs):
            return _compiled_logits(graphdef, on_automatic_mesh(state), inputs)

    def hidden_states(
        self,
        inputs: ModelInputs,
        *,
        middle: int | None = None,
        decoder_frozen: bool = True,
        masters: Mapping[str, jax.Array] | None = None,
        dropout_key: jax.Array | None = None,
        encoder_dropout: bool = True,
        remat: str = "none",
    ) -> HiddenStates:
        """Runs the network up to the hidden states that `logits` reads, for training and scoring.

        middle: number of decoder layers before the middle hidden states, which auxiliary losses read; None: no such.
        decoder_frozen: True if no decoder layer's own weight gets a gradient (`LanguageModel.run_layers`).
        masters: float32 masters by path, which get float32 gradients in place of the parameters (`layers.weighted`).
        dropout_key: applies dropout as in training: the adapters', and the encoder's unless `encoder_dropout` is False.
        remat: what the backward pass recomputes, a key of `layers.REMAT_POLICIES`.

        In your own `jax.jit`, with sharded parameters, call it under `jax.set_mesh(mesh)`; without a mesh a TPU runs
        slower attention.
        """
        model, lora, encoder_key = self, self.config.lora, dropout_key if encoder_dropout else None
        if masters is not None:
            model = with_masters(model, masters)
        if dropout_key is not None and lora is not None and lora.dropout:
            model = with_adapter_dropout(model, jax.random.fold_in(dropout_key, ADAPTER_DROPOUT))
        x, deepstack = model.embed(inputs, dropout_key=encoder_key, remat=remat)
        return model.language_model(
            x, inputs.positions, inputs.segment_ids, deepstack, middle=middle, frozen=decoder_frozen, remat=remat
        )

    @property
    def head(self) -> Float[Array, "hidden vocab"]:
        """Kernel from hidden states to logits; with tied weights, the transposed embedding."""
        if self.config.tie_word_embeddings:
            return self.language_model.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: Float[Array, "... hidden"]) -> Float[Array, "... vocab"]:
        """Computes logits in float32, accumulated in float32 from weights of any dtype."""
        return jnp.matmul(hidden, self.head, preferred_element_type=jnp.float32)

    def embed(
        self, inputs: ModelInputs, *, dropout_key: jax.Array | None = None, remat: str = "none"
    ) -> tuple[Float[Array, "b s hidden"], Float[Array, "injected b s hidden"]]:
        """Returns the decoder input with audio in place, and the DeepStack features of its first layers (0 at text)."""
        return self._embed(inputs, functools.partial(self.encode_audio, dropout_key=dropout_key, remat=remat))

    def _embed(
        self, inputs: ModelInputs, encode: Callable[[ModelInputs], tuple[jax.Array, jax.Array]]
    ) -> tuple[Float[Array, "b s hidden"], Float[Array, "injected b s hidden"]]:
        x = constrain(self.language_model.embed_tokens(inputs.tokens), "batch", "sequence", "features")
        if inputs.audio_chunks.shape[1] == 0:
            return x, jnp.zeros((0, *x.shape), x.dtype)
        adapted, merged = encode(inputs)
        at_audio = (inputs.audio_slots >= 0)[..., None]
        # [injected, b, audio tokens, hidden] -> [injected, b, s, hidden]
        place = jax.vmap(lambda feature, slot: feature[slot], in_axes=(0, 0))
        x = jnp.where(at_audio, place(adapted, inputs.audio_slots), x)
        placed = jax.vmap(place, in_axes=(0, None))(merged, inputs.audio_slots)
        return x, constrain(jnp.where(at_audio, placed, 0), None, "batch", "sequence", "features")

    def encode_audio(
        self, inputs: ModelInputs, *, dropout_key: jax.Array | None = None, remat: str = "none"
    ) -> tuple[Float[Array, "b audio hidden"], Float[Array, "injected b audio hidden"]]:
        """Returns adapter outputs and merged DeepStack features of all chunks, with the chunks' padding."""
        features, taps = self.audio_encoder(
            inputs.audio_chunks, inputs.chunk_frames, inputs.stem_frames, dropout_key=dropout_key, remat=remat
        )
        features, taps = constrain(features, "batch"), constrain(taps, None, "batch")
        adapted = constrain(rematerialized(self.audio_adapter.__call__, remat)(features), "batch")
        if not self.config.num_deepstack:
            return adapted, jnp.zeros((0, *adapted.shape), adapted.dtype)
        merged = map_layers(self.deepstack_audio_merger_list, taps[: self.config.num_deepstack], remat=remat)
        return adapted, constrain(merged, None, "batch")

    def encode_full_groups(
        self, inputs: ModelInputs
    ) -> tuple[Float[Array, "b audio hidden"], Float[Array, "injected b audio hidden"]]:
        """Computes `encode_audio` in groups of chunks; the features of a group without audio are zeros.

        So a prompt that is padded with chunks takes little more time than those with audio need. Only on a CPU: sharded
        weights would be gathered for each group, and beside a language model of 4B or 8B the encoder is small.
        """
        batch, count = inputs.chunk_frames.shape
        size = min(CHUNKS_TOGETHER, -(-count // 2))

        def grouped(x: jax.Array) -> jax.Array:
            """[b, c, ...] -> [groups, b, c', ...]"""
            x = jnp.pad(x, [(0, 0), (0, -count % size)] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)

        def of_group(chunks: jax.Array, chunk_frames: jax.Array, stem_frames: jax.Array):
            group = dataclasses.replace(inputs, audio_chunks=chunks, chunk_frames=chunk_frames, stem_frames=stem_frames)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self.encode_audio, group))
            return jax.lax.cond((chunk_frames > 0).any(), self.encode_audio, lambda _: zeros, group)

        groups = grouped(inputs.audio_chunks), grouped(inputs.chunk_frames), grouped(inputs.stem_frames)
        adapted, merged = jax.lax.map(lambda group: of_group(*group), groups)
        # [groups, b, audio', hidden] -> [b, audio, hidden]; [groups, injected, ...] -> [injected, ...]
        adapted = adapted.swapaxes(0, 1).reshape(batch, -1, adapted.shape[-1])
        merged = jnp.moveaxis(merged, 0, 2).reshape(merged.shape[1], *adapted.shape)
        return constrain(adapted, "batch"), constrain(merged, None, "batch")

    def prefill(self, inputs: ModelInputs, slots: int) -> tuple[Float[Array, "b hidden"], KVCache]:
        """Fills a new cache of `slots` slots with the prompts; returns the hidden state of each one's last token."""
        x, deepstack = self._embed(inputs, self.encode_full_groups if on_cpu() else self.encode_audio)
        counts = (inputs.segment_ids != 0).sum(1, dtype=jnp.int32)
        hidden, cache = self.language_model.prefill(x, counts, slots, deepstack)
        return jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)[:, 0], cache

    def decode(
        self,
        tokens: Int[Array, " b"],
        active: Bool[Array, " b"],
        cache: KVCache,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> tuple[Float[Array, "b hidden"], KVCache]:
        """Runs one more token of each active sequence; returns its hidden state. The others' has no meaning.

        layers: see `LanguageModel.extend`.
        """
        x = self.language_model.embed_tokens(tokens[:, None])
        hidden, cache = self.language_model.extend(x, active.astype(jnp.int32), cache, layers=layers)
        return hidden[:, 0], cache


@functools.partial(jit, static_argnums=0)
def _compiled_logits(graphdef: nnx.GraphDef, state: nnx.State, inputs: ModelInputs) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return model.logits(model.hidden_states(inputs).last)


def check_positions(inputs: ModelInputs, config: MossAudioConfig, new_tokens: int = 0) -> None:
    """Raises MossAudioError if prompts and `new_tokens` after them take more positions than the model has.

    Checks NumPy inputs only: reading arrays on devices would wait for them.
    """
    if not isinstance(inputs.positions, np.ndarray) or not inputs.positions.size:
        return
    lengths = np.where(inputs.segment_ids != 0, inputs.positions + 1, 0).max(1)
    row, limit = int(lengths.argmax()), config.language_config.max_position_embeddings
    read = int(lengths[row])
    if read + new_tokens <= limit:
        return
    audio = int((inputs.audio_slots[row] >= 0).sum())
    found = f"{read:,} tokens ({audio:,} of them audio, {audio / TOKENS_PER_SECOND:,.0f} s)"
    if read >= limit:
        raise MossAudioError(
            f"sequence {row} has {found}, and the model's max_position_embeddings are {limit:,}: give it shorter audio"
        )
    raise MossAudioError(
        f"sequence {row} has {found}, which with max_new_tokens={new_tokens:,} are more than the "
        f"model's max_position_embeddings of {limit:,}: let max_new_tokens be {limit - read:,}, or give shorter audio"
    )


def parameter_specs(config: MossAudioConfig) -> dict[str, nnx.Variable]:
    """Returns path, such as `language_model.norm.scale` -> declared parameter, without its values."""
    model = nnx.eval_shape(lambda: MossAudio(config, rngs=nnx.Rngs(0)))
    return {dotted(path): spec for path, spec in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def adapter_specs(config: MossAudioConfig) -> dict[str, nnx.Variable]:
    """Returns the `parameter_specs` of the adapter: all that LoRA trains and saves."""
    lora = config.lora
    return {} if lora is None else {path: spec for path, spec in parameter_specs(config).items() if lora.trains(path)}
