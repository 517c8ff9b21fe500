"""Model FLOPs of a step, FLOPs recomputed by rematerialization, and memory traffic, all from one table of matmuls.

Model FLOPs follow MFU in PaLM (arXiv 2204.02311, appendix B) and Megatron-LM: matmuls and convolutions only, 2 FLOPs
per multiply-add, no recomputation. As in Megatron-LM, and unlike PaLM, causal attention counts half. Padding does not
count, but an audio chunk counts whole, as the encoder reads it.

The backward pass of y = x W has two products of the same size: the gradient of W, if W is trained, and the gradient of
x, if x depends on trained parameters. A frozen part costs its forward pass, and the gradient of x only if something
below it is trained.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig
from moss_audio_jax.errors import MossAudioError

FLOP_PARTS: tuple[str, ...] = ("encoder", "adapter", "mergers", "llm_matmuls", "llm_attention", "head")
CONVENTION = "model FLOPs, forward and backward, with causal attention halved and no recomputation"


@dataclass(frozen=True)
class Content:
    """Contents of a batch without padding.

    tokens: of text and audio. chunks: of audio. attention_pairs: sum of squared segment lengths.
    """

    tokens: float
    chunks: float
    attention_pairs: float

    @classmethod
    def of_sums(cls, sums: Mapping[str, float]) -> "Content":
        """Reads `TrainingData.sums`, of one host or summed over hosts."""
        return cls(sums["packed_tokens"], sums["packed_chunks"], sums["attention_pairs"])


def forward_flops(config: MossAudioConfig, content: Content) -> dict[str, float]:
    """Computes FLOPs of a forward pass with logits at every token, by part (`FLOP_PARTS`)."""
    return step_flops(config, content, trainable=())


def step_flops(config: MossAudioConfig, content: Content, trainable: Iterable[str]) -> dict[str, float]:
    """Computes FLOPs of a training step, by part (`FLOP_PARTS`).

    trainable: paths of trained parameters, as in `TrainState.trainable`. The small matmuls of LoRA adapters are left
        out; the gradients that reach them are counted.
    """
    flops = dict.fromkeys(FLOP_PARTS, 0.0)
    for operation, times in _step(config, content, trainable):
        flops[operation.part] += operation.flops * times.products
    return flops


def recomputed_flops(
    config: MossAudioConfig, content: Content, trainable: Iterable[str], remat: str
) -> dict[str, float]:
    """Computes FLOPs that the backward pass recomputes, by part (`FLOP_PARTS`); model FLOPs exclude them.

    remat: a key of `layers.REMAT_POLICIES`. Without a gradient nothing is recomputed, nor is the last matmul of a
        layer, whose result no gradient needs. The loss always recomputes the logits.
    """
    flops = dict.fromkeys(FLOP_PARTS, 0.0)
    for operation, times in _step(config, content, trainable, remat):
        flops[operation.part] += operation.flops * times.again
    return flops


def moved_bytes(
    config: MossAudioConfig,
    content: Content,
    trainable: Iterable[str],
    remat: str = "none",
    *,
    microbatches: int = 1,
    data_parallel: int = 1,
    tensor: int = 1,
) -> dict[str, float]:
    """Computes HBM traffic of a step's matmuls on one chip in bytes, by part (`FLOP_PARTS`).

    Each matmul reads its operands and writes its result once, in bfloat16. Kernels are all-gathered: each chip reads
    them whole, or 1 / `tensor` of them, in every microbatch. Activations are sharded over all chips. Operations
    between matmuls (norms, activation functions) are assumed to be fused.
    """
    moved = dict.fromkeys(FLOP_PARTS, 0.0)
    for operation, times in _step(config, content, trainable, remat):
        elements = operation.activations / (data_parallel * tensor) + operation.kernel * microbatches / tensor
        moved[operation.part] += 2.0 * elements * (times.products + times.again)
    return moved


class _Times(NamedTuple):
    """Executions of a matmul in a step: forward and backward, and recomputed for the backward pass."""

    products: int
    again: int


def _step(
    config: MossAudioConfig, content: Content, trainable: Iterable[str], remat: str = "none"
) -> Iterator[tuple["_Operation", _Times]]:
    trained = frozenset(trainable)

    def any_learns(prefixes: Iterable[str]) -> bool:
        return any(path.startswith(f"{prefix}.") for prefix in prefixes for path in trained)

    for operation in _operations(config, content):
        by_input = any_learns(operation.below)
        by_other = by_input if operation.weight is None else operation.weight in trained
        twice = operation.part == "head" and bool(trained)
        again = twice or ((by_input or by_other) and remat in operation.recomputed)
        yield operation, _Times(1 + by_input + by_other, int(again))


# Keys of `layers.REMAT_POLICIES` under which the backward pass recomputes a matmul.
_IN_LAYERS = ("attention", "full", "offload")
_STEM = ("dots", *_IN_LAYERS)


@dataclass(frozen=True)
class _Operation:
    """A matmul or convolution, summed over the layers that have it.

    weight: path of its parameter; None for attention, which multiplies activations.
    flops: of the forward pass.
    below: path prefixes of all parameters that its input depends on. A scan treats all layers of a stack alike: a stack
        is below its own matmuls.
    activations, kernel: number of elements of activations (operands and result) and of the parameter.
    recomputed: remat policies under which the backward pass recomputes it.
    """

    part: str
    weight: str | None
    flops: float
    below: tuple[str, ...]
    activations: float
    kernel: float = 0.0
    recomputed: tuple[str, ...] = ()


def _operations(config: MossAudioConfig, content: Content) -> Iterator[_Operation]:
    chunk_frames = config.audio_config.chunk_frames
    if chunk_frames is None:
        raise MossAudioError("FLOPs are counted by chunks of audio, but chunk_frames is None: set it to a number")
    audio_tokens = content.chunks * (chunk_frames // DOWNSAMPLE_RATE)
    yield from _stem(config, content.chunks, chunk_frames)
    yield from _encoder(config, audio_tokens, chunk_frames // DOWNSAMPLE_RATE)
    yield from _bridge("adapter", "audio_adapter", config, audio_tokens)
    yield from _bridge("mergers", "deepstack_audio_merger_list", config, audio_tokens, config.num_deepstack)
    yield from _language_model(config, content)


def _linear(
    part: str,
    name: str,
    rows: float,
    inputs: int,
    outputs: int,
    below: tuple[str, ...],
    *,
    layers: int = 1,
    recomputed: tuple[str, ...] = (),
) -> _Operation:
    """Matmul [rows, inputs] x [inputs, outputs] in each of `layers` layers."""
    flops, activations = 2.0 * rows * inputs * outputs, rows * (inputs + outputs)
    return _Operation(
        part, f"{name}.kernel", layers * flops, below, layers * activations, layers * inputs * outputs, recomputed
    )


def _stem(config: MossAudioConfig, chunks: float, frames: int) -> Iterator[_Operation]:
    audio = config.audio_config
    channels = audio.downsample_hidden_size
    below: tuple[str, ...] = ()
    for number, inputs in enumerate((1, channels, channels), start=1):
        name = f"audio_encoder.conv{number}"
        positions = chunks * (frames >> number) * (audio.num_mel_bins >> number)
        kernel = 3 * 3 * inputs * channels
        activations = positions * (4 * inputs + channels)  # strides of 2 x 2
        yield _Operation(
            "encoder", f"{name}.kernel", 2.0 * positions * kernel, below, activations, kernel, recomputed=_STEM
        )
        below = (*below, name)
    tokens = chunks * (frames // DOWNSAMPLE_RATE)
    yield _linear("encoder", "audio_encoder.stem_proj", tokens, audio.stem_features, audio.d_model, below)


def _encoder(config: MossAudioConfig, tokens: float, chunk_tokens: int) -> Iterator[_Operation]:
    audio = config.audio_config
    width, hidden, layers = audio.d_model, audio.encoder_ffn_dim, audio.encoder_layers
    below = ("audio_encoder",)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        path = f"audio_encoder.layers.self_attn.{name}"
        yield _linear("encoder", path, tokens, width, width, below, layers=layers, recomputed=_IN_LAYERS)
    flops, activations = 4.0 * tokens * chunk_tokens * width, 4.0 * tokens * width
    yield _Operation("encoder", None, layers * flops, below, layers * activations, recomputed=_STEM)
    first, second = (f"audio_encoder.layers.{name}" for name in ("fc1", "fc2"))
    yield _linear("encoder", first, tokens, width, hidden, below, layers=layers, recomputed=_IN_LAYERS)
    yield _linear("encoder", second, tokens, hidden, width, below, layers=layers)
    if audio.output_dim != width:  # of the features and each tap
        rows = tokens * (1 + len(audio.deepstack_encoder_layer_indexes))
        yield _linear("encoder", "audio_encoder.out_proj", rows, width, audio.output_dim, below)


def _bridge(part: str, name: str, config: MossAudioConfig, rows: float, count: int = 1) -> Iterator[_Operation]:
    """Gated MLP of the adapter or the mergers, from the encoder to the language model."""
    inputs, hidden = config.audio_config.output_dim, config.adapter_hidden_size
    outputs = config.language_config.hidden_size
    first = (f"{name}.gate_proj", f"{name}.up_proj")
    for projection in first:
        yield _linear(part, projection, rows, inputs, hidden, ("audio_encoder",), layers=count, recomputed=_IN_LAYERS)
    yield _linear(part, f"{name}.down_proj", rows, hidden, outputs, ("audio_encoder", *first), layers=count)


def _language_model(config: MossAudioConfig, content: Content) -> Iterator[_Operation]:
    language = config.language_config
    width, hidden = language.hidden_size, language.intermediate_size
    queries = language.num_attention_heads * language.head_dim
    keys = language.num_key_value_heads * language.head_dim
    audio = ("audio_encoder", "audio_adapter", "deepstack_audio_merger_list")
    below = (*audio, "language_model.embed_tokens", "language_model.layers")
    shapes = {
        "self_attn.q_proj": (width, queries),
        "self_attn.k_proj": (width, keys),
        "self_attn.v_proj": (width, keys),
        "self_attn.o_proj": (queries, width),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    layers = language.num_hidden_layers
    for name, (inputs, outputs) in shapes.items():
        again = () if name == "mlp.down_proj" else _IN_LAYERS
        path = f"language_model.layers.{name}"
        yield _linear("llm_matmuls", path, content.tokens, inputs, outputs, below, layers=layers, recomputed=again)
    flops, activations = 4.0 * content.attention_pairs / 2 * queries, 2.0 * content.tokens * (queries + keys)
    kept = ("dots", "full", "offload")  # all but "attention"
    yield _Operation("llm_attention", None, layers * flops, below, layers * activations, recomputed=kept)

    tied = config.tie_word_embeddings
    head = "language_model.embed_tokens" if tied else "lm_head"
    product = _linear("head", head, content.tokens, width, language.vocab_size, (*audio, "language_model"))
    yield replace(product, weight="language_model.embed_tokens.embedding") if tied else product
