"""Training data of ten million examples: `python -m benchmarks.data_scale DIRECTORY [--examples 10000000]`.

Makes a manifest of clips (their names, texts and lengths; no sound) and shards of as many small records, then measures,
each in a process of its own: the first opening of the manifest, which checks it, and later ones; the memory of a
process that reads, and what a worker process is sent; the time to an example at random; the time to resume an order of
two data sets in its third epoch; and how well the order is shuffled. Files that are there are kept, so the command can
be repeated. Prints one table.
"""

import dataclasses
import json
import math
import os
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from array_record.python.array_record_module import ArrayRecordWriter

from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.storage.paths import atomic_file
from moss_audio_jax.text_table import align
from train.data.line_index import content_hash
from train.data.manifest import Example, Manifest
from train.data.mixture import ExampleOrder, Group, Source
from train.data.shard_writing import encode
from train.data.shards import INDEX_FILE, ShardFacts, Shards, examples_in, facts_path, shard_path
from train.data.shards import Path as StoragePath

TEXTS = 4096
READ = 2000  # examples read at random
SAMPLED = 200_000  # neighbours whose distance is measured


def measure(directory: Annotated[Path, tyro.conf.Positional], /, *, examples: int = 10**7, shards: int = 1000) -> None:
    """Prints how data of many examples do.

    Args:
        directory: Directory of the made data, about 2.7 GB for ten million examples.
        examples: Number of examples.
        shards: Number of shards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest, packed = directory / f"{examples}.jsonl", directory / f"{examples}-shards"
    if not manifest.exists():
        with atomic_file(manifest) as file:
            write_manifest(file, examples)
    write_small_shards(packed, examples, shards)
    cache = directory / "cache"
    for index in cache.rglob("*.npy"):
        index.unlink()
    rows = [["", "manifest", "again", "shards"]]
    found = [apart(part, path, cache) for part, path in (("open", manifest), ("open", manifest), ("open", packed))]
    for name in found[0]:
        rows.append([name, *(f"{one[name]:,.4g}" for one in found)])
    print(f"{examples:,} examples, {shards} shards, {os.cpu_count()} processors")
    print(align(rows))
    print(align([[name, f"{value:,.4g}"] for name, value in apart("order", manifest, cache).items()]))


def apart(part: str, path: Path, cache: Path) -> dict[str, float]:
    """Runs a measurement in a new process, and returns its figures by name."""
    command = [sys.executable, "-m", "benchmarks.data_scale", part, str(path)]
    done = subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": str(cache)}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def write_manifest(file: Path, examples: int) -> None:
    """Writes lines of about 160 bytes."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{word}" for word in rng.integers(0, 1000, rng.integers(4, 20))) for _ in range(TEXTS)]
    with open(file, "w") as opened:
        for index in range(examples):
            opened.write(
                f'{{"audio": "clips/{index % 1000:04d}/{index:08d}.flac", "duration": {1 + index % 2900 / 100:.2f}, '
                f'"text": "{texts[index % TEXTS]}"}}\n'
            )


def write_small_shards(directory: Path, examples: int, shards: int) -> None:
    """Writes shards of texts, as `prepare` would."""
    directory.mkdir(exist_ok=True)
    index = {"examples": examples, "shards": shards, "manifest_sha256": ""}
    (directory / INDEX_FILE).write_text(json.dumps(index))
    for shard in range(shards):
        path, count = shard_path(StoragePath(directory), shard, shards), examples_in(shard, shards, examples)
        if facts_path(path).exists():
            continue
        with atomic_file(path) as file:
            writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
            for number in range(count):
                writer.write(encode(Example(f"line {number}", text=f"text {number * shards + shard}")))
            writer.close()
            facts = ShardFacts(count, 0, file.stat().st_size, content_hash(file))
        facts_path(path).write_text(json.dumps(dataclasses.asdict(facts)))


# In processes of their own


def open_and_read(path: Path) -> dict[str, float]:
    """Measures the opening of a manifest or of shards, and examples of it at random."""
    base, begin = memory(), time.perf_counter()
    examples = Manifest(path) if path.is_file() else Shards(path)
    opening, children = time.perf_counter() - begin, peak(resource.RUSAGE_CHILDREN)
    opened = peak(resource.RUSAGE_SELF)
    sent = pickle.dumps(examples)
    places = np.random.default_rng(1).integers(0, len(examples), READ).tolist()
    begin = time.perf_counter()
    for place in places:
        examples[place]
    reading = (time.perf_counter() - begin) / READ
    return {
        "opening, s": opening,
        "largest memory of the process while it opens, MiB": opened,
        "largest memory of a process that checks lines, MiB": children,
        "memory kept, after reading too, MiB": memory() - base,
        "bytes sent to each worker process": float(len(sent)),
        "time to an example at random, ms": 1000 * reading,
    }


def order_and_resume(path: Path) -> dict[str, float]:
    """Measures the order of two data sets of this size."""
    manifest = Manifest(path)
    size, base, begin = len(manifest), memory(), time.perf_counter()
    groups = [Group(name, 1, (Source(name, manifest, {"transcribe": 1.0}),)) for name in ("a", "b")]
    order = ExampleOrder(groups, seed=0)
    order[0]
    made = time.perf_counter() - begin
    begin = time.perf_counter()
    again = pickle.loads(pickle.dumps(order))  # as in a worker process of a run that resumes
    place = 5 * size + 12345
    drawn = again[place]
    resumed = time.perf_counter() - begin
    assert (drawn.source.name, drawn.index) == (order[place].source.name, order[place].index)
    begin = time.perf_counter()
    indexes = np.array([drawn.index for drawn in map(order.__getitem__, range(SAMPLED)) if drawn.source.name == "a"])
    per_example, added = (time.perf_counter() - begin) / SAMPLED, memory() - base
    fresh = np.random.default_rng(2).permutation(size)[: len(indexes)]
    return {
        "making an order of two such data sets, ms": 1000 * made,
        "resuming it in the third epoch, ms": 1000 * resumed,
        "memory that the order adds, MiB": added,
        "time to a place of the order, us": 1e6 * per_example,
        **{f"shuffle, {name}": value for name, value in quality(indexes, size).items()},
        **{f"a permutation by NumPy, {name}": value for name, value in quality(fresh, size).items()},
    }


def quality(indexes: np.ndarray, size: int) -> dict[str, float]:
    """Statistics of the beginning of a shuffle. All are near 0 for a random permutation, in units of their deviation.

    correlation: of neighbours. distance: mean distance of neighbours, which is size / 3. parts: chi-square of the
    counts in 1,000 equal parts of the data set.
    """
    count = len(indexes)
    assert len(np.unique(indexes)) == count
    correlation = float(np.corrcoef(indexes[:-1], indexes[1:])[0, 1]) * math.sqrt(count)
    distance = np.abs(np.diff(indexes)) / size
    parts = np.bincount(indexes * 1000 // size, minlength=1000)
    chi = float(((parts - count / 1000) ** 2 / (count / 1000)).sum())
    return {
        "correlation of neighbours": correlation,
        "distance of neighbours": float((distance.mean() - 1 / 3) / (math.sqrt(1 / 18) / math.sqrt(count))),
        "counts by part": (chi - 999) / math.sqrt(2 * 999),
    }


def peak(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


def memory() -> float:
    """Returns the memory of this process in MiB, without mapped files, which processes share."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) / 1024


if __name__ == "__main__":
    parts = {"open": open_and_read, "order": order_and_resume}
    if len(sys.argv) == 3 and sys.argv[1] in parts:
        print(json.dumps(parts[sys.argv[1]](Path(sys.argv[2]))))
    else:
        run_cli(lambda: tyro.cli(measure, description=__doc__))
