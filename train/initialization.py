"""The parameters that a run starts from: a part of the model from each checkpoint that is named, the rest random.

    checkpoint       all that no other option gives
    encoder          the audio encoder alone; neither the adapter nor the DeepStack mergers
    language_model   the language model and its head, of MOSS-Audio or of stock Qwen3

Every parameter is made or read where it will lie, in the dtype it will have, and nothing is made that is read.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moss_audio_jax.config import ADAPTER_LEAVES, MODEL_TYPES, EncoderConfig, LanguageConfig, MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.int8 import int8_kernels
from moss_audio_jax.model import MossAudio, parameter_specs
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.weights.checksums import none_in
from moss_audio_jax.weights.locate import locate
from moss_audio_jax.weights.names import EMBEDDING
from moss_audio_jax.weights.orbax import restore
from moss_audio_jax.weights.parameters import abstract_parameters, parameters_of
from moss_audio_jax.weights.quantized import Wanted, read_parameters
from moss_audio_jax.weights.safetensors_reader import Qwen3Checkpoint, ReleasedCheckpoint, assemble
from train.config import GIVES, ModelSource, RunConfig
from train.optimizer import Parameters, is_frozen

HEAD_PATH = "lm_head.kernel"
# A part may differ in these from the model it becomes part of: its parameters mean the same. (Dropout is the run's
# choice, the taps are the mergers' affair, Qwen3's longest position limits nothing here.)
UNCOMPARED = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "deepstack_encoder_layer_indexes",
    "max_position_embeddings",
    "initializer_range",
)


def frozen_dtypes(config: RunConfig, paths: Iterable[str]) -> dict[str, str]:
    """Returns the dtype of each of these parameters that is frozen: int8 or the compute dtype. Masters are float32."""
    frozen = [path for path in paths if is_frozen(path, config.optimizer.freeze, config.lora)]
    return dict.fromkeys(frozen, config.step.compute_dtype) | dict.fromkeys(int8_kernels(frozen), "int8")


def require_no_random_frozen(config: RunConfig, model: MossAudioConfig) -> None:
    """Raises MossAudioError if no checkpoint gives a frozen parameter, unless that is allowed."""
    if config.lora is not None and config.model.checkpoint is None:
        raise MossAudioError("--lora adapts a checkpoint: name it with --init or --model.checkpoint")
    config.model.require_given(frozen_dtypes(config, parameter_specs(model)))


def first_parameters(
    source: ModelSource,
    config: MossAudioConfig,
    *,
    dtypes: Mapping[str, Any] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Parameters:
    """All parameters by path, each on its devices.

    config: `model_config(source)`, perhaps with LoRA. dtypes: by path; float32 where nothing is said.
    Kernels with scales (`lora.int8`) become int8 as they come, one by one, from the dtype of their scales.
    Of a safetensors directory the host holds one stacked parameter at a time; from Orbax each device's shard is read
    straight onto it. A random parameter depends on the seed and the configuration alone: neither on the mesh nor on
    what else is read.
    Raises MossAudioError, before any parameter is read, for a part of other sizes than `config` with all differences,
    and for a directory whose files don't fit its own configuration.
    """
    unread = abstract_parameters(config, jnp.float32, mesh)
    unread |= {path: unread[path].update(dtype=jnp.dtype(dtype)) for path, dtype in (dtypes or {}).items()}
    paths = list(unread)
    parts = _open_parts(source)
    _check_parts(parts, config)
    parameters: Parameters = {}
    for part in parts:
        given = [path for path in unread if path.startswith(part.prefixes) and not path.endswith(ADAPTER_LEAVES)]
        read = functools.partial(_read, part)
        parameters |= read_parameters(read, {path: unread.pop(path) for path in given})
    if unread:
        parameters |= read_parameters(lambda wanted: random_parameters(config, wanted, seed), unread)
    return {path: parameters[path] for path in paths}


def random_parameters(config: MossAudioConfig, wanted: Wanted, seed: int) -> Parameters:
    """These parameters of the random model of a seed; XLA drops the others from the program."""

    def make() -> Parameters:
        parameters = parameters_of(MossAudio(config, rngs=nnx.Rngs(seed)))
        return {path: parameters[path].astype(leaf.dtype) for path, leaf in wanted.items()}

    return jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in wanted.items()})()


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters that one checkpoint gives.

    option: of ModelSource. prefixes: of the parameters' paths. tied: the head is the embedding.
    audio_config, language_config: what they must agree with the model in. read: parameters of the checkpoint.
    """

    option: str
    directory: str
    prefixes: tuple[str, ...]
    audio_config: EncoderConfig | None
    language_config: LanguageConfig | None
    tied: bool
    read: Callable[[Wanted], Parameters]


def _open_parts(source: ModelSource) -> list[Part]:
    """Those that a run names, a parameter belonging to the first that has it; headers are read and no tensors."""
    parts = []
    if source.encoder is not None:
        part = _open_moss_audio("encoder", source.encoder, GIVES["encoder"], source.verify)
        parts.append(dataclasses.replace(part, language_config=None))
    if source.language_model is not None:
        parts.append(_open_language_model(source.language_model, source.verify))
    if source.checkpoint is not None:
        parts.append(_open_moss_audio("checkpoint", source.checkpoint, GIVES["checkpoint"], source.verify))
    return parts


def _open_language_model(directory: str, verify: bool) -> Part:
    prefixes = GIVES["language_model"]
    checkpoint = locate(directory)
    checkpoint.layout()
    config = checkpoint.files / "config.json"
    kind = read_json(config).get("model_type") if config.exists() else None
    if kind not in (None, "qwen3", *MODEL_TYPES):
        raise MossAudioError(
            f"model.language_model {directory} holds a model of type {kind!r}: give a MOSS-Audio checkpoint, or one "
            "of Qwen3 (model_type 'qwen3')"
        )
    if kind != "qwen3":
        part = _open_moss_audio("language_model", directory, prefixes, verify)
        return dataclasses.replace(part, audio_config=None)
    if verify:
        raise none_in(checkpoint.path)
    qwen3 = Qwen3Checkpoint(checkpoint.path)
    read = functools.partial(assemble, qwen3)
    return Part("language_model", directory, prefixes, None, qwen3.config, qwen3.tied, read)


def _open_moss_audio(option: str, directory: str, prefixes: tuple[str, ...], verify: bool) -> Part:
    checkpoint = locate(directory)
    if checkpoint.is_adapter:
        raise MossAudioError(
            f"--model.{option.replace('_', '-')} {directory} holds an adapter, not a model: merge it with "
            "`moss-audio-convert to-hf`"
        )
    if checkpoint.layout() == "orbax":
        config = MossAudioConfig.from_hf(checkpoint.files)
        read = functools.partial(restore, checkpoint, config, verify=verify)
    elif verify:
        raise none_in(checkpoint.path)
    else:
        released = ReleasedCheckpoint(checkpoint.path)
        config, read = released.config, functools.partial(assemble, released)
    return Part(
        option, directory, prefixes, config.audio_config, config.language_config, config.tie_word_embeddings, read
    )


def _check_parts(parts: list[Part], config: MossAudioConfig) -> None:
    """Compares what every part says of itself with the model; raises with all differences."""
    problems = []
    for part in parts:
        found = _differences(part.audio_config, config.audio_config)
        found += _differences(part.language_config, config.language_config)
        if part.language_config is not None and config.tie_word_embeddings and not part.tied:
            found.append("tie_word_embeddings is False where the model has True")
        problems += [f"model.{part.option} {part.directory}: {difference}" for difference in found]
    if problems:
        raise MossAudioError(
            f"the parts don't make one model: {'; '.join(problems)}; choose model.preset or model.checkpoint of the "
            "parts' sizes, or other parts"
        )


def _differences(part: Any, model: Any) -> list[str]:
    if part is None:
        return []
    names = [field.name for field in dataclasses.fields(part) if field.name not in UNCOMPARED]
    return [
        f"{name} is {getattr(part, name)} where the model has {getattr(model, name)}"
        for name in names
        if getattr(part, name) != getattr(model, name)
    ]


def _read(part: Part, wanted: Wanted) -> Parameters:
    """A part's parameters; a head that the checkpoint does not have starts as the embedding that it is tied to."""
    head = wanted.get(HEAD_PATH)
    if head is None or not part.tied:
        return part.read(wanted)
    parameters = part.read({path: leaf for path, leaf in wanted.items() if path != HEAD_PATH})
    # Read once more, since one may be frozen, in bfloat16, and the other not.
    embedding = part.read({EMBEDDING: wanted[EMBEDDING].update(dtype=head.dtype)})[EMBEDDING]
    return parameters | {HEAD_PATH: jax.jit(jnp.transpose, out_shardings=head.sharding)(embedding)}
