"""MOSS-Audio in PyTorch, one prompt at a time: the reference of the JAX port.

The only module here that needs PyTorch; `compare_models` imports it when it is asked to compare. The transformer
layers are those of transformers 4.57.1 (Whisper's encoder layer, Qwen3); the glue around them is our own, written for
clarity rather than speed. Parameters carry the released checkpoint's names, so released files load as they are, and
one run hands out every stage of the computation. tests/parity proves it against recorded outputs of the original model.
"""
# pyright: reportMissingImports=false
# (PyTorch is installed with Python 3.11 only.)

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from convert.tensor_source import with_rope_theta
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.weights.locate import INDEX_FILE, SINGLE_FILE
from moss_audio_jax.weights.names import IGNORED_TENSORS

try:
    import torch
    import torch.nn.functional as F
    from safetensors import safe_open
    from torch import Tensor, nn
    from transformers import DynamicCache, Qwen3Config, Qwen3Model
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
    from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer
except ImportError as error:
    from convert import PYTORCH_INSTALL

    raise MossAudioError(f"comparing with PyTorch needs torch and transformers ({error}): {PYTORCH_INSTALL}") from error

DEFAULT_N_WINDOW = 200  # released config.json files leave it out


@dataclass(frozen=True)
class AudioStages:
    """Audio features of a prompt; the tokens of all clips follow each other, in order."""

    encoder_last_hidden_state: Tensor  # [tokens, output_dim]
    deepstack: list[Tensor]  # one [tokens, output_dim] per tap, in the config's order
    adapter_output: Tensor  # [tokens, hidden_size]
    deepstack_merged: list[Tensor]  # one [tokens, hidden_size] per injected tap


@dataclass(frozen=True)
class Stages:
    audio: AudioStages | None  # None for a prompt without audio
    logits: Tensor  # [1, S, vocab_size]


def sinusoids(length: int, width: int) -> Tensor:
    """Computes Whisper's positions, float32 [length, width]: sines in the first half, cosines in the second."""
    step = math.log(10000.0) / (width // 2 - 1)
    phases = torch.arange(length).float()[:, None] * torch.exp(-step * torch.arange(width // 2).float())
    return torch.cat([phases.sin(), phases.cos()], dim=1)


def token_count(frames: int) -> int:
    """Returns the audio tokens of `frames` mel frames: three convolutions of stride 2 give ceil(frames / 8)."""
    return -(-frames // 8)


class Encoder(nn.Module):
    """Conv stem and Whisper layers over one clip, split into chunks that are encoded independently.

    chunk_frames: mel frames in a chunk. None encodes the clip whole, as the first public MOSS-Audio did;
    a config asks for it with `"n_window": null`.
    """

    def __init__(self, audio_config: Mapping[str, Any]):
        super().__init__()
        settings = {"n_window": DEFAULT_N_WINDOW, **audio_config, "_attn_implementation": "eager"}
        config: Any = SimpleNamespace(**settings)
        channels, width = config.downsample_hidden_size, config.d_model
        self.chunk_frames = None if config.n_window is None else 2 * config.n_window
        self.taps = list(config.deepstack_encoder_layer_indexes or [])
        self.conv1 = nn.Conv2d(1, channels, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        self.stem_proj = nn.Linear(channels * config.num_mel_bins // 8, width)
        # The norms inside a Whisper layer have eps 1e-5 for any layer_norm_eps.
        self.layers = nn.ModuleList(WhisperEncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        same_width = config.output_dim == width
        self.out_proj = nn.Identity() if same_width else nn.Linear(width, config.output_dim, bias=False)

    def forward(self, mel: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One clip's mel [num_mel_bins, frames] -> last hidden state and taps, each [tokens, output_dim]."""
        chunks = mel.T.split(self.chunk_frames or mel.shape[1])
        tokens = torch.tensor([token_count(len(chunk)) for chunk in chunks])
        # Pads the last chunk of a longer clip; a clip shorter than a chunk is not padded.
        padded = nn.utils.rnn.pad_sequence(list(chunks), batch_first=True).transpose(1, 2)

        x = self.stem(padded)
        is_token = torch.arange(x.shape[1]) < tokens[:, None]
        # Added to the attention scores [chunks, heads, queries, keys]: masks padding as keys.
        bias = torch.zeros(is_token.shape, dtype=x.dtype).masked_fill(~is_token, torch.finfo(x.dtype).min)

        outputs = []
        for layer in self.layers:
            x = layer(x, attention_mask=bias[:, None, None, :], layer_head_mask=None)[0]
            outputs.append(x)
        # The taps skip the final norm, but not the projection.
        states = [self.layer_norm(x), *(outputs[tap] for tap in self.taps)]
        last, *taps = [self.out_proj(state)[is_token] for state in states]
        return last, taps

    def stem(self, mels: Tensor) -> Tensor:
        """[chunks, num_mel_bins, frames] -> [chunks, ceil(frames / 8), d_model], positions added."""
        x = mels[:, None]
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.gelu(conv(x))
        x = x.permute(0, 3, 1, 2).flatten(2)  # [chunks, tokens, channels * frequencies]
        x = self.stem_proj(x)
        return x + sinusoids(x.shape[1], x.shape[2]).to(x.dtype)


class GatedMLP(nn.Module):
    """[..., inputs] -> [..., outputs]: down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.gate_proj = nn.Linear(inputs, hidden, bias=False)
        self.up_proj = nn.Linear(inputs, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ReferenceModel(nn.Module):
    """MOSS-Audio from its parsed config.json, in eval mode; weights are random until some are loaded."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.config = config = with_rope_theta(dict(config))
        language_config = Qwen3Config(**config["language_config"])
        hidden_size = language_config.hidden_size
        shape = config["audio_config"]["output_dim"], config["adapter_hidden_size"], hidden_size
        self.audio_encoder = Encoder(config["audio_config"])
        self.language_model = Qwen3Model(language_config)
        self.audio_adapter = GatedMLP(*shape)
        injected = self.audio_encoder.taps[: config.get("deepstack_num_inject_layers")]
        self.deepstack_audio_merger_list = nn.ModuleList(GatedMLP(*shape) for _ in injected)
        self.lm_head = nn.Linear(hidden_size, language_config.vocab_size, bias=False)
        self.tied = bool(config.get("tie_word_embeddings"))
        if self.tied:
            self.lm_head.weight = self.language_model.embed_tokens.weight
        self.eval()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Loads the tensors of released files: MOSS-Music's have one more buffer, tied heads have none."""
        tensors = {name: tensor for name, tensor in state_dict.items() if name not in IGNORED_TENSORS}
        if self.tied:
            tensors["lm_head.weight"] = tensors["language_model.embed_tokens.weight"]
        result = super().load_state_dict(tensors, strict, assign)
        if self.tied:  # otherwise the assignment makes two parameters of them
            self.lm_head.weight = self.language_model.embed_tokens.weight
        return result

    def forward(self, input_ids: Tensor, mels: Sequence[Tensor], audio_token_id: int) -> Stages:
        """Computes every stage up to the logits, of a prompt [1, S] and the mels [num_mel_bins, frames] of its clips.

        `input_ids` holds `audio_token_id` once for each audio token of the clips, in order (else ValueError).
        The mels are rounded to bfloat16, as by the MOSS-Audio processor.
        """
        return self._prefill(input_ids, mels, audio_token_id, cache=None)

    @torch.no_grad()
    def generate_greedy(
        self, input_ids: Tensor, mels: Sequence[Tensor], audio_token_id: int, max_new_tokens: int
    ) -> list[int]:
        """Generates the likeliest continuation: always `max_new_tokens` ids, without a stop."""
        cache = DynamicCache(config=self.language_model.config)
        logits = self._prefill(input_ids, mels, audio_token_id, cache).logits
        ids = [int(logits[0, -1].argmax())]
        while len(ids) < max_new_tokens:
            embeds = self.language_model.embed_tokens(torch.tensor([ids[-1:]]))
            ids.append(int(self._logits(embeds, cache)[0, -1].argmax()))
        return ids

    def encode_audio(self, mels: Sequence[Tensor]) -> AudioStages:
        """Computes the audio stages of one or more clips, each encoded on its own."""
        last_states, taps = zip(*(self.audio_encoder(mel) for mel in mels), strict=True)
        last, deepstack = torch.cat(last_states), [torch.cat(tap) for tap in zip(*taps, strict=True)]
        # deepstack_num_inject_layers may leave fewer mergers than taps.
        pairs = zip(self.deepstack_audio_merger_list, deepstack, strict=False)
        merged = [merger(tap) for merger, tap in pairs]
        return AudioStages(last, deepstack, self.audio_adapter(last), merged)

    def _prefill(
        self, input_ids: Tensor, mels: Sequence[Tensor], audio_token_id: int, cache: DynamicCache | None
    ) -> Stages:
        embeds = self.language_model.embed_tokens(input_ids)
        is_audio = input_ids == audio_token_id
        places, needed = int(is_audio.sum()), sum(token_count(mel.shape[1]) for mel in mels)
        if places != needed:
            raise ValueError(f"{len(mels)} clips make {needed} audio tokens; the prompt holds {places}")
        if not mels:
            return Stages(audio=None, logits=self._logits(embeds, cache))
        audio = self.encode_audio(mels)
        embeds = embeds.index_put((is_audio,), audio.adapter_output)
        with self._deepstack(is_audio, audio.deepstack_merged):
            return Stages(audio, self._logits(embeds, cache))

    def _logits(self, embeds: Tensor, cache: DynamicCache | None) -> Tensor:
        output = self.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=cache is not None)
        return self.lm_head(output.last_hidden_state)

    @contextmanager
    def _deepstack(self, is_audio: Tensor, merged: Sequence[Tensor]) -> Iterator[None]:
        """Adds `merged[k]` to the output of the k-th language layer at audio positions, while the context is open."""

        def add(features: Tensor) -> Any:
            return lambda _layer, _inputs, output: output.index_put((is_audio,), features, accumulate=True)

        injected = zip(self.language_model.layers, merged, strict=False)  # the later layers get nothing
        hooks = [layer.register_forward_hook(add(features)) for layer, features in injected]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> ReferenceModel:
    """Loads the model of a released directory, cast to `dtype`; it is in memory once."""
    index = directory / INDEX_FILE
    files = [SINGLE_FILE]
    if index.exists():
        files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    tensors = {}
    for name in files:
        with safe_open(directory / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key).to(dtype) for key in file.keys()}  # noqa: SIM118
    with torch.device("meta"):  # takes no memory for weights that the loaded ones replace
        model = ReferenceModel(json.loads((directory / "config.json").read_text("utf-8")))
    model.load_state_dict(tensors, assign=True)
    # The frequencies of its rotary embedding are in no file.
    model.language_model.rotary_emb = Qwen3RotaryEmbedding(model.language_model.config)
    return model


def reference_stages(
    directory: Path, ids: Sequence[int], mels: Sequence[np.ndarray], audio_token_id: int, dtype: str
) -> dict[str, np.ndarray]:
    """Computes stage -> values for one prompt: float32 [audio tokens, width], logits [positions, vocabulary]."""
    model = load_reference(directory, getattr(torch, dtype))
    clips = [torch.from_numpy(mel).to(getattr(torch, dtype)) for mel in mels]
    with torch.no_grad():
        stages = model(torch.tensor([ids]), clips, audio_token_id)
    audio = stages.audio
    assert audio is not None
    tensors = {
        "encoder": audio.encoder_last_hidden_state,
        **{f"tap {k}": tap for k, tap in enumerate(audio.deepstack)},
        "adapter": audio.adapter_output,
        **{f"merged {k}": values for k, values in enumerate(audio.deepstack_merged)},
        "logits": stages.logits[0],
    }
    return {stage: tensor.float().numpy() for stage, tensor in tensors.items()}
