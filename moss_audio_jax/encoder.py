"""The audio encoder: mel chunks -> audio features at 12.5 tokens a second, with taps for DeepStack.

A clip is cut into chunks of 400 mel frames (4 s, 50 tokens). Each chunk is encoded independently: positions restart at
0, and attention stays within the chunk. So any number of clips is one batch of equal chunks:

    mel [b, c, frames, mel] -> convolutions, stem_proj [b*c, t, d] -> layers [b*c, t, d] -> features [b, c*t, out]

for b sequences of c chunks, with t = frames / 8 tokens each.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moss_audio_jax.attention import attend, dropout
from moss_audio_jax.config import EncoderConfig, downsampled_length
from moss_audio_jax.layers import LayerNorm, Linear, gelu, parameter, scan_layers, weighted
from moss_audio_jax.sharding import batch_is_sharded, constrain, on_cpu

# Chunks of each sequence that the stem encodes at a time: its activations take about 100 MB a chunk (float32, 480
# channels).
STEM_CHUNKS = 8
# Channels from which a CPU is faster by `_conv_of_products` than by `_conv_of_patches`, and chunk by chunk.
PRODUCT_CHANNELS = 128
# Checkpoint name of the convolutions' outputs, which the backward pass of a CPU reads instead of computing them again.
CONVOLVED = "convolved"


class Conv(nnx.Module):
    """3x3 convolution of stride 2 over [time, frequency]; the kernel is stored [time, frequency, in, out]."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        he_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.kernel = parameter(
            rngs, (3, 3, in_channels, out_channels), (None, None, "channels", "channels"), he_normal
        )
        self.bias = parameter(rngs, (out_channels,), ("channels",), nnx.initializers.zeros)

    def __call__(self, x: Float[Array, "n t f in"]) -> Float[Array, "n t/2 f/2 out"]:
        return weighted(self, "bias", jnp.add, weighted(self, "kernel", _conv_by_platform, x))


def _conv_by_platform(x: Float[Array, "n t f in"], kernel: Float[Array, "3 3 in out"]) -> Float[Array, "n t/2 f/2 out"]:
    # XLA's convolutions are the right ones on a TPU. On a CPU matmuls are faster, most of all in the backward pass.
    cpu = _conv_of_products if x.shape[-1] >= PRODUCT_CHANNELS else _conv_of_patches
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=_conv)


def _conv(x: Float[Array, "n t f in"], kernel: Float[Array, "3 3 in out"]) -> Float[Array, "n t/2 f/2 out"]:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)


def _conv_of_patches(x: Float[Array, "n t f in"], kernel: Float[Array, "3 3 in out"]) -> Float[Array, "n t/2 f/2 out"]:
    """Computes the sum of `_conv` as one matmul over nine strided views."""
    _, frames, bins, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [x[:, i : i + frames : 2, j : j + bins : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _conv_of_products(x: Float[Array, "n t f in"], kernel: Float[Array, "3 3 in out"]) -> Float[Array, "n t/2 f/2 out"]:
    """Computes the sum of `_conv` by 25 matmuls for 4 outputs, where patches take 36 (`_three_taps` on both axes)."""

    def along_frequency(x: jax.Array, taps: jax.Array) -> jax.Array:
        return _three_taps(x, taps, axis=1, multiply=jnp.matmul)

    def of_chunk(x: Float[Array, "t f in"]) -> Float[Array, "t/2 f/2 out"]:
        # In float32: the differences that are multiplied would lose bits of bfloat16.
        x32, kernel32 = x.astype(jnp.float32), kernel.astype(jnp.float32)
        return _three_taps(x32, kernel32, axis=0, multiply=along_frequency).astype(x.dtype)

    return checkpoint_name(jax.lax.map(of_chunk, x), CONVOLVED)


def _three_taps(x: jax.Array, taps: jax.Array, *, axis: int, multiply: Callable[..., jax.Array]) -> jax.Array:
    """Computes a convolution of three taps and stride 2 along an axis: 5 products for 2 outputs (Winograd), not 6.

    With x[-1] = 0, outputs 0 and 1 are x[-1] a + x[0] b + x[1] c and x[1] a + x[2] b + x[3] c. They share a product:
    x[-1] a + x[1] c = (x[-1] - x[1]) a + x[1] (a + c), and x[1] a + x[3] c = x[1] (a + c) + (x[3] - x[1]) c.
    """
    size = x.shape[axis]
    pairs = -(-size // 4)  # of outputs
    x = jnp.pad(x, [(0, 4 * pairs - size if i == axis else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], pairs, 4, *x.shape[axis + 1 :])
    x0, x1, x2, x3 = (part.squeeze(axis + 1) for part in jnp.split(x, 4, axis + 1))
    before = jax.lax.slice_in_dim(x3, 0, pairs - 1, axis=axis)  # the last of the pair before
    before = jnp.pad(before, [(1 if i == axis else 0, 0) for i in range(before.ndim)])
    a, b, c = taps
    shared = multiply(x1, a + c)
    y0 = multiply(before - x1, a) + multiply(x0, b) + shared
    y1 = multiply(x3 - x1, c) + multiply(x2, b) + shared
    y = jnp.stack([y0, y1], axis + 1)
    y = y.reshape(*y.shape[:axis], 2 * pairs, *y.shape[axis + 2 :])
    return jax.lax.slice_in_dim(y, 0, (size + 1) // 2, axis=axis)


class EncoderAttention(nnx.Module):
    def __init__(self, config: EncoderConfig, *, layers: int, rngs: nnx.Rngs):
        self.config = config
        width = config.d_model
        common = {"std": width**-0.5, "layers": layers, "rngs": rngs}
        self.q_proj = Linear(width, width, ("embed", "heads"), use_bias=True, **common)
        self.k_proj = Linear(width, width, ("embed", "heads"), use_bias=False, **common)
        self.v_proj = Linear(width, width, ("embed", "heads"), use_bias=True, **common)
        self.out_proj = Linear(width, width, ("heads", "embed"), use_bias=True, **common)

    def __call__(
        self, x: Float[Array, "n t d"], num_tokens: Int[Array, " n"], dropout_key: jax.Array | None
    ) -> Float[Array, "n t d"]:
        heads = (*x.shape[:2], self.config.encoder_attention_heads, self.config.head_dim)
        query, key, value = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        valid = jnp.arange(x.shape[1]) < num_tokens[:, None, None]  # [n, 1, t]
        mask = jnp.broadcast_to(valid, (x.shape[0], x.shape[1], x.shape[1]))
        rate = self.config.attention_dropout
        return self.out_proj(
            attend(query, key, value, mask, dropout_rate=rate, dropout_key=dropout_key).reshape(x.shape)
        )


class EncoderLayer(nnx.Module):
    """A pre-norm Whisper encoder layer."""

    def __init__(self, config: EncoderConfig, *, layers: int, rngs: nnx.Rngs):
        self.config = config
        width, hidden = config.d_model, config.encoder_ffn_dim
        self.self_attn = EncoderAttention(config, layers=layers, rngs=rngs)
        self.self_attn_layer_norm = LayerNorm(width, 1e-5, layers=layers, rngs=rngs)
        self.fc1 = Linear(width, hidden, ("embed", "mlp"), use_bias=True, std=width**-0.5, layers=layers, rngs=rngs)
        self.fc2 = Linear(hidden, width, ("mlp", "embed"), use_bias=True, std=hidden**-0.5, layers=layers, rngs=rngs)
        self.final_layer_norm = LayerNorm(width, 1e-5, layers=layers, rngs=rngs)

    def __call__(
        self, x: Float[Array, "n t d"], num_tokens: Int[Array, " n"], dropout_keys: jax.Array | None
    ) -> Float[Array, "n t d"]:
        """dropout_keys: four, split before the scan over layers, which would compute them in every pass."""
        keys = (None,) * 4 if dropout_keys is None else dropout_keys
        config = self.config
        attended = self.self_attn(self.self_attn_layer_norm(x), num_tokens, keys[0])
        x = x + dropout(attended, config.dropout, keys[1])
        hidden = gelu(self.fc1(self.final_layer_norm(x)))
        hidden = self.fc2(dropout(hidden, config.activation_dropout, keys[2]))
        return x + dropout(hidden, config.dropout, keys[3])


class AudioEncoder(nnx.Module):
    """Mel chunks -> features and taps: see the module's docstring."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, width = config.downsample_hidden_size, config.d_model
        self.conv1 = Conv(1, channels, rngs=rngs)
        self.conv2 = Conv(channels, channels, rngs=rngs)
        self.conv3 = Conv(channels, channels, rngs=rngs)
        self.stem_proj = Linear(
            config.stem_features,
            width,
            (None, "embed"),
            use_bias=True,
            std=config.stem_features**-0.5,
            rngs=rngs,
        )
        self.layers = EncoderLayer(config, layers=config.encoder_layers, rngs=rngs)
        self.layer_norm = LayerNorm(width, config.layer_norm_eps, rngs=rngs)
        if config.output_dim != width:
            self.out_proj = Linear(width, config.output_dim, ("embed", None), std=width**-0.5, rngs=rngs)

    def __call__(
        self,
        chunks: Float[Array, "b c frames mel"],
        chunk_frames: Int[Array, "b c"],
        stem_frames: Int[Array, "b c"],
        *,
        dropout_key: jax.Array | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "b c*t out"], Float[Array, "taps b c*t out"]]:
        """Returns features after the final norm, and outputs of the tapped layers in the order of the configuration.

        chunk_frames: number of frames of a chunk that are audio; 0 for an empty chunk, whose features are not used.
        stem_frames: number of frames that the convolutions see: all, except in a clip shorter than one chunk, which the
            reference encodes unpadded. (In a longer clip, the padding of the last chunk does affect its last tokens,
            since gelu(bias) is not 0.)
        """
        batch = chunks.shape[0]
        x = self._stem_in_groups(chunks.astype(self.conv1.kernel.dtype), stem_frames, remat)
        x = _shard_with_batch(x + sinusoids(x.shape[1], x.shape[2]).astype(x.dtype))
        num_tokens = downsampled_length(chunk_frames).reshape(-1)

        x, taps = self._layers_with_taps(x, num_tokens, dropout_key, remat)
        x = self.layer_norm(x)
        features = jnp.stack([x, *taps])  # [1 + taps, b*c, t, d]
        if hasattr(self, "out_proj"):
            features = self.out_proj(features)
        features = features.reshape(features.shape[0], batch, -1, features.shape[-1])
        return features[0], features[1:]

    def _stem_in_groups(
        self, chunks: Float[Array, "b c frames mel"], stem_frames: Int[Array, "b c"], remat: str
    ) -> Float[Array, "b*c t d"]:
        """Runs `_stem` on STEM_CHUNKS chunks of each sequence at a time; the sharded batch axis stays whole."""
        batch, count = stem_frames.shape
        size = min(count, STEM_CHUNKS)

        def grouped(x):
            """[b, c, ...] -> [groups, b * size, ...], padded with empty chunks."""
            x = jnp.pad(x, [(0, 0), (0, -count % size)] + [(0, 0)] * (x.ndim - 2))
            groups = x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)
            return groups.reshape(groups.shape[0], batch * size, *x.shape[2:])

        stem = self._stem if remat == "none" else jax.checkpoint(self._stem, prevent_cse=False)
        x = jax.lax.map(lambda group: stem(*group), (grouped(chunks), grouped(stem_frames)))
        x = x.reshape(x.shape[0], batch, size, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(batch, -1, *x.shape[3:])[:, :count].reshape(batch * count, *x.shape[3:])

    def _stem(self, mel: Float[Array, "n frames mel"], frames: Int[Array, " n"]) -> Float[Array, "n t d"]:
        """Applies the convolutions, then `stem_proj` to the frequencies and channels of each token."""
        # Chunks of several devices are not taken one by one, nor small ones, of which several fit a cache.
        one_by_one = on_cpu() and not batch_is_sharded() and self.conv1.kernel.shape[-1] >= PRODUCT_CHANNELS
        x = self._convolved_one_by_one(mel, frames) if one_by_one else self._convolved(mel, frames)
        return self.stem_proj(x.reshape(*x.shape[:2], -1))

    def _convolved(self, mel: Float[Array, "n frames mel"], frames: Int[Array, " n"]) -> Float[Array, "n t f channels"]:
        """Applies three convolutions, each with exact (erf) GELU and zeros after the clip's end."""
        x = _shard_with_batch(mel[..., None])
        for convolutions, conv in enumerate((self.conv1, self.conv2, self.conv3), start=1):
            x = gelu(conv(x))
            inside = jnp.arange(x.shape[1]) < downsampled_length(frames, convolutions)[:, None]
            x = _shard_with_batch(jnp.where(inside[:, :, None, None], x, 0))
        return x

    def _convolved_one_by_one(
        self, mel: Float[Array, "n frames mel"], frames: Int[Array, " n"]
    ) -> Float[Array, "n t f channels"]:
        """Applies `_convolved` to one chunk at a time, whose activations stay near a CPU's cache."""

        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(CONVOLVED))
        def of_chunk(mel: Float[Array, "frames mel"], frames: Int[Array, ""]) -> Float[Array, "t f channels"]:
            return self._convolved(mel[None], frames[None])[0]

        return jax.lax.map(lambda chunk: of_chunk(*chunk), (mel, frames))

    def _layers_with_taps(
        self, x: Float[Array, "n t d"], num_tokens: Int[Array, " n"], dropout_key: jax.Array | None, remat: str
    ) -> tuple[Float[Array, "n t d"], list[Float[Array, "n t d"]]]:
        """Runs all layers; returns the output of the last one, and those of the tapped ones."""
        total, taps = self.config.encoder_layers, self.config.deepstack_encoder_layer_indexes
        keys = None
        if dropout_key is not None:
            keys = jax.vmap(lambda key: jax.random.split(key, 4))(jax.random.split(dropout_key, total))

        def body(layer, x, key):
            return _shard_with_batch(layer(x, num_tokens, key))

        def tapping_body(layer, carry, inputs):
            (x, outputs), (key, slot) = carry, inputs
            return _tapped(body(layer, x, key), outputs, slot)

        if not taps:
            return scan_layers(body, self.layers, x, keys, remat=remat), []
        # Of each layer the slot of its tap; -1: none.
        layers = jnp.arange(total)
        slots = sum((jnp.where(layers == tap, slot + 1, 0) for slot, tap in enumerate(taps)), -jnp.ones_like(layers))
        outputs = constrain(jnp.zeros((len(taps), *x.shape), x.dtype), None, "batch")
        x, outputs = scan_layers(tapping_body, self.layers, (x, outputs), (keys, slots), remat=remat)
        return x, list(outputs)


@jax.custom_vjp
def _tapped(
    x: Float[Array, "n t d"], outputs: Float[Array, "taps n t d"], slot: Int[Array, ""]
) -> tuple[Float[Array, "n t d"], Float[Array, "taps n t d"]]:
    """Returns `x`, and `outputs` with `x` in that slot; in none if it is -1.

    A slot is written once. So its cotangent may stay in place after it is read: the backward pass of a scan then writes
    nothing to the cotangent of `outputs`, and copies none of it.
    """
    index = jnp.maximum(slot, 0)
    written = jnp.where(slot < 0, jax.lax.dynamic_index_in_dim(outputs, index, keepdims=False), x)
    return x, jax.lax.dynamic_update_index_in_dim(outputs, written, index, 0)


def _tapped_forward(x, outputs, slot):
    return _tapped(x, outputs, slot), slot


def _tapped_backward(slot, cotangents):
    by_x, by_outputs = cotangents
    at_slot = jax.lax.dynamic_index_in_dim(by_outputs, jnp.maximum(slot, 0), keepdims=False)
    return by_x + jnp.where(slot < 0, 0, at_slot), by_outputs, None


_tapped.defvjp(_tapped_forward, _tapped_backward)


def _shard_with_batch(x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    """Shards chunks with their sequences: without this constraint, XLA may replicate all chunks on every device."""
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def sinusoids(length: int, width: int) -> Float[Array, "length width"]:
    """Computes [sin | cos] positions in float32: in bfloat16 they would be off by up to 0.2 within one chunk."""
    half = width // 2
    inverse = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * inverse
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
