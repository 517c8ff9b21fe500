"""Parameters lie where the table says, and a sharded model computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moss_audio_jax import MossAudioConfig, MossAudioError, load_model, save_model
from moss_audio_jax.checkpoint import abstract_parameters
from moss_audio_jax.model import parameter_specs
from moss_audio_jax.sharding import RULES, make_mesh
from tests.conftest import question


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


def test_partition_specs_of_the_released_model():
    mesh = make_mesh(fsdp=4, tensor=2)
    abstract = abstract_parameters(MossAudioConfig.preset("8b"), jnp.bfloat16, mesh)
    expected = {
        "language_model.embed_tokens.embedding": P("tensor", "fsdp"),
        "lm_head.kernel": P("fsdp", "tensor"),
        "language_model.layers.self_attn.q_proj.kernel": P(None, "fsdp", "tensor"),
        "language_model.layers.self_attn.o_proj.kernel": P(None, "tensor", "fsdp"),
        "language_model.layers.mlp.down_proj.kernel": P(None, "tensor", "fsdp"),
        "language_model.layers.input_layernorm.scale": P(None, None),
        "audio_encoder.layers.fc1.kernel": P(None, "fsdp", "tensor"),
        "audio_encoder.layers.fc1.bias": P(None, "tensor"),
        "audio_encoder.conv2.kernel": P(None, None, None, None),
        "deepstack_audio_merger_list.up_proj.kernel": P(None, "fsdp", "tensor"),
    }
    for path, spec in expected.items():
        assert abstract[path].sharding.spec == spec, path
    # All but a sliver of the model is cut over all eight devices.
    sizes = {path: (leaf.size, leaf.sharding.shard_shape(leaf.shape)) for path, leaf in abstract.items()}
    per_device = sum(int(np.prod(shard)) for _, shard in sizes.values())
    assert per_device < 1.01 * sum(size for size, _ in sizes.values()) / 8


def test_a_dimension_that_the_mesh_does_not_divide_is_named():
    mesh = make_mesh(fsdp=5, devices=jax.devices()[:5])
    with pytest.raises(MossAudioError, match="'embed' dimension of 48 can't be cut into 5 parts"):
        abstract_parameters(MossAudioConfig.preset("tiny"), jnp.float32, mesh)


@pytest.mark.parametrize("layout", [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}])
def test_load_model_onto_a_mesh(layout, tiny, tmp_path):
    """From Orbax: every shard on its device, and the logits of one device."""
    save_model(tiny, tmp_path / "orbax")
    mesh = make_mesh(**layout)
    model = load_model(tmp_path / "orbax", mesh=mesh)
    target = abstract_parameters(tiny.config, jnp.float32, mesh)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        assert leaf[...].sharding == target[".".join(map(str, path))].sharding
    inputs = question(tiny, [403])
    with jax.set_mesh(mesh):
        logits = model(inputs)
    valid = inputs.segment_ids != 0
    np.testing.assert_allclose(np.asarray(logits)[valid], np.asarray(tiny(inputs))[valid], atol=1e-5, rtol=0)
