"""Parameters lie where the table says, and a sharded model computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moss_audio_jax import MossAudioConfig, MossAudioError, encoder, language_model, load_model, make_inputs, save_model
from moss_audio_jax import model as model_module
from moss_audio_jax.model import parameter_specs
from moss_audio_jax.sharding import RULES, constrain, make_mesh
from moss_audio_jax.tree import dotted, unflatten
from moss_audio_jax.weights.parameters import abstract_parameters
from tests.conftest import TINY_AUDIO_ID, question, question_parts


def test_a_mesh_fills_minus_one_and_covers_every_device():
    assert make_mesh(replica=2, tensor=2).shape == {"replica": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(MossAudioError, match=r"fsdp=3.*8 devices"):
        make_mesh(fsdp=3)
    with pytest.raises(MossAudioError, match="8 devices"):
        make_mesh(fsdp=-1, tensor=3)


@pytest.mark.parametrize("preset", ["4b", "8b", "tiny"])
def test_every_parameter_declares_known_axes(preset):
    for path, spec in parameter_specs(MossAudioConfig.preset(preset)).items():
        axes = spec.get_metadata("logical_axes")
        assert len(axes) == len(spec.shape) and set(axes) <= RULES.keys(), path


COLUMN, ROW = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")  # of stacked layers: what follows is added up
GATED = {"gate_proj.kernel": P("fsdp", "tensor"), "up_proj.kernel": P("fsdp", "tensor")}
GATED |= {"down_proj.kernel": P("tensor", "fsdp")}
PLACES = {
    "language_model.embed_tokens.embedding": P("tensor", "fsdp"),
    "language_model.norm.scale": P(None),
    "lm_head.kernel": P("fsdp", "tensor"),
    "audio_encoder.stem_proj.kernel": P(None, "fsdp"),
    "audio_encoder.stem_proj.bias": P("fsdp"),
    "audio_encoder.layer_norm.scale": P(None),
    "audio_encoder.layer_norm.bias": P(None),
    **{f"audio_encoder.conv{i}.kernel": P(None, None, None, None) for i in (1, 2, 3)},
    **{f"audio_encoder.conv{i}.bias": P(None) for i in (1, 2, 3)},
    **{f"audio_adapter.{name}": spec for name, spec in GATED.items()},
    **{f"deepstack_audio_merger_list.{name}": P(None, *spec) for name, spec in GATED.items()},
    **{f"language_model.layers.mlp.{name}": P(None, *spec) for name, spec in GATED.items()},
    **{f"language_model.layers.self_attn.{name}_proj.kernel": COLUMN for name in "qkv"},
    "language_model.layers.self_attn.o_proj.kernel": ROW,
    **{f"language_model.layers.self_attn.{name}_norm.scale": P(None, None) for name in "qk"},
    **{f"language_model.layers.{name}_layernorm.scale": P(None, None) for name in ("input", "post_attention")},
    **{f"audio_encoder.layers.self_attn.{name}_proj.kernel": COLUMN for name in "qkv"},
    **{f"audio_encoder.layers.self_attn.{name}_proj.bias": P(None, "tensor") for name in "qv"},
    "audio_encoder.layers.self_attn.out_proj.kernel": ROW,
    "audio_encoder.layers.self_attn.out_proj.bias": P(None, "fsdp"),
    "audio_encoder.layers.fc1.kernel": COLUMN,
    "audio_encoder.layers.fc1.bias": P(None, "tensor"),
    "audio_encoder.layers.fc2.kernel": ROW,
    "audio_encoder.layers.fc2.bias": P(None, "fsdp"),
    **{
        f"audio_encoder.layers.{name}_layer_norm.{part}": P(None, None)
        for name in ("self_attn", "final")
        for part in ("scale", "bias")
    },
}


def test_where_every_parameter_of_the_released_model_lies():
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    abstract = abstract_parameters(MossAudioConfig.preset("8b"), jnp.bfloat16, mesh)
    assert {path: leaf.sharding.spec for path, leaf in abstract.items()} == PLACES
    # All but a sliver of the model is cut over a replica's devices.
    sizes = {path: (leaf.size, leaf.sharding.shard_shape(leaf.shape)) for path, leaf in abstract.items()}
    per_device = sum(int(np.prod(shard)) for _, shard in sizes.values())
    assert per_device < 1.01 * sum(size for size, _ in sizes.values()) / 4


@pytest.mark.parametrize("layout", [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_activations_between_layers_lie_with_their_sequences(layout, tiny, monkeypatch):
    """All activations of `constrain`: in the encoder, the language model and between them."""
    mesh = make_mesh(**layout)
    seen: dict[tuple[str, int], set[str]] = {}

    def watched(module):
        def watch(array, *axes):
            def look(sharding):
                shard = sharding.shard_shape(array.shape)
                cut = {axis: size // part for axis, size, part in zip(axes, array.shape, shard, strict=False)}
                seen.setdefault((module.__name__.split(".")[-1], array.ndim), set()).add(str(cut))

            array = constrain(array, *axes)
            jax.debug.inspect_array_sharding(array, callback=look)
            return array

        monkeypatch.setattr(module, "constrain", watch)

    for module in (encoder, language_model, model_module):
        watched(module)
    parts = [question_parts([403, 24], seed=i) for i in range(8)]
    inputs = make_inputs(*zip(*parts, strict=True), config=tiny.config, audio_token_id=TINY_AUDIO_ID)
    parameters = abstract_parameters(tiny.config, jnp.float32, mesh)
    graphdef = nnx.graphdef(tiny)

    def hidden_states(parameters, inputs):
        return nnx.merge(graphdef, nnx.State(unflatten(parameters))).hidden_states(inputs).last

    with jax.set_mesh(mesh):
        jax.jit(hidden_states).lower(parameters, inputs).compile()
    batch = 8 // mesh.shape["tensor"]
    # The stem, the encoder's layers; the language model's layers; embedded tokens, features and DeepStack's.
    assert {("encoder", 3), ("encoder", 4), ("language_model", 3), ("model", 3), ("model", 4)} <= seen.keys()
    assert all(f"'batch': {batch}" in cut for cuts in seen.values() for cut in cuts), seen


def test_a_dimension_that_the_mesh_does_not_divide_is_named():
    mesh = make_mesh(fsdp=5, devices=jax.devices()[:5])
    with pytest.raises(MossAudioError, match="'embed' dimension of 48 can't be cut into 5 parts"):
        abstract_parameters(MossAudioConfig.preset("tiny"), jnp.float32, mesh)


def test_heads_are_not_cut():
    with pytest.raises(MossAudioError, match="tensor=8 does not divide the model's 20 heads of the encoder: choose a"):
        abstract_parameters(MossAudioConfig.preset("8b"), jnp.float32, make_mesh(tensor=8))


@pytest.mark.parametrize("layout", [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}])
def test_load_model_onto_a_mesh(layout, tiny, tmp_path):
    """From Orbax: every shard on its device, and the logits of one device."""
    save_model(tiny, tmp_path / "orbax")
    mesh = make_mesh(**layout)
    model = load_model(tmp_path / "orbax", mesh=mesh)
    target = abstract_parameters(tiny.config, jnp.float32, mesh)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        assert leaf[...].sharding == target[dotted(path)].sharding
    inputs = question(tiny, [403])
    with jax.set_mesh(mesh):
        logits = model(inputs)
    valid = inputs.segment_ids != 0
    np.testing.assert_allclose(np.asarray(logits)[valid], np.asarray(tiny(inputs))[valid], atol=1e-5, rtol=0)
