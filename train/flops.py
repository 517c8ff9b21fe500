"""Model FLOPs: what a step has to compute, whatever the program computes.

The convention is that of MFU in PaLM (arXiv 2204.02311, appendix B) and Megatron-LM: matmuls and convolutions only, a
multiply-add is 2 FLOPs, and what is recomputed in the backward pass does not count. As in Megatron-LM, and unlike
PaLM, causal attention counts half. Padding does not count: the measure is of useful work. A chunk of audio counts
whole, as the encoder reads it.

The backward pass of y = x W has two products of the same size: one by W, if that is trained, and one by x, if anything
is trained that x depends on. So frozen parts cost their forward pass, and no more than that where nothing below learns.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from moss_audio_jax.config import DOWNSAMPLE_RATE, MossAudioConfig
from moss_audio_jax.errors import MossAudioError

PARTS: tuple[str, ...] = ("encoder", "adapter", "mergers", "llm_matmuls", "llm_attention", "head")
CONVENTION = "model FLOPs, forward and backward, with causal attention halved and no recomputation"


@dataclass(frozen=True)
class Content:
    """What a batch holds, without padding.

    tokens: of text and audio. chunks: of audio. attention_pairs: the sum over segments of their length squared.
    """

    tokens: float
    chunks: float
    attention_pairs: float

    @classmethod
    def of_sums(cls, sums: Mapping[str, float]) -> "Content":
        """From `TrainingData.sums`, of one host or over all."""
        return cls(sums["packed_tokens"], sums["packed_chunks"], sums["attention_pairs"])


def forward_flops(config: MossAudioConfig, content: Content) -> dict[str, float]:
    """FLOPs of a forward pass with logits at every token, by part (`PARTS`)."""
    return step_flops(config, content, trainable=())


def step_flops(config: MossAudioConfig, content: Content, trainable: Iterable[str]) -> dict[str, float]:
    """FLOPs of a training step, by part (`PARTS`).

    trainable: paths of the parameters that learn, such as `TrainState.trainable` has; all others are frozen. The small
    products with adapters of LoRA are left out, but gradients are counted all the way to them.
    """
    trained = frozenset(trainable)

    def any_learns(prefixes: Iterable[str]) -> bool:
        return any(path.startswith(f"{prefix}.") for prefix in prefixes for path in trained)

    flops = dict.fromkeys(PARTS, 0.0)
    for operation in _operations(config, content):
        by_input = any_learns(operation.below)
        by_other = by_input if operation.weight is None else operation.weight in trained
        flops[operation.part] += operation.flops * (1 + by_input + by_other)
    return flops


@dataclass(frozen=True)
class _Operation:
    """A product with a parameter, in all layers that have it. flops: of the forward pass.

    weight: the parameter's path; None for attention, whose products have two activations each.
    below: prefixes of the paths of all parameters that the input depends on. Layers of a stack count alike, as a scan
        runs them: the stack is below its own operations.
    """

    part: str
    weight: str | None
    flops: float
    below: tuple[str, ...]


def _operations(config: MossAudioConfig, content: Content) -> Iterator[_Operation]:
    chunk_frames = config.audio_config.chunk_frames
    if chunk_frames is None:
        raise MossAudioError("FLOPs are counted by chunks of audio, but chunk_frames is None: set it to a number")
    audio_tokens = content.chunks * (chunk_frames // DOWNSAMPLE_RATE)
    yield from _stem(config, content.chunks, chunk_frames)
    yield from _encoder(config, audio_tokens, chunk_frames // DOWNSAMPLE_RATE)
    yield from _bridge("adapter", "audio_adapter", config, audio_tokens)
    yield from _bridge("mergers", "deepstack_audio_merger_list", config, audio_tokens * config.num_deepstack)
    yield from _language_model(config, content)


def _linear(part: str, name: str, rows: float, inputs: int, outputs: int, below: tuple[str, ...]) -> _Operation:
    return _Operation(part, f"{name}.kernel", 2.0 * rows * inputs * outputs, below)


def _stem(config: MossAudioConfig, chunks: float, frames: int) -> Iterator[_Operation]:
    audio = config.audio_config
    channels = audio.downsample_hidden_size
    below: tuple[str, ...] = ()
    for number, inputs in enumerate((1, channels, channels), start=1):
        name = f"audio_encoder.conv{number}"
        positions = chunks * (frames >> number) * (audio.num_mel_bins >> number)
        yield _linear("encoder", name, positions, 3 * 3 * inputs, channels, below)
        below = (*below, name)
    tokens = chunks * (frames // DOWNSAMPLE_RATE)
    yield _linear("encoder", "audio_encoder.stem_proj", tokens, audio.stem_features, audio.d_model, below)


def _encoder(config: MossAudioConfig, tokens: float, chunk_tokens: int) -> Iterator[_Operation]:
    audio = config.audio_config
    width, hidden = audio.d_model, audio.encoder_ffn_dim
    rows = tokens * audio.encoder_layers
    below = ("audio_encoder",)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield _linear("encoder", f"audio_encoder.layers.self_attn.{name}", rows, width, width, below)
    yield _Operation("encoder", None, 4.0 * rows * chunk_tokens * width, below)
    yield _linear("encoder", "audio_encoder.layers.fc1", rows, width, hidden, below)
    yield _linear("encoder", "audio_encoder.layers.fc2", rows, hidden, width, below)
    if audio.output_dim != width:  # of the features and of every tap
        rows = tokens * (1 + len(audio.deepstack_encoder_layer_indexes))
        yield _linear("encoder", "audio_encoder.out_proj", rows, width, audio.output_dim, below)


def _bridge(part: str, name: str, config: MossAudioConfig, rows: float) -> Iterator[_Operation]:
    """The adapter's or the mergers' gated MLP, from the encoder to the language model."""
    inputs, hidden = config.audio_config.output_dim, config.adapter_hidden_size
    outputs = config.language_config.hidden_size
    first = (f"{name}.gate_proj", f"{name}.up_proj")
    for projection in first:
        yield _linear(part, projection, rows, inputs, hidden, ("audio_encoder",))
    yield _linear(part, f"{name}.down_proj", rows, hidden, outputs, ("audio_encoder", *first))


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
    for name, (inputs, outputs) in shapes.items():
        rows = content.tokens * language.num_hidden_layers
        yield _linear("llm_matmuls", f"language_model.layers.{name}", rows, inputs, outputs, below)
    causal_pairs = content.attention_pairs / 2 * language.num_hidden_layers
    yield _Operation("llm_attention", None, 4.0 * causal_pairs * queries, below)

    tied = config.tie_word_embeddings
    head = "language_model.embed_tokens.embedding" if tied else "lm_head.kernel"
    yield _Operation("head", head, 2.0 * content.tokens * width * language.vocab_size, (*audio, "language_model"))
