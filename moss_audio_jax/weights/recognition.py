"""Messages for a path that is not the checkpoint it was given for: what is there, and what to do."""

import difflib
import fnmatch
import shlex

from moss_audio_jax.storage.foreign_files import SOUND, foreign_content
from moss_audio_jax.storage.hub import HubName, hub_name
from moss_audio_jax.storage.paths import AnyPath, Path, children, exists, reason, to_path

RELEASED_NAMES = tuple(f"MOSS-Audio-{size}-{kind}" for size in ("4B", "8B") for kind in ("Instruct", "Thinking"))
OWNER = "OpenMOSS-Team"
MODEL = "a released MOSS-Audio directory, one that `moss-audio-convert to-orbax` wrote, or a training run"
ADAPTER = "the directory of an adapter: PEFT's, one of `moss-audio-convert from-peft`, or a training run of LoRA"

# Pattern of a file -> what to do about a directory that holds one; the first match counts.
_PICKLE = "a pickle of PyTorch, which is never read here: load it in PyTorch and save it with "
_PICKLE += "`save_pretrained(..., safe_serialization=True)`, or fetch safetensors"
_ADAPTERS = (
    ("adapter_model.bin", _PICKLE),
    ("adapter_model.safetensors", "the weights of an adapter, and no adapter_config.json: fetch that file too"),
)
_SOUNDS = "*.wav|*.mp3|*.flac|*.ogg|*.m4a|*.opus"
_CONTENTS = (
    *_ADAPTERS,
    (
        "*.safetensors",
        "which nothing leads to: a model is model.safetensors, or shards and their model.safetensors.index.json; fetch "
        "what is missing, or rename the file if it holds the whole model",
    ),
    ("*.bin|*.pt|*.pth|*.ckpt|*.pkl", _PICKLE),
    ("*.gguf", "weights for llama.cpp, which this port does not read: fetch safetensors"),
    (_SOUNDS, "a sound, and no model: give the model first, then the clips"),
)


def not_a_model(path: AnyPath, wanted: str = MODEL) -> str:
    """Says why a path is no checkpoint. wanted: what to give instead."""
    path = to_path(path)
    try:
        if not exists(path):
            return _nothing_there(path, wanted)
        return _a_directory(path, wanted) if path.is_dir() else _a_file(path, wanted)
    except OSError as error:
        return f"{path} can't be read ({reason(error)}): give {wanted}"


def not_an_adapter(path: AnyPath, is_model: bool) -> str:
    """Says why a path is no LoRA adapter. is_model: a whole model is there instead."""
    if is_model:
        return f"{path} holds a model and no LoRA adapter: give {ADAPTER}"
    names = [entry.name for entry in children(path)]
    for pattern, what in _ADAPTERS:
        if pattern in names:
            return f"{path} holds {pattern}, {what}"
    if "adapter_config.json" in names:
        return f"{path} holds adapter_config.json and no adapter_model.safetensors: fetch that file too"
    if names:
        return f"{path} holds no adapter_config.json: give {ADAPTER}"
    return not_a_model(path, ADAPTER)


def nearest(path: Path) -> Path | None:
    """Returns the path that exists and whose name differs from a missing one by little, if there is one."""
    there = path
    while not exists(there.parent) and there.parent != there.parent.parent:
        there = there.parent
    close = difflib.get_close_matches(there.name, [entry.name for entry in children(there.parent)], n=1, cutoff=0.7)
    return meant if close and exists(meant := there.parent / close[0] / path.relative_to(there)) else None


def _nothing_there(path: Path, wanted: str) -> str:
    meant = nearest(path)
    if hub_name(path) is not None:
        found = f"did you mean {meant}? Or," if meant else f"give {wanted}; or,"
        return f"{path} does not exist in {path.parent}: {found} for the Hugging Face hub's model {path}, {path}@main"
    if meant is not None:
        return f"{path} does not exist: did you mean {meant}?"
    if str(path) in RELEASED_NAMES:
        return (
            f"{path} does not exist on this machine: give {OWNER}/{path}, which is fetched from the Hugging Face hub, "
            f"or run `{HubName(f'{OWNER}/{path}').command}`"
        )
    return f"{path} does not exist: give {wanted}"


def _a_file(path: Path, wanted: str) -> str:
    what = foreign_content(path)
    if what == SOUND or _matching([path.name.lower()], _SOUNDS):
        return f"{path} is a sound: give {'the model first, then the clips' if wanted == MODEL else wanted}"
    if what:
        return f"{path} is {what}"
    if path.suffix == ".safetensors":
        return f"{path} is a file of weights: give the directory that holds it and its config.json"
    return f"{path} is a file: give {wanted}"


def _a_directory(path: Path, wanted: str) -> str:
    entries = children(path)
    names = [entry.name for entry in entries]
    if "adapter_config.json" in names:
        return (
            f"{path} holds a LoRA adapter and no model: give its model, and the adapter as --adapter; or merge the "
            f"two first with `moss-audio-convert to-hf {shlex.quote(str(path))} MERGED --base MODEL`"
        )
    if "snapshots" in names and (snapshots := children(path / "snapshots")):
        return f"{path} is a repository of the Hugging Face cache: give its snapshot {snapshots[-1]}"
    for pattern, what in _CONTENTS:
        if found := _matching(names, pattern):
            return f"{path} holds {found[0]}, {what}"
    inside = [entry for entry in entries if entry.is_dir() and exists(entry / "config.json")]
    if inside and "config.json" not in names:
        return f"{path} holds no model itself: did you mean {inside[0]}?"
    holds = "holds neither params/ nor model.safetensors nor model.safetensors.index.json" if entries else "is empty"
    return f"{path} {holds}: give {wanted}"


def _matching(names: list[str], patterns: str) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split("|"))]
