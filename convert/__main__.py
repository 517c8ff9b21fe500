"""`moss-audio-convert` converts released PyTorch files to Orbax and back, and proves them equal.

Conversions stream: a model of any size takes less than a gigabyte of memory. PyTorch is not needed.
"""

import math
import pathlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from moss_audio_jax.commands.interruption import ends_on_ctrl_c

with ends_on_ctrl_c():  # these imports take long enough to be interrupted
    import tyro

    from convert.memory import peak_memory
    from moss_audio_jax.commands.cli import Commands, run_cli
    from moss_audio_jax.commands.interruption import cleans_up_on_signals
    from moss_audio_jax.commands.json_output import write_json
    from moss_audio_jax.commands.paths import PathArgument
    from moss_audio_jax.errors import MossAudioError
    from moss_audio_jax.storage.paths import AnyPath

Source = Annotated[PathArgument, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Target = Annotated[PathArgument, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
Dtype = Literal["bfloat16", "float32"]

app = Commands()

# Heavy imports are inside the commands: JAX takes seconds to import, and --help does not need it.


@app.command
def to_orbax(
    source: Source,
    target: Target,
    /,
    *,
    dtype: Dtype | None = None,
) -> None:
    """Converts released weights to an Orbax checkpoint, which JAX restores onto any mesh.

    All tensors are checked before anything is written: each is there once, in its shape, in whole files. The
    configuration and tokenizer files are copied unchanged.

    Args:
        source: A released directory: config.json, model*.safetensors and, for several shards, their index. Or its
            OWNER/NAME on the Hugging Face hub.
        target: The directory to write, new or empty.
        dtype: Dtype of all parameters, also in config.json. Default: as stored.
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
    model_card: bool = False,
) -> None:
    """Converts an Orbax checkpoint to the released layout, which PyTorch reads.

    A LoRA adapter is merged into its base: W + scale B A is summed in float32 and rounded once.

    Args:
        source: Orbax checkpoint, training run, or adapter (PEFT's too).
        target: The directory to write, new or empty.
        dtype: Dtype of all tensors, also in config.json. Default: as stored.
        shard_gb: Maximum gigabytes (10^9 bytes) of tensors per file. A single file gets no index.
        base: Model that an adapter is merged into. Default: the one that it names.
        model_card: Also write README.md for the Hugging Face hub: base model, licence, training facts, how to load it.
    """
    if not 1 <= shard_gb * 10**9 < math.inf:
        raise MossAudioError(f"--shard-gb must be a number of gigabytes above 0, not {shard_gb}")
    with _reported(target):
        import numpy as np

        from convert.to_hf import convert_to_hf

        kind = None if dtype is None else np.dtype(dtype)
        convert_to_hf(source, target, kind, round(shard_gb * 10**9), base, model_card)


@app.command
def to_peft(source: Source, target: Target, /, *, dtype: Dtype | None = None) -> None:
    """Converts a LoRA adapter to PEFT's layout, which PEFT loads onto the PyTorch model.

    Args:
        source: Training run with LoRA, or a directory of from-peft.
        target: The directory to write, new or empty: adapter_config.json and adapter_model.safetensors.
        dtype: Dtype of all tensors. Default: as stored, float32 in a training run.
    """
    with _reported(target):
        import numpy as np

        from convert.adapters import convert_to_peft

        convert_to_peft(source, target, None if dtype is None else np.dtype(dtype))


@app.command
def from_peft(source: Source, target: Target, /, *, base: PathArgument | None = None) -> None:
    """Converts a PEFT adapter to Orbax; to-peft gives the same bytes back.

    generate and to-hf read PEFT's layout directly.

    Args:
        source: A directory with adapter_config.json and adapter_model.safetensors.
        target: The directory to write, new or empty.
        base: Model of the adapter. Default: the one that it names.
    """
    with _reported(target):
        from convert.adapters import convert_from_peft

        convert_from_peft(source, target, base)


@app.command
def inspect(path: Source, /, *, json: PathArgument | None = None) -> None:
    """Lists parameters, shapes, dtypes, bytes and layout of a checkpoint. Reads headers only.

    Args:
        path: A released or an Orbax directory.
        json: Write JSON to this file instead of printing a table; - for stdout.
    """
    _keep_to_cpu()
    from moss_audio_jax.weights.info import contents, contents_json, contents_table

    found = contents(path)
    if json is None:
        print(contents_table(found))
    else:
        write_json(json, contents_json(found))


@app.command
def verify(
    source: Source,
    target: Annotated[PathArgument | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TARGET]")] = None,
    /,
    *,
    torch: bool = True,
    audio: PathArgument | None = None,
    dtype: Dtype = "float32",
    int8: tuple[str, ...] = (),
    max_error: float | None = None,
    max_kl: float | None = None,
    min_top_1: float | None = None,
    min_top_k: float | None = None,
    json: PathArgument | None = None,
) -> None:
    """Compares two checkpoints, each released or Orbax; exits with 1 if they differ, or one is damaged.

    Orbax checkpoints are first compared with the checksums that they were written with; with SOURCE alone, that is all.

    Compares every tensor bit by bit. If the dtypes differ, the target must be exactly the conversion of the source, so
    the original comes first. If one of them is a released directory and PyTorch is installed, PyTorch runs it and JAX
    runs the other on the same sound, one after the other, and all stages up to the logits are compared.

    Args:
        source: The original, or an Orbax checkpoint to compare with its checksums.
        target: Its conversion. Default: none.
        torch: Also compare the computations, if PyTorch is installed.
        audio: Sound file for that. Default: a fixed synthetic clip.
        dtype: Dtype of weights and computation of both models. bfloat16 takes half the memory and proves less.
        int8: Globs over linear layers of JAX's model whose weights are rounded to int8, to see what that changes.
        max_error: Fail if the largest error of a stage, divided by its largest magnitude, is above this.
        max_kl: Fail if the KL divergence of a next-token distribution from PyTorch's, in nats, is above this.
        min_top_1: Fail if a smaller share of positions has the same most likely token.
        min_top_k: Fail if a smaller share of PyTorch's five most likely tokens is among JAX's.
        json: Write JSON to this file instead of printing tables; - for stdout.
    """
    if not torch or target is None:
        _keep_to_cpu()
    from convert.verify import as_json, report_table, verify_alone
    from convert.verify import verify as compare

    limits = {"relative_error": max_error, "kl": max_kl, "top_1_agreement": min_top_1, "top_k_overlap": min_top_k}
    if target is None:
        report = verify_alone(source)
    else:
        report = compare(source, target, pytorch=torch, audio=audio, dtype=dtype, int8=int8, limits=limits)
    if json is None:
        print(report_table(report))
    else:
        write_json(json, as_json(report))
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
    """For commands that write: removes partial output when they are stopped, and prints size, time and memory."""
    _keep_to_cpu()
    start = time.perf_counter()
    with cleans_up_on_signals():
        yield
    size = sum(file.stat().st_size for file in pathlib.Path(target).rglob("*") if file.is_file())
    seconds, peak = time.perf_counter() - start, peak_memory()
    memory = "" if peak is None else f", peak memory {peak / 1e9:.2f} GB"
    print(f"wrote {target}: {size / 1e9:.3g} GB in {seconds:.1f} s{memory}")


def _keep_to_cpu() -> None:
    """For commands that only handle files: otherwise JAX takes the accelerator, or waits for it."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def main() -> None:
    run_cli(lambda: app.cli(prog="moss-audio-convert", description=__doc__))


if __name__ == "__main__":
    main()
