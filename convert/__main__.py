"""`python -m convert`, or `moss-audio-convert`: released PyTorch files to Orbax and back, and proof of equality.

Conversions stream: a model of any size goes through less than a gigabyte of memory. PyTorch is not needed.
"""

import os
import signal
import sys

# During the imports below, which take seconds, however the command was started.
if (__name__ == "__main__" or os.path.basename(sys.argv[0]).startswith("moss-audio-convert")) and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import math
import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import tyro

from convert.memory import peak_memory
from moss_audio_jax.commands.cli import Commands, PathArgument, run_cli
from moss_audio_jax.commands.interruption import cleans_up_on_signals
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath

Source = Annotated[PathArgument, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Target = Annotated[PathArgument, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
Dtype = Literal["bfloat16", "float32"]
JsonFlag = Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff]

app = Commands()

# Heavy imports are inside the commands: JAX takes seconds to start, --help should not.


@app.command
def to_orbax(
    source: Source,
    target: Target,
    /,
    *,
    dtype: Dtype | None = None,
) -> None:
    """Converts released weights to an Orbax checkpoint, which JAX restores onto any mesh.

    Everything is checked before anything is written: every tensor of the model is there once, in its shape, in files
    that are whole. The configuration and tokenizer files travel along unchanged.

    Args:
        source: A released directory: config.json, model*.safetensors and, for several shards, their index.
        target: The directory to write, new or empty.
        dtype: Type of all parameters; by default each stays as it is stored. config.json then names the new type.
    """
    with _reported(target):
        import numpy as np

        from convert.to_orbax import convert_to_orbax

        convert_to_orbax(source, target, None if dtype is None else np.dtype(dtype))


@app.command
def to_hf(
    source: Source,
    target: Target,
    /,
    *,
    dtype: Dtype | None = None,
    shard_gb: float = 5.0,
    base: PathArgument | None = None,
) -> None:
    """Converts an Orbax checkpoint back to the released layout, for PyTorch and everything that reads it.

    An adapter of LoRA is merged into its model: W + scale B A is summed in float32 and rounded once.

    Args:
        source: A directory that to-orbax or training wrote, or an adapter's, PEFT's too.
        target: The directory to write, new or empty.
        dtype: Type of all tensors; by default each stays as it is stored. config.json then names the new type.
        shard_gb: Gigabytes (10^9 bytes) of tensors in a file, at most; what fits in one gets no index.
        base: The model that an adapter is merged into, if not the one that it names.
    """
    if not 1 <= shard_gb * 10**9 < math.inf:
        raise MossAudioError(f"--shard-gb must be a number of gigabytes above 0, not {shard_gb}")
    with _reported(target):
        import numpy as np

        from convert.to_hf import convert_to_hf

        convert_to_hf(source, target, None if dtype is None else np.dtype(dtype), round(shard_gb * 10**9), base)


@app.command
def to_peft(source: Source, target: Target, /, *, dtype: Dtype | None = None) -> None:
    """Writes an adapter of LoRA as PEFT does, which then loads it onto the PyTorch model.

    Args:
        source: A training run of LoRA, or a directory of from-peft.
        target: The directory to write, new or empty: adapter_config.json and adapter_model.safetensors.
        dtype: Type of all tensors; by default each stays as it is stored, which is float32 in a training run.
    """
    with _reported(target):
        import numpy as np

        from convert.adapters import convert_to_peft

        convert_to_peft(source, target, None if dtype is None else np.dtype(dtype))


@app.command
def from_peft(source: Source, target: Target, /, *, base: PathArgument | None = None) -> None:
    """Converts an adapter that PEFT wrote to Orbax; to-peft gives the same bytes back.

    To generate with it or to merge it, it needn't be converted.

    Args:
        source: A directory with adapter_config.json and adapter_model.safetensors.
        target: The directory to write, new or empty.
        base: The model that it is for, if not the one that it names.
    """
    with _reported(target):
        from convert.adapters import convert_from_peft

        convert_from_peft(source, target, base)


@app.command
def inspect(path: Source, /, *, json_output: JsonFlag = False) -> None:
    """Lists what a checkpoint holds: parameters, shapes, types, bytes, and the layout. Reads headers only.

    Args:
        path: A released or an Orbax directory.
        json_output: Print JSON instead of a table.
    """
    _keep_to_cpu()
    from moss_audio_jax.weights.info import contents, contents_json, contents_table

    found = contents(path)
    print(json.dumps(contents_json(found), indent=2) if json_output else contents_table(found))


@app.command
def verify(
    source: Source,
    target: Target,
    /,
    *,
    torch: bool = True,
    audio: PathArgument | None = None,
    dtype: Dtype = "float32",
    max_error: float | None = None,
    max_kl: float | None = None,
    min_top_1: float | None = None,
    min_top_k: float | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Compares two checkpoints, each released or Orbax; exits with 1 if they differ.

    Every tensor is compared bit by bit. Where the types differ, the target must hold exactly what converting the source
    gives, so the original comes first. If one of the two is a released directory and PyTorch is installed, PyTorch runs
    it and JAX the other on the same sound, one after the other, and all stages are compared up to the logits.

    Args:
        source: The original.
        target: What was made of it.
        torch: Compare the computations too, where PyTorch is installed.
        audio: A sound file for that; by default a synthetic clip, always the same.
        dtype: Type of both models' weights and computations; bfloat16 takes half the memory and proves less.
        max_error: Fail if a stage's largest error, over its largest magnitude, is above this.
        max_kl: Fail if a next-token distribution's divergence from PyTorch's, in nats, is above this.
        min_top_1: Fail if a smaller share of positions has the same likeliest token.
        min_top_k: Fail if a smaller share of PyTorch's five likeliest tokens is among JAX's.
        json_output: Print JSON instead of tables.
    """
    if not torch:
        _keep_to_cpu()
    from convert.verify import as_json, report_table
    from convert.verify import verify as compare

    limits = {"relative_error": max_error, "kl": max_kl, "top_1_agreement": min_top_1, "top_k_overlap": min_top_k}
    report = compare(source, target, pytorch=torch, audio=audio, dtype=dtype, limits=limits)
    print(json.dumps(as_json(report), indent=2) if json_output else report_table(report))
    if not report.passed:
        sys.exit(1)


@app.command
def rehearse(target: Target, /, *, preset: Literal["4b", "8b", "tiny"], seed: int = 0) -> None:
    """Writes random weights in the released layout, to try conversion and launch before downloading anything.

    4b takes 10.4 GB and 8b 18.1 GB. tiny comes with a tokenizer of single bytes; the others need the released one's
    files copied beside them before they generate.

    Args:
        target: The directory to write, new or empty.
        preset: The model's size.
        seed: Equal seeds give equal weights.
    """
    with _reported(target):
        from convert.rehearse import rehearse as write

        write(preset, target, seed)


@app.command
def average(
    run: Source,
    target: Target,
    /,
    *,
    last: int | None = None,
    steps: tuple[int, ...] = (),
) -> None:
    """Averages checkpoints of a training run into a new one, for evaluate, generate and the other conversions.

    Args:
        run: The directory of a training run.
        target: The directory to write, new or empty.
        last: Take this many of the newest checkpoints.
        steps: Take the checkpoints of these steps.
    """
    with _reported(target):
        from convert.average import average as write

        taken = write(run, target, last=last, steps=steps)
        print(f"the mean of the checkpoints of steps {', '.join(map(str, taken))}")


@contextmanager
def _reported(target: AnyPath) -> Iterator[None]:
    """For the commands that write: removes what is half written when they are stopped, says at the end what it took."""
    _keep_to_cpu()
    start = time.perf_counter()
    with cleans_up_on_signals():
        yield
    size = sum(file.stat().st_size for file in pathlib.Path(target).rglob("*") if file.is_file())
    seconds, peak = time.perf_counter() - start, peak_memory()
    memory = "" if peak is None else f", peak memory {peak / 1e9:.2f} GB"
    print(f"wrote {target}: {size / 1e9:.3g} GB in {seconds:.1f} s{memory}")


def _keep_to_cpu() -> None:
    """For what only handles files: JAX would take the accelerator, or wait for whoever has it."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def main() -> None:
    run_cli(lambda: app.cli(prog="moss-audio-convert", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
