"""Chats through the official client: the answers of the engine, whole and in pieces."""

from collections.abc import Iterator

import openai
import pytest

from moss_audio_jax import generate
from tests.serving.conftest import Server, audio_part, make_service, noise, serving, user


@pytest.fixture(scope="module")
def server(model, processor) -> Iterator[Server]:
    with serving(make_service({"small": model}, processor)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def test_an_answer_is_that_of_generate(client, model, processor):
    wave = noise(1.5)
    found = client.chat.completions.create(
        model="small", messages=[user(audio_part(wave), "Describe it.")], max_completion_tokens=12
    )
    inputs = processor(["Describe it."], [[wave]])
    (expected,) = generate(model, inputs, max_new_tokens=12)
    assert found.choices[0].message.content == processor.decode(expected)
    assert found.usage.prompt_tokens == int((inputs.segment_ids != 0).sum())
