"""The server under load and abuse: its queue, its limits, its key, clients that leave, an engine that ends."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moss_audio_jax.serving.limits import Limits
from moss_audio_jax.timelines.timeline import Timeline
from tests.serving.conftest import Server, audio_part, encoded, make_service, noise, serving, until, user
from tests.test_generate import broken

KEY = "sk-secret"
LIMITS = Limits(queue=2, max_body_mb=1, body_seconds=1.5, max_answers=3, max_audio_seconds=30)
LONG = {"model": "small", "messages": [user("Go on.")], "max_tokens": 1100, "min_tokens": 1100}
SHORT = {"model": "small", "messages": [user("?")], "max_tokens": 3}


@pytest.fixture(scope="module")
def server(model, processor) -> Iterator[Server]:
    """With one slot, and room for two answers that wait."""
    with serving(make_service({"small": model}, processor, slots=1, limits=LIMITS, key=KEY)) as server:
        server.client(api_key=KEY).chat.completions.create(**SHORT)
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    yield server.client(api_key=KEY)
    until(lambda: is_idle(server))


@pytest.fixture
def slow(server: Server, monkeypatch) -> None:
    """Four tokens take 0.1 s at least."""
    engine = server.service.models["small"].engine
    decode = engine._decode

    def slowed(*arguments: Any, **options: Any) -> None:
        time.sleep(0.1)
        decode(*arguments, **options)

    monkeypatch.setattr(engine, "_decode", slowed)


def is_idle(server: Server) -> bool:
    served = server.service.models["small"]
    return served.held == 0 == served.engine.busy + served.engine.waiting and server.service.requests == 0


@contextlib.contextmanager
def post(server: Server, body: Any, path: str = "chat/completions", timeout: float = 60) -> Iterator[httpx.Response]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx.stream("POST", f"{server.url}/v1/{path}", json=body, headers=headers, timeout=timeout) as found:
        yield found


def metrics(server: Server) -> dict[tuple[str, ...], float]:
    """Name and values of labels -> value."""
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    families = text_string_to_metric_families(text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def create(client: openai.OpenAI, **body: Any) -> Any:
    known = {name: value for name, value in body.items() if name != "min_tokens"}
    return client.chat.completions.create(**known, extra_body={"min_tokens": body.get("min_tokens")})


def test_a_full_queue_says_when_to_try_again(server, client, slow):
    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(create, client, **LONG, stream=True) for _ in range(3)]
        until(lambda: server.service.models["small"].held == 3)
        assert metrics(server)["moss_audio_queue", "small"] == 2
        assert metrics(server)["moss_audio_slots_busy", "small"] == 1
        for body in (SHORT, SHORT | {"stream": True}):
            with pytest.raises(openai.RateLimitError) as error:
                create(client, **body)
            assert 1 <= int(error.value.response.headers["Retry-After"]) <= 60
            assert error.value.type == "rate_limit_error" and error.value.code == "overloaded"
        files = {"model": "small", "file": ("a.wav", encoded(noise(1)))}
        with pytest.raises(openai.RateLimitError):
            client.audio.transcriptions.create(**files)
        for stream in streams:
            stream.result().close()
    until(lambda: is_idle(server))
    with pytest.raises(openai.BadRequestError, match="n must be at most 3"):
        create(client, **SHORT, n=4)
    assert len(create(client, **SHORT, n=3).choices) == 3


def test_a_client_that_leaves_frees_its_slot(server, client, slow):
    """During a stream, while it waits for a whole answer, while it waits in the queue, and during a transcription."""
    begun = time.monotonic()
    with post(server, LONG | {"stream": True}) as streaming:
        lines = streaming.iter_lines()
        next(lines)
        for _ in range(2):  # these wait
            with pytest.raises(httpx.ReadTimeout), post(server, LONG, timeout=0.3):
                pass
        until(lambda: server.service.models["small"].held == 1)
    until(lambda: is_idle(server))
    with pytest.raises(httpx.ReadTimeout), post(server, LONG, timeout=0.3):
        pass
    until(lambda: is_idle(server))
    url, files = f"{server.url}/v1/audio/transcriptions", {"file": encoded(noise(25), subtype="PCM_U8")}
    with pytest.raises(httpx.ReadTimeout):
        headers = {"Authorization": f"Bearer {KEY}"}
        httpx.post(url, files=files, data={"model": "small"}, headers=headers, timeout=0.2)
    until(lambda: is_idle(server))
    data = {"model": "small", "stream": "true"}
    with httpx.stream("POST", url, files=files, data=data, headers=headers, timeout=60) as streaming:
        assert next(streaming.iter_lines()).startswith("data: ")
    until(lambda: is_idle(server))
    seconds = time.monotonic() - begun
    assert seconds < 20  # an answer takes 27 s


def test_a_client_that_leaves_while_its_clip_is_read_is_forgotten(server, client, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()
    wave = server.service.media.wave

    def slowly(*arguments: Any) -> Any:
        reading.set()
        assert go_on.wait(30)
        return wave(*arguments)

    monkeypatch.setattr(server.service.media, "wave", slowly)
    with ThreadPoolExecutor(1) as pool:
        body = LONG | {"messages": [user(audio_part(noise(1)))]}
        sent = pool.submit(lambda: post(server, body, timeout=0.5).__enter__())
        assert reading.wait(30)
        with pytest.raises(httpx.ReadTimeout):
            sent.result()
    go_on.set()
    until(lambda: is_idle(server))


def test_a_key_is_needed(server, client):
    assert client.models.list().data
    for key in ("sk-secre", "sk-secret", "", "ü"):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/metrics")):
            found = httpx.request(method, server.url + path, headers={"Authorization": f"Bearer {key}x".encode()})
            assert (found.status_code, found.json()["error"]["type"]) == (401, "authentication_error")
            assert found.headers["WWW-Authenticate"] == "Bearer" and KEY not in found.text
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="other").models.list()


def test_a_body_that_is_too_large_is_refused(server, client):
    """By its length, and where it comes in chunks that don't tell it."""
    large = [b"x" * (1 << 20)] * 3
    headers = {"Authorization": f"Bearer {KEY}"}
    for content in (b"".join(large), iter(large), iter(large * 10)):
        found = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")
    with pytest.raises(openai.APIStatusError) as error:
        client.audio.transcriptions.create(model="small", file=b"".join(large))
    assert error.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="at most 30 s of audio"):
        recording = encoded(noise(31), subtype="PCM_U8")
        client.audio.transcriptions.create(model="small", file=recording)


def raw(server: Server, content: bytes, seconds: float = 30) -> bytes:
    """Sends bytes, and returns all that comes back until the server closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(content)
        found = b""
        while block := connection.recv(65536):
            found += block
        return found


HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"


def test_a_body_that_does_not_come_is_not_waited_for(server, client):
    begun = time.monotonic()
    found = raw(server, f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    assert b" 408 " in found.splitlines()[0] and b'"code": "timeout"' in found
    assert time.monotonic() - begun < 10


def test_what_is_no_http_is_refused(server, client):
    assert b" 400 " in raw(server, b"\0\1\2\3\r\n\r\n").splitlines()[0]
    assert b" 400 " in raw(server, f"{HEAD}Content-Length: many\r\n\r\n".encode()).splitlines()[0]
    assert create(client, **SHORT).choices


def test_more_bodies_than_are_answered_are_refused(server, client):
    """Three may come at the same time: one for the slot, two for the queue."""
    address = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(socket.create_connection((address[0], int(address[1]))))
            connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        until(lambda: server.service.requests == 3)
        for text in ("?", "x" * 900_000):  # the client sends all of it before it reads the answer
            with pytest.raises(openai.RateLimitError):
                create(client, **(SHORT | {"messages": [user(text)]}))


def test_more_requests_than_the_limit_get_503_in_json(server, client, slow, monkeypatch):
    limits = dataclasses.replace(LIMITS, connections=1)
    monkeypatch.setattr(server.service, "limits", limits)
    with post(server, LONG | {"stream": True}) as begun:
        lines = begun.iter_lines()  # kept: the stream is closed with it
        next(lines)
        refused = httpx.get(f"{server.url}/health")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "unavailable"
        assert int(refused.headers["retry-after"]) > 0


def test_metrics_count_what_was_done(server, client):
    before = metrics(server)
    create(client, **SHORT, n=2)
    with pytest.raises(openai.NotFoundError):
        create(client, **(SHORT | {"model": "large"}))
    after = metrics(server)

    def change(*key: str) -> float:
        return after[key] - before.get(key, 0)

    path = "/v1/chat/completions"
    assert change("moss_audio_requests_total", path, "200") == 1 == change("moss_audio_requests_total", path, "404")
    assert change("moss_audio_errors_total", path, "404") == 1
    assert ("moss_audio_errors_total", path, "200") not in after
    assert 2 <= change("moss_audio_tokens_total", "small") <= 6
    assert change("moss_audio_prompt_tokens_total", "small") > 10
    assert change("moss_audio_time_to_first_token_seconds_count", "small") == 1
    assert change("moss_audio_time_to_first_token_seconds_sum", "small") > 0
    assert change("moss_audio_request_seconds_count", path) == 2
    assert after["moss_audio_slots", "small"] == 1 and after["moss_audio_queue", "small"] == 0
    paths = {key[1] for key in after if key[0] == "moss_audio_requests_total"}
    httpx.get(f"{server.url}/v1/{time.time()}")
    found = metrics(server)
    assert {key[1] for key in found if key[0] == "moss_audio_requests_total"} <= paths | {"other", "/metrics"}


def test_a_timeline_is_made_of_any_answer(server, client):
    text = "[0.00]hello[2.01][2.50]there[4.00] and more"
    timeline = Timeline.parse(text, 3.0)
    with post(server, {"text": text, "seconds": 3.0}, "timelines") as found:
        assert json.loads(found.read()) == timeline.to_json() and timeline.problems
    writers = {"srt": timeline.to_srt, "vtt": timeline.to_vtt, "csv": timeline.to_csv, "audacity": timeline.to_audacity}
    for name, writer in writers.items():
        with post(server, {"text": text, "format": name}, "timelines") as found:
            assert found.read().decode() == writer()
    for body, param in (({"text": text, "format": "pdf"}, "format"), ({"seconds": 1}, "text"), ({"text": 1}, "text")):
        with post(server, body, "timelines") as found:
            assert (found.status_code, json.loads(found.read())["error"]["param"]) == (400, param)


def test_draining_refuses_what_is_new_and_answers_what_has_begun(server, client, slow):
    with post(server, LONG | {"stream": True, "max_tokens": 60, "min_tokens": 60}) as streaming:
        lines = streaming.iter_lines()
        next(lines)
        server.service.draining = True
        try:
            assert httpx.get(f"{server.url}/health").status_code == 503
            with pytest.raises(openai.InternalServerError) as error:
                create(client, **SHORT)
            assert error.value.status_code == 503 and error.value.code == "unavailable"
            assert client.models.list().data
            assert [line for line in lines if line][-1] == "data: [DONE]"
        finally:
            server.service.draining = False


def test_adapters_are_models_of_their_own(model, processor):
    other = broken_in_part(model)
    with serving(make_service({"small": model, "loud": other}, processor, slots=1)) as server:
        client = server.client()
        assert [found.id for found in client.models.list()] == ["small", "loud"]
        texts = {}
        with ThreadPoolExecutor(6) as pool:
            for name, answer in [
                (name, pool.submit(create, client, **(SHORT | {"model": name, "max_tokens": 20})))
                for name in ("small", "loud") * 3
            ]:
                texts.setdefault(name, set()).add(answer.result().choices[0].message.content)
        assert [len(each) for each in texts.values()] == [1, 1] and texts["small"] != texts["loud"]


def broken_in_part(model: Any) -> Any:
    """The model with another norm, as a model that shares all other arrays."""
    from moss_audio_jax.weights.parameters import build_model, parameters_of

    parameters = parameters_of(model)
    scale = parameters["language_model.norm.scale"]
    return build_model(model.config, parameters | {"language_model.norm.scale": -scale})


def test_an_answer_that_fails_is_an_error_and_the_others_go_on(model, processor):
    failing = broken(model, "language_model.layers.mlp.up_proj.kernel", 1)
    with serving(make_service({"small": model, "failing": failing}, processor, slots=1)) as server:
        client = server.client()
        with pytest.raises(openai.InternalServerError, match="not finite"):
            create(client, **(SHORT | {"model": "failing"}))
        with pytest.raises(openai.APIError, match="not finite"):
            list(create(client, **(SHORT | {"model": "failing"}), stream=True))
        assert create(client, **SHORT).choices
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert metrics(server)["moss_audio_failed_answers_total", "failing"] == 2


def test_an_engine_that_has_ended_is_told(model, processor, monkeypatch):
    with serving(make_service({"small": model}, processor, slots=1)) as server:
        client, engine = server.client(), server.service.models["small"].engine

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("the device is gone, at /secret/path")

        monkeypatch.setattr(engine, "_decode", fail)
        with pytest.raises(openai.InternalServerError) as error:
            create(client, **SHORT)
        assert error.value.status_code == 500 and "secret" not in str(error.value)
        with pytest.raises(openai.InternalServerError) as error:
            create(client, **SHORT)
        assert error.value.status_code == 503 and "has ended" in str(error.value)
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503 and "secret" not in health.text


def test_limits_are_checked():
    from moss_audio_jax import MossAudioError

    for name, value in (("queue", -1), ("readers", 0), ("body_seconds", float("nan")), ("max_body_mb", 0)):
        with pytest.raises(MossAudioError, match=f"{name} must be"):
            dataclasses.replace(LIMITS, **{name: value})
