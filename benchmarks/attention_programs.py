"""Cost of attention in programs compiled for TPUs ahead of time: `python -m benchmarks.attention_programs`.

No TPU is needed, only libtpu. Two tables, of forward and backward passes in bfloat16 on one chip:

* the language model's: einsum in blocks of queries beside splash attention;
* the encoder's, whose chunks of 50 tokens fill less than half of a tile: einsum beside splash attention with several
  chunks a sequence, one segment each. Dropout on the weights, which training has, splash attention does not offer.

Temporaries are of XLA's memory analysis. Bytes are of its cost analysis, which counts a kernel's operands and results
once, and a loop's body once. FLOPs are those of the matmuls as the programs' shapes have them: XLA counts none in a
kernel.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from moss_audio_jax.attention import attend, causal_attend
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.splash import TILES, splash_attend
from moss_audio_jax.text_table import align
from train.planning.topology import topology_devices

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
TOKENS = 8192
CHUNKS, CHUNK_TOKENS = 60, 50  # four minutes of audio a chip
MIB = 2**20

CONFIG = MossAudioConfig.preset("8b")


@dataclass(frozen=True)
class Program:
    """Attention of [b, t, heads, d] with [b, t, kv, d], and how many of its matmuls' scores there are."""

    name: str
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    scores: float  # [query, key] pairs that a head multiplies out, of all sequences

    def row(self, topology: str) -> tuple[str, ...]:
        """Chip, name and figures, of the program compiled."""
        device = topology_devices(topology, megacore=False)[0]
        where = jax.sharding.SingleDeviceSharding(device)
        query, key = (
            jax.ShapeDtypeStruct((self.batch, self.tokens, heads, self.head_dim), jnp.bfloat16, sharding=where)
            for heads in (self.heads, self.kv_heads)
        )

        def loss(query, key, value):
            # Squared, so that the gradient is one of the output and XLA can't fold it away.
            return jnp.square(self.attend(query, key, value).astype(jnp.float32)).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key).lower().compile()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        # Forward: scores, and their product with the values. Backward: scores again, and four products.
        flops = 2 * 7 * self.scores * self.heads * self.head_dim
        return (
            topology.split(":")[0],
            self.name,
            f"{memory.temp_size_in_bytes / MIB:.0f}",
            f"{cost['bytes accessed'] / MIB:.0f}",
            f"{flops / 1e9:.0f}",
        )


def language_programs(topology: str) -> Iterator[Program]:
    config = CONFIG.language_config
    shape = (1, TOKENS, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    segments = jnp.ones((1, TOKENS), jnp.int32)
    slots = jnp.arange(TOKENS)
    yield Program("einsum", lambda q, k, v: causal_attend(q, k, v, slots, segments, segments), *shape, TOKENS**2)
    forward = causal_share(TOKENS, TILES.queries, TILES.keys)
    backward = causal_share(TOKENS, TILES.queries_backward, TILES.keys_backward)
    scores = TOKENS**2 * (2 * forward + 5 * backward) / 7
    yield Program("splash", lambda q, k, v: splash_attend(q, k, v, segments), *shape, scores)


def causal_share(tokens: int, queries: int, keys: int) -> float:
    """Share of the square in tiles that are not all above the diagonal."""
    rows = range(0, tokens, queries)
    return sum(-(-(row + queries) // keys) * keys * queries for row in rows) / tokens**2


def encoder_programs(topology: str) -> Iterator[Program]:
    config = CONFIG.audio_config
    shape = (CHUNKS, CHUNK_TOKENS, config.encoder_attention_heads, config.encoder_attention_heads, config.head_dim)
    mask = jnp.ones((CHUNKS, CHUNK_TOKENS, CHUNK_TOKENS), bool)
    rate, scores = config.attention_dropout, CHUNKS * CHUNK_TOKENS**2
    yield Program("einsum", lambda q, k, v: attend(q, k, v, mask), *shape, scores)

    def dropped(q, k, v):
        return attend(q, k, v, mask, dropout_rate=rate, dropout_key=jax.random.key(0))

    yield Program("einsum, dropout", dropped, *shape, scores)
    for packed, length in ((2, 128), (5, 256)):
        packed_attend = functools.partial(attend_packed, packed=packed, length=length)
        yield Program(f"splash, {packed} in {length}", packed_attend, *shape, CHUNKS / packed * length**2)


def attend_packed(query: jax.Array, key: jax.Array, value: jax.Array, *, packed: int, length: int) -> jax.Array:
    """Splash attention of `packed` chunks to a sequence of `length` slots, each a segment of its own."""
    chunks, tokens, heads, head_dim = query.shape
    padding = length - packed * tokens

    def pack(x):
        x = x.reshape(chunks // packed, packed * tokens, heads, head_dim)
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)

    segments = jnp.pad(jnp.repeat(jnp.arange(packed) + 1, tokens), (0, padding))
    sizes = BlockSizes(*[length] * 6, use_fused_bwd_kernel=True)
    mask = MultiHeadMask([FullMask((length, length))] * heads)
    kernel = make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    attend_one = jax.vmap(lambda q, k, v: kernel(q, k, v, SegmentIds(segments, segments)))
    out = attend_one(pack(query * head_dim**-0.5), pack(key), pack(value))
    return out.swapaxes(1, 2)[:, : packed * tokens].reshape(query.shape)


def run(topology_names: tuple[str, ...] = TOPOLOGIES) -> None:
    """Compiles attention for a chip of each topology and prints both tables."""
    language, encoder = CONFIG.language_config, CONFIG.audio_config
    heads = f"{language.num_attention_heads} heads, {language.num_key_value_heads} of keys, of {language.head_dim}"
    titles = {
        f"{CHUNKS} x {CHUNK_TOKENS} tokens, {encoder.encoder_attention_heads} heads of {encoder.head_dim}": (
            encoder_programs
        ),
        f"1 x {TOKENS} tokens, {heads}": language_programs,
    }
    for title, programs in titles.items():
        rows = [program.row(topology) for topology in topology_names for program in programs(topology)]
        print(f"\n{title}")
        print(align([("chip", "attention", "temporaries, MiB", "bytes, MiB", "GFLOPs"), *rows]), flush=True)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(run))
