"""One side of `benchmarks.vs_maxtext`: compiles a training step for a TPU, and writes what the compiler says of it.

    python -m benchmarks.training_programs ours WORK FILE
    python -m benchmarks.training_programs maxtext WORK FILE OPTIONS

Runs under the interpreter that has this side installed, so neither side imports what the other needs. WORK is a `Work`
and FILE gets a `Program`, both as JSON. OPTIONS are more of MaxText's configuration.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from train.planning.compilation import Compiled, compile_for_memory
from train.planning.topology import accelerator_type, compile_without_tpu, topology_devices, topology_of

VOCABULARY_TILES = 16  # of MaxText's loss; without, the whole logits are in memory


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides compile: a training step of Qwen3-8B, or of its first layers."""

    topology: str = "v5p:4x4x4"
    """TPU to compile for, by its shape or the name that it is rented by."""
    layers: int = 36
    """Layers of the model."""
    sequences: int = 12
    """Sequences of a chip."""
    tokens: int = 8192
    """Tokens of a sequence."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, on one chip. hbm: bytes of arguments and temporaries.

    sent: bytes to other chips, by kind and dtype of the collective. matmul_flops: executed outside of attention
    kernels. seconds, cpu_seconds: of the compilation.
    """

    versions: dict[str, str]
    fits: bool
    hbm: float
    sent: dict[str, float]
    matmul_flops: float
    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, compiled: Compiled, *packages: str) -> "Program":
        sent: dict[str, float] = defaultdict(float)
        for collective in compiled.collectives:
            dtypes = dict.fromkeys(shape.partition("[")[0] for shape in collective.shapes)
            sent[f"{collective.kind} {'+'.join(dtypes)}"] += collective.sent
        return cls(
            versions(*packages),
            compiled.problem is None,
            compiled.arguments + compiled.temporaries,
            dict(sorted(sent.items(), key=lambda item: -item[1])),
            compiled.matmul_flops,
            compiled.seconds,
            compiled.cpu_seconds,
        )


def versions(*packages: str) -> dict[str, str]:
    found = {package: importlib.metadata.version(package) for package in ("libtpu", "jax", *packages)}
    return found | {"python": platform.python_version()}


def ours(work: Work) -> Program:
    """Text alone: the encoder's parameters are there, and it has no chunks to encode. All chips are fsdp's."""
    from moss_audio_jax.sharding import make_mesh
    from train.planning.plan import compile_step, with_sizes
    from train.recipes import RECIPES

    devices = topology_devices(work.topology)
    batch = work.sequences * len(devices)
    config = with_sizes(RECIPES["pretrain_stage2"], "8b", slices=1, batch=batch, tokens=work.tokens, chunks=0)
    model = config.model_config()
    language = dataclasses.replace(model.language_config, num_hidden_layers=work.layers)
    taps = min(model.num_deepstack, work.layers)
    model = dataclasses.replace(model, language_config=language, deepstack_num_inject_layers=taps)
    return Program.of(compile_step(config, model, make_mesh(devices=devices)))


def maxtext(work: Work, options: str) -> Program:
    """The step of MaxText's own command for compiling ahead of time, with only its compiler call replaced."""
    compile_without_tpu()
    from maxtext.trainers.pre_train import train_compile  # pyright: ignore[reportMissingImports]
    from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR  # pyright: ignore[reportMissingImports]

    compiled: list[Compiled] = []

    def compiles(step, args, kwargs, mesh, inputs, outputs, static, donated, config, rules) -> Any:
        jitted = jax.jit(
            step, in_shardings=inputs, out_shardings=outputs, static_argnums=static, donate_argnums=donated
        )
        with jax.set_mesh(mesh), rules:
            compiled.append(compile_for_memory(jitted.trace(*args, **kwargs), mesh))
        return SimpleNamespace(cost_analysis=dict, memory_analysis=dict)  # `main` prints them

    train_compile.jit_and_compile = compiles
    train_compile.main(["", os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml"), *maxtext_options(work, options)])
    return Program.of(compiled[0], "maxtext")


def maxtext_options(work: Work, more: str) -> list[str]:
    """Those of its configuration that make its step ours, and more; the rest are its defaults."""
    rented = accelerator_type(topology_of(work.topology))
    options = {
        "run_name": "compared",
        "model_name": "qwen3-8b",
        "override_model_config": True,
        "base_num_decoder_layers": work.layers,
        "compile_topology": str(rented).replace("v5litepod", "v5e"),
        "compile_topology_num_slices": 1,
        "per_device_batch_size": work.sequences,
        "max_target_length": work.tokens,
        "dtype": "bfloat16",
        "weight_dtype": "float32",
        "opt_type": "adamw",
        "mu_dtype": "float32",
        "remat_policy": "full",
        "scan_layers": True,
        "attention": "flash",
        "ici_fsdp_parallelism": -1,
        "num_vocab_tiling": VOCABULARY_TILES,
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
    }
    options |= dict(option.split("=", 1) for option in more.split())
    return [f"{name}={value}" for name, value in options.items()]


def main(side: str, work: str, file: str, *options: str) -> None:
    jax.config.update("jax_platforms", "cpu")  # of arrays that are not compiled for the TPU
    program = {"ours": ours, "maxtext": maxtext}[side](Work(**json.loads(work)), *options)
    Path(file).write_text(json.dumps(dataclasses.asdict(program)), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
