"""Memory and estimated speed of an `Engine`: its programs, compiled for a TPU like a training step (`plan`).

    peak = weights + answers (the caches of all slots) + code + the temporaries and results of the worst program

Prompts are read in programs of several sizes, of which the largest is compiled here; its code counts for each of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.generation import GREEDY, MIN_EOS_IDS, Drawing, decode_answers
from moss_audio_jax.inference.slots import empty_slots, insert, prompt_shapes, read_prompts
from moss_audio_jax.inference.thinking import HAND_OVER
from moss_audio_jax.sampling import SamplingArrays
from moss_audio_jax.sharding import num_parts
from moss_audio_jax.steering import Steering
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from train.planning.compilation import Compiled, compile_for_memory
from train.planning.estimate import by_kind, speed
from train.planning.flops import Content, forward_flops, moved_bytes
from train.planning.plan import bytes_on_chip, memory, one_batch, placed, slice_of, unused_bytes


def plan_serving(
    model: MossAudioConfig, mesh: Mesh, *, slots: int, length: int, kv_int8: bool = False
) -> dict[str, Any]:
    """Compiles an engine's programs in bfloat16, with int8 kernels if the model has them; returns the report.

    slots: answers in progress. length: tokens of a prompt and its answer at most (`max_length`). kv_int8: see `Engine`.
    """
    place, parts = slice_of(mesh), num_parts("batch", mesh)
    parameters = abstract_parameters(model, jnp.bfloat16, mesh)
    graphdef, state = nnx.split(build_model(model, dict(parameters)))
    shapes = prompt_shapes(model, length)
    tokens, chunks = shapes[-1]
    inputs = one_batch(model, parts, tokens, chunks, mesh).inputs
    with jax.set_mesh(mesh):
        empty = empty_slots.trace(model, slots, length, length, jnp.bfloat16, np.int8 if kv_int8 else None)
        answers = jax.tree.map(placed, empty.out_info, compile_for_memory(empty, mesh).outputs)
        reading = read_prompts.trace(graphdef, state, inputs)
        read = compile_for_memory(reading, mesh)
        if read.problem is None:
            prompts = jax.tree.map(placed, reading.out_info, read.outputs)
            inserted = compile_for_memory(insert.trace(answers, prompts, *[np.zeros(parts, np.int32)] * 2), mesh)
        else:
            inserted = read
        decode = compile_for_memory(
            decode_answers.trace(graphdef, state, None, answers, _drawing(slots), np.int32(8), np.bool_(True)), mesh
        )
    programs = {"read": read, "insert": inserted, "decode": decode}
    weights, held = bytes_on_chip(parameters), bytes_on_chip(answers)
    cache = bytes_on_chip((answers.cache.keys, answers.cache.values))
    # Bytes that stay beside each program, and those of the code of the programs that don't run.
    beside = {"read": held, "insert": weights, "decode": unused_bytes(state, decode)}
    code = decode.code + inserted.code + len(shapes) * read.code
    needed = {name: beside[name] + compiled.total - compiled.code for name, compiled in programs.items()}
    problems = [compiled.problem for compiled in programs.values() if compiled.problem is not None]
    largest = programs[max(programs, key=lambda name: needed[name])].largest
    peak = Compiled(next(iter(problems), None), max(needed.values()), 0, code, largest, (), 0.0)
    content = Content(parts * tokens, parts * chunks, parts * tokens**2)
    flops = forward_flops(model, content)
    moved = moved_bytes(model, content, (), data_parallel=parts, tensor=mesh.shape["tensor"])
    sending = sum(place.seconds(collective) for collective in decode.collectives)
    return {
        "mode": "serve",
        "parameters": sum(leaf.size for leaf in parameters.values()),
        "mesh": dict(mesh.shape),
        "slots": slots,
        "max_length": length,
        "prompts_read_together": parts,
        **memory(peak, place.chip, {"parameters": weights, "answers": held}),
        "hbm_bytes_by_program": needed,
        "recomputed_flops": 0.0,
        **speed(place, read.collectives, model_flops=flops, executed_flops=flops, moved=moved),
        "decode_temporary_bytes_per_chip": decode.temporaries,
        "insert_temporary_bytes_per_chip": inserted.temporaries,
        "decode_collectives": by_kind(decode.collectives),
        # Each step reads all weights once, and the slots of the longest answer: here all. Latencies are not counted.
        "estimated_decode_seconds_per_token": (weights + cache) / (place.share * place.chip.hbm_bandwidth) + sending,
        "estimated_decode_communication_seconds": sending,
        "compile_seconds": round(sum(compiled.seconds for compiled in programs.values()), 1),
    }


def _drawing(slots: int) -> Drawing:
    """The options of all slots, as the engine has them."""
    hand_over = [0] * len(HAND_OVER)  # at most a token for each character
    return Drawing(
        SamplingArrays.of(*[GREEDY] * slots),
        np.zeros((slots, 2), np.uint32),
        np.full((slots, MIN_EOS_IDS), -1, np.int32),
        np.zeros(slots, np.int32),
        np.zeros(slots, np.int32),
        Steering.none(slots, (-1, -1), hand_over),
    )
