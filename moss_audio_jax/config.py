"""Configuration of a checkpoint: config.json, processor_config.json and generation_config.json.

Each part is a frozen, hashable dataclass with the field names of the released files. `MossAudioConfig.from_hf(dir)`
reads the three files; `save_hf(dir)` writes them back equal, with the keys that this port does not use. A value that
would change the computation, and that this port does not implement, is an error and never ignored.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.patterns import matches
from moss_audio_jax.schema import (
    INT32,
    SWITCH,
    Epsilon,
    Indexes,
    Layers,
    Share,
    Size,
    Switch,
    TokenId,
    TokenIds,
    check_fields,
    check_keys,
    integer,
    none_or,
    number,
)
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, Path, absolute, atomic_write, exists, file_in, to_path

MODEL_TYPES = ("moss_audio", "moss_music")
ADAPTER_LEAVES = (".lora_a", ".lora_b")  # ends of the paths of LoRA's parameters
DOWNSAMPLE_RATE = 8  # mel frames per audio token: three stride-2 convolutions


def downsampled_length(frames: Any, convolutions: int = 3) -> Any:
    """Computes the length after stride-2 convolutions: ceil(frames / 2^convolutions), of an int or of arrays.

    After all three it is the number of audio tokens.
    """
    return -(-frames // 2**convolutions)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MossAudioError(message)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The audio encoder (`audio_config`): conv stem, Whisper layers, DeepStack taps.

    chunk_frames: mel frames that are encoded together, a multiple of 8; the file has half of it as `n_window`. None
        encodes a whole clip at once, as an earlier public version of the model did.
    """

    d_model: Size = 1280
    output_dim: Size = 1280
    num_mel_bins: Size = 128
    encoder_layers: Layers = 32
    encoder_attention_heads: Size = 20
    encoder_ffn_dim: Size = 5120
    downsample_hidden_size: Size = 480
    dropout: Share = 0.1
    attention_dropout: Share = 0.1
    activation_dropout: Share = 0.0
    layer_norm_eps: Epsilon = 1e-5
    deepstack_encoder_layer_indexes: Indexes = (8, 16, 24)
    chunk_frames: Annotated[int | None, none_or(integer(1, 2**20))] = 400

    def __post_init__(self):
        check_fields(self)
        _require(
            self.d_model % self.encoder_attention_heads == 0,
            f"d_model {self.d_model} must be a multiple of encoder_attention_heads {self.encoder_attention_heads}",
        )
        _require(
            self.d_model % 2 == 0 and self.d_model > 2,
            f"d_model must be even and above 2, not {self.d_model}",
        )
        _require(
            self.num_mel_bins % DOWNSAMPLE_RATE == 0,
            f"num_mel_bins must be a multiple of {DOWNSAMPLE_RATE}, not {self.num_mel_bins}",
        )
        _require(
            self.chunk_frames is None or self.chunk_frames % DOWNSAMPLE_RATE == 0,
            f"chunk_frames (twice n_window) must be a positive multiple of {DOWNSAMPLE_RATE} or None, "
            f"not {self.chunk_frames}",
        )
        taps = self.deepstack_encoder_layer_indexes
        _require(
            len(set(taps)) == len(taps) and all(0 <= tap < self.encoder_layers for tap in taps),
            f"deepstack_encoder_layer_indexes must be different layers of 0..{self.encoder_layers - 1}, "
            f"not {shown(list(taps))}",
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.encoder_attention_heads

    @property
    def stem_features(self) -> int:
        """Channels x frequencies of the conv stem's output for each token, the input of `stem_proj`."""
        return self.downsample_hidden_size * (self.num_mel_bins // DOWNSAMPLE_RATE)


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The Qwen3 language model (`language_config`)."""

    vocab_size: Size = 151936
    hidden_size: Size = 2560
    intermediate_size: Size = 9728
    num_hidden_layers: Layers = 36
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 8
    head_dim: Size = 128
    max_position_embeddings: Annotated[int, integer(1, INT32)] = 40960
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Annotated[float, number(1, 1e15)] = 1_000_000
    initializer_range: Annotated[float, number(0, 100)] = 0.02

    def __post_init__(self):
        check_fields(self)
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even for rotary embedding, not {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """Token ids of the audio span in a prompt, and the switch of its time markers (processor_config.json)."""

    enable_time_marker: Switch = True
    audio_token_id: TokenId = 151654
    audio_start_id: TokenId = 151669
    audio_end_id: TokenId = 151670

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen kernels: y = x W + scale (x A) B, A [in, rank] and B [rank, out].

    The alpha of 2 at rank 64 of MOSS-Audio's fine-tuning script scales adapters by 1/32; the default here by 1/2. "LoRA
    Without Regret" (Schulman et al. 2025, thinkingmachines.ai/blog/lora) advises adapters on all layers, at ten times
    the learning rate of full fine-tuning. The alpha is our choice and was not compared with others.
    """

    rank: Size = 64
    """Rank of the adapters."""
    alpha: Annotated[float, number(1e-9, 1e9)] = 32.0
    """Numerator of the scale alpha / rank."""
    dropout: Share = 0.0
    """Dropout of the input of the adapters, in training."""
    rslora: Switch = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    targets: tuple[str, ...] = ("language_model.layers.*_proj",)
    """Globs over the paths of linear layers that get adapters, such as `audio_encoder.layers.self_attn.[qkv]_proj`. The
    default is the seven projections of every layer of the language model."""
    full: tuple[str, ...] = ()
    """Globs over paths of parameters to train whole beside the adapters, such as `audio_adapter.*` and
    `deepstack_audio_merger_list.*`. Everything else is frozen."""
    int8: tuple[str, ...] = ()
    """Globs over the paths of linear layers whose frozen kernels are held in int8 in training, such as
    `language_model.layers.*_proj`."""

    def __post_init__(self):
        check_fields(self, "lora.")
        _require(bool(self.targets), "lora.targets names no layers: give at least one pattern")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def trains(self, path: str) -> bool:
        """Returns True if a parameter belongs to the adapter: it is trained and saved."""
        return path.endswith(ADAPTER_LEAVES) or matches(path, self.full)


@dataclasses.dataclass(frozen=True)
class MossAudioConfig:
    """Configuration of a whole checkpoint.

    lora: adapters beside the released parameters. int8: globs over the paths of linear layers whose kernels are int8 in
        memory, such as `language_model.layers.*_proj`. No released file has them.
    raw: the files as they were read (for a new checkpoint the 4B's), so that they can be written back equal.
    directory: of the files, and of the tokenizer's; None for a new checkpoint.
    """

    audio_config: EncoderConfig = EncoderConfig()
    language_config: LanguageConfig = LanguageConfig()
    adapter_hidden_size: Size = 8192
    deepstack_num_inject_layers: Annotated[int | None, none_or(integer(0, 2**10))] = None
    tie_word_embeddings: Switch = False
    model_type: str = "moss_audio"
    processor: ProcessorConfig = ProcessorConfig()
    eos_ids: TokenIds = (151645,)
    lora: LoraConfig | None = None
    int8: tuple[str, ...] = ()
    raw: Mapping[str, dict] = dataclasses.field(
        default_factory=lambda: _read_files(to_path(__file__).parent / "released_4b"), compare=False, repr=False
    )
    directory: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        check_fields(self)
        _require(
            self.model_type in MODEL_TYPES,
            f"model_type must be one of {MODEL_TYPES}, not {shown(self.model_type)}",
        )
        _require(
            self.num_deepstack <= self.language_config.num_hidden_layers,
            f"{self.num_deepstack} DeepStack features need as many language-model layers, "
            f"but num_hidden_layers is {self.language_config.num_hidden_layers}",
        )

    @property
    def int8_layers(self) -> tuple[str, ...]:
        """Globs over the paths of all linear layers whose kernels are int8, those of an adapter's base included."""
        return self.int8 + (() if self.lora is None else self.lora.int8)

    @property
    def num_deepstack(self) -> int:
        """Number of encoder taps that reach the language model: the first ones listed, capped by the config."""
        taps = len(self.audio_config.deepstack_encoder_layer_indexes)
        return taps if self.deepstack_num_inject_layers is None else min(taps, self.deepstack_num_inject_layers)

    @classmethod
    def preset(cls, name: str) -> Self:
        """Returns a preset: the released sizes `4b` and `8b`, `small` and `deep` for demos, or `tiny` for tests."""
        if name not in PRESETS:
            raise MossAudioError(f"no preset is called {name!r}: choose one of {', '.join(sorted(PRESETS))}")
        return cls(**PRESETS[name])

    @classmethod
    def from_hf(cls, directory: AnyPath) -> Self:
        """Reads the released files of `directory`; processor_config.json and generation_config.json may be absent."""
        directory = to_path(directory)
        raw = _read_files(directory)
        if "config.json" not in raw:
            raise MossAudioError(f"{directory} holds no config.json: give the directory of a MOSS-Audio checkpoint")
        try:
            return dataclasses.replace(cls._from_raw(raw), directory=str(absolute(directory)))
        except MossAudioError as error:
            raise MossAudioError(f"{directory}: its configuration can't be used: {error}") from error

    @classmethod
    def _from_raw(cls, raw: dict[str, dict]) -> Self:
        config, processor = raw["config.json"], raw.get("processor_config.json", {})
        generation = raw.get("generation_config.json", {})
        for part in ("audio_config", "language_config"):
            _require(
                isinstance(config.get(part), dict),
                f"config.json has no {part}: is this a MOSS-Audio checkpoint?",
            )
        mel = processor.get("mel_config", {})
        _require(isinstance(mel, dict), f"processor_config.json: mel_config must be an object, not {shown(mel)}")
        _require_values(mel, IMPLEMENTED_MEL, "processor_config.json: mel_config")
        architectures = config.get("architectures") or ["MossAudioModel"]
        _require(
            architectures in (["MossAudioModel"], ["MossMusicModel"]),
            f"the architecture must be MossAudioModel or MossMusicModel, not {shown(architectures)}",
        )
        check_keys(generation, _GENERATION, "generation_config.json")
        language = read_language(config["language_config"])
        _require_repeated(config, language)
        read = cls(
            audio_config=_read_encoder(config["audio_config"]),
            language_config=language,
            **_known_fields(cls, config, skip=_NOT_IN_CONFIG_JSON),
            processor=ProcessorConfig(**_known_fields(ProcessorConfig, processor)),
            eos_ids=_read_eos(config, generation),
            raw=raw,
        )
        ids = {"eos_token_id": read.eos_ids} | {
            name: (getattr(read.processor, name),) for name in _AUDIO_IDS if processor.get(name) is not None
        }
        for name, values in ids.items():
            _require(
                max(values, default=0) < language.vocab_size,
                f"{name} must be below vocab_size {language.vocab_size}, not {max(values, default=0)}",
            )
        return read

    def to_hf(self) -> dict[str, dict]:
        """Returns file name -> content, in the released layout.

        A key that was read gets the current value; a key that was absent is added only if its value is not the default.
        So unchanged files come back equal.
        """
        files: dict[str, dict] = copy.deepcopy(dict(self.raw))
        config = files["config.json"]
        _write_fields(self, config, skip=_NOT_IN_CONFIG_JSON)
        encoder, language = config["audio_config"], config["language_config"]
        _write_fields(self.audio_config, encoder, skip=("chunk_frames",))
        _write_fields(self.language_config, language, skip=("rope_theta",))
        if "n_window" in encoder or self.audio_config.chunk_frames != EncoderConfig.chunk_frames:
            frames = self.audio_config.chunk_frames
            encoder["n_window"] = None if frames is None else frames // 2
        # Transformers 4 reads only the first, and 5 writes only the second.
        for rope in (language, language.get("rope_parameters")):
            if rope:
                rope["rope_theta"] = self.language_config.rope_theta
        # Keys that the released files repeat follow the original.
        config.update({key: getattr(self.language_config, key) for key in _REPEATED if config.get(key) is not None})
        if language.get("layer_types"):
            language["layer_types"] = ["full_attention"] * self.language_config.num_hidden_layers
        if self.processor != ProcessorConfig() or "processor_config.json" in files:
            _write_fields(self.processor, files.setdefault("processor_config.json", {}), skip=())
        if self.eos_ids != MossAudioConfig._from_raw(dict(self.raw)).eos_ids:
            eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids)
            for content in (config, language, files.setdefault("generation_config.json", {})):
                content["eos_token_id"] = eos
        return files

    def save_hf(self, directory: AnyPath) -> None:
        """Writes the released files, config.json last."""
        for name, content in sorted(self.to_hf().items(), key=lambda file: file[0] == "config.json"):
            atomic_write(to_path(directory) / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# Fields of MossAudioConfig that are not keys of config.json, or have code of their own.
_NOT_IN_CONFIG_JSON = ("audio_config", "language_config", "processor", "eos_ids", "lora", "int8", "raw", "directory")
IMPLEMENTED_MEL = {
    "mel_sr": (16000,),
    "mel_n_fft": (400,),
    "mel_hop_length": (160,),
    "mel_dtype": ("bfloat16",),
    "use_whisper_feature_extractor": (True,),
}
# Required sizes: the defaults of Qwen3's configuration belong to another model.
_LANGUAGE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
)
_AUDIO_IDS = ("audio_token_id", "audio_start_id", "audio_end_id")
_REPEATED = ("num_hidden_layers", "vocab_size")  # of language_config, in config.json itself
_GENERATION = {
    "temperature": number(0, 1e6),
    "top_k": integer(0, INT32),
    "top_p": number(0, 1),
    "repetition_penalty": number(1e-6, 1e6),
    "max_new_tokens": integer(1, INT32),
    "max_length": integer(1, INT32),
    "do_sample": SWITCH,
}
CONFIG_FILES = ("config.json", "processor_config.json", "generation_config.json")


def _read_files(directory: Path) -> dict[str, dict]:
    files = {name: file_in(directory, name) for name in CONFIG_FILES}
    return {name: read_json(file) for name, file in files.items() if exists(file)}


def _require_values(content: Mapping, allowed: Mapping[str, tuple], where: str) -> None:
    """Raises MossAudioError for a key of `allowed` whose value this port does not implement."""
    for key, values in allowed.items():
        if key in content and content[key] not in values:
            expected = " or ".join(map(repr, values))
            raise MossAudioError(f"{where}.{key} is {shown(content[key])}, and this port implements {expected} only")


def _require_repeated(config: Mapping, language: LanguageConfig) -> None:
    """Raises MossAudioError if a key that config.json repeats has two values."""
    for key in _REPEATED:
        found = config.get(key)
        if found is not None and (type(found), found) != (int, getattr(language, key)):
            raise MossAudioError(
                f"config.json has {key} {shown(found)} and language_config.{key} {getattr(language, key)}: "
                "make both the same"
            )


def _known_fields(cls: type, content: Mapping, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the fields of `cls` that `content` holds; null counts as absent."""
    names = [field.name for field in dataclasses.fields(cls) if field.name not in skip]
    return {name: content[name] for name in names if content.get(name) is not None}


def _write_fields(instance: Any, content: dict, skip: tuple[str, ...]) -> None:
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if field.name not in skip and (field.name in content or value != field.default):
            content[field.name] = list(value) if isinstance(value, tuple) else value


def _read_eos(config: Mapping, generation: Mapping) -> tuple[int, ...]:
    """Reads the ids from the first of generation_config.json, config.json and its language_config that has them."""
    for content in (generation, config, config["language_config"]):
        found = content.get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def _read_encoder(content: dict) -> EncoderConfig:
    allowed = {"activation_function": ("gelu",), "downsample_rate": (DOWNSAMPLE_RATE,)}
    _require_values(content, allowed, "audio_config")
    fields = _known_fields(EncoderConfig, content, skip=("chunk_frames",))
    taps = content.get("deepstack_encoder_layer_indexes", [8, 16, 24])
    fields["deepstack_encoder_layer_indexes"] = tuple(taps) if isinstance(taps, list) else () if taps is None else taps
    n_window = content.get("n_window", 200)
    none_or(integer(1, 2**19)).check("n_window", n_window)
    return EncoderConfig(**fields, chunk_frames=None if n_window is None else 2 * n_window)


def read_language(content: dict, where: str = "language_config") -> LanguageConfig:
    """Reads a Qwen3 configuration, MOSS-Audio's inner one or a stock file's. where: its name, for errors."""
    allowed = {
        "model_type": ("qwen3",),
        "architectures": (["Qwen3ForCausalLM"], ["Qwen3Model"], None),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
    }
    _require_values(content, allowed, where)
    fields: dict[str, Any] = _known_fields(LanguageConfig, content) | {"rope_theta": _read_rope_theta(content, where)}
    missing = [key for key in _LANGUAGE_KEYS if fields.get(key) is None]
    _require(not missing, f"{where} lacks {', '.join(missing)}")
    language = LanguageConfig(**fields)
    if content.get("head_dim", 0) is None:  # null in some Qwen configs: derived
        head_dim = language.hidden_size // language.num_attention_heads
        language = dataclasses.replace(language, head_dim=head_dim)
    layers = content.get("layer_types") or []
    _require(
        layers in ([], ["full_attention"] * language.num_hidden_layers),
        f"{where}.layer_types must be full_attention for each of {language.num_hidden_layers} layers, "
        f"not {shown(layers)}",
    )
    return language


def _read_rope_theta(content: dict, where: str) -> Any:
    """Reads the rotary base; transformers 5 moves it into rope_parameters. In both places it must be equal."""
    rope = content.get("rope_parameters") or {}
    _require(isinstance(rope, dict), f"{where}.rope_parameters must be an object, not {shown(rope)}")
    _require_values(rope, {"rope_type": ("default",)}, f"{where}.rope_parameters")
    unknown = sorted(set(rope) - {"rope_type", "rope_theta"})
    _require(not unknown, f"{where}.rope_parameters has {shown(unknown)}, which this port does not implement")
    inner, outer = rope.get("rope_theta"), content.get("rope_theta")
    _require(
        inner is None or outer is None or inner == outer,
        f"{where}.rope_parameters has the rope_theta {shown(inner)} and {where} itself {shown(outer)}: correct the one "
        "that the model was not trained with",
    )
    return outer if inner is None else inner


# Learns sound scenes from scratch in minutes on two CPU cores.
_SMALL: dict[str, Any] = {
    "audio_config": EncoderConfig(
        d_model=96,
        output_dim=96,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=192,
        downsample_hidden_size=8,
        dropout=0.0,
        attention_dropout=0.0,
        deepstack_encoder_layer_indexes=(0, 1),
    ),
    "language_config": LanguageConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=48,
        rope_theta=10_000,
    ),
    "adapter_hidden_size": 192,
    "deepstack_num_inject_layers": 2,
    "processor": ProcessorConfig(audio_token_id=511, audio_start_id=509, audio_end_id=510),
    "eos_ids": (258,),
}

PRESETS: dict[str, dict[str, Any]] = {
    "4b": {"deepstack_num_inject_layers": 3},
    "8b": {
        "language_config": LanguageConfig(hidden_size=4096, intermediate_size=12288),
        "deepstack_num_inject_layers": 3,
    },
    "small": _SMALL,
    # The small model with a deeper encoder, whose taps are further from its output.
    "deep": {
        **_SMALL,
        "audio_config": dataclasses.replace(
            _SMALL["audio_config"], encoder_layers=6, deepstack_encoder_layer_indexes=(0, 2)
        ),
    },
    # The vocabulary is bytes plus the special tokens: see `small_tokenizer`.
    "tiny": {
        "audio_config": EncoderConfig(
            d_model=32,
            output_dim=32,
            encoder_layers=6,
            encoder_attention_heads=4,
            encoder_ffn_dim=64,
            downsample_hidden_size=8,
            deepstack_encoder_layer_indexes=(1, 2, 4),
        ),
        "language_config": LanguageConfig(
            vocab_size=512,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
        "adapter_hidden_size": 40,
        "deepstack_num_inject_layers": 3,
        "processor": ProcessorConfig(audio_token_id=511, audio_start_id=509, audio_end_id=510),
        "eos_ids": (258,),
    },
}
