"""Damages checkpoints at random, and wants each to be read right or refused in a sentence: `make fuzz`.

An input is one file of a small checkpoint, damaged in place. What reads it must return, or raise MossAudioError. All
else is a defect: another exception, a panic of a library, a crash, more than HANG_SECONDS, or a file that is opened
outside the checkpoint's directory. Inputs follow from the seed and their number, so that any can be seen again:

    python -m tests.fuzz.run --replay 0:4711

Each defect is saved with the file that caused it; those of tests/data/fuzz.jsonl stay in the tests.
"""

import base64
import collections
import ctypes
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import zlib
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import tyro

HANG_SECONDS = 10.0  # of computing
WAITS_SECONDS = 300.0  # for something that never comes
ADDRESS_SPACE = 12 << 30  # more than that is asked for by a number in a file alone
CORPUS = Path(__file__).parents[1] / "data" / "fuzz.jsonl"


@dataclasses.dataclass(frozen=True)
class Input:
    """A damaged file: which kind, where in the checkpoint, its bytes."""

    kind: str
    file: str
    content: bytes

    def to_json(self, **notes: Any) -> str:
        packed = base64.b64encode(zlib.compress(self.content, 9)).decode()
        return json.dumps({"kind": self.kind, "file": self.file, **notes, "zlib": packed})

    @classmethod
    def from_json(cls, line: str) -> "Input":
        found = json.loads(line)
        return cls(found["kind"], found["file"], zlib.decompress(base64.b64decode(found["zlib"])))


class Bench:
    """Checkpoints of one process, in which inputs are tried."""

    def __init__(self, directory: Path):
        from tests.fuzz import checkpoints

        self.kinds = {kind.name: kind for kind in checkpoints.KINDS}
        self._directory = directory
        checkpoints.write_checkpoints(directory)
        self._files = {
            name: sorted(file for file in (directory / kind.directory).glob(kind.pattern) if file.is_file())
            for name, kind in self.kinds.items()
        }
        # Orbax names files at random: those of equal sizes would be in another order each time.
        self._content = {file: file.read_bytes() for files in self._files.values() for file in files}
        for files in self._files.values():
            files.sort(key=lambda file: (self._content[file], file))
        self._shares = [kind.share for kind in self.kinds.values()]
        self._watch = _Watch(directory)
        for kind in self.kinds.values():
            kind.read(directory / kind.directory, random.Random(0))
        self._watch.outside(kind.directory)

    def draw(self, seed: int, number: int) -> Input:
        rng = random.Random(f"{seed}:{number}")
        (kind,) = rng.choices(list(self.kinds.values()), self._shares)
        file = rng.choice(self._files[kind.name])
        mutation = rng.choice(kind.mutations)
        content = mutation(rng, self._content[file])
        return Input(kind.name, str(file.relative_to(self._directory)), content)

    def try_input(self, found: Input, seed: str) -> tuple[str, str | None]:
        """Outcome: `read` or `refused`, or a sentence that says what is wrong with it."""
        from moss_audio_jax import MossAudioError

        kind = self.kinds[found.kind]
        file = self._place(found)
        file.write_bytes(found.content)
        result, defect = "read", None
        try:
            kind.read(self._directory / kind.directory, random.Random(seed))
        except MossAudioError as error:
            result = "refused"
            if "\n" in str(error) or len(str(error)) > 5000:
                defect = f"a message that is no sentence: {str(error)[:200]!r}"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            result, defect = "defect", _summary(error)
        finally:
            file.write_bytes(self._content[file])
        if outside := self._watch.outside(kind.directory):
            result, defect = "defect", f"opened outside: {outside}"
        return result, defect

    def _place(self, found: Input) -> Path:
        """The file itself, or that with the same role where a library names its files at random."""
        file = self._directory / found.file
        return file if file in self._content else self._files[found.kind][0]


_NOT_OURS = (sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), str(Path(__file__).parent), "<frozen")


def _summary(error: BaseException) -> str:
    """Type, message and the place: the innermost function of this repository that is not the fuzzer's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if not frame.filename.startswith(_NOT_OURS)]
    frame = (ours or frames)[-1]
    place = f"{Path(frame.filename).name}:{frame.name}"
    return f"{type(error).__name__} in {place}: {str(error)[:200]}"


class _Watch:
    """Lists files that are opened outside a directory, also by native code; inotify reports them."""

    IN_OPEN = 0x20

    def __init__(self, directory: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK)
        self._names = {}
        for place in [directory, *(entry for entry in directory.rglob("*") if entry.is_dir())]:
            number = libc.inotify_add_watch(self._descriptor, os.fsencode(place), self.IN_OPEN)
            assert number > 0, f"{place} can't be watched"
            self._names[number] = str(place.relative_to(directory))
        self._opened: list[str] = []
        self._root = os.path.realpath(directory)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            self._opened.append(os.fsdecode(arguments[0]))

    def outside(self, inside: str) -> list[str]:
        """Since the last call: all that is outside the checkpoint's directory, but for what Python itself opens."""
        found = []
        opened, self._opened = self._opened, []
        libraries = (sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), "/proc/", "/sys/", os.getcwd())
        libraries += ("/dev/shm/pym-",)  # memory that processes of `multiprocessing` share
        for path in opened:
            place = os.path.realpath(path)
            if not place.startswith(f"{self._root}/{inside}") and not place.startswith(libraries):
                found.append(path)
        try:
            events = os.read(self._descriptor, 1 << 20)
        except BlockingIOError:
            events = b""
        while events:
            number, _, _, length = struct.unpack_from("iIII", events)
            name = events[16 : 16 + length].rstrip(b"\0").decode()
            place = os.path.normpath(f"{self._names[number]}/{name}")
            if place.split("/")[0] not in (inside, "."):
                found.append(place)
            events = events[16 + length :]
        return sorted(set(found))


def work(pipe: Connection, current: Any, seed: int, first: int, last: int, step: int, stop_at: float) -> None:
    """Tries inputs first, first + step, ...; keeps the number in `current`, and tells what is wrong with any.

    If `current` is a number already, that input ended the process before, which could not tell of it.
    """
    from tests.fuzz import checkpoints

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    with tempfile.TemporaryDirectory(dir=_scratch()) as directory, checkpoints.remembered_shapes():
        bench = Bench(Path(directory))
        if current.value >= 0:
            pipe.send(("ended", current.value, bench.draw(seed, current.value), ""))
        counts: collections.Counter = collections.Counter()
        shown = time.time()
        for number in range(first, last, step):
            found = bench.draw(seed, number)
            current.value = number
            result, defect = bench.try_input(found, f"{seed}:{number}")
            counts[found.kind, result] += 1
            if defect is not None:
                pipe.send(("defect", number, found, defect))
            if (now := time.time()) - shown > 1:
                pipe.send(("counts", number, None, dict(counts)))
                counts.clear()
                shown = now
            if now > stop_at:
                break
        current.value = -1
        pipe.send(("counts", last, None, dict(counts)))
        pipe.send(("done", last, None, ""))


def _scratch() -> str | None:
    """Memory, where there is a file system in it."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class _Worker:
    """A process, and the input that it is at."""

    def __init__(self, process: Any, current: Any, ended_by: int):
        self.process, self.current, self.ended_by = process, current, ended_by
        self._seen, self._since, self._used = ended_by, time.monotonic(), 0.0

    def end_if_it_hangs(self) -> None:
        number = self.current.value
        if number != self._seen:
            self._seen, self._since, self._used = number, time.monotonic(), self._cpu_seconds()
        elif number != self.ended_by and (
            self._cpu_seconds() - self._used > HANG_SECONDS or time.monotonic() - self._since > WAITS_SECONDS
        ):
            self.process.kill()

    def _cpu_seconds(self) -> float:
        """Rather than the clock's, which a busy machine stretches."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Fuzzer:
    """Processes that try inputs, started again after one that an input has ended."""

    def __init__(self, out: Path | None, seed: int, inputs: int, processes: int, seconds: float):
        self._out, self._seed, self._inputs, self._processes = out, seed, inputs, processes
        self._stop_at = time.time() + seconds
        self.counts: collections.Counter = collections.Counter()
        self.defects: dict[str, list[int]] = {}
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, _Worker] = {}

    def run(self) -> None:
        for first in range(self._processes):
            self._start(first)
        shown = time.monotonic()
        while self._workers:
            for pipe in wait(list(self._workers), timeout=1):
                self._hear(pipe)  # pyright: ignore[reportArgumentType]
            for worker in self._workers.values():
                worker.end_if_it_hangs()
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(f"{sum(self.counts.values()):,} inputs, {len(self.defects)} kinds of defect", flush=True)

    def _start(self, first: int, ended_by: int = -1) -> None:
        ours, theirs = self._context.Pipe()
        current = self._context.RawValue(ctypes.c_longlong, ended_by)
        arguments = (theirs, current, self._seed, first, self._inputs, self._processes, self._stop_at)
        process = self._context.Process(target=work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._workers[ours] = _Worker(process, current, ended_by)

    def _hear(self, pipe: Connection) -> None:
        try:
            what, number, tried, content = pipe.recv()
        except (EOFError, ConnectionResetError):
            worker = self._workers.pop(pipe)
            worker.process.join()
            number = worker.current.value
            if number == worker.ended_by:
                raise SystemExit(f"a process ended without an input: exit code {worker.process.exitcode}") from None
            self._start(number + self._processes, number)
            return
        if what == "ended":
            self._note(number, "the process crashed or took too long", tried)
            self.counts[tried.kind, "defect"] += 1
        elif what == "defect":
            self._note(number, content, tried)
        elif what == "counts":
            self.counts.update(content)
        else:
            self._workers.pop(pipe).process.join()

    def _note(self, number: int, defect: str, tried: Input) -> None:
        """The first input of each kind of defect is saved."""
        place = f"{tried.kind}: {defect.partition(':')[0]}"
        if place not in self.defects:
            print(f"{self._seed}:{number} {tried.file}: {defect}", file=sys.stderr, flush=True)
        if self._out is not None and len(self.defects.get(place, ())) < 3:
            self._out.mkdir(parents=True, exist_ok=True)
            with open(self._out / "defects.jsonl", "a") as file:
                file.write(tried.to_json(found=defect, input=f"{self._seed}:{number}") + "\n")
        self.defects.setdefault(place, []).append(number)


def summary(counts: collections.Counter) -> str:
    """A row a kind of file: inputs read, refused, defects."""
    results = ("read", "refused", "defect")
    rows = [("kind of file", *results)]
    for kind in sorted({kind for kind, _ in counts}):
        rows.append((kind, *(f"{counts[kind, result]:,}" for result in results)))
    rows.append(("all", *(f"{sum(n for (_, found), n in counts.items() if found == r):,}" for r in results)))
    return "\n".join(f"{row[0]:24}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)


def run(
    inputs: int = 1_000_000,
    seed: int = 0,
    processes: int = 2,
    seconds: float = float("inf"),
    out: Path = Path("fuzz-out"),
    replay: str | None = None,
) -> None:
    """Tries damaged checkpoints; exits with 1 if one is neither read right nor refused in a sentence.

    Args:
        inputs: How many.
        seed: From which they follow.
        processes: That share them.
        seconds: After which to end, however many are left.
        out: Where inputs with a defect are saved, in defects.jsonl.
        replay: One input, SEED:NUMBER, or a file of saved ones, instead.
    """
    if replay is not None:
        return _replay(replay)
    fuzzer = Fuzzer(out, seed, inputs, processes, seconds)
    began = time.monotonic()
    fuzzer.run()
    total, took = sum(fuzzer.counts.values()), time.monotonic() - began
    print(summary(fuzzer.counts))
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    print(f"{total:,} inputs in {took:.0f} s, {total / took:.0f} a second, {total / used:.0f} a second of one core")
    for place, numbers in sorted(fuzzer.defects.items(), key=lambda found: -len(found[1])):
        print(f"{len(numbers):6} {place}, first {seed}:{numbers[0]}")
    sys.exit(1 if fuzzer.defects else 0)


def _replay(name: str) -> None:
    from tests.fuzz import checkpoints

    with tempfile.TemporaryDirectory(dir=_scratch()) as directory, checkpoints.remembered_shapes():
        bench = Bench(Path(directory))
        if Path(name).is_file():
            found = [(Input.from_json(line), line[:0] or name) for line in Path(name).read_text().splitlines()]
        else:
            seed, _, number = name.partition(":")
            found = [(bench.draw(int(seed), int(number)), name)]
        for tried, origin in found:
            print(
                f"{tried.file} ({len(tried.content)} bytes): {tried.content[:3000]!r}"
                if len(found) == 1
                else tried.file
            )
            print("  ", *bench.try_input(tried, origin))


if __name__ == "__main__":
    tyro.cli(run)
