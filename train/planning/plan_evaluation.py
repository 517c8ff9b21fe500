"""Memory of a run's own evaluations beside its state: their programs, compiled for a TPU like the step (`plan`).

    peak = state + batches + copies in the compute dtype + code + the worst program's temporaries, prompts and cache

A parameter that already has the compute dtype, or is int8, is not copied and counts once.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moss_audio_jax.sharding import make_mesh, num_parts
from moss_audio_jax.weights.parameters import build_model
from train.batch import abstract_batch
from train.config import RunConfig
from train.evaluation.answers import whole_batch
from train.optimizer import Parameters
from train.planning.compilation import Compiled, compile_for_memory
from train.planning.plan import bytes_on_chip, compile_answering, one_batch, planned_state, unused_bytes
from train.running.validation import EvaluationShapes, evaluation_shapes, questions_and_texts
from train.step import in_compute_dtype, validation_sums

BATCHES_ON_DEVICES = 3  # the previous step's, and those prefetched by `Prefetched`


def plan_evaluation(config: RunConfig, devices: Sequence[Any], step: dict[str, Any]) -> dict[str, Any]:
    """Returns the report of an evaluation, ready for JSON. `would_fit` is a smaller batch, if this one does not fit.

    step: the report of the training step, which fits. Raises MossAudioError if data can't be read.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    parts = num_parts("batch", mesh)
    items = questions_and_texts(config)[0]
    report = _report(config, mesh, evaluation_shapes(config, parts, items), step)
    if report["fits"]:
        return report
    for batch in _smaller_batches(max(report["prompts"], report["sequences"]), parts):
        print(f"the evaluation does not fit; trying --validation.batch-size {batch}", file=sys.stderr)
        smaller = dataclasses.replace(config, validation=dataclasses.replace(config.validation, batch_size=batch))
        if _report(smaller, mesh, evaluation_shapes(smaller, parts, items), step)["fits"]:
            return report | {"would_fit": f"--validation.batch-size {batch}"}
    return report | {"would_fit": None}


def _smaller_batches(batch: int, parts: int) -> Iterator[int]:
    """Yields halved batches, down to one question per data-parallel device."""
    while batch > parts:
        batch = whole_batch(batch // 2, parts)
        yield batch


def _report(config: RunConfig, mesh: Mesh, shapes: EvaluationShapes, step: dict[str, Any]) -> dict[str, Any]:
    model, data, state = config.model_config(), config.data, planned_state(config, mesh)
    evaluated = (state.ema or state.trainable) | state.frozen
    dtypes = jax.eval_shape(partial(in_compute_dtype, config=config.step), evaluated)
    copies = {path: leaf.update(dtype=dtypes[path].dtype) for path, leaf in evaluated.items()}
    shared = [leaf for path, leaf in copies.items() if leaf.dtype == evaluated[path].dtype]
    batch = abstract_batch(
        model, data.batch_size, data.tokens, data.chunks, microbatches=config.microbatches, mesh=mesh
    )
    # Present during every program: the state, the copies in the compute dtype, and the training batches.
    beside = bytes_on_chip(state) - bytes_on_chip(shared) + BATCHES_ON_DEVICES * bytes_on_chip(batch)

    programs = _compiled(config, copies, shapes, mesh)
    # All programs stay loaded, including the step's.
    code = step["hbm_bytes_by_kind"]["code"] + sum(compiled.code for compiled, _ in programs.values())
    needed = {
        name: beside + code + compiled.total - compiled.code + unused for name, (compiled, unused) in programs.items()
    }
    usable, peak = step["hbm_usable_bytes_per_chip"], max(needed.values())
    return {
        "fits": peak <= usable and all(compiled.problem is None for compiled, _ in programs.values()),
        "hbm_bytes_per_chip": peak,
        "hbm_usable_bytes_per_chip": usable,
        "hbm_bytes_by_program": needed,
        **shapes._asdict(),
        "compile_seconds": round(sum(compiled.seconds for compiled, _ in programs.values()), 1),
    }


def _compiled(
    config: RunConfig, copies: Parameters, shapes: EvaluationShapes, mesh: Mesh
) -> dict[str, tuple[Compiled, int]]:
    """Compiles the programs of `Validation.ask`; returns each with the bytes of parameters that it does not use."""
    model, data = config.model_config(), config.data
    graphdef, state = nnx.split(build_model(model, dict(copies)))
    batch = one_batch(model, shapes.sequences, data.tokens, data.chunks, mesh)
    with jax.set_mesh(mesh):
        loss = compile_for_memory(validation_sums.trace(graphdef, config.step, copies, batch), mesh)
    inputs = one_batch(model, shapes.prompts, shapes.prompt_tokens, shapes.prompt_chunks, mesh).inputs
    inputs = dataclasses.replace(inputs, audio_chunks=inputs.audio_chunks.update(dtype=jnp.float32))
    prefill, decode, _ = compile_answering(graphdef, state, inputs, shapes.new_tokens, model.eos_ids, mesh)
    return {
        "loss": (loss, unused_bytes(copies, loss)),
        "prefill": (prefill, unused_bytes(state, prefill)),
        "decode": (decode, unused_bytes(state, decode)),
    }
