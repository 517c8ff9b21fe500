"""The formulas against XLA's own count of the program, and against the number of parameters; and the table of chips."""

import fnmatch
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moss_audio_jax import MossAudioConfig, MossAudioError
from moss_audio_jax.config import EncoderConfig, LanguageConfig
from moss_audio_jax.inputs import ModelInputs
from moss_audio_jax.tree import unflatten
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from train.config import StepConfig
from train.data import TrainingBatch
from train.planning.chips import CHIPS, V4, V7X, chip_of, peak_flops
from train.planning.flops import FLOP_PARTS, Content, forward_flops, moved_bytes, recomputed_flops, step_flops
from train.planning.topology import shown_topology, topology_of
from train.step import loss_and_gradients

pytestmark = pytest.mark.usefixtures("order_of_a_tpu")  # what is counted is for TPUs

ROWS, CHUNKS, TOKENS = 2, 2, 256
# At these widths matmuls outweigh all else; nothing is ever computed. XLA knows no causal mask: attention is whole.
WHOLE_ATTENTION = Content(ROWS * TOKENS, ROWS * CHUNKS, 2 * ROWS * TOKENS**2)
CONFIG = MossAudioConfig(
    audio_config=EncoderConfig(
        d_model=2048,
        output_dim=1536,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=8192,
        downsample_hidden_size=512,
        deepstack_encoder_layer_indexes=(1, 2),
    ),
    language_config=LanguageConfig(
        vocab_size=16384,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=512,
    ),
    adapter_hidden_size=4096,
)


@pytest.fixture
def unrolled(monkeypatch: pytest.MonkeyPatch):
    """XLA counts the body of a loop once, so there are to be none."""
    scan = jax.lax.scan

    def unrolled_scan(body, carry, xs=None, length=None):
        return scan(body, carry, xs, length, unroll=True)

    monkeypatch.setattr(jax.lax, "scan", unrolled_scan)
    monkeypatch.setattr(jax.lax, "map", lambda f, xs: unrolled_scan(lambda _, x: (None, f(x)), None, xs)[1])


def parameters(config: MossAudioConfig) -> dict[str, jax.ShapeDtypeStruct]:
    declared = abstract_parameters(config, jnp.float32)
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in declared.items()}


def graphdef(config: MossAudioConfig) -> nnx.GraphDef:
    return nnx.split(build_model(config, dict(abstract_parameters(config, jnp.float32))))[0]


def batch() -> TrainingBatch:
    """One microbatch, abstract."""

    def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, ROWS, *shape), dtype)

    tokens, chunks = array(TOKENS), array(CHUNKS)
    mel = array(CHUNKS, 400, 128, dtype=jnp.float32)
    inputs = ModelInputs(tokens, tokens, tokens, tokens, mel, chunks, chunks)
    return TrainingBatch(inputs, tokens, array(TOKENS, dtype=jnp.float32))


def select(paths, *patterns: str) -> set[str]:
    return {path for path in paths if any(fnmatch.fnmatch(path, pattern) for pattern in patterns)}


def traced_step(trained: tuple[str, ...], remat: str = "none"):
    """A step that trains what these patterns name, traced; and the paths that learn."""
    config = StepConfig(compute_dtype="float32", remat=remat, encoder_dropout=False)
    all_parameters, graph = parameters(CONFIG), graphdef(CONFIG)
    learning = select(all_parameters, *trained)
    trainable = {path: all_parameters[path] for path in learning}
    frozen = {path: leaf for path, leaf in all_parameters.items() if path not in learning}
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    step = jax.jit(lambda t, f, b, key: loss_and_gradients(graph, config, t, f, b, key))
    return step.trace(trainable, frozen, batch(), key), learning


@pytest.mark.parametrize(
    "trained",
    [
        ("*",),
        ("audio_adapter.*", "deepstack_audio_merger_list.*"),  # stage 1
        ("language_model.*", "lm_head.*"),
        ("audio_encoder.conv2.kernel",),
        ("language_model.embed_tokens.*",),
        ("lm_head.*",),
    ],
)
def test_a_step_costs_what_xla_counts(unrolled, trained: tuple[str, ...]):
    """XLA counts what is no matmul too: 0.3 to 0.6% at these widths."""
    traced, learning = traced_step(trained)
    counted = traced.lower().cost_analysis()["flops"]
    flops = sum(step_flops(CONFIG, WHOLE_ATTENTION, learning).values())
    flops += forward_flops(CONFIG, WHOLE_ATTENTION)["head"]  # the loss computes the logits twice
    assert 1.0 < counted / flops < 1.01


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize(
    "trained",
    [
        ("*",),
        ("audio_adapter.*", "deepstack_audio_merger_list.*"),  # no gradient goes into the encoder
        ("language_model.layers.*",),  # as LoRA adapters: the encoder and what follows it are computed once
        ("lm_head.*",),
    ],
)
def test_what_is_computed_again_is_what_xla_adds(unrolled, trained: tuple[str, ...], remat: str):
    traced, learning = traced_step(trained, remat)
    counted = traced.lower().cost_analysis()["flops"]
    flops = step_flops(CONFIG, WHOLE_ATTENTION, learning)
    again = recomputed_flops(CONFIG, WHOLE_ATTENTION, learning, remat)
    assert 1.0 < counted / (sum(flops.values()) + sum(again.values())) < 1.01
    if trained != ("*",):
        assert again["encoder"] == 0
        learns = trained[0] == "audio_adapter.*" and remat == "full"
        assert (again["adapter"] > 0) == (again["mergers"] > 0) == learns


def elements_of_products(jaxpr: Any, rows: tuple[int, int]) -> int:
    """Elements of operands and results of all products of a kernel and activations [*rows, features]; loops count
    their rounds. Attention is left out, and the head: their products have batch dimensions, or the vocabulary's."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes = [array.aval.shape for array in (*equation.invars, *equation.outvars)]
            kernel_only = not equation.params["dimension_numbers"][1][0] and all(len(shape) < 4 for shape in shapes)
            if kernel_only and any(shape[:2] == rows for shape in shapes):
                total += sum(map(math.prod, shapes))
            continue
        inner = [value for value in equation.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
        rounds = equation.params.get("length", 1)
        total += rounds * sum(elements_of_products(getattr(sub, "jaxpr", sub), rows) for sub in inner)
    return total


@pytest.mark.parametrize("remat", ["none", "full"])
def test_products_move_their_operands_and_results(remat: str):
    """As the shapes in the traced step have it."""
    traced, learning = traced_step(("*",), remat)
    counted = moved_bytes(CONFIG, WHOLE_ATTENTION, learning, remat)
    program = traced.jaxpr.jaxpr
    assert 2 * elements_of_products(program, (ROWS, TOKENS)) == counted["llm_matmuls"]
    assert 2 * elements_of_products(program, (ROWS, CHUNKS * 50)) == counted["adapter"] + counted["mergers"]


def test_microbatches_read_the_kernels_again():
    config = MossAudioConfig.preset("8b")
    shapes = parameters(config)
    content = Content(tokens=8 * 4096, chunks=0, attention_pairs=0)
    one = moved_bytes(config, content, shapes, data_parallel=8)["llm_matmuls"]
    four = moved_bytes(config, content, shapes, data_parallel=8, microbatches=4)["llm_matmuls"]
    kernels = sum(math.prod(shapes[path].shape) for path in select(shapes, "language_model.layers.*.kernel"))
    assert four - one == 3 * 3 * 2 * kernels


def test_a_forward_pass_costs_what_xla_counts(unrolled):
    graph = graphdef(CONFIG)

    def logits(parameters, inputs):
        model = nnx.merge(graph, nnx.State(unflatten(parameters)))
        return model.logits(model.hidden_states(inputs).last)

    inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch().inputs)
    counted = jax.jit(logits).lower(parameters(CONFIG), inputs).cost_analysis()["flops"]
    flops = forward_flops(CONFIG, WHOLE_ATTENTION)
    assert 1.0 < counted / sum(flops.values()) < 1.01
    assert tuple(flops) == FLOP_PARTS


@pytest.mark.parametrize(("preset", "language_billions"), [("4b", 4.02), ("8b", 7.57)])
def test_text_costs_six_flops_a_parameter_and_token(preset: str, language_billions: float):
    """The matmuls of the language model and its head, whose parameters are all but the embedding and the norms."""
    config = MossAudioConfig.preset(preset)
    shapes = parameters(config)
    matrices = [path for path in select(shapes, "language_model.layers.*.kernel", "lm_head.*")]
    count = sum(math.prod(shapes[path].shape) for path in matrices)
    assert count / 1e9 == pytest.approx(language_billions, rel=0.01)
    flops = step_flops(config, Content(tokens=1000, chunks=0, attention_pairs=1000 * 500), shapes)
    assert flops["llm_matmuls"] + flops["head"] == 6 * count * 1000
    # Megatron-LM: forward and backward, 12 L h d s FLOPs a token, halved.
    assert flops["llm_attention"] == 12 * 36 * 4096 * 500 / 2 * 1000
    assert flops["encoder"] == flops["adapter"] == flops["mergers"] == 0


def test_audio_costs_six_flops_a_parameter_and_token():
    """FLOPs of the 4B's encoder layers; the rest: attention, and the stem's positions, which share parameters."""
    config = MossAudioConfig.preset("4b")
    shapes = parameters(config)
    flops = step_flops(config, Content(tokens=0, chunks=10, attention_pairs=0), shapes)
    layers = sum(math.prod(shapes[path].shape) for path in select(shapes, "audio_encoder.layers.*.kernel"))
    assert flops["encoder"] == pytest.approx(6 * layers * 500, rel=0.35) and flops["encoder"] > 6 * layers * 500
    for part, name in (("adapter", "audio_adapter"), ("mergers", "deepstack_audio_merger_list")):
        assert flops[part] == 6 * sum(math.prod(shapes[path].shape) for path in select(shapes, f"{name}.*")) * 500


def test_gradients_flow_down_to_what_learns():
    config = MossAudioConfig.preset("4b")
    content = Content(1000, 10, 1e6)
    forward = forward_flops(config, content)

    def times(*trained: str) -> dict[str, float]:
        flops = step_flops(config, content, select(parameters(config), *trained) or trained)
        return {part: flops[part] / forward[part] for part in FLOP_PARTS}

    assert times("lm_head.*") == dict.fromkeys(FLOP_PARTS, 1.0) | {"head": 2.0}
    assert times("audio_encoder.layers.fc1.bias")["llm_matmuls"] == 2 and times("lm_head.*")["llm_attention"] == 1
    # A LoRA adapter on a frozen weight.
    adapted = times("language_model.layers.self_attn.q_proj.lora_a")
    assert adapted["llm_matmuls"] == 2 and adapted["llm_attention"] == 3 and adapted["adapter"] == 1
    # The mel has no gradient: the first convolution is counted twice, everything else three times.
    assert 2.99 < times("*")["encoder"] < 3 and times("*")["adapter"] == 3


def test_content_of_a_batch():
    sums = {"packed_tokens": 200, "packed_chunks": 5, "attention_pairs": 6000, "examples": 4}
    assert Content.of_sums(sums) == Content(200, 5, 6000)
    whole_clips = MossAudioConfig(audio_config=EncoderConfig(chunk_frames=None))
    with pytest.raises(MossAudioError, match="chunk_frames is None"):
        forward_flops(whole_clips, Content(1, 1, 1))


def test_chips():
    """The kinds are those of libtpu's topologies v4, v5e, v5p, v6e and tpu7x."""
    kinds = {"TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918, "TPU7x": 2307}
    for kind, teraflops in kinds.items():
        chip = chip_of(kind)
        assert chip is not None and chip.peak_flops == teraflops * 1e12
        assert 0.95 < chip.usable_hbm_bytes / chip.hbm_bytes < 1.01
    # GB/s through all links in both directions, as the documentation gives it
    assert {chip.name: 2 * chip.ici_links * chip.ici_link_bandwidth / 1e9 for chip in CHIPS.values() if chip != V4} == {
        "TPU v5e": 400,
        "TPU v5p": 1200,
        "TPU v6e": 800,
        "TPU7x": 1200,
    }
    assert {chip.name: chip.dcn_bandwidth * 8 / 1e9 for chip in CHIPS.values()} == {
        "TPU v4": 50,
        "TPU v5e": 25,
        "TPU v5p": 50,
        "TPU v6e": 100,
        "TPU7x": 100,
    }
    assert chip_of("cpu") is None and peak_flops(jax.devices()) is None

    def devices(kind: str, cores: int, count: int) -> list:
        return [SimpleNamespace(device_kind=kind, num_cores=cores)] * count

    # Four chips are four devices with megacore, and eight without it.
    assert peak_flops(devices("TPU v4", 2, 4)) == peak_flops(devices("TPU v4", 1, 8)) == 4 * V4.peak_flops
    assert peak_flops(devices("TPU7x", 1, 8)) == 4 * V7X.peak_flops
    assert peak_flops(devices("TPU v5 lite", 1, 8)) == 8 * 197e12


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-64", "v5p:2x4x4"),
        ("v4-128", "v4:4x4x4"),
        ("v6e-8", "v6e:2x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-256", "v5e:16x16"),
        ("v5p:2x4x4", "v5p:2x4x4"),
    ],
)
def test_the_names_that_slices_are_rented_by(name: str, topology: str):
    assert topology_of(name) == topology
    assert name.startswith("v5e-") or name in (topology, shown_topology(topology).partition(" (")[2].rstrip(")"))


@pytest.mark.parametrize(
    ("name", "near"), [("v5p-60", "v5p-64, v5p-32,"), ("v6e-100", "v6e-128, v6e-64,"), ("h100", "v5litepod-8, v5p-64,")]
)
def test_an_unknown_slice_names_its_neighbours(name: str, near: str):
    with pytest.raises(MossAudioError, match=f"or be a name that Google Cloud rents by, such as {near}.*not '{name}'"):
        topology_of(name)
