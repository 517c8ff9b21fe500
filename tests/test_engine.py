"""The engine: a reply is that of its request alone, whatever else is in the slots; nothing compiles after warm-up."""

import dataclasses
import itertools
import math
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax import (
    Engine,
    MossAudio,
    MossAudioConfig,
    MossAudioError,
    Processor,
    Request,
    Sampling,
    choose,
    generate,
    listen,
    load_model,
    load_processor,
    make_inputs,
)
from moss_audio_jax.inference import engine as engine_module
from moss_audio_jax.inference.prefixes import Prefixes
from moss_audio_jax.inference.requests import Handle, Reply
from moss_audio_jax.inference.slots import (
    ReadPrompts,
    empty_slots,
    insert,
    prompt_shape,
    prompt_shapes,
    question_pieces,
)
from moss_audio_jax.inference.thinking import HAND_OVER, STOP_THINKING, Piece
from moss_audio_jax.inference.turns import Turns
from moss_audio_jax.inputs import encode_sequence
from moss_audio_jax.kv_cache import KVCache
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.steering import MAX_PERIOD, MIN_LOOP, REPEATS, ends_in_a_loop
from moss_audio_jax.tokenizer import Tokenizer
from tests.conftest import OPENED, SMALL_MODEL, THINK, THOUGHT, add_thinking_tokens, compilations, random_mel
from tests.test_attention import placed
from tests.test_generate import broken, on_mesh
from train.planning.topology import topology_devices


@pytest.fixture(scope="module")
def model(released) -> MossAudio:
    return load_model(released, dtype=jnp.float32)


@pytest.fixture(scope="module")
def processor(released, tmp_path_factory) -> Processor:
    """With the tokens of a Thinking checkpoint."""
    directory = shutil.copytree(released, tmp_path_factory.mktemp("thinking") / "checkpoint")
    add_thinking_tokens(directory)
    return load_processor(directory)


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


@pytest.fixture(scope="module")
def steered(requests) -> list[Request]:
    """With each of the other options."""
    return [
        dataclasses.replace(requests[0], reuse=True),
        dataclasses.replace(requests[0], text="And what else?", reuse=True),
        dataclasses.replace(requests[1], logit_bias={65: 3.0, 66: -1e9}, min_new_tokens=3, eos_ids=range(8)),
        dataclasses.replace(requests[1], logit_bias={65: 1e9}, loops="warm", max_new_tokens=MIN_LOOP + 2),
        dataclasses.replace(requests[5], n=4, hot_words=["Amsel", "Drossel"]),
        Request(OPENED, [noise(1)], max_new_tokens=150, thinking_budget=9, eos_ids=()),
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


def test_a_reply_depends_on_its_request_alone(engine, requests, steered):
    plain = len(requests)
    requests = [*requests, *steered]
    alone = [engine.submit(request).result(120) for request in requests]
    assert engine.run(requests) == alone
    assert engine.run(requests[::-1]) == alone[::-1]
    assert engine.run([request for request in requests for _ in range(3)]) == [one for one in alone for _ in range(3)]
    assert len({reply.ids for reply in alone[:plain]}) == plain  # so that an exchange would show
    logprobs = [reply.logprobs for reply in alone]
    assert [reply.logprobs for reply in engine.run(requests[::-1])] == logprobs[::-1]


def test_prompts_may_be_read_together(model, processor, engine, requests, steered):
    """Several of one shape, with and without one that is alone; and nothing compiles after the warm-up."""
    with Engine(model, processor, slots=5, max_length=256, prompts=2) as grouped:
        grouped.warm_up()
        with compilations() as compiled:
            assert grouped.run([*requests, *steered]) == engine.run([*requests, *steered])
    assert compiled == []


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
                n=int(rng.integers(1, 4)),
                min_new_tokens=int(rng.integers(2)),
                logit_bias={int(id): 1.0 for id in rng.integers(0, 512, rng.integers(0, 5))},
                loops=str(rng.choice(["ignore", "stop", "warm"])),
                reuse=bool(rng.integers(2)),
            )
            for _ in range(200)
        )
        engine.run([Request(OPENED, [noise(1)], max_new_tokens=150, thinking_budget=9)])
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


def test_cancelled_requests_are_forgotten_though_others_wait_before_them(engine, requests):
    long = dataclasses.replace(requests[4], max_new_tokens=190)
    handles = [engine.submit(long) for _ in range(4)]
    for handle in handles[:3]:
        next(iter(handle))
    for _ in range(20):
        engine.submit(long).cancel()
    assert (engine.waiting, engine.busy, engine.closed) == (1, 3, None) and len(engine._waiting) <= 2
    for handle in handles:
        handle.cancel()
    assert handles[-1].result(120).finish_reason == "cancelled"


class Listener:
    """What a listener is given."""

    def __init__(self, handle: Handle):
        self.text, self.end = "", threading.Event()
        handle.listen(self)

    def __call__(self, piece: Piece | None) -> None:
        assert not self.end.is_set()
        if piece is None:
            self.end.set()
        else:
            self.text += piece.text


def test_a_listener_gets_the_pieces_and_the_end(engine, requests):
    """From the beginning, from the middle and after the end; of each of several answers."""
    request = dataclasses.replace(requests[5], n=2)
    (whole,) = engine.run([request])
    alone = [dataclasses.replace(whole, others=()), *whole.others]
    for wait in (lambda handle: "", lambda handle: next(iter(handle)), lambda handle: handle.result(60) and ""):
        handle = engine.submit(request)
        begun = wait(handle)
        listeners = [Listener(answer) for answer in handle.answers]
        assert all(listener.end.wait(60) for listener in listeners)
        assert [begun + listeners[0].text, listeners[1].text] == [reply.text for reply in alone]
        assert [answer.reply() for answer in handle.answers] == alone
        assert handle.drawn(3) == list(zip(whole.ids[3:], whole.logprobs[3:], strict=True)) and not handle.failed


def test_engines_on_the_same_devices_take_turns(engine, model, processor, requests):
    turns, inside, most = Turns(), [], []

    def work() -> None:
        for _ in range(50):
            with turns:
                inside.append(None)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 200
    engines = [Engine(model, processor, slots=2, max_length=256, turns=turns) for _ in range(2)]
    handles = [[each.submit(request) for request in requests] for each in engines]
    expected = engine.run(requests)
    for each, found in zip(engines, handles, strict=True):
        assert [handle.result(120) for handle in found] == expected
        each.close()


def test_a_turn_comes_in_order():
    turns, order, threads = Turns(), [], []

    def take(number: int) -> None:
        with turns:
            order.append(number)

    with turns:
        for number in range(5):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while len(turns._queue) < number + 2:
                pass
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


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
        ({"n": 0}, "n must be 1 answer or more"),
        ({"min_new_tokens": 13}, "min_new_tokens must be 0 to max_new_tokens=12, not 13"),
        ({"logit_bias": {512: 1.0}}, "ids from 0 to 511, not 512"),
        ({"logit_bias": {5: math.nan}}, "logit_bias must be finite"),
        ({"logit_bias": dict.fromkeys(range(65), 1.0)}, "logit_bias must be of 64 ids at most, not 65"),
        ({"loops": "never"}, "loops must be ignore, stop or warm"),
        ({"thinking_budget": -1}, "thinking_budget must be 0 tokens or more"),
        ({"thinking_budget": 4}, "max_new_tokens=12 leave no room for an answer after a thinking_budget of 4"),
        ({"text": OPENED, "context": "A market."}, "can't be put into a whole prompt"),
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
    for options in ({"slots": 0}, {"max_length": 10**9}, {"every": 0}, {"prompts": 0}):
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


# Ways to steer


@pytest.fixture
def prompts_read(monkeypatch) -> list[int]:
    """A list that grows by the number of tokens of each prompt that an engine reads as a whole."""
    counts, read = [], engine_module.read_prompts

    def counting(graphdef, state, inputs):
        counts.append(int((inputs.segment_ids != 0).sum()))
        return read(graphdef, state, inputs)

    monkeypatch.setattr(engine_module, "read_prompts", counting)
    return counts


def logprobs_of(model: MossAudio, processor: Processor, request: Request, ids: tuple[int, ...]) -> np.ndarray:
    """Logprobs of an answer by one pass over the prompt and the answer."""
    logits = logits_of(model, processor, request, ids)
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids)), ids]


def logits_of(model: MossAudio, processor: Processor, request: Request, ids: tuple[int, ...]) -> jax.Array:
    """Logits that each id of an answer is drawn from, [ids, vocab]."""
    read, mels = encoded_prompt(processor, request)
    logits = model(make_inputs([[*read, *ids]], [mels], config=model.config))[0]
    return logits[len(read) - 1 : len(read) + len(ids) - 1]


def test_logprobs_are_those_of_the_model_whatever_the_options(engine, model, processor, requests):
    """Also the answers to one clip that was read apart: 1e-4 from the answers to the whole prompt."""
    options = {"logit_bias": {65: 2.0}, "sampling": Sampling(0.7, top_k=9, repetition_penalty=1.4)}
    for changes in ({}, options, {"reuse": True}):
        request = dataclasses.replace(requests[0], **changes)
        (reply,) = engine.run([request])
        assert len(reply.ids) == 12
        np.testing.assert_allclose(reply.logprobs, logprobs_of(model, processor, request, reply.ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_logprobs_may_be_those_that_the_ids_were_drawn_with(engine, model, processor, requests, whole: bool):
    """By the model's logits after temperature and top-k; of an answer that comes in pieces and of one at its end."""
    sampling = Sampling(0.7, top_k=9)
    request = dataclasses.replace(requests[0], sampling=sampling, seed=4, logprobs="drawn", whole=whole)
    (reply,) = engine.run([request])
    assert reply.text == processor.decode(reply.ids)
    logits = np.asarray(logits_of(model, processor, request, reply.ids)) / 0.7
    kept = np.where(logits >= np.sort(logits)[:, -9:-8], logits, -np.inf)
    expected = np.asarray(jax.nn.log_softmax(kept))[np.arange(len(reply.ids)), reply.ids]
    np.testing.assert_allclose(reply.logprobs, expected, atol=1e-4, rtol=0)
    assert engine.run([dataclasses.replace(request, sampling=Sampling())])[0].logprobs == (0.0,) * 12


def test_prompts_of_groups_are_read_once_also_together(model, processor, engine, requests, prompts_read):
    """Five answers to each of three prompts of one shape, of which two are read at a time, in fewer slots."""
    asked = [dataclasses.replace(requests[0], text=text, n=5, sampling=Sampling(1.0)) for text in ("A?", "B?", "C?")]
    encoded = [(request, *encoded_prompt(processor, request)) for request in asked]
    with Engine(model, processor, slots=4, max_length=256, prompts=2) as grouped:
        found = [handle.result(120) for handle in grouped.submit_all(encoded)]
    assert len(prompts_read) <= 4  # at most one row of a pair that is read is read again
    assert found == engine.run(asked)


def encoded_prompt(processor: Processor, request: Request) -> tuple[list[int], list[np.ndarray]]:
    inputs = processor([request.text], [list(request.audio)])
    return inputs.tokens[0][inputs.segment_ids[0] != 0].tolist(), [processor.mel(clip) for clip in request.audio]


def test_n_answers_are_those_of_as_many_seeds_to_a_prompt_that_is_read_once(engine, requests, prompts_read):
    request = dataclasses.replace(requests[5], n=5)  # more than there are slots
    (reply,) = engine.run([request])
    assert len(prompts_read) == 1
    one_by_one = [dataclasses.replace(request, n=1, seed=request.seed + number) for number in range(5)]
    assert [dataclasses.replace(reply, others=()), *reply.others] == engine.run(one_by_one)
    assert len({answer.ids for answer in (reply, *reply.others)}) == 5


def test_no_end_comes_before_the_least_tokens(engine, requests):
    free = engine.run(requests[:1])[0].ids
    short = dataclasses.replace(requests[0], eos_ids=free[1:3], max_new_tokens=12)
    assert engine.run([short])[0].ids == free[:2]
    longer = engine.run([dataclasses.replace(short, min_new_tokens=6)])[0].ids
    assert longer[:1] == free[:1] and len(longer) > 6 and not {*longer[:6]} & {*short.eos_ids}


def test_biased_tokens_are_drawn_or_are_not(engine, requests):
    free = engine.run(requests[:1])[0].ids
    banned = engine.run([dataclasses.replace(requests[0], logit_bias={free[4]: -1e9})])[0].ids
    assert banned[:4] == free[:4] and free[4] not in banned
    assert engine.run([dataclasses.replace(requests[0], logit_bias={7: 1e9})])[0].ids == (7,) * 12


def test_an_answer_that_repeats_itself_is_ended_or_warmed_up(engine, requests):
    looping = dataclasses.replace(requests[0], logit_bias={65: 1e9}, max_new_tokens=2 * MIN_LOOP + 9)
    for loops, length, reason in (
        ("ignore", looping.max_new_tokens, "length"),
        ("stop", MIN_LOOP, "loop"),
        ("warm", 2 * MIN_LOOP, "loop"),
    ):
        (reply,) = engine.run([dataclasses.replace(looping, loops=loops)])
        assert (reply.ids, reply.finish_reason) == ((65,) * length, reason)
    # A bias that a temperature of 1 escapes from, and greedy decoding does not.
    leaving = dataclasses.replace(looping, logit_bias={65: 6.0})
    ignored, warmed = engine.run([leaving, dataclasses.replace(leaving, loops="warm")])
    assert {*ignored.ids} == {65} and warmed.finish_reason == "length"
    assert warmed.ids[:MIN_LOOP] == (65,) * MIN_LOOP and len({*warmed.ids[MIN_LOOP:]}) > 3


def test_a_loop_is_a_run_of_a_period():
    rng = np.random.default_rng(0)

    def ends(ids: list[int], since: int = 0) -> bool:
        row = np.zeros((1, 600), np.int32)
        row[0, : len(ids)] = ids
        return bool(ends_in_a_loop(jnp.asarray(row), jnp.array([len(ids)]), jnp.array([since]))[0])

    for period in (1, 3, 8, 47, MAX_PERIOD):
        run = period * max(REPEATS, math.ceil(MIN_LOOP / period))
        loop = list(itertools.islice(itertools.cycle(rng.permutation(500)[:period].tolist()), run))
        head = rng.integers(500, 512, 20).tolist()
        assert ends(loop) and ends([*head, *loop]) and ends([*head, *loop], since=20)
        assert not ends(loop[1:]) and not ends([*head, *loop[1:]]) and not ends([*head, *loop], since=21)
        assert not ends([*loop, 511])
    assert not ends(rng.integers(0, 2, 600).tolist()) and not ends([])


def test_a_thought_ends_with_its_budget_and_the_answer_follows(engine, processor, steered):
    request, hand_over = steered[-1], processor.tokenizer.encode(HAND_OVER)
    (free,) = engine.run([dataclasses.replace(request, thinking_budget=None)])
    assert free.text == "" and free.reasoning == processor.decode(free.ids).strip()
    for budget in (0, 9):
        (reply,) = engine.run([dataclasses.replace(request, thinking_budget=budget)])
        end = budget + len(hand_over)
        assert reply.ids[:budget] == free.ids[:budget] and reply.ids[budget:end] == tuple(hand_over)
        assert reply.reasoning == (processor.decode(free.ids[:budget]) + STOP_THINKING).strip()
        assert reply.text == processor.decode(reply.ids[end:]).lstrip() != ""
        handle = engine.submit(dataclasses.replace(request, thinking_budget=budget))
        pieces = list(handle.pieces())
        for kind, whole in (("reasoning", reply.reasoning), ("text", reply.text)):
            assert "".join(piece.text for piece in pieces if piece.kind == kind) == whole


def test_a_budget_is_for_open_thoughts_only(engine, requests):
    """A thought that the answer opens; one that it has closed; an answer without one."""
    request = dataclasses.replace(requests[0], max_new_tokens=150, thinking_budget=5, eos_ids=())
    thinking = engine.run([dataclasses.replace(request, logit_bias={THINK: 1e9})])[0]
    assert thinking.ids[:5] == (THINK,) * 5 and thinking.ids[5] != THINK and STOP_THINKING in thinking.reasoning
    closed = dataclasses.replace(request, text=OPENED, logit_bias={THOUGHT: 1e9}, audio=[noise(1)])
    assert engine.run([closed])[0].ids == (THOUGHT,) * 150
    free, plain = engine.run([dataclasses.replace(request, thinking_budget=None), request])
    assert plain == free and plain.reasoning == ""


def test_a_budget_needs_the_tokens_of_a_thought(model, processor, released, requests):
    plain = Processor(Tokenizer.from_dir(released), processor.config)
    with Engine(model, plain, slots=1, max_length=256) as engine, pytest.raises(MossAudioError, match="<think> and"):
        engine.submit(dataclasses.replace(requests[0], max_new_tokens=150, thinking_budget=1))


# Sessions


def test_a_session_reads_its_clips_once(engine, prompts_read):
    session = engine.listen(noise(2.2), max_new_tokens=12, eos_ids=())
    questions = ["Describe it.", "And then?", "x" * 100, "Which?", "Describe it."]
    replies = [session.ask(text) for text in questions]
    assert len(prompts_read) == 1
    assert replies == engine.run(Request(text, [noise(2.2)], max_new_tokens=12, eos_ids=()) for text in questions)
    assert prompts_read[0] < min(prompts_read[1:])
    other = session.ask("Which?", max_new_tokens=3, system_prompt="Be short.")  # which stands before the clip
    assert len(prompts_read) == 7 and len(other.ids) == 3
    with pytest.raises(MossAudioError, match="a session needs a clip"):
        engine.listen()


def test_a_session_may_have_an_engine_of_its_own(model, processor, engine, requests):
    with listen(model, processor, [*requests[3].audio], max_length=256, max_new_tokens=5, eos_ids=()) as session:
        expected = engine.run([dataclasses.replace(requests[3], reuse=True)])[0]
        assert isinstance(expected, Reply) and session.ask("Both?") == expected


def test_the_least_recently_used_prefix_is_dropped_first():
    class Read:
        def __init__(self, nbytes: int):
            self.nbytes = nbytes

    kept = Prefixes(10)
    for key, size in ((b"a", 4), (b"b", 4), (b"c", 11)):
        kept.put(key, Read(size))
    assert kept.get(b"c") is None and kept.get(b"a") is not None and kept.nbytes == 8
    kept.put(b"d", Read(4))
    assert [key for key in (b"a", b"b", b"d") if kept.get(key) is not None] == [b"a", b"d"] and kept.nbytes == 8


def test_questions_are_read_in_few_sizes():
    assert [question_pieces(count) for count in (1, 32, 33, 512, 513, 1200)] == [
        [32],
        [32],
        [128],
        [512],
        [512, 32],
        [512, 512, 512],
    ]


# Choices


def test_the_likeliest_option_is_chosen(model, processor):
    """An option that begins another one, one of two tokens, more than a bucket holds; by one pass over each."""
    clips, options = [noise(2)], ["a", "ab", "ä", "no", "yes, it is", "maybe"]
    choice = choose(model, processor, "Which?", options, clips)
    expected = []
    for option in options:
        ids = (*processor.tokenizer.encode(option), model.config.eos_ids[0])
        expected.append(logprobs_of(model, processor, Request("Which?", clips), ids).sum())
    np.testing.assert_allclose(choice.logprobs, expected, atol=1e-4, rtol=0)
    assert (choice.index, choice.option) == (np.argmax(expected), options[np.argmax(expected)])
    with compilations() as compiled:
        choose(model, processor, "When?", options[:5], clips)
    assert compiled == []
    for none in ([], ["a", ""]):
        with pytest.raises(MossAudioError, match="a choice needs options"):
            choose(model, processor, "Which?", none, clips)


@pytest.mark.parametrize("kv_dtype", [np.float32, np.int8])
@pytest.mark.parametrize("prompts", [1, 4])  # one that every device has, or one on each part of the mesh
def test_prompts_enter_the_slots_of_a_mesh_as_those_of_one_device(prompts: int, kv_dtype: Any):
    config, slots, rows = SMALL_MODEL, np.array([5, 0, 6, 3], np.int32), np.array([0, 0, 2, 3], np.int32) % prompts
    rng = np.random.default_rng(0)

    def filled(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 40, x.shape)).astype(x.dtype), tree)

    answers = filled(empty_slots(config, 8, 32, 32, jnp.float32, kv_dtype))
    cache = filled(KVCache.empty(config.language_config, prompts, 16, np.float32))
    hidden = jnp.zeros((prompts, config.language_config.hidden_size))
    read = ReadPrompts(cache, hidden, jnp.zeros((prompts, config.language_config.vocab_size), bool))
    copies = jax.tree.map(jnp.copy, answers)
    expected = insert(answers, read, slots, rows)
    assert np.abs(np.asarray(jax.tree.leaves(expected.cache.keys)[0] - jax.tree.leaves(copies.cache.keys)[0])).any()
    mesh = make_mesh(replica=2, fsdp=2, tensor=1, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        on_mesh = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), copies, placed(copies, mesh))
        if prompts > 1:
            read = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), read, placed(read, mesh))
        found = insert(on_mesh, read, slots, rows)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("sizes", "prompts", "share"),
    [
        ({"tensor": 4}, 1, 0.01),
        ({"fsdp": 2, "tensor": 2}, 2, 0.01),
        ({"fsdp": 4}, 16, 0.1),
    ],  # one of these prompts is 1/16
    ids=str,
)
def test_a_prompt_enters_a_slot_without_a_copy_of_the_others(sizes, prompts, share):
    pytest.importorskip("libtpu")
    mesh = make_mesh(**sizes, devices=topology_devices("v5e:2x2"))
    language = dataclasses.replace(MossAudioConfig.preset("4b").language_config, num_hidden_layers=4, vocab_size=16384)
    config = dataclasses.replace(MossAudioConfig.preset("tiny"), language_config=language)
    with jax.set_mesh(mesh):
        answers = placed(jax.eval_shape(lambda: empty_slots(config, 8, 8192, 8192, jnp.bfloat16)), mesh)
        read = jax.eval_shape(
            lambda: ReadPrompts(
                KVCache.empty(language, prompts, 1024, jnp.bfloat16),
                jnp.zeros((prompts, language.hidden_size), jnp.bfloat16),
                jnp.zeros((prompts, language.vocab_size), bool),
            )
        )
        read = placed(read, mesh) if prompts > 1 else read
        compiled = insert.trace(answers, read, *[np.zeros(prompts, np.int32)] * 2).lower().compile()
    memory: Any = compiled.memory_analysis()
    held = 2 * math.prod(answers.cache.keys.shape) * 2 // mesh.size
    assert memory.alias_size_in_bytes >= held and memory.temp_size_in_bytes < share * held
