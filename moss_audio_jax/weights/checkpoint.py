"""Weights on disk and onto devices.

An Orbax checkpoint of ours is a directory with `params/` (the stacked tree) beside the released configuration and
tokenizer files. `load_model` reads that, the newest checkpoint of a training run, or a released PyTorch directory.
"""

import dataclasses
import fnmatch
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from moss_audio_jax.config import CONFIG_FILES, MossAudioConfig
from moss_audio_jax.errors import MossAudioError, StorageError, shown
from moss_audio_jax.int8 import int8_kernels
from moss_audio_jax.model import MossAudio, adapter_specs, parameter_specs
from moss_audio_jax.schema import SWITCH, TEXT, Rule, check_keys, integer, none_or
from moss_audio_jax.sharding import automatic, check_heads, named_sharding
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import (
    AnyPath,
    Path,
    absolute,
    children,
    exists,
    file_in,
    is_inside,
    is_plain_name,
    to_path,
    url,
)
from moss_audio_jax.storage.retries import is_transient, retried, summary
from moss_audio_jax.weights.peft import ADAPTER_CONFIG, PeftAdapter, adapted_config, base_of
from moss_audio_jax.weights.recognition import not_a_model, not_an_adapter
from moss_audio_jax.weights.released import (
    INDEX_FILE,
    SAFETENSORS_DTYPES,
    SINGLE_FILE,
    ReleasedCheckpoint,
    SafetensorsCheckpoint,
)

Result = TypeVar("Result")

PARAMS = "params"
# A training run has many checkpoints, each with `params/`, and one directory of the files that go with all of them.
RUN_CHECKPOINTS, RUN_MODEL = "checkpoints", "model"
RUN_BEST = "best"  # of a run's checkpoint: which one was the best before its own evaluation
RUN_BEST_FILE = "best.json"  # of a run: which one is the best by its last evaluation
RUN_EMA = "ema"  # of a run's checkpoint: moving averages of its trained parameters, laid out like those
# What travels beside the weights and the configuration, where it is there; names or patterns of them.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "chat_template*",
)


def load_model(path: AnyPath, *, dtype: Any = None, mesh: Mesh | None = None) -> MossAudio:
    """The model of a checkpoint, its parameters on their devices.

    path: an Orbax directory of `python -m convert to-orbax`; the directory of a training run, whose newest checkpoint
        is taken, one of its checkpoints, or `best` or `ema` in it (see `orbax_paths`); a released PyTorch directory,
        which has to be on a disk of this machine, while the others may be on gs://; or an adapter of LoRA, for which
        the model is read that it was made for.
    dtype: of the parameters and so of the computation; None takes bfloat16 on accelerators and float32 on the CPU,
        where bfloat16 is slow.
    mesh: each parameter is cut by its logical axes (`sharding.RULES`); None puts all on the first device.
    From Orbax each device's shard is read straight onto it. A released directory is read one stacked parameter at a
    time, so the host holds at most the largest one.
    """
    if is_adapter(path):
        return load_adapter(load_model(base_directory(path), dtype=dtype, mesh=mesh), path)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    dtype = _compute_dtype(dtype)
    if layout_of(path) == "orbax":
        config = MossAudioConfig.from_hf(files_directory(path))
        return build_model(config, restore(path, config, abstract_parameters(config, dtype, mesh)))
    released = ReleasedCheckpoint(path)
    return build_model(released.config, assemble(released, abstract_parameters(released.config, dtype, mesh)))


def _compute_dtype(dtype: Any) -> np.dtype:
    """One that the model computes in, from its name or type."""
    names = ("bfloat16", "float16", "float32", *(["float64"] if jax.config.read("jax_enable_x64") else []))
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in names:
        raise MossAudioError(f"dtype must be one of {', '.join(names)}, not {dtype!r}")
    return found


def load_adapter(model: MossAudio, path: AnyPath) -> MossAudio:
    """The model with an adapter of LoRA: a directory of PEFT's, one of `convert from-peft`, or a training run.

    All arrays but the adapter's are the given model's own, so any number of adapters can be at hand:

        models = {name: load_adapter(base, path) for name, path in adapters.items()}
        generate(models["events"], inputs)

    Adapters of equal configuration share their compiled programs.
    """
    if model.config.lora is not None:
        raise MossAudioError(f"{path}: the model has an adapter already; load this one onto the model without it")
    require_adapter(path)
    config = adapted_config(files_directory(path), model.config)
    parameters = parameters_of(model)
    norm = parameters["language_model.norm.scale"]
    mesh: Any = norm.sharding.mesh if isinstance(norm.sharding, NamedSharding) else None
    names = adapter_specs(config)
    wanted = {name: leaf for name, leaf in abstract_parameters(config, norm.dtype, mesh).items() if name in names}
    if orbax_paths(path) is None:
        adapter = assemble(PeftAdapter(path, model.config), wanted)
    else:
        adapter = restore(path, config, wanted)
    return build_model(config, parameters | adapter)


def merge_adapter(model: MossAudio) -> MossAudio:
    """A model of the same outputs without adapters: kernels W + scale A B, summed in float32 and rounded once.

    The given model stays as it is, so kernels that have adapters are in memory twice.
    """
    lora = model.config.lora
    if lora is None:
        raise MossAudioError("the model has no adapter to merge: load one with load_adapter")
    parameters = parameters_of(model)
    if int8_kernels(parameters):
        raise MossAudioError(
            "the model's kernels are int8, as in training: load its base by load_model, and the adapter onto that"
        )
    for path in list(parameters):
        if path.endswith(".lora_a"):
            layer, a = path.removesuffix(".lora_a"), parameters.pop(path)
            kernel, b = parameters[f"{layer}.kernel"], parameters.pop(f"{layer}.lora_b")
            parameters[f"{layer}.kernel"] = _merged(kernel, a, b, lora.scale)
    return build_model(dataclasses.replace(model.config, lora=None), parameters)


@functools.partial(jax.jit, static_argnums=3)
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    def merge(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    # Layer by layer, lest the float32 sum of a whole stack be held.
    return merge(kernel, a, b) if kernel.ndim == 2 else jax.lax.map(lambda layer: merge(*layer), (kernel, a, b))


def is_adapter(path: AnyPath) -> bool:
    """Whether a directory holds an adapter of LoRA, in whatever layout, rather than a whole model."""
    return exists(files_directory(path) / ADAPTER_CONFIG)


def base_directory(adapter: AnyPath) -> Path:
    """Where the model lies that an adapter was made for."""
    base = base_of(files_directory(adapter))
    if base is None or not to_path(base).is_dir():
        raise MossAudioError(
            f"{adapter} holds an adapter for {base or 'a model that it does not name'}, which is no directory here: "
            "name the model's directory, and the adapter beside it (generate MODEL --adapter, convert --base)"
        )
    if is_adapter(base):
        raise MossAudioError(
            f"{adapter} names {base} as its model, which holds an adapter itself: merge that one with `python -m "
            "convert to-hf`, and name the model's directory and the adapter beside it"
        )
    return to_path(base)


def require_adapter(path: AnyPath) -> None:
    """Raises MossAudioError, with what is there instead, for a path that holds no adapter of LoRA."""
    if not is_adapter(path):
        raise MossAudioError(not_an_adapter(path, orbax_paths(path) is not None or is_released(path)))


def processor_directories(path: AnyPath) -> tuple[Path, Path]:
    """Where the tokenizer files and the configuration of a checkpoint are: an adapter may have its model's."""
    own = files_directory(path)
    configured, tokenized = (
        any(exists(own / name) for name in names) for names in (CONFIG_FILES[:1], ("vocab.json", "tokenizer.json"))
    )
    if configured and tokenized:
        return own, own
    if not is_adapter(path):
        layout_of(path)  # says what is there instead of a checkpoint
        return own, own
    base = files_directory(base_directory(path))
    return own if tokenized else base, own if configured else base


def layout_of(path: AnyPath) -> Literal["orbax", "released"]:
    """How a checkpoint directory is laid out; anything else is an error."""
    if orbax_paths(path) is not None:
        return "orbax"
    if is_released(path):
        return "released"
    if (to_path(path) / RUN_CHECKPOINTS).is_dir():
        raise MossAudioError(f"{path} is a training run without a checkpoint so far: wait until it has saved one")
    raise MossAudioError(not_a_model(path))


@dataclasses.dataclass(frozen=True)
class OrbaxPaths:
    """Where an Orbax checkpoint's tree lies, and the directory of its configuration and tokenizer files.

    averages: a tree of some of the parameters, which stand for those of the same names.
    """

    params: Path
    files: Path
    averages: Path | None = None


def orbax_paths(path: AnyPath) -> OrbaxPaths | None:
    """Of a directory that `convert to-orbax` wrote, a training run or one of its checkpoints; else None.

    RUN/best stands for the run's best checkpoint, though no directory has that name.
    `ema` in a run, a checkpoint or RUN/best stands for the same with the moving averages of what was trained.
    """
    path = to_path(path)
    if path.name == RUN_EMA and not (path / PARAMS).is_dir() and (averaged := orbax_paths(path.parent)) is not None:
        return _with_averages(averaged, path)
    if (path / PARAMS).is_dir():
        of_run = absolute(path).parent.parent / RUN_MODEL
        in_run = absolute(path).parent.name == RUN_CHECKPOINTS and of_run.is_dir()
        return OrbaxPaths(path / PARAMS, of_run if in_run else path)
    newest = _newest_checkpoint(path)
    if newest is not None:
        return OrbaxPaths(newest / PARAMS, path / RUN_MODEL)
    run = absolute(path).parent
    if path.name == RUN_BEST and (run / RUN_CHECKPOINTS).is_dir():
        return OrbaxPaths(_best_checkpoint(run) / PARAMS, run / RUN_MODEL)
    return None


def _with_averages(paths: OrbaxPaths, path: Path) -> OrbaxPaths:
    averages = paths.params.parent / RUN_EMA
    if not averages.is_dir():
        raise MossAudioError(
            f"{path}: {paths.params.parent} holds no moving averages, which a run keeps with --optimizer.ema-decay: "
            "name the run or the checkpoint itself"
        )
    return dataclasses.replace(paths, averages=averages)


def _newest_checkpoint(run: Path) -> Path | None:
    steps = sorted(int(entry.name) for entry in children(run / RUN_CHECKPOINTS) if entry.name.isdecimal())
    for step in reversed(steps):
        checkpoint = run / RUN_CHECKPOINTS / str(step)
        # One that is being written has its name already where nothing can be renamed.
        if checkpoint.is_dir() and ocp.utils.is_checkpoint_finalized(absolute(checkpoint)):
            return checkpoint
    return None


def _best_checkpoint(run: Path) -> Path:
    newest = _newest_checkpoint(run)
    best = newest and _best_evaluation(run, newest)
    if not best or best["step"] is None:
        raise MossAudioError(
            f"{run} does not know its best checkpoint, since it trained without loop.best_metric or has not evaluated "
            "yet: name the run, whose newest is taken, or one of its checkpoints"
        )
    checkpoint = run / RUN_CHECKPOINTS / str(best["step"])
    if not checkpoint.is_dir():
        raise MossAudioError(
            f"{run}: its best checkpoint by {best['metric']} is that of step {best['step']}, which is not there: name "
            f"another in {RUN_CHECKPOINTS}/"
        )
    return checkpoint


def _best_evaluation(run: Path, newest: Path) -> dict[str, Any] | None:
    """JSON of the best evaluation, by the run's own file or by its newest checkpoint.

    That file is not there in runs of older versions, and is ahead if newer checkpoints have been taken away.
    """
    file = run / RUN_BEST_FILE
    if file.exists() and ((best := read_best(file))["evaluated"] or 0) <= int(newest.name):
        return best
    file = newest / RUN_BEST / "metadata"  # as Orbax calls JSON
    return read_best(file) if exists(file) else None


_STEP = none_or(integer(0, 2**63 - 1))


def read_best(file: Path) -> dict[str, Any]:
    """JSON of a best evaluation; raises MossAudioError where a step is no number: it names a directory."""
    best = read_json(file)
    TEXT.check(f"{file}: metric", best.get("metric"))
    for name in ("step", "evaluated"):
        _STEP.check(f"{file}: {name}", best.get(name))
    return {"step": None, "evaluated": None} | best


def files_directory(path: AnyPath) -> Path:
    """The directory of a checkpoint's configuration and tokenizer files: its own, except in a training run."""
    paths = orbax_paths(path)
    return to_path(path) if paths is None else paths.files


def is_released(path: AnyPath) -> bool:
    return any(exists(to_path(path) / name) for name in (INDEX_FILE, SINGLE_FILE))


def abstract_parameters(
    config: MossAudioConfig, dtype: Any, mesh: Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, dtype and sharding of every parameter: what a restore is asked for.

    Raises MossAudioError for a mesh that would cut a dimension, or the attention's heads, into unequal parts.
    """
    if mesh is not None:
        language = config.language_config
        check_heads(
            mesh,
            heads_of_the_encoder=config.audio_config.encoder_attention_heads,
            heads_of_queries=language.num_attention_heads,
            heads_of_keys=language.num_key_value_heads,
        )
        mesh = automatic(mesh)

    def sharding(path: str, spec: nnx.Variable) -> Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return named_sharding(path, spec.shape, spec.get_metadata("logical_axes"), mesh)

    specs = parameter_specs(config).items()
    return {path: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding(path, spec)) for path, spec in specs}


def parameters_of(model: MossAudio) -> dict[str, jax.Array]:
    """A model's parameters by path; the arrays are not copied."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def build_model(config: MossAudioConfig, parameters: dict[str, Any]) -> MossAudio:
    """A model around given parameters, by path; nothing is initialised."""
    model = nnx.eval_shape(lambda: MossAudio(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    flat = {path: spec.replace(parameters[".".join(map(str, path))]) for path, spec in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def save_model(model: MossAudio, path: AnyPath, *, tokenizer: AnyPath | None = None) -> None:
    """Writes parameters, configuration and tokenizer files, for `load_model` and `load_processor`.

    path: must be new or empty. tokenizer: a checkpoint whose tokenizer files are copied; None takes the one that the
    model was loaded from, if it is still there. A model that was not loaded has none.
    Raises MossAudioError for a model that could not be loaded again: with an adapter, or kernels in int8.
    """
    if model.config.lora is not None:
        raise MossAudioError(f"{path}: a model with an adapter can't be saved whole; merge it with merge_adapter first")
    parameters = parameters_of(model)
    others = [f"{name} {leaf.dtype}" for name, leaf in parameters.items() if leaf.dtype not in _STORABLE]
    others += sorted(parameters.keys() - parameter_specs(model.config).keys())
    if others:
        raise MossAudioError(
            f"{path}: a saved model has floating-point parameters of its configuration alone, not "
            f"{', '.join(others[:5])}; load its base by load_model, and save that"
        )
    path = absolute(path)
    require_empty(path)
    path.mkdir(parents=True, exist_ok=True)
    source = model.config.directory if tokenizer is None else tokenizer
    if source is not None:
        copy_tokenizer(source, path)
    model.config.save_hf(path)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / PARAMS, unflatten(parameters))


_STORABLE = frozenset(SAFETENSORS_DTYPES.values())


def require_empty(path: AnyPath) -> None:
    """Refuses a target that holds something: nothing is ever overwritten."""
    path = to_path(path)
    if path.exists() and (not path.is_dir() or children(path)):
        raise MossAudioError(f"{path} already exists and is not an empty directory: name a new one, or remove it first")


def companion_files(checkpoint: AnyPath) -> list[Path]:
    """The configuration files and then the tokenizer files of a checkpoint."""
    directory = files_directory(checkpoint)
    return _plain_files(directory, CONFIG_FILES) + tokenizer_files(directory)


def tokenizer_files(checkpoint: AnyPath) -> list[Path]:
    return _plain_files(files_directory(checkpoint), TOKENIZER_FILES)


def copy_tokenizer(source: AnyPath, target: AnyPath) -> None:
    """Copies a checkpoint's tokenizer files, byte for byte."""
    for file in tokenizer_files(source):
        file.copy(to_path(target) / file.name, overwrite=True)


def _plain_files(directory: AnyPath, patterns: Iterable[str]) -> list[Path]:
    there = children(directory)
    files = [file for pattern in patterns for file in there if fnmatch.fnmatchcase(file.name, pattern)]
    for file in files:
        file_in(directory, file.name)
        if not file.is_file():
            raise MossAudioError(f"{file} must be a file, but is none: remove it, or copy the file itself there")
    return files


def _require_inside(params: Path) -> None:
    """Refuses a tree of which something is a link to outside of the checkpoint's directory, or the run's."""
    directory = absolute(params).parent
    root = directory.parent.parent if directory.parent.name == RUN_CHECKPOINTS else directory
    for parent, directories, files in os.walk(params):  # gs:// has no links, and this finds nothing there
        for path in (parent, *(os.path.join(parent, name) for name in directories + files)):
            if not is_inside(root, path):
                raise MossAudioError(
                    f"{path} is a link to outside of {root}, which nothing of a checkpoint may be: copy what it "
                    "names there (`cp -rL`)"
                )


def stored_shapes(params: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Path -> shape and dtype of what an Orbax directory holds; no tensor is read."""
    _require_inside(params)

    def read() -> Any:
        _check_tree(params)
        # Asked first, because Orbax reports damage here by a traceback of its event loop.
        ts.KvStore.open({"driver": "ocdbt", "base": f"{url(params)}/"}).result().list().result()
        return ocp.PyTreeCheckpointHandler().metadata(absolute(params))

    try:
        metadata = retried(params, read)
        return flatten(metadata.tree, lambda leaf: (tuple(leaf.shape), np.dtype(leaf.dtype)))
    except MossAudioError:
        raise
    except FileNotFoundError as error:
        raise MossAudioError(f"{params} is no Orbax checkpoint, or an unfinished one: convert it again") from error
    except DAMAGE as error:
        raise _damaged(params, error) from error


# What Orbax and TensorStore raise for files that hold something else than they expect.
DAMAGE = (
    *(ValueError, OSError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError),
    *(NotImplementedError, RecursionError),  # of an unknown kind of sharding; of metadata that nests deeply
)


def _damaged(params: Path, error: BaseException) -> MossAudioError:
    return MossAudioError(f"{params} can't be read, its files are damaged ({summary(error)}): convert it again")


def _check_tree(params: Path) -> None:
    """Raises MossAudioError unless Orbax's description of a tree is one, whose names are plain.

    Orbax makes paths of them.
    """
    file = params / "_METADATA"
    if not exists(file):
        raise MossAudioError(f"{params} is no Orbax checkpoint, or an unfinished one: convert it again")
    content = read_json(file)
    check_keys(content, {"use_ocdbt": Rule("true", lambda value: value is True), "use_zarr3": SWITCH}, str(file))
    tree = content.get("tree_metadata")
    if not isinstance(tree, dict) or not tree:
        raise MossAudioError(f"{file}: tree_metadata must name parameters, not be {shown(tree)}: convert it again")
    for name, leaf in tree.items():
        keys = leaf.get("key_metadata") if isinstance(leaf, dict) else None
        if not isinstance(keys, list) or not all(
            isinstance(key, dict) and is_plain_name(key.get("key")) for key in keys
        ):
            raise MossAudioError(
                f"{file}: {shown(name)} must have plain names as keys, not {shown(keys)}: convert it again"
            )


def check_stored(params: Path, config: MossAudioConfig) -> None:
    """Compares what an Orbax directory holds with its configuration; raises with all differences.

    With LoRA it holds the adapter alone.
    """
    stored = stored_shapes(params)
    specs = parameter_specs(config) if config.lora is None else adapter_specs(config)
    expected = {path: spec.shape for path, spec in specs.items()}
    problems = [f"{path} is missing" for path in expected.keys() - stored.keys()]
    problems += [f"{path} is not part of this model" for path in stored.keys() - expected.keys()]
    problems += [
        f"{path} has shape {stored[path][0]}, config.json makes it {shape}"
        for path, shape in expected.items()
        if path in stored and stored[path][0] != shape
    ]
    problems += [
        f"{path} is of type {dtype}, which is no floating-point type that this port reads"
        for path, (_, dtype) in stored.items()
        if dtype not in SAFETENSORS_DTYPES.values()
    ]
    if problems:
        raise MossAudioError(f"{params} does not fit its config.json: {'; '.join(sorted(problems)[:20])}")


def restore(path: AnyPath, config: MossAudioConfig, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters that `abstract` names, of an Orbax checkpoint whose configuration is `config`."""
    paths = orbax_paths(path)
    assert paths is not None
    check_stored(paths.params, config)
    if paths.averages is None:
        return _restore(absolute(paths.params), abstract)
    averaged = stored_shapes(paths.averages).keys() & abstract.keys()
    rest = {name: leaf for name, leaf in abstract.items() if name not in averaged}
    found = _restore(absolute(paths.averages), {name: abstract[name] for name in averaged})
    return found | (_restore(absolute(paths.params), rest) if rest else {})


def _restore(params: Path, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Those parameters of an Orbax directory that has been checked."""
    target = unflatten(abstract)
    # Unlimited, a restore holds the whole checkpoint a second time; less than the largest leaf is refused by Orbax.
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=max(1.0, 1.01 * largest / 1e9))
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )

    def read() -> dict[str, Any]:
        with ocp.Checkpointer(handler) as checkpointer:
            return flatten(checkpointer.restore(params, args=arguments))

    try:
        return retried_alone(params, read)
    except MossAudioError:
        raise
    except Exception as error:
        # Orbax raises what TensorStore says of a chunk once more, as a plain Exception.
        damage = error.__cause__ if type(error) is Exception else error
        if not isinstance(damage, DAMAGE):
            raise
        raise MossAudioError(
            f"{params} can't be restored, its files are damaged ({summary(damage)}): convert or copy it again, or take "
            "another checkpoint of the run"
        ) from error


def retried_alone(path: AnyPath, work: Callable[[], Result]) -> Result:
    """`retried`, but once by each of several processes, which wait for each other at every turn of Orbax."""
    if jax.process_count() == 1:
        return retried(path, work)
    try:
        return work()
    except Exception as error:
        if not is_transient(error):
            raise
        raise StorageError(
            f"{path}: storage failed for a moment ({summary(error)}); run the same command again"
        ) from error


def assemble(released: SafetensorsCheckpoint, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters that `abstract` names, one after the other."""
    return {path: _place(released, path, leaf) for path, leaf in abstract.items()}


def _place(released: SafetensorsCheckpoint, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    host = released.assemble(path, leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: host[index])


def flatten(tree: dict[str, Any], convert: Callable[[Any], Any] = lambda leaf: leaf) -> dict[str, Any]:
    """Nested dicts to one dict by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {".".join(key.key for key in path): convert(leaf) for path, leaf in leaves}


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
