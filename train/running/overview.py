"""Summary of a run in one line: parameters, devices, data and length."""

from collections import Counter
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from train.config import RunConfig
from train.data.mixture import ENDLESS, Group
from train.state import TrainState


def overview(config: RunConfig, data: Sequence[str], mesh: Mesh, state: TrainState, start: int, step: str = "") -> str:
    """Returns the line for a run that begins (`start` 0) or resumes after step `start`.

    data: descriptions of them. step: what a step reads; default: its sequences.
    """
    trained, frozen = _size(state.trainable), _size(state.frozen)
    parameters = f"{trained:,} parameters" if not frozen else f"{trained:,} of {trained + frozen:,} parameters"
    devices = list(mesh.devices.flat)
    step = step or f"{config.data.batch_size} sequences of {config.data.tokens} tokens"
    steps = f"{config.last_step:,} steps" if config.last_step else f"{config.loop.epochs} epochs"
    begin = f"resumes after step {start}: " if start else ""
    plural = "s" if len(devices) > 1 else ""
    return (
        f"{begin}trains {parameters} on {len(devices)} {devices[0].device_kind} device{plural}; "
        f"data: {', '.join(data)}; {steps} of {step}"
    )


def _size(parameters: Mapping[str, jax.Array]) -> int:
    return sum(array.size for array in parameters.values())


def described(group: Group) -> str:
    """Describes a group of the mixture by its name and the number of its examples."""
    sizes: Counter[int] = Counter()  # by first example
    for source in group.sources:
        sizes[group.begin_of(source)] += len(source.examples)
    joining = [
        ("made while training" if size >= ENDLESS else f"{size:,} examples")
        + (f" from example {begin:,} on" if begin else "")
        for begin, size in sorted(sizes.items())
    ]
    end = f" until example {group.end:,}" if group.end is not None else ""
    return f"{group.name} ({', '.join(joining)}{end})"
