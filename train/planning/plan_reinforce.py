"""Memory and time of a step of `reinforce`: the programs of its engine, and of an update, beside the state of the run.

    rollout   state + weights in the compute dtype + the worst program of the engine, with its answers
    update    state + the update's program, without the engine

Times are estimates of the longest step: every answer has all its new tokens, and no group is replaced.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moss_audio_jax.sharding import make_mesh, num_parts
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from train.batch import abstract_batch
from train.planning.compilation import Compiled, compile_for_memory
from train.planning.plan import bytes_on_chip, planned_state, report_step
from train.planning.plan_serving import plan_serving
from train.reinforce.config import ReinforceConfig
from train.reinforce.objective import PolicyBatch
from train.reinforce.step import policy_step


def plan_reinforce(config: ReinforceConfig, devices: Sequence[Any]) -> dict[str, Any]:
    """Compiles both halves of a step for devices; returns the report of an update with the field `rollout`."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    chosen, data, model = config.rollout, config.data, config.model_config()
    length = chosen.length or data.tokens
    answers = chosen.prompts * chosen.samples
    sequences = -(-answers // (data.tokens // length))  # answers of full length
    microbatches = -(-sequences // (data.batch_size * config.objective.minibatches))
    # 1. An update. The report counts its sequences.
    whole = dataclasses.replace(
        config, data=dataclasses.replace(data, batch_size=data.batch_size * microbatches), microbatches=microbatches
    )
    report = report_step(whole, mesh, compile_update(config, mesh, microbatches), segments=data.tokens // length)
    # 2. The answers, with the run's state beside the engine.
    slots = min(chosen.slots, answers)
    rollout = plan_serving(dataclasses.replace(model, lora=None), mesh, slots=slots, length=length)
    state = planned_state(config, mesh)
    beside = bytes_on_chip((state.trainable, state.moments, state.ema))
    total, usable = rollout["hbm_bytes_per_chip"] + beside, rollout["hbm_usable_bytes_per_chip"]
    prompts = math.ceil(chosen.prompts / num_parts("batch", mesh)) * rollout["estimated_step_seconds"]
    tokens = math.ceil(answers / slots) * chosen.max_new_tokens * rollout["estimated_decode_seconds_per_token"]
    report |= {
        "mode": "reinforce",
        "fits": report["fits"] and rollout["fits"] and total <= usable,
        "updates": config.objective.minibatches,
        "rollout": {
            "fits": rollout["fits"] and total <= usable,
            "hbm_bytes_per_chip": total,
            "state_bytes_per_chip": beside,
            "hbm_bytes_by_program": rollout["hbm_bytes_by_program"],
            "answers": answers,
            "slots": slots,
            "max_length": length,
            "estimated_prompt_seconds": prompts,
            "estimated_decode_seconds": tokens,
            "compile_seconds": rollout["compile_seconds"],
        },
        "estimated_update_half_seconds": config.objective.minibatches * report["estimated_step_seconds"],
        "estimated_rollout_half_seconds": prompts + tokens,
    }
    return report


def compile_update(config: ReinforceConfig, mesh: Mesh, microbatches: int) -> Compiled:
    """Compiles an update of this many microbatches for a mesh."""
    data, model = config.data, config.model_config()
    shapes = abstract_batch(
        model, data.batch_size * microbatches, data.tokens, data.chunks, microbatches=microbatches, mesh=mesh
    )
    of_tokens = {name: shapes.loss_mask for name in ("loss_mask", "advantages", "drawn", "weight")}
    old = shapes.loss_mask if config.objective.minibatches > 1 else None
    reference = shapes.loss_mask if config.objective.kl else None
    batch = PolicyBatch(shapes.inputs, shapes.targets, **of_tokens, old=old, reference=reference)
    graphdef = nnx.split(build_model(model, dict(abstract_parameters(model, jnp.float32))))[0]
    temperature = config.rollout.sampling.temperature
    with jax.set_mesh(mesh):
        state = planned_state(config, mesh, model)
        traced = policy_step.trace(
            graphdef, config.step, config.optimizer, config.objective, temperature, state, batch, True
        )
        return compile_for_memory(traced, mesh)
