"""Chats through the official client: the answers of the engine, whole and in pieces."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from moss_audio_jax import Request, Sampling, generate
from moss_audio_jax.inference.requests import Reply
from tests.conftest import THINK
from tests.serving.conftest import Server, audio_part, encoded, make_service, noise, serving, user

SPAN = "<|audio_bos|><|AUDIO|><|audio_eos|>"
MESSAGES = [user(audio_part(noise(1.5)), "Describe it.")]


@pytest.fixture(scope="module")
def server(model, processor) -> Iterator[Server]:
    with serving(make_service({"small": model}, processor)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def ask(client: openai.OpenAI, messages: Any = MESSAGES, tokens: int = 12, **options: Any) -> Any:
    return client.chat.completions.create(model="small", messages=messages, max_completion_tokens=tokens, **options)


def streamed(client: openai.OpenAI, **options: Any) -> dict[int, dict[str, Any]]:
    """The answers of a stream, by number, with their pieces joined."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in ask(client, stream=True, **options):
        for choice in chunk.choices:
            answer = found.setdefault(choice.index, {"content": "", "reasoning": "", "logprobs": [], "pieces": 0})
            answer["content"] += choice.delta.content or ""
            answer["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            answer["logprobs"] += choice.logprobs.content if choice.logprobs else []
            answer["pieces"] += bool(choice.delta.content)
            answer["reason"] = choice.finish_reason
    return found


def engine_s(server: Server, **options: Any) -> Reply:
    """The engine's own reply to the question of MESSAGES."""
    request = Request("Describe it.", [noise(1.5)], **({"max_new_tokens": 12} | options))
    return server.service.models["small"].engine.run([request])[0]


def test_an_answer_is_that_of_generate(client, model, processor):
    inputs = processor(["Describe it."], [[noise(1.5)]])
    (expected,) = generate(model, inputs, max_new_tokens=12)
    found = ask(client)
    (choice,) = found.choices
    assert choice.message.content == processor.decode(expected) and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.logprobs is None
    read = int((inputs.segment_ids != 0).sum())
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (read, 12, read + 12)
    assert found.usage.prompt_tokens_details.audio_tokens == int((inputs.audio_slots >= 0).sum()) == 19
    assert found.model == "small" and found.object == "chat.completion" and found.id.startswith("chatcmpl-")


def test_the_pieces_of_a_stream_join_to_the_answer(client):
    whole = ask(client, tokens=40)
    (found,) = streamed(client, tokens=40).values()
    assert found["content"] == whole.choices[0].message.content and found["pieces"] > 2
    assert found["reason"] == "length"
    first, *_, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert first.choices[0].delta.role == "assistant" and first.usage is None
    assert last.choices == [] and last.usage == ask(client).usage


def test_logprobs_are_those_of_the_engine(client, server, processor):
    reply = engine_s(server, max_new_tokens=24)
    whole = ask(client, tokens=24, logprobs=True).choices[0].logprobs.content
    assert [token.logprob for token in whole] == pytest.approx(reply.logprobs, abs=1e-6)
    content = b"".join(bytes(token.bytes) for token in whole)
    assert content == processor.tokenizer.decode_bytes(reply.ids, skip_special_tokens=False)
    assert streamed(client, tokens=24, logprobs=True)[0]["logprobs"] == whole


def test_n_answers_have_as_many_seeds(client, server):
    sampled = {"temperature": 1.0, "seed": 7}
    found = ask(client, n=3, **sampled)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2] and len({*texts}) == 3
    assert [ask(client, **(sampled | {"seed": seed})).choices[0].message.content for seed in (7, 8, 9)] == texts
    streams = streamed(client, n=3, **sampled)
    assert [streams[number]["content"] for number in range(3)] == texts
    reply = engine_s(server, n=3, seed=7, sampling=Sampling(1.0))
    assert found.usage.completion_tokens == sum(len(answer.ids) for answer in (reply, *reply.others))
    without = [ask(client, temperature=1.0).choices[0].message.content for _ in range(2)]
    assert without[0] != without[1]


def test_an_answer_ends_before_a_stop_string(client):
    whole = ask(client, tokens=24).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    expected = whole[: whole.index(stop)]
    for given in (stop, ["never said", stop]):
        (choice,) = ask(client, tokens=24, stop=given).choices
        assert (choice.message.content, choice.finish_reason) == (expected, "stop")
    found = streamed(client, tokens=24, stop=stop)[0]
    assert (found["content"], found["reason"]) == (expected, "stop")


def test_clips_and_turns_stand_where_they_were_given(client, model, processor):
    first, second, third = noise(0.7), noise(1.1, 1), noise(0.4, 2)
    messages = [
        {"role": "system", "content": "Be short."},
        user(audio_part(first), "Which?", audio_part(encoded(second, format="FLAC", subtype="PCM_24"), "flac")),
        {"role": "assistant", "content": "This one.", "reasoning_content": "Hm."},
        user("And", audio_part(third), "?"),
    ]
    second = np.round(second * 2**23).clip(-(2**23), 2**23 - 1).astype(np.float32) / 2**23
    prompt = (
        f"<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n{SPAN}\nWhich?\n{SPAN}\n<|im_end|>\n"
        f"<|im_start|>assistant\nThis one.<|im_end|>\n<|im_start|>user\nAnd\n{SPAN}\n?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (expected,) = generate(model, processor([prompt], [[first, second, third]]), max_new_tokens=12)
    assert ask(client, messages).choices[0].message.content == processor.decode(expected)


def test_clips_may_come_as_data_uris(client):
    data = base64.b64encode(encoded(noise(1.5))).decode()
    url = {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{data}"}}
    found = ask(client, [user(url, "Describe it.")])
    assert found.choices == ask(client).choices


def test_a_thought_is_told_apart(client):
    (choice,) = ask(client, logit_bias={str(THINK): 100}).choices
    assert choice.message.content == "" and choice.message.reasoning_content == "<think>" * 11
    found = streamed(client, logit_bias={str(THINK): 100})[0]
    assert (found["content"], found["reasoning"]) == ("", "<think>" * 11)


def test_the_options_reach_the_engine(client, server):
    body = {"top_k": 9, "repetition_penalty": 1.4, "min_tokens": 3}
    found = ask(client, temperature=0.7, top_p=0.9, seed=3, logit_bias={"65": 2}, extra_body=body)
    sampling = Sampling(0.7, 9, 0.9, 1.4)
    expected = engine_s(server, sampling=sampling, seed=3, logit_bias={65: 2.0}, min_new_tokens=3)
    assert found.choices[0].message.content == expected.text


def test_what_changes_nothing_is_accepted(client):
    same = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tool_choice": "none"}
    same |= {"frequency_penalty": 0, "response_format": {"type": "text"}, "top_logprobs": 0, "n": None, "stop": None}
    assert ask(client, **same).choices == ask(client).choices


def test_many_at_once_are_answered_as_alone(client):
    questions = [f"Question {number}?" for number in range(12)]

    def answer(text: str) -> str:
        return ask(client, [user(text)], tokens=9).choices[0].message.content

    alone = [answer(text) for text in questions]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(answer, questions)) == alone
    assert len({*alone}) > 9  # so that an exchange would show


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


GOOD = {"model": "small", "messages": [{"role": "user", "content": "?"}], "max_tokens": 2}
CLIP = audio_part(noise(0.5))


def clip(content: bytes | str, format: str = "wav") -> dict[str, Any]:
    data = content if isinstance(content, str) else base64.b64encode(content).decode()
    return {"messages": [user({"type": "input_audio", "input_audio": {"data": data, "format": format}})]}


AUDIO = "messages[0].content[0].input_audio.data"
NAN = encoded(np.where(np.arange(9000) == 5000, np.nan, noise(9000 / 16000)).astype(np.float32))
BAD: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "model": ({"model": "large"}, 404, "model", "model must be one of small, not 'large'"),
    "no model": ({"model": None}, 400, "model", ""),
    "a field's type": ({"n": "2"}, 400, "n", "integer"),
    "a number as a switch": ({"stream": 1}, 400, "stream", "boolean"),
    "an unknown field": ({"temprature": 1}, 400, "temprature", "is no field"),
    "half of a surrogate pair": ({"\ud800": 1}, 400, None, "surrogate"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools", "tools is not supported"),
    "json_schema": ({"response_format": {"type": "json_schema"}}, 400, "response_format", "not supported"),
    "top_logprobs": ({"top_logprobs": 3}, 400, "top_logprobs", "not supported"),
    "penalty": ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
    "temperature": ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    "top_p": ({"top_p": 0}, 400, "top_p", "greater than 0"),
    "n of 0": ({"n": 0}, 400, "n", ""),
    "n beyond the limit": ({"n": 9}, 400, "n", "n must be at most 8"),
    "seed": ({"seed": 2**64}, 400, "seed", ""),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", ""),
    "too many tokens": ({"max_tokens": 1280}, 400, "messages", "at most 1,280"),
    "min_tokens": ({"min_tokens": 5}, 400, None, "min_new_tokens must be 0 to max_new_tokens=2, not 5"),
    "an empty stop": ({"stop": ""}, 400, "stop[0]", ""),
    "bias of no id": ({"logit_bias": {"a": 1}}, 400, "logit_bias", "ids of tokens"),
    "bias beyond the ids": ({"logit_bias": {"512": 1}}, 400, None, "ids from 0 to 511"),
    "no messages": ({"messages": []}, 400, "messages", ""),
    "messages": ({"messages": "hi"}, 400, "messages", "list"),
    "role": ({"messages": [{"role": "tool", "content": "?"}]}, 400, "messages[0].role", ""),
    "a part's type": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]",
        "audio_url",
    ),
    "a part's field": ({"messages": [user({"type": "text", "text": 5})]}, 400, "messages[0].content[0].text", "string"),
    "a clip of the system": ({"messages": [{"role": "system", "content": [CLIP]}]}, 400, None, "message of the user"),
    "too many clips": ({"messages": [user(*[CLIP] * 17)]}, 400, None, "at most 16 clips"),
    "a span in a text": ({"messages": [user(SPAN)]}, 400, None, "audio span"),
    "base64": (clip("!!!"), 400, AUDIO, "must be base64"),
    "half of base64": (clip("UklGR"), 400, AUDIO, "must be base64"),
    "no bytes": (clip(b""), 400, AUDIO, "0 bytes"),
    "no samples": (clip(encoded(noise(0))), 400, AUDIO, "must hold samples"),
    "text": (clip(b"hello, this is no sound"), 400, AUDIO, "not text that begins"),
    "an archive": (clip(b"PK\x03\x04" + bytes(99)), 400, AUDIO, "an archive"),
    "NaN samples": (clip(NAN), 400, AUDIO, "not NaN"),
    "too short": (clip(encoded(noise(0.005))), 400, None, "at least 160 samples"),
    "too long": (clip(encoded(np.zeros(16000 * 103, np.float32), subtype="PCM_U8")), 400, AUDIO, "at most 102.4 s"),
    "a format": (clip(encoded(noise(1)), "pcm16"), 400, "messages[0].content[0].input_audio.format", "wav"),
    "a scheme": ({"messages": [user({"type": "audio_url", "audio_url": {"url": "gopher://a/b"}})]}, 400, None, "data:"),
    "a very long text": ({"messages": [user("x" * 200_000)]}, 400, "messages", "200,000 characters"),
    "marks without end": ({"messages": [user("a" + "\u0301\u0327" * 80_000)]}, 400, "messages", "combining marks"),
    "a long text": ({"messages": [user("x" * 5000)]}, 400, "messages", "tokens"),
}  # fmt: skip


def post(server: Server, content: Any, path: str = "chat/completions", **options: Any) -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(f"{server.url}/v1/{path}", content=body, timeout=60, **options)


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["Content-Type"] == "application/json"
    (error,) = response.json().values()
    assert {*error} == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"] and "\n" not in error["message"]
    return error


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said(server, case):
    change, status, param, message = BAD[case]
    body = {name: value for name, value in (GOOD | change).items() if value is not None}
    found = post(server, body)
    error = error_of(found)
    assert (found.status_code, error["type"]) == (status, {404: "not_found_error"}.get(status, "invalid_request_error"))
    assert message in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "must be an object of JSON"),
        (b"[]", "must be an object of JSON"),
        (b"{" * 40_000, "must be an object of JSON"),
        (b'{"model": "small", "model": "small"}', "more than once"),
        (b"\xff{}", "not UTF-8"),
        (b'{"messages": [' + b"{}," * 60_000 + b"{}]}", "far more values"),
        (json.dumps(GOOD)[:-1].encode() + b', "temperature": NaN}', "finite"),
        (json.dumps(GOOD)[:-1].encode() + b', "top_p": 1e999}', "finite"),
        (json.dumps(GOOD)[:-1].encode() + b', "seed": Infinity}', "seed"),
        (json.dumps(GOOD)[:-1].encode() + b', "n": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_a_body_that_is_no_json_is_refused(server, body, message):
    found = post(server, body)
    assert found.status_code in (400, 413) and message in error_of(found)["message"]


def test_the_server_answers_after_all_that(client, server):
    assert ask(client).choices[0].message.content == engine_s(server).text
    assert server.service.models["small"].held == 0 and server.service.requests == 0


def test_an_unknown_path_or_method_is_an_error_too(server):
    for method, path, status in (("GET", "nowhere", 404), ("GET", "chat/completions", 405), ("POST", "models", 405)):
        found = httpx.request(method, f"{server.url}/v1/{path}")
        assert found.status_code == status and error_of(found)["type"]
