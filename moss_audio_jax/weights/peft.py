"""Adapters of LoRA in PEFT's layout: adapter_config.json and adapter_model.safetensors.

A training run writes the same adapter_config.json, so one file describes every adapter. PEFT itself is not needed.
"""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from moss_audio_jax.config import LoraConfig, MossAudioConfig
from moss_audio_jax.errors import MossAudioError, shown
from moss_audio_jax.lora import linear_layers
from moss_audio_jax.model import MossAudio
from moss_audio_jax.schema import SWITCH, Rule, check_keys, integer, number
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import AnyPath, atomic_write, exists, file_in, to_path
from moss_audio_jax.weights.locate import ADAPTER_CONFIG, ADAPTER_FILE
from moss_audio_jax.weights.names import adapter_leaves, released_leaves
from moss_audio_jax.weights.recognition import not_an_adapter
from moss_audio_jax.weights.safetensors_reader import SafetensorsCheckpoint

# Keys that don't change what an adapter computes, and keys that are read below. Every other key, also one of a later
# version of PEFT, must be null, false or empty.
_HARMLESS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version")
_HARMLESS += ("qalora_group_size", "revision", "task_type")
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules")
_READ += ("modules_to_save", "bias", "init_lora_weights")
# Other initializers change the weights of the base before training begins.
_INITIALIZERS = (True, False, "gaussian", "orthogonal")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable()


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in value)


_NAMES = Rule("a list of the names of modules", _is_names)
_NAMES_OR_EXPRESSION = Rule("a list of the names of modules, or one expression", lambda x: _is_name(x) or _is_names(x))
_VALUES = {
    "r": integer(1, 2**20),
    "lora_alpha": number(1e-9, 1e9),
    "lora_dropout": number(0, 1, below=True),
    "use_rslora": SWITCH,
    "target_modules": _NAMES_OR_EXPRESSION,
    "exclude_modules": _NAMES_OR_EXPRESSION,
    "modules_to_save": _NAMES,
}
_MATCHING_SECONDS = 10


class PeftAdapter(SafetensorsCheckpoint):
    """An adapter's directory, whose headers have been checked. config: of the base model.

    `self.config` is that with the adapter's `lora`. Raises MossAudioError with all tensors that are missing, surplus or
    of another shape.
    """

    def __init__(self, directory: AnyPath, config: MossAudioConfig):
        self.config = adapted_config(directory, config)
        if not exists(to_path(directory) / ADAPTER_FILE):
            raise MossAudioError(not_an_adapter(directory, is_model=False))
        super().__init__(directory, adapter_leaves(self.config), tied=False, single_file=ADAPTER_FILE)


def adapted_config(directory: AnyPath, config: MossAudioConfig) -> MossAudioConfig:
    """Returns a model's configuration with the `lora` that a directory's adapter_config.json describes."""
    path = file_in(directory, ADAPTER_CONFIG)
    try:
        lora = _read_lora(read_json(path), config)
    except MossAudioError as error:
        raise type(error)(f"{path}: {error}") from error
    return dataclasses.replace(config, lora=lora)


def write_adapter_config(
    directory: AnyPath, config: MossAudioConfig, base: str | None, revision: str | None = None
) -> None:
    """Writes adapter_config.json, for PEFT and for `adapted_config`.

    base: the path of the model, or its name on the hub, and there the revision.
    """
    assert config.lora is not None
    lora, released = config.lora, released_leaves(config)
    saved = {name.rpartition(".")[0] for path, leaf in released.items() if lora.trains(path) for name in leaf.names}
    targets = [path.removesuffix(".lora_a") for path in adapter_leaves(config) if path.endswith(".lora_a")]
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    content = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": lora.rank,
        # An expression: names in a list match by their ends, and other parts have projections of the same names.
        "target_modules": "|".join(_expression(target, released) for target in targets),
        "task_type": None,
        "use_rslora": lora.rslora,
    }
    if revision is not None:
        content["revision"] = revision
    atomic_write(to_path(directory) / ADAPTER_CONFIG, json.dumps(content, indent=2, sort_keys=True))


def _expression(layer: str, released: dict[str, Any]) -> str:
    """Returns an expression that matches a linear layer's released names, in all layers."""
    name = released[f"{layer}.kernel"].names[0].rpartition(".")[0]
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))


def _read_lora(content: dict[str, Any], config: MossAudioConfig) -> LoraConfig:
    if content.get("peft_type") != "LORA":
        raise MossAudioError(f"peft_type is {shown(content.get('peft_type'))}, and this port reads LORA only")
    bias, initializer = content.get("bias", "none"), content.get("init_lora_weights", True)
    if bias != "none" or initializer not in _INITIALIZERS:
        raise MossAudioError(
            f"bias is {shown(bias)} and init_lora_weights {shown(initializer)}; this port "
            f"reads bias 'none' and {', '.join(map(repr, _INITIALIZERS))}: convert the adapter to plain LoRA with PEFT"
        )
    unknown = {key: value for key, value in content.items() if value and key not in _HARMLESS + _READ}
    if unknown:
        named = ", ".join(f"{shown(key)} {shown(value)}" for key, value in list(unknown.items())[:5])
        raise MossAudioError(f"{named}: this port reads plain LoRA only, the same in all layers of a stack")
    content = {key: value for key, value in content.items() if key not in _VALUES or value not in (None, [], "")}
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in content]
    if missing:
        raise MossAudioError(f"it lacks {', '.join(missing)}: fetch the file again")
    check_keys(content, _VALUES, ADAPTER_CONFIG)
    saved = content.get("modules_to_save", [])
    layers, leaves = _modules(dataclasses.replace(config, lora=None))
    names = sorted({name for modules in leaves.values() for name in modules})
    excluded, targeted = (_names_module(content.get(key, []), names) for key in ("exclude_modules", "target_modules"))

    def is_target(module: str) -> bool:
        whole = any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved)  # PEFT takes names for expressions
        return targeted(module) and not excluded(module) and not whole

    def is_saved(module: str) -> bool:
        # The module itself, or one that it is inside of.
        parts = module.split(".")
        return any(".".join(parts[:end]).endswith(name) for name in saved for end in range(1, len(parts) + 1))

    return LoraConfig(
        rank=content["r"],
        alpha=content["lora_alpha"],
        dropout=content.get("lora_dropout", 0.0),
        rslora=content.get("use_rslora", False),
        targets=tuple(layer for layer in layers if _all_or_none(is_target, leaves[f"{layer}.kernel"])),
        full=tuple(path for path, modules in leaves.items() if _all_or_none(is_saved, modules)),
    )


@functools.lru_cache(maxsize=8)
def _modules(config: MossAudioConfig) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Returns the paths of layers that can have adapters, and path -> released modules of every parameter."""
    layers = linear_layers(nnx.eval_shape(lambda: MossAudio(config, rngs=nnx.Rngs(0))))
    leaves = {path: [name.rpartition(".")[0] for name in leaf.names] for path, leaf in released_leaves(config).items()}
    return tuple(layers), leaves


def _names_module(names: str | Sequence[str], modules: Sequence[str]) -> Callable[[str], bool]:
    """Selects modules by PEFT's rule: a string is an expression for whole names, a list holds names or their ends."""
    if names == "all-linear":
        return lambda module: True
    if isinstance(names, str):
        return _matching(names, tuple(modules)).__contains__
    return lambda module: any(module == name or module.endswith(f".{name}") for name in names)


@functools.lru_cache(maxsize=64)
def _matching(expression: str, modules: tuple[str, ...]) -> frozenset[str]:
    """Returns the modules whose whole names match; raises MossAudioError for an invalid or a slow expression."""
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise MossAudioError(
            f"target_modules or exclude_modules is {shown(expression)}, which is no expression ({error}): fetch the "
            "file again"
        ) from error
    if _is_quick(expression):
        return frozenset(filter(compiled.fullmatch, modules))
    # Nested repetitions can take years, and nothing in this process can interrupt them: match in another process.
    program = (
        "import json, re, sys; e, n = json.load(sys.stdin); json.dump([x for x in n if re.fullmatch(e, x)], sys.stdout)"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    text = json.dumps([expression, modules])
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_MATCHING_SECONDS, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise MossAudioError(
            f"target_modules or exclude_modules is {shown(expression)}, which takes more than {_MATCHING_SECONDS} s to "
            "match: give the names of the modules as a list"
        ) from error
    return frozenset(json.loads(done.stdout))


def _is_quick(expression: str) -> bool:
    """True if no group is repeated, and little else: matching then takes milliseconds."""
    pieces = [expression] if "(" in expression else expression.split("|")
    return not re.search(r"\)[*+?{]|\\\d", expression) and all(len(re.findall(r"[*+{]", each)) <= 3 for each in pieces)


def _all_or_none(chosen: Callable[[str], bool], modules: list[str]) -> bool:
    found = [module for module in modules if chosen(module)]
    if found and len(found) < len(modules):
        missing = next(module for module in modules if not chosen(module))
        raise MossAudioError(
            f"it has {found[0]} but not {missing}, and layers are stacked here: an adapter has all of them or none"
        )
    return bool(found)
