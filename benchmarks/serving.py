"""`moss-audio serve` under many clients at once: `python -m benchmarks.serving [--clients 64] [--seconds 60]`.

Starts a server with a model of random weights, in a process of its own. Each client sends requests one after the other:
questions about a clip, streamed and whole, and transcriptions. Some leave in the middle of an answer, some send a body
slowly, some send what must be refused. Every answer must be the one that `generate` gives, or for a transcription the
one that the server gave alone; every refusal must have the right code; at the end no slot is in use and no connection
open. Needs the extra `serve`.
"""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import io
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import soundfile
import tyro

from benchmarks.sessions import MEDIUM
from convert.rehearse import write_random_checkpoint
from moss_audio_jax import MossAudioConfig, generate, load_model, load_processor
from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.commands.cli import run_cli
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.text_table import align

QUESTIONS = ("What is heard?", "Who speaks?", "Is it music?", "Describe the sound in one sentence.")
CLIP_SECONDS = (0.5, 1.5, 3.0, 5.0)
NEW_TOKENS = 24
MAX_LENGTH = 512
# What a client does next, and how often.
KINDS = {"streamed": 40, "whole": 20, "transcription": 15, "leaves": 10, "slow": 5, "refused": 10}
SLOW_PIECES, SLOW_SECONDS = 20, 2.0
PATIENCE = 300.0  # seconds without an answer after which a request counts as lost


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a clip, and its answer. expected: by `generate`."""

    body: dict[str, Any]
    expected: str


@dataclasses.dataclass(frozen=True)
class Recording:
    """A clip to transcribe. expected: the text that the server gave while it had nothing else to do."""

    wav: bytes
    expected: str


@dataclasses.dataclass
class Seen:
    """What all clients saw together. first: seconds to the first text of streamed answers."""

    ended: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    told_to_wait: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    memory: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Report:
    """memory in bytes: the largest, and medians over the second and the last quarter of the time."""

    clients: int
    seconds: float
    slots: int
    ended: dict[str, int]
    told_to_wait: int
    requests_per_second: float
    tokens_per_second: float
    first_token_p50: float
    first_token_p95: float
    memory_peak: int
    memory_second_quarter: int
    memory_last_quarter: int

    def __str__(self) -> str:
        rows = [
            ["requests", ", ".join(f"{count} {kind}" for kind, count in self.ended.items())],
            ["told to try again (429)", str(self.told_to_wait)],
            ["requests/s", f"{self.requests_per_second:.1f}"],
            ["tokens/s", f"{self.tokens_per_second:.0f}"],
            ["time to the first token, s", f"{self.first_token_p50:.2f} (p50), {self.first_token_p95:.2f} (p95)"],
            ["peak memory of the server", f"{self.memory_peak / 2**20:,.0f} MiB"],
            ["memory in the second and the last quarter", f"{self.memory_second_quarter / 2**20:,.0f}, "
             f"{self.memory_last_quarter / 2**20:,.0f} MiB"],
        ]  # fmt: skip
        return f"{self.clients} clients for {self.seconds:.0f} s, {self.slots} slots\n" + align(rows)


def measure(
    clients: int = 64,
    seconds: float = 60.0,
    slots: int = 16,
    preset: Literal["tiny", "small", "medium"] = "small",
    json_file: Path | None = None,
) -> Report:
    """Prints how the server does.

    Args:
        clients: Number of clients.
        seconds: Time for which they send requests.
        slots: Slots of the server.
        preset: Size of the model.
        json_file: Write the figures as JSON too.
    """
    config = MEDIUM if preset == "medium" else MossAudioConfig.preset(preset)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model"
        write_random_checkpoint(config, checkpoint, seed=0)
        write_small_tokenizer(checkpoint)
        questions = make_questions(checkpoint)
        options = ["--slots", str(slots), "--max-length", str(MAX_LENGTH), "--queue", str(clients // 2)]
        with served(checkpoint, *options) as (process, url):
            before = open_sockets(process.pid)
            seen = asyncio.run(load(url, process.pid, questions, clients, seconds))
            seen.wrong += still_open(process.pid, before)
    if seen.wrong:
        raise MossAudioError(f"{len(seen.wrong)} requests went wrong, the first of them so: {seen.wrong[0]}")
    report = summary(seen, clients, seconds, slots)
    print(report)
    if json_file is not None:
        json_file.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return report


def make_questions(checkpoint: Path) -> list[Question]:
    """Returns each question about each clip, with the answer of `generate`."""
    model, processor = load_model(checkpoint), load_processor(checkpoint)
    questions = []
    for text in QUESTIONS:
        for seconds in CLIP_SECONDS:
            wave = noise(seconds)
            ids = generate(model, processor([text], [[wave]]), max_new_tokens=NEW_TOKENS)[0].tolist()
            ended = next((place for place, token in enumerate(ids) if token in model.config.eos_ids), len(ids))
            audio = {"data": base64.b64encode(wav(wave)).decode(), "format": "wav"}
            content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": text}]
            body = {"messages": [{"role": "user", "content": content}], "max_completion_tokens": NEW_TOKENS}
            questions.append(Question(body | {"model": checkpoint.name}, processor.decode(ids[:ended])))
    return questions


def noise(seconds: float) -> np.ndarray:
    rng = np.random.default_rng(round(seconds * 1000))
    return rng.normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


def wav(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


@contextlib.contextmanager
def served(checkpoint: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts a server, waits until it answers, and yields its process and URL; then ends it, and requires code 0."""
    command = [sys.executable, "-m", "moss_audio_jax", "serve", str(checkpoint), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"at (http://\S+);", line):
                break
        else:
            raise MossAudioError("the server did not start:\n" + "".join(said))
        try:
            yield process, found[1]
        finally:
            process.terminate()
            _, rest = process.communicate(timeout=120)
    if process.returncode != 0:
        raise MossAudioError(f"the server ended with code {process.returncode}:\n{rest}")


async def load(url: str, pid: int, questions: Sequence[Question], clients: int, seconds: float) -> Seen:
    """Sends the requests of all clients, and waits until the last of them has ended."""
    seen = Seen()
    limits = httpx.Limits(max_connections=clients + 2, max_keepalive_connections=clients + 2)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        recordings = [await recording(client, seconds) for seconds in CLIP_SECONDS]
        sampling = asyncio.create_task(sample_memory(pid, seen))
        end = time.monotonic() + seconds
        work = [Client(client, seen, questions, recordings, number).run(end) for number in range(clients)]
        await asyncio.gather(*work)
        sampling.cancel()
        seen.wrong += await left_over(client)
    return seen


async def recording(client: httpx.AsyncClient, seconds: float) -> Recording:
    content = wav(noise(seconds))
    response = await client.post("/v1/audio/transcriptions", **transcription(content))
    response.raise_for_status()
    return Recording(content, response.json()["text"])


def transcription(content: bytes) -> dict[str, Any]:
    return {"files": {"file": ("clip.wav", content)}, "data": {"model": "model"}}


async def sample_memory(pid: int, seen: Seen) -> None:
    """Notes the resident memory of the server, twice a second."""
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        seen.memory.append(int(found[1]) * 1024)
        await asyncio.sleep(0.5)


async def left_over(client: httpx.AsyncClient) -> list[str]:
    """Says what is still in use a while after the last request."""
    text = ""
    for _ in range(100):
        text = (await client.get("/metrics")).text
        if re.search(r"^moss_audio_slots_busy\{.*\} 0\.0$", text, re.M) and re.search(
            r"^moss_audio_queue\{.*\} 0\.0$", text, re.M
        ):
            return []
        await asyncio.sleep(0.1)
    return [f"slots or the queue are in use after the last request:\n{text}"]


def still_open(pid: int, before: int) -> list[str]:
    """Says how many connections the server holds a while after the last client has closed its own."""
    end = time.monotonic() + 10
    while (now := open_sockets(pid)) > before:
        if time.monotonic() > end:
            return [f"the server has {now} sockets open after the last client left, {before} before the first came"]
        time.sleep(0.1)
    return []


def open_sockets(pid: int) -> int:
    """Returns the number of sockets that a process has open."""
    count = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += str(file.readlink()).startswith("socket:")
    return count


class Client:
    """Sends one request after the other."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        seen: Seen,
        questions: Sequence[Question],
        recordings: Sequence[Recording],
        number: int,
    ):
        self._client, self._seen = client, seen
        self._questions, self._recordings = questions, recordings
        self._random = random.Random(number)

    async def run(self, end: float) -> None:
        """Sends requests until `end`, of `time.monotonic`."""
        while time.monotonic() < end:
            (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
            try:
                wait = await getattr(self, f"_{kind}")()
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self._seen.wrong.append(f"{kind}: {error!r}")
                return
            if wait:
                self._seen.told_to_wait += 1
                await asyncio.sleep(min(wait, max(0.0, end - time.monotonic())))
            else:
                self._seen.ended[kind] += 1

    async def _streamed(self) -> float:
        question, begin = self._random.choice(self._questions), time.monotonic()
        body = question.body | {"stream": True, "stream_options": {"include_usage": True}}
        pieces = []
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if wait := retry_after(response):
                return wait
            async for event in events(response):
                delta = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if delta and not any(pieces):
                    self._seen.first.append(time.monotonic() - begin)
                pieces.append(delta or "")
                if event.get("usage"):
                    self._seen.tokens += event["usage"]["completion_tokens"]
        self._compare("streamed", "".join(pieces), question.expected)
        return 0

    async def _whole(self) -> float:
        question = self._random.choice(self._questions)
        return self._check_whole("whole", await self._client.post("/v1/chat/completions", json=question.body), question)

    async def _slow(self) -> float:
        question = self._random.choice(self._questions)
        content = json.dumps(question.body).encode()

        async def slowly() -> AsyncIterator[bytes]:
            size = -(-len(content) // SLOW_PIECES)
            for begin in range(0, len(content), size):
                yield content[begin : begin + size]
                await asyncio.sleep(SLOW_SECONDS / SLOW_PIECES)

        headers = {"content-type": "application/json"}
        response = await self._client.post("/v1/chat/completions", content=slowly(), headers=headers)
        return self._check_whole("slow", response, question)

    async def _transcription(self) -> float:
        recording = self._random.choice(self._recordings)
        response = await self._client.post("/v1/audio/transcriptions", **transcription(recording.wav))
        if wait := retry_after(response):
            return wait
        response.raise_for_status()
        self._compare("transcription", response.json()["text"], recording.expected)
        return 0

    async def _leaves(self) -> float:
        body = self._random.choice(self._questions).body | {"stream": True}
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if wait := retry_after(response):
                return wait
            async for _ in events(response):
                break
        return 0

    async def _refused(self) -> float:
        question = self._random.choice(self._questions)
        code, change = self._random.choice(REFUSED)
        response = await self._client.post("/v1/chat/completions", json=question.body | change)
        if wait := retry_after(response):
            return wait
        if response.status_code != code or "message" not in response.json()["error"]:
            self._seen.wrong.append(f"{change}: {response.status_code}, not {code}: {response.text[:200]}")
        return 0

    def _check_whole(self, kind: str, response: httpx.Response, question: Question) -> float:
        if wait := retry_after(response):
            return wait
        response.raise_for_status()
        reply = response.json()
        self._seen.tokens += reply["usage"]["completion_tokens"]
        self._compare(kind, reply["choices"][0]["message"]["content"], question.expected)
        return 0

    def _compare(self, kind: str, found: str, expected: str) -> None:
        if found != expected:
            self._seen.wrong.append(f"{kind}: {found!r}, not {expected!r}")


def _clip(data: str) -> dict[str, Any]:
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}


# Code, and what is wrong in the body.
REFUSED = (
    (400, _clip("no base64!")),
    (400, _clip("")),
    (400, _clip(base64.b64encode(wav(np.zeros(0, np.float32))).decode())),
    (400, _clip(base64.b64encode(wav(np.full(16000, np.nan, np.float32))).decode())),
    (404, {"model": "another"}),
    (400, {"temperature": "warm"}),
    (400, {"messages": []}),
)


def retry_after(response: httpx.Response) -> float:
    """Returns the seconds to wait if the server has too much to do, else 0; raises for another code of the server."""
    if response.status_code == 429:
        return float(response.headers["retry-after"])
    if response.status_code >= 500:
        raise ValueError(f"the server answered with {response.status_code}")
    return 0.0


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yields the events of a stream, which must end as it should."""
    response.raise_for_status()
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise ValueError("the stream ended without [DONE]")


def summary(seen: Seen, clients: int, seconds: float, slots: int) -> Report:
    quarter = len(seen.memory) // 4
    first = sorted(seen.first)
    return Report(
        clients=clients,
        seconds=seconds,
        slots=slots,
        ended=dict(sorted(seen.ended.items())),
        told_to_wait=seen.told_to_wait,
        requests_per_second=sum(seen.ended.values()) / seconds,
        tokens_per_second=seen.tokens / seconds,
        first_token_p50=statistics.median(first),
        first_token_p95=first[int(0.95 * (len(first) - 1))],
        memory_peak=max(seen.memory),
        memory_second_quarter=round(statistics.median(seen.memory[quarter : 2 * quarter])),
        memory_last_quarter=round(statistics.median(seen.memory[-quarter:])),
    )


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(measure, description=__doc__))
