"""Transcriptions through the official client: the windows and seams of `moss-audio transcribe`, in every format."""

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from moss_audio_jax.inference.recordings import Transcript, transcribe_recording
from moss_audio_jax.inference.transcription import Answers as Asking
from moss_audio_jax.inference.windows import Cutting
from moss_audio_jax.prompts import DEFAULT_SYSTEM_PROMPT
from moss_audio_jax.sampling_config import Sampling
from moss_audio_jax.serving.transcript import TranscriptionForm, response
from moss_audio_jax.serving.transcriptions import longest_window
from moss_audio_jax.timelines.timeline import Timeline
from tests.serving.conftest import Server, encoded, make_service, noise, serving

WINDOW = 5.0


@pytest.fixture(scope="module")
def server(model, processor) -> Iterator[Server]:
    with serving(make_service({"small": model}, processor, window=WINDOW)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def short() -> bytes:
    return encoded(noise(2))


@pytest.fixture(scope="module")
def long() -> bytes:
    """Of four windows: the first ends at a quiet place, the others overlap."""
    wave = noise(16)
    wave[int(4.2 * 16000) : int(4.8 * 16000)] *= 0.01
    return encoded(wave, format="FLAC", subtype="PCM_16")


def transcribe(client: openai.OpenAI, content: bytes, **options: Any) -> Any:
    return client.audio.transcriptions.create(model="small", file=("clip.wav", content), **options)


def asking(timestamps: str, **changes: Any) -> Asking:
    plain = Asking(timestamps, None, DEFAULT_SYSTEM_PROMPT, None, Sampling(), 0, None, "stop", WINDOW)
    return dataclasses.replace(plain, **changes)


def expected(server: Server, content: bytes, timestamps: str = "none", context: str = "", **changes: Any) -> Transcript:
    """What `moss-audio transcribe` makes of a recording."""
    how = asking(timestamps, **changes)

    def ask(window):
        request = dataclasses.replace(how.request(window), context=context)
        return server.service.models["small"].engine.submit(request)

    return transcribe_recording(content, ask, cutting=Cutting.of(WINDOW), in_flight=1)


def deltas(client: openai.OpenAI, content: bytes, **options: Any) -> list[Any]:
    return list(transcribe(client, content, stream=True, **options))


def test_a_short_recording(client, server, short):
    found = transcribe(client, short)
    assert found.text == expected(server, short).text != ""
    assert (found.usage.type, found.usage.seconds) == ("duration", 2)
    assert transcribe(client, short, response_format="text") == f"{found.text}\n"


def test_a_long_recording_has_the_seams_of_transcribe(client, server, long):
    whole = expected(server, long)
    assert [bool(window.place.overlap) for window in whole.windows] == [False, False, True, True]
    assert transcribe(client, long).text == whole.text


def test_the_deltas_of_a_stream_join_to_the_text(client, short, long):
    for content, least in ((short, 4), (long, 4)):
        *pieces, last = deltas(client, content)
        assert {piece.type for piece in pieces} == {"transcript.text.delta"} and len(pieces) >= least
        assert "".join(piece.delta for piece in pieces) == last.text == transcribe(client, content).text
        assert last.type == "transcript.text.done"


def test_times_come_as_segments_and_words(client, server, long):
    found = transcribe(client, long, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    for kind, things in (("sentences", found.segments), ("words", found.words)):
        whole = expected(server, long, kind)
        texts = [thing.text if kind == "sentences" else thing.word for thing in things]
        assert texts == [segment.text for segment in whole.timeline.segments] and len(texts) == 4
        for thing, segment in zip(things, whole.timeline.segments, strict=True):
            assert (thing.start, thing.end) == pytest.approx(segment.span, abs=1e-3)
    assert (found.duration, found.language, found.task) == (16.0, "unknown", "transcribe")
    plain = transcribe(client, long, response_format="verbose_json")
    assert plain.segments == found.segments and plain.words is None
    words = transcribe(client, long, response_format="verbose_json", timestamp_granularities=["word"])
    assert words.words == found.words and words.segments is None


def test_subtitles(client, server, long):
    timeline = expected(server, long, "sentences").timeline
    assert transcribe(client, long, response_format="srt") == timeline.to_srt()
    assert transcribe(client, long, response_format="vtt") == timeline.to_vtt()


def test_a_prompt_and_a_language_are_told_to_the_model(client, server, short):
    found = transcribe(client, short, prompt="About birds.", language="de")
    context = "About birds. The language is de."
    assert found.text == expected(server, short, context=context).text
    assert found.text != transcribe(client, short).text
    verbose = transcribe(client, short, language="de", response_format="verbose_json")
    assert verbose.language == "de"


def test_a_temperature_samples(client, server, short):
    found = transcribe(client, short, temperature=0.8, extra_body={"seed": 5})
    assert found.text == expected(server, short, sampling=Sampling(0.8), seed=5).text


def test_answers_with_times_become_segments_words_and_subtitles():
    """A random model gives no times; these are of an answer that has some, with mistakes in them."""
    timeline = Timeline.parse("[0.00]hello there[2.01][2.50]backwards[2.30][3.00]past the end[9.00]", 4.0)
    transcript = Transcript(4.0, "hello there backwards past the end", timeline, True, ())
    form = TranscriptionForm(model="m", response_format="verbose_json")
    found = json.loads(bytes(response(form, {"sentences": transcript, "words": transcript}).body))
    assert found["segments"] == [
        {"id": 0, "start": 0.0, "end": 2.01, "text": "hello there"},
        {"id": 1, "start": 2.3, "end": 2.5, "text": "backwards"},
        {"id": 2, "start": 3.0, "end": 4.0, "text": "past the end"},
    ]
    assert found["words"][0] == {"word": "hello there", "start": 0.0, "end": 2.01}


def test_a_window_is_as_long_as_the_engine_has_room_for(server):
    served = server.service.models["small"]
    for timestamps in ("none", "sentences", "words"):
        how = asking(timestamps, window=300.0)
        longest = longest_window(served, how, "")
        assert 5 <= longest < 60
        assert how.length(served.processor, longest) <= served.engine.max_length
        assert how.length(served.processor, longest + 2) > served.engine.max_length - 20


WAV = encoded(noise(1))
BAD: dict[str, tuple[dict[str, Any], bytes, int, str | None, str]] = {
    "model": ({"model": "whisper-1"}, WAV, 404, "model", "model must be one of small"),
    "no model": ({"model": None}, WAV, 400, "model", "must be given"),
    "format": ({"response_format": "docx"}, WAV, 400, "response_format", "verbose_json"),
    "temperature": ({"temperature": "NaN"}, WAV, 400, "temperature", "finite"),
    "temperature's type": ({"temperature": "warm"}, WAV, 400, "temperature", "number"),
    "language": ({"language": "german"}, WAV, 400, "language", ""),
    "granularity": (
        {"timestamp_granularities[]": "phone", "response_format": "verbose_json"}, WAV, 400,
        "timestamp_granularities[0]", "segment",
    ),
    "granularity without verbose": ({"timestamp_granularities[]": "word"}, WAV, 400, "timestamp_granularities", ""),
    "a stream of subtitles": ({"stream": "true", "response_format": "srt"}, WAV, 400, "stream", "can be streamed"),
    "logprobs": ({"include[]": "logprobs"}, WAV, 400, "include", "not supported"),
    "an unknown field": ({"diarize": "1"}, WAV, 400, "diarize", "is no field"),
    "twice": ({"language": ["de", "en"]}, WAV, 400, None, "given once"),
    "a very long prompt": ({"prompt": "x" * 200_000}, WAV, 400, "prompt", "characters"),
    "marks without end": ({"prompt": "a" + "\u0301\u0327" * 80_000}, WAV, 400, "prompt", "combining marks"),
    "a long number": ({"seed": "9" * 900_000}, WAV, 400, "seed", ""),
    "a long prompt": ({"prompt": "x" * 3000}, WAV, 400, None, "shorter prompt"),
    "no bytes": ({}, b"", 400, "file", "0 bytes"),
    "no samples": ({}, encoded(noise(0)), 400, "file", "must hold samples"),
    "cut off": ({}, encoded(noise(1), format="FLAC", subtype="PCM_16")[:60], 400, "file", ""),
    "no sound": ({}, b"\0" * 200, 400, "file", "zeros"),
    "a stream of no sound": ({"stream": "true"}, b"\0" * 200, 400, "file", "zeros"),
    "too short": ({}, encoded(noise(0.005)), 400, None, "at least 160 samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said(server, case):
    change, content, status, param, message = BAD[case]
    data = {name: value for name, value in ({"model": "small"} | change).items() if value is not None}
    found = httpx.post(
        f"{server.url}/v1/audio/transcriptions", data=data, files={"file": ("a.wav", io.BytesIO(content))}, timeout=60
    )
    error = found.json()["error"]
    assert (found.status_code, {*error}) == (status, {"message", "type", "param", "code"})
    assert message in error["message"] and "\n" not in error["message"]
    assert param is None or error["param"] == param


def test_a_form_without_a_file_or_no_form_is_refused(server):
    url = f"{server.url}/v1/audio/transcriptions"
    for options in (
        {"data": {"model": "small"}},
        {"json": {"model": "small", "file": "a"}},
        {"files": {"file": (None, "text")}, "data": {"model": "small"}},
        {"files": [("file", ("a.wav", WAV)), ("file", ("b.wav", WAV))], "data": {"model": "small"}},
        {"content": b"--x\r\ngarbage", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
    ):
        found = httpx.post(url, **options)
        assert found.status_code == 400 and found.json()["error"]["message"]


def test_no_place_is_kept(server):
    assert server.service.models["small"].held == 0 and server.service.requests == 0


def test_sound_that_never_was_counted_is_bounded():
    """FLAC of silence, without the number of its samples: few bytes, and hours of it."""
    from moss_audio_jax.serving.errors import ApiError
    from moss_audio_jax.serving.media import pieces_of

    content = bytearray(encoded(np.zeros(8000 * 3600, np.float32), 8000, "FLAC", "PCM_16"))
    content[21] &= 0xF0  # the number of samples: 36 bits of the first block
    content[22:26] = bytes(4)
    assert len(content) < 200_000
    with pytest.raises(ApiError, match="at most 60 s of audio, not 6"):
        next(pieces_of(bytes(content), "file", 60.0))
