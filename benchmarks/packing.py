"""Fill of packed sequences, and examples read ahead, by the number of open bins: `python -m benchmarks.packing`.

Lengths are made up, after kinds of data that people train on; no audio is read. Each lane is packed as a run does it
(`train.data.lanes`): the first sequences are given out while the bins are still being opened.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tyro

from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.text_table import align
from train.data.packing import Packer
from train.recipes import RECIPES

DATA = RECIPES["finetune_lora"].data  # 4096 tokens and 64 chunks of 4 s
TOKENS_PER_SECOND = 12.5 * 1.1  # of audio with time markers
LANES, SEQUENCES = 8, 150  # sequences of each lane
OPEN_BINS = (1, 2, 3, 4, 6, 8, 16)


@dataclass(frozen=True)
class Length:
    num_tokens: int
    num_chunks: int


def clip(seconds: float, text: int) -> Length:
    return Length(int(seconds * TOKENS_PER_SECOND) + text, math.ceil(seconds / 4))


def utterance(rng: np.random.Generator) -> Length:
    seconds = rng.uniform(1, 20)
    return clip(seconds, 25 + int(3 * seconds))


def text_or_clip(rng: np.random.Generator) -> Length:
    """30% texts without audio."""
    if rng.random() < 0.3:
        return Length(1 + int(min(rng.lognormal(6, 1), DATA.tokens - 1)), 0)
    return clip(rng.uniform(1, 30), 100)


def recording(rng: np.random.Generator) -> Length:
    return clip(math.exp(rng.uniform(math.log(5), math.log(240))), 150)


KINDS: dict[str, Callable[[np.random.Generator], Length]] = {
    "utterances of 1 to 20 s": utterance,
    "clips of 1 to 30 s, and texts": text_or_clip,
    "recordings of 5 s to 4 min": recording,
}


def measure(draw: Callable[[np.random.Generator], Length], open_bins: int) -> tuple[str, ...]:
    """Shares of tokens and chunks that are filled; examples read for the first batch, and ahead of a later one."""
    tokens = chunks = first = ahead = 0
    for lane in range(LANES):
        rng, packer, given, packed = np.random.default_rng(lane), Packer[Length](DATA.budget, 1), 0, 0
        read = 0
        while given < SEQUENCES:
            packer.open_bins = min(open_bins, 1 + given)
            read += 1
            closed = packer.add(draw(rng))
            if closed is not None:
                given, packed = given + 1, packed + len(closed.items)
                tokens += DATA.tokens - closed.free_tokens
                chunks += DATA.chunks - closed.free_chunks
                first += read if given == 1 else 0
        ahead += read - packed
    count = LANES * SEQUENCES
    return (
        f"{tokens / count / DATA.tokens:.1%}",
        f"{chunks / count / DATA.chunks:.1%}",
        str(first),
        str(ahead),
    )


def run() -> None:
    """Prints a table for each kind of data, for a batch of 8 sequences of 4096 tokens and 64 chunks."""
    for name, draw in KINDS.items():
        print(name)
        rows = [(str(open_bins), *measure(draw, open_bins)) for open_bins in OPEN_BINS]
        print(align([("open bins", "tokens", "chunks", "read for the first batch", "read ahead later"), *rows]))


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(run))
