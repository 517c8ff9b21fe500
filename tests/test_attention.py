"""Splash attention computes what the einsum computes, cut over a mesh too, and is what a TPU's programs hold."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from moss_audio_jax import MossAudio, MossAudioConfig, MossAudioError
from moss_audio_jax import model as model_module
from moss_audio_jax import splash as splash_module
from moss_audio_jax.attention import causal_attend, rotary_phases, self_attend
from moss_audio_jax.generation import decode_answers, make_drawing, prefill_prompts
from moss_audio_jax.kv_cache import STACK_AXES, KVCache
from moss_audio_jax.language_model import LanguageModel
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.sharding import make_mesh, named_sharding
from moss_audio_jax.splash import LANES, TILES, Tiles, serves, splash_attend
from moss_audio_jax.steering import Steering
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from train.planning.hlo import collectives, hbm_bytes_in_loops
from train.planning.plan import bytes_on_chip, one_batch
from train.planning.topology import topology_devices

SMALL_TILES = Tiles(256, 256, 128, 256, 256, 128)  # several a sequence, and in halves


def einsum(query, key, value, segment_ids):
    return causal_attend(query, key, value, jnp.arange(query.shape[1]), segment_ids, segment_ids)


def splash(query, key, value, segment_ids):
    return splash_attend(query, key, value, segment_ids, tiles=SMALL_TILES, interpret=True)


@partial(jax.jit, static_argnums=0)
def output_and_gradients(attend, query, key, value, segment_ids, cotangent):
    """The output, and the gradients of query, key and value; what padding attends to is not learned from."""
    output, pull = jax.vjp(lambda *x: attend(*x, segment_ids), query, key, value)
    return output, *pull(jnp.where((segment_ids != 0)[..., None, None], cotangent, 0))


def packed(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int):
    """Random arrays, two segments in each sequence, cut elsewhere in each, and padding at the end of all but one."""
    rng = np.random.default_rng(tokens)
    shapes = [(batch, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    query, key, value, cotangent = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    segment_ids = np.ones((batch, tokens), np.int32)
    for row, (cut, end) in enumerate(zip(rng.integers(1, tokens, batch), rng.integers(1, tokens, batch), strict=True)):
        segment_ids[row, cut:] = 2
        segment_ids[row, end if row else tokens :] = 0
    return query, key, value, jnp.asarray(segment_ids), cotangent


def test_a_rotary_base_may_be_an_integer_beyond_int32():
    positions = jnp.arange(5)[None]
    cos, sin = rotary_phases(positions, 8, 10**10)
    expected_cos, expected_sin = rotary_phases(positions, 8, 1e10)
    assert (cos == expected_cos).all() and (sin == expected_sin).all()


def assert_close(found, expected, segment_ids):
    """To 1e-5 of the largest magnitude, at all but padding, where the results are finite."""
    valid = np.asarray(segment_ids != 0)
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one[valid], other[valid], rtol=0, atol=1e-5 * np.abs(other[valid]).max())


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"),
    [
        (128, 4, 4, 64),
        (200, 8, 2, 128),  # the released ratio of 4 and head size; padded to 256
        (300, 4, 1, 64),  # three tiles of 128
        (1100, 2, 1, 64),  # padded to 1536, in tiles of 256
    ],
)
def test_splash_equals_the_einsum(tokens, heads, kv_heads, head_dim):
    inputs = packed(2, tokens, heads, kv_heads, head_dim)
    found, expected = output_and_gradients(splash, *inputs), output_and_gradients(einsum, *inputs)
    assert_close(found, expected, inputs[3])


@pytest.mark.parametrize("batch", [4, 1])
def test_splash_on_a_mesh_equals_one_device(batch):
    """Sequences and heads are cut; one sequence, which can't be cut into four, is attended to by all."""
    inputs = packed(batch, 200, 8, 2, 64)
    expected = output_and_gradients(splash, *inputs)
    with jax.set_mesh(make_mesh(replica=2, fsdp=2, tensor=2)):
        found = output_and_gradients(splash, *inputs)
    rows = ("replica", "fsdp") if batch == 4 else None
    assert found[0].sharding.spec == P(rows, None, "tensor")
    assert_close(found, expected, inputs[3])


def test_heads_that_the_mesh_does_not_divide_are_named():
    query, key, value, segment_ids, _ = packed(1, 128, 8, 2, 64)
    with (
        jax.set_mesh(make_mesh(fsdp=2, tensor=4)),
        pytest.raises(MossAudioError, match="keys of attention: its 'heads' dimension of 2 can't be cut into 4"),
    ):
        jax.eval_shape(splash, query, key, value, segment_ids)


def on_chips(kind: str) -> use_abstract_mesh:
    """Tracing for chips of that kind."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return use_abstract_mesh(AbstractMesh((1,), ("fsdp",), (AxisType.Auto,), abstract_device=device))


def test_where_splash_serves(monkeypatch):
    query = jax.ShapeDtypeStruct((1, LANES, 8, 64), jnp.bfloat16)
    with jax.default_matmul_precision("default"):
        assert not serves(query)  # this CPU
        with jax.set_mesh(make_mesh()):
            assert not serves(query)
        with on_chips("TPU v5 lite"):
            assert serves(query)
        with monkeypatch.context() as patch:  # several chips: XLA can't cut a kernel, so a mesh must say how
            patch.setattr("moss_audio_jax.splash.device_kind", lambda: "TPU v5 lite")
            assert not serves(query)
            patch.setattr("jax.device_count", lambda: 1)
            assert serves(query)
        with on_chips("TPU v5 lite"):
            assert not serves(query.update(dtype=jnp.float32))
            assert not serves(query.update(shape=(1, LANES - 1, 8, 64)))
            with jax.default_matmul_precision("highest"):
                assert not serves(query)


@pytest.mark.parametrize("length", [128, 640, 1024, 1536, 4608, 8192])
def test_tiles_divide_every_length(length):
    sizes = TILES.for_length(length)
    for whole, *parts in (
        (length, sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dkv),
        (sizes.block_kv, sizes.block_kv_compute),
        (sizes.block_kv_dkv, sizes.block_kv_dkv_compute),
    ):
        assert all(whole % part == 0 and part % LANES == 0 for part in parts)


@pytest.fixture
def chips() -> Mesh:
    """Four v5e chips that this machine hasn't got, to compile for; fsdp and tensor are two each."""
    pytest.importorskip("libtpu")
    return make_mesh(fsdp=2, tensor=2, devices=topology_devices("v5e:2x2"))


def shaped(mesh: Mesh, shape: tuple[int, ...], dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding("input", shape, axes, mesh))


@pytest.mark.tpu
def test_a_program_for_tpus_holds_the_kernels_and_no_scores(chips):
    """Attention of the released head sizes, forward and backward: nothing is as large as a head's scores."""
    batch, tokens = 2, 1024
    query, key = (shaped(chips, (batch, tokens, n, 128), jnp.bfloat16, "batch", None, "heads", None) for n in (32, 8))
    segment_ids = shaped(chips, (batch, tokens), jnp.int32, "batch", None)

    def loss(query, key, value, segment_ids):
        return self_attend(query, key, value, segment_ids).astype(jnp.float32).sum()

    with jax.default_matmul_precision("default"), jax.set_mesh(chips):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key, segment_ids).lower().compile()
    assert_splash(compiled, tokens, kernels=2)
    # One device's: a sequence, half the heads. Nothing is communicated.
    assert not re.search("all-(gather|reduce|to-all)|collective-permute", compiled.as_text())


@pytest.mark.tpu
@pytest.mark.slow
def test_the_language_model_compiled_for_tpus(chips):
    """Two layers as wide as the 8B's, recomputed in the backward pass: as many kernels as that takes, and no scores."""
    tokens = 1024
    config = dataclasses.replace(MossAudioConfig.preset("8b").language_config, num_hidden_layers=2, vocab_size=1024)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    parameters = jax.tree.map(
        lambda p: p.replace(shaped(chips, p.shape, jnp.bfloat16, *p.get_metadata("logical_axes"))),
        state,
        is_leaf=lambda p: isinstance(p, nnx.Variable),
    )
    x = shaped(chips, (2, tokens, config.hidden_size), jnp.bfloat16, "batch", None, None)
    ids = shaped(chips, (2, tokens), jnp.int32, "batch", None)

    def loss(parameters, x, positions, segment_ids):
        model = nnx.merge(graphdef, parameters)
        return model(x, positions, segment_ids, jnp.zeros((0, *x.shape), x.dtype), remat="full").last.mean()

    with jax.default_matmul_precision("default"), jax.set_mesh(chips):
        compiled = jax.jit(jax.grad(loss)).trace(parameters, x, ids, ids).lower().compile()
    assert_splash(compiled, tokens, kernels=3)


@pytest.fixture
def sharded(chips: Mesh) -> MossAudio:
    """A small model with the released head sizes, its parameters cut over those chips; shapes alone."""
    tiny = MossAudioConfig.preset("tiny")
    language = dataclasses.replace(tiny.language_config, head_dim=128)
    config = dataclasses.replace(tiny, language_config=language)
    return build_model(config, dict(abstract_parameters(config, jnp.bfloat16, chips)))


@pytest.fixture
def on_a_tpu_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a mesh, programs are for the default device: here it claims to be one of several chips."""
    kind = splash_module.device_kind
    no_mesh = "TPU v5 lite"
    monkeypatch.setattr(
        splash_module, "device_kind", lambda: no_mesh if jax.sharding.get_abstract_mesh().empty else kind()
    )
    with jax.default_matmul_precision("default"):
        yield


@pytest.mark.tpu
@pytest.mark.usefixtures("on_a_tpu_machine")
def test_logits_of_a_sharded_model_compile_for_several_chips(sharded, chips, monkeypatch):
    """`model(inputs)` finds the mesh by itself, so it runs the kernel."""
    compiled = []

    def compile_only(graphdef, state, inputs):
        compiled.append(compiled_logits.trace(graphdef, state, inputs).lower().compile())

    compiled_logits = model_module._compiled_logits
    monkeypatch.setattr(model_module, "_compiled_logits", compile_only)
    sharded(one_batch(sharded.config, 4, 256, 2, chips).inputs)
    assert len(re.findall('custom_call_target="tpu_custom_call"', compiled[0].as_text())) > 0


@pytest.mark.tpu
@pytest.mark.usefixtures("on_a_tpu_machine")
@pytest.mark.parametrize("with_mesh", [False, True])
def test_a_callers_own_programs_compile_for_several_chips(with_mesh, sharded, chips):
    """`hidden_states` and its gradient in a `jax.jit` of the caller's: the kernel serves where a mesh is current."""
    graphdef, state = nnx.split(sharded)
    inputs = one_batch(sharded.config, 4, 256, 2, chips).inputs

    def loss(state, inputs):
        return nnx.merge(graphdef, state).hidden_states(inputs).last.astype(jnp.float32).sum()

    with jax.set_mesh(chips) if with_mesh else contextlib.nullcontext():
        compiled = jax.jit(jax.grad(loss)).trace(state, inputs).lower().compile()
    assert ('custom_call_target="tpu_custom_call"' in compiled.as_text()) == with_mesh


def compiled_decoding(
    config: MossAudioConfig,
    batch: int,
    slots: int,
    mesh: Mesh,
    steering: Steering | None = None,
    kv_int8: bool = False,
) -> tuple[Compiled, list[Any]]:
    """The compiled loop that decodes up to 16 tokens, and its keys and values."""
    drawing = make_drawing(batch, Sampling(), (1,), 16, steering=steering)
    with jax.default_matmul_precision("default"), jax.set_mesh(mesh):
        graphdef, state = nnx.split(build_model(config, dict(abstract_parameters(config, jnp.bfloat16, mesh))))
        inputs = one_batch(config, batch, slots - 16, 0, mesh).inputs
        loop = jax.eval_shape(lambda *given: prefill_prompts(graphdef, *given, 16), state, inputs, drawing.fill)
        if kv_int8:
            cache = jax.eval_shape(lambda: KVCache.empty(config.language_config, batch, slots, np.int8))
            loop = dataclasses.replace(loop, cache=cache)
        loop = placed(loop, mesh)
        compiled = decode_answers.trace(graphdef, state, None, loop, drawing, 16).lower().compile()
    return compiled, [loop.cache.keys, loop.cache.values]


@pytest.mark.tpu
@pytest.mark.parametrize("kv_int8", [False, True], ids=["", "kv_int8"])
@pytest.mark.parametrize("int8", [(), ("language_model.layers.*_proj",)], ids=["bfloat16", "int8"])
def test_a_token_reads_the_weights_and_the_cache_once(int8, kv_int8):
    """One layer as wide as the 8B's, and its head, on four chips."""
    pytest.importorskip("libtpu")
    language = dataclasses.replace(MossAudioConfig.preset("8b").language_config, num_hidden_layers=1)
    config = MossAudioConfig.preset("tiny")
    config = dataclasses.replace(config, language_config=language, int8=int8, deepstack_num_inject_layers=1)
    mesh = make_mesh(tensor=4, devices=topology_devices("v5e:2x2"))
    compiled, cache = compiled_decoding(config, batch=8, slots=512, mesh=mesh, kv_int8=kv_int8)
    read = ("language_model.layers.", "lm_head.")
    parameters = abstract_parameters(config, jnp.bfloat16, mesh).items()
    weights = bytes_on_chip([leaf for path, leaf in parameters if path.startswith(read)])
    least = weights + bytes_on_chip(cache)
    assert least < hbm_bytes_in_loops(compiled.as_text()) < 1.1 * least


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("batch", "tensor", "steered", "kv_int8"), [(1, 1, False, False), (2, 1, True, True), (8, 4, True, False)]
)
def test_decoding_holds_the_cache_once_and_gathers_no_head(batch, tensor, steered, kv_int8):
    """No copy of keys, values or weights, before the loop, in it or after it. Over `tensor` only logits are sent."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(tensor=tensor, devices=topology_devices("v5e:2x2")[:tensor])
    language = dataclasses.replace(
        MossAudioConfig.preset("4b").language_config, num_hidden_layers=4, intermediate_size=512, vocab_size=16384
    )
    config = dataclasses.replace(MossAudioConfig.preset("tiny"), language_config=language)
    slots, steering = 32768, Steering.none(batch, (2, 3), [4] * 30) if steered else None
    compiled, _ = compiled_decoding(config, batch, slots, mesh, steering, kv_int8)
    text = compiled.as_text()
    assert not re.search(rf"= bf16\[[\d,]*\b{slots},[\d,]*\]\S* (copy|transpose)\(", text)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**25  # scores, not keys or a stack of weights
    sent = [collective.payload for collective in collectives(text, mesh.size)]
    logits = 4 * batch * language.vocab_size
    assert max(sent, default=0) == (logits if tensor > 1 else 0)


def placed(loop, mesh: Mesh):
    """The state of decoding as it is sharded: keys and values by heads too, the rest by sequences."""

    def as_kept(x):
        axes = STACK_AXES if x.ndim > 3 else ("batch", None)
        return shaped(mesh, x.shape, x.dtype, *axes[: x.ndim])

    return jax.tree.map(as_kept, loop)


def assert_splash(compiled, tokens: int, *, kernels: int):
    text = compiled.as_text()
    assert len(re.findall('custom_call_target="tpu_custom_call"', text)) == kernels
    assert "splash_mha_fwd" in text and "splash_mha_dkv" in text
    assert not re.search(rf"\[[\d,]*\b{tokens},{tokens}\]", text)
