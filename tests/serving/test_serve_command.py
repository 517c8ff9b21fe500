"""`moss-audio serve` as a process: adapters, warm-up, SIGTERM, and mistakes in one sentence."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import save_file

from moss_audio_jax import LoraConfig, MossAudioConfig, generate, load_adapter
from moss_audio_jax.serving import command
from moss_audio_jax.weights.locate import ADAPTER_FILE
from moss_audio_jax.weights.names import adapter_leaves
from moss_audio_jax.weights.peft import write_adapter_config
from tests.serving.conftest import audio_part, encoded, noise, until, user
from tests.test_cli import ended
from tests.xla_flags import QUICK

LORA = LoraConfig(rank=2, alpha=3.0, targets=("language_model.layers.*_proj",))


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory) -> Path:
    """As PEFT lays it out."""
    directory = tmp_path_factory.mktemp("adapter")
    config = dataclasses.replace(MossAudioConfig.from_hf(checkpoint), lora=LORA)
    write_adapter_config(directory, config, str(checkpoint))
    rng, tensors = np.random.default_rng(0), {}
    for leaf in adapter_leaves(config).values():
        tensors |= {name: rng.normal(0, 0.2, leaf.tensor_shape).astype(np.float32) for name in leaf.names}
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    return directory


class Process:
    """A running `moss-audio serve`. said: its lines on stderr so far."""

    def __init__(self, *arguments: object):
        environment = os.environ | {"XLA_FLAGS": QUICK, "MOSS_AUDIO_API_KEY": "sk-1"}
        options = [*map(str, arguments), "--port", "0", "--slots", "2", "--max-length", "384", "--queue", "3"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moss_audio_jax", "serve", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.said: list[str] = []
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()
        until(lambda: self.line("at http://") or self.process.poll() is not None, 300)
        assert self.process.poll() is None, self.said
        self.url = re.findall(r"http://[\d.]+:\d+", self.line("at http://"))[0]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="sk-1", max_retries=0)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip("\n"))

    def line(self, part: str) -> str:
        return next((line for line in self.said if part in line), "")

    def end(self) -> None:
        self.process.kill()
        self.process.wait(30)


@pytest.fixture(scope="module")
def process(checkpoint: Path, adapter: Path) -> Iterator[Process]:
    process = Process(checkpoint, "--adapter", f"loud={adapter}")
    yield process
    process.end()


def test_a_process_serves_a_model_and_its_adapter(process, model, processor, adapter):
    assert httpx.get(f"{process.url}/health").json() == {"status": "ok"}
    assert [found.id for found in process.client.models.list()] == ["small", "loud"]
    wave = noise(1)
    for name, expected in (("small", model), ("loud", load_adapter(model, adapter))):
        found = process.client.chat.completions.create(
            model=name, messages=[user(audio_part(wave), "Describe it.")], max_tokens=8
        )
        (ids,) = generate(expected, processor(["Describe it."], [[wave]]), max_new_tokens=8)
        assert found.choices[0].message.content == processor.decode(ids)
    assert process.client.audio.transcriptions.create(model="loud", file=encoded(wave)).text
    assert httpx.get(f"{process.url}/v1/models").status_code == 401


def test_sigterm_answers_what_has_begun_and_refuses_what_comes(process):
    client, long = process.client, {"messages": [user("Go on.")], "max_tokens": 300, "extra_body": {"min_tokens": 300}}
    streams = [client.chat.completions.create(model="small", stream=True, **long) for _ in range(4)]
    first = next(iter(streams[0]))
    begun = time.monotonic()
    process.process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{process.url}/health").status_code == 503)
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="small", **long)
    assert error.value.status_code == 503
    assert first.choices[0].index == 0
    for stream in streams:
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] == "length"
    assert process.process.wait(30) == 0
    assert time.monotonic() - begun < 30
    process.thread.join(10)
    assert not process.line("Traceback") and not process.line("ERROR")


def test_a_server_that_is_not_left_alone_ends_all_the_same(checkpoint, heard_interrupts):
    """Within its seconds, though a client neither reads nor leaves; also after Ctrl-C."""
    process = Process(checkpoint, "--drain-seconds", "1")
    try:
        host, port = process.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as stuck:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer sk-1\r\n"
            stuck.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            time.sleep(0.3)
            process.process.send_signal(signal.SIGINT)
            assert process.process.wait(20) == 0
        process.thread.join(10)
        assert process.line("requests had not ended after 1 s") and not process.line("Traceback")
    finally:
        process.end()


def test_mistakes_are_one_sentence(checkpoint, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, message in (
            (["--port", port], f"port {port} of 127.0.0.1 can't be used (Address already in use): give another --port"),
            (["--port", "99999"], "port 99999 of 127.0.0.1 can't be used"),
            (["--adapter", "loud"], "--adapter must be NAME=PATH, not 'loud'"),
            (["--adapter", "small=a"], "--adapter must give each model a name of its own, not 'small' again"),
            (["--slots", "0"], "--slots must be 1 or more, not 0"),
            (["--queue", "-1"], "--queue must be 0 or more, not -1"),
            (["--api-key", "ü"], "--api-key must be of printable ASCII characters"),
        ):
            code, out, err = ended("moss_audio_jax", ["serve", str(checkpoint), *options], monkeypatch, capsys)
            assert (code, out) == (2, "") and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_missing_library_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette", None)
    code, _, err = ended("moss_audio_jax", ["serve", "nowhere"], monkeypatch, capsys)
    assert code == 2
    assert err == "error: serving needs starlette, which is not installed: pip install 'moss-audio-jax[serve]'\n"


def test_a_socket_does_not_listen_before_the_model_is_loaded():
    found = command.bound_socket("127.0.0.1", 0)
    with found, pytest.raises(ConnectionRefusedError):
        socket.create_connection(found.getsockname(), timeout=5)
