"""Memory and estimated speed of a recipe: its real program, compiled for a TPU on any machine.

topology   "v5p:4x4x4" or "v5p-128": libtpu compiles the step for those chips; no TPU is needed
memory     as the compiler allocates it: exact for this program
traffic    collectives of the compiled program, counted once per execution
FLOPs      computed from the model (`flops`), since XLA counts the body of a loop once
time, MFU  an estimate (`estimate`), and its calibration by measurements of similar models (`calibration`)
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.generation import MIN_NEW_TOKENS, decode_answers, make_drawing, prefill_prompts
from moss_audio_jax.inputs import ModelInputs
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from train.batch import abstract_batch
from train.config import RunConfig
from train.data import TrainingBatch
from train.initialization import frozen_dtypes
from train.planning.calibration import calibrated
from train.planning.chips import GIB, Chip, chip_of
from train.planning.compilation import Compiled, compile_for_memory
from train.planning.estimate import Slice, by_kind, speed
from train.planning.flops import Content, forward_flops, moved_bytes, recomputed_flops, step_flops
from train.planning.interconnect import slice_shape
from train.planning.topology import shown_topology
from train.state import TrainState, abstract_state
from train.step import train_step


def with_sizes(
    config: RunConfig, model: str | None, slices: int, batch: int | None, tokens: int | None, chunks: int | None
) -> RunConfig:
    """Returns the recipe with these sizes. With `tokens` alone, chunks are scaled in proportion."""
    data = config.data
    if tokens is not None:
        chunks = math.ceil(data.chunks * tokens / data.tokens) if chunks is None else chunks
        data = dataclasses.replace(data, tokens=tokens)
    if batch is not None:
        data = dataclasses.replace(data, batch_size=batch)
    if chunks is not None:
        data = dataclasses.replace(data, chunks=chunks)
    if model is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, preset=model))
    if slices > 1:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, replica=slices))
    return dataclasses.replace(config, data=data)


def plan_step(config: RunConfig, devices: Sequence[Any], segments: int = 1) -> dict[str, Any]:
    """Compiles a training step for devices; returns its report, ready for JSON. segments: see `report_step`."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    return report_step(config, mesh, compile_step(config, config.model_config(), mesh), segments)


def compile_step(config: RunConfig, model: MossAudioConfig, mesh: Mesh) -> Compiled:
    """Compiles a run's training step for a mesh. model: the run's, or one that no preset has."""
    data = config.data
    batch = abstract_batch(
        model, data.batch_size, data.tokens, data.chunks, microbatches=config.microbatches, mesh=mesh
    )
    graphdef = nnx.split(build_model(model, dict(abstract_parameters(model, jnp.float32))))[0]
    with jax.set_mesh(mesh):
        state = planned_state(config, mesh, model)
        return compile_for_memory(train_step.trace(graphdef, config.step, config.optimizer, state, batch), mesh)


def planned_state(config: RunConfig, mesh: Mesh, model: MossAudioConfig | None = None) -> TrainState:
    """Returns the abstract, sharded state of a run. model: default: the run's."""
    model = model or config.model_config()
    dtypes = frozen_dtypes(config, abstract_parameters(model, jnp.float32))
    return abstract_state(model, config.optimizer, frozen_dtypes=dtypes, mesh=mesh)


def report_step(config: RunConfig, mesh: Mesh, compiled: Compiled, segments: int = 1) -> dict[str, Any]:
    """Returns the report of a compiled training step.

    segments: number of equally long segments packed into a sequence. Attention within segments lowers model FLOPs; the
        attention kernel still computes whole sequences.
    """
    model, data, state, place = config.model_config(), config.data, planned_state(config, mesh), slice_of(mesh)
    # FLOPs and memory traffic: `whole` is executed, `packed` is useful.
    whole = Content(
        tokens=data.batch_size * data.tokens,
        chunks=data.batch_size * data.chunks,
        attention_pairs=data.batch_size * data.tokens**2,
    )
    packed = dataclasses.replace(whole, attention_pairs=whole.attention_pairs / segments)
    again = recomputed_flops(model, whole, state.trainable, config.step.remat)
    executed = step_flops(model, whole, state.trainable)
    moved = moved_bytes(
        model,
        whole,
        state.trainable,
        config.step.remat,
        microbatches=config.microbatches,
        data_parallel=mesh.size // mesh.shape["tensor"],
        tensor=mesh.shape["tensor"],
    )
    # HBM by kind; master parameters are float32.
    masters, optimizer = bytes_on_chip(state.trainable), bytes_on_chip((state.moments, state.ema))
    gradients = masters * jnp.dtype(config.step.gradient_dtype).itemsize // 4
    by_kind = {
        "parameters": masters + bytes_on_chip(state.frozen),
        "optimizer": optimizer,
        "gradients": gradients,
    }
    # Traffic of the update. Gradients: read and written for each microbatch, read for the norm and for the update.
    # Masters: read for the cast and for the update, and written. Moments and EMA: read and written.
    updated = (2 * config.microbatches + 2) * gradients + 3 * masters + 2 * optimizer
    estimate = speed(
        place,
        compiled.collectives,
        model_flops=step_flops(model, packed, state.trainable),
        executed_flops={part: flops + again[part] for part, flops in executed.items()},
        moved=moved,
        updated=updated,
    )
    return {
        "mode": "train",
        "parameters": sum(leaf.size for leaf in (state.trainable | state.frozen).values()),
        "mesh": dict(mesh.shape),
        "sequences": data.batch_size,
        "sequences_per_chip": data.batch_size / mesh.size,
        "tokens_per_sequence": data.tokens,
        "segments_per_sequence": segments,
        "chunks_per_sequence": data.chunks,
        **memory(compiled, place.chip, by_kind),
        "recomputed_flops": sum(again.values()),
        **estimate,
        **calibrated(place.chip, estimate["estimated_mfu"]),
    }


def plan_generation(
    model: MossAudioConfig, devices: Sequence[Any], *, tensor: int, prompts: int, slots: int, chunks: int
) -> dict[str, Any]:
    """Compiles generation in bfloat16, with int8 kernels if the model has them; returns its report.

    The programs are prefill of the prompts, and decoding with a full KV cache.
    slots: tokens of a prompt and its answer together, the length of the KV cache.
    """
    mesh = make_mesh(fsdp=-1, tensor=tensor, devices=devices)
    parameters = abstract_parameters(model, jnp.bfloat16, mesh)
    inputs = one_batch(model, prompts, slots - MIN_NEW_TOKENS, chunks, mesh).inputs
    answering = nnx.split(build_model(model, dict(parameters)))
    prefill, decode, cache = compile_answering(*answering, inputs, MIN_NEW_TOKENS, model.eos_ids, mesh)
    return report_generation(model, mesh, prefill, decode, prompts=prompts, slots=slots, chunks=chunks, cache=cache)


def one_batch(model: MossAudioConfig, sequences: int, tokens: int, chunks: int, mesh: Mesh) -> TrainingBatch:
    """`abstract_batch` without microbatches."""
    batch = abstract_batch(model, sequences, tokens, chunks, mesh=mesh)
    return jax.tree.map(lambda x: x.update(shape=x.shape[1:], sharding=_without_first_axis(x.sharding)), batch)


def compile_answering(
    graphdef: nnx.GraphDef, state: nnx.State, inputs: ModelInputs, new_tokens: int, eos_ids: tuple[int, ...], mesh: Mesh
) -> tuple[Compiled, Compiled, int]:
    """Compiles prefill and decoding; returns both, and the bytes of the KV cache on one device."""
    drawing = make_drawing(inputs.tokens.shape[0], Sampling(), eos_ids, new_tokens)
    with jax.set_mesh(mesh):
        reading = prefill_prompts.trace(graphdef, state, inputs, drawing.fill, new_tokens)
        prefill = compile_for_memory(reading, mesh)
        if prefill.problem is not None:
            return prefill, prefill, 0
        # Decoding takes the outputs of prefill with their shardings.
        loop = jax.tree.map(placed, reading.out_info, prefill.outputs)
        decode = compile_for_memory(decode_answers.trace(graphdef, state, None, loop, drawing, new_tokens), mesh)
    return prefill, decode, bytes_on_chip((loop.cache.keys, loop.cache.values))


def report_generation(
    model: MossAudioConfig,
    mesh: Mesh,
    prefill: Compiled,
    decode: Compiled,
    *,
    prompts: int,
    slots: int,
    chunks: int,
    cache: int,
) -> dict[str, Any]:
    """Returns the report of generation from its compiled programs. cache: bytes of the KV cache on one device."""
    place, prompt = slice_of(mesh), slots - MIN_NEW_TOKENS
    parameters = abstract_parameters(model, jnp.bfloat16, mesh)
    weights = bytes_on_chip(parameters)
    worst = max((prefill, decode), key=lambda compiled: (compiled.problem is not None, compiled.total))
    content = Content(prompts * prompt, prompts * chunks, prompts * prompt**2)
    flops = forward_flops(model, content)
    data_parallel, tensor = mesh.size // mesh.shape["tensor"], mesh.shape["tensor"]
    moved = moved_bytes(model, content, (), data_parallel=data_parallel, tensor=tensor)
    return {
        "mode": "generate",
        "parameters": sum(leaf.size for leaf in parameters.values()),
        "mesh": dict(mesh.shape),
        "sequences": prompts,
        "sequences_per_chip": prompts / mesh.size,
        "tokens_per_sequence": slots,
        "chunks_per_sequence": chunks,
        **memory(worst, place.chip, {"parameters": weights, "cache": cache}),
        "recomputed_flops": 0.0,
        **speed(place, prefill.collectives, model_flops=flops, executed_flops=flops, moved=moved),
        "decode_temporary_bytes_per_chip": decode.temporaries,
        "decode_collectives": by_kind(decode.collectives),
        # Each step reads all weights and the whole cache once.
        "estimated_decode_seconds_per_token": (weights + cache) / (place.share * place.chip.hbm_bandwidth),
    }


def plan_load(model: MossAudioConfig, devices: Sequence[Any], *, tensor: int) -> dict[str, Any]:
    """Returns the report of `load_model` in bfloat16. Nothing is compiled: each device reads its own shards.

    The field host_bytes is the size of the shards of one host's chips, which pass through its memory.
    """
    mesh = make_mesh(fsdp=-1, tensor=tensor, devices=devices)
    parameters = abstract_parameters(model, jnp.bfloat16, mesh)
    on_chip, chip = bytes_on_chip(parameters), _chip(devices)
    sizes = sorted(((bytes_on_chip(leaf), f"{path} {leaf.shape}") for path, leaf in parameters.items()), reverse=True)
    fits = on_chip <= chip.usable_hbm_bytes
    problem = None if fits else "the parameters alone are larger than the memory"
    return {
        "mode": "load",
        "parameters": sum(leaf.size for leaf in parameters.values()),
        "mesh": dict(mesh.shape),
        **memory(Compiled(problem, on_chip, 0, 0, tuple(sizes[:8]), (), 0.0), chip, {"parameters": on_chip}),
        "host_bytes": on_chip * sum(device.process_index == devices[0].process_index for device in devices),
    }


def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """Returns an abstract array with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _without_first_axis(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def bytes_on_chip(tree: Any) -> int:
    """Sums the bytes of the leaves' shards on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def unused_bytes(parameters: Any, compiled: Compiled) -> int:
    """Bytes of the parameters (a program's first argument) that it does not use, though they are on the chip."""
    if compiled.inputs is None:
        return 0
    unused = jax.tree.map(lambda leaf, place: leaf if place is None else None, parameters, compiled.inputs[0][0])
    return bytes_on_chip(unused)


def _chip(devices: Sequence[Any]) -> Chip:
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise MossAudioError(
            f"no peak and bandwidth are known of {devices[0].device_kind!r}: add it to train/planning/chips.py"
        )
    return chip


def slice_of(mesh: Mesh) -> Slice:
    """Returns the `Slice` of a mesh. The first slice's devices come first, since a slice holds whole replicas."""
    devices = list(mesh.devices.flat)
    first = [device for device in devices if getattr(device, "slice_index", 0) == getattr(devices[0], "slice_index", 0)]
    coordinates = tuple(tuple(device.coords) for device in first)
    return Slice(_chip(devices), slice_shape(first), coordinates, len(devices), devices[0].num_cores)


def memory(compiled: Compiled, chip: Chip, by_kind: dict[str, int]) -> dict[str, Any]:
    """Returns the fields of a report about memory. by_kind: bytes on a chip of what is known by name."""
    rest = compiled.total - compiled.code - sum(by_kind.values())
    by_kind |= {"temporaries": max(rest, 0), "code": compiled.code}  # temporaries include the batch
    return {
        "fits": compiled.problem is None,
        "problem": compiled.problem,
        "hbm_bytes_per_chip": compiled.total,
        "hbm_usable_bytes_per_chip": chip.usable_hbm_bytes,
        "hbm_bytes_by_kind": by_kind,
        "largest_buffers": [{"bytes": size, "shapes": shapes} for size, shapes in compiled.largest],
        "compile_seconds": round(compiled.seconds, 1),
    }


def alternatives(config: RunConfig, chips: int) -> Iterator[tuple[str, RunConfig]]:
    """Yields changes that need less memory, the mildest first: command-line options and the changed recipe."""
    said: dict[str, Any] = {}
    if config.step.remat not in ("full", "offload"):
        said["--step.remat"] = "full"
        config = dataclasses.replace(config, step=dataclasses.replace(config.step, remat="full"))
        yield _written(said), config
    sequences, parts = config.data.batch_size // config.microbatches, chips // max(config.mesh.tensor, 1)
    while sequences % (2 * parts) == 0:
        sequences //= 2
        said["--microbatches"] = config.data.batch_size // sequences
        config = dataclasses.replace(config, microbatches=said["--microbatches"])
        yield _written(said), config
    fewer = config.data.batch_size
    while fewer % (2 * parts) == 0:
        fewer //= 2
        data = dataclasses.replace(config.data, batch_size=fewer)
        remat = {name: value for name, value in said.items() if name == "--step.remat"}
        yield _written(remat | {"--batch-size": fewer}), dataclasses.replace(config, data=data, microbatches=1)
    if config.step.remat != "offload":
        offloaded = dataclasses.replace(config.step, remat="offload")
        yield _written(said | {"--step.remat": "offload"}), dataclasses.replace(config, step=offloaded)
    for tensor in (2, 4):
        if chips % tensor == 0:
            mesh = dataclasses.replace(config.mesh, tensor=tensor)
            yield _written(said | {"--mesh.tensor": tensor}), dataclasses.replace(config, mesh=mesh)


def _written(options: dict[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in options.items())


def what_would_fit(config: RunConfig, devices: Sequence[Any]) -> str | None:
    """Compiles `alternatives` in turn; returns the options of the first one that fits, or None."""
    for option, changed in alternatives(config, len(devices)):
        print(f"does not fit; trying {option}", file=sys.stderr)
        if plan_step(changed, devices)["fits"]:
            return option
    return None


def largest_batch(config: RunConfig, used: int, usable: int, compiled: Callable[[int], int | None]) -> int:
    """Returns the largest batch that fits, among doublings of the recipe's batch, which itself fits.

    used, usable: bytes per chip of the recipe's batch, and available. compiled: bytes per chip of a batch, None if it
    does not fit. The doubled batch gives the bytes of each further sequence; the batch predicted from that is
    compiled, then smaller ones until one fits.
    """
    first = config.data.batch_size
    second = compiled(2 * first)
    if second is None:
        return first
    steps = 1
    while used + (second - used) * (2 ** (steps + 1) - 1) <= usable and second > used:
        steps += 1
    while steps > 1 and compiled(first * 2**steps) is None:
        steps -= 1
    return first * 2**steps


def propose_batch(config: RunConfig, devices: Sequence[Any], report: dict[str, Any]) -> int:
    """Finds the largest batch of a recipe that fits, given its own report; see `largest_batch`."""

    def compiled(batch: int) -> int | None:
        print(f"trying --batch {batch}", file=sys.stderr)
        data = dataclasses.replace(config.data, batch_size=batch)
        larger = plan_step(dataclasses.replace(config, data=data), devices)
        return larger["hbm_bytes_per_chip"] if larger["fits"] else None

    return largest_batch(config, report["hbm_bytes_per_chip"], report["hbm_usable_bytes_per_chip"], compiled)


def plan_table(report: dict[str, Any]) -> str:
    """Formats a report as text."""
    gib = {kind: size / GIB for kind, size in report["hbm_bytes_by_kind"].items()}
    used, usable = report["hbm_bytes_per_chip"] / GIB, report["hbm_usable_bytes_per_chip"] / GIB
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    topology = f"{shown_topology(report['topology'])}, {report['chips']} chips ({mesh})"
    lines = [f"{topology}, compiled in {report['compile_seconds']} s"]
    if "sequences" in report:
        packed = report.get("segments_per_sequence", 1)
        lines += [
            f"{report['sequences']} sequences of {report['tokens_per_sequence']} tokens"
            f"{f' in {packed} segments' if packed > 1 else ''} and "
            f"{report['chunks_per_sequence']} chunks of audio: {report['sequences_per_chip']:g} a chip"
        ]
    lines += [f"{'FITS' if report['fits'] else 'DOES NOT FIT'}: {used:.2f} of {usable:.2f} GiB of HBM a chip"]
    lines += [f"  {kind:<14}{size:8.2f} GiB" for kind, size in gib.items()]
    if not report["fits"]:
        lines += ["largest buffers:"]
        lines += [f"  {row['bytes'] / GIB:8.2f} GiB  {row['shapes'][:90]}" for row in report["largest_buffers"]]
    if "would_fit" in report:
        lines += [f"would fit: {report['would_fit'] or 'nothing that was tried; take more chips'}"]
    if "largest_batch" in report:
        lines += [f"largest batch that fits: {report['largest_batch']}"]
    if "evaluation" in report:
        lines += _evaluation(report["evaluation"])
    if "slots" in report:
        programs = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report["hbm_bytes_by_program"].items())
        lines += [f"{report['slots']} slots of {report['max_length']} tokens; GiB by program, without code: {programs}"]
    if report["mode"] == "load":
        return "\n".join([*lines, f"{report['host_bytes'] / GIB:.2f} GiB pass through a host"])
    total = report["model_flops"]
    lines += [f"model FLOPs {total:.3e}; {report['recomputed_flops'] / total:.0%} of that recomputed to save memory"]
    lines += [f"  {part:<14}{flops / total:8.1%}" for part, flops in report["model_flops_by_part"].items()]
    lines += ["collectives, a step:"]
    lines += [
        f"  {kind:<26}{sums['count']:6.0f}  {sums['bytes'] / GIB:9.2f} GiB, a chip sends "
        f"{sums['sent_bytes_per_chip'] / GIB:.2f}"
        for kind, sums in report["collectives"].items()
    ]
    lines += _estimate(report)
    if "rollout" in report:
        lines += _rollout(report)
    if "estimated_decode_seconds_per_token" in report:
        seconds = report["estimated_decode_seconds_per_token"]
        speed_of_all = report.get("slots", report.get("sequences")) / seconds
        lines += [f"ESTIMATE: {1000 * seconds:.1f} ms a token with full caches, {speed_of_all:,.0f} tokens/s in all"]
    return "\n".join(lines)


def _evaluation(report: dict[str, Any]) -> list[str]:
    used, usable = report["hbm_bytes_per_chip"] / GIB, report["hbm_usable_bytes_per_chip"] / GIB
    by_program = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report["hbm_bytes_by_program"].items())
    lines = [
        f"its evaluation {'FITS' if report['fits'] else 'DOES NOT FIT'}: {used:.2f} of {usable:.2f} GiB "
        f"({by_program}); {report['prompts']} questions at once, of up to {report['prompt_tokens']} tokens and "
        f"{report['prompt_chunks']} chunks, answers of up to {report['new_tokens']} tokens"
    ]
    if "would_fit" in report:
        lines += [f"would fit: {report['would_fit'] or 'no smaller batch; leave --validation.every out'}"]
    return lines


def _rollout(report: dict[str, Any]) -> list[str]:
    half, usable = report["rollout"], report["hbm_usable_bytes_per_chip"] / GIB
    by_program = ", ".join(f"{name} {size / GIB:.2f}" for name, size in half["hbm_bytes_by_program"].items())
    return [
        f"its answers {'FIT' if half['fits'] else 'DO NOT FIT'}: {half['hbm_bytes_per_chip'] / GIB:.2f} of "
        f"{usable:.2f} GiB a chip, {half['state_bytes_per_chip'] / GIB:.2f} of them the state; {half['answers']} "
        f"answers in {half['slots']} slots of {half['max_length']} tokens; GiB by program, without code: {by_program}",
        f"ESTIMATE of a step whose answers all have their most tokens: {report['estimated_rollout_half_seconds']:.1f} "
        f"s of answers ({half['estimated_prompt_seconds']:.1f} s of them for prompts), "
        f"{report['estimated_update_half_seconds']:.1f} s of {report['updates']} updates",
    ]


def _estimate(report: dict[str, Any]) -> list[str]:
    assumed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report["assumptions"].items())
    seconds = {
        "computing": report["estimated_compute_seconds"],
        "updating": report["estimated_update_seconds"],
        "communicating": report["estimated_communication_seconds"],
    }
    if between := report["estimated_seconds_between_slices"]:
        seconds["of that between slices"] = between
    parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    mfu = f"MFU {report['estimated_mfu']:.1%}"
    if "calibrated_mfu" in report:
        least, most = report["calibrated_mfu"]
        mfu += f", calibrated {least:.0%} to {most:.0%}"
    return [f"ESTIMATE: {report['estimated_step_seconds']:.2f} s a step ({parts}), {mfu}; assumed: {assumed}"]
