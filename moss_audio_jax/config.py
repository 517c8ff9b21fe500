"""What a MOSS-Audio checkpoint says about itself: config.json, processor_config.json and generation_config.json.

Everything is a frozen, hashable dataclass whose field names are the released files' own. `MossAudioConfig.from_hf(dir)`
reads the three files and `save_hf(dir)` writes them back equal, keys that this port does not use included. A value that
would change the computation and that this port does not implement is an error here, never ignored.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Self

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.paths import AnyPath, Path, absolute, exists, file_in, read_text, to_path, write_whole
from moss_audio_jax.patterns import matches
from moss_audio_jax.recognition import foreign_content

MODEL_TYPES = ("moss_audio", "moss_music")
ADAPTER_LEAVES = (".lora_a", ".lora_b")  # how the paths of LoRA's parameters end
DOWNSAMPLE_RATE = 8  # three stride-2 convolutions: eight mel frames a token


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MossAudioError(message)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The audio encoder (`audio_config`): conv stem, Whisper layers, DeepStack taps.

    chunk_frames: mel frames that are encoded together, a multiple of 8; on disk it is `n_window`, half of it. None
    encodes a whole clip at once, as an earlier public version of the model did.
    """

    d_model: int = 1280
    output_dim: int = 1280
    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    downsample_hidden_size: int = 480
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    deepstack_encoder_layer_indexes: tuple[int, ...] = (8, 16, 24)
    chunk_frames: int | None = 400

    def __post_init__(self):
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
            self.chunk_frames is None or (self.chunk_frames > 0 and self.chunk_frames % DOWNSAMPLE_RATE == 0),
            f"chunk_frames (twice n_window) must be a positive multiple of {DOWNSAMPLE_RATE} or None, "
            f"not {self.chunk_frames}",
        )
        taps = self.deepstack_encoder_layer_indexes
        _require(
            len(set(taps)) == len(taps) and all(0 <= tap < self.encoder_layers for tap in taps),
            f"deepstack_encoder_layer_indexes must be different layers of 0..{self.encoder_layers - 1}, "
            f"not {list(taps)}",
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.encoder_attention_heads

    @property
    def stem_features(self) -> int:
        """Channels x frequencies that the conv stem hands to `stem_proj` for each token."""
        return self.downsample_hidden_size * (self.num_mel_bins // DOWNSAMPLE_RATE)


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The Qwen3 language model (`language_config`)."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 40960
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000
    initializer_range: float = 0.02

    def __post_init__(self):
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even for rotary embedding, not {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """Ids and switches of the audio span in a prompt (processor_config.json)."""

    enable_time_marker: bool = True
    audio_token_id: int = 151654
    audio_start_id: int = 151669
    audio_end_id: int = 151670


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen kernels: y = x W + scale (x A) B, A [in, rank] and B [rank, out].

    targets: globs over the paths of linear layers, such as `audio_encoder.layers.self_attn.[qkv]_proj`; the default is
        the seven projections of every layer of the language model.
    full: globs over paths of parameters that are trained whole beside the adapters, such as `audio_adapter.*` and
        `deepstack_audio_merger_list.*`. Everything else is frozen.
    int8: globs over the paths of linear layers whose frozen kernels are held in int8 while training, such as
        `language_model.layers.*_proj`; none by default.
    dropout: of the adapters' input, in training. rslora: scale by alpha / sqrt(rank) (arXiv 2312.03732).

    The public script's alpha of 2 at rank 64 scales its adapters by 1/32; the default here scales them by 1/2. Adapters
    on all layers, at ten times the learning rate of full fine-tuning, are the advice of "LoRA Without Regret" (Schulman
    et al. 2025, thinkingmachines.ai/blog/lora). The alpha itself is our choice and was not compared with others.
    """

    rank: int = 64
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = ("language_model.layers.*_proj",)
    full: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()

    def __post_init__(self):
        _require(self.rank >= 1, f"lora.rank must be 1 or more, not {self.rank}")
        _require(self.alpha > 0, f"lora.alpha must be above 0, not {self.alpha}")
        _require(0 <= self.dropout < 1, f"lora.dropout must be 0 or more and below 1, not {self.dropout}")
        _require(bool(self.targets), "lora.targets names no layers: give at least one pattern")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def trains(self, path: str) -> bool:
        """Whether a parameter belongs to the adapter: it is trained, and saved with it."""
        return path.endswith(ADAPTER_LEAVES) or matches(path, self.full)


@dataclasses.dataclass(frozen=True)
class MossAudioConfig:
    """A whole checkpoint.

    lora: adapters that the model has beside the released parameters; no released file tells of them.
    raw: the files as they were read (for a new checkpoint the 4B's), so that they can be written back equal.
    directory: where they were read from, and where the tokenizer files are; None for a new checkpoint.
    """

    audio_config: EncoderConfig = EncoderConfig()
    language_config: LanguageConfig = LanguageConfig()
    adapter_hidden_size: int = 8192
    deepstack_num_inject_layers: int | None = None
    tie_word_embeddings: bool = False
    model_type: str = "moss_audio"
    processor: ProcessorConfig = ProcessorConfig()
    eos_ids: tuple[int, ...] = (151645,)
    lora: LoraConfig | None = None
    raw: Mapping[str, dict] = dataclasses.field(
        default_factory=lambda: _read_files(to_path(__file__).parent / "released_4b"), compare=False, repr=False
    )
    directory: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        _require(
            self.model_type in MODEL_TYPES,
            f"model_type must be one of {MODEL_TYPES}, not {self.model_type!r}",
        )
        injected = self.deepstack_num_inject_layers
        _require(
            injected is None or injected >= 0,
            f"deepstack_num_inject_layers must be null or >= 0, not {injected}",
        )
        _require(
            self.num_deepstack <= self.language_config.num_hidden_layers,
            f"{self.num_deepstack} DeepStack features need as many LLM layers, "
            f"but num_hidden_layers is {self.language_config.num_hidden_layers}",
        )

    @property
    def num_deepstack(self) -> int:
        """How many encoder taps are injected into the LLM: the first ones listed, capped by the config."""
        taps = len(self.audio_config.deepstack_encoder_layer_indexes)
        return taps if self.deepstack_num_inject_layers is None else min(taps, self.deepstack_num_inject_layers)

    @classmethod
    def preset(cls, name: str) -> Self:
        """The released sizes `4b` and `8b`, or `tiny`: every part present, small enough for tests and demos."""
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
        except (MossAudioError, TypeError, ValueError, KeyError, AttributeError) as error:
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
        _require_values(processor.get("mel_config", {}), IMPLEMENTED_MEL, "processor_config.json: mel_config")
        architectures = config.get("architectures") or ["MossAudioModel"]
        _require(
            architectures in (["MossAudioModel"], ["MossMusicModel"]),
            f"the architecture must be MossAudioModel or MossMusicModel, not {architectures}",
        )
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        eos = config["language_config"].get("eos_token_id") if eos is None else eos
        return cls(
            audio_config=_read_encoder(config["audio_config"]),
            language_config=read_language(config["language_config"]),
            **_known_fields(cls, config, skip=_NOT_IN_CONFIG_JSON),
            processor=ProcessorConfig(**_known_fields(ProcessorConfig, processor)),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            raw=raw,
        )

    def to_hf(self) -> dict[str, dict]:
        """File name -> content, in the released layout.

        A key that was read is written back with today's value; a key that was absent is added only where its value is
        not the default, so files that were not changed come back equal.
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
        # Transformers 4 reads the one alone, and 5 writes the other alone.
        for rope in (language, language.get("rope_parameters")):
            if rope:
                rope["rope_theta"] = self.language_config.rope_theta
        # What the released files repeat follows its original.
        repeated = {
            "num_hidden_layers": self.language_config.num_hidden_layers,
            "vocab_size": self.language_config.vocab_size,
        }
        config.update({key: value for key, value in repeated.items() if key in config})
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
            write_whole(to_path(directory) / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# Fields of MossAudioConfig that are no keys of that file, or are read and written by themselves.
_NOT_IN_CONFIG_JSON = ("audio_config", "language_config", "processor", "eos_ids", "lora", "raw", "directory")
IMPLEMENTED_MEL = {
    "mel_sr": (16000,),
    "mel_n_fft": (400,),
    "mel_hop_length": (160,),
    "mel_dtype": ("bfloat16",),
    "use_whisper_feature_extractor": (True,),
}
# Sizes without which a language model can't be built: Qwen3's own defaults are another model's.
_LANGUAGE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
)
CONFIG_FILES = ("config.json", "processor_config.json", "generation_config.json")


def read_json(path: AnyPath) -> dict[str, Any]:
    """A JSON object from a file; anything else is an error that names the file."""
    try:
        content = json.loads(read_text(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        if what := foreign_content(path):
            raise MossAudioError(f"{path} is {what}") from error
        if isinstance(error, PermissionError):
            raise MossAudioError(f"{path} can't be read ({error.strerror}): ask its owner for access") from error
        raise MossAudioError(f"{path} can't be read as JSON ({error}): fetch the file again") from error
    if not isinstance(content, dict):
        raise MossAudioError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def _read_files(directory: Path) -> dict[str, dict]:
    files = {name: file_in(directory, name) for name in CONFIG_FILES}
    return {name: read_json(file) for name, file in files.items() if exists(file)}


def _require_values(content: Mapping, allowed: Mapping[str, tuple], where: str) -> None:
    """Every key of `allowed` that is present holds one of the values this port implements."""
    for key, values in allowed.items():
        if key in content and content[key] not in values:
            expected = " or ".join(map(repr, values))
            raise MossAudioError(f"{where}.{key} is {content[key]!r}, and this port implements {expected} only")


_JSON_TYPES = {int: (int,), int | None: (int,), float: (int, float), bool: (bool,), str: (str,)}


def _known_fields(cls: type, content: Mapping, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of `cls` that `content` holds, their types checked; null is as good as absent."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in skip}
    found = {name: content[name] for name in fields if content.get(name) is not None}
    for name, value in found.items():
        expected = _JSON_TYPES.get(fields[name].type)  # sequences are read by their callers
        # Python counts True among the integers.
        if expected and (not isinstance(value, expected) or isinstance(value, bool) != (expected == (bool,))):
            raise MossAudioError(f"{name} must be of type {expected[-1].__name__}, not {value!r}")
    return found


def _write_fields(instance: Any, content: dict, skip: tuple[str, ...]) -> None:
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if field.name not in skip and (field.name in content or value != field.default):
            content[field.name] = list(value) if isinstance(value, tuple) else value


def _read_encoder(content: dict) -> EncoderConfig:
    allowed = {"activation_function": ("gelu",), "downsample_rate": (DOWNSAMPLE_RATE,)}
    _require_values(content, allowed, "audio_config")
    fields = _known_fields(EncoderConfig, content, skip=("chunk_frames",))
    fields["deepstack_encoder_layer_indexes"] = tuple(content.get("deepstack_encoder_layer_indexes", (8, 16, 24)) or ())
    n_window = content.get("n_window", 200)
    return EncoderConfig(**fields, chunk_frames=None if n_window is None else 2 * n_window)


def read_language(content: dict, where: str = "language_config") -> LanguageConfig:
    """A Qwen3 configuration, MOSS-Audio's inner one or a stock file's; `where` it stands is for errors."""
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
    _require(
        set(content.get("layer_types") or []) <= {"full_attention"},
        f"{where}.layer_types must be full_attention throughout, not {content.get('layer_types')}",
    )
    # Transformers 5 moves rope_theta into rope_parameters.
    rope = content.get("rope_parameters") or {"rope_theta": content.get("rope_theta")}
    _require_values(rope, {"rope_type": ("default",)}, f"{where}.rope_parameters")
    unknown = sorted(set(rope) - {"rope_type", "rope_theta"})
    _require(not unknown, f"{where}.rope_parameters has {unknown}, which this port does not implement")
    thetas = [each["rope_theta"] for each in (rope, content) if each.get("rope_theta") is not None]
    _require(
        len(set(thetas)) < 2,
        f"{where}.rope_parameters has the rope_theta {thetas[0]} and {where} itself {thetas[-1]}: correct the one that "
        "the model was not trained with",
    )
    fields: dict[str, Any] = _known_fields(LanguageConfig, content) | {"rope_theta": thetas[0] if thetas else None}
    if content.get("head_dim", 0) is None:  # null in some Qwen configs: derived
        fields["head_dim"] = content["hidden_size"] // content["num_attention_heads"]
    missing = [key for key in _LANGUAGE_KEYS if fields.get(key) is None]
    _require(not missing, f"{where} lacks {', '.join(missing)}")
    return LanguageConfig(**fields)


PRESETS: dict[str, dict[str, Any]] = {
    "4b": {"deepstack_num_inject_layers": 3},
    "8b": {
        "language_config": LanguageConfig(hidden_size=4096, intermediate_size=12288),
        "deepstack_num_inject_layers": 3,
    },
    # Learns sound scenes from nothing in minutes on two CPU cores.
    "small": {
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
