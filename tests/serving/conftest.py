"""A small model behind a real server on the loopback, and the official client."""

import asyncio
import base64
import contextlib
import io
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import openai
import pytest
import soundfile
import uvicorn

from moss_audio_jax import Engine, MossAudio, Processor, load_model, load_processor
from moss_audio_jax.inference.turns import Turns
from moss_audio_jax.serving.app import make_app
from moss_audio_jax.serving.service import Service
from tests.conftest import add_thinking_tokens

MAX_LENGTH = 1280  # a question of bytes about times, 5 s of audio, and an answer with times of words


@pytest.fixture(scope="package")
def checkpoint(released: Path, tmp_path_factory) -> Path:
    """With the tokens of a Thinking checkpoint."""
    directory = shutil.copytree(released, tmp_path_factory.mktemp("served") / "small")
    add_thinking_tokens(directory)
    return directory


@pytest.fixture(scope="package")
def model(checkpoint: Path) -> MossAudio:
    return load_model(checkpoint, dtype=jnp.float32)


@pytest.fixture(scope="package")
def processor(checkpoint: Path) -> Processor:
    return load_processor(checkpoint)


@dataclass
class Server:
    """A server in this process. url: of it, without /v1."""

    service: Service
    url: str
    requests: Any = None

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | options))


@contextlib.contextmanager
def serving(service: Service, app: Any = None) -> Iterator[Server]:
    """Serves from another thread. app: that of the service, if it is not the usual one."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app or make_app(service), log_level="warning", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        yield Server(service, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(30)
        service.close()
        assert not thread.is_alive()


def make_service(models: dict[str, MossAudio], processor: Processor, slots: int = 3, **options: Any) -> Service:
    turns = Turns()
    engines = {
        name: Engine(model, processor, slots=slots, max_length=MAX_LENGTH, every=4, turns=turns)
        for name, model in models.items()
    }
    return Service(engines, processor, **options)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16000)).astype(np.float32)


def encoded(wave: np.ndarray, rate: int = 16000, format: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=format, subtype=subtype)
    return file.getvalue()


def audio_part(wave: np.ndarray | bytes, format: str = "wav") -> dict[str, Any]:
    content = wave if isinstance(wave, bytes) else encoded(wave)
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": format}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    content = [text_part(part) if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def until(holds: Any, seconds: float = 30.0) -> None:
    """Waits until `holds()`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)
