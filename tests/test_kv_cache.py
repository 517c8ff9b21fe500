"""The cache in int8: what is rounded, and how little the logits change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax import Engine, MossAudio, load_model, load_processor
from moss_audio_jax.attention import cached_attend, choose_slots
from moss_audio_jax.kv_cache import Int8Slots, KVCache
from tests.conftest import question
from tests.test_engine import noise, requests  # noqa: F401 (a fixture)


def rounded(cache: KVCache) -> KVCache:
    return KVCache(Int8Slots.of(cache.keys), Int8Slots.of(cache.values), cache.lengths)


def as_floats(slots: Int8Slots) -> jax.Array:
    return slots.steps * slots.scales[..., None]


def random_cache(seed: int = 0, lengths: tuple[int, ...] = (5, 0, 11)) -> KVCache:
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, 2, len(lengths), 3, 16, 8), np.float32)
    return KVCache(jnp.asarray(keys), jnp.asarray(values), jnp.array(lengths, jnp.int32))


def test_each_vector_is_rounded_to_steps_of_its_own_scale():
    x = random_cache().keys.at[0, 1, 2, 3].set(0)
    found = Int8Slots.of(x)
    np.testing.assert_allclose(found.scales[0, 0, 0, 0], np.abs(x[0, 0, 0, 0]).max() / 127, rtol=1e-6)
    assert (np.abs(as_floats(found) - x) <= 0.5001 * found.scales[..., None]).all()
    np.testing.assert_array_equal(as_floats(found)[0, 1, 2, 3], 0)


def test_attention_to_an_int8_cache_is_that_to_its_rounded_floats():
    cache = rounded(random_cache())
    floats = KVCache(as_floats(cache.keys), as_floats(cache.values), cache.lengths)
    rng = np.random.default_rng(1)
    query, new = rng.standard_normal((3, 2, 6, 8), np.float32), rng.standard_normal((2, 3, 2, 3, 8), np.float32)
    choice = choose_slots(cache.slots, cache.lengths)
    for layer in range(2):
        found, expected = (cached_attend(query, *new, given, jnp.int32(layer), choice) for given in (cache, floats))
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_new_tokens_are_rounded_into_their_slots():
    cache, new = rounded(random_cache()), np.random.default_rng(2).standard_normal((2, 2, 3, 3, 2, 8), np.float32)
    longer = jax.jit(lambda cache: cache.extended(*new, counts=jnp.array([2, 1, 0]), read=new))(cache)
    np.testing.assert_array_equal(longer.lengths, [7, 1, 11])
    for stack, before, added in zip((longer.keys, longer.values), (cache.keys, cache.values), new, strict=True):
        expected = Int8Slots.of(added)
        for row, length in enumerate(cache.lengths.tolist()):
            for name in ("steps", "scales"):
                found = getattr(stack, name)[:, row]
                np.testing.assert_array_equal(found[:, :, length : length + 2], getattr(expected, name)[:, row])
                np.testing.assert_array_equal(found[:, :, :length], getattr(before, name)[:, row, :, :length])


def test_the_logits_hardly_change(tiny: MossAudio):
    inputs = question(tiny, [403])
    hidden, cache = tiny.prefill(inputs, inputs.tokens.shape[1] + 8)
    caches = {"float": cache, "int8": rounded(cache)}
    token = tiny.logits(hidden).argmax(-1)
    for _ in range(6):
        logits = {}
        for name, cache in caches.items():
            hidden, caches[name] = tiny.decode(token, jnp.array([True]), cache)
            logits[name] = tiny.logits(hidden)
        off = np.abs(logits["int8"] - logits["float"]).max() / np.abs(logits["float"]).max()
        assert 0 < off < 0.01
        token = logits["float"].argmax(-1)


def test_it_takes_a_byte_a_number_and_a_scale_a_vector(tiny: MossAudio):
    language = dataclasses.replace(tiny.config.language_config, head_dim=128)
    sizes = [
        sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))
        for cache in (KVCache.empty(language, 2, 64, dtype) for dtype in (jnp.bfloat16, jnp.int8))
    ]
    assert sizes[1] / sizes[0] == pytest.approx((128 + 4) / 256)


def test_replies_of_an_engine_depend_on_their_requests_alone(released, requests):  # noqa: F811
    model, processor = load_model(released, dtype=jnp.float32), load_processor(released)
    with Engine(model, processor, slots=3, max_length=256, every=4, kv_int8=True) as engine:
        engine.warm_up()
        assert isinstance(engine._answers.cache.keys, Int8Slots)
        together = [reply.ids for reply in engine.run(requests)]
        assert together == [engine.run([request])[0].ids for request in requests]
        assert together == [reply.ids for reply in engine.run(requests[::-1])][::-1]
