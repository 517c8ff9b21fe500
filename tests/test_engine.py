"""The engine: a reply is that of its request alone, whatever else is in the slots; nothing compiles after warm-up."""

import dataclasses
import math
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax import (
    Engine,
    MossAudio,
    MossAudioError,
    Processor,
    Request,
    Sampling,
    generate,
    load_model,
    load_processor,
)
from moss_audio_jax.inference.slots import prompt_shape, prompt_shapes
from moss_audio_jax.inputs import encode_sequence
from moss_audio_jax.sharding import make_mesh
from tests.conftest import compilations, random_mel
from tests.test_generate import broken, on_mesh


@pytest.fixture(scope="module")
def model(released) -> MossAudio:
    return load_model(released, dtype=jnp.float32)


@pytest.fixture(scope="module")
def processor(released) -> Processor:
    return load_processor(released)


@pytest.fixture(scope="module")
def engine(model, processor) -> Iterator[Engine]:
    with Engine(model, processor, slots=3, max_length=256, every=4) as engine:
        engine.warm_up()
        yield engine


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(round(seconds * 100)).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """With and without clips, greedy and sampled, of several lengths; more than there are slots."""
    return [
        Request("Describe it.", [noise(2)], max_new_tokens=12, eos_ids=()),
        Request("Which?", max_new_tokens=7, eos_ids=(), sampling=Sampling(1.0, top_k=40), seed=3),
        Request("What is said?", [noise(4.5)], max_new_tokens=20, eos_ids=(), sampling=Sampling(0.7, top_p=0.9)),
        Request("Both?", [noise(0.3), noise(1)], max_new_tokens=5, eos_ids=()),
        Request("Go on.", max_new_tokens=23, eos_ids=(), sampling=Sampling(repetition_penalty=1.4)),
        Request("Describe it.", [noise(2)], max_new_tokens=12, eos_ids=(), sampling=Sampling(1.0), seed=2**63),
        Request("One.", max_new_tokens=1, eos_ids=()),
    ]


def test_replies_are_those_of_generate(engine, model, processor, requests):
    for request, reply in zip(requests, engine.run(requests), strict=True):
        inputs = processor([request.text], [list(request.audio)])
        expected = generate(
            model,
            inputs,
            max_new_tokens=request.max_new_tokens,
            eos_ids=request.eos_ids,
            sampling=request.sampling,
            seed=request.seed,
        )[0]
        assert reply.ids == tuple(expected.tolist())
        assert reply.text == processor.decode(expected) and reply.finish_reason == "length"


def test_a_reply_depends_on_its_request_alone(engine, requests):
    alone = [engine.submit(request).result(120) for request in requests]
    assert engine.run(requests) == alone
    assert engine.run(requests[::-1]) == alone[::-1]
    assert engine.run([request for request in requests for _ in range(3)]) == [one for one in alone for _ in range(3)]
    assert len({reply.ids for reply in alone}) == len(alone)  # so that an exchange would show


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"fsdp": 1, "tensor": 2}], ids=str)
def test_replies_on_a_mesh_are_those_of_one_device(engine, model, processor, requests, sizes):
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    with Engine(on_mesh(model, mesh), processor, slots=3, max_length=256) as sharded:
        assert sharded.run(requests[:5]) == engine.run(requests[:5])


def test_nothing_compiles_after_warm_up(engine):
    rng = np.random.default_rng(0)
    eos = (5, 6, 7)
    with compilations() as compiled:
        engine.run(
            Request(
                "x" * int(rng.integers(1, 40)),
                [noise(float(rng.uniform(0.2, 6)))] if rng.random() < 0.5 else [],
                max_new_tokens=int(rng.integers(1, 9)),
                sampling=Sampling(float(rng.choice([0, 0.7, 1])), int(rng.integers(0, 50)), float(rng.uniform(0.5, 1))),
                seed=int(rng.integers(2**40)),
                eos_ids=eos[: int(rng.integers(0, 4))],
            )
            for _ in range(200)
        )
    assert compiled == []


def test_an_answer_comes_in_pieces_and_ends_at_its_end(engine, requests):
    whole = engine.run(requests[:1])[0]
    handle = engine.submit(requests[0])
    pieces = list(handle)
    assert "".join(pieces) == whole.text == handle.result().text and len(pieces) > 1
    assert list(handle) == []
    end = whole.ids[6]
    ended = engine.run([dataclasses.replace(requests[0], eos_ids=(end,))])[0]
    assert ended.ids == whole.ids[: whole.ids.index(end) + 1] and ended.finish_reason == "stop"


def test_an_answer_ends_before_a_stop_string(engine, requests):
    whole = engine.run(requests[:1])[0].text
    stop = whole[len(whole) // 2 :][:3]
    handle = engine.submit(dataclasses.replace(requests[0], stop=["never said", stop]))
    assert "".join(handle) == handle.result().text == whole[: whole.index(stop)]
    assert handle.result().finish_reason == "stop"


def test_a_cancelled_request_frees_its_slot(engine, requests):
    long = dataclasses.replace(requests[4], max_new_tokens=190)
    handles = [engine.submit(long) for _ in range(5)]  # two of them wait
    next(iter(handles[0]))
    for handle in handles:
        handle.cancel()
    assert [handle.result(0).finish_reason for handle in handles] == ["cancelled"] * 5
    assert engine.submit(requests[3]).result(120).finish_reason == "length"


def test_threads_share_an_engine(engine, requests):
    expected, found = engine.run(requests), {}

    def ask(index: int) -> None:
        found[index] = engine.run(requests)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[index] == expected for index in range(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"max_new_tokens": 250}, r"more than the engine's max_length of 256"),
        ({"audio": [np.zeros((2, 2, 2))]}, "clip"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_at_once(engine, requests, changes, message):
    with pytest.raises(MossAudioError, match=message):
        engine.submit(dataclasses.replace(requests[0], **changes))


def test_a_weight_that_is_not_finite_ends_the_answers_only(model, processor, requests):
    with Engine(
        broken(model, "language_model.layers.mlp.up_proj.kernel", 1), processor, slots=1, max_length=256
    ) as engine:
        for _ in range(2):
            with pytest.raises(MossAudioError, match=r"language_model\.layers\.1\.mlp\.up_proj\.weight"):
                engine.submit(requests[1]).result(120)


def test_closing_ends_what_is_left(model, processor, requests):
    engine = Engine(model, processor, slots=1, max_length=256)
    handles = [engine.submit(requests[1]) for _ in range(3)]
    engine.close()
    assert all(handle.done for handle in handles)
    assert handles[-1].result(0).finish_reason in ("cancelled", "length")
    with pytest.raises(MossAudioError, match="the engine is closed"):
        engine.submit(requests[0])
    for options in ({"slots": 0}, {"max_length": 10**9}, {"every": 0}):
        with pytest.raises(MossAudioError, match=f"{next(iter(options))} of an engine must be"):
            Engine(model, processor, **options)


def test_a_prompt_takes_the_smallest_program(model):
    shapes = prompt_shapes(model.config, 600)
    assert shapes[:4] == [(128, 0), (128, 3), (192, 0), (192, 4)] and shapes[-1] == (600, 13)
    sequence = encode_sequence([1] * 130, [], model.config)
    assert prompt_shape(shapes, sequence) == (192, 0)
    audio = model.config.processor.audio_token_id
    many = encode_sequence([audio] * 200, [random_mel(8)] * 200, model.config)  # 200 clips of a token each
    assert prompt_shape(shapes, many) == (600, 224)
